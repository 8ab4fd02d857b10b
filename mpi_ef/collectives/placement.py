"""Which ranks are on one node, and the communicators that follow from it."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mpi_ef.comm.attributes import kept_with, mpi_of
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.nodes import RANKS_PER_NODE, node_name
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError, briefly

from .ways import ways_of

__all__ = ["NodeOf", "Placement", "placement_of", "slice_bounds"]

NodeOf = int | Callable[[int], int] | Comm | None
_ALIGNED = 64  # entries: where cache lines and sign words begin


class Placement(NamedTuple):
    """Nodes, numbered by their first ranks, and rails: rail q is the q-th rank of every node.

    Attributes
    ----------
    numbers : tuple of int
        The node of each rank.
    node, rail : Comm
        The ranks of this one's node; those of its rail, in the order of the nodes. A rank that is beyond the smallest node
        has a rail for itself.
    nodes, rails : int
        How many there are. Rails are as many as the smallest node has ranks.
    mine : int
        This rank's node.
    pending : list
        Exchanges that have begun and are not on the rail yet, in their order, which is the same on all ranks.
    """

    numbers: tuple[int, ...]
    node: Comm
    rail: Comm
    nodes: int
    rails: int
    mine: int
    pending: list[Any]


class _Placements(dict[tuple[int, ...], Placement]):
    """Those of a communicator so far, each with communicators that are made once."""

    def free(self) -> None:
        """Free these. Collective."""
        for placement in self.values():
            for part in (placement.node, placement.rail):
                part.Free()  # type: ignore[attr-defined]


def slice_bounds(d: int, rails: int) -> list[int]:
    """Return rails + 1 bounds that cut d entries into a slice for each rail, for long vectors at multiples of 64."""
    if d < 16 * _ALIGNED * rails:
        return [q * d // rails for q in range(rails + 1)]
    return [*(q * d // rails // _ALIGNED * _ALIGNED for q in range(rails)), d]


def placement_of(comm: Comm, node: NodeOf, subject: str) -> Placement:
    """Return which ranks of `comm` are on which node. Collective.

    Parameters
    ----------
    node : int, callable or communicator, optional
        See :class:`NodeMean`.
    """
    first: list[Any] = []  # the number of this one's node, or what tells nodes apart

    def facts() -> dict[str, object]:
        kind, said = _said_of(comm, node, subject)
        first.append(said)
        return {"node": kind}

    answers = agree(comm, subject, facts, "say on all ranks alike which ranks a node has", value=first)
    said = [theirs[0] for theirs in answers]
    if first[0] is None:
        said = comm.allgather(_first_beside(comm, node))
    order: dict[Any, int] = {}
    numbers = tuple(order.setdefault(theirs, len(order)) for theirs in said)
    if not hasattr(type(comm), "Create_keyval"):
        return _split(comm, numbers)
    known = kept_with(comm, _Placements)
    if numbers not in known:
        known[numbers] = _split(comm, numbers)
    return known[numbers]


def _said_of(comm: Any, node: Any, subject: str) -> tuple[str, int | str | None]:
    """Return what kind of `node` this is, and number or name of this rank's; None where ranks have to ask each other."""
    if not hasattr(comm, "Split"):
        raise OptionError(f"{subject}: comm={briefly(comm)} cannot be split into nodes; pass one of MPI")
    if isinstance(node, int | np.integer) and not isinstance(node, bool):
        if node < 1:
            raise OptionError(f"{subject}: node={node} ranks; a node has at least one")
        return f"{node} ranks each", int(comm.Get_rank()) // int(node)
    if node is None:
        told = mpi_of(comm) is None or os.environ.get(RANKS_PER_NODE)
        return "those that share memory", node_name(comm) if told else None
    if hasattr(node, "allgather"):
        return "a communicator", None
    if not callable(node):
        raise OptionError(f"{subject}: node={briefly(node)}; pass how many ranks a node has, a function of the rank that "
                          "returns the number of its node, or a communicator")
    return "a function", int(node(int(comm.Get_rank())))


def _first_beside(comm: Any, node: Any) -> int:
    """Return the first rank of those beside this one. Collective."""
    rank = int(comm.Get_rank())
    if node is not None:
        return int(min(node.allgather(rank)))
    from mpi4py import MPI

    beside = comm.Split_type(MPI.COMM_TYPE_SHARED, rank)
    first = int(min(beside.allgather(rank)))
    beside.Free()
    return first


def _split(comm: Any, numbers: tuple[int, ...]) -> Placement:
    rank = int(comm.Get_rank())
    mine, rails = numbers[rank], min(np.bincount(numbers).tolist())
    node = comm.Split(mine, rank)
    place = int(node.Get_rank())
    rail = comm.Split(place if place < rails else rails + rank, mine)
    ways_of(rail).direct = ways_of(comm).direct
    return Placement(numbers, node, rail, len(set(numbers)), rails, mine, [])
