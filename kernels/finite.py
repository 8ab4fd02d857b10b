"""Seeing NaN and Inf."""

import numpy as np

from ._jit import jit
from ._vector import Vector

__all__ = ["all_finite"]


def all_finite(x: Vector) -> bool:
    """Tell whether no entry of `x` is NaN or Inf.

    One pass over `x`: an exponent of all ones marks NaN and Inf, so the test is integer arithmetic and vectorises.
    """
    if x.dtype == np.float32:
        return bool(_no_word_has_all(x.view(np.uint32), np.uint32(0x7F800000)))
    return bool(_no_word_has_all(x.view(np.uint64), np.uint64(0x7FF0000000000000)))


@jit
def _no_word_has_all(words, mask):
    seen = 0
    for i in range(words.size):
        seen |= (words[i] & mask) == mask
    return seen == 0
