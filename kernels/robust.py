"""Vectors of several clients as rows: how far they are from each other, mixtures of them, order statistics of entries.

All sums are in float64 and in an order that depends on nothing but the numbers of rows and entries: the same bits on every
processor, and, as squared distances are sums over parts of the columns, on any number of ranks that share the columns.

rows : (n, w) of the vectors' dtype, contiguous within a row
anchors : (a, w) of the same dtype
    Further rows, that belong to no client: what is clipped towards.
scratch : (n + a + 2 m, ROBUST_BLOCK) float64, or more rows; n + a + 1 where nothing is sorted
"""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._vector import Vector, squared_distance

__all__ = ["ROBUST_BLOCK", "add_distances", "combine_columns", "distances_to_mixture", "mixed_distances"]

ROBUST_BLOCK = 512
_LANES = 32


@jit
def add_distances(rows: Vector, anchors: Vector, start: int, stop: int, scratch: NDArray[np.float64],
                  out: NDArray[np.float64]) -> None:
    """Add to `out`, (n + a, n + a), the squared distances of rows and anchors in the columns ``start ... stop - 1``.

    Of true differences, so that rows that nearly agree keep theirs. A block of 512 columns is summed in 32 lanes:
    entry i of it in lane ``i % 32``, then lanes q and q + 16 are added, q and q + 8, and so on; blocks in order.
    """
    n = rows.shape[0] + anchors.shape[0]
    for low in range(start, stop, ROBUST_BLOCK):
        high = min(low + ROBUST_BLOCK, stop)
        width = _load(rows, anchors, low, high, scratch)
        for i in range(n):
            for j in range(i):
                apart = squared_distance(scratch[i], scratch[j], width)
                out[i, j] += apart
                out[j, i] += apart


@jit
def distances_to_mixture(rows: Vector, anchors: Vector, weights: NDArray[np.float64], start: int, stop: int,
                         scratch: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """Add to `out`, (n + a,), the squared distances of all rows to one mixture of them, in the columns start ... stop - 1.

    weights : (n + a,) float64, of sum 1. Summed as in :func:`add_distances`.
    """
    n = rows.shape[0] + anchors.shape[0]
    first = _heaviest(weights)
    for low in range(start, stop, ROBUST_BLOCK):
        high = min(low + ROBUST_BLOCK, stop)
        width = _load(rows, anchors, low, high, scratch)
        _mix(scratch, weights, first, width, scratch[n])
        for i in range(n):
            out[i] += squared_distance(scratch[i], scratch[n], width)


@jit
def mixed_distances(distances: NDArray[np.float64], weights: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """Write the squared distances of mixtures, (m, m), to `out`, from those of what is mixed, (n, n).

    weights : (m, n), of sum 1 a row. With ``q_ij = sum_ab w_ia w_jb D_ab``:
    ``D'_ij = q_ij - (q_ii + q_jj) / 2``, at least 0.
    """
    m = weights.shape[0]
    for i in range(m):
        for j in range(i + 1):
            out[i, j] = _product(distances, weights[i], weights[j])
    for i in range(m):
        for j in range(i):
            apart = max(out[i, j] - 0.5 * (out[i, i] + out[j, j]), 0.0)
            out[j, i] = 0.0 if _same(weights[i], weights[j]) else apart
    for i in range(m):
        for j in range(i):
            out[i, j] = out[j, i]
        out[i, i] = 0.0


@jit
def _product(distances, v, w):
    total = 0.0
    for a in range(v.size):
        if v[a] != 0.0:
            inner = 0.0
            for b in range(w.size):
                if w[b] != 0.0:
                    inner += w[b] * distances[a, b]
            total += v[a] * inner
    return total


@jit
def combine_columns(rows: Vector, anchors: Vector, weights: NDArray[np.float64], pairs: NDArray[np.int64], low: int,
                    high: int, columns: NDArray[np.int64], every: bool, scratch: NDArray[np.float64],
                    outside: NDArray[np.int64], out: Vector) -> None:
    """Overwrite entries of `out`, (w,), with means of order statistics of mixtures.

    Parameters
    ----------
    weights : (m, n + a) float64
        ``y_i = sum_j weights[i, j] x_j``, of sum 1 a row; (0, 0): the rows themselves, m = n then.
    pairs : (p, 2) int64
        Comparators that sort m numbers, see :func:`mpi_ef.robust.columns.network`; none with m = 1.
    low, high : int
        The mean of the sorted ``low ... high - 1`` of the m is what is written.
    columns : (c,) int64
        The entries to write, ascending, unless `every` one is written.
    outside : (m,) int64
        To it is added how often a row was less than what was kept, or greater.

    A mixture is ``x_r + sum_j w_j (x_j - x_r)``, in the order of j, with r the row of the greatest weight, so that equal
    rows give their value; a mean of sorted values likewise begins with the least.
    """
    n = rows.shape[0] + anchors.shape[0]
    mixes = weights.size > 0
    m = weights.shape[0] if mixes else rows.shape[0]
    count = out.size if every else columns.size
    twins = _twins(weights)
    for start in range(0, count, ROBUST_BLOCK):
        stop = min(start + ROBUST_BLOCK, count)
        places = columns[start:stop] if not every else columns
        width = _load(rows, anchors, start, stop, scratch) if every else _gather(rows, anchors, places, scratch)
        if mixes:
            _mix_all(scratch, weights, twins, width, scratch[n:])
        mixtures = scratch[n if mixes else 0 :]
        if pairs.shape[0] > 0:
            ordered = mixtures[m:]
            _sort(mixtures, m, pairs, width, ordered)
            for i in range(m):
                outside[i] += _outside(mixtures[i], ordered[low], ordered[high - 1], stop - start)
            _mean(ordered, low, high, width)
            mixtures = ordered[low:]
        if every:
            _narrow(mixtures[0], out[start:stop])
        else:
            _scatter(mixtures[0], places, out)


@jit
def _twins(weights):
    """Return for each mixture an earlier one that is the same, or -1."""
    twins = np.full(weights.shape[0], -1, np.int64)
    for i in range(twins.size):
        for j in range(i - 1, -1, -1):
            if _same(weights[i], weights[j]):
                twins[i] = j
    return twins


@jit
def _mix_all(scratch, weights, twins, width, out):
    for i in range(weights.shape[0]):
        if twins[i] >= 0:
            _copy(out[twins[i]], width, out[i])
        else:
            _mix(scratch, weights[i], _heaviest(weights[i]), width, out[i])


@jit
def _sort(rows, m, pairs, width, out):
    for i in range(m):
        _copy(rows[i], width, out[i])
    for p in range(pairs.shape[0]):
        _order(out[pairs[p, 0]], out[pairs[p, 1]], width)


@jit
def _narrow(x, out):
    for c in range(out.size):
        out[c] = x[c]


@jit
def _scatter(x, places, out):
    for c in range(places.size):
        out[places[c]] = x[c]


@jit
def _load(rows, anchors, low, high, scratch):
    """Copy columns of rows and anchors to `scratch`, padded with zeros to whole lanes; return the width of that."""
    n = rows.shape[0]
    width = (high - low + _LANES - 1) // _LANES * _LANES
    for i in range(n):
        _widen(rows[i, low:high], width, scratch[i])
    for i in range(anchors.shape[0]):
        _widen(anchors[i, low:high], width, scratch[n + i])
    return width


@jit
def _widen(x, width, out):
    for c in range(x.size):
        out[c] = np.float64(x[c])
    for c in range(x.size, width):
        out[c] = 0.0


@jit
def _gather(rows, anchors, columns, scratch):
    n = rows.shape[0]
    width = (columns.size + _LANES - 1) // _LANES * _LANES
    for i in range(n):
        for c in range(columns.size):
            scratch[i, c] = np.float64(rows[i, columns[c]])
        for c in range(columns.size, width):
            scratch[i, c] = 0.0
    for i in range(anchors.shape[0]):
        for c in range(columns.size):
            scratch[n + i, c] = np.float64(anchors[i, columns[c]])
        for c in range(columns.size, width):
            scratch[n + i, c] = 0.0
    return width


@jit
def _heaviest(weights):
    first = 0
    for j in range(weights.size):
        if weights[j] > weights[first]:
            first = j
    return first


@jit
def _same(x, y):
    different = 0
    for j in range(x.size):
        different += x[j] != y[j]
    return different == 0


@jit
def _mix(scratch, weights, first, width, out):
    for c in range(width):
        out[c] = 0.0
    for j in range(weights.size):
        if j != first and weights[j] != 0.0:
            _add_difference(scratch[j], scratch[first], weights[j], width, out)
    for c in range(width):
        out[c] = scratch[first, c] + out[c]


@jit
def _add_difference(x, y, weight, width, out):
    for c in range(width):
        out[c] += weight * (x[c] - y[c])


@jit
def _copy(x, width, out):
    for c in range(width):
        out[c] = x[c]


@jit
def _order(x, y, width):
    for c in range(width):
        a, b = x[c], y[c]
        swap = b < a
        x[c] = b if swap else a
        y[c] = a if swap else b


@jit
def _outside(x, least, most, width):
    count = 0
    for c in range(width):
        count += (x[c] < least[c]) | (x[c] > most[c])
    return count


@jit
def _mean(rows, low, high, width):
    """Write the mean of sorted rows ``low ... high - 1`` to that of `low`."""
    count = np.float64(high - low)
    first = rows[low]
    if high - low == 1:
        return
    for c in range(width):
        total = 0.0
        for i in range(low + 1, high):
            total += rows[i, c] - first[c]
        first[c] = first[c] + total / count
