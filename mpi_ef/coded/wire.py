"""What orders and answers of coded gradients look like.

::

    order     | word (i64) | extras (f64 each)       | x, or the wire of C of a move  |
    answer    | word (i64) | coded extras (f64 each) | m_i, or the wire of C          |

    word      | 00 | flags (2 bits) | restored (8) | hash of m_i (16) | step (36) |

restored: how often the server was, modulo 256; an answer has that of its order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.late import Frame
from mpi_ef.compress.compressor import words

__all__ = ["MISSED", "MOVE", "NOT_FINITE", "ROW", "WHOLE", "Decoded", "Layout", "Numbers", "Order"]

WHOLE, NOT_FINITE = 1, 2  # flags of an answer: m_i itself, or none
# Flags of an order: x is the row of that worker; there is a move, see moves.py; or one of an order that it has missed.
ROW, MOVE, MISSED = 1, 2, 3
_STEP, _HASH, _RESTORED = (1 << 36) - 1, (1 << 16) - 1, (1 << 8) - 1

Vector = NDArray[Any]
Numbers = NDArray[np.float64]


class Order(NamedTuple):
    """What a worker is to compute.

    Attributes
    ----------
    step : int
        From 0 on; a worker that was late has missed some.
    x : (d,)
        Read only; it stays until the next order.
    extras : (e,) float64
        What the server sends along; read only.
    parts : tuple of int
    weights : (s + 1,) float64
        ``B[i, parts]``: the answer is the sum over parts of weight times the sum of the part's gradients.
    """

    step: int
    x: Vector
    extras: Numbers
    parts: tuple[int, ...]
    weights: Numbers


class Decoded(NamedTuple):
    """The sum over all parts.

    Attributes
    ----------
    vector : (d,)
        It stays until the next step.
    extras : (e,) float64
        The sums of the extras of all parts.
    step : int
    heard : tuple of int
        The workers whose answers it is made of.
    approximate : bool
        Whether too few have answered: it is then the best estimate from those that have, ``on_silence="approximate"``.
    """

    vector: Vector
    extras: Numbers
    step: int
    heard: tuple[int, ...]
    approximate: bool


@dataclass(frozen=True)
class Layout:
    """Where in a wire what is."""

    d: int
    dtype: "np.dtype[Any]"
    order_extras: int
    extras: int
    compressed_nbytes: int  # of the wire of C
    move_nbytes: int = 0  # of that of a move

    @property
    def order_nbytes(self) -> int:
        """Bytes of the wire of an order."""
        return max(self.whole_order_nbytes, self.move_order_nbytes)

    @property
    def whole_order_nbytes(self) -> int:
        """Bytes of that of an order with x."""
        return 8 * self.order_extras + self._whole_nbytes

    @property
    def move_order_nbytes(self) -> int:
        """Bytes of that of an order with a move."""
        return 8 * self.order_extras + self.move_nbytes

    @property
    def answer_nbytes(self) -> int:
        """Bytes of the wire of the longest answer."""
        return self.payload_at + max(self.compressed_nbytes, self._whole_nbytes)

    @property
    def payload_at(self) -> int:
        """Where the payload of an answer begins."""
        return 8 * self.extras

    @property
    def _whole_nbytes(self) -> int:
        return words(self.d * self.dtype.itemsize)

    def write_order(self, frame: Frame, step: int, x: Vector, extras: Sequence[float] | Numbers, *, restored: int,
                    flags: int = 0) -> None:
        """Fill a frame with an order; without extras these are zero."""
        self.head_order(frame, step, extras, restored=restored, flags=flags)
        self.x_of(frame)[:] = x

    def head_order(self, frame: Frame, step: int, extras: Sequence[float] | Numbers, *, restored: int, flags: int) -> None:
        """Fill all but the payload of an order."""
        frame.step = _word(step, 0, restored, flags)
        self.order_extras_of(frame)[:] = extras if len(extras) else 0.0

    def step_of(self, frame: Frame) -> int:
        """Return the step of an order, or that an answer is to."""
        return frame.step & _STEP

    def is_row(self, frame: Frame) -> bool:
        """Tell whether x of an order is a row."""
        return frame.step >> 60 == ROW

    def is_missed(self, frame: Frame) -> bool:
        """Tell whether it is the move of an order that the worker has missed, and no order."""
        return frame.step >> 60 == MISSED

    def is_move(self, frame: Frame) -> bool:
        """Tell whether there is a move in place of x."""
        return frame.step >> 60 in {MOVE, MISSED}

    def restored_of(self, frame: Frame) -> int:
        """Return how often the server was restored before an order, or before that of an answer, modulo 256."""
        return frame.step >> 52 & _RESTORED

    def x_of(self, frame: Frame) -> Vector:
        """Return x of an order, a view."""
        at = 8 * self.order_extras
        view: Vector = frame.wire[at : at + self.d * self.dtype.itemsize].view(self.dtype)
        return view

    def move_of(self, frame: Frame) -> NDArray[np.uint8]:
        """Return the wire of C of a move, a view."""
        at = 8 * self.order_extras
        return frame.wire[at : at + self.move_nbytes]

    def order_extras_of(self, frame: Frame) -> Numbers:
        """Return the extras of an order, a view."""
        return frame.wire[: 8 * self.order_extras].view(np.float64)

    def write_answer(self, frame: Frame, step: int, flags: int, said: int, extras: Sequence[float] | Numbers, *,
                     restored: int) -> int:
        """Fill all but the payload; return how many bytes of the wire the answer takes."""
        frame.step = _word(step, said, restored, flags)
        self.answer_extras_of(frame)[:] = extras
        return self.answer_nbytes_of(flags)

    def answer_nbytes_of(self, flags: int) -> int:
        """Return how many bytes of the wire an answer with these flags takes."""
        payload = 0 if flags & NOT_FINITE else self._whole_nbytes if flags & WHOLE else self.compressed_nbytes
        return self.payload_at + payload

    def read_answer(self, frame: Frame) -> tuple[int, int]:
        """Return flags and hash of an answer."""
        return frame.step >> 60, frame.step >> 36 & _HASH

    def answer_extras_of(self, frame: Frame) -> Numbers:
        """Return the coded extras of an answer, a view."""
        return frame.wire[: self.payload_at].view(np.float64)

    def whole_of(self, frame: Frame) -> Vector:
        """Return m_i of an answer, a view."""
        view: Vector = frame.wire[self.payload_at : self.payload_at + self.d * self.dtype.itemsize].view(self.dtype)
        return view

    def compressed_of(self, frame: Frame) -> NDArray[np.uint8]:
        """Return the wire of C, a view."""
        return frame.wire[self.payload_at : self.payload_at + self.compressed_nbytes]


def _word(step: int, said: int, restored: int, flags: int) -> int:
    return step & _STEP | (said & _HASH) << 36 | (restored & _RESTORED) << 52 | flags << 60
