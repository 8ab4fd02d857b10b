"""One bit per entry and one scale per block: the scaled sign compressor."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit

__all__ = ["add_signs", "encode_signs"]


@jit
def encode_signs(x: NDArray[np.floating], block: int, bits: NDArray[np.uint8], scales: NDArray[np.floating]) -> None:
    """Write the signs of `x` into `bits` and the mean magnitude of each block into `scales`.

    Parameters
    ----------
    x : (d,) float32 or float64
    block : int, entries that share a scale; the last block may be shorter
    bits : (ceil(d / 8),) uint8, overwritten; entry i is bit ``7 - i % 8`` of byte ``i // 8`` (the order of np.packbits),
        set when ``x[i] >= 0``, so that 0.0, -0.0 count as positive and NaN as negative; bits beyond d are 0
    scales : (ceil(d / block),) of the dtype of `x`, overwritten; sums are taken in float64 in index order
    """
    for j in range(scales.size):
        start, stop = j * block, min((j + 1) * block, x.size)
        total = 0.0
        for i in range(start, stop):
            total += np.float64(abs(x[i]))
        if np.isinf(total):  # float64 only: the mean exists although the sum does not
            total, largest = 0.0, 0.0
            for i in range(start, stop):
                total += np.float64(abs(x[i])) / (stop - start)
                largest = max(largest, np.float64(abs(x[i])))
            scales[j] = min(total, largest)
        else:
            scales[j] = total / (stop - start)
    for b in range(bits.size):
        byte = np.int64(0)
        for i in range(8 * b, min(8 * b + 8, x.size)):
            byte |= np.int64(x[i] >= 0) << (7 - (i & 7))
        bits[b] = byte


@jit
def add_signs(
    bits: NDArray[np.uint8], scales: NDArray[np.floating], block: int, factor: np.floating, out: NDArray[np.floating]
) -> None:
    """Add the decoded messages of `m` ranks to `out`, each times `factor`, in row order and in one pass over `out`.

    Parameters
    ----------
    bits : (m, ceil(d / 8)) uint8, as :func:`encode_signs` wrote them
    scales : (m, ceil(d / block)) of the dtype of `out`
    block : int, entries that share a scale
    factor : scalar of the dtype of `out`
    out : (d,) float32 or float64; ``out[i] += +-(factor * scales[r, i // block])`` for r = 0, 1, ..., updated
    """
    for j in range(scales.shape[1]):
        for i in range(j * block, min((j + 1) * block, out.size)):
            total = out[i]
            for r in range(scales.shape[0]):
                step = factor * scales[r, j]
                total = total + step if (bits[r, i >> 3] >> (7 - (i & 7))) & 1 else total - step
            out[i] = total
