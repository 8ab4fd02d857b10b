"""What a call in one line is given: arrays of NumPy, torch or another library, on the host or on a device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mpi_ef.errors import DtypeError, ShapeError, told
from mpi_ef.kernels.backend import backend, borrowed, side_of

from .misfit import masked

__all__ = ["Given", "given"]

_HOST = 1  # kDLCPU
_DTYPES = {"torch.float32": np.float32, "torch.float64": np.float64}
_WANTED = "pass a numpy array, a tensor, or an array on a device with __dlpack__"


class Given(NamedTuple):
    """One-dimensional views of a rank's vector and of what is written to, where that is, and what is returned then."""

    vector: Any
    target: Any
    device: str
    result: Callable[[], Any]


def given(call: str, x: Any, out: Any, rows: tuple[int, ...]) -> Given:
    """Return what `x` and `out`, or a new array for `rows` in front of the shape of `x`, are to the kernels. Local."""
    source = _borrowed(call, "x", x)
    vector, device = _flat(call, "x", source)
    shape = rows + tuple(source.shape)
    if out is None:
        result = np.empty(shape, source.dtype) if isinstance(source, np.ndarray) else source.new_empty(shape)
    else:
        result = _borrowed(call, "out", out)
    target, there = _flat(call, "out", result)
    if there != device:
        raise DtypeError(f"{call}: out is on {there} and x on {device}; pass both on one device")
    if tuple(result.shape) != shape or target.dtype != vector.dtype:
        raise ShapeError(f"{call}: out has shape {tuple(result.shape)} {target.dtype}; it must be {shape} {vector.dtype}")
    if not target.flags.writeable or _immutable(out):
        raise ShapeError(f"{call}: out is read-only; pass an array that can be written")

    def returned() -> Any:
        if out is None:
            return result if source is x else borrowed().handed(result, x)
        if result is not out:
            borrowed().settle(result)
        return out

    return Given(vector, target, device, returned)


def _borrowed(call: str, name: str, array: Any) -> Any:
    """Return an array as it is, or a tensor over one that another library has on a device."""
    known = isinstance(array, np.ndarray) or hasattr(array, "detach")
    if known or not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        return array
    try:
        if int(array.__dlpack_device__()[0]) == _HOST and side_of("cpu") == "cpu":
            return array  # which is refused: numpy has what is needed for it
        return borrowed().tensor_over(array)
    except Exception as error:
        raise DtypeError(f"{call}: {name} is a {type(array).__name__} that torch does not take ({told(error)}); "
                         f"{_WANTED}") from error


def _immutable(out: Any) -> bool:
    """Tell whether a library does not let anyone write to its arrays: that of JAX, whose DLPack tensors do not say so."""
    return type(out).__module__.partition(".")[0] in ("jax", "jaxlib")


def _flat(call: str, name: str, array: Any) -> tuple[Any, str]:
    """Return a contiguous array or tensor as a one-dimensional view, and what `backend` calls the place of it."""
    if not isinstance(array, np.ndarray):
        if not hasattr(array, "detach"):
            raise DtypeError(f"{call}: {name} is a {type(array).__name__}; {_WANTED}")
        if str(array.dtype) not in _DTYPES:
            raise DtypeError(f"{call}: {name} has dtype {array.dtype}; pass float32 or float64")
        device = side_of(array.device.type, array.device.index)
        if device != "cpu" and not array.is_meta and not array.is_neg() and str(array.layout) == "torch.strided":
            if not array.is_contiguous():
                raise ShapeError(f"{call}: {name} is not contiguous; pass {name}.contiguous()")
            return backend(np.dtype(_DTYPES[str(array.dtype)]), device).vector(array), device
        try:
            array = array.detach().numpy()
        except (TypeError, RuntimeError) as error:
            raise DtypeError(f"{call}: {name} cannot be seen as a numpy array ({error}); pass a tensor in memory of the CPU "
                             "or of a GPU") from None
    if isinstance(array, np.ma.MaskedArray):
        raise masked(call, name)
    if array.dtype not in (np.float32, np.float64):
        raise DtypeError(f"{call}: {name} has dtype {array.dtype}; pass float32 or float64")
    if not array.flags.c_contiguous:
        raise ShapeError(f"{call}: {name} is not contiguous; pass numpy.ascontiguousarray({name})")
    return array.view(np.ndarray).reshape(-1), "cpu"  # matrices stay matrices else
