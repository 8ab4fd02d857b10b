"""The folder of a run: one run at a time writes there, and what a finished one has left stays. Files appear whole."""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mpi_ef.comm.protocol import Comm
from mpi_ef.documents import read_json
from mpi_ef.errors import DataError, MpiEfError, everywhere

if TYPE_CHECKING:
    from mpi_ef.checkpoint.lock import FolderLock

__all__ = ["RunFolder", "by_first", "replacing", "write_whole"]

T = TypeVar("T")

_DRAFT = "[0-9a-f]" * 8  # before the names of drafts
_HEAD = 1 << 20  # characters of a file that tell what it is
# Names in a folder of checkpoints that are those of checkpoints, finished or not; and what is in one, also in a damaged one.
_CHECKPOINTS = ("step-*", ".tmp-*", ".old-step-*")
_PARTS = ("COMMIT", "BAD", "OWNER", "master.json", "rank-*.h5", ".nfs*")


class RunFolder:
    """The folder of a run, made where it is missing. Construction is collective.

    Rank 0 has its lock, as that of a folder of checkpoints (:class:`mpi_ef.checkpoint.lock.FolderLock`): it names the
    process that writes, and is taken over when that has ended, also by SIGKILL.

    `job` and `restart` identify a batch job that may be started again, and how often it was: see :class:`Store`. Raises
    `DataError` on all ranks where another run writes there, or the folder cannot be made.
    """

    def __init__(self, comm: Comm, path: Path, *, job: str = "", restart: int = 0) -> None:
        self._comm, self.path, self._job, self._restart = comm, path, job, restart
        self._lock: FolderLock | None = None
        by_first(self._comm, self.path, self._take)

    def _take(self) -> None:
        from mpi_ef.checkpoint.lock import FolderLock, Owner

        self.path.mkdir(parents=True, exist_ok=True)
        owner = Owner.this_process(self._job, str(self.path), self._restart)
        self._lock = FolderLock(self.path, owner, wait=True, writes="a run")

    def refuse_others(self, files: Mapping[str, Callable[[str], bool]]) -> None:
        """Raise `DataError` on all ranks where a run would overwrite or remove what no run has written. Collective.

        Parameters
        ----------
        files : mapping of str to callable
            Names of the files that a run writes, and whether the first megabyte of one, unless it is empty, is from a run.
        """
        by_first(self._comm, self.path, lambda: self._refuse_others(files))

    def _refuse_others(self, files: Mapping[str, Callable[[str], bool]]) -> None:
        for name, is_of_a_run in files.items():
            path = self.path / name
            if not path.exists():
                continue
            if path.is_file():
                with path.open(encoding="utf-8", errors="replace") as file:
                    text = file.read(_HEAD)
                if not text.strip() or is_of_a_run(text):
                    continue
            raise DataError(f"{path}: no run has written it, and this one would overwrite it; move it, or give another "
                            "--out")
        for pattern in _CHECKPOINTS:
            for path in (self.path / "checkpoints").glob(pattern):
                inside = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
                if inside and not any(fnmatch(name, part) for name in inside for part in _PARTS):
                    raise DataError(f"{path}: is no checkpoint, and this run would remove it; move it, or give another "
                                    "--out")

    def tidy(self, names: Iterable[str]) -> None:
        """Remove what killed runs have left of writing these files with :func:`write_whole`. Collective."""
        by_first(self._comm, self.path, lambda: self._tidy(names))

    def _tidy(self, names: Iterable[str]) -> None:
        for draft in [path for name in names for path in self.path.glob(f".{_DRAFT}-{name}")]:
            with suppress(OSError):
                draft.unlink()

    def begin(self, proof: str, *, others: Sequence[str] = (), overwrite: bool = False) -> None:
        """Prepare the folder for a new run. Collective.

        Where there is the file `proof`, which only a finished run has, or a checkpoint, `DataError` is raised on all ranks;
        with `overwrite` these are removed, and the files `others`.
        """
        by_first(self._comm, self.path, lambda: self._clear([proof, *others]) if overwrite else self._refuse(proof))

    def _refuse(self, proof: str) -> None:
        from mpi_ef.checkpoint.manifest import committed_steps

        if steps := [step for step, _ in committed_steps(self.path / "checkpoints")]:
            raise DataError(f"{self.path} has checkpoints of another run, up to step {steps[-1]}; resume from them, or take "
                            "another folder, or pass --overwrite")
        if (self.path / proof).exists():
            raise DataError(f"{self.path} has a finished run ({proof}); give another --out, or pass --overwrite")

    def _clear(self, names: Sequence[str]) -> None:
        from mpi_ef.checkpoint.folder import Folder

        self._refuse_others({})
        if (self.path / "checkpoints").is_dir():
            checkpoints = Folder(self.path / "checkpoints", 1, 0, self._job, self._restart)
            try:
                checkpoints.claim(str(self.path))
                checkpoints.clear()
            finally:
                checkpoints.release()
        self._remove(names)

    def finished(self, proof: str) -> dict[str, Any] | None:
        """Return what is in the JSON file that only a finished run has; None without it. Collective."""
        return by_first(self._comm, self.path, lambda: self._read(self.path / proof))

    def _read(self, path: Path) -> dict[str, Any] | None:
        summary, reason = None, "it is no object"
        try:
            summary = read_json(path, follow=True)
        except FileNotFoundError:
            return None
        except ValueError as error:
            reason = str(error)
        if isinstance(summary, dict):
            return summary
        raise DataError(f"{path}: cannot be read as JSON ({reason}); remove it, and it is written anew")

    def remove(self, *names: str) -> None:
        """Remove files that are there. Collective."""
        by_first(self._comm, self.path, lambda: self._remove(names))

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what a file system refuses into one line, and write nothing where the lock was lost. Local."""
        if self._lock is not None:
            self._lock.check()
        try:
            with one_line(self.path):
                yield
        except DataError as error:
            error.may_pass = isinstance(error.__cause__, OSError)
            raise

    def close(self) -> None:
        """Release the lock. Local; also happens when the process ends."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def by_first(comm: Comm, path: Path, action: Callable[[], T]) -> T:
    """Call `action`, of a folder, on rank 0, and return its result or raise its error on all ranks. Collective."""
    mine: tuple[str, Any] = "", None
    if comm.Get_rank() == 0:
        try:
            with one_line(path):
                mine = "", action()
        except Exception as error:  # the others wait
            mine = str(error) if isinstance(error, MpiEfError) else f"{type(error).__name__}: {error}", None
    text, result = comm.allgather(mine)[0]
    if text:
        raise everywhere(DataError(text))
    first: T = result
    return first


@contextmanager
def one_line(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into a `DataError` of one line. Local."""
    try:
        yield
    except MpiEfError:
        raise
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}; make room there, or give another --out") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file, see :func:`replacing`. Local."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; afterwards the file has its own, whole, or there is what was there before. Local.

    So does a power loss. Of several programs that write one file the last has written it, never several of them. Raises
    `DataError`.
    """
    draft = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _confirm(draft)  # else a file that is empty may have the name after a power loss
        draft.replace(path)
        with suppress(OSError):  # not all file systems can say it of folders
            _confirm(path.parent)
    except OSError as error:
        text = f"{path}: cannot be written ({error.strerror or error}); make room there, or name another file"
        raise DataError(text) from error
    finally:
        with suppress(OSError):  # there is no such folder
            draft.unlink()


def _confirm(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
