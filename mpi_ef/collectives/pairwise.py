"""The sums of whole vectors between hosts: every rank sends to one other at a time, and a few short messages are under way.

Where all send to all at once, messages that meet at a host are dropped on their way to it, and sent again. Long messages
ask first whether they may come, and the answer waits behind all that is being sent the other way. Short ones, in pairs, keep
both directions of every link busy, and do not meet.
"""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.attributes import kept_with, mpi_of
from mpi_ef.comm.protocol import Comm
from mpi_ef.kernels.backend import Backend
from mpi_ef.runtime.ending import outliving

from .in_flight import took_off

__all__ = ["PairwiseMean", "apart", "before_free"]

MESSAGE_NBYTES = 60 << 10  # MPI sends up to 64 KiB over TCP without asking
ARRIVING_NBYTES = 16 << 20  # of all ranks, for two blocks; messages are shorter where so many ranks would need more
UNDER_WAY = 8  # messages to others, and as many from them
_TAG = 0x4D46

Vector = NDArray[Any]


class _Apart:
    """A duplicate of a communicator, so that no message meets those of the program."""

    comm: Any = None

    def __init__(self) -> None:
        self.first: list[Callable[[], None]] = []

    def free(self) -> None:
        """Free it. Collective."""
        for call in tuple(self.first):
            call()
        if self.comm is not None:
            self.comm.Free()


def apart(comm: Any) -> Any:
    """Return the duplicate of MPI's `comm`, or `comm`. Collective the first time.

    Where ranks may outlive others, it is `comm`: a rank that waits there for one of the living learns when it is revoked.
    """
    if mpi_of(comm) is None or outliving():
        return comm
    known = kept_with(comm, _Apart)
    if known.comm is None:
        known.comm = comm.Dup()
    return known.comm


def before_free(comm: Any, call: Callable[[], None]) -> Callable[[], None]:
    """Have `call` called when MPI's `comm` is freed, while messages still go; return what takes that back. Local."""
    first = kept_with(comm, _Apart).first
    first.append(call)
    return lambda: first.remove(call) if call in first else None


class PairwiseMean:
    """Forms ``factor`` times the sum of vectors of (d,), in rank order, between the ranks of `comm`. Construction is local.

    The vector is cut into blocks, and every block into a slice for each rank. In step j of a block rank r sends slice
    r + j of its vector there, and receives its own slice of the vector of rank r - j; then it adds what has come, and sends
    the sum in the same steps. Slices of the next but one block travel between the sums of a block, so that no link waits for
    a sum.
    """

    def __init__(self, comm: Comm, d: int, kernels: Backend) -> None:
        self._comm, self._d, self._kernels = comm, d, kernels
        self._size, self._rank = n, rank = int(comm.Get_size()), int(comm.Get_rank())
        itemsize = kernels.dtype.itemsize
        longest = max(1, min(-(-d // n), MESSAGE_NBYTES // itemsize, ARRIVING_NBYTES // (2 * n * itemsize)))
        self._width = n * longest
        self._blocks = -(-d // self._width)
        self._arrived = np.zeros((2, self._width), kernels.dtype)
        ends, whole = self._ends(max(self._blocks - 1, 0)), max(self._blocks - 1, 0)
        shares = self.shares = [whole * longest + high - low for low, high in pairwise(ends)]  # entries that each rank adds
        self.nbytes = int(d + (n - 2) * shares[rank]) * itemsize  # out of this rank, and into it

    def _ends(self, b: int) -> list[int]:
        """Return where slices of block `b` begin and end: that of rank r from entry r of the list to entry r + 1."""
        low, high = b * self._width, min((b + 1) * self._width, self._d)
        size = -(-(high - low) // self._size)
        return [min(low + r * size, high) for r in range(self._size + 1)]

    def form(self, x: Vector, factor: np.floating, out: Vector) -> tuple[bool, float]:
        """Overwrite `out`; return whether this rank's share is finite, and the seconds that sums have taken. Collective."""
        n, rank, finite, seconds = self._size, self._rank, True, 0.0
        coming: list[tuple[list[int], Vector, int]] = []  # of two blocks: ends, rows, how many swaps had begun with its last
        with _Swaps(apart(self._comm), (x, out, self._arrived)) as swaps:
            for b in range(-2, self._blocks):
                if adds := b >= 0:
                    ends, rows, begun = coming.pop(0)
                    swaps.end(begun)
                    began, low, high = perf_counter(), ends[rank], ends[rank + 1]
                    finite &= self._kernels.mean_rows(rows, x[low:high], rank, factor, out[low:high])
                    seconds += perf_counter() - began
                    total = out[low:high]
                if ahead := b + 2 < self._blocks:
                    next_ends = self._ends(b + 2)
                    width = next_ends[rank + 1] - next_ends[rank]
                    next_rows = self._arrived[b % 2, : n * width].reshape(n, width)
                for step in range(1, n):
                    to, source = (rank + step) % n, (rank - step) % n
                    if adds:
                        swaps.begin(total, to, out[ends[source] : ends[source + 1]], source)
                    if ahead:
                        swaps.begin(x[next_ends[to] : next_ends[to + 1]], to, next_rows[source], source)
                if ahead:
                    coming.append((next_ends, next_rows, swaps.begun))
            swaps.end(swaps.begun)
        return bool(finite), seconds


class _Swaps:
    """Messages to a rank, each with one that comes from another, a few of them under way. On an error their memory stays."""

    def __init__(self, comm: Any, memory: tuple[Vector, ...]) -> None:
        self._comm, self._memory = comm, memory
        self._requests: deque[list[Any]] = deque()
        self.begun = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._requests:
            took_off(self, self)

    def begin(self, sent: Vector, to: int, received: Vector, source: int) -> None:
        """Begin one, when few enough are under way. What is empty is not sent."""
        self.end(self.begun - UNDER_WAY + 1)
        self._requests.append([])
        self.begun += 1
        if received.size:
            self._requests[-1].append(self._comm.Irecv(received, source, _TAG))
        if sent.size:
            self._requests[-1].append(self._comm.Isend(sent, to, _TAG))

    def end(self, count: int) -> None:
        """Wait until so many of all that have begun are done."""
        while self.begun - len(self._requests) < count:
            for request in self._requests[0]:
                request.Wait()
            self._requests.popleft()

    def Test(self) -> bool:  # noqa: N802 - as a request of MPI
        return all(request.Test() for requests in self._requests for request in requests)
