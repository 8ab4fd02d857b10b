"""What the doctor tries in the folder of runs: space, what checkpoints need of a file system, HDF5 and its locks."""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from mpi_ef.jobs.doctor.finding import Finding, Told, who
from mpi_ef.jobs.metrics import in_bytes

__all__ = ["MB", "NETWORK", "attempt", "existing", "file_system", "folder_facts", "judge_folder", "leave_token",
           "space_of"]  # fmt: skip

# Types of file systems that several nodes may share, as the kernel calls them.
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "fuse.beegfs", "fhgfs", "ceph", "fuse.ceph", "cifs", "smb3", "afs",
           "9p", "panfs", "wekafs", "orangefs", "pvfs2", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "virtiofs", "dvs",
           "vast")  # fmt: skip

MB = 1 << 20
_LEAST_OUT, _FEW_OUT = 64 * MB, 1024 * MB  # below: an error, a warning


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system of `path`, which exists; empty where nobody tells. Local."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    place = path.resolve()
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        if (place == point or point in place.parents) and len(str(point)) >= best:
            best, kind = len(str(point)), after.split()[0]
    return kind


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above that is there. Local."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def leave_token(folder: Path) -> Path:
    """Make an empty file whose name nobody has ever asked for: other nodes see it, or do not. Local."""
    token = folder / f".mpi-ef-doctor-{uuid.uuid4().hex}"
    token.touch()
    return token


def space_of(path: Path) -> dict[str, Any]:
    """Return how much room there is on the file system of `path`, which exists. Local."""
    usage, status = shutil.disk_usage(path), os.statvfs(path)
    return {
        "path": str(path),
        "kind": file_system(path),
        "free": usage.free,
        "total": usage.total,
        "files_left": status.f_favail if status.f_files else None,
    }


def attempt(action: Callable[[], object]) -> str:
    """Return why something cannot be done; nothing when it can."""
    try:
        action()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def folder_facts(environment: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Try in the folder of runs what checkpoints need of it. Local; leaves nothing there."""
    import h5py

    folder = existing(out)
    facts: dict[str, Any] = {
        **space_of(folder),
        "asked": str(out),
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
        "locking": environment.get("HDF5_USE_FILE_LOCKING", ""),
    }
    try:
        trial = Path(tempfile.mkdtemp(prefix=".mpi-ef-doctor-", dir=folder))
    except OSError as error:
        return facts | {"write": error.strerror or str(error)}
    try:
        file = trial / "file"
        facts["write"] = attempt(lambda: file.write_bytes(bytes(MB)))
        if facts["write"]:
            return facts
        began = perf_counter()
        facts["fsync"] = attempt(lambda: _synchronize(file))
        facts["fsync_seconds"] = perf_counter() - began
        facts["link"] = attempt(lambda: os.link(file, trial / "link"))
        facts["rename"] = attempt(lambda: file.rename(trial / "other"))
        facts["lock"] = attempt(lambda: _lock(trial / "other"))
        facts["hdf5_write"] = attempt(lambda: _write_hdf5(trial / "file.h5"))
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return facts


def _synchronize(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _lock(file: Path) -> None:
    with file.open("rb+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(opened, fcntl.LOCK_UN)


def _write_hdf5(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["x"] = [1.0, 2.0]
    with h5py.File(path, "r") as file:
        if file["x"][:].tolist() != [1.0, 2.0]:
            raise OSError("what was written is not what is read")


def judge_folder(told: Sequence[Told]) -> Iterator[Finding]:
    """Yield what there is to say about the folder of runs."""
    one = told[0]
    unwritable = [some for some in told if some["write"]]
    if unwritable:
        where, ranks = who(unwritable, told)
        first = unwritable[0]
        yield Finding(
            "Files",
            "folder",
            "error",
            f"nothing can be written to {first['path']} ({first['kind'] or 'unknown file system'}): "
            f"{first['write']}{where}",
            "choose the folder of runs with --out, on a file system that compute nodes may write to; look at your "
            "quota",
            ranks,
        )
        return
    there = one["path"]
    if Path(one["asked"]).absolute() != Path(there):
        there += f" (for {one['asked']})"
    yield Finding(
        "Files",
        "folder",
        "ok",
        f"runs go to {there}: {one['kind'] or 'unknown file system'}, {in_bytes(one['free'])} free",
    )
    yield from _judge_room(told)
    yield from _judge_abilities(told)
    if one["kind"] in ("tmpfs", "ramfs"):
        yield Finding(
            "Files",
            "folder-in-memory",
            "warning",
            f"{one['path']} is memory of this node: checkpoints there are gone with it",
            "choose a folder on a parallel file system with --out",
        )


def _judge_room(told: Sequence[Told]) -> Iterator[Finding]:
    least = min(told, key=lambda one: int(one["free"]))
    if least["free"] < _FEW_OUT:
        yield Finding(
            "Files",
            "folder-space",
            "error" if least["free"] < _LEAST_OUT else "warning",
            f"{in_bytes(least['free'])} free in {least['path']}",
            "delete old runs (mpi-ef checkpoint ls RUN), keep fewer checkpoints (--keep), or choose another "
            "folder with --out",
        )
    if least["files_left"] is not None and least["files_left"] < 1000:
        yield Finding(
            "Files",
            "folder-files",
            "warning",
            f"{least['files_left']} more files may be made in {least['path']}",
            "delete files, or choose another folder with --out",
        )


def _judge_abilities(told: Sequence[Told]) -> Iterator[Finding]:
    one = told[0]
    for fact, name in (("link", "hard-links"), ("rename", "rename"), ("fsync", "fsync")):
        unable = [some for some in told if some[fact]]
        if unable:
            where, ranks = who(unable, told)
            yield Finding(
                "Files",
                name,
                "error",
                f"{one['kind'] or 'the file system'} of {one['path']} cannot do what checkpoints need ({fact}): "
                f"{unable[0][fact]}{where}",
                "choose a folder on another file system with --out",
                ranks,
            )
    if float(one["fsync_seconds"] or 0) > 2:
        yield Finding(
            "Files",
            "slow-disk",
            "note",
            f"1 MB takes {one['fsync_seconds']:.1f} s to reach the disk of {one['path']}",
            "write checkpoints less often, or train with --save-in-background",
        )
    versions = f"HDF5 {one['hdf5']} (h5py {one['h5py']})"
    failing = [some for some in told if some["hdf5_write"]]
    if not failing:
        locks = "with its locks"
        if one["locking"].upper() in ("FALSE", "0"):
            locks = "without locks (HDF5_USE_FILE_LOCKING)"
        elif one["lock"]:
            locks = "although this file system has no locks"
        yield Finding("Files", "hdf5", "ok", f"{versions} writes and reads there, {locks}")
        return
    where, ranks = who(failing, told)
    lock = "lock" in failing[0]["hdf5_write"] or failing[0]["lock"]
    yield Finding(
        "Files",
        "hdf5-lock" if lock else "hdf5",
        "warning" if lock else "error",
        f"{versions} cannot write to {one['path']}: {failing[0]['hdf5_write']}{where}",
        "export HDF5_USE_FILE_LOCKING=FALSE (checkpoints are written without HDF5's locks; other programs that "
        "open them are not)"
        if lock
        else "choose a folder on another file system with --out",
        ranks,
    )
