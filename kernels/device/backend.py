"""The kernels for vectors on a device: what :class:`mpi_ef.kernels.backend.Backend` is on the CPU, with device arrays."""

# ruff: noqa: D102 (the methods are described by the functions of the same names)

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from mpi_ef.kernels.backend import Verdict

from . import bus, plain, plain_optim
from .array import DeviceArray, torch_dtype

__all__ = ["DeviceBackend"]


class DeviceBackend:
    """Kernels on a device, in torch operations.

    Arguments are those of the functions of the same names, with device arrays in place of NumPy's, but for what says where
    parts of a vector lie, and without scratch; factors may be floats. What says whether a vector is finite is a
    :class:`Verdict`.

    Parameters
    ----------
    dtype : numpy dtype
        float32 or float64.
    device : str
        Of torch, ``"cuda:0"``; ``"side:cpu"`` works so on tensors of the CPU.
    """

    def __init__(self, dtype: DTypeLike, device: str) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.device = device
        where = torch.device(device.removeprefix("side:"))
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        self.torch_device = where
        self._how = _How()

    def __getattr__(self, name: str) -> Any:
        room = next((room for room in (plain, plain_optim) if name in room.__all__), None)
        if room is None:
            raise AttributeError(f"DeviceBackend has no kernel {name!r}")
        kernel = _over_arrays(getattr(room, name))
        setattr(self, name, kernel)
        return kernel

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike | None = None) -> DeviceArray:
        kind = torch_dtype(self.dtype if dtype is None else dtype)
        return DeviceArray(torch.empty(shape, dtype=kind, device=self.torch_device))

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike | None = None) -> DeviceArray:
        kind = torch_dtype(self.dtype if dtype is None else dtype)
        return DeviceArray(torch.zeros(shape, dtype=kind, device=self.torch_device))

    def on_host(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        return bus.host_array(shape, dtype, self.torch_device)

    def to_host(self, array: DeviceArray, host: np.ndarray) -> None:
        bus.to_host(array.tensor, host)

    def sending(self, array: DeviceArray, host: np.ndarray) -> bus.Arrival:
        arrival = bus.Arrival(array.tensor, host)
        arrival.send()
        return arrival

    def settled(self) -> bus.Arrival:
        return bus.settled(self.torch_device)

    def exchange_now(self, host: np.ndarray, array: DeviceArray, *, to_device: bool) -> None:
        bus.exchange_now(host, array.tensor, to_device=to_device)

    def message(self, array: DeviceArray) -> torch.Tensor:
        return array.tensor

    def to_device(self, host: np.ndarray, array: DeviceArray) -> None:
        bus.to_device(host, array.tensor)

    def finite(self, vectors: Sequence[DeviceArray]) -> bool:
        return not vectors or bool(torch.stack([plain.all_finite(x.tensor) for x in vectors]).all())

    def fetch(self, x: DeviceArray) -> np.ndarray:
        return x.numpy()

    def place(self, x: np.ndarray) -> DeviceArray:
        there = self.empty(x.shape, x.dtype)
        bus.to_device(x, there.tensor)
        return there

    def vector(self, tensor: torch.Tensor) -> DeviceArray:
        return DeviceArray(tensor.detach().view(-1))

    def array(self, x: Any) -> Any:
        return DeviceArray(x.detach()) if isinstance(x, torch.Tensor) and x.device == self.torch_device else x

    def foreign(self, x: Any) -> str:
        """Return what `x` is where it is no array on this device."""
        if not isinstance(x, DeviceArray):
            return f"a {type(x).__name__}"
        return "" if x.tensor.device == self.torch_device else f"on {x.tensor.device}"

    def overlap(self, x: DeviceArray, other: DeviceArray) -> bool:
        if not (isinstance(x, DeviceArray) and isinstance(other, DeviceArray)):
            return False
        starts = [(a.tensor.data_ptr(), a.tensor.data_ptr() + a.nbytes) for a in (x, other)]
        return max(starts[0][0], starts[1][0]) < min(starts[0][1], starts[1][1])

    def nonzero(self, x: DeviceArray) -> np.ndarray:
        return self.fetch(DeviceArray(x.tensor != 0))

    def stirs(self, x: DeviceArray, where: DeviceArray) -> bool:
        return bool(((x.tensor != 0) & where.tensor).any())

    def silence(self, x: DeviceArray, where: DeviceArray) -> None:
        x.tensor.masked_fill_(where.tensor, 0)

    def concatenate(self, parts: Sequence[DeviceArray]) -> DeviceArray:
        return DeviceArray(torch.cat([part.tensor for part in parts]))

    def difference(self, x: DeviceArray, y: DeviceArray) -> int | None:
        bits = torch.int32 if x.itemsize == 4 else torch.int64
        different = x.tensor.view(bits) != y.tensor.view(bits)
        return int(different.to(torch.uint8).argmax()) if bool(different.any()) else None

    def any(self, x: DeviceArray) -> bool:
        return bool(x.tensor.any())

    def multiply(self, left: DeviceArray, right: DeviceArray, out: DeviceArray) -> None:
        torch.matmul(left.tensor, right.tensor, out=out.tensor)

    def norm(self, x: DeviceArray) -> float:
        norms = np.empty(1)
        plain_optim.layer_norms(x.tensor, np.array([0, x.size]), norms)
        return float(norms[0])

    def sample_indices(self, seed: int, key: DeviceArray, d: int, indices: DeviceArray, bitmap: Any) -> None:  # noqa: ARG002
        plain.sample_indices(seed, key.tensor, d, indices.tensor)

    def combine(self, terms: Any, factors: Any, out: Any) -> Verdict:
        return _verdict(plain.combine(_tensors(terms), _floats(factors), out.tensor))

    def gather(self, terms: Any, factors: Any, indices: Any, values: Any) -> None:
        plain.gather(_tensors(terms), _floats(factors), indices.tensor, values.tensor)

    def select_candidates(self, bounds: Any, counts: Any) -> int:  # noqa: ARG002
        return int(counts.sum())  # those that are not selected are elsewhere, during a selection

    def select_largest(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, *rest: Any) -> Verdict:
        return self._encode(plain.select_largest, terms, factors, keep, keep_factors, *rest)

    def quantize(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, *rest: Any) -> Verdict:
        return self._encode(plain.quantize, terms, factors, keep, keep_factors, *rest)

    def encode_signs(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, *rest: Any) -> Verdict:
        return self._encode(plain.encode_signs, terms, factors, keep, keep_factors, *rest)

    def _encode(self, kernel: Callable[..., torch.Tensor], terms: Any, factors: Any, keep: Any, keep_factors: Any,
                *rest: Any) -> Verdict:
        return _verdict(kernel(_tensors(terms), _floats(factors), keep.tensor, _floats(keep_factors), *map(_plain, rest)))

    def checked(self, finite: Verdict, again: Callable[[], Any]) -> Verdict:
        return Verdict(finite.ask, again, finite.send)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Return a context in which nothing is guessed. Of this thread."""
        before, self._how.exact = self._how.exact, True
        try:
            yield
        finally:
            self._how.exact = before


class _How(local):
    exact = False


def _verdict(answer: torch.Tensor) -> Verdict:
    said = bus.Arrival(answer)
    return Verdict(lambda: bool(said.wait()), send=said.send)


def _over_arrays(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def on_arrays(*arguments: Any) -> Any:
        answer = kernel(*map(_plain, arguments))
        return _verdict(answer) if isinstance(answer, torch.Tensor) else answer

    return on_arrays


def _plain(argument: Any) -> Any:
    if isinstance(argument, DeviceArray):
        return argument.tensor
    return argument.item() if isinstance(argument, np.generic) else argument


def _tensors(terms: Any) -> Any:
    return tuple(term.tensor for term in terms)


def _floats(factors: Any) -> tuple[float, float, float]:
    a, b, c = np.asarray(factors).tolist()
    return a, b, c
