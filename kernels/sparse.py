"""Adding sparse and dense messages to a vector, and forming vectors whole."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._stream import BLOCK, form, put
from ._vector import GROUP, Terms, Vector, at_least, fence, fetch_entry, magnitude, subtract_group

__all__ = ["COMBINE_SCRATCH", "add_dense", "add_sparse", "clear_sparse", "combine", "gather",
           "mean_rows", "mean_slice", "subtract"]


COMBINE_SCRATCH = BLOCK + GROUP
_FAR = 512  # entries ahead to ask for: far, because every one lies in another cache line


@jit
def combine(terms: Terms, factors: Vector, out: Vector, scratch: Vector) -> bool:
    """Write ``x = sum_t factors[t] * terms[t]`` to `out` and tell whether it is finite.

    `out` is overwritten; may be empty: then x is only looked at. May be one of the terms.
    """
    broken, infinity = np.uint64(0), magnitude(scratch.dtype.type(np.inf))
    for low in range(0, terms[0].size, BLOCK):
        m = min(BLOCK, terms[0].size - low)
        form(terms, factors, low, scratch[:m])
        scratch[m : m + GROUP] = 0
        for g in range(0, m, GROUP):
            broken |= at_least(scratch, g, infinity)
        if out.size:
            put(scratch[:m], out, low)
    fence()
    return bool(broken == 0)


@jit
def subtract(values: Vector, out: Vector) -> None:
    """Subtract `values` from `out`, of which only what is near entries that are not zero is touched."""
    whole = out.size // GROUP * GROUP
    for g in range(0, whole, GROUP):
        if at_least(values, g, np.uint64(1)) != 0:
            subtract_group(values, out, g)
    for i in range(whole, out.size):
        if values[i] != 0:
            out[i] -= values[i]


@jit
def mean_rows(rows: Vector, own: Vector, rank: int, factor: np.floating, out: Vector) -> bool:
    """Write ``factor * rows[0] + factor * rows[1] + ...``, added in this order, to `out`; tell whether it is finite.

    `own` stands for row number `rank` of `rows`, (n, d), which is not read. `out` is overwritten.
    """
    broken, infinity = np.uint64(0), magnitude(out.dtype.type(np.inf))
    for low in range(0, out.size, BLOCK):
        m = min(BLOCK, out.size - low)
        x = out[low : low + m]
        row = own[low : low + m] if rank == 0 else rows[0, low : low + m]
        for i in range(m):
            x[i] = factor * row[i]
        for r in range(1, rows.shape[0]):
            row = own[low : low + m] if rank == r else rows[r, low : low + m]
            for i in range(m):
                x[i] += factor * row[i]
        whole = m // GROUP * GROUP
        for g in range(0, whole, GROUP):
            broken |= at_least(x, g, infinity)
        for i in range(whole, m):
            broken |= np.uint64(magnitude(x[i]) >= infinity)
    return bool(broken == 0)


@jit
def mean_slice(rows: Vector, start: int, factor: np.floating, out: Vector) -> None:
    """Write what :func:`mean_rows` does for the columns of `rows`, (n, any), from `start` on, as many as `out` has."""
    for low in range(0, out.size, BLOCK):
        m = min(BLOCK, out.size - low)
        x, at = out[low : low + m], start + low
        row = rows[0, at : at + m]
        for i in range(m):
            x[i] = factor * row[i]
        for r in range(1, rows.shape[0]):
            row = rows[r, at : at + m]
            for i in range(m):
                x[i] += factor * row[i]


@jit
def gather(terms: Terms, factors: Vector, indices: NDArray[np.int64], values: Vector) -> None:
    """Write the entries of ``sum_t factors[t] * terms[t]`` at `indices` into `values`."""
    a, b, c = terms
    for j in range(indices.size):
        i = indices[j]
        value = factors[0] * a[i]
        if b.size:
            value += factors[1] * b[i]
        if c.size:
            value += factors[2] * c[i]
        values[j] = value


@jit
def add_sparse(indices: NDArray[np.int64], values: Vector, factor: np.floating, out: Vector) -> None:
    """Add ``factor * values`` to `out` at `indices`."""
    last = indices.size - 1
    for j in range(indices.size):
        fetch_entry(out, indices[min(j + _FAR, last)])
        out[indices[j]] += factor * values[j]


@jit
def clear_sparse(indices: NDArray[np.int64], out: Vector) -> None:
    """Set `out` to zero at `indices`."""
    last = indices.size - 1
    for j in range(indices.size):
        fetch_entry(out, indices[min(j + _FAR, last)])
        out[indices[j]] = 0


@jit
def add_dense(values: Vector, factor: np.floating, out: Vector) -> None:
    """Add ``factor * values`` to `out`, the product rounded before the sum."""
    for i in range(out.size):
        out[i] += factor * values[i]
