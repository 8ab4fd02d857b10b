"""One job writes to a folder of checkpoints, or of a run: a lock file that names its process, and expires soon after it.

No lock of the kernel (flock): file systems of clusters have none, or one that holds on a node only, and it is inherited by
workers that outlive a killed rank. A process of this host is identified by its number and start time, where both mean the
same here as there: in one boot and one PID namespace. Hosts of the same name, as containers may have, are told apart so.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mpi_ef.documents import MARK, opened, read_json, shown
from mpi_ef.errors import CheckpointError

__all__ = ["LOCK", "FolderLock", "Owner", "age_seconds"]

LOCK = "LOCK"
_log = logging.getLogger("mpi_ef.checkpoint")
_BEAT_SECONDS = 15.0
_WATCH_SECONDS = 1.0
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # of file systems without hard links
_WORDS = 3  # of `Owner.started`
_SILENT_SECONDS = 120.0  # a lock of another host that was not touched for so long has no owner


@dataclass(frozen=True)
class Owner:
    """A process that writes checkpoints."""

    host: str
    pid: int
    started: str  # boot, when the process began in it, as process numbers are used again, and PID namespace
    job: str  # identity of the batch job that stays when it is requeued; may be empty
    restart: int  # how often that job was started again
    run: str  # identity of the run
    since: str  # local time, for messages
    token: str  # different for every lock

    @classmethod
    def this_process(cls, job: str, run: str, restart: int = 0) -> "Owner":
        """Return the owner that this process is."""
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), pid, _started(pid), job, restart, run, since, uuid.uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> "Owner | None":
        """Return the owner in a file; None when there is no file or no owner in it."""
        try:
            found = read_json(path, MARK)
            return cls(**found) if all(type(found[name]) is kind for name, kind in cls.__annotations__.items()) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def holds(self, path: Path) -> bool:
        """Return whether a file is of this owner."""
        holder = Owner.read(path)
        return holder is not None and holder.token == self.token

    def write(self, path: Path) -> None:
        """Write the owner to a new file."""
        with path.open("x", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    def gone(self, silent_seconds: float) -> bool:
        """Return whether the process has ended, as far as can be determined here."""
        if self.elsewhere():
            return silent_seconds > _SILENT_SECONDS
        return _started(self.pid).split()[:2] != self.started.split()[:2]  # older versions wrote no namespace

    def elsewhere(self) -> bool:
        """Return whether the number of the process says nothing here: another host, another boot or PID namespace."""
        mine, theirs = _started(os.getpid()).split(), self.started.split()
        apart = len(mine) == len(theirs) == _WORDS and (mine[0], mine[2]) != (theirs[0], theirs[2])
        return apart or self.host != socket.gethostname()

    def replaces(self, other: "Owner") -> bool:
        """Return whether this is the process of the other, or a later start of its batch job, which had to end before."""
        same = (self.host, self.pid, self.started) == (other.host, other.pid, other.started)
        return same or (self.job == other.job != "" and self.restart > other.restart)


class FolderLock:
    """The right to write to a folder, held until `release` or the end of the process.

    A lock is taken over when its process on this host has ended, when it belongs to an earlier start of the same batch
    job, or when nobody has touched it for two minutes and it is of another host, boot or PID namespace: a thread touches it
    four times a minute.
    Ages are differences of times of the folder's file system, so clocks need not agree.

    With `wait`, a lock of another host is watched until it was touched, and is refused, or was silent for two minutes; else
    it is refused at once: `CheckpointError`. `writes` is what the owner writes there, for messages. What dead processes have
    left of taking locks is removed.
    """

    def __init__(self, folder: Path, owner: Owner, *, wait: bool = False, writes: str = "checkpoints") -> None:
        self._path, self._owner, self._wait, self._writes = folder / LOCK, owner, wait, writes
        mine = folder / f".{LOCK}-{owner.token}"
        try:
            owner.write(mine)
            with opened(mine) as descriptor:  # a lock that a power loss has torn would stop the next start
                os.fsync(descriptor)
            for _ in range(5):
                try:
                    self._appear(mine)
                    break
                except FileExistsError:
                    self._remove_stale()
            else:
                raise CheckpointError(f"{folder}: other jobs take the lock all the time; let one of them write there")
        finally:
            with suppress(OSError):  # where a folder refuses that, the error that is on its way says more
                mine.unlink()
        self._tidy()
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(self._path, owner, ended), daemon=True, name="folder lock")
        beat.start()
        self._finalizer = weakref.finalize(self, _release, self._path, owner, ended)

    def check(self) -> None:
        """Raise unless the lock is still this one's: a process that slept for minutes may have lost it."""
        if not os.path.lexists(self._path):
            raise CheckpointError(f"{self._path}: the lock is gone: somebody has removed it, or has removed or moved the "
                                  "folder; start again, where this job may write alone")
        if not self._owner.holds(self._path):
            raise CheckpointError(f"{self._path}: the lock was taken over by {_described(Owner.read(self._path))}; let one "
                                  "job write there, or give this one another folder")

    def release(self) -> None:
        """Let others write."""
        self._finalizer()

    def _appear(self, mine: Path) -> None:
        """Give the lock its name: whole, or not at all when there is one."""
        try:
            os.link(mine, self._path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._owner.write(self._path)  # of several processes that try, one makes it

    def _remove_stale(self) -> None:
        holder, silent_seconds = Owner.read(self._path), age_seconds(self._path)
        if holder is None and silent_seconds < _SILENT_SECONDS and self._path.exists():
            raise CheckpointError(f"{self._path}: it cannot be read; remove it when no job writes there")
        if holder is not None and not (
            holder.gone(silent_seconds) or self._owner.replaces(holder) or (self._wait and self._falls_silent(holder))
        ):
            raise CheckpointError(f"{self._path.parent}: {_described(holder)} writes {self._writes} there; give this job "
                                  f"another folder, or remove {LOCK} if that one has ended")
        aside = self._path.with_name(f".{LOCK}-stale-{self._owner.token}")
        try:
            self._path.rename(aside)  # of several processes that find it stale, one gets it
        except FileNotFoundError:
            return
        if (found := Owner.read(aside)) == holder:
            aside.unlink(missing_ok=True)
        elif found is not None or aside.exists():  # another process was faster, and this is the new lock: put it back
            aside.rename(self._path)

    def _tidy(self) -> None:
        """Remove drafts of locks, and probes, that nobody has touched for two minutes: their processes were killed."""
        with suppress(OSError):
            now = self._path.lstat().st_mtime  # by the clock of the file system
            for pattern in (f".{LOCK}-*", ".probe-*"):
                for draft in self._path.parent.glob(pattern):
                    with suppress(OSError):
                        if now - draft.lstat().st_mtime > _SILENT_SECONDS:
                            draft.unlink()

    def _falls_silent(self, holder: Owner) -> bool:
        """Watch a lock from elsewhere until its owner touches it, or two minutes have passed without."""
        if not holder.elsewhere():
            return False
        touched, began = _changed(self._path), time.monotonic()
        _log.warning("%s: %s has it; waiting for a sign of life", self._path, _described(holder))
        while _changed(self._path) == touched and Owner.read(self._path) == holder:
            if max(age_seconds(self._path), time.monotonic() - began) > _SILENT_SECONDS:  # it may be of a time to come
                return True
            time.sleep(_WATCH_SECONDS)
        return not self._path.exists()


def _changed(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0


def _described(holder: Owner | None) -> str:
    if holder is None:
        return "nobody that can be named"
    job = f" of job {holder.job}" if holder.job else ""
    return shown(f"process {holder.pid}{job} on {holder.host} (since {holder.since})")


def _beat(path: Path, owner: Owner, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        if owner.holds(path):
            with suppress(OSError):
                os.utime(path)


def _release(path: Path, owner: Owner, ended: threading.Event) -> None:
    ended.set()
    if owner.pid != os.getpid() or not owner.holds(path):
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # what the folder has refused before is the error to tell
        _log.warning("%s: cannot be removed (%s): remove it when no job writes there", path, error.strerror)


def age_seconds(path: Path) -> float:
    """Return how long ago `path` was changed, by the clock of its file system."""
    probe = path.with_name(f".probe-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.lstat().st_mtime
    except OSError:
        return 0.0
    finally:
        with suppress(OSError):
            probe.unlink()


def _started(pid: int) -> str:
    """Return when a process began; empty when there is none. Without /proc, whether there is one must do."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    else:
        return "" if after_name[0] in "ZX" else f"{boot} {after_name[19]} {_namespace()}".strip()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "running"
    return "running"


def _namespace() -> str:
    """Return the PID namespace of this process; empty where the kernel does not tell."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
