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

from ._jit import jit
from ._vector import load_word, population, trailing_zeros

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
    """Write the code of `indices`, with l = `low`, into `lower` and `upper`, words of uint64 that are overwritten."""
    upper[:] = np.uint64(0)
    one = np.uint64(1)
    mask = (one << np.uint64(low)) - one
    word, filled, place = np.uint64(0), np.uint64(0), 0  # the word of low parts that is being filled
    marks, at = np.uint64(0), 0  # the word of the bitmap
    width = np.uint64(low)
    for j in range(indices.size):
        high = j + (indices[j] >> low)
        if high >> 6 != at:
            upper[at] = marks
            marks, at = np.uint64(0), high >> 6
        marks |= one << np.uint64(high & 63)
        if low:
            part = np.uint64(indices[j]) & mask
            word |= part << filled
            filled += width
            if filled >= np.uint64(64):
                lower[place] = word
                place += 1
                filled -= np.uint64(64)
                word = part >> (width - filled) if filled else np.uint64(0)
    if indices.size:
        upper[at] = marks
    if filled:
        lower[place] = word


@jit
def decode_indices(lower: NDArray[np.uint64], upper: NDArray[np.uint64], low: int, d: int,
                   indices: NDArray[np.int64]) -> None:
    """Write the indices below `d` coded in `lower` and `upper` into `indices`, the inverse of :func:`encode_indices`.

    Any bits give indices that ascend and are below `d`, the same on all ranks: index j is at least one more than the
    one before and at most ``d - k + j``, also where a bit is missing; bits after the k-th are not read.
    """
    one = np.uint64(1)
    mask = (one << np.uint64(low)) - one
    last_byte = 8 * (lower.size - 1)
    j, bit = 0, 0
    for word_index in range(upper.size):
        word = upper[word_index]
        for _ in range(min(int(population(word)), indices.size - j)):
            high = (word_index << 6) + np.int64(trailing_zeros(word)) - j
            word &= word - one
            if low > 57:  # 64 bits that begin at a byte may not hold a part
                part = lower[bit >> 6] >> np.uint64(bit & 63)
                if (bit & 63) + low > 64:
                    part |= lower[(bit >> 6) + 1] << np.uint64(64 - (bit & 63))
                indices[j] = (high << low) | np.int64(part & mask)
            elif low:
                byte = min(bit >> 3, last_byte)
                part = load_word(lower, byte) >> np.uint64(bit - 8 * byte)
                indices[j] = (high << low) | np.int64(part & mask)
            else:
                indices[j] = high
            j += 1
            bit += low
    indices[j:] = 0
    _settle(indices, d)


@jit
def _settle(indices, d):
    """Make indices ascend, below `d`, where they do not."""
    descends = np.int64(0)
    for j in range(1, indices.size):
        descends |= indices[j] - indices[j - 1] - 1
    if descends < 0 or (indices.size and indices[-1] >= d):
        least, most = np.int64(0), d - indices.size  # of an index less its number
        for j in range(indices.size):
            least = max(least, min(most, indices[j] - j))
            indices[j] = least + j
