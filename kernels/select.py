"""Exact selection of the entries of largest magnitude."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit

__all__ = ["select_largest"]


def select_largest(x: NDArray[np.floating], indices: NDArray[np.int64]) -> None:
    """Write the ascending indices of the ``k = indices.size`` entries of largest magnitude into `indices`.

    Parameters
    ----------
    x : (d,) float32 or float64, contiguous
    indices : (k,) int64, overwritten; k <= d

    Notes
    -----
    Among equal magnitudes the lowest index comes first; -0.0 and 0.0 are equal. NaN counts as larger than Inf, and Inf
    as larger than every number, so a broken gradient is sent, never hidden.

    Without its sign bit a float orders like an integer. A radix search over 11-bit digits finds the k-th largest
    integer, and one more pass collects: 4 passes over float32, 7 over float64, whatever the values are.
    """
    words = x.view(np.uint32 if x.dtype == np.float32 else np.uint64)
    if indices.size:
        _select(words, 8 * x.itemsize - 1, indices)


@jit
def _select(words, magnitude_bits, indices):  # type: ignore[no-untyped-def]
    one = np.uint64(1)
    mask = (one << np.uint64(magnitude_bits)) - one
    counts = np.empty(2048, np.int64)
    threshold = np.uint64(0)
    ties = indices.size  # how many entries equal to the threshold are kept
    high = magnitude_bits
    while high > 0:
        low = max(high - 11, 0)
        above, below = np.uint64(high), np.uint64(low)
        digit_mask = (one << np.uint64(high - low)) - one
        counts[:] = 0
        for i in range(words.size):
            key = np.uint64(words[i]) & mask
            if key >> above == threshold >> above:
                counts[(key >> below) & digit_mask] += 1
        digit = np.int64(digit_mask)
        while counts[digit] < ties:
            ties -= counts[digit]
            digit -= 1
        threshold |= np.uint64(digit) << below
        high = low
    kept = 0
    for i in range(words.size):
        key = np.uint64(words[i]) & mask
        if key > threshold or (key == threshold and ties > 0):
            if key == threshold:
                ties -= 1
            indices[kept] = i
            kept += 1
