"""Bytes of an exchange."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpi_ef.comm.nodes import Nodes

__all__ = ["Accounted", "LinkTraffic", "Traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one exchange moves into and out of one rank, headers and padding included.

    A gathered frame counts once for every other rank, because each of them has to receive it; what an MPI library
    sends beyond that is not seen here.

    Attributes
    ----------
    sent_nbytes, received_nbytes : int
    dense_nbytes : int
        What a bandwidth-optimal uncompressed allreduce of the same vector sends: ``2 (n-1)/n * d * itemsize``.
    """

    sent_nbytes: int
    received_nbytes: int
    dense_nbytes: int

    @classmethod
    def both_ways(cls, nbytes: int, ranks: int, vector_nbytes: int) -> "Traffic":
        """Return that of an exchange which receives as much as it sends."""
        return cls(nbytes, nbytes, 2 * (ranks - 1) * vector_nbytes // ranks)


@dataclass(frozen=True)
class LinkTraffic:
    """Bytes that one exchange moves over the link of a node, each way: those between ranks of one node do not count.

    Attributes
    ----------
    nbytes : int
        What comes to the node to which most comes, of all its ranks together. A gathered frame comes to a node once, as
        around a ring of neighbours, in which it goes on through memory.
    dense_nbytes : int
        The same of an uncompressed allreduce that adds inside of nodes first: ``2 (m-1)/m * d * itemsize`` with m nodes.
    """

    nbytes: int
    dense_nbytes: int

    @classmethod
    def of(cls, nodes: Nodes, nbytes: int, vector_nbytes: int) -> "LinkTraffic":
        """Return that of an exchange of vectors of so many bytes of which `nbytes` come to a node."""
        return cls(nbytes, 2 * (nodes.count - 1) * vector_nbytes // nodes.count)


class Accounted:
    """What a plan, of vectors of (d,) between ranks on these nodes, says of its bytes."""

    nodes: Nodes
    d: int
    dtype: np.dtype[Any]
    scattered_nbytes: int = 0  # of an exchange, out of a rank: what is something else for each of the others

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """Bytes of one exchange."""

    @property
    def link_traffic(self) -> LinkTraffic:
        """Bytes of one exchange on the link of a node."""
        gathered_nbytes = self.traffic.sent_nbytes - self.scattered_nbytes
        crossing = self.nodes.crossing(gathered_nbytes, self.scattered_nbytes)
        return LinkTraffic.of(self.nodes, crossing, self.d * self.dtype.itemsize)
