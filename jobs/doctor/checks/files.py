"""The folder of runs: space, what checkpoints need of a file system, HDF5 and its locks."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context, lines_of, trial_in
from mpi_ef.jobs.metrics import in_bytes

__all__ = ["MB", "NETWORK", "attempt", "collect", "existing", "file_system", "judge", "space_of"]

# Types of file systems that several nodes may share, as the kernel calls them.
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "fuse.beegfs", "fhgfs", "ceph", "fuse.ceph", "cifs", "smb3", "afs",
           "9p", "panfs", "wekafs", "orangefs", "pvfs2", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "virtiofs", "dvs",
           "vast")
MB, UNKNOWN = 1 << 20, "unknown file system"
_LEAST_OUT, _FEW_OUT = 64 * MB, 1024 * MB  # below: an error, a warning


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system of `path`, which exists, in words where the system has no list. Local."""
    best, kind, place = -1, UNKNOWN, path.resolve()
    for line in lines_of(mounts):
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        if place.is_relative_to(point) and len(str(point)) >= best:
            best, kind = len(str(point)), after.split()[0]
    return kind


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above that is there. Local."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def space_of(path: Path) -> Facts:
    """Return how much space there is on the file system of `path`, which exists. Local."""
    status = os.statvfs(path)
    return {"path": str(path), "kind": file_system(path), "free": shutil.disk_usage(path).free,
            "files_left": status.f_favail if status.f_files else None}


def attempt(action: Callable[[], object]) -> str:
    """Return why something cannot be done; nothing when it can. Local."""
    try:
        action()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def collect(context: Context) -> Facts:
    """Try in the folder of runs what checkpoints need of it. Local; leaves nothing there."""
    import h5py

    out = context.config.out
    folder = existing(out)
    facts: Facts = {
        **space_of(folder),
        "asked": str(out),
        "versions": f"HDF5 {h5py.version.hdf5_version} (h5py {h5py.__version__})",
        "locking": context.environment.get("HDF5_USE_FILE_LOCKING", ""),
    }
    try:
        with trial_in(folder) as trial:
            facts |= _tried(trial / "file")
    except OSError as error:
        facts["write"] = error.strerror or str(error)
    return facts


def _tried(file: Path) -> Facts:
    facts: Facts = {"write": attempt(lambda: file.write_bytes(bytes(MB)))}
    if not facts["write"]:
        began = perf_counter()
        facts["fsync"] = attempt(lambda: _with_file(file, os.fsync))
        facts["fsync_seconds"] = perf_counter() - began
        facts["link"] = attempt(lambda: os.link(file, file.with_name("link")))
        facts["rename"] = attempt(lambda: file.rename(file.with_name("other")))
        facts["lock"] = attempt(lambda: _with_file(file.with_name("other"), _lock))
        facts["hdf5_write"] = attempt(lambda: _write_hdf5(file.with_name("file.h5")))
    return facts


def _with_file(file: Path, action: Callable[[int], object]) -> None:
    with file.open("rb+") as opened:
        action(opened.fileno())


def _lock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(file, fcntl.LOCK_UN)


def _write_hdf5(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["x"] = [1.0, 2.0]
    with h5py.File(path, "r") as file:
        if file["x"][:].tolist() != [1.0, 2.0]:
            raise OSError("what was written is not what is read")


def judge(ranks: Ranks) -> Findings:
    """Yield whether checkpoints can be written."""
    if closed := ranks.which("write"):
        yield finding("folder", closed)
        return
    one = ranks[0]
    elsewhere = f" (for {one['asked']})" if Path(one["asked"]).absolute() != Path(one["path"]) else ""
    yield finding("folder.ok", ranks, elsewhere=elsewhere, free=in_bytes(one["free"]))
    least = min(ranks, key=lambda some: some["free"])
    if least["free"] < _FEW_OUT:
        yield finding("folder-space", Ranks([least]), severe=least["free"] < _LEAST_OUT, free=in_bytes(least["free"]))
    if least["files_left"] is not None and least["files_left"] < 1000:
        yield finding("folder-files", Ranks([least]))
    for fact, key in (("link", "hard-links"), ("rename", "rename"), ("fsync", "fsync")):
        if unable := ranks.which(fact):
            yield finding(key, unable)
    if (one["fsync_seconds"] or 0) > 2:
        yield finding("slow-disk", ranks)
    if failing := ranks.which("hdf5_write"):
        locks = "lock" in failing[0]["hdf5_write"] or failing[0]["lock"]
        yield finding("hdf5-lock" if locks else "hdf5", failing)
    else:
        used = "although this file system has no locks" if one["lock"] else "with its locks"
        off = one["locking"].upper() in ("FALSE", "0")
        yield finding("hdf5.ok", ranks, locks="without locks (HDF5_USE_FILE_LOCKING)" if off else used)
    if one["kind"] in ("tmpfs", "ramfs"):
        yield finding("folder-in-memory", ranks)
