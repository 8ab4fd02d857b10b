"""One rank's file: HDF5 with packed buffers and a JSON index, written and read past HDF5's own buffers."""

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.documents import DOCUMENT, check_size, opened, parse_json, shown
from mpi_ef.errors import CheckpointError, briefly

from .checksum import BLOCK, checksum
from .extents import Extent, parse_extent
from .structure import INDEX, check_structure, make_structure

__all__ = ["DamageError", "FileEntry", "RankFile", "check_filled", "reading", "write_rank_file"]

_STRUCTURE = 1 << 20  # bytes of a rank's file besides the index and the data, and more than there ever are
_HOLE, _HOLLOW = 1 << 28, 1000  # what is larger, and of which a thousandth is not there, was never written


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about a rank's file."""

    name: str
    size: int
    crc32: int  # of all but the data: HDF5's structure and the index; compared before HDF5 opens the file
    data: tuple[tuple[int, int], ...]  # offset and size of every buffer, by offset; its extents have checksums in the index
    version: int = 2  # of the format: from 2 on these checksums are CRC-32, in version 1 others


class DamageError(ValueError):
    """What a file holds is not what was written, by a size or a checksum."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while `path` is read into a `CheckpointError`.

    Only `DamageError` makes it a damaged one: a file with the right checksums and an unknown content was written that way,
    by a newer version or as an attack, which a mark would hide.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as raised:
        unreadable = isinstance(raised, MemoryError) or (isinstance(raised, OSError) and raised.errno is not None)
        damaged = isinstance(raised, DamageError)
        what = "damaged" if damaged else "unreadable" if unreadable else "refused"
        text = f"{shown(path)}: {what}: {_one_line(raised)}; use another checkpoint"
        raise CheckpointError(text, damaged=damaged) from raised


def write_rank_file(path: Path, packed: Sequence[tuple[Extent, Iterable[memoryview]]], attributes: dict[str, str | int],
                    document: Any) -> FileEntry:
    """Write one rank's file and wait until the disk has it. Makes no MPI call.

    All space is reserved first: a full disk is an `OSError` before anything is written. `packed` is in the order of
    :func:`mpi_ef.checkpoint.extents.layout`, with bytes in pieces that are asked for one by one; `attributes` (rank, world
    size, step, run) go to the index, and to the root group for other programs.
    """

    def index(extents: Sequence[Extent]) -> bytes:
        return json.dumps(attributes | {"document": document, "arrays": [extent.row() for extent in extents]}).encode()

    extents = [extent for extent, _ in packed]
    sizes = {extent.dtype: extent.offset + extent.nbytes for extent in extents if extent.nbytes}
    text = index(extents)
    try:
        check_size(text)
    except ValueError as error:
        raise CheckpointError(f"the index of {path.name}: {error}; keep numbers in arrays, and in fewer of them") from None
    structure, size, places = make_structure({INDEX: len(text)} | sizes, attributes)
    with path.open("x+b", buffering=0) as file:
        descriptor = file.fileno()
        _reserve(descriptor, size)
        for place, page in structure:
            _write(descriptor, [memoryview(page)], place)
        for i, (extent, data) in enumerate(packed):
            place = places[extent.dtype][0] + extent.offset if extent.nbytes else 0
            extents[i] = replace(extent, crc32=_write(descriptor, data, place))
        _write(descriptor, [memoryview(index(extents))], places[INDEX][0])
        data_places = tuple(sorted(place for name, place in places.items() if name != INDEX))
        entry = FileEntry(path.name, size, _structure_crc32(descriptor, size, data_places), data_places)
        os.fsync(descriptor)
    return entry


class RankFile:
    """A rank's file, opened and checked; data are read on demand. Its index must have the given attributes."""

    def __init__(self, path: Path, entry: FileEntry, attributes: dict[str, str | int]) -> None:
        self.path = path
        self._checksum = checksum if entry.version == 1 else zlib.crc32
        self._verified: tuple[int, ...] | None = None
        with reading(path), opened(path) as descriptor:
            _check_outside(descriptor, entry)
            self._places = check_structure(descriptor, entry.size)
            offset, nbytes = self._places[INDEX]
            if sorted(place for name, place in self._places.items() if name != INDEX) != list(entry.data):
                raise ValueError("its buffers are not where master.json says")
            index = parse_json(_read(descriptor, offset, np.empty(nbytes, np.uint8)).tobytes())
            if {name: index.get(name) for name in attributes} != attributes:
                raise ValueError("it belongs to another checkpoint")
            self.document: Any = index["document"]
            self.extents: list[Extent] = [parse_extent(row) for row in index["arrays"]]
            self._check_places()

    def read(self, extent: Extent, into: NDArray[np.uint8]) -> None:
        """Read the bytes of `extent`; `CheckpointError` when they are not those that were written.

        Their checksum is compared, unless `verify` has just done it and the file has not changed since.
        """
        with reading(self.path), opened(self.path) as descriptor:
            if self._verified == _signature(descriptor):
                _read(descriptor, self._place(extent), into)
            else:
                self._compare(descriptor, extent, into)

    def pieces(self, extent: Extent, room: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of `extent` in pieces, each in `room`, which the next one overwrites.

        `CheckpointError` after the last one when they are not those that were written, as :meth:`read`.
        """
        with reading(self.path), opened(self.path) as descriptor:
            known, place, crc32 = self._verified == _signature(descriptor), self._place(extent), 0
            for start in range(0, extent.nbytes, room.nbytes):
                piece = _read(descriptor, place + start, room[: min(room.nbytes, extent.nbytes - start)])
                if not known:
                    for block in range(0, piece.nbytes, BLOCK):
                        crc32 = self._checksum(piece[block : block + BLOCK].data, crc32)
                yield piece
            if not known and crc32 != extent.crc32:
                raise DamageError(f"the bytes of {extent.kind} {briefly(extent.name)} are not those that were written")

    def verify(self) -> list[str]:
        """Read everything and return what is wrong with it."""
        problems: list[str] = []
        block = np.empty(BLOCK, np.uint8)
        with reading(self.path), opened(self.path) as descriptor:
            before = _signature(descriptor)
            for extent in self.extents:
                try:
                    self._compare(descriptor, extent, block)
                except DamageError as error:
                    problems.append(f"{self.path.name}: {error}")
            self._verified = before if not problems and before == _signature(descriptor) else None
        return problems

    def _place(self, extent: Extent) -> int:
        return self._places[extent.dtype][0] + extent.offset if extent.nbytes else 0

    def _compare(self, descriptor: int, extent: Extent, into: NDArray[np.uint8]) -> None:
        """Read `extent` block by block; all blocks go to the same place when `into` has room for only one."""
        crc32, place = 0, self._place(extent)
        for start in range(0, extent.nbytes, BLOCK):
            count = min(BLOCK, extent.nbytes - start)
            target = into[start : start + count] if into.nbytes >= extent.nbytes else into[:count]
            crc32 = self._checksum(_read(descriptor, place + start, target).data, crc32)
        if crc32 != extent.crc32:
            raise DamageError(f"the bytes of {extent.kind} {briefly(extent.name)} are not those that were written")

    def _check_places(self) -> None:
        """Extents lie inside of their buffers, and no byte belongs to two of them: no small file makes large arrays."""
        ends: dict[str, int] = {}
        for extent in sorted((extent for extent in self.extents if extent.nbytes), key=lambda extent: extent.offset):
            end = extent.offset + extent.nbytes
            if extent.offset < ends.get(extent.dtype, 0) or end > self._places.get(extent.dtype, (0, 0))[1]:
                raise ValueError(f"the index places {briefly(extent.name)} outside of its buffer or over another array")
            ends[extent.dtype] = end


def _check_outside(descriptor: int, entry: FileEntry) -> None:
    """Compare what can be compared before HDF5 opens a file, and refuse what would take time or memory for nothing."""
    size = os.fstat(descriptor).st_size
    if size != entry.size:
        raise DamageError(f"it has {size} bytes where {entry.size} were written")
    if (outside := size - sum(nbytes for _, nbytes in entry.data)) > DOCUMENT + _STRUCTURE:
        raise ValueError(f"of its {size:,} bytes {outside:,} are no data")
    _refuse_holes(size, _filled(descriptor, size // _HOLLOW) if size > _HOLE else size)
    if _structure_crc32(descriptor, size, entry.data) != entry.crc32:
        raise DamageError("its structure is not what was written")


def check_filled(paths: Sequence[Path], size: int, blocks: int) -> None:
    """Raise `ValueError` where files of `size` bytes together are holes; of their blocks the system says this many bytes."""
    if size > _HOLE and blocks < size // _HOLLOW:  # file systems that compress may say less than what is in no hole
        filled = 0
        for path in paths:
            if filled < size // _HOLLOW:
                with opened(path) as descriptor:
                    filled += _filled(descriptor, size // _HOLLOW - filled)
        _refuse_holes(size, filled)


def _refuse_holes(size: int, filled: int) -> None:
    if filled < size // _HOLLOW:
        raise ValueError(f"of its {size:,} bytes only {filled:,} are on the disk")


def _filled(descriptor: int, enough: int) -> int:
    """Return how many bytes of a file are not in holes, or as many as are enough."""
    filled = place = 0
    try:
        while filled < enough:
            begin = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, begin, os.SEEK_HOLE)
            filled += place - begin
    except OSError as error:
        return filled if error.errno == errno.ENXIO else enough  # no more data; or the file system does not know
    return filled


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        code = error.errno or errno.EIO
        if code not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise OSError(code, f"{os.strerror(code)}, for {size} bytes") from error
        os.ftruncate(descriptor, size)  # a file system that cannot reserve: writes may fail


def _write(descriptor: int, pieces: Iterable[memoryview], place: int) -> int:
    """Write pieces one after the other, the first one at `place`, and return the checksum of all."""
    crc32 = 0
    for data in pieces:
        for start in range(0, data.nbytes, BLOCK):
            block = data[start : start + BLOCK]
            crc32 = zlib.crc32(block, crc32)
            done = 0
            while done < block.nbytes:
                done += os.pwrite(descriptor, block[done:], place + done)
            place += done
    return crc32


def _read(descriptor: int, place: int, into: NDArray[np.uint8]) -> NDArray[np.uint8]:
    done = 0
    while done < into.nbytes:
        count = os.preadv(descriptor, [into[done:].data], place + done)
        if not count:
            raise DamageError(f"it ends at byte {place + done}")
        done += count
    return into


def _structure_crc32(descriptor: int, size: int, data: Sequence[tuple[int, int]]) -> int:
    """Return the checksum of all bytes outside of `data`."""
    crc32, place = 0, 0
    for offset, nbytes in [*data, (size, 0)]:
        for start in range(place, offset, BLOCK):
            block = np.empty(min(BLOCK, offset - start), np.uint8)
            crc32 = zlib.crc32(_read(descriptor, start, block).data, crc32)
        place = offset + nbytes
    return crc32


def _signature(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _one_line(error: Exception) -> str:
    if isinstance(error, KeyError) and str(error.args[0]).isidentifier():
        return f"it has no field {error}"
    return shown(" ".join(str(error).split())) or type(error).__name__
