"""Tensors of all ranks, nested in tuples, lists and dictionaries, as the calls of accelerate and Lightning want them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpi_ef.comm.consensus import gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError, briefly
from mpi_ef.vectors import mean_over_ranks

__all__ = ["first_of", "first_that_is_no_tensor", "gathered", "padded", "reduced", "stacked"]


def gathered(value: Any, comm: Comm) -> Any:
    """Return the tensors of all ranks one after the other, along the first axis; numbers as entries of one. Collective."""
    return _joined(gather_values(comm, "gather", _sent(value)), lambda parts: torch.cat([_rows(part) for part in parts]))


def stacked(value: Any, comm: Comm) -> Any:
    """Return the tensors of all ranks along a new first axis, (ranks, ...). Collective."""
    return _joined(gather_values(comm, "all_gather", _sent(value)), torch.stack)


def reduced(value: Any, comm: Comm, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Return the "mean", "sum", "min" or "max" over ranks, the same bits on all; with "none" this rank's own. Collective."""
    if reduction == "none":
        return value
    if not (isinstance(reduction, str) and reduction in _REDUCTIONS):
        raise OptionError(f"reduce: reduction={briefly(reduction)} is unknown; take one of {', '.join(_REDUCTIONS)}, none")
    whole = _joined(gather_values(comm, "reduce", _sent(value)), _REDUCTIONS[reduction])
    return whole if scale == 1.0 else _joined([whole], lambda parts: parts[0] * scale)


def padded(value: Any, comm: Comm, dim: int = 0, pad_index: int = 0, *, pad_first: bool = False) -> Any:
    """Return the tensors as long along an axis as the longest of all ranks, filled with `pad_index`. Collective."""
    shapes = _joined(gather_values(comm, "pad_across_processes", _joined([value], lambda parts: parts[0].shape)),
                     lambda shapes: shapes, leaf=torch.Size)

    def pad(tensor: Tensor, shapes: list[torch.Size]) -> Tensor:
        if not -tensor.dim() <= dim < tensor.dim():
            return tensor
        axis, most = dim % tensor.dim(), max(shape[dim] for shape in shapes)
        if tensor.shape[axis] == most:
            return tensor
        wide = tensor.new_full((*tensor.shape[:axis], most, *tensor.shape[axis + 1 :]), pad_index)
        start = most - tensor.shape[axis] if pad_first else 0
        wide.narrow(axis, start, tensor.shape[axis]).copy_(tensor)
        return wide

    return _paired(value, shapes, pad)


def first_of(value: Any, comm: Comm, rank: int = 0) -> Any:
    """Return the object of one rank. Collective; the others need not have it."""
    return gather_values(comm, "broadcast", value if comm.Get_rank() == rank else None)[rank]


def first_that_is_no_tensor(value: Any) -> list[Any]:
    """Return a list of the first leaf that is no tensor, empty where there is none. Local."""
    if isinstance(value, dict) or hasattr(value, "keys"):
        parts = [value[name] for name in value.keys()]  # noqa: SIM118
    elif isinstance(value, tuple | list):
        parts = [*value]
    else:
        return [] if isinstance(value, Tensor) else [value]
    return next(filter(None, map(first_that_is_no_tensor, parts)), [])


def _rows(part: Tensor) -> Tensor:
    return part.reshape(1) if part.dim() == 0 else part


def _mean(parts: list[Tensor]) -> Tensor:
    first = parts[0]
    whole = not (first.is_floating_point() or first.is_complex())
    return mean_over_ranks([part.float() for part in parts] if whole else parts, "reduce")


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


_REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "mean": _mean, "sum": _sum, "min": lambda parts: torch.stack(parts).amin(0),
    "max": lambda parts: torch.stack(parts).amax(0),
}


def _sent(value: Any) -> Any:
    """Return a copy that can be pickled: no graph, no views of larger tensors."""
    return _joined([value], lambda parts: parts[0].detach().clone())


def _joined(values: list[Any], join: Callable[[list[Any]], Any], leaf: type = Tensor) -> Any:
    """Return ``join`` of the leaves at each place; what is no container and no leaf is that of the first."""
    first = values[0]
    if isinstance(first, leaf):
        return join(values)
    if isinstance(first, dict) or hasattr(first, "keys"):
        return {name: _joined([value[name] for value in values], join, leaf) for name in first.keys()}  # noqa: SIM118
    if isinstance(first, tuple | list):
        parts = [_joined(list(places), join, leaf) for places in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def _paired(value: Any, other: Any, call: Callable[[Any, Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return call(value, other)
    if isinstance(value, dict) or hasattr(value, "keys"):
        return {name: _paired(value[name], other[name], call) for name in value.keys()}  # noqa: SIM118
    if isinstance(value, tuple | list):
        parts = [_paired(*pair, call) for pair in zip(value, other, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
