"""Plain containers with tensors in them as JSON and named arrays, and back: what goes in comes out, types included."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpi_ef.checkpoint.dtypes import BFLOAT16
from mpi_ef.errors import DtypeError, OptionError, briefly
from mpi_ef.vectors.pieces import TensorPieces
from mpi_ef.vectors.places import is_on_device

__all__ = ["Array", "Arrays", "Filed", "decoded", "encoded", "filed", "plain_array", "tensor_of"]

Array = NDArray[Any]
Filed = Array | TensorPieces
Arrays = dict[str, Filed]
Leaf = Mapping[str, Any]


class Found(NamedTuple):
    """The arrays in a value by name, and the JSON of its tensors by their id: one tensor has one array."""

    arrays: Arrays
    leaves: dict[int, Any]


# JSON has no tuples, no keys but strings, no NaN: what it lacks becomes an object with this key, which says what it is.
_MARK = "~"
_NUMBERS = "fiubc"  # kinds of dtypes that are numbers
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_FLOATS = (torch.float16, torch.float32, torch.float64)


def encoded(value: Any, name: str, arrays: Arrays) -> Any:
    """Return `value` as JSON, and add its tensors and arrays to `arrays`.

    `value` is None, a bool, int, float, complex, str, bytes, tensor, NumPy array or number, `TensorPieces`, or a tuple,
    list, dict, OrderedDict or Counter of such, and not of a subclass: `OptionError`; nor is a tensor sparse or quantised:
    `DtypeError`. Names of arrays, which are views of the tensors' memory where possible and of those on a device
    `TensorPieces`, begin with `name`. A tensor that is there several times, such as a learning rate of several groups, has
    one array, and is one again in :func:`decoded`, as with torch.save.
    """
    return _encoded(value, name, Found(arrays, {}))


def _encoded(value: Any, name: str, found: Found) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind in _TEXTS:
        return {_MARK: kind.__name__, "value": _TEXTS[kind](value)}
    if isinstance(value, Tensor):
        return _tensor(value, name, found)
    if isinstance(value, TensorPieces):
        return _pieces(value, name, found)
    if isinstance(value, np.ndarray | np.generic):
        return _array(value, name, found)
    if kind not in _CONTAINERS:
        raise OptionError(f"checkpoint: {name} is of {kind.__name__}, which is not stored; give it as numbers, strings, "
                          "tensors, lists, tuples and dicts")
    return _CONTAINERS[kind](value, name, found)


_TEXTS: dict[type, Callable[[Any], Any]] = {
    float: repr, bytes: bytes.hex,
    complex: lambda value: [_encoded(part, "", Found({}, {})) for part in (value.real, value.imag)],
}


def _tensor(value: Tensor, name: str, found: Found) -> Any:
    if id(value) not in found.leaves:
        name = _free(name, found)
        found.arrays[name], dtype = filed(value, name)
        found.leaves[id(value)] = {_MARK: "tensor", "name": name, "dtype": dtype, "shape": list(value.shape)}
    return found.leaves[id(value)]


def _pieces(value: TensorPieces, name: str, found: Found) -> Any:
    name = _free(name, found)
    found.arrays[name] = value
    return {_MARK: "array", "name": name, "dtype": value.dtype.name, "shape": list(value.shape)}


def _array(value: Any, name: str, found: Found) -> Any:
    if value.dtype.hasobject or value.dtype.kind not in _NUMBERS:
        raise DtypeError(f"checkpoint: {name} is an array of {value.dtype}, which is not stored; give it as numbers")
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    name = _free(name, found)
    found.arrays[name], kind = array, "array" if isinstance(value, np.ndarray) else "number"
    return {_MARK: kind, "name": name, "dtype": array.dtype.name, "shape": list(array.shape)}


def _free(name: str, found: Found) -> str:
    """Return a name that no array has yet: those below the keys 1 and "1" are equal."""
    while name in found.arrays:
        name += "'"
    return name


def _sequence(value: Any, name: str, found: Found) -> Any:
    items = [_encoded(item, f"{name}.{number}", found) for number, item in enumerate(value)]
    return items if type(value) is list else {_MARK: "tuple", "value": items}


def _dict(value: Any, name: str, found: Found) -> Any:
    keys = [_encoded(key, f"{name}: a key", Found({}, {})) for key in value]
    items = [_encoded(item, f"{name}.{key}", found) for key, item in value.items()]
    if type(value) is dict and all(type(key) is str and key != _MARK for key in value):
        return dict(zip(keys, items, strict=True))
    pairs = [list(pair) for pair in zip(keys, items, strict=True)]
    return {_MARK: type(value).__name__, "value": pairs}


_CONTAINERS: dict[type, Callable[[Any, str, Found], Any]] = {
    list: _sequence, tuple: _sequence, dict: _dict, OrderedDict: _dict, Counter: _dict,
}


def filed(tensor: Tensor, name: str) -> tuple[Filed, str]:
    """Do what :func:`plain_array` does; of a tensor on a device return what gets its bytes when they are written."""
    if not is_on_device(tensor) or tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
        return plain_array(tensor, name)
    numbers, dtype = plain_array(torch.empty(0, dtype=tensor.dtype), name)
    return TensorPieces(tensor.detach().resolve_conj().resolve_neg(), numbers.dtype), dtype


def plain_array(tensor: Tensor, name: str) -> tuple[Array, str]:
    """Return a dense tensor's numbers as an array that files can hold, and the name of its dtype; else `DtypeError`."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise DtypeError(f"checkpoint: {name} is a tensor of layout {tensor.layout} on {tensor.device}, which is not "
                         "stored; make it dense")
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    dtype = str(dense.dtype).removeprefix("torch.")
    if dense.is_floating_point() and dense.dtype not in _FLOATS:  # the bits of what numpy does not have
        bits = dense.view(_BITS[dense.element_size()]).numpy()
        return (bits.view(BFLOAT16) if dense.dtype is torch.bfloat16 else bits), dtype
    return dense.numpy(), dtype


def tensor_of(array: Array, dtype: str, shape: list[int]) -> Tensor:
    """Return a new tensor from what :func:`plain_array` returned; `DtypeError` for a dtype that torch does not have."""
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise DtypeError(f"checkpoint: a tensor of {dtype}, which this torch does not have; take the version that wrote it")
    plain = array.view(np.uint16) if array.dtype == BFLOAT16 else array
    tensor, wanted = torch.from_numpy(np.array(plain, order="C")), getattr(torch, dtype)
    return (tensor if tensor.dtype is wanted else tensor.view(wanted)).reshape(shape)


def decoded(tree: Any, tensor: Callable[[Leaf], Tensor], array: Callable[[str], Array]) -> Any:
    """Return what :func:`encoded` was given; `OptionError` for a tree of a later version.

    ``tensor(leaf)`` returns the tensor of a leaf, an object with "name", "dtype" and "shape"; ``array(name)`` an array.
    """
    known: dict[str, Tensor] = {}

    def inside(part: Any) -> Any:
        if isinstance(part, list):
            return [inside(item) for item in part]
        if not isinstance(part, dict):
            return part
        if (kind := part.get(_MARK)) is None:
            return {key: inside(item) for key, item in part.items()}
        if kind == "tensor":
            if part["name"] not in known:
                known[part["name"]] = tensor(part)
            return known[part["name"]]
        if kind in ("array", "number"):
            numbers = np.array(array(part["name"])).reshape(part["shape"])
            return numbers if kind == "array" else numbers[()]
        if kind not in _DECODERS:
            raise OptionError(f"checkpoint: a value of kind {briefly(kind)} is unknown; it was written by a newer version")
        return _DECODERS[kind](inside(part["value"]))

    return inside(tree)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float, "bytes": bytes.fromhex, "complex": lambda parts: complex(*parts), "tuple": tuple, "dict": dict,
    "OrderedDict": OrderedDict, "Counter": lambda pairs: Counter(dict(pairs)),
}
