"""Matrices as products of two thin factors: an orthonormal one, and adding the product to a vector.

A factor of rank r of a matrix with p rows is r rows of p entries each, one after the other. Everything here gives the
same bits on every processor: no sum is reordered, and no product is fused with a sum.
"""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._stream import BLOCK
from ._vector import Vector

__all__ = ["add_low_rank", "orthonormalise"]

_LANES = 8  # sums that run side by side: one alone would wait for every addition
_DEPENDENT = 16  # rounding errors of a row; what is left of a dependent one has about one


@jit
def orthonormalise(rows: Vector, spans: NDArray[np.int64], rank: int, spare: Vector) -> None:
    """Make the rows of every factor orthonormal, in their order; rows that depend on those before become zero.

    Parameters
    ----------
    rows : (m,) finite, the factors of all matrices, `rank` rows each, overwritten
    spans : (matrices, 2) int64, where a factor begins in `rows` and how long its rows are, at least 1
    spare : (m,) finite, or empty
        A row that would become zero is replaced by the row of `spare` in its place, if that one is independent.

    Notes
    -----
    Gram-Schmidt, every row freed of those before it twice. Sums are in double precision.
    """
    for j in range(spans.shape[0]):
        start, size = spans[j, 0], spans[j, 1]
        for k in range(rank):
            low, high = start + k * size, start + (k + 1) * size
            independent = _settle(rows[start:low], rows[low:high])
            if spare.size and not independent:
                rows[low:high] = spare[low:high]
                _settle(rows[start:low], rows[low:high])


@jit
def _settle(earlier, row):
    """Make `row` a unit vector orthogonal to the rows in `earlier`, or zero when it depends on them; tell which."""
    largest = 0.0
    for i in range(row.size):
        largest = max(largest, abs(np.float64(row[i])))
    if largest == 0:
        return False
    for i in range(row.size):  # no square overflows, none of all vanishes
        row[i] = row[i] / largest
    before = sqrt(_dot(row, row))
    for _ in range(2):
        for low in range(0, earlier.size, row.size):
            other = earlier[low : low + row.size]
            share = _dot(row, other)
            for i in range(row.size):
                row[i] = row[i] - share * other[i]
    length = sqrt(_dot(row, row))
    independent = length > _DEPENDENT * (2.0**-23 if row.itemsize == 4 else 2.0**-52) * before
    for i in range(row.size):
        row[i] = row[i] / length if independent else 0.0
    return independent


@jit
def _dot(x, y):
    """Add the products of entries in eight sums, entry i in sum i % 8; add those by halves, then what is left over."""
    a = b = c = d = e = f = g = h = 0.0
    whole = x.size // _LANES * _LANES
    for i in range(0, whole, _LANES):
        a += np.float64(x[i]) * np.float64(y[i])
        b += np.float64(x[i + 1]) * np.float64(y[i + 1])
        c += np.float64(x[i + 2]) * np.float64(y[i + 2])
        d += np.float64(x[i + 3]) * np.float64(y[i + 3])
        e += np.float64(x[i + 4]) * np.float64(y[i + 4])
        f += np.float64(x[i + 5]) * np.float64(y[i + 5])
        g += np.float64(x[i + 6]) * np.float64(y[i + 6])
        h += np.float64(x[i + 7]) * np.float64(y[i + 7])
    total = ((a + e) + (c + g)) + ((b + f) + (d + h))
    for i in range(whole, x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@jit
def add_low_rank(left: Vector, right: Vector, parts: NDArray[np.int64], rank: int, factor: np.floating, overwrite: bool,
                 out: Vector, scratch: Vector) -> None:
    """Add ``factor`` times the decoded vector to `out`: products of factors, and what travels whole.

    Parameters
    ----------
    left : (m,), for every part in turn: the left factor of a matrix, or the entries of a whole part
    right : (m',) for every matrix in turn: its right factor
    parts : (j, 2) int64, rows and columns of the parts of `out`; a part without columns is whole and has so many entries
    scratch : at least (BLOCK,)

    Notes
    -----
    An entry of a product is the sum over the rank in its order; the factor multiplies the sum.
    """
    at = of_left = of_right = 0
    for j in range(parts.shape[0]):
        rows, columns = parts[j, 0], parts[j, 1]
        if columns == 0:
            _add_row(left[of_left : of_left + rows], factor, overwrite, out[at : at + rows])
            at, of_left = at + rows, of_left + rows
            continue
        thin, wide = left[of_left : of_left + rank * rows], right[of_right : of_right + rank * columns]
        for low in range(0, columns, BLOCK):
            m = min(BLOCK, columns - low)
            for i in range(rows):
                begin = at + i * columns + low
                _add_product(thin[i::rows], wide, low, columns, factor, overwrite, out[begin : begin + m], scratch)
        at, of_left, of_right = at + rows * columns, of_left + rank * rows, of_right + rank * columns


@jit
def _add_product(weights, right, low, columns, factor, overwrite, out, scratch):
    """Add ``factor`` times the entries from `low` on of ``weights @ right`` to `out`; the last two terms in one pass."""
    last, m, zero = weights.size - 1, out.size, out.dtype.type(0)  # to which -0.0 is added, too
    v, b = weights[last], right[last * columns + low :]
    if last == 0:
        for c in range(m):
            out[c] = (zero if overwrite else out[c]) + factor * (v * b[c])
        return
    u, a = weights[last - 1], right[(last - 1) * columns + low :]
    if last == 1:
        for c in range(m):
            out[c] = (zero if overwrite else out[c]) + factor * (u * a[c] + v * b[c])
        return
    _form_sum(weights[: last - 1], right, low, columns, scratch[:m])
    for c in range(m):
        out[c] = (zero if overwrite else out[c]) + factor * ((scratch[c] + u * a[c]) + v * b[c])


@jit
def _form_sum(weights, right, low, columns, out):
    for c in range(out.size):
        out[c] = weights[0] * right[low + c]
    for k in range(1, weights.size):
        weight, a = weights[k], right[k * columns + low :]
        for c in range(out.size):
            out[c] += weight * a[c]


@jit
def _add_row(values, factor, overwrite, out):
    zero = out.dtype.type(0)
    for c in range(out.size):
        out[c] = (zero if overwrite else out[c]) + factor * values[c]
