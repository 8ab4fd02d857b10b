"""Numbers that tell vectors apart, which any processor can form in any order."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._vector import Vector

__all__ = ["fingerprints"]


def fingerprints(x: Vector, starts: NDArray[np.int64], out: NDArray[np.uint64]) -> None:
    """Write a number for every layer of `x` that depends on all bits of its entries and on their order.

    Parameters
    ----------
    starts : (layers + 1,) int64, ascending, where layers begin in `x`, and where the last one ends
    out : (layers,) uint64, overwritten: the sum, modulo 2^64, of SplitMix64's last steps of word j of the layer plus j + 1
        times its constant; words are 32 bits
    """
    words = 1 if x.itemsize == 4 else 2
    _fingerprints(x.view(np.uint32), starts, words, out)


@jit
def _fingerprints(x, starts, words, out):
    golden = np.uint64(0x9E3779B97F4A7C15)
    for p in range(out.size):
        total, state = np.uint64(0), np.uint64(0)
        for i in range(words * starts[p], words * starts[p + 1]):
            state += golden
            word = np.uint64(x[i]) + state
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            total += word ^ (word >> np.uint64(31))
        out[p] = total
