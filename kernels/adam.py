"""Adam-like updates of a whole vector in one pass: of `m`, `v` and `x` in place."""

import numpy as np

from ._jit import jit
from ._vector import GROUP, Vector, sum_magnitudes

__all__ = ["adam", "adam_step", "l1_norm", "preconditioned_step", "sign_step", "update_moments"]

_PART = 4096


@jit
def update_moments(grad: Vector, beta1: np.floating, beta2: np.floating, m: Vector, v: Vector) -> None:
    """Take the mean and the mean square of gradients along: ``m = beta1 m + (1 - beta1) grad``, v with ``grad^2``."""
    one = m.dtype.type(1)
    for i in range(m.size):
        m[i] = beta1 * m[i] + (one - beta1) * grad[i]
        v[i] = beta2 * v[i] + (one - beta2) * (grad[i] * grad[i])


@jit
def adam_step(m: Vector, v: Vector, step: np.floating, root_factor: np.floating, eps: np.floating, decay: np.floating,
              x: Vector) -> None:
    """Take a step of Adam: ``x = decay x - step m / (root_factor sqrt(v) + eps)``."""
    for i in range(x.size):
        x[i] = decay * x[i] - step * (m[i] / (root_factor * np.sqrt(v[i]) + eps))


@jit
def adam(grad: Vector, beta1: np.floating, beta2: np.floating, step: np.floating, root_factor: np.floating,
         eps: np.floating, decay: np.floating, m: Vector, v: Vector, x: Vector) -> None:
    """Do what :func:`update_moments` and then :func:`adam_step` do, in one pass."""
    one = m.dtype.type(1)
    for i in range(x.size):
        m_i = beta1 * m[i] + (one - beta1) * grad[i]
        v_i = beta2 * v[i] + (one - beta2) * (grad[i] * grad[i])
        x[i] = decay * x[i] - step * (m_i / (root_factor * np.sqrt(v_i) + eps))
        m[i] = m_i
        v[i] = v_i


@jit
def preconditioned_step(m: Vector, inverse: Vector, step: np.floating, decay: np.floating, x: Vector) -> None:
    """Take a step along a preconditioned direction: ``x = decay x - step (m inverse)``."""
    for i in range(x.size):
        x[i] = decay * x[i] - step * (m[i] * inverse[i])


@jit
def l1_norm(x: Vector) -> float:
    """Return the sum of magnitudes of `x`, (d,) float32 or float64; the same bits on every machine.

    Groups of 64 are added in the dtype of x, halves upon halves; those of a part of 4096 entries, and what follows the last
    group, in order in float64, and so are the parts.
    """
    total = 0.0
    for low in range(0, x.size, _PART):
        stop = min(low + _PART, x.size)
        whole, of_part = low + (stop - low) // GROUP * GROUP, 0.0
        for g in range(low, whole, GROUP):
            of_part += sum_magnitudes(x, g)
        for i in range(whole, stop):
            of_part += abs(x[i])
        total += of_part
    return total


@jit
def sign_step(direction: Vector, step: np.floating, decay: np.floating, x: Vector) -> None:
    """Take a step of equal length in every entry: ``x = decay x - step sign(direction)``, where sign(0) = 0."""
    for i in range(x.size):
        x[i] = decay * x[i] - step * (np.sign(direction[i]) + 0)  # of which -0 becomes 0, as in NumPy
