"""Arrays in the memory of a device: what codecs, plans and rules ask of NumPy's, over torch tensors."""

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import DTypeLike

from . import bus

__all__ = ["DeviceArray", "torch_dtype"]

_TORCH: dict[Any, torch.dtype] = {
    np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64, np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int8): torch.int8, np.dtype(np.int16): torch.int16, np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64, np.dtype(np.bool_): torch.bool,
    np.dtype(np.uint64): torch.int64,  # words of bits
}
_NUMPY = {theirs: ours for ours, theirs in _TORCH.items() if ours != np.dtype(np.uint64)}


def torch_dtype(dtype: DTypeLike) -> torch.dtype:
    """Return the dtype of a tensor that holds such entries; words of bits are int64 there."""
    return _TORCH[np.dtype(dtype)]


class _Flags:
    """What NumPy says of the memory of an array."""

    def __init__(self, tensor: torch.Tensor, writeable: bool) -> None:
        self._tensor, self.writeable = tensor, writeable

    @property
    def c_contiguous(self) -> bool:
        return self._tensor.is_contiguous()


class DeviceArray:
    """A torch tensor that can be indexed, viewed, filled and computed with as a NumPy array.

    Not a NumPy array: what it computes is computed on its device, in order with what torch does there. What it cannot do,
    functions of NumPy for example, raises `TypeError`; nothing goes to the host but by :meth:`numpy` and :meth:`tolist`.

    Attributes
    ----------
    tensor : torch.Tensor
        The same memory.
    """

    __slots__ = ("flags", "tensor")
    __array_ufunc__ = None  # NumPy arrays leave arithmetic to this class

    def __init__(self, tensor: torch.Tensor, *, writeable: bool = True) -> None:
        self.tensor, self.flags = tensor, _Flags(tensor, writeable)

    @property
    def dtype(self) -> "np.dtype[Any]":
        """NumPy's dtype of the entries."""
        return _NUMPY[self.tensor.dtype]

    @property
    def device(self) -> str:
        """What :func:`mpi_ef.kernels.backend.backend` calls the device."""
        return "side:cpu" if self.tensor.device.type == "cpu" else str(self.tensor.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        return tuple(self.tensor.shape)

    @property
    def T(self) -> "DeviceArray":  # noqa: N802
        """The transposed matrix, over the same memory."""
        return DeviceArray(self.tensor.T)

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.tensor.numel()

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.tensor.dim()

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return self.tensor.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.size * self.itemsize

    def __len__(self) -> int:
        return len(self.tensor)

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype}, on {self.tensor.device})"

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(f"{self!r} is not in the memory of the host; take its numpy()")

    def __iter__(self) -> Any:
        return map(DeviceArray, self.tensor)

    def __getitem__(self, where: Any) -> "DeviceArray":
        return DeviceArray(self.tensor[_tensor(where)], writeable=self.flags.writeable)

    def __setitem__(self, where: Any, value: Any) -> None:
        place = self.tensor[_tensor(where)]
        if isinstance(value, DeviceArray | torch.Tensor):
            place.copy_(_tensor(value), non_blocking=True)
        elif np.ndim(value) == 0:
            place.fill_(value.item() if isinstance(value, np.generic | np.ndarray) else value)
        else:
            bus.to_device(np.ascontiguousarray(value), place)

    def view(self, dtype: DTypeLike | None = None) -> "DeviceArray":
        """Return another array over the same memory, of another `dtype` if one is named."""
        kind = self.tensor.dtype if dtype is None else torch_dtype(dtype)
        if self.size or kind == self.tensor.dtype:
            return DeviceArray(self.tensor.view(kind), writeable=self.flags.writeable)
        last = self.shape[-1] * self.itemsize // np.dtype(dtype).itemsize
        return DeviceArray(self.tensor.new_empty((*self.shape[:-1], last), dtype=kind))

    def reshape(self, *shape: Any) -> "DeviceArray":
        """Return the same entries in another shape, over the same memory."""
        return DeviceArray(self.tensor.view(*shape), writeable=self.flags.writeable)

    def fill(self, value: Any) -> None:
        """Set all entries."""
        self.tensor.fill_(value)

    def copy(self) -> "DeviceArray":
        """Return an array with memory of its own."""
        return DeviceArray(self.tensor.clone())

    def numpy(self) -> np.ndarray:
        """Return a copy in the memory of the host, once the device is done with it."""
        return bus.on_host(self.tensor)

    def tolist(self) -> Any:
        """Return the entries as Python numbers, once the device is done with them."""
        return bus.on_host(self.tensor).tolist()

    def __add__(self, other: Any) -> "DeviceArray":
        return self._computed(torch.add, other)

    def __sub__(self, other: Any) -> "DeviceArray":
        return self._computed(torch.sub, other)

    def __mul__(self, other: Any) -> "DeviceArray":
        return self._computed(torch.mul, other)

    __rmul__ = __mul__
    __radd__ = __add__

    def __truediv__(self, other: Any) -> "DeviceArray":
        if isinstance(other, int | float | np.number) and self.tensor.is_floating_point():
            # torch multiplies tensors of a GPU by the reciprocal of a number of the host
            other = DeviceArray(self.tensor.new_full((), float(other)))
        return self._computed(torch.div, other)

    def __iadd__(self, other: Any) -> Self:
        return self._update(torch.add, other)

    def __isub__(self, other: Any) -> Self:
        return self._update(torch.sub, other)

    def __imul__(self, other: Any) -> Self:
        return self._update(torch.mul, other)

    def __ixor__(self, other: Any) -> Self:
        return self._update(torch.bitwise_xor, other)

    def __iand__(self, other: Any) -> Self:
        return self._update(torch.bitwise_and, other)

    def _computed(self, operation: Any, other: Any) -> Any:
        if not isinstance(other, DeviceArray | int | float | np.number):
            return NotImplemented
        return DeviceArray(operation(self.tensor, _number(other)))

    def _update(self, operation: Any, other: Any) -> Any:
        if not isinstance(other, DeviceArray | int | float | np.number):
            return NotImplemented
        operation(self.tensor, _number(other), out=self.tensor)
        return self


def _tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_tensor, value))
    return value.tensor if isinstance(value, DeviceArray) else value


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.number) else _tensor(value)
