"""The kernels for vectors of one dtype on one device, with scratch memory of their own.

Codecs, plans and rules ask for one, ``backend(dtype)``, and pass no scratch; a device has a class with the same methods.
"""

# ruff: noqa: D102 (the methods of Backend are described by the functions of the same names)

import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef import kernels

__all__ = ["Backend", "backend"]

Vector = NDArray[Any]
_SCRATCH = max(kernels.COMBINE_SCRATCH, kernels.QUANTIZE_SCRATCH, kernels.SELECT_SCRATCH, kernels.SIGNS_SCRATCH)
_HISTOGRAM = 2048


class _Memory(threading.local):
    """Scratch memory of a thread: hooks of autograd and ranks that are threads call kernels at the same time."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.scratch, self.histogram = np.empty(_SCRATCH, dtype), np.empty(_HISTOGRAM, np.int64)


class Backend:
    """Kernels on the CPU. Arguments are those of the functions of the same names, but for scratch; factors may be floats.

    Functions without scratch are there as well, under their own names.

    Parameters
    ----------
    dtype : numpy dtype
        float32 or float64.
    """

    device = "cpu"

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._memory = _Memory(self.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(kernels, name)

    def combine(self, terms: Any, factors: Vector, out: Vector) -> bool:
        return bool(kernels.combine(terms, factors, out, self._memory.scratch))

    def select_largest(self, *arguments: Any) -> bool:
        return bool(kernels.select_largest(*arguments, self._memory.scratch, self._memory.histogram))

    def quantize(self, *arguments: Any) -> bool:
        kernel: Any = kernels.quantize
        return bool(kernel(*arguments, self._memory.scratch))

    def encode_signs(self, *arguments: Any) -> bool:
        return bool(kernels.encode_signs(*arguments, self._memory.scratch))

    def add_quantized(self, exponents: Vector, codes: Vector, form: str, block: int, factor: float, overwrite: bool,
                      out: Vector) -> None:
        real = self.dtype.type(factor)
        kernels.add_quantized(exponents, codes, form, block, real, overwrite, out, self._memory.scratch)

    def add_signs(self, bits: Vector, scales: Vector, block: int, factor: float, overwrite: bool, out: Vector) -> None:
        kernels.add_signs(bits, scales, block, self.dtype.type(factor), overwrite, out, self._memory.scratch)

    def add_low_rank(self, left: Vector, right: Vector, parts: Vector, rank: int, factor: float, overwrite: bool,
                     out: Vector) -> None:
        real = self.dtype.type(factor)
        kernels.add_low_rank(left, right, parts, rank, real, overwrite, out, self._memory.scratch)

    def add_dense(self, values: Vector, factor: float, out: Vector) -> None:
        kernels.add_dense(values, self.dtype.type(factor), out)

    def add_sparse(self, indices: Vector, values: Vector, factor: float, out: Vector) -> None:
        kernels.add_sparse(indices, values, self.dtype.type(factor), out)


@cache
def backend(dtype: DTypeLike, device: str = "cpu") -> Backend:
    """Return the kernels for vectors of `dtype` on `device`. Local; may be used by several threads at once.

    Raises
    ------
    ValueError
        There are none for that device.
    """
    if device != Backend.device:
        raise ValueError(f"backend: there are no kernels for {device!r}; take 'cpu'")
    return Backend(dtype)
