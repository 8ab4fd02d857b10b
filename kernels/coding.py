"""Elias-Fano coding of ascending indices: a size fixed by (d, k) alone, close to the entropy of a random subset.

An index splits into `l` low bits, stored as they are, and a high part, stored in unary: bit ``j + (index_j >> l)`` of
the upper bitmap is set. Bits fill bytes from the least significant one (little-endian words)::

    index  = 0b 101 0110        l = 4
    lower  :  ... 0110 ...      l bits each, k of them            ceil(k l / 64) words
    upper  :  ..0001001..       a 1 per index, a 0 per bucket     ceil((k + ((d-1) >> l)) / 64) words

P. Elias, "Efficient storage and retrieval by content and address of static files", J. ACM 21 (1974).
"""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit, trailing_zeros

__all__ = ["decode_indices", "encode_indices", "low_bits", "lower_nbytes", "upper_nbytes"]


def lower_nbytes(k: int, low: int) -> int:
    """Return the size in bytes of the low parts of `k` indices with `low` bits each, whole 64-bit words."""
    return 8 * -(-(k * low) // 64)


def upper_nbytes(d: int, k: int, low: int) -> int:
    """Return the size in bytes of the unary bitmap of `k` indices below `d`, whole 64-bit words."""
    return 8 * -(-(k + (max(d, 1) - 1 >> low)) // 64) if k else 0


def low_bits(d: int, k: int) -> int:
    """Return the number of low bits that makes the code of `k` indices below `d` smallest."""
    return min(range(max(d, 1).bit_length()), key=lambda low: lower_nbytes(k, low) + upper_nbytes(d, k, low))


@jit
def encode_indices(indices: NDArray[np.int64], low: int, lower: NDArray[np.uint64], upper: NDArray[np.uint64]) -> None:
    """Write the Elias-Fano code of `indices` into `lower` and `upper`.

    Parameters
    ----------
    indices : (k,) int64, ascending, all different
    low : int, number of low bits l
    lower : (lower_nbytes(k, l) / 8,) uint64, overwritten
    upper : (upper_nbytes(d, k, l) / 8,) uint64, overwritten
    """
    lower[:] = np.uint64(0)
    upper[:] = np.uint64(0)
    one = np.uint64(1)
    mask = (one << np.uint64(low)) - one
    for j in range(indices.size):
        high = j + (indices[j] >> low)
        upper[high >> 6] |= one << np.uint64(high & 63)
        if low:
            part = np.uint64(indices[j]) & mask
            bit = j * low
            lower[bit >> 6] |= part << np.uint64(bit & 63)
            if (bit & 63) + low > 64:
                lower[(bit >> 6) + 1] |= part >> np.uint64(64 - (bit & 63))


@jit
def decode_indices(lower: NDArray[np.uint64], upper: NDArray[np.uint64], low: int, indices: NDArray[np.int64]) -> None:
    """Write the indices coded in `lower` and `upper` into `indices`, the inverse of :func:`encode_indices`.

    Parameters
    ----------
    lower, upper : uint64 words of the code
    low : int, number of low bits l
    indices : (k,) int64, overwritten
    """
    one = np.uint64(1)
    mask = (one << np.uint64(low)) - one
    j = 0
    for word_index in range(upper.size):
        word = upper[word_index]
        while word and j < indices.size:
            high = (word_index << 6) + np.int64(trailing_zeros(word)) - j
            word &= word - one
            part = np.uint64(0)
            if low:
                bit = j * low
                part = lower[bit >> 6] >> np.uint64(bit & 63)
                if (bit & 63) + low > 64:
                    part |= lower[(bit >> 6) + 1] << np.uint64(64 - (bit & 63))
            indices[j] = (high << low) | np.int64(part & mask)
            j += 1
