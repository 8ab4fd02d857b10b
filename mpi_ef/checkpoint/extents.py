"""Where the bytes of every array lie: stripes over the ranks, and packed buffers inside a file."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpi_ef.errors import CheckpointError, briefly

from .dtypes import DTYPES, dtype_name
from .source import Array

__all__ = ["ALIGNMENT", "Extent", "StagingBuffer", "check_tiles", "layout", "parse_extent"]

ALIGNMENT = 64  # bytes; a multiple of every item size, so that no stripe and no buffer cuts a number in two

Kind = Literal["replicated", "per_rank"]
_KINDS = ("replicated", "per_rank")


@dataclass(frozen=True)
class Extent:
    """A range of bytes of one array, and where it lies in a rank's file."""

    kind: Kind
    name: str
    dtype: str  # key of `DTYPES`, and the name of the dataset that holds the bytes
    shape: tuple[int, ...]  # of the whole array
    begin: int  # the first byte of the array that is here
    offset: int  # of the bytes in the dataset
    nbytes: int
    crc32: int = 0  # of the bytes; in files of version 1 what :func:`mpi_ef.checkpoint.checksum.checksum` makes of them

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def row(self) -> dict[str, Any]:
        """Return the row of the index; the checksum always takes eight digits."""
        return asdict(self) | {"shape": list(self.shape), "crc32": f"{self.crc32:08x}"}


def parse_extent(row: Any) -> Extent:
    """Return the extent that a row of an index describes; `ValueError` for a row that no writer has written."""
    if not isinstance(row, dict) or row.keys() != Extent.__dataclass_fields__.keys():
        raise ValueError("the index has a row with unknown columns")
    shape, crc32 = row["shape"], row["crc32"]
    numbers = [row["begin"], row["offset"], row["nbytes"], *(shape if isinstance(shape, list) else [None])]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(shape) > 64:
        raise ValueError("the index has a row with a size that is none")
    if not isinstance(row["name"], str) or row["kind"] not in _KINDS or row["dtype"] not in DTYPES:
        raise ValueError("the index has a row of unknown kind or dtype")
    if not isinstance(crc32, str) or len(crc32) != 8:
        raise ValueError("the index has a row without a checksum")
    extent = Extent(**(row | {"shape": tuple(shape), "crc32": int(crc32, 16)}))
    itemsize = DTYPES[extent.dtype].itemsize
    inside = extent.begin + extent.nbytes <= extent.whole_nbytes
    if not inside or extent.begin % itemsize or extent.offset % itemsize or extent.nbytes % itemsize:
        raise ValueError(f"the index places a piece of {briefly(extent.name)} outside of the array")
    return extent


def layout(replicated: Mapping[str, Array], per_rank: Mapping[str, Array], rank: int,
           size: int) -> Iterator[tuple[Extent, Array]]:
    """Yield what `rank` of `size` writes: its stripe of the replicated arrays, and all of its own arrays.

    The replicated arrays lie one after the other in one space of bytes, ordered by name, which is cut into `size`
    stripes of equal length; an empty array goes to rank 0. In a file, the extents of a dtype follow each other.
    """
    ends: dict[str, int] = {}

    def placed(kind: Kind, name: str, array: Array, begin: int, nbytes: int) -> tuple[Extent, Array]:
        dtype = dtype_name(array.dtype)
        offset = _aligned(ends.get(dtype, 0)) if nbytes else 0
        ends[dtype] = max(ends.get(dtype, 0), offset + nbytes)
        return Extent(kind, name, dtype, array.shape, begin, offset, nbytes), array

    total, place = sum(_aligned(array.nbytes) for array in replicated.values()), 0
    low, high = (total * r // size // ALIGNMENT * ALIGNMENT for r in (rank, rank + 1))
    for name, array in sorted(replicated.items()):
        begin, end = max(low - place, 0), min(high - place, array.nbytes)
        if begin < end or (array.nbytes == 0 and rank == 0):
            yield placed("replicated", name, array, begin, max(end - begin, 0))
        place += _aligned(array.nbytes)
    for name, array in sorted(per_rank.items()):
        yield placed("per_rank", name, array, 0, array.nbytes)


class StagingBuffer:
    """Host memory for copies of arrays, kept from one save to the next."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def clear(self, nbytes: int) -> None:
        """Drop all copies; allocate where the memory is smaller than `nbytes`."""
        if self._memory.nbytes < nbytes:
            self._memory = np.empty(0, np.uint8)  # freed before the larger allocation
            self._memory = np.empty(nbytes, np.uint8)
        self._used = 0

    def copy(self, pieces: Iterable[memoryview]) -> memoryview:
        """Return a copy of the bytes of all pieces."""
        begin = self._used
        for data in pieces:
            self._memory[self._used : self._used + data.nbytes] = np.frombuffer(data, np.uint8)
            self._used += data.nbytes
        return self._memory[begin : self._used].data


def check_tiles(path: Path, extents: list[Extent]) -> None:
    """Raise unless `extents`, ordered by `begin`, are one array without gaps and overlaps."""
    first, end = extents[0], 0
    for extent in extents:
        if (extent.dtype, extent.shape, extent.begin) != (first.dtype, first.shape, end):
            break
        end += extent.nbytes
    else:
        if end == first.whole_nbytes:
            return
    raise CheckpointError(f"{path}: the parts of {briefly(first.name)} do not make one array; use another checkpoint",
                          damaged=True)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
