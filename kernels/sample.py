"""A random subset that sender and receiver compute from the same key."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._vector import trailing_zeros

__all__ = ["sample_indices"]


def sample_indices(seed: int, step: int, rank: int, d: int, indices: NDArray[np.int64],
                   bitmap: NDArray[np.uint64]) -> None:
    """Write ``k = indices.size`` different indices below `d`, uniformly drawn from the key (seed, step, rank).

    Parameters
    ----------
    seed, step, rank : int, non-negative; together they fix the subset on every machine and version
    indices : (k,) int64, overwritten, ascending; k <= d
    bitmap : (ceil(d / 64),) uint64 scratch

    Notes
    -----
    R. Floyd's algorithm (J. Bentley, "Programming pearls: a sample of brilliance", CACM 30, 1987) with the SplitMix64
    generator: k draws, one bitmap of d bits, no global random state.
    """
    _sample(np.uint64(seed), np.uint64(step), np.uint64(rank), d, indices, bitmap)


@jit
def _mix(word):
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@jit
def _sample(seed, step, rank, d, indices, taken):
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = _mix(_mix(_mix(seed + golden) + step + golden) + rank + golden)
    taken[:] = 0
    one = np.uint64(1)
    for last in range(d - indices.size, d):
        state += golden
        drawn = np.int64(_mix(state) % np.uint64(last + 1))
        if (taken[drawn >> 6] >> np.uint64(drawn & 63)) & one:
            drawn = np.int64(last)
        taken[drawn >> 6] |= one << np.uint64(drawn & 63)
    kept = 0
    for place in range(taken.size):
        word = taken[place]
        while word:
            indices[kept] = (place << 6) + np.int64(trailing_zeros(word))
            kept += 1
            word &= word - one
