"""Gradient descent of NumPy vectors that does not wait for the slowest ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.errors import OptionError, briefly
from mpi_ef.ranges import whole

from .codes import GradientCode
from .gradients import CodedGradients
from .wire import Order

__all__ = ["Served", "serve"]

Vector = NDArray[Any]


@dataclass(frozen=True)
class Served:
    """What :func:`serve` returns.

    Attributes
    ----------
    x : (d,)
        The last parameters, the same bits on all ranks.
    missing : tuple of int
        Ranks that did not come to the end; on workers empty.
    metrics : dict of str to float
        Of the server: late, wrong and non-finite answers.
    coded : CodedGradients
    """

    x: Vector
    missing: tuple[int, ...]
    metrics: dict[str, float]
    coded: CodedGradients

    def leave(self, status: int = 0) -> None:
        """End all processes with this status, where some ranks are missing, for whom MPI would wait; else return. Local."""
        self.coded.leave(status)


def serve(comm: Comm, gradient: Callable[[Vector, int, int], Any], x: Vector, code: GradientCode,
          compressor: Compressor | None = None, *, step: Callable[[Vector, Vector, int], Vector | None], steps: int,
          **options: Any) -> Served:
    """Train with gradients of which those of the slowest workers are not waited for. Collective: all ranks call it.

    Parameters
    ----------
    comm : MPI.Comm
        Its n ranks are workers; rank 0 decides as well.
    gradient : callable
        ``gradient(x, part, t)`` returns the sum of the gradients over the samples of part ``0 <= part < n`` in step t, (d,),
        or that and the number of samples. It is a function of its arguments alone, so that twins compute the same: random
        numbers are drawn from (seed, t, part). x is read only.
    x : (d,) float32 or float64
        The first parameters: those of rank 0 count. They are updated in place: after an error x of rank 0 is what the last
        step has made, to be saved; on workers x is written at the end.
    code : GradientCode
    compressor : Compressor, optional
    step : callable
        ``step(x, g, t)`` on rank 0 returns new parameters, or changes x in place and returns None. g is the sum over all
        parts, or the mean over samples where `gradient` tells their number.
    steps : int
    **options
        Of :class:`CodedGradients`: order_compressor, dedicated, patience_seconds, on_silence, twins.

    Returns
    -------
    Served

    Raises
    ------
    SilenceError, NonFiniteError, DisagreementError
        On rank 0, see :meth:`CodedGradients.end`; the other ranks end when it does.
    """
    whole("serve", 0, "how many steps are to be made", steps=steps)
    if not isinstance(x, np.ndarray) or x.ndim != 1 or not x.flags.writeable or not x.flags.c_contiguous:
        raise OptionError(f"serve: x={briefly(x)} is no contiguous vector that can be written to; pass a NumPy array (d,)")
    coded = CodedGradients(comm, x.size, x.dtype, code, compressor, extras=1, **options)
    total = np.zeros(x.size, x.dtype)
    missing: tuple[int, ...] = ()
    with coded:
        if coded.is_server:
            for t in range(steps):
                if (order := coded.begin(x)) is not None:
                    coded.answer(total, [_sum(coded, order, gradient, total)])
                decoded = coded.end()
                samples = round(float(decoded.extras[0]))
                g = decoded.vector
                if samples:
                    g /= samples
                new = step(x, g, t)
                if new is not None:
                    x[:] = new
            missing = coded.close(x)
        else:
            for order in coded.orders():
                coded.answer(total, [_sum(coded, order, gradient, total)])
            x[:] = coded.last[0]
    return Served(x, missing, coded.metrics if coded.is_server else {}, coded)


def _sum(coded: CodedGradients, order: Order, gradient: Callable[[Vector, int, int], Any], total: Vector) -> float:
    """Write the coded gradient of an order; return the coded number of samples."""
    samples = 0.0
    total[:] = 0
    for part, weight in zip(order.parts, order.weights, strict=True):
        answer = gradient(order.x, part, order.step)
        vector, count = answer if isinstance(answer, tuple) else (answer, 0)
        if np.shape(vector) != total.shape:
            raise OptionError(f"serve: the gradient of part {part} has shape {np.shape(vector)}; x has {total.shape}")
        total += vector if weight == 1.0 else weight * np.asarray(vector)
        samples += weight * count
        coded.progress()
    return samples
