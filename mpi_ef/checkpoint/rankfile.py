"""One rank's file: HDF5 with packed buffers and a JSON index, written and read past HDF5's own buffers."""

import errno
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import CheckpointError

from .checksum import BLOCK, checksum
from .pieces import Piece, parse_piece
from .structure import INDEX, check_structure, make_structure

__all__ = ["DamageError", "FileEntry", "RankFile", "reading", "write_rank_file"]


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about a rank's file.

    Attributes
    ----------
    name : str
    size : int
        Bytes of the file.
    crc32 : int
        Of everything but the data: HDF5's structure and the index. It is compared before HDF5 sees the file.
    data : tuple of (int, int)
        Offset and size of every buffer, in the order of offsets. Each piece in them has a checksum in the index.
    version : int
        Of the format: from 2 on that checksum is the CRC-32 of the piece, in version 1 another one.
    """

    name: str
    size: int
    crc32: int
    data: tuple[tuple[int, int], ...]
    version: int = 2


class DamageError(ValueError):
    """What a file holds is not what was written: a size or a checksum tells."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while `path` is read into a `CheckpointError`.

    Only `DamageError` makes it a damaged one: a file with the right checksums that nobody can make sense of was written that
    way, and marking it would hide a newer writer, or somebody's bad intentions.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as raised:
        unreadable = isinstance(raised, MemoryError) or (isinstance(raised, OSError) and raised.errno is not None)
        damaged = isinstance(raised, DamageError)
        what = "damaged" if damaged else "unreadable" if unreadable else "refused"
        error = CheckpointError(f"{path}: {what}: {_one_line(raised)}; use another checkpoint")
        error.damaged = damaged
        raise error from raised


def write_rank_file(
    path: Path, packed: Sequence[tuple[Piece, memoryview]], sizes: dict[str, int], attributes: dict[str, str | int],
    document: Any,
) -> FileEntry:
    """Write one rank's file and wait until the disk has it. Makes no MPI call.

    All space is reserved first: a full disk is an `OSError` before anything is written.

    Parameters
    ----------
    path : Path
        Must not exist.
    packed, sizes : what `pack` returns
    attributes : dict
        Rank, world size, step, run; stand in the index, and in the root group for other programs.
    document : JSON

    Returns
    -------
    FileEntry
    """

    def index(pieces: Sequence[Piece]) -> bytes:
        return json.dumps(attributes | {"document": document, "arrays": [piece.row() for piece in pieces]}).encode()

    pieces = [piece for piece, _ in packed]
    structure, size, extents = make_structure({INDEX: len(index(pieces))} | sizes, attributes)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _reserve(descriptor, size)
        for place, page in structure:
            _write(descriptor, memoryview(page), place)
        for i, (piece, data) in enumerate(packed):
            place = extents[piece.dtype][0] + piece.offset if piece.nbytes else 0
            pieces[i] = replace(piece, crc32=_write(descriptor, data, place))
        _write(descriptor, memoryview(index(pieces)), extents[INDEX][0])
        data_extents = tuple(sorted(extent for name, extent in extents.items() if name != INDEX))
        entry = FileEntry(path.name, size, _structure_crc32(descriptor, size, data_extents), data_extents)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry


class RankFile:
    """A rank's file, opened and checked; the data are read when they are asked for.

    Parameters
    ----------
    path : Path
    entry : FileEntry
    attributes : dict
        Rank, world size, step and run that the file must tell.
    """

    def __init__(self, path: Path, entry: FileEntry, attributes: dict[str, str | int]) -> None:
        self.path = path
        self._checksum = checksum if entry.version == 1 else zlib.crc32
        self._verified: tuple[int, ...] | None = None
        with reading(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _check_outside(descriptor, entry)
                self._extents = check_structure(str(path), entry.size)
                offset, nbytes = self._extents[INDEX]
                if sorted(extent for name, extent in self._extents.items() if name != INDEX) != list(entry.data):
                    raise ValueError("its buffers are not where master.json says")
                index = json.loads(_read(descriptor, offset, np.empty(nbytes, np.uint8)).tobytes())
            finally:
                os.close(descriptor)
            if {name: index.get(name) for name in attributes} != attributes:
                raise ValueError("it belongs to another checkpoint")
            self.document: Any = index["document"]
            self.pieces: list[Piece] = [parse_piece(row) for row in index["arrays"]]
            self._check_places()

    def read(self, piece: Piece, into: NDArray[np.uint8]) -> None:
        """Read the bytes of `piece`; `CheckpointError` when they are not those that were written.

        Their checksum is compared, unless `verify` has just done it and the file has not changed since.
        """
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            if self._verified == _signature(file.fileno()):
                _read(file.fileno(), self._place(piece), into)
            else:
                self._compare(file.fileno(), piece, into)

    def verify(self) -> list[str]:
        """Read everything and return what is wrong with it."""
        problems: list[str] = []
        block = np.empty(BLOCK, np.uint8)
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            before = _signature(file.fileno())
            for piece in self.pieces:
                try:
                    self._compare(file.fileno(), piece, block)
                except DamageError as error:
                    problems.append(f"{self.path.name}: {error}")
            self._verified = before if not problems and before == _signature(file.fileno()) else None
        return problems

    def _place(self, piece: Piece) -> int:
        return self._extents[piece.dtype][0] + piece.offset if piece.nbytes else 0

    def _compare(self, descriptor: int, piece: Piece, into: NDArray[np.uint8]) -> None:
        """Read `piece` block by block; all blocks go to the same place when `into` has room for only one."""
        crc32, place = 0, self._place(piece)
        for start in range(0, piece.nbytes, BLOCK):
            count = min(BLOCK, piece.nbytes - start)
            target = into[start : start + count] if into.nbytes >= piece.nbytes else into[:count]
            crc32 = self._checksum(_read(descriptor, place + start, target).data, crc32)
        if crc32 != piece.crc32:
            raise DamageError(f"the bytes of {piece.kind} {piece.name!r} are not those that were written")

    def _check_places(self) -> None:
        """Pieces lie inside of their buffers, and no byte belongs to two of them: no small file makes large arrays."""
        ends: dict[str, int] = {}
        for piece in sorted(self.pieces, key=lambda piece: piece.offset):
            if not piece.nbytes:
                continue
            extent = self._extents.get(piece.dtype, (0, 0))
            if piece.offset < ends.get(piece.dtype, 0) or piece.offset + piece.nbytes > extent[1]:
                raise ValueError(f"the index places {piece.name!r} outside of its buffer or over another array")
            ends[piece.dtype] = piece.offset + piece.nbytes


def _check_outside(descriptor: int, entry: FileEntry) -> None:
    """Compare what can be compared before HDF5 looks at a file."""
    size = os.fstat(descriptor).st_size
    if size != entry.size:
        raise DamageError(f"it has {size} bytes where {entry.size} were written")
    if _structure_crc32(descriptor, size, entry.data) != entry.crc32:
        raise DamageError("its structure is not what was written")


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        code = error.errno or errno.EIO
        if code not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise OSError(code, f"{os.strerror(code)}, for {size} bytes") from error
        os.ftruncate(descriptor, size)  # a file system that cannot reserve: the writes below will tell


def _write(descriptor: int, data: memoryview, place: int) -> int:
    """Write `data` at `place` and return its checksum."""
    crc32 = 0
    for start in range(0, data.nbytes, BLOCK):
        block = data[start : start + BLOCK]
        crc32 = zlib.crc32(block, crc32)
        done = 0
        while done < block.nbytes:
            done += os.pwrite(descriptor, block[done:], place + start + done)
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
    return " ".join(str(error).split()) or type(error).__name__
