"""What only rank 0 does in a folder of checkpoints: preparing, publishing, marking, deleting."""

import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpi_ef.documents import MARK, read
from mpi_ef.errors import CheckpointError

from .lock import FolderLock, Owner, age_seconds
from .manifest import (
    BAD,
    COMMIT,
    LATEST,
    RUNS,
    committed_steps,
    mark_of,
    read_manifest,
    replace_durably,
    step_name,
    sync_folder,
    sync_names,
    write_durably,
    write_manifest,
)
from .rankfile import FileEntry

__all__ = ["Folder", "identity"]

_OWNER = "OWNER"
_REMOVALS = 5  # attempts
_log = logging.getLogger("mpi_ef.checkpoint")


class Folder:
    """A folder of checkpoints, as rank 0 sees it, with the options of `Store`. All calls are local."""

    def __init__(self, path: Path, keep_last: int, keep_every: int, job: str, restart: int) -> None:
        self._path, self._keep_last, self._keep_every = path, keep_last, keep_every
        self._job, self._restart = job, restart
        self._lock: FolderLock | None = None

    def path_of(self, step: int) -> Path:
        """Return the directory of a step."""
        return self._path / step_name(step)

    def claim(self, run: str, *, wait: bool = True) -> None:
        """Make the folder and take the lock, unless this process has it."""
        if self._lock is None:
            self._path.mkdir(parents=True, exist_ok=True)
            sync_names(self._path)  # whoever has made it: a run's folder, a script
            self._lock = FolderLock(self._path, Owner.this_process(self._job, run, self._restart), wait=wait)
        self._lock.check()

    def make_directory(self, step: int, run: str) -> str:
        """Take the lock, remove what dead jobs have left, and make a directory to write to; return its name."""
        self.claim(run, wait=False)
        owner = Owner.this_process(self._job, run, self._restart)
        self._remove_leftovers(run)
        place = self._path / f".tmp-{step_name(step)}-{uuid.uuid4().hex[:12]}"
        place.mkdir()
        try:
            owner.write(place / _OWNER)
        except OSError:
            self.abandon(place.name)
            raise
        return place.name

    def abandon(self, place: str) -> None:
        """Remove a directory that did not become a checkpoint, also while another rank still begins a file there."""
        for _ in range(_REMOVALS):
            shutil.rmtree(self._path / place, ignore_errors=True)
            if not os.path.lexists(self._path / place):  # also where the folder cannot be read any more
                break

    def publish(self, place: str, step: int, run: str, document: Any, files: list[FileEntry]) -> None:
        """Make what was written a checkpoint: manifest, marker, name. Then delete what is not kept any more.

        When this returns, a power loss takes nothing of it away. Where the disk does not confirm the name, this raises, and
        nothing older is deleted.
        """
        if self._lock is None:
            raise CheckpointError(f"{self._path}: the store was closed; save again")
        written, final, aside = self._path / place, self.path_of(step), None
        write_manifest(written, step, run, document, files)
        (written / _OWNER).unlink(missing_ok=True)
        self._lock.check()
        self._note(run)
        if final.exists():  # stays valid under its other name while the new one has none: see committed_steps
            aside = self._path / f".old-{final.name}-{uuid.uuid4().hex[:12]}"
            final.rename(aside)
        try:
            written.rename(final)
        except OSError:
            if aside is not None:
                aside.rename(final)
            raise
        sync_folder(self._path)
        try:
            self._prune(step, aside)  # first: on a full disk it makes the room that the next line needs
            replace_durably(self._path / LATEST, f"{final.name}\n".encode())
        except OSError as error:  # the checkpoint is there; a later save tries again
            _log.warning("%s: saved, but older ones could not be tidied up: %s", final, error)

    def opens(self, path: Path) -> bool:
        """Return whether manifest, sizes, step and run are right; mark a damaged checkpoint."""
        seen = identity(path)
        try:
            run, known = read_manifest(path).run, self._runs()
        except CheckpointError as error:
            if not error.damaged:
                raise
            self.mark(path, [str(error)], seen)
            return False
        if known and run not in known:
            _log.warning("%s: of run %s, which has not written it here: not used", path, run[:8])
            return False
        return True

    def _note(self, run: str) -> None:
        """Note that a run writes here; where no notes were taken so far, also those of the checkpoints that are there.

        Before its first checkpoint gets its name, and whole or not at all: runs that are not in the notes are not resumed.
        """
        try:
            known = self._runs()
        except CheckpointError as error:  # whoever resumes is told the same
            _log.warning("%s", error)
            return
        if run in known:
            return
        for _, path in () if known else committed_steps(self._path):
            with suppress(CheckpointError):
                known.append(read_manifest(path).run)
        lines = "".join(f"{one}\n" for one in dict.fromkeys([*known, run]))
        replace_durably(self._path / RUNS, lines.encode())
        sync_folder(self._path)

    def _runs(self) -> list[str]:
        """Return the runs that have written here, where that is known."""
        try:
            return read(self._path / RUNS, MARK).decode("utf-8", "replace").split()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except ValueError as error:
            raise CheckpointError(f"{self._path}: {error}; remove it when all checkpoints there are of one run") from None

    def name_at(self, step: int) -> str:
        """Return the name of the directory where the checkpoint of `step` is."""
        found = dict(committed_steps(self._path)).get(step)
        if found is None:
            if (reason := mark_of(self.path_of(step))) is not None:
                raise CheckpointError(f"{self.path_of(step)} is damaged: {reason}; use another checkpoint")
            steps = ", ".join(str(other) for other, _ in committed_steps(self._path)[-5:])
            raise CheckpointError(f"{self._path} has none; the last steps there are: {steps or 'none'}")
        return found.name

    def mark(self, path: Path, problems: list[str], seen: tuple[int, ...]) -> None:
        """Write into a checkpoint why it is not to be used; where that is impossible, go without.

        Not where the directory is no longer the one that was looked at, `seen`: its writer has replaced it meanwhile.
        """
        if identity(path) != seen:
            return
        _log.warning("%s: damaged, will not be used: %s", path, problems[0])
        try:
            write_durably(path / BAD, ("\n".join(problems[:20]) + "\n").encode("utf-8", "backslashreplace"))
        except (OSError, ValueError) as error:
            _log.warning("%s: cannot be marked as damaged: %s", path, error)

    def clear(self) -> None:
        """Remove every checkpoint, finished or not, and the notes about them; the lock has to be this one's."""
        self._drop([path for pattern in ("step-*", ".tmp-*", ".old-step-*") for path in self._path.glob(pattern)])
        for name in (LATEST, RUNS):
            (self._path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _remove_leftovers(self, run: str) -> None:
        for path in self._path.glob(".tmp-*"):
            owner = Owner.read(path / _OWNER)
            if owner is None or owner.run == run or owner.gone(age_seconds(path)):
                shutil.rmtree(path, ignore_errors=True)
        for draft in (path for name in (LATEST, RUNS) for path in self._path.glob(f".{name}-*")):
            with suppress(OSError):
                draft.unlink()
        valid = {path for _, path in committed_steps(self._path)}
        self._drop([path for path in self._path.glob(".old-step-*") if path not in valid])

    def _prune(self, saved: int, aside: Path | None) -> None:
        good = committed_steps(self._path)
        newest = {step for step, _ in good[-self._keep_last :]}
        doomed = [] if aside is None else [aside]
        doomed += [path for step, path in good if step not in newest and step != saved
                   and not (self._keep_every and step % self._keep_every == 0)]
        oldest = step_name(min(newest, default=saved))
        doomed += [marked.parent for marked in self._path.glob(f"step-*/{BAD}") if marked.parent.name < oldest]
        self._drop(doomed)

    def _drop(self, paths: list[Path]) -> None:
        """Take the names away first, on the disk too: what is half deleted is never taken for a checkpoint."""
        doomed = {path: self._path / f".tmp-drop-{uuid.uuid4().hex[:12]}" for path in paths}
        for path, name in doomed.items():
            path.rename(name)
        if doomed:
            with suppress(OSError):  # a full disk gets room below
                sync_folder(self._path)
        for name in doomed.values():
            shutil.rmtree(name, ignore_errors=True)


def identity(path: Path) -> tuple[int, ...]:
    """Return what distinguishes a checkpoint from later ones in a directory of the same name."""
    try:
        status = (path / COMMIT).stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns
