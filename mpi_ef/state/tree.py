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
from mpi_ef.errors import DtypeError, OptionError

__all__ = ["Array", "decoded", "encoded", "plain_array", "tensor_of"]

Array = NDArray[Any]
Arrays = dict[str, Array]
Leaf = Mapping[str, Any]


class Found(NamedTuple):
    """What is in a value: its arrays by name, and what was made of its tensors, by their id: one tensor has one array."""

    arrays: Arrays
    leaves: dict[int, Any]


# JSON has no tuples, no keys but strings, no NaN: what it lacks becomes an object with this key, which says what it is.
_MARK = "~"
_NUMBERS = "fiubc"  # kinds of dtypes that are numbers
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_FLOATS = (torch.float16, torch.float32, torch.float64)


def encoded(value: Any, name: str, arrays: Arrays) -> Any:
    """Return `value` as JSON, and add its tensors and arrays to `arrays`.

    Parameters
    ----------
    value : None, bool, int, float, complex, str, bytes, tensor, numpy array or number, or tuple, list, dict, OrderedDict,
        Counter of such; not a subclass of these
    name : str
        Of the value; names of arrays begin with it.
    arrays : dict of str to array
        Added to: views of the tensors' memory where possible. A tensor that is there several times, such as a learning rate
        of several groups, has one, and is one again in :func:`decoded`, as with torch.save.

    Raises
    ------
    OptionError, DtypeError
        Something of another type; a tensor that is sparse or quantised.
    """
    return _encoded(value, name, Found(arrays, {}))


def _encoded(value: Any, name: str, found: Found) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if isinstance(value, Tensor):
        kind = Tensor
    elif isinstance(value, np.ndarray | np.generic):
        kind = np.ndarray
    if kind not in _ENCODERS:
        raise OptionError(f"checkpoint: {name} is of {kind.__name__}, which is not stored; give it as numbers, strings, "
                          "tensors, lists, tuples and dicts")
    return _ENCODERS[kind](value, name, found)


def _float(value: float, _name: str, _found: Found) -> Any:
    return {_MARK: "float", "value": repr(value)}


def _complex(value: complex, name: str, found: Found) -> Any:
    return {_MARK: "complex", "value": [_encoded(part, name, found) for part in (value.real, value.imag)]}


def _bytes(value: bytes, _name: str, _found: Found) -> Any:
    return {_MARK: "bytes", "value": value.hex()}


def _tensor(value: Tensor, name: str, found: Found) -> Any:
    if id(value) not in found.leaves:
        name = _free(name, found)
        found.arrays[name], dtype = plain_array(value, name)
        found.leaves[id(value)] = {_MARK: "tensor", "name": name, "dtype": dtype, "shape": list(value.shape)}
    return found.leaves[id(value)]


def _array(value: Any, name: str, found: Found) -> Any:
    if value.dtype.hasobject or value.dtype.kind not in _NUMBERS:
        raise DtypeError(f"checkpoint: {name} is an array of {value.dtype}, which is not stored; give it as numbers")
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    name = _free(name, found)
    found.arrays[name], kind = array, "array" if isinstance(value, np.ndarray) else "number"
    return {_MARK: kind, "name": name, "dtype": array.dtype.name, "shape": list(array.shape)}


def _free(name: str, found: Found) -> str:
    """Return a name that no array has yet: those below the keys 1 and "1" read alike."""
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


_ENCODERS: dict[type, Callable[[Any, str, Found], Any]] = {
    float: _float, complex: _complex, bytes: _bytes, Tensor: _tensor, np.ndarray: _array, list: _sequence, tuple: _sequence,
    dict: _dict, OrderedDict: _dict, Counter: _dict,
}


def plain_array(tensor: Tensor, name: str) -> tuple[Array, str]:
    """Return a dense tensor's numbers as an array that files can hold, and the name of its own dtype.

    Raises
    ------
    DtypeError
    """
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
    """Return a new tensor from what :func:`plain_array` returned.

    Raises
    ------
    DtypeError
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise DtypeError(
            f"checkpoint: a tensor of {dtype}, which this torch does not have; take the version that wrote it"
        )
    plain = array.view(np.uint16) if array.dtype == BFLOAT16 else array
    tensor, wanted = torch.from_numpy(np.array(plain, order="C")), getattr(torch, dtype)
    return (tensor if tensor.dtype is wanted else tensor.view(wanted)).reshape(shape)


def decoded(tree: Any, tensor: Callable[[Leaf], Tensor], array: Callable[[str], Array]) -> Any:
    """Return what :func:`encoded` was given.

    Parameters
    ----------
    tree : JSON
    tensor : callable
        Returns the tensor of a leaf: an object with "name", "dtype" and "shape".
    array : callable
        Returns the array of a name.

    Raises
    ------
    OptionError
        `tree` was not made by :func:`encoded`.
    """
    known: dict[str, Tensor] = {}

    def once(leaf: Leaf) -> Tensor:
        if leaf["name"] not in known:
            known[leaf["name"]] = tensor(leaf)
        return known[leaf["name"]]

    return _decoded(tree, once, array)


def _decoded(tree: Any, tensor: Callable[[Leaf], Tensor], array: Callable[[str], Array]) -> Any:
    def inside(part: Any) -> Any:
        return _decoded(part, tensor, array)

    if isinstance(tree, list):
        return [inside(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_MARK)
    if kind is None:
        return {key: inside(item) for key, item in tree.items()}
    if kind == "tensor":
        return tensor(tree)
    if kind in ("array", "number"):
        numbers = np.array(array(tree["name"])).reshape(tree["shape"])
        return numbers if kind == "array" else numbers[()]
    if kind not in _DECODERS:
        raise OptionError(f"checkpoint: a value of kind {kind!r} is unknown; it was written by a newer version")
    return _DECODERS[kind](inside(tree["value"]))


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float, "bytes": bytes.fromhex, "complex": lambda parts: complex(*parts), "tuple": tuple, "dict": dict,
    "OrderedDict": OrderedDict, "Counter": lambda pairs: Counter(dict(pairs)),
}
