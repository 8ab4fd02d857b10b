"""Where the bytes of every array lie: stripes over the ranks, and packed buffers inside a file."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import CheckpointError

from .dtypes import DTYPES, dtype_name, raw_bytes

__all__ = ["ALIGNMENT", "Piece", "check_tiles", "cut_pieces", "pack", "parse_piece"]

ALIGNMENT = 64  # bytes; a multiple of every item size, so that no stripe and no buffer cuts a number in two

Kind = Literal["replicated", "per_rank"]
_KINDS = ("replicated", "per_rank")


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one array, and where it lies in a rank's file.

    Attributes
    ----------
    kind : "replicated" or "per_rank"
    name : str
    dtype : str
        Key of `DTYPES`, and the name of the dataset that holds the piece.
    shape : tuple of int
        Of the whole array.
    begin : int
        First byte of the array that is here.
    offset : int
        Where in the dataset it is, in bytes.
    nbytes : int
    crc32 : int
        Of the bytes; in files of version 1 what :func:`mpi_ef.checkpoint.checksum.checksum` makes of them.
    """

    kind: Kind
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    offset: int
    nbytes: int
    crc32: int = 0

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def row(self) -> dict[str, Any]:
        """Return the piece as it stands in the index; the checksum always takes eight digits."""
        return asdict(self) | {"shape": list(self.shape), "crc32": f"{self.crc32:08x}"}


def parse_piece(row: Any) -> Piece:
    """Return the piece that a row of an index describes; `ValueError` for a row that no writer has written."""
    if not isinstance(row, dict) or row.keys() != Piece.__dataclass_fields__.keys():
        raise ValueError("the index has a row with unknown columns")
    shape, crc32 = row["shape"], row["crc32"]
    numbers = [row["begin"], row["offset"], row["nbytes"], *(shape if isinstance(shape, list) else [None])]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(shape) > 64:
        raise ValueError("the index has a row with a size that is none")
    if not isinstance(row["name"], str) or row["kind"] not in _KINDS or row["dtype"] not in DTYPES:
        raise ValueError("the index has a row of unknown kind or dtype")
    if not isinstance(crc32, str) or len(crc32) != 8:
        raise ValueError("the index has a row without a checksum")
    piece = Piece(**(row | {"shape": tuple(shape), "crc32": int(crc32, 16)}))
    itemsize = DTYPES[piece.dtype].itemsize
    inside = piece.begin + piece.nbytes <= piece.whole_nbytes
    if not inside or piece.begin % itemsize or piece.offset % itemsize or piece.nbytes % itemsize:
        raise ValueError(f"the index places a piece of {piece.name!r} outside of the array")
    return piece


def cut_pieces(
    replicated: Mapping[str, NDArray[Any]], per_rank: Mapping[str, NDArray[Any]], rank: int, size: int
) -> Iterator[tuple[Piece, NDArray[Any]]]:
    """Yield what `rank` of `size` writes: its stripe of the replicated arrays, and all of its own arrays.

    The replicated arrays lie one after the other in one space of bytes, ordered by name, which is cut into `size`
    stripes of equal length; an empty array goes to rank 0. Offsets are not set yet.
    """
    spans = {name: _aligned(array.nbytes) for name, array in replicated.items()}
    total, place = sum(spans.values()), 0
    low, high = (total * r // size // ALIGNMENT * ALIGNMENT for r in (rank, rank + 1))
    for name in sorted(replicated):
        array = replicated[name]
        begin, end = max(low - place, 0), min(high - place, array.nbytes)
        if begin < end or (array.nbytes == 0 and rank == 0):
            yield Piece("replicated", name, dtype_name(array.dtype), array.shape, begin, 0, max(end - begin, 0)), array
        place += spans[name]
    for name in sorted(per_rank):
        array = per_rank[name]
        yield Piece("per_rank", name, dtype_name(array.dtype), array.shape, 0, 0, array.nbytes), array


def pack(
    cut: Iterable[tuple[Piece, NDArray[Any]]], room: "Room | None" = None
) -> tuple[list[tuple[Piece, memoryview]], dict[str, int]]:
    """Give every piece its place in the buffer of its dtype.

    Parameters
    ----------
    cut : what `cut_pieces` yields
    room : Room, optional
        Where to copy the bytes to; without it they stay where they are, and the arrays must not change.

    Returns
    -------
    list of (Piece, memoryview)
        Pieces in the order of their offsets within each buffer, and their bytes.
    dict of str to int
        Bytes of every buffer; buffers without bytes are left out.
    """
    packed: list[tuple[Piece, memoryview]] = []
    ends: dict[str, int] = {}
    for piece, array in cut:
        offset = _aligned(ends.get(piece.dtype, 0)) if piece.nbytes else 0
        if piece.nbytes:
            ends[piece.dtype] = offset + piece.nbytes
        data = raw_bytes(array)[piece.begin : piece.begin + piece.nbytes]
        packed.append((replace(piece, offset=offset), data if room is None else room.copy(data)))
    return packed, ends


class Room:
    """Host memory that copies are made to, kept from one save to the next."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def clear(self, nbytes: int) -> None:
        """Forget all copies; allocate when there is no room for `nbytes`."""
        if self._memory.nbytes < nbytes:
            self._memory = np.empty(0, np.uint8)  # free the old memory before asking for more
            self._memory = np.empty(nbytes, np.uint8)
        self._used = 0

    def copy(self, data: memoryview) -> memoryview:
        """Return a copy of `data`."""
        target = self._memory[self._used : self._used + data.nbytes]
        target[:] = np.frombuffer(data, np.uint8)
        self._used += data.nbytes
        return target.data


def check_tiles(path: Path, pieces: list[Piece]) -> None:
    """Raise unless `pieces`, ordered by `begin`, are one array without gaps and overlaps."""
    first, end = pieces[0], 0
    for piece in pieces:
        if (piece.dtype, piece.shape) != (first.dtype, first.shape) or piece.begin != end:
            break
        end += piece.nbytes
    else:
        if end == first.whole_nbytes:
            return
    error = CheckpointError(f"{path}: the parts of {first.name!r} do not make one array; use another checkpoint")
    error.damaged = True
    raise error


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
