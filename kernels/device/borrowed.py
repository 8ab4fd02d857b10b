"""Arrays that other libraries have on a device: taken as tensors, and given back, without a copy."""

import sys
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["handed", "settle", "tensor_over"]


def tensor_over(x: Any) -> torch.Tensor:
    """Return a tensor over the memory of an array that has ``__dlpack__``, once its library has written to it."""
    return torch.from_dlpack(x)  # type: ignore[attr-defined]


def handed(tensor: torch.Tensor, like: Any) -> Any:
    """Return an array of the library of `like` over the memory of a tensor; where that takes none, the tensor."""
    for library in _libraries(like):
        if hasattr(library, "from_dlpack"):
            try:
                return library.from_dlpack(tensor)
            except (TypeError, ValueError, RuntimeError, BufferError):
                continue
    return tensor


def settle(tensor: torch.Tensor) -> None:
    """Wait until what was written to a tensor is there, also for libraries that work on other streams."""
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()


def _libraries(x: Any) -> Iterator[Any]:
    if hasattr(x, "__array_namespace__"):  # the array API
        yield x.__array_namespace__()
    yield sys.modules.get(type(x).__module__.partition(".")[0])
