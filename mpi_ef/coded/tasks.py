"""Orders and answers of many trainings, and what a worker computes for one.

::

    order    | tasks (i64) | model of x, or -1 (i64) | model, step, slot (i64) of each task | x, or nothing        |
    answer   | seconds it took (f64) | of each task: extras (f64 each), vector                                     |

An order without tasks brings x of a model, and is not answered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.late import Frame
from mpi_ef.compress.compressor import words
from mpi_ef.errors import OptionError

from .returned import pair_in, vector_in
from .schemes import Scheme

__all__ = ["Given", "TaskLayout", "Tasks"]

Vector = NDArray[Any]
Numbers = NDArray[np.float64]
Gradient = Callable[..., Any]


class Given(NamedTuple):
    """A task, as an order has it: of which step of which model; step < 0: the model has ended, and the result is zero."""

    model: int
    step: int
    slot: int


@dataclass(frozen=True)
class TaskLayout:
    """Where in a wire what is. `most` is how many tasks an order has at most."""

    d: int
    dtype: "np.dtype[Any]"
    most: int
    extras: int

    @property
    def head_nbytes(self) -> int:
        """Bytes of an order without x."""
        return 16 + 24 * self.most

    @property
    def order_nbytes(self) -> int:
        """Bytes of the longest order."""
        return self.head_nbytes + self._vector_nbytes

    def answer_nbytes(self, tasks: int) -> int:
        """Bytes of an answer to an order with so many tasks."""
        return 8 + tasks * self._result_nbytes

    @property
    def _vector_nbytes(self) -> int:
        return words(self.d * self.dtype.itemsize)

    @property
    def _result_nbytes(self) -> int:
        return 8 * self.extras + self._vector_nbytes

    def write_order(self, frame: Frame, number: int, given: Sequence[Given], model: int, x: Vector | None) -> None:
        """Fill a frame with tasks, and x of a model if there is one."""
        frame.step = number
        head = frame.wire[: self.head_nbytes].view(np.int64)
        head[:2] = len(given), model
        head[2 : 2 + 3 * len(given)] = [value for task in given for value in task]
        if x is not None:
            self.x_of(frame)[:] = x

    def given_of(self, frame: Frame) -> list[Given]:
        """Return the tasks of an order."""
        head = frame.wire[: self.head_nbytes].view(np.int64)
        return [Given(*head[2 + 3 * k : 5 + 3 * k].tolist()) for k in range(int(head[0]))]

    def model_of(self, frame: Frame) -> int:
        """Return whose x an order brings; -1: none."""
        return int(frame.wire[8:16].view(np.int64)[0])

    def x_of(self, frame: Frame) -> Vector:
        """Return x of an order, a view."""
        x: Vector = frame.wire[self.head_nbytes : self.head_nbytes + self.d * self.dtype.itemsize].view(self.dtype)
        return x

    def seconds_of(self, frame: Frame) -> Numbers:
        """Return the seconds that an answer took, (1,), a view."""
        return frame.wire[:8].view(np.float64)

    def result_of(self, frame: Frame, k: int) -> tuple[Vector, Numbers]:
        """Return the result of task k of an answer, views."""
        at = self.answer_nbytes(k)
        begin = at + 8 * self.extras
        vector: Vector = frame.wire[begin : begin + self.d * self.dtype.itemsize].view(self.dtype)
        return vector, frame.wire[at:begin].view(np.float64)


class Tasks:
    """What one worker computes. All is local.

    Parameters
    ----------
    samples : tuple of int
        Of a job of each model.
    """

    def __init__(self, subject: str, gradient: Gradient, scheme: Scheme, n: int, worker: int, samples: tuple[int, ...],
                 layout: TaskLayout) -> None:
        self._subject, self._gradient, self._scheme, self._n, self._worker = subject, gradient, scheme, n, worker
        self._samples, self._layout = samples, layout
        self._pieces: dict[tuple[int, int], list[tuple[range, float]]] = {}

    @cached_property
    def _spare(self) -> Vector:
        return np.zeros(self._layout.d, self._layout.dtype)

    def compute(self, given: Sequence[Given], x_of: Callable[[int], Vector], frame: Frame, now: Callable[[], float],
                progress: Callable[[], object] = lambda: None) -> int:
        """Write the answer to an order; return how many bytes of the wire it takes."""
        began = now()
        for k, task in enumerate(given):
            total, extras = self._layout.result_of(frame, k)
            total[:] = extras[:] = 0.0
            if task.step < 0:
                continue
            for samples, weight in self._pieces_of(task.slot, self._samples[task.model]):
                self._add(self._gradient(x_of(task.model), task.model, samples, task.step), weight, total, extras)
                progress()
        self._layout.seconds_of(frame)[0] = now() - began
        return self._layout.answer_nbytes(len(given))

    def _add(self, answer: Any, weight: float, total: Vector, extras: Numbers) -> None:
        given, more = pair_in(self._subject, answer, "the extras", ())
        vector = vector_in(self._subject, "gradient()", given, total)
        if np.ndim(more) != 1 or len(more) != extras.size:
            raise OptionError(f"{self._subject}: gradient() has returned {np.size(more)} extras; it was built for "
                              f"{extras.size}, in a sequence")
        with np.errstate(all="ignore"):  # a training may diverge
            if weight == 1.0:
                np.add(total, vector, out=total, casting="same_kind")
            else:
                np.multiply(vector, total.dtype.type(weight), out=self._spare, casting="same_kind")
                np.add(total, self._spare, out=total)
            extras += weight * np.asarray(more, np.float64)

    def _pieces_of(self, slot: int, samples: int) -> list[tuple[range, float]]:
        """Return which samples are added with which weight: chunks that follow each other with one weight are one piece."""
        if (slot, samples) not in self._pieces:
            bounds = self._scheme.bounds(self._n, samples).tolist()
            task = self._scheme.task(0, self._worker, slot, self._n)
            pieces: list[tuple[range, float]] = []
            for chunk, weight in zip(task.chunks, task.weights, strict=True):
                begin, end = bounds[chunk], bounds[chunk + 1]
                if pieces and pieces[-1][0].stop == begin and pieces[-1][1] == weight:
                    pieces[-1] = range(pieces[-1][0].start, end), weight
                else:
                    pieces.append((range(begin, end), weight))
            self._pieces[slot, samples] = [piece for piece in pieces if piece[0]]
        return self._pieces[slot, samples]
