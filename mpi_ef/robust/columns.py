"""What is sorted entry by entry: comparators for any number of rows."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["network"]


@cache
def network(m: int) -> NDArray[np.int64]:
    """Return comparators, (p, 2) int64, that sort m numbers: the lesser of each pair goes to its first place. Read only.

    Batcher's odd-even merge sort (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M).
    """
    pairs, p = [], 1
    while p < m:
        k = p
        while k >= 1:
            pairs += [(i + j, i + j + k) for j in range(k % p, m - k, 2 * k) for i in range(min(k, m - j - k))
                      if (i + j) // (2 * p) == (i + j + k) // (2 * p)]
            k //= 2
        p *= 2
    comparators = np.array(pairs, np.int64).reshape(-1, 2)
    comparators.flags.writeable = False
    return comparators
