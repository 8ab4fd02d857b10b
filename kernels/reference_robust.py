"""Robust aggregation in plain NumPy, as :mod:`.reference` has the other kernels: the specification."""

# ruff: noqa: D103, ARG001

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_distances", "combine_columns", "distances_to_mixture", "mixed_distances"]

Vector = NDArray[np.floating]
Matrix = NDArray[np.float64]
_BLOCK, _LANES = 512, 32


def _squares(x: Matrix) -> Matrix:
    """Return the sums of the squares of the last axis, one block's, in lanes."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // _LANES), _LANES))
    padded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]] = x * x
    lanes = np.cumsum(padded, axis=-2)[..., -1, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _stacked(rows: Vector, anchors: Vector) -> Matrix:
    return np.vstack([rows, anchors]).astype(np.float64)


def add_distances(rows: Vector, anchors: Vector, start: int, stop: int, scratch: Matrix, out: Matrix) -> None:
    x = _stacked(rows, anchors)
    for low in range(start, stop, _BLOCK):
        part = x[:, low : min(low + _BLOCK, stop)]
        out += _squares(part[:, None] - part[None])


def distances_to_mixture(rows: Vector, anchors: Vector, weights: Matrix, start: int, stop: int, scratch: Matrix,
                         out: Matrix) -> None:
    x = _stacked(rows, anchors)
    for low in range(start, stop, _BLOCK):
        part = x[:, low : min(low + _BLOCK, stop)]
        out += _squares(part - _mixture(part, weights))


def mixed_distances(distances: Matrix, weights: Matrix, out: Matrix) -> None:
    m = len(weights)
    inner = np.cumsum(weights[:, None] * distances[None], axis=-1)[..., -1]  # (m, n): sum_b w_jb D_ab
    products = np.cumsum(weights[:, None] * inner[None], axis=-1)[..., -1]
    for i in range(m):
        for j in range(m):
            out[i, j] = max(products[max(i, j), min(i, j)] - 0.5 * (products[i, i] + products[j, j]), 0.0)
            if (weights[i] == weights[j]).all():
                out[i, j] = 0.0


def combine_columns(rows: Vector, anchors: Vector, weights: Matrix, pairs: NDArray[np.int64], low: int, high: int,
                    columns: NDArray[np.int64], every: bool, scratch: Matrix, outside: NDArray[np.int64],
                    out: Vector) -> None:
    places = np.arange(out.size) if every else columns
    x = _stacked(rows, anchors)[:, places]
    mixtures = np.array([_mixture(x, one) for one in weights]) if weights.size else x[: len(rows)]
    if len(pairs):
        ordered = np.sort(mixtures, axis=0)
        outside += ((mixtures < ordered[low]) | (mixtures > ordered[high - 1])).sum(axis=1)
        mixtures = ordered[low:high]
        if high - low > 1:
            total = np.cumsum(mixtures[1:] - mixtures[0], axis=0)[-1]
            mixtures = (mixtures[0] + total / np.float64(high - low))[None]
    out[places] = mixtures[0]


def _mixture(x: Matrix, weights: Matrix) -> Matrix:
    first = int(weights.argmax())
    total = np.zeros(x.shape[1])
    for j in np.flatnonzero(weights).tolist():
        if j != first:
            total += weights[j] * (x[j] - x[first])
    result: Matrix = x[first] + total
    return result
