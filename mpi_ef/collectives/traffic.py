"""Bytes of an exchange."""

from dataclasses import dataclass

from mpi_ef.comm.nodes import Nodes

__all__ = ["LinkTraffic", "Traffic"]


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
    """Bytes that one exchange moves over the link of a node: what ranks on one node send each other does not count.

    Attributes
    ----------
    sent_nbytes : int
        What leaves the node that sends most, of all its ranks together.
    dense_nbytes : int
        The same of an uncompressed allreduce that adds inside of nodes first: ``2 (m-1)/m * d * itemsize`` with m nodes.
    """

    sent_nbytes: int
    dense_nbytes: int

    @classmethod
    def of(cls, nodes: Nodes, sent_nbytes: int, vector_nbytes: int) -> "LinkTraffic":
        """Return that of an exchange of vectors of so many bytes which leaves a node with these."""
        return cls(sent_nbytes, 2 * (nodes.count - 1) * vector_nbytes // nodes.count)
