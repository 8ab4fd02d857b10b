"""What LAMB does layer by layer, all layers in one pass over the vector: the same bits on every processor.

A layer is the part of a vector from ``starts[p]`` to ``starts[p + 1]``: `starts` is (layers + 1,) int64; what each layer
has one of, `factors`, `scales`, `least`, `ratios`, is (layers,) of the dtype of the vectors.
"""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._stream import BLOCK
from ._vector import Vector

__all__ = ["add_layers", "follow_momentum", "layer_norms", "scaled_momentum"]

_LANES, _PART = 64, 4096


@jit
def layer_norms(x: Vector, starts: NDArray[np.int64], norms: NDArray[np.float64]) -> None:
    """Write the norms of the layers of `x` to `norms`, (layers,) float64.

    Squares are added in float64, in parts of 4096 entries: entry i of a part in sum ``i % 64``, these 64 in order, then what
    follows the last 64; and the parts in order.
    """
    sums = np.empty(_LANES)
    for p in range(norms.size):
        total = 0.0
        for low in range(starts[p], starts[p + 1], _PART):
            total += _sum_of_squares(x[low : min(low + _PART, starts[p + 1])], sums)
        norms[p] = sqrt(total)


@jit
def _sum_of_squares(x, sums):
    sums[:] = 0.0
    whole = x.size // _LANES * _LANES
    for g in range(0, whole, _LANES):
        for q in range(_LANES):
            value = np.float64(x[g + q])
            sums[q] += value * value
    total = 0.0
    for q in range(_LANES):
        total += sums[q]
    for i in range(whole, x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@jit
def add_layers(values: Vector, factors: Vector, starts: NDArray[np.int64], out: Vector) -> None:
    """Add every layer of `values`, times a factor of its own, to `out`."""
    for p in range(factors.size):
        low, high = starts[p], starts[p + 1]
        _add(values[low:high], factors[p], out[low:high])


@jit
def _add(values, factor, out):
    for i in range(out.size):
        out[i] += factor * values[i]


@jit
def scaled_momentum(grad: Vector, m: Vector, beta: np.floating, scales: Vector, starts: NDArray[np.int64],
                    out: Vector) -> None:
    """Write every layer of ``beta m + (1 - beta) grad``, times a scale of its own, to `out`, which is overwritten."""
    for p in range(scales.size):
        low, high = starts[p], starts[p + 1]
        _form(grad[low:high], m[low:high], beta, scales[p], out[low:high])


@jit
def _form(grad, m, beta, scale, out):
    one = out.dtype.type(1)
    for i in range(out.size):
        out[i] = scale * (beta * m[i] + (one - beta) * grad[i])


@jit
def follow_momentum(sent: Vector, inverse: Vector, betas: Vector, root_factor: np.floating, eps: np.floating,
                    scales: Vector, least: Vector, starts: NDArray[np.int64], m: Vector, fresh: Vector,
                    ratios: Vector) -> None:
    """Take a new momentum over, and into the variance the gradient that must have led to it; compare with the frozen one.

    With ``m' = sent / scale`` and ``grad = (m' - beta1 m) / (1 - beta1)``: ``fresh = beta2 fresh + (1 - beta2) grad^2``,
    ``m = m'``, and the ratio of a layer is the largest quotient of ``1 / inverse`` and ``max(root_factor sqrt(fresh), least)
    + eps``. Entries whose `inverse` is zero have no part in it: a layer without others has the ratio zero. `betas`: (2,).
    """
    seen = np.empty(_LANES, m.dtype)
    for p in range(scales.size):
        seen[:] = 0
        for low in range(starts[p], starts[p + 1], BLOCK):
            high = min(low + BLOCK, starts[p + 1])
            _follow(sent[low:high], betas, scales[p], m[low:high], fresh[low:high])
            _compare(inverse[low:high], fresh[low:high], root_factor, least[p], eps, seen)
        ratios[p] = seen.max()


@jit
def _follow(sent, betas, scale, m, fresh):
    one, beta1, beta2 = m.dtype.type(1), betas[0], betas[1]
    back = one / scale
    for i in range(m.size):
        new = back * sent[i]
        grad = (new - beta1 * m[i]) / (one - beta1)
        m[i] = new
        fresh[i] = beta2 * fresh[i] + (one - beta2) * (grad * grad)


@jit
def _compare(inverse, fresh, root_factor, least, eps, seen):
    """Let every lane see the largest ratio of its entries."""
    one = fresh.dtype.type(1)
    for g in range(0, fresh.size, _LANES):
        for q in range(min(_LANES, fresh.size - g)):
            root = root_factor * np.sqrt(fresh[g + q])
            root = max(root, least) + eps
            ratio = one / (root * inverse[g + q]) if inverse[g + q] > 0 else one - one
            seen[q] = max(seen[q], ratio)
