"""Which numbers a checkpoint can hold, and their HDF5 types."""

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import CheckpointError

__all__ = ["BFLOAT16", "DTYPES", "dtype_name", "hdf5_type", "raw_bytes"]

BFLOAT16: np.dtype[Any] = np.dtype([("bfloat16", "<u2")])
"""The dtype of bfloat16 arrays: ``tensor.view(torch.uint16).numpy().view(BFLOAT16)``, and ``.view(np.uint16)`` back.

NumPy has no such number; a structure with one field cannot be taken for integers, and survives views and copies.
"""

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
                 "float16", "float32", "float64", "complex64", "complex128")
} | {"bfloat16": BFLOAT16}
"""Every dtype that a file may hold, by the name it has there. Bytes are little endian on any machine."""


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name that `dtype` has in a checkpoint; `CheckpointError` when it has none."""
    if dtype == BFLOAT16 or (dtype.name == "bfloat16" and dtype.itemsize == 2):  # the latter is that of ml_dtypes
        return "bfloat16"
    if dtype.name not in DTYPES or dtype.hasobject:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"checkpoint: dtype {dtype} cannot be stored; use one of {known}, or a view as uint8")
    return str(dtype.name)


def hdf5_type(name: str) -> Any:
    """Return the low-level HDF5 type in which values of dtype `name` lie in a file."""
    if name == "bfloat16":
        made = h5py.h5t.IEEE_F32LE.copy()
        made.set_fields(15, 7, 8, 0, 7)  # sign bit; exponent from bit 7, 8 bits; mantissa from bit 0, 7 bits
        made.set_size(2)
        made.set_ebias(127)
        return made
    return h5py.h5t.py_create(np.dtype("<u1") if name == "bool" else DTYPES[name])


def raw_bytes(array: NDArray[Any]) -> memoryview:
    """Return the bytes of `array` in row order, little endian; a copy only where it lies otherwise in memory."""
    name = dtype_name(array.dtype)
    if name != "bfloat16":
        array = array.astype(DTYPES[name], copy=False)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
