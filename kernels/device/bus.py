"""What crosses the bus between the memory of the host and that of a device: every copy, and how long it is."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from .array import DeviceArray

__all__ = ["copied_nbytes", "host_array", "to_device", "to_host"]

_told: list[bool] = []  # that memory was not page-locked
copied_nbytes = {"to host": 0, "to device": 0}


def host_array(shape: int | tuple[int, ...], dtype: DTypeLike, device: torch.device) -> np.ndarray[Any, Any]:
    """Return an array of zeros in the memory of the host, page-locked where copies to `device` are quicker from there."""
    if device.type != "cuda":
        return np.zeros(shape, dtype)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)
    except RuntimeError as error:  # limits of the system
        if not _told:
            _told.append(True)
            text = f"memory of the host cannot be page-locked ({error}): copies from and to the device take longer"
            warnings.warn(" ".join(text.split()), RuntimeWarning, stacklevel=2)
        return np.zeros(shape, dtype)


def to_host(array: DeviceArray, host: np.ndarray[Any, Any]) -> None:
    """Copy `array` to `host`, of the same shape and dtype, and wait for it."""
    copied_nbytes["to host"] += host.nbytes
    torch.from_numpy(host).view(array.tensor.dtype).copy_(array.tensor)


def to_device(host: np.ndarray[Any, Any], array: DeviceArray) -> None:
    """Copy `host` to `array`, in order with what the device does; `host` may change once it has done that."""
    copied_nbytes["to device"] += host.nbytes
    array.tensor.copy_(torch.from_numpy(host).view(array.tensor.dtype), non_blocking=True)
