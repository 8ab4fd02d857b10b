"""The mean of tensors of several ranks."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mpi_ef.errors import OptionError

__all__ = ["mean_over_ranks"]


def mean_over_ranks(parts: Iterable[Tensor], name: str) -> Tensor:
    """Return the mean, added up in float64 in rank order and rounded once; what is equal on all ranks keeps its bits.

    Raises
    ------
    OptionError
        Whole numbers or booleans that differ.
    """
    rest: Iterator[Tensor] = iter(parts)
    first, count = next(rest), 1
    wide = torch.complex128 if first.is_complex() else torch.float64
    total, same = first.to(wide, copy=True), torch.ones_like(first, dtype=torch.bool)
    for part in rest:
        total, count = total.add_(part), count + 1
        same &= part == first
    if not (first.is_floating_point() or first.is_complex()) and not bool(same.all()):
        raise OptionError(f"resume: {name} holds whole numbers that differ between the {count} ranks that saved it; "
                          f"resume on {count} ranks")
    return torch.where(same, first, (total / count).to(first.dtype))
