"""Tensors of any dtype that are wherever the program has them: hashes of them, and what goes to the host and back."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpi_ef.kernels.backend import backend, side_of
from mpi_ef.kernels.device import bus

__all__ = ["fingerprints", "host_copy", "is_on_device", "on_host", "overwrite"]

_TOGETHER = 2**24  # bytes of tensors that are hashed in one call: a device is waited for once in each


def is_on_device(tensor: Tensor) -> bool:
    """Tell whether a tensor is in the memory of a device. Local."""
    return side_of(tensor.device.type) != "cpu"


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor of any dtype in the memory of the host: itself where it is there, or a copy. Local."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return bus.tensor_on_host(tensor) if is_on_device(tensor) else tensor


def host_copy(value: Any) -> Any:
    """Return a deep copy of plain containers, of which tensors are in the memory of the host. Local."""
    return deepcopy(value, {id(tensor): on_host(tensor) for tensor in _tensors_in(value) if is_on_device(tensor)})


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


@torch.no_grad()
def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor, wherever it is, with `values` of the same shape. Local."""
    if is_on_device(tensor) and values.device.type == "cpu":
        there = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        bus.to_device(_bytes(values.to(tensor.dtype).contiguous()).numpy(), _bytes(there))
        values = there
    tensor.copy_(values)


def fingerprints(tensors: Sequence[Tensor]) -> NDArray[np.uint32]:
    """Return a hash of every tensor, of any dtype and layout, formed where it is, the same on any device. Local.

    Of its entries in row order, as 32-bit words, the last one filled up with zeros. To the host go 8 bytes for each.
    """
    whole = np.empty(len(tensors), np.uint64)
    for numbers in _batches(tensors):
        together = [_words(tensors[number]) for number in numbers]
        words = together[0] if len(together) == 1 else torch.cat(together)
        kernels: Any = backend(np.dtype(np.float32), side_of(words.device.type, words.device.index))
        starts, found = np.cumsum([0, *map(len, together)]), np.empty(len(numbers), np.uint64)
        kernels.fingerprints(kernels.vector(words), starts, found)
        whole[numbers] = found
    return (whole ^ (whole >> np.uint64(32))).astype(np.uint32)


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of tensors that are hashed together: on one device, and not too much at once."""
    nbytes = np.cumsum([0, *(t.numel() * t.element_size() for t in tensors)])
    keys = [(t.device, int(end) // _TOGETHER, int(end - start) > _TOGETHER and n)
            for n, (t, (start, end)) in enumerate(zip(tensors, pairwise(nbytes), strict=True))]
    yield from ([n for n, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys))


def _words(tensor: Tensor) -> Tensor:
    """Return the entries of a tensor as 32-bit words, of dtype float32; a copy where they do not begin or end as such."""
    raw = _bytes(tensor.detach().resolve_conj().resolve_neg().contiguous())
    if raw.numel() % 4 or raw.storage_offset() % 4 or not raw.numel():
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 4)])
    return raw.view(torch.float32)


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor. Not a copy."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
