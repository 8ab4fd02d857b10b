"""Steps along a momentum over a variance that does not change: of `m`, `u` and `x` in place."""

import numpy as np

from ._jit import jit
from ._stream import BLOCK
from ._vector import Vector

__all__ = ["local_step", "momentum_step"]


@jit
def momentum_step(grad: Vector, inverse: Vector, beta: np.floating, step: np.floating, decay: np.floating, m: Vector,
                  x: Vector) -> None:
    """Update the momentum, ``m = beta m + (1 - beta) grad``, then take a step, ``x = decay x - step (m inverse)``."""
    one = m.dtype.type(1)
    for i in range(x.size):
        m[i] = beta * m[i] + (one - beta) * grad[i]
        x[i] = decay * x[i] - step * (m[i] * inverse[i])


@jit
def local_step(grad: Vector, inverse: Vector, start: Vector, beta: np.floating, weight: np.floating, step: np.floating,
               decay: np.floating, m: Vector, u: Vector, x: Vector) -> None:
    """Take a gradient into the momentum, that into a mean of momenta, and place x where this mean leads from `start`.

    ``m = beta m + (1 - beta) grad``, ``u = (1 - weight) u + weight m``, ``x = decay start - step (u inverse)``.
    """
    for low in range(0, x.size, BLOCK):
        part = slice(low, min(low + BLOCK, x.size))
        _average(grad[part], beta, weight, m[part], u[part])
        _place(inverse[part], start[part], step, decay, u[part], x[part])


@jit
def _average(grad, beta, weight, m, u):
    one = m.dtype.type(1)
    for i in range(m.size):
        m[i] = beta * m[i] + (one - beta) * grad[i]
        u[i] = (one - weight) * u[i] + weight * m[i]


@jit
def _place(inverse, start, step, decay, u, x):
    for i in range(x.size):
        x[i] = decay * start[i] - step * (u[i] * inverse[i])
