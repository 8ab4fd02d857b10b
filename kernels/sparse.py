"""Adding sparse and dense messages to a vector."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit

__all__ = ["add_dense", "add_sparse"]


@jit
def add_sparse(
    indices: NDArray[np.int64], values: NDArray[np.floating], factor: np.floating, out: NDArray[np.floating]
) -> None:
    """Add ``factor * values`` to `out` at `indices`.

    Parameters
    ----------
    indices : (k,) int64, all different, each in [0, d)
    values : (k,) of the dtype of `out`
    factor : scalar of the dtype of `out`
    out : (d,) float32 or float64, updated in k places
    """
    for j in range(indices.size):
        out[indices[j]] += factor * values[j]


@jit
def add_dense(values: NDArray[np.floating], factor: np.floating, out: NDArray[np.floating]) -> None:
    """Add ``factor * values`` to `out`, the product rounded before the sum.

    Parameters
    ----------
    values : (d,) of the dtype of `out`
    factor : scalar of the dtype of `out`
    out : (d,) float32 or float64, updated
    """
    for i in range(out.size):
        out[i] += factor * values[i]
