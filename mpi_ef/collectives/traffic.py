"""Bytes of an exchange."""

from dataclasses import dataclass

__all__ = ["Traffic"]


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
