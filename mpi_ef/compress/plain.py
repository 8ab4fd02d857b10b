"""The short way to a compressor of one's own: two functions in NumPy."""

from abc import abstractmethod

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.errors import ShapeError, briefly

from .combination import Source, Vector, source
from .compressor import Codec, Wires

__all__ = ["PlainCodec"]


class PlainCodec(Codec):
    """A codec of two functions: :meth:`pack` writes a message, :meth:`unpack` reads it. Set `nbytes`, a multiple of 8.

    What is sent is formed beforehand, and what is kept takes a pass of its own: two passes over memory more than the codecs
    that are built in.
    """

    def __init__(self, d: int, dtype: DTypeLike = np.float32) -> None:
        super().__init__(d, dtype)
        self._x = np.zeros(self.d, self.dtype)

    @abstractmethod
    def pack(self, x: Vector, wire: Wires, *, step: int, rank: int) -> None:
        """Write the message for `x`, (d,), finite or not, into all of `wire`, (nbytes,) uint8, which begins at a word."""

    @abstractmethod
    def unpack(self, wire: Wires) -> Vector:
        """Return what the message in `wire` stands for, (d,) of the codec's dtype."""

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:
        """Write the message for `x` into `wire`, and what is to be kept of it."""
        x = x if isinstance(x, Source) else source(x)
        finite: bool = self._kernels.combine(x.terms, x.factors, self._x)
        self.pack(self._x, wire, step=step, rank=rank)
        self._keep(x, wire)
        return finite

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        """Add ``factor`` times the decoded value of every wire to `out`, in row order."""
        if overwrite:
            out.fill(0)
        for wire in wires:
            x = self.unpack(wire)
            if not isinstance(x, np.ndarray) or (x.shape, x.dtype) != ((self.d,), self.dtype):
                told = f"an array {x.shape} of {x.dtype}" if isinstance(x, np.ndarray) else briefly(x)
                raise ShapeError(f"{type(self).__name__}.unpack returned {told}; return ({self.d},) of {self.dtype}")
            out += self.dtype.type(factor) * x
