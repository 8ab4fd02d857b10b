"""The kernels for vectors of one dtype on one device, with scratch memory of their own.

Codecs, plans and rules ask for one, ``backend(dtype, device)``, for kernels and for memory, and pass no scratch. That of a
device, :class:`mpi_ef.kernels.device.backend.DeviceBackend`, has the same methods, for arrays in its memory.
"""

# ruff: noqa: D102 (the methods of Backend are described by the functions of the same names)

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef import kernels

__all__ = ["Backend", "Verdict", "aligned_zeros", "backend", "backend_of", "borrowed", "on_device_side", "side_of",
           "written_in"]

Vector = NDArray[Any]
_SCRATCH = max(kernels.COMBINE_SCRATCH, kernels.LEVELS_SCRATCH, kernels.QUANTIZE_SCRATCH, kernels.SELECT_SCRATCH,
               kernels.SIGNS_SCRATCH)
_HISTOGRAM = 2048
_LINE = 64  # bytes


def aligned_zeros(shape: int | tuple[int, ...], dtype: DTypeLike) -> Vector:
    """Return an array of zeros that begins where a cache line does, so that kernels can write past the caches."""
    size = int(np.prod(shape))
    memory = np.zeros(size + _LINE // np.dtype(dtype).itemsize, dtype)
    first = -memory.ctypes.data % _LINE // memory.itemsize
    return memory[first : first + size].reshape(shape)


class Verdict:
    """Whether a vector is finite, which a device may not know yet: `bool` of it waits. Combine them with ``&``.

    What the device has done may be in doubt as well, where it guesses and now and then guesses wrong: then `bool` calls
    `again`, which does it in another way, and `repaired` tells so.

    Parameters
    ----------
    ask : callable
        Returns the answer, or None where it is in doubt.
    send : callable, optional
        Lets the device send what it has to say, and does not wait: whoever asks later waits for that alone.
    """

    def __init__(self, ask: "Callable[[], bool | None]", again: "Callable[[], Any] | None" = None,
                 send: "Callable[[], None] | None" = None) -> None:
        self.ask, self.again = ask, again
        self.repaired = False
        self._send = send

    def send(self) -> None:
        """Let the device send what it has to say. Local, does not wait."""
        if self._send is not None:
            self._send()

    def __and__(self, other: "Verdict | bool") -> "Verdict | bool":
        if isinstance(other, Verdict):
            return _Both(self, other)
        return self if other else False

    __rand__ = __and__

    def __bool__(self) -> bool:
        answer = self.ask()
        if answer is None:
            assert self.again is not None  # noqa: S101
            self.repaired, answer = True, bool(self.again())
        return answer


class _Both(Verdict):
    """Of two things that were done: each is repaired by itself."""

    def __init__(self, one: Verdict, other: Verdict) -> None:
        def ask() -> bool | None:
            answers = one.ask(), other.ask()
            return None if None in answers else all(answers)

        def send() -> None:
            one.send()
            other.send()

        super().__init__(ask, send=send)
        self._two = one, other

    def __bool__(self) -> bool:
        answers = [bool(one) for one in self._two]
        self.repaired = any(one.repaired for one in self._two)
        return all(answers)


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
        kernel = getattr(kernels, name)
        setattr(self, name, kernel)  # found at once the next time
        return kernel

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike | None = None) -> Vector:
        """Return an array of any content, of the vectors' dtype unless another one is named."""
        return np.empty(shape, self.dtype if dtype is None else dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike | None = None) -> Vector:
        """Return an array of zeros that begins where a cache line does."""
        return aligned_zeros(shape, self.dtype if dtype is None else dtype)

    def on_host(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Vector:
        """Return an array of zeros that MPI may read and write."""
        return aligned_zeros(shape, dtype)

    def finite(self, vectors: Sequence[Vector]) -> bool:
        """Tell whether all entries of several vectors are finite."""
        return all(map(kernels.all_finite, vectors))

    def fetch(self, x: Vector) -> Vector:
        """Return `x` as an array of the host: itself."""
        return x

    def place(self, x: Vector) -> Vector:
        """Return an array of the host where vectors are: itself."""
        return x

    def vector(self, tensor: Any) -> Vector:
        """Return the entries of a contiguous tensor, (...), as a vector of these kernels, (d,). Not a copy."""
        vector: Vector = tensor.detach().view(-1).numpy()
        return vector

    def array(self, x: Any) -> Any:
        """Return `x`, or the array over the memory of a tensor on the device."""
        return x

    def overlap(self, x: Vector, other: Vector) -> bool:
        """Tell whether two arrays may share memory."""
        return bool(np.may_share_memory(x, other))

    def checked(self, finite: bool, again: Callable[[], bool]) -> bool:  # noqa: ARG002
        """Return what an encode has said; where that is in doubt, it is done `again`, exactly."""
        return finite

    def norm(self, x: Vector) -> float:
        """Return the Euclidean norm of `x`, the same number on every processor and device."""
        norms = np.empty(1)
        kernels.layer_norms(x, np.array([0, x.size]), norms)
        return float(norms[0])

    def nonzero(self, x: Vector) -> NDArray[np.bool_]:
        """Return which entries are not zero, on the host."""
        return x != 0

    def stirs(self, x: Vector, where: NDArray[np.bool_]) -> bool:
        """Tell whether one of these entries is not zero; `where` is in the same memory."""
        return bool(((x != 0) & where).any())

    def silence(self, x: Vector, where: NDArray[np.bool_]) -> None:
        """Set entries to zero; `where` is in the same memory."""
        np.copyto(x, 0, where=where)

    def concatenate(self, parts: Sequence[Vector]) -> Vector:
        """Return one vector of several."""
        return np.concatenate(parts)

    def difference(self, x: Vector, y: Vector) -> int | None:
        """Return the first entry of which two vectors have other bits; None where there is none."""
        different = x.view(f"u{x.itemsize}") != y.view(f"u{y.itemsize}")
        return int(different.argmax()) if different.any() else None

    def any(self, x: Vector) -> bool:
        """Tell whether an entry is not zero."""
        return bool(x.any())

    def multiply(self, left: Vector, right: Vector, out: Vector) -> None:
        """Write the product of two matrices to `out`; Inf and NaN are no matter here."""
        with np.errstate(all="ignore"):
            np.matmul(left, right, out=out)

    def sample_indices(self, seed: int, key: Vector, d: int, indices: Vector, bitmap: Vector) -> None:
        """Draw with the key (seed, step, rank), of which `key`, (2,) uint64, has the last two."""
        step, rank = key.tolist()
        kernels.sample_indices(seed, step, rank, d, indices, bitmap)

    def combine(self, terms: Any, factors: Vector, out: Vector) -> bool:
        return bool(kernels.combine(terms, factors, out, self._memory.scratch))

    def select_largest(self, *arguments: Any) -> bool:
        return bool(kernels.select_largest(*arguments, self._memory.scratch, self._memory.histogram))

    def quantize(self, *arguments: Any) -> bool:
        kernel: Any = kernels.quantize
        return bool(kernel(*arguments, self._memory.scratch))

    def encode_signs(self, *arguments: Any) -> bool:
        return bool(kernels.encode_signs(*arguments, self._memory.scratch))

    def encode_levels(self, *arguments: Any) -> bool:
        return bool(kernels.encode_levels(*arguments, self._memory.scratch))

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

    def write_messages(self, *arguments: Any) -> bool:
        return bool(kernels.write_messages(*arguments, self._memory.scratch))

    def read_values(self, *arguments: Any) -> None:
        kernels.read_values(*arguments, self._memory.scratch)

    def add_messages(self, layout: Vector, headroom: int, block: int, memory: Vector, places: Vector, factor: float,
                     out: Vector, indices: Vector, values: Vector) -> None:
        real = self.dtype.type(factor)
        kernels.add_messages(layout, headroom, block, memory, places, real, out, indices, values, self._memory.scratch)

    def mean_slice(self, rows: Vector, start: int, factor: float, out: Vector) -> None:
        kernels.mean_slice(rows, start, self.dtype.type(factor), out)

    def add_dense(self, values: Vector, factor: float, out: Vector) -> None:
        kernels.add_dense(values, self.dtype.type(factor), out)

    def add_sparse(self, indices: Vector, values: Vector, factor: float, out: Vector) -> None:
        kernels.add_sparse(indices, values, self.dtype.type(factor), out)


def backend_of(x: Any) -> Any:
    """Return the kernels for vectors such as `x`. Local."""
    return backend(x.dtype, "cpu" if isinstance(x, np.ndarray) else x.device)


_cpu_side = ["cpu"]


def side_of(kind: str, index: int | None = None) -> str:
    """Return what :func:`backend` calls the place of a tensor: `kind` is the type of its torch device."""
    return _cpu_side[-1] if kind == "cpu" else kind if index is None else f"{kind}:{index}"


@contextmanager
def on_device_side() -> Iterator[None]:
    """Return a context in which tensors of the CPU are taken for those of a device: its code runs without one. For tests."""
    _cpu_side.append("side:cpu")
    try:
        yield
    finally:
        _cpu_side.pop()


@cache
def backend(dtype: DTypeLike, device: str = "cpu") -> Any:
    """Return the kernels for vectors of `dtype` on `device`, "cpu" or one of torch. Local; threads may share it.

    "side:cpu" is a device in the memory of the host: the code for devices, on tensors of the CPU.
    """
    if device == Backend.device:
        return Backend(dtype)
    return import_module("mpi_ef.kernels.device.chosen").kernels_on(dtype, device)  # which needs torch


def written_in(device: str) -> str:
    """Return what the kernels on a device are written in, and where that is not Triton why. Local."""
    if device == Backend.device:
        return "Numba"
    why: str = import_module("mpi_ef.kernels.device.chosen").why_not_triton_on(device)
    return f"torch ({why})" if why else "Triton"


def borrowed() -> Any:
    """Return what takes arrays that other libraries have on a device. Local."""
    return import_module("mpi_ef.kernels.device.borrowed")
