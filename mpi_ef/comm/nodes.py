"""Which rank is on which node: what is on one of them talks through memory, and shares a link with the others there."""

import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from socket import gethostname

from mpi_ef.errors import OptionError, briefly

from .attributes import kept_with
from .consensus import gather_values
from .protocol import Comm

__all__ = ["RANKS_PER_NODE", "Nodes", "node_name", "nodes_of"]

RANKS_PER_NODE = "MPI_EF_RANKS_PER_NODE"  # where it is set, so many ranks are taken for a node, in their order
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # of a running Linux, also in its containers


@dataclass(frozen=True)
class Nodes:
    """The nodes of a communicator's ranks.

    Attributes
    ----------
    numbers : tuple of int
        The node of every rank; nodes are numbered in the order of their first ranks.
    """

    numbers: tuple[int, ...]

    @classmethod
    def named(cls, names: Iterable[Hashable]) -> "Nodes":
        """Return those of ranks whose nodes have these names. Local."""
        known: dict[Hashable, int] = {}
        return cls(tuple(known.setdefault(name, len(known)) for name in names))

    @classmethod
    def of_size(cls, ranks: int, ranks_per_node: int) -> "Nodes":
        """Return nodes of `ranks_per_node` each, the last one with what is left. Local."""
        return cls(tuple(rank // ranks_per_node for rank in range(ranks)))

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return max(self.numbers) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many ranks each of them has."""
        return tuple(self.numbers.count(node) for node in range(self.count))

    @property
    def largest(self) -> int:
        """The most ranks that one of them has."""
        return max(self.sizes)

    def crossing(self, gathered_nbytes: int = 0, scattered_nbytes: int = 0) -> int:
        """Return how many bytes come over the link of the node to which most comes, where each rank sends so many. Local.

        What is gathered is the same for all others, and comes to a node once; what is scattered is something else for each.
        """
        n = len(self.numbers)
        return max((n - s) * (gathered_nbytes + s * scattered_nbytes) for s in self.sizes) // max(1, n - 1)

    def beside(self, rank: int) -> list[int]:
        """Return the ranks on the node of `rank`, with it. Local."""
        return [other for other, node in enumerate(self.numbers) if node == self.numbers[rank]]


@cache
def _host() -> str:
    """Return what two machines do not share, nor two containers with memory of their own."""
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        boot = ""
    return f"{gethostname()} {boot}"


def node_name(comm: Comm) -> str:
    """Return a name of this rank's node, the same on those ranks of `comm` alone that are there. Local.

    It is that of the host and of its running system, or of `comm` itself, where its ranks are virtual; or with
    ``MPI_EF_RANKS_PER_NODE=s`` the number of every s ranks: a machine stands for several then.

    Raises
    ------
    OptionError
        The variable is not a whole number from 1 on.
    """
    if text := os.environ.get(RANKS_PER_NODE, ""):
        if not (text.isdecimal() and text.isascii() and int(text)):
            raise OptionError(f"{RANKS_PER_NODE}={briefly(text)} is not a whole number from 1 on; set how many ranks are "
                              "taken for a node, or unset it")
        return f"node {comm.Get_rank() // int(text)}"
    return str(getattr(comm, "node_name", None) or _host())


class _Known:
    """What is known of a communicator."""

    nodes: Nodes | None = None


def nodes_of(comm: Comm) -> Nodes:
    """Return the nodes of the ranks of `comm`. Collective the first time, kept with it where it keeps attributes.

    Raises
    ------
    OptionError, PeerError
        See :func:`node_name`.
    """
    known = kept_with(comm, _Known) if hasattr(type(comm), "Create_keyval") else _Known()
    if known.nodes is None:
        known.nodes = Nodes.named(gather_values(comm, "nodes_of", node_name(comm)))
    return known.nodes
