"""Vectors of several clients as rows: how far they are from each other, mixtures of them, order statistics of entries.

All sums are in float64 and in an order that depends on nothing but the numbers of rows and entries: the same bits on every
processor, and, as squared distances are sums over parts of the columns, on any number of ranks that share the columns.

rows : (n, w) of the vectors' dtype, contiguous within a row
anchors : (a, w) of the same dtype
    Further rows, that belong to no client: what is clipped towards.
scratch : (SCRATCH_ROWS(n + a, m), ROBUST_BLOCK) float64
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

    weights : (m, n), of sum 1 a row. With ``q_ij = sum_ab w_ia w_jb D_ab``: ``D'_ij = q_ij - (q_ii + q_jj) / 2``, at least 0.
    """
    m, n = weights.shape
    for i in range(m):
        for j in range(i + 1):
            total = 0.0
            for a in range(n):
                if weights[i, a] != 0.0:
                    inner = 0.0
                    for b in range(n):
                        if weights[j, b] != 0.0:
                            inner += weights[j, b] * distances[a, b]
                    total += weights[i, a] * inner
            out[i, j] = total
            out[j, i] = total
    for i in range(m):
        for j in range(i):
            apart = out[i, j] - 0.5 * (out[i, i] + out[j, j])
            same = True
            for a in range(n):
                if weights[i, a] != weights[j, a]:
                    same = False
            apart = max(apart, 0.0)
            if same:
                apart = 0.0
            out[i, j] = apart
    for i in range(m):
        for j in range(i):
            out[j, i] = out[i, j]
        out[i, i] = 0.0


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

    A mixture is ``x_r + sum_j w_j (x_j - x_r)``, in the order of j, with r the row of the greatest weight, so that equal rows
    give their value; a mean of sorted values likewise begins with the least.
    """
    n = rows.shape[0] + anchors.shape[0]
    mixes = weights.size > 0
    m = weights.shape[0] if mixes else rows.shape[0]
    least = n if mixes else 0  # where the mixtures are in `scratch`
    sorts = pairs.shape[0] > 0
    kept = 2 * m + n if mixes else m + n  # a copy of what is sorted
    count = out.size if every else columns.size
    twin = np.full(m, -1, np.int64)  # an earlier mixture that is the same
    for i in range(m if mixes else 0):
        for j in range(i):
            if twin[i] < 0 and _same(weights[i], weights[j]):
                twin[i] = j
    for start in range(0, count, ROBUST_BLOCK):
        stop = min(start + ROBUST_BLOCK, count)
        if every:
            width = _load(rows, anchors, start, stop, scratch)
        else:
            width = _gather(rows, anchors, columns[start:stop], scratch)
        for i in range(m if mixes else 0):
            if twin[i] >= 0:
                _copy(scratch[n + twin[i]], width, scratch[n + i])
            else:
                _mix(scratch, weights[i], _heaviest(weights[i]), width, scratch[n + i])
        if sorts:
            at = kept - m
            for i in range(m):
                _copy(scratch[least + i], width, scratch[at + i])
            for p in range(pairs.shape[0]):
                _order(scratch[at + pairs[p, 0]], scratch[at + pairs[p, 1]], width)
            for i in range(m):
                outside[i] += _outside(scratch[least + i], scratch[at + low], scratch[at + high - 1], stop - start)
            _mean(scratch[at : at + m], low, high, width)
        else:
            at, low = least, 0
        if every:
            for c in range(stop - start):
                out[start + c] = scratch[at + low, c]
        else:
            for c in range(stop - start):
                out[columns[start + c]] = scratch[at + low, c]


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
    for j in range(x.size):
        if x[j] != y[j]:
            return False
    return True


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
