"""Twins of the kernels in momentum.py and layers.py; a part of :mod:`mpi_ef.kernels.reference`."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_layers", "follow_momentum", "layer_norms", "local_step", "momentum_step", "scaled_momentum"]

Vector = NDArray[np.floating]
Places = NDArray[np.int64]


def momentum_step(grad: Vector, inverse: Vector, beta: np.floating, step: np.floating, decay: np.floating, m: Vector,
                  x: Vector) -> None:
    """Take a gradient into the momentum, then a step."""
    m[:] = beta * m + (m.dtype.type(1) - beta) * grad
    x[:] = decay * x - step * (m * inverse)


def local_step(grad: Vector, inverse: Vector, start: Vector, beta: np.floating, weight: np.floating, step: np.floating,
               decay: np.floating, m: Vector, u: Vector, x: Vector) -> None:
    """Take a gradient into the momentum, that into a mean of momenta, and place x where this mean leads from `start`."""
    one = m.dtype.type(1)
    m[:] = beta * m + (one - beta) * grad
    u[:] = (one - weight) * u + weight * m
    x[:] = decay * start - step * (u * inverse)


def layer_norms(x: Vector, starts: Places, norms: NDArray[np.float64]) -> None:
    """Write the norms of the layers of `x` to `norms`."""
    for p, (start, stop) in enumerate(pairwise(starts)):
        squares = x[start:stop].astype(np.float64) ** 2
        whole = squares.size // 64 * 64
        sums = np.cumsum(np.vstack([np.zeros(64), squares[:whole].reshape(-1, 64)]), axis=0)[-1]
        norms[p] = np.sqrt(np.cumsum(np.concatenate([[0.0], sums, squares[whole:]]))[-1])


def add_layers(values: Vector, factors: Vector, starts: Places, out: Vector) -> None:
    """Add every layer of `values`, times a factor of its own, to `out`."""
    out += np.repeat(factors, np.diff(starts)) * values


def scaled_momentum(grad: Vector, m: Vector, beta: np.floating, scales: Vector, starts: Places, out: Vector) -> None:
    """Write every layer of the new momentum, times a scale of its own, to `out`."""
    out[:] = np.repeat(scales, np.diff(starts)) * (beta * m + (out.dtype.type(1) - beta) * grad)


def follow_momentum(sent: Vector, inverse: Vector, betas: Vector, root_factor: np.floating, eps: np.floating,
                    scales: Vector, least: Vector, starts: Places, m: Vector, fresh: Vector, ratios: Vector) -> None:
    """Take a new momentum over, and into the variance the gradient that must have led to it; compare with the frozen one."""
    (beta1, beta2), one, sizes = betas, m.dtype.type(1), np.diff(starts)
    new = np.repeat(one / scales, sizes) * sent
    grad = (new - beta1 * m) / (one - beta1)
    m[:], fresh[:] = new, beta2 * fresh + (one - beta2) * (grad * grad)
    roots = np.maximum(root_factor * np.sqrt(fresh), np.repeat(least, sizes)) + eps
    quotients = np.divide(one, roots * inverse, out=np.zeros_like(m), where=inverse > 0)
    ratios[:] = [quotients[start:stop].max(initial=0) for start, stop in pairwise(starts)]
