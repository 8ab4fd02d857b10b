"""Arrays of a run whose ranks kept parts of vectors of their node, read by ranks that keep other parts, or whole vectors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpi_ef.statetree import REPLICATED, Reshard
from mpi_ef.vectors import mean_over_ranks

from .tree import Array

__all__ = ["Holders", "same_nodes"]

_NODE, _START, _STOP, _FIRST, _LAST = range(5)


@dataclass(frozen=True)
class Holders:
    """Who held the vectors of which arrays of ranks are parts: nodes, or without a table each rank its own.

    `read` returns an array by its name and a rank; `kind` says of a name whether it was the same on all ranks.
    """

    table: Array | None
    ranks: int
    read: Callable[[str, int], Array]
    kind: Callable[[str], str | None]

    def moved(self, name: str, move: Reshard | None, owed: str, of: str) -> Array:
        """Return the part of this rank that `move` names. `owed` and `of` are whole names. Local."""
        start, stop = (move.start, move.stop) if move is not None and (move.nodes is not None or move.how == "cut") \
            else (0, self._length(name))
        if move is not None and move.how == "cut":
            return self.owed(name, start, stop)
        if move is not None and move.how == "copy":
            part = self._part(of, 0, start, stop)
            return part + self.owed(owed, start, stop) if owed else part
        if self.kind(name) == REPLICATED or move is None:
            return self._part(name, 0, start, stop)
        parts = (torch.from_numpy(np.array(self._part(name, holder, start, stop))) for holder in range(self._count()))
        mean: Array = mean_over_ranks(parts, name).numpy()
        return mean

    def _count(self) -> int:
        return self.ranks if self.table is None else int(self.table[:, _NODE].max()) + 1

    def _length(self, name: str) -> int:
        return self.read(name, 0).size if self.table is None else int(self.table[:, _STOP].max())

    def _part(self, name: str, holder: int, start: int, stop: int) -> Array:
        """Return entries of the vector that a node, or a rank, held."""
        if self.table is None or self.kind(name) == REPLICATED:
            return self.read(name, holder)[start:stop]
        ranks = np.flatnonzero(self.table[:, _NODE] == holder)
        return self._joined(name, ranks, self.table[ranks, _START], self.table[ranks, _STOP], start, stop)

    def owed(self, name: str, start: int, stop: int) -> Array:
        """Return entries of a vector of which every rank held another part."""
        ranks = np.arange(self.ranks)
        if self.table is not None:
            return self._joined(name, ranks, self.table[:, _FIRST], self.table[:, _LAST], start, stop)
        ends = np.cumsum([self.read(name, rank).size for rank in ranks.tolist()])
        return self._joined(name, ranks, np.array([0, *ends[:-1]]), ends, start, stop)

    def _joined(self, name: str, ranks: Array, begins: Array, ends: Array, start: int, stop: int) -> Array:
        return np.concatenate([*self._pieces(name, ranks, begins, ends, start, stop)])

    def _pieces(self, name: str, ranks: Array, begins: Array, ends: Array, start: int, stop: int) -> Iterator[Array]:
        yield self.read(name, int(ranks[0]))[:0]
        places = sorted(zip(begins.tolist(), ends.tolist(), ranks.tolist(), strict=True))
        for begin, end, rank in places:
            if begin < min(end, stop) and start < end:
                yield self.read(name, rank)[max(0, start - begin) : stop - begin]


def same_nodes(one: Any, other: Any) -> bool:
    """Tell whether two tables, or None, are the same. Local."""
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
