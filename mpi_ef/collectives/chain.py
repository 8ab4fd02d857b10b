"""Sums of whole vectors from rank to rank, in their order, and back: where several ranks share the link of a node."""

from collections import deque
from time import perf_counter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.protocol import Comm
from mpi_ef.kernels.backend import Backend

from . import pairwise
from .in_flight import took_off

__all__ = ["ChainMean", "block_nbytes", "is_long"]

_TAG = 0
_FEWEST = 16  # of how many the shortest block is a part of a message

Vector = NDArray[Any]


def block_nbytes(nbytes: int, ranks: int) -> int:
    """Return how long blocks are: all ranks soon have one of a vector of so many bytes, and none is very short. Local."""
    return min(pairwise.MESSAGE_NBYTES, max(pairwise.MESSAGE_NBYTES // _FEWEST, nbytes // ranks))


def is_long(nbytes: int, ranks: int) -> bool:
    """Tell whether so many bytes are enough for a chain of so many ranks, which has a latency for each. Local."""
    return nbytes >= ranks * pairwise.MESSAGE_NBYTES // _FEWEST


class ChainMean:
    """Forms ``factor`` times the sum of vectors of (d,), in rank order, between the ranks of `comm`. Construction is local.

    Block by block every rank gets the sum of those before it, adds its own and passes it on; the last one has the mean, and
    it goes back the same way. With ranks numbered by node a vector leaves a node once on either way, whatever its ranks.
    """

    def __init__(self, comm: Comm, d: int, kernels: Backend) -> None:
        self._comm, self._kernels = comm, kernels
        self._size, self._rank = int(comm.Get_size()), int(comm.Get_rank())
        longest = max(1, block_nbytes(d * kernels.dtype.itemsize, self._size) // kernels.dtype.itemsize)
        self._blocks = [slice(low, min(low + longest, d)) for low in range(0, d, longest)]
        ends = (self._rank > 0) + (self._rank < self._size - 1)
        self.nbytes = ends * d * kernels.dtype.itemsize  # out of this rank, and into it

    def form(self, x: Vector, factor: np.floating, out: Vector) -> tuple[bool, float]:
        """Overwrite `out`; return whether the last rank's sum is finite, and the seconds of sums. Collective."""
        rank, last, finite, seconds = self._rank, self._size - 1, True, 0.0
        comm = pairwise.apart(self._comm)
        with _Passing(comm, out, self._blocks, (x, out)) as passing:
            for block in passing.through(rank - 1 if rank else None, rank + 1 if rank < last else None):
                began = perf_counter()
                if rank:
                    self._kernels.add_dense(x[block], float(factor), out[block])
                else:
                    np.multiply(x[block], factor, out=out[block])
                if rank == last:
                    finite &= bool(self._kernels.all_finite(out[block]))
                seconds += perf_counter() - began
            for _ in passing.through(rank + 1 if rank < last else None, rank - 1 if rank else None):
                continue
        return finite, seconds


class _Passing:
    """Blocks of an array that come from one rank and go on to another, a few under way. On an error their memory stays."""

    def __init__(self, comm: Any, array: Vector, blocks: list[slice], memory: tuple[Vector, ...]) -> None:
        self._comm, self._array, self._blocks, self._memory = comm, array, blocks, memory
        self._coming: deque[Any] = deque()
        self._going: deque[Any] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._coming or self._going:
            took_off(self, self)

    def through(self, source: int | None, to: int | None) -> Any:
        """Yield every block when it has come, if it comes from a rank, and let it go on then."""
        ahead = iter(self._blocks)
        for block in self._blocks:
            while source is not None and len(self._coming) < pairwise.UNDER_WAY:
                if (following := next(ahead, None)) is None:
                    break
                self._coming.append(self._comm.Irecv(self._array[following], source, _TAG))
            if source is not None:
                self._coming[0].Wait()
                self._coming.popleft()
            yield block
            if to is not None:
                if len(self._going) == pairwise.UNDER_WAY:
                    self._going[0].Wait()
                    self._going.popleft()
                self._going.append(self._comm.Isend(self._array[block], to, _TAG))
        while self._going:
            self._going[0].Wait()
            self._going.popleft()

    def Test(self) -> bool:  # noqa: N802 - as a request of MPI
        return all(request.Test() for request in (*self._coming, *self._going))
