"""Communicators of the optimizers' own: a rank can leave one and be missed; exchanges of others may stay unanswered."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import current_thread, main_thread
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.in_flight import landed, let_go, took_off
from mpi_ef.collectives.ways import ways_of
from mpi_ef.comm.attributes import kept_with, mpi_of
from mpi_ef.comm.consensus import gather_values, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import say

__all__ = ["Lane", "Line", "line_for", "newest_line"]

PATIENCE_SECONDS = 60.0  # before a rank that waits says so
_HEARING_SECONDS = 1.0  # for the others that wait to say so as well
_LOOK_EVERY = 1000  # calls of Test
_TAG = 0x4D45
Bytes = NDArray[np.uint8]


class Line:
    """Messages of one size from every rank to every rank, apart from whatever else `comm` is used for.

    All optimizers of a communicator have one, so that ranks in steps of different ones meet. MPI's `comm` is duplicated;
    others are used as they are, and no rank leaves them. Construction is collective.
    """

    def __init__(self, comm: Comm) -> None:
        self._mpi = mpi_of(comm)
        mpi_comm: Any = comm
        self._comm: Any = mpi_comm.Dup() if self._mpi else comm
        self._now: Callable[[], float] = getattr(comm, "clock", perf_counter)  # virtual ranks have one of their own
        self._users = 0
        self._left: Any = None  # the request of a farewell
        self._farewell: Bytes | None = None  # of the optimizer that was the last to go
        self.gone: list[int] = []  # ranks that have left while this one went on: nothing can be said here any more
        self._memory: tuple[Bytes, Bytes] | None = None

    @property
    def state(self) -> str:
        """What this rank knows: "open", "left" by it, or "over"."""
        return "over" if self.gone else "open" if self._left is None else "left"

    def enter(self) -> None:
        """Count an optimizer that uses it. Collective where all ranks had left it."""
        if self._left is not None:
            self._left.Wait()
            landed(self)
            self._left = None
        self._users += 1

    def allgather(self, mine: Bytes, answers: Bytes, what: Callable[[], str]) -> float:
        """Send `mine` to all ranks, receive `answers`, and return how many seconds this rank has waited. Collective.

        A rank that waits for over a minute says on stderr in `what`, and for which ranks.
        """
        if self._mpi is None:
            began = self._now()
            self._comm.Allgather(mine, answers)
            return self._now() - began
        request, began, calls, told = self._comm.Iallgather(mine, answers), perf_counter(), 0, False
        while not request.Test():
            calls += 1
            if not told and calls % _LOOK_EVERY == 0 and perf_counter() - began > PATIENCE_SECONDS:
                told = True
                self._miss(request, what())
        return perf_counter() - began

    def _miss(self, request: Any, what: str) -> None:
        """Say who waits for whom: ranks that wait tell each other."""
        comm, mpi, one = self._comm, self._mpi, np.zeros(1, np.uint8)
        own, ranks = comm.Get_rank(), range(comm.Get_size())
        for rank in ranks:
            if rank != own:
                took_off([one], comm.Isend(one, rank, _TAG))
        missing, until = set(ranks) - {own}, perf_counter() + _HEARING_SECONDS
        while perf_counter() < until and not request.Test():
            status = mpi.Status()
            if comm.Iprobe(mpi.ANY_SOURCE, _TAG, status):
                comm.Recv(np.zeros(1, np.uint8), status.Get_source(), _TAG)
                missing.discard(status.Get_source())
        if missing:
            say(sys.stderr, f"mpi-ef: rank {own} has waited for {PATIENCE_SECONDS:.0f} s in {what} for "
                            f"{ranks_text(sorted(missing))}\n")

    @contextmanager
    def held(self) -> Iterator[str]:
        """Yield the state, which stays what it is in the block, also where optimizers are collected there. Local."""
        holds = self._left is None
        self._users += holds
        try:
            yield self.state
        finally:
            if holds:
                self._release()

    def leave(self, mine: Bytes) -> None:
        """Count an optimizer that uses it no longer. The last one sends `mine` without waiting for the others. Local.

        Whoever comes to the next :meth:`allgather` receives it.
        """
        self._farewell = mine.copy()
        self._release()

    def _release(self) -> None:
        mpi, self._users = self._mpi, self._users - 1
        if self._users or mpi is None or self.gone or self._farewell is None or mpi.Is_finalized() or not self._comm:
            return
        if current_thread() is not main_thread() and mpi.Query_thread() < mpi.THREAD_MULTIPLE:
            return
        self._memory = self._farewell, np.empty(self._farewell.size * self._comm.Get_size(), np.uint8)
        self._left = self._comm.Iallgather(*self._memory)
        took_off(self, self._left)


class _Lines(list[Line]):
    """The lines made for a communicator so far, in the same order on all ranks."""


def _lines(comm: Comm) -> list[Line]:
    """Return the lines made for `comm` so far; none of others than MPI's, nor of one that was freed."""
    return [] if mpi_of(comm) is None or not comm else kept_with(comm, _Lines)


def newest_line(comm: Comm) -> AbstractContextManager[str]:
    """Return a context that yields the state of the newest line of `comm`, as this rank knows it, and keeps it so. Local."""
    lines = _lines(comm)
    return lines[-1].held() if lines else nullcontext("none")


def line_for(comm: Comm, states: set[str]) -> Line:
    """Return the line for another optimizer: the newest one where it is in one state on all ranks, or a new one. Collective.

    `states` is what :func:`newest_line` has yielded on the ranks; its block has not ended.
    """
    lines = _lines(comm)
    if states not in ({"open"}, {"left"}):
        lines.append(Line(comm))
    lines[-1].enter()
    return lines[-1]


class _Lanes:
    """The lanes of a communicator, numbered alike on all ranks, as far as this rank knows them."""

    def __init__(self) -> None:
        self.comms: list[Comm] = []
        self.closed: dict[int, tuple[int, int]] = {}  # of those that no optimizer has: exchanges started, second rounds


class Lane:
    """A communicator that the buckets of one optimizer have for themselves. Construction is collective.

    What a rank has sent in a backward pass is never answered where another rank has left before. A later optimizer gets the
    same communicator only where all ranks have started as many exchanges there; MPI's `comm` is duplicated where there is
    none, others are used as they are.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.closed = False  # nothing may be sent any more: the optimizer is gone, its hooks of autograd may not be
        self.started = 0  # exchanges of this rank
        if mpi_of(comm) is None:
            self._lanes, self._number = _Lanes(), 0
            return
        let_go()  # of optimizers that were dropped in a backward pass
        lanes = kept_with(comm, _Lanes)
        if not lanes.closed and lanes.comms:
            gc.collect()  # optimizers that schedulers refer to, for example
        first, *others = gather_values(comm, "the lanes of an optimizer", list(lanes.closed.items()))
        alike = set(first).intersection(*others)
        if not alike:
            mpi_comm: Any = comm
            lanes.comms.append(mpi_comm.Dup())
            ways = ways_of(lanes.comms[-1])
            ways.queue, ways.second = [], mpi_comm.Dup()
        self._number, _ = min(alike, default=(len(lanes.comms) - 1, 0))
        lanes.closed.pop(self._number, None)
        self.comm, self._lanes = lanes.comms[self._number], lanes
        ways_of(self.comm).direct = ways_of(comm).direct

    def close(self) -> None:
        """Leave it to later optimizers, as it is. Local."""
        self.closed = True
        ways = ways_of(self.comm)
        waiting = ways.queue or []
        self._lanes.closed[self._number] = self.started - len(waiting), ways.begun
        waiting.clear()
        ways.later.clear()
