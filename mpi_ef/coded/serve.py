"""Gradient descent of NumPy vectors that does not wait for the slowest ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.errors import NonFiniteError, OptionError, briefly
from mpi_ef.ranges import whole

from .codes import GradientCode
from .gradients import CodedGradients
from .returned import check_called, check_comm, count_in, pair_in, step_to, vector_in
from .wire import Decoded, Order

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
        or that and the number of samples, in all parts or in none. It is a function of its arguments alone, so that twins
        compute the same: random numbers are drawn from (seed, t, part). x is read only.
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
        On rank 0, see :meth:`CodedGradients.end`, or as the sum has overflowed; the other ranks end when it does.
    OptionError, ShapeError, DtypeError
        On all ranks, where arguments are wrong. Where `gradient` or `step` returns something else, on that rank.
    """
    check_comm("serve", comm)

    def facts() -> dict[str, object]:
        whole("serve", 0, "how many steps are to be made", steps=steps)
        check_called("serve", "(x, part, t)", gradient=gradient)
        check_called("serve", "(x, g, t)", step=step)
        if not isinstance(x, np.ndarray) or x.ndim != 1 or not x.flags.writeable or not x.flags.c_contiguous:
            raise OptionError(f"serve: x={briefly(x)} is no contiguous vector that can be written to; pass a NumPy array "
                              "(d,)")
        return {}

    agree(comm, "serve", facts, "call it with the same arguments everywhere")
    coded = CodedGradients(comm, x.size, x.dtype, code, compressor, extras=2, **options)
    total = np.zeros(x.size, x.dtype)
    missing: tuple[int, ...] = ()
    with coded:
        if coded.is_server:
            for t in range(steps):
                if (order := coded.begin(x)) is not None:
                    coded.answer(total, _sum(coded, order, gradient, total))
                decoded = coded.end()
                step_to("serve", x, step(x, _mean(coded, decoded), t))
            missing = coded.close(x)
        else:
            for order in coded.orders():
                coded.answer(total, _sum(coded, order, gradient, total))
            x[:] = coded.last[0]
    return Served(x, missing, coded.metrics if coded.is_server else {}, coded)


def _sum(coded: CodedGradients, order: Order, gradient: Callable[[Vector, int, int], Any], total: Vector) -> list[float]:
    """Write the coded gradient of an order; return the coded number of samples, and of parts of which it was told."""
    samples = told = 0.0
    total[:] = 0
    for part, weight in zip(order.parts, order.weights.tolist(), strict=True):
        subject = f"serve: part {part} of step {order.step}"
        given, count = pair_in(subject, gradient(order.x, part, order.step), "the number of samples", None)
        vector = vector_in(subject, "gradient()", given, total)
        with np.errstate(over="ignore", invalid="ignore"):  # counts as missing, and is told
            np.add(total, vector if weight == 1.0 else weight * vector, out=total, casting="same_kind")
        if count is not None:
            samples, told = samples + weight * count_in(subject, count), told + weight
        coded.progress()
    return [samples, told]


def _mean(coded: CodedGradients, decoded: Decoded) -> Vector:
    """Return the mean over samples, or the sum where no part has said how many it has."""
    g, samples, told = decoded.vector, round(float(decoded.extras[0])), round(float(decoded.extras[1]))
    if told not in (0, coded.n) and not decoded.approximate:
        raise OptionError(f"serve: of {coded.n} parts {told} have returned the number of samples in step {decoded.step}; "
                          "let all or none do it")
    if not np.isfinite(g).all():
        raise NonFiniteError(f"serve: the sum of gradients has overflowed in step {decoded.step}; take a smaller learning "
                             "rate", ())
    if samples:
        g /= samples
    return g
