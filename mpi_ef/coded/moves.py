"""Where workers compute gradients: at the server's parameters, or at a model that follows these by compressed moves.

::

    server, step t:  m = C(x - w);  w += m;  sends (t, m) to workers that have the w before, and w itself to the others
    worker:          w += m, or w as it was sent

EF21-P (Gruntkowska, Tyurin, Richtarik 2022, arXiv 2209.15218, Algorithm 1). The first w is x. All have the same bits of w.
"""

from collections.abc import Sequence

import numpy as np

from mpi_ef.collectives.late import Frame
from mpi_ef.compress.combination import Vector, lazy, source
from mpi_ef.compress.compressor import Codec
from mpi_ef.kernels.backend import backend

from .wire import MOVE, Layout, Numbers

__all__ = ["Moves"]


class Moves:
    """Writes orders and reads them. Local, on the server and on workers; without a codec orders are whole.

    Attributes
    ----------
    w : (d,)
        Where gradients are computed; empty without a codec.
    """

    def __init__(self, layout: Layout, codec: Codec | None, n: int) -> None:
        self._layout, self._codec, self._n = layout, codec, n
        self._kernels = backend(layout.dtype, "cpu")
        self.w = np.zeros(layout.d if codec is not None else 0, layout.dtype)
        self._known = False

    def restore(self, w: Vector | None) -> None:
        """Go on from such a w, or from the next x."""
        self._known = w is not None and self._codec is not None
        if w is not None and self._codec is not None:
            self.w[:] = w

    def write(self, frame: Frame, step: int, x: Vector, extras: Sequence[float] | Numbers, *, restored: int) -> bool:
        """Fill a frame with the order of a step; return whether it is for those alone that have the w before."""
        if self._codec is not None and self._known:
            wire = self._layout.move_of(frame)
            difference = source(lazy(x) - self.w)
            if self._codec.encode(difference, wire, step=step, rank=self._n):
                self._codec.add_encoded(wire, self.w)
                self._layout.head_order(frame, step, extras, restored=restored, flags=MOVE)
                return True
        if self._codec is not None:
            self.w[:], self._known = x, self._kernels.finite([x])
        self._layout.write_order(frame, step, x, extras, restored=restored)
        return False

    def write_whole(self, frame: Frame, step: int, extras: Sequence[float] | Numbers, *, restored: int) -> None:
        """Fill a frame with the same order for those that do not have the w before."""
        self._layout.write_order(frame, step, self.w, extras, restored=restored)

    def read(self, frame: Frame) -> Vector:
        """Return where an order wants gradients computed, a view. On workers; not of a row."""
        if self._codec is None:
            return self._layout.x_of(frame)
        if self._layout.is_move(frame):
            self._codec.add(self._layout.move_of(frame)[None], self.w)
        else:
            self.w[:] = self._layout.x_of(frame)
        return self.w.view()
