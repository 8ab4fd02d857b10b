"""Arrays that are not in the memory of this process' processor: their bytes come piece by piece."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .dtypes import raw_bytes

__all__ = ["Array", "Pieced", "pieces_of"]


@runtime_checkable
class Pieced(Protocol):
    """What files ask of an array that is on a device, in place of a NumPy array: not all of it is in memory at once.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy dtype
    nbytes : int
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes ``begin ... end - 1``, in row order, little endian.

        Each piece is valid until the next one is asked for. All but the last are a multiple of
        :data:`mpi_ef.checkpoint.checksum.BLOCK` long.
        """


Array = NDArray[Any] | Pieced


def pieces_of(array: Array, begin: int = 0, end: int | None = None) -> Iterator[memoryview]:
    """Yield the bytes ``begin ... end - 1`` of an array, all in one piece where it is in memory. Local."""
    end = array.nbytes if end is None else end
    if isinstance(array, np.ndarray):
        yield raw_bytes(array)[begin:end]
    else:
        yield from array.pieces(begin, end)
