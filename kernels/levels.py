"""Two bits per entry, its sign and which of two magnitudes, and these two per block."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._stream import BLOCK, form, put
from ._vector import Terms, Vector, fence

__all__ = ["LEVELS_SCRATCH", "add_levels", "encode_levels"]


LEVELS_SCRATCH = 2 * BLOCK

_LARGE = 2.0**1000  # sums of larger magnitudes are formed of their 2^-24th parts


@jit
def encode_levels(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, less_decoded: bool, block: int,
                  levels: Vector, signs: NDArray[np.uint8], highs: NDArray[np.uint8], scratch: Vector) -> bool:
    """Write ``x = sum_t factors[t] * terms[t]`` as signs and one of two magnitudes for every entry.

    Parameters
    ----------
    block : int, up to 4096
    levels : (2 * ceil(d / block),) of the dtype of x, overwritten: for each block the mean of the magnitudes below their
        mean, and that of the others; 0 where there are none. Added in order in float64.
    signs, highs : (ceil(d / 8),) uint8, overwritten; entry i is bit ``7 - i % 8`` of byte ``i // 8``, set when
        ``x[i] >= 0``, and when its magnitude is the second one; bits beyond d are 0

    Returns
    -------
    bool
        Whether x is finite. If not, what was written means nothing.
    """
    d, finite = terms[0].size, True
    x, other = scratch[:BLOCK], scratch[BLOCK : 2 * BLOCK]
    signs[:] = 0
    highs[:] = 0
    tile = BLOCK // block * block
    for low in range(0, d, tile):
        m = min(tile, d - low)
        form(terms, factors, low, x[:m])
        for start in range(0, m, block):
            stop, j = min(start + block, m), (low + start) // block
            finite &= _encode(x[start:stop], low + start, levels[2 * j : 2 * j + 2], signs, highs)
        if keep.size:
            form(terms, keep_factors, low, other[:m])
            if less_decoded:
                for start in range(0, m, block):
                    stop, j = min(start + block, m), (low + start) // block
                    _add(levels[2 * j : 2 * j + 2], signs, highs, low + start, x.dtype.type(-1), other[start:stop])
            put(other[:m], keep, low)
    fence()
    return finite


@jit
def _encode(x, first, levels, signs, highs):
    """Encode a block, whose entries have the numbers `first` and following; tell whether it is finite."""
    largest, total, finite = 0.0, 0.0, True
    for i in range(x.size):
        size = np.float64(abs(x[i]))
        finite &= np.isfinite(size)
        largest = max(largest, size)
        total += size
    unit = 1.0 if largest <= _LARGE else 2.0**-24
    if unit != 1.0:
        total = 0.0
        for i in range(x.size):
            total += np.float64(abs(x[i])) * unit
    mean, below, above, count = total / x.size, 0.0, 0.0, 0
    for i in range(x.size):
        size, at = np.float64(abs(x[i])) * unit, first + i
        bit = np.uint8(0x80 >> (at & 7))
        if size >= mean:
            above += size
            count += 1
            highs[at >> 3] |= bit
        else:
            below += size
        if x[i] >= 0:
            signs[at >> 3] |= bit
    levels[0] = min(below / (x.size - count) / unit, largest) if count < x.size else 0.0
    levels[1] = min(above / count / unit, largest) if count else 0.0
    return finite


@jit
def _add(levels, signs, highs, first, factor, out):
    low, high = factor * levels[0], factor * levels[1]
    for i in range(out.size):
        at = first + i
        bit = np.uint8(0x80 >> (at & 7))
        value = high if highs[at >> 3] & bit else low
        out[i] += value if signs[at >> 3] & bit else -value


@jit
def add_levels(levels: Vector, signs: NDArray[np.uint8], highs: NDArray[np.uint8], block: int, factor: np.floating,
               out: Vector) -> None:
    """Add ``factor * decoded`` to `out`, the inverse of :func:`encode_levels`."""
    for low in range(0, out.size, block):
        j = low // block
        _add(levels[2 * j : 2 * j + 2], signs, highs, low, factor, out[low : min(low + block, out.size)])
