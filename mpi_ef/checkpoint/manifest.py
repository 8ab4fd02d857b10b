"""Names in a folder of checkpoints; the manifest, and the marker that makes a checkpoint valid."""

import errno
import hashlib
import json
import os
import re
import stat
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpi_ef.documents import DOCUMENT, MARK, check_size, parse_json, read, shown, written
from mpi_ef.errors import CheckpointError, briefly

from .rankfile import DamageError, FileEntry, check_filled, reading

__all__ = ["BAD", "COMMIT", "LATEST", "MANIFEST", "RUNS", "VERSION", "Manifest", "checked_json", "committed_steps",
           "damaged_steps", "mark_of", "rank_name", "read_manifest", "replace_durably", "step_name", "sync_folder",
           "sync_names", "versions", "write_durably", "write_manifest"]

MANIFEST, COMMIT, BAD, LATEST, RUNS = "master.json", "COMMIT", "BAD", "LATEST", "RUNS"
FORMAT, VERSION, MIN_READER = "mpi_ef.checkpoint", 2, 2
_STEP = re.compile(r"step-(\d{8,18})|\.old-step-(\d{8,18})-[0-9a-f]+")


@dataclass(frozen=True)
class Manifest:
    """The content of ``master.json``: that of a `Checkpoint`, and an entry for the file of every rank."""

    step: int
    world_size: int
    run: str
    document: Any
    files: tuple[FileEntry, ...]
    written_by: dict[str, str]
    written_at: str


def step_name(step: int) -> str:
    """Return the name of the directory of a step; names sort like steps."""
    return f"step-{step:08d}"


def rank_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.h5"


def committed_steps(folder: Path) -> list[tuple[int, Path]]:
    """Return steps and directories of the checkpoints that were finished and are not marked, oldest first.

    A checkpoint whose replacement was interrupted lies under another name; it counts where its step has no other.
    """
    found: dict[int, Path] = {}
    for path in _directories(folder):
        match = _STEP.fullmatch(path.name)
        if match and _is_there(path / COMMIT) and not _is_there(path / BAD):
            found.setdefault(int(match[1] or match[2]), path)
    return sorted(found.items())


def damaged_steps(folder: Path) -> list[Path]:
    """Return the directories of the checkpoints that are marked as damaged."""
    return [path for path in _directories(folder) if _STEP.fullmatch(path.name) and _is_there(path / BAD)]


def _directories(folder: Path) -> list[Path]:
    """Return what is in a folder, those under their own names first; nothing where there is no folder.

    Any other error is raised: a folder that cannot be read now is not an empty one.
    """
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(paths, key=lambda path: (path.name.startswith("."), path.name))


def mark_of(folder: Path) -> str | None:
    """Return why a checkpoint was marked as damaged, in one line; None where it was not."""
    path = folder / BAD
    if not _is_there(path):
        return None
    try:
        return shown(" ".join(read(path, MARK).decode("utf-8", "replace").split()))
    except (OSError, ValueError) as error:
        return shown(f"the reason cannot be read: {error}")


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_manifest(folder: Path, step: int, run: str, document: Any, files: list[FileEntry]) -> None:
    """Write the manifest, then the marker: the checkpoint is valid from then on, wherever it lies."""
    text = json.dumps({
        "format": FORMAT, "version": VERSION, "min_reader": MIN_READER, "step": step, "world_size": len(files), "run": run,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"), "written_by": versions(),
        "files": [{"name": entry.name, "size": entry.size, "crc32": f"{entry.crc32:08x}", "data": entry.data}
                  for entry in files],
        "document": document,
    }, indent=1).encode()
    try:
        check_size(text)
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST}: {error}; keep numbers in arrays") from None
    write_durably(folder / MANIFEST, text)
    sync_folder(folder)  # the names of all ranks' files are on the disk before the marker is
    write_durably(folder / COMMIT, f"{hashlib.sha256(text).hexdigest()}\n".encode())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest and the marker of a checkpoint; sizes of the rank files are compared.

    Raises
    ------
    CheckpointError
    """
    with reading(folder):
        for name in (COMMIT, MANIFEST) if folder.is_dir() else ():
            _status(folder / name)
        mark, text = read(folder / COMMIT, MARK), read(folder / MANIFEST, DOCUMENT)
        if mark != f"{hashlib.sha256(text).hexdigest()}\n".encode():
            raise DamageError("master.json is not what COMMIT says")
        manifest = _parse(folder, parse_json(text))
        named = _STEP.fullmatch(folder.name)
        if named and int(named[1] or named[2]) != manifest.step:
            raise DamageError(f"it is the checkpoint of step {manifest.step} under the name of another step")
        paths, blocks = [folder / entry.name for entry in manifest.files], 0
        for path, entry in zip(paths, manifest.files, strict=True):
            status = _status(path)
            if status.st_size != entry.size:
                raise DamageError(f"{entry.name} has {status.st_size} bytes where {entry.size} were written")
            blocks += 512 * status.st_blocks
        check_filled(paths, sum(entry.size for entry in manifest.files), blocks)
        return manifest


def _status(path: Path) -> os.stat_result:
    """Return what the system says of a file of a checkpoint, which is a regular one."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise DamageError(f"{path.name} is missing") from None
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(f"{path.name} is a link; put the file there")
    if not stat.S_ISREG(status.st_mode):
        raise DamageError(f"{path.name} is missing: there is something that is no regular file")
    return status


def _parse(folder: Path, found: Any) -> Manifest:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("master.json is of another format")
    needed = found.get("min_reader")
    if type(needed) is not int or needed < 1:
        raise ValueError("master.json has no version")
    if needed > VERSION:
        raise CheckpointError(f"{folder}: it needs a reader of version {needed}, and this one is version {VERSION}; "
                              f"read it with the mpi_ef that wrote it, or a newer one")
    files = tuple(_parse_file(rank, row, needed) for rank, row in enumerate(found["files"]))
    counts_fit = type(found["step"]) is int and found["step"] >= 0 and found["world_size"] == len(files) > 0
    texts = [found["run"], found["written_at"], *found["written_by"].values()]
    if not counts_fit or not all(isinstance(text, str) for text in texts):
        raise ValueError("master.json has fields of wrong types")
    return Manifest(found["step"], len(files), found["run"], found["document"], files, found["written_by"],
                    found["written_at"])


def _parse_file(rank: int, row: dict[str, Any], version: int) -> FileEntry:
    """Only the name that rank's file has passes: no path leads out of the directory."""
    if row["name"] != rank_name(rank):
        raise ValueError(f"master.json names {briefly(row['name'])} where {rank_name(rank)} belongs")
    data = tuple((offset, nbytes) for offset, nbytes in row["data"])
    end = 0
    for offset, nbytes in data:
        if type(offset) is not int or type(nbytes) is not int or offset < end or nbytes < 1:
            raise ValueError(f"master.json describes {row['name']} wrongly")
        end = offset + nbytes
    if type(row["size"]) is not int or not end <= row["size"]:
        raise ValueError(f"master.json describes {row['name']} wrongly")
    return FileEntry(row["name"], row["size"], int(row["crc32"], 16), data, version)


def versions() -> dict[str, str]:
    """Return the versions of this package, of what it writes files with, and of Python."""
    try:
        mine = metadata.version("mpi_ef")
    except metadata.PackageNotFoundError:
        mine = "unknown"
    return {"mpi_ef": mine, "numpy": np.__version__, "h5py": h5py.__version__, "python": sys.version.split()[0]}


def checked_json(subject: str, document: Any) -> Any:
    """Return what reading `document` back will give; refuse what JSON would change silently."""
    for value in _values(document):
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"{subject}: a document has keys that are no text, {briefly(list(value)[:3])}; JSON "
                                  "needs text")
        if not isinstance(value, dict | list | tuple | str | int | float | bool | type(None)):
            raise CheckpointError(f"{subject}: a document holds {type(value).__name__}, which is not JSON; convert it")
    try:
        return parse_json(json.dumps(document).encode())
    except ValueError as error:
        raise CheckpointError(f"{subject}: a document is too large: {error}; keep numbers in arrays") from None


def _values(document: Any) -> Any:
    yield document
    if isinstance(document, dict | list | tuple):
        for value in document.values() if isinstance(document, dict) else document:
            yield from _values(value)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with written(path) as descriptor:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(descriptor)


def replace_durably(path: Path, data: bytes) -> None:
    """Let a small file hold `data`: a power loss leaves it as it was or as it is. Its name may be on the disk later."""
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        write_durably(draft, data)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in `folder`; not where a file system cannot say that of folders."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Wait until the disk has the names of `folder` and of all that it lies in, up to where its file system begins."""
    folder = folder.resolve()
    device = folder.stat().st_dev
    for parent in folder.parents:
        if parent.stat().st_dev != device:
            break
        with suppress(PermissionError):  # made by others
            sync_folder(parent)
