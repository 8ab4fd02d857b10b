"""Vectors that differ from rank to rank, and vectors that hurt."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mpi_ef.compress.combination import Vector

__all__ = ["gaussian", "hard"]


def gaussian(rank: int, d: int, dtype: Any = np.float32, *, step: int = 0) -> Vector:
    """Return a vector, (d,), that differs from rank to rank and from step to step."""
    return np.random.default_rng((rank, step, d)).normal(size=d).astype(dtype)


def hard(d: int, dtype: Any) -> Iterator[Vector]:
    """Yield vectors with ties, zeros, -0.0, subnormals, one large entry, and numbers of all sizes."""
    info = np.finfo(dtype)
    yield np.zeros(d, dtype)
    yield np.ones(d, dtype)
    yield gaussian(0, d, dtype)
    yield np.where(np.arange(d) % 3 == 0, gaussian(1, d, dtype), dtype(-0.0))
    yield np.full(d, info.smallest_subnormal, dtype) * (1 - 2 * (np.arange(d) % 2)).astype(dtype)
    spike = np.full(d, 1e-3, dtype)
    spike[d // 2 : d // 2 + 1] = 1e4
    yield spike
    yield (gaussian(2, d, np.float64) * 10.0 ** np.random.default_rng(d).integers(-12, 12, d)).astype(dtype)
