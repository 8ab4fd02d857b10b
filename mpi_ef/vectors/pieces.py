"""What files get of a tensor on a device, and give it: through one piece of page-locked memory of the host."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpi_ef.kernels.device import bus

__all__ = ["TensorPieces", "fill"]

Bytes = NDArray[np.uint8]


class TensorPieces:
    """A tensor on a device as files want it: shape and dtype of an array, and bytes that come in pieces, as they are then.

    Where an array is wanted, ``numpy.asarray`` of it copies the whole to the host.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy dtype
        As long as that of the tensor.
    nbytes : int
    """

    def __init__(self, tensor: Tensor, dtype: "np.dtype[Any]") -> None:
        self._tensor = tensor.detach().contiguous()
        self.shape, self.dtype = tuple(tensor.shape), dtype
        self.nbytes = tensor.numel() * tensor.element_size()

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes ``begin ... end - 1``, in row order; the next piece of this thread overwrites one. Local."""
        if begin < end:
            raw, room = _bytes(self._tensor), bus.room_for(end - begin, self._tensor.device)
            for start in range(begin, end, room.nbytes):
                part = raw[start : min(start + room.nbytes, end)]
                piece = room[: part.numel()]
                bus.to_host(part, piece)
                yield piece.data

    def copy(self) -> NDArray[Any]:
        """Return an array of the host with the same numbers. Local."""
        whole, place = np.empty(self.nbytes, np.uint8), 0
        for piece in self.pieces(0, self.nbytes):
            whole[place : place + piece.nbytes] = piece
            place += piece.nbytes
        numbers: NDArray[Any] = whole.view(self.dtype).reshape(self.shape)
        return numbers

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.copy(), dtype)


def fill(tensor: Tensor, read: Callable[[Bytes], Iterator[tuple[int, Bytes]]]) -> None:
    """Overwrite a contiguous tensor on a device with bytes that come in pieces. Local.

    Parameters
    ----------
    read : callable
        Gets memory for a piece, and yields where in the tensor's bytes each piece begins, and the part of the memory that
        has it.
    """
    if tensor.numel():
        raw = _bytes(tensor.detach())
        for begin, piece in read(bus.room_for(raw.numel(), tensor.device)):
            bus.to_device(piece, raw[begin : begin + piece.nbytes])
            bus.wait_for(tensor.device)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
