"""Arrays of any shape in messages of one size."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.late import Frame
from mpi_ef.collectives.worker import Worker

__all__ = ["Pieces", "Whole", "sent_in_pieces"]

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_OTHER = len(_DTYPES)  # the bytes are the text of a dtype
_MOST_DIMENSIONS = 64  # of NumPy
_HEAD = 8 * (5 + _MOST_DIMENSIONS)  # round, which piece of how many, dtype, dimensions, shape
_PIECE = 1 << 20

Array = NDArray[Any]


class Whole(NamedTuple):
    """An answer that is here: which evaluation, of which round, and the array."""

    step: int
    round: int
    array: Array


def sent_in_pieces(worker: Worker, array: Array, step: int, number: int) -> Iterator[tuple[Frame, int]]:
    """Yield frames, and how many bytes of each are to be sent; of another dtype that is sent alone."""
    kind = _DTYPES.index(array.dtype) if array.dtype in _DTYPES else _OTHER
    if kind == _OTHER:
        text = array.dtype.str if array.dtype.kind in "biufcmMSU" else "O"
        array = np.frombuffer(text.encode(), np.uint8)
    data = array.reshape(-1).view(np.uint8)
    count = max(1, -(-data.size // _PIECE))
    for piece in range(count):
        frame = worker.frame()
        frame.step = step
        head = frame.wire[:_HEAD].view(np.int64)
        head[:] = 0
        head[:5] = number, piece, count, kind, array.ndim
        head[5 : 5 + array.ndim] = array.shape
        part = data[piece * _PIECE : (piece + 1) * _PIECE]
        frame.wire[_HEAD : _HEAD + part.size] = part
        yield frame, _HEAD + part.size


class Pieces:
    """Puts answers together, of several ranks at a time."""

    nbytes = _HEAD + _PIECE  # of a wire

    def __init__(self) -> None:
        self._open: dict[int, tuple[int, int, Array, int]] = {}  # by rank: round, step, array, how many pieces are here

    def add(self, rank: int, frame: Frame) -> Whole | None:
        """Take a piece; return the answer where this was its last one."""
        head = frame.wire[:_HEAD].view(np.int64)
        number, piece, count, kind, dimensions = (int(word) for word in head[:5])
        if piece == 0:
            shape = tuple(head[5 : 5 + min(max(dimensions, 0), _MOST_DIMENSIONS)].tolist())
            array = np.empty(shape, np.uint8 if kind == _OTHER else _DTYPES[kind])
            self._open[rank] = (number, frame.step, array, 0)
        if rank not in self._open:
            return None
        number, step, array, here = self._open[rank]
        part = array.reshape(-1).view(np.uint8)[piece * _PIECE : (piece + 1) * _PIECE]
        part[:] = frame.wire[_HEAD : _HEAD + part.size]
        here += 1
        self._open[rank] = (number, step, array, here)
        if here < count:
            return None
        del self._open[rank]
        return Whole(step, number, np.zeros(0, array.tobytes().decode()) if kind == _OTHER else array)
