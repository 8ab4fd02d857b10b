"""What crosses the bus between the memory of the host and that of a device: every copy, and how long it is.

No other module of this folder copies between the two.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

__all__ = ["PIECE", "Arrival", "copied_nbytes", "exchange_now", "host_array", "on_device", "on_host", "room_for", "settled",
           "tensor_on_host", "to_device", "to_host", "wait_for", "watched"]

PIECE = 32 << 20
"""Bytes of what files get of a device, and give it, at a time; a multiple of a checksum's block, 1 MiB."""

copied_nbytes = {"to host": 0, "to device": 0}  # by this process so far
_watching: list[list[tuple[str, int]]] = []
_beside: dict[torch.device, Any] = {}  # a stream for copies that wait for nothing else
_told: list[bool] = []  # that memory was not page-locked


@contextmanager
def watched() -> Iterator[list[tuple[str, int]]]:
    """Return a context with a list that gets direction and bytes of every copy, of all threads. For tests."""
    copies: list[tuple[str, int]] = []
    _watching.append(copies)
    try:
        yield copies
    finally:
        _watching[:] = [others for others in _watching if others is not copies]


def _count(direction: str, nbytes: int) -> None:
    copied_nbytes[direction] += nbytes
    for copies in _watching:
        copies.append((direction, nbytes))


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


def to_host(tensor: torch.Tensor, host: np.ndarray[Any, Any]) -> None:
    """Copy `tensor` to `host`, of the same shape and as long entries, and wait for it."""
    _count("to host", host.nbytes)
    torch.from_numpy(host).view(tensor.dtype).copy_(tensor)


def _has_events(tensor: torch.Tensor) -> bool:
    """Tell whether it can be known when a copy has been made that nobody has waited for."""
    return tensor.device.type == "cuda"


class Arrival:
    """A copy of a tensor to the host, which neither side waits for until it is asked.

    Parameters
    ----------
    host : array, optional
        Of the tensor's shape, with as long entries; a new one otherwise.
    """

    def __init__(self, tensor: torch.Tensor, host: "np.ndarray[Any, Any] | None" = None) -> None:
        self._tensor, self._host = tensor, host
        self._event: Any = None  # of the device, after the copy
        self._sent = False

    def send(self) -> None:
        """Let the device copy when it has done what it was asked for so far. The first call alone counts."""
        if self._sent:
            return
        tensor, self._sent = self._tensor, True
        if self._host is None:
            entries = torch.empty(0, dtype=tensor.dtype).numpy().dtype
            self._host = host_array(tuple(tensor.shape), entries, tensor.device)
        _count("to host", self._host.nbytes)
        torch.from_numpy(self._host).view(tensor.dtype).copy_(tensor, non_blocking=_has_events(tensor))
        if _has_events(tensor):
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def here(self) -> bool:
        """Tell whether it has been made. Does not wait."""
        return self._sent and (self._event is None or bool(self._event.query()))

    def wait(self) -> "np.ndarray[Any, Any]":
        """Return the array of the host, once the copy has been made."""
        self.send()
        if self._event is not None:
            self._event.synchronize()
        assert self._host is not None  # noqa: S101
        return self._host


def exchange_now(host: np.ndarray[Any, Any], tensor: torch.Tensor, *, to_device: bool) -> None:
    """Copy a few bytes between `host` and memory that nothing else of the device is at work on, and wait for that alone."""
    _count("to device" if to_device else "to host", host.nbytes)
    there = torch.from_numpy(host).view(tensor.dtype)
    target, source = (tensor, there) if to_device else (there, tensor)
    if tensor.device.type != "cuda":
        target.copy_(source)
        return
    if tensor.device not in _beside:
        _beside[tensor.device] = torch.cuda.Stream(tensor.device)
    with torch.cuda.stream(_beside[tensor.device]):
        target.copy_(source)
        _beside[tensor.device].synchronize()


def settled(device: torch.device) -> Arrival:
    """Return what arrives when the device has done what it was asked for so far, and brings nothing."""
    arrival = Arrival(torch.empty(0, dtype=torch.uint8, device=device))
    arrival.send()
    return arrival


def to_device(host: np.ndarray[Any, Any], tensor: torch.Tensor) -> None:
    """Copy `host` to `tensor`, in order with what the device does; `host` may change once it has done that."""
    _count("to device", host.nbytes)
    tensor.copy_(torch.from_numpy(host).view(tensor.dtype), non_blocking=_has_events(tensor))


def tensor_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, of any dtype, in the memory of the host, once the device is done with it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    _count("to host", tensor.numel() * tensor.element_size())
    return host.copy_(tensor)


def on_host(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a copy of a tensor as an array in the memory of the host, once the device is done with it."""
    array: np.ndarray[Any, Any] = tensor_on_host(tensor).numpy()
    return array


class _Rooms(local):
    """Of a thread: page-locked memory for a piece, by device."""

    def __init__(self) -> None:
        self.of: dict[torch.device, np.ndarray[Any, Any]] = {}


_rooms = _Rooms()


def room_for(nbytes: int, device: torch.device) -> np.ndarray[Any, Any]:
    """Return memory of the host, bytes, for a piece of so many; the next call of this thread returns the same memory."""
    wanted = min(PIECE, nbytes)
    if (there := _rooms.of.get(device)) is None or there.nbytes < wanted:
        _rooms.of.pop(device, None)  # freed before the larger one is made
        there = _rooms.of[device] = host_array(wanted, np.uint8, device)
    return there[:wanted]


def wait_for(device: torch.device) -> None:
    """Wait until the device is done with what was copied from the host, which may change then."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def on_device(numbers: "np.ndarray[Any, Any] | Sequence[Any]", device: torch.device,
              dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a copy of an array or a list on the device, of another `dtype` if one is named."""
    there = torch.tensor(numbers, dtype=dtype) if isinstance(numbers, list | tuple) else torch.from_numpy(np.array(numbers))
    _count("to device", there.numel() * there.element_size())
    return there.to(device, dtype)
