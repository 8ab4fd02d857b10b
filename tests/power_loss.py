"""What a power loss may leave of a folder: all that programs do to it is recorded, and disks are made of parts of that.

A disk has what an fsync has confirmed. Of the rest it has any part: names (each creation, renaming and removal by itself),
sizes, and blocks of 512 bytes, also without what came before. An fsync of a file does not confirm its name, one of a folder
nothing of what is in its files and folders: file systems keep more of the order; programs that rely on this much run on all.
"""

import builtins
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

BLOCK = 512
_CHANGING = ("mkdir", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "write", "pwrite", "pwritev",
             "ftruncate", "truncate", "posix_fallocate")


@dataclass(frozen=True)
class Change:
    """A change of a file or folder that a disk has or has not: names (None: removed), a size, or the bytes of a block."""

    of: int
    call: int  # number of the call that has made it
    names: tuple[tuple[str, int | None], ...] = ()
    size: int = -1
    place: int = -1
    block: bytes = b""
    folders: tuple[int, ...] = ()  # of the names: these are of folders


@dataclass(frozen=True)
class Sync:
    """All changes of a file or folder so far are on the disk."""

    of: int


@dataclass
class Disk:
    """Folders and files by number; 0 is the folder that was recorded."""

    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> "Disk":
        return Disk({of: dict(names) for of, names in self.folders.items()}, dict(self.files))

    def apply(self, change: Change) -> None:
        if change.names:
            names = self.folders.setdefault(change.of, {})
            for name, number in change.names:
                names.pop(name, None)
                if number is not None:
                    names[name] = number
                    if number in change.folders:
                        self.folders.setdefault(number, {})
            return
        content = self.files.get(change.of, b"")
        if change.size >= 0:
            self.files[change.of] = content[: change.size].ljust(change.size, b"\0")
        else:
            end = change.place + len(change.block)
            whole = content[: change.place] + change.block + content[end:]
            self.files[change.of] = whole[: len(content)]

    def paths(self, of: int = 0, at: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Yield what has a name: content of files, None for folders."""
        for name, number in sorted(self.folders.get(of, {}).items()):
            if number in self.folders:
                yield f"{at}{name}/", None
                yield from self.paths(number, f"{at}{name}/")
            else:
                yield at + name, self.files.get(number, b"")

    def write(self, to: Path) -> None:
        to.mkdir()
        for path, content in self.paths():
            if content is None:
                (to / path).mkdir()
            else:
                (to / path).write_bytes(content)


class Recorder:
    """Follows the calls that change a folder, of all threads of this process, and compares the folder after each."""

    def __init__(self, root: Path, happened: tuple[object, ...] = ()) -> None:
        self.root, self.happened, self.events = root, happened, []
        self._numbers: dict[tuple[int, int], int] = {}
        self._held: list[int] = []  # open, so that the system gives no number of a file twice
        self._seen, self._busy, self._calls = Disk(), threading.RLock(), 0

    def mark(self, what: object) -> None:
        """Note that something has happened, such as that a save has returned."""
        with self._busy:
            self._look()
            self.events.append(what)

    def _number(self, path: str, status: os.stat_result) -> int:
        key = status.st_dev, status.st_ino
        if key not in self._numbers:
            self._held.append(_open(path, os.O_PATH | os.O_NOFOLLOW))
            self._numbers[key] = len(self._numbers)
        return self._numbers[key]

    def _scan(self) -> Disk:
        found = Disk()
        left = [str(self.root)]
        while left:
            folder = left.pop()
            names = found.folders[self._number(folder, Path(folder).stat())] = {}
            for entry in os.scandir(folder):
                status = entry.stat(follow_symlinks=False)
                names[entry.name] = number = self._number(entry.path, status)
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                    continue
                descriptor = _open(entry.path, os.O_RDONLY)
                found.files[number] = os.read(descriptor, status.st_size + (1 << 20))
                os.close(descriptor)
        return found

    def _look(self) -> None:
        """Note what has changed since the last look."""
        now, before, self._calls = self._scan(), self._seen, self._calls + 1
        for of, content in now.files.items():
            old, call = before.files.get(of, b""), self._calls
            if len(old) != len(content):
                self.events.append(Change(of, call, size=len(content)))
                old = old[: len(content)].ljust(len(content), b"\0")
            for place in range(0, len(content), BLOCK):
                if (block := content[place : place + BLOCK]) != old[place : place + BLOCK]:
                    self.events.append(Change(of, call, place=place, block=block))
        for of, names in now.folders.items():
            old_names = before.folders.get(of, {})
            if names != old_names:
                gone = [(name, None) for name in old_names.keys() - names.keys()]
                new = [(name, number) for name, number in names.items() if old_names.get(name) != number]
                folders = tuple(number for _, number in new if number in now.folders)
                self.events.append(Change(of, self._calls, names=(*gone, *new), folders=folders))
        now.folders = {**before.folders, **now.folders}
        now.files = {**before.files, **now.files}
        self._seen = now

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Record until the end of the block."""
        with pytest.MonkeyPatch.context() as patch:
            self._seen = self._scan()
            self.start = self._seen.copy()
            for name in _CHANGING:
                patch.setattr(os, name, self._followed(getattr(os, name)))
            for module in (os, io, builtins):
                patch.setattr(module, "open", self._opened(module.open))
            for name in ("fsync", "fdatasync"):
                patch.setattr(os, name, self._fsync)
            yield self
        self._look()
        for descriptor in self._held:
            os.close(descriptor)

    def _followed(self, real):
        def call(*arguments, **options):
            with self._busy:
                self._look()
                try:
                    return real(*arguments, **options)
                finally:
                    self._look()

        return call

    def _opened(self, real):
        followed = self._followed(real)

        def call(path, mode="r", *arguments, **options):
            writes = mode & (os.O_CREAT | os.O_TRUNC) if isinstance(mode, int) else set(mode) & set("wxa+")
            return (followed if writes else real)(path, mode, *arguments, **options)

        return call

    def _fsync(self, descriptor):
        status = os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno())
        with self._busy:
            self._look()
            if (of := self._numbers.get((status.st_dev, status.st_ino))) is not None:
                self.events.append(Sync(of))


_open = os.open


@dataclass(frozen=True)
class Loss:
    """A disk after a power loss."""

    disk: Disk
    happened: tuple[object, ...]  # what was marked before it
    text: str  # when it was, and what was lost


def losses(recorder: Recorder, rng: np.random.Generator, *, torn: int, passing: str) -> Iterator[Loss]:
    """Yield disks of power losses after every event, none of them twice.

    All that was not confirmed is lost, or nothing is; each call's part of it alone is kept, or lost; and `torn` times it is
    drawn what is kept, block by block. Files with `passing` in their paths make no difference.
    """
    safe, loose, happened, seen = recorder.start.copy(), list[Change](), [*recorder.happened], set[object]()
    for number, event in enumerate([None, *recorder.events]):
        if isinstance(event, Change):
            loose.append(event)
        elif isinstance(event, Sync):
            for change in loose:
                if change.of == event.of:
                    safe.apply(change)
            loose = [change for change in loose if change.of != event.of]
        elif event is not None:
            happened.append(event)
        for text, kept in _parts(loose, rng, torn):
            disk = safe.copy()
            for change in kept:
                disk.apply(change)
            key = tuple(item for item in disk.paths() if passing not in item[0]), len(happened)
            if key not in seen:
                seen.add(key)
                yield Loss(disk, tuple(happened), f"event {number}: {text}")


def _parts(loose: list[Change], rng: np.random.Generator, torn: int) -> Iterator[tuple[str, list[Change]]]:
    """Yield what may be kept of changes, with how to call it."""
    yield "everything is lost", []
    yield "nothing is lost", loose
    for call in sorted({change.call for change in loose}):
        of_it, others = ([change for change in loose if (change.call == call) is it] for it in (True, False))
        yield f"{_said(of_it)} alone is kept", of_it
        yield f"{_said(of_it)} alone is lost", others
    for share in rng.random(torn) if len(loose) > 1 else ():
        kept = [change for change in loose if rng.random() < share]
        yield f"{len(kept)} of {len(loose)} changes are kept", kept
        junk = [replace(change, block=rng.bytes(len(change.block))) for change in loose
                if change.block and change not in kept]
        kept = [change for change in loose if change in kept or not change.block]
        yield f"{len(junk)} blocks hold what they held before they were given to the file", kept + junk


def _said(changes: list[Change]) -> str:
    what = {f"{name}{' away' * (number is None)}" for change in changes for name, number in change.names}
    return " and ".join(sorted(what)) or f"{len(changes)} blocks"
