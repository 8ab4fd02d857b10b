"""Where workers compute gradients: at the server's parameters, or at a model that follows these by compressed moves.

::

    server, step t:  m = C(x - w);  w += m;  sends (t, m)
    worker:          w += m

A worker that has missed orders is sent their moves before, as long as these are less than w itself, and else w. EF21-P
(Gruntkowska, Tyurin, Richtarik 2022, arXiv 2209.15218, Algorithm 1). The first w is x. All have the same bits of w.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.late import Frame
from mpi_ef.compress.combination import Vector, lazy, source
from mpi_ef.compress.compressor import Codec
from mpi_ef.kernels.backend import backend

from .wire import MISSED, MOVE, Layout, Numbers

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
        most = (layout.order_nbytes - 1) // layout.move_order_nbytes if layout.move_nbytes else 0
        self._latest = deque[tuple[int, Frame]](maxlen=most)  # steps and moves; sends of several workers may be users

    def restore(self, w: Vector | None) -> None:
        """Go on from such a w, or from the next x."""
        self._known = w is not None and self._codec is not None
        self._latest.clear()
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
                self._remember(step, wire)
                return True
        self._latest.clear()
        if self._codec is not None:
            self.w[:], self._known = x, self._kernels.finite([x])
        self._layout.write_order(frame, step, x, extras, restored=restored)
        return False

    def _remember(self, step: int, wire: NDArray[np.uint8]) -> None:
        """Keep a move for those that miss it; memory of the oldest is used again, unless it is under way."""
        latest = self._latest
        if not latest.maxlen:
            return
        oldest = latest.popleft()[1] if len(latest) == latest.maxlen else None
        frame = oldest if oldest is not None and oldest.users == 1 else Frame(self._layout.move_order_nbytes)
        self._layout.head_order(frame, 0, (), restored=0, flags=MISSED)
        self._layout.move_of(frame)[:] = wire
        latest.append((step, frame))

    def since(self, step: int, now: int) -> list[Frame] | None:
        """Return frames of the moves between those of two steps; None where w itself is less, or they are not known.

        They are not to be changed.
        """
        between = [frame for at, frame in self._latest if step < at < now]
        return between if len(between) == now - step - 1 and len(between) < (self._latest.maxlen or 0) else None

    def write_whole(self, frame: Frame, step: int, extras: Sequence[float] | Numbers, *, restored: int) -> None:
        """Fill a frame with the same order for those that do not have the w before."""
        self._layout.write_order(frame, step, self.w, extras, restored=restored)

    def read(self, frame: Frame) -> Vector:
        """Return where gradients are computed after an order, or a missed move, a view. On workers; not of a row."""
        if self._codec is None:
            return self._layout.x_of(frame)
        if self._layout.is_move(frame):
            self._codec.add(self._layout.move_of(frame)[None], self.w)
        else:
            self.w[:] = self._layout.x_of(frame)
        return self.w.view()
