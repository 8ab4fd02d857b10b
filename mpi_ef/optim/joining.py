"""Ranks that have run out of data, and take part with nothing until all have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mpi_ef.errors import OptionError

__all__ = ["joined"]


class _Joins(Protocol):
    done: bool
    weighs: bool
    overlaps: bool

    def take_part(self) -> bool: ...


@contextmanager
def joined(optimizer: _Joins, weigh: bool) -> Iterator[None]:
    """See :meth:`FlatOptimizer.join`."""
    if weigh and optimizer.overlaps:
        raise OptionError("join: weigh=True with overlap=True, whose gradients leave before ranks know who has some; take "
                          "overlap=False")
    before, optimizer.weighs = optimizer.weighs, weigh
    try:
        yield
        optimizer.done = True
        while optimizer.take_part():
            pass
    finally:
        optimizer.done, optimizer.weighs = False, before
