"""The folder of a run: one run at a time writes there, and what a finished one has left stays. Files appear whole."""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DataError, MpiEfError

if TYPE_CHECKING:
    from mpi_ef.checkpoint.lock import FolderLock

__all__ = ["RunFolder", "by_first", "replacing"]


_TOLD = 1 << 20  # characters of a file by which it is told what it is
# Names in a folder of checkpoints that are those of checkpoints, finished or not; and what is in one, also in a damaged one.
_CHECKPOINTS = ("step-*", ".tmp-*", ".old-step-*")
_PARTS = ("COMMIT", "BAD", "OWNER", "master.json", "rank-*.h5", ".nfs*")


class RunFolder:
    """The folder of a run, made where it is missing. Construction is collective.

    Rank 0 has its lock, as that of a folder of checkpoints (:class:`mpi_ef.checkpoint.lock.FolderLock`): it tells who
    writes, and is taken over when that process has ended, also by a signal that nobody can handle.

    Parameters
    ----------
    comm : MPI communicator
    path : Path
    job, restart : str, int
        Identity of a batch job that may be started again, and how often it was: see :class:`Store`.

    Raises
    ------
    DataError
        On all ranks: another run writes there, or the folder cannot be made.
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
        """Refuse a folder in which a run would overwrite or remove what no run has written. Collective.

        Parameters
        ----------
        files : mapping of str to callable
            Names of the files that a run writes; what tells by the text of one, its first megabyte, whether a run has
            written it. An empty one is nobody's.

        Raises
        ------
        DataError
            On all ranks: there is such a file, or one among the checkpoints, or a folder that never was a checkpoint.
        """
        by_first(self._comm, self.path, lambda: self._refuse_others(files))

    def _refuse_others(self, files: Mapping[str, Callable[[str], bool]]) -> None:
        for name, is_of_a_run in files.items():
            path = self.path / name
            if not path.exists():
                continue
            text = ""
            if path.is_file():
                with path.open(encoding="utf-8", errors="replace") as file:
                    text = file.read(_TOLD)
            if not path.is_file() or (text.strip() and not is_of_a_run(text)):
                raise DataError(f"{path}: no run has written it, and this one would overwrite it; move it, or give another "
                                "--out")
        for pattern in _CHECKPOINTS:
            for path in (self.path / "checkpoints").glob(pattern):
                inside = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
                if inside and not any(fnmatch(name, part) for name in inside for part in _PARTS):
                    raise DataError(
                        f"{path}: is no checkpoint, and this run would remove it; move it, or give another --out"
                    )

    def begin(self, proof: str, *, others: Sequence[str] = (), overwrite: bool = False) -> None:
        """Make room for a run that begins anew. Collective.

        Parameters
        ----------
        proof : str
            The file that only a finished run has.
        others : sequence of str
            What else a run may have left: removed with `overwrite`, as are checkpoints.
        overwrite : bool

        Raises
        ------
        DataError
            On all ranks, without `overwrite`: there is a finished run, or there are checkpoints.
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
        """Return what is in the JSON file that only a finished run has; None without it. Collective.

        Raises
        ------
        DataError
            On all ranks: it cannot be read.
        """
        found: list[dict[str, Any]] = []
        by_first(self._comm, self.path, lambda: found.extend(self._read(proof)))
        told: list[dict[str, Any]] = self._comm.allgather(found)[0]
        return told[0] if told else None

    def _read(self, proof: str) -> Iterator[dict[str, Any]]:
        path = self.path / proof
        try:
            if path.exists():
                yield json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: cannot be read as JSON ({error}); remove it, and it is written anew") from None

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
        with one_line(self.path):
            yield

    def close(self) -> None:
        """Let others write there. Local; also happens when the process ends."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def by_first(comm: Comm, path: Path, action: Callable[[], object]) -> None:
    """Let rank 0 do something in a folder; raise on all ranks what it raises. Collective."""
    text = ""
    if comm.Get_rank() == 0:
        try:
            with one_line(path):
                action()
        except Exception as error:  # the others wait
            text = str(error) if isinstance(error, MpiEfError) else f"{type(error).__name__}: {error}"
    if told := comm.allgather(text)[0]:
        refusal = DataError(told)
        refusal.everywhere = True
        raise refusal


@contextmanager
def one_line(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into a `DataError` of one line. Local."""
    try:
        yield
    except MpiEfError:
        raise
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}; make room there, or give another --out") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; afterwards the file has its own, whole, or there is what was there before. Local.

    Of several programs that write one file the last has written it, never several of them.

    Raises
    ------
    DataError
        The file cannot be written.
    """
    draft = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); make room there, or name another file"
        ) from error
    finally:
        with suppress(OSError):  # there is no such folder
            draft.unlink()
