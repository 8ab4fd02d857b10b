"""Vectors that hurt, for property tests."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = (np.float32, np.float64)


def vectors(dtype, *, finite: bool = True, least: int = 0, most: int = 200, largest: float | None = None):
    """Vectors with ties, zeros, -0.0, subnormals and numbers up to `largest`; NaN and Inf when not `finite`."""
    info = np.finfo(dtype)
    tiny = float(info.smallest_subnormal)
    special = [0.0, -0.0, tiny, -tiny, 3 * tiny, float(info.tiny), 1.0, -1.0, 1.0, 2.0, -2.0, 1e-3]
    if not finite:
        special += [np.nan, np.inf, -np.inf]
    if largest is None:
        largest = float(info.max) / 2**12  # so that sums of a few vectors stay finite where tests take them
    else:
        special += [largest, -largest, largest]
    width = np.dtype(dtype).itemsize * 8
    numbers = st.floats(-largest, largest, width=width, allow_nan=False)
    normal = st.floats(-4.0, 4.0, width=width)
    elements = st.one_of(normal, st.sampled_from(special), numbers)
    sizes = st.one_of(st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65]), st.integers(0, most)).filter(lambda d: d >= least)
    return sizes.flatmap(lambda d: hnp.arrays(dtype, d, elements=elements))


def gaussian(rank: int, d: int, dtype=np.float32, *, step: int = 0) -> np.ndarray:
    """A vector that differs from rank to rank and step to step."""
    return np.random.default_rng((rank, step, d)).normal(size=d).astype(dtype)
