"""One rank that decides, and workers of which it awaits some: who is late, stopped, resumed or dead stops nobody.

The server gives each worker one *order* at a time, and the next one when that was answered: nothing is concluded from a send
that has completed (see late.py), so that a worker that was stopped finds one old order, and not all that it has missed. The
server's receives are posted all the time, and it looks at what has come and rests between; a worker does the same.

::

    server   order (step >= 0) ...........................  last order (step < 0)  verdict (who is missing)
    worker                       answer (the same step)                              last answer (step < 0)
"""

import atexit
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import counted, say
from mpi_ef.runtime.ending import end_without_all

from .ends import AT_EXIT, DROPPED, FAILED, LAST, later, send_all
from .late import Frame, Late

__all__ = ["Server"]

_LONGEST_LOOK = 0.1  # seconds between two looks that count as waiting: a server that was stopped itself has not waited
_LEAST_SECONDS = 5.0  # that the end looks for what has come since the last look, before it says that a worker is silent


class Server:
    """The rank that decides. All is local; workers build a :class:`Worker` at the same time.

    Parameters
    ----------
    comm : Communicator
    hosts : mapping of int to str
        The node of each worker, by rank.
    order_nbytes, answer_nbytes : int
        Sizes of the wires of orders and answers.
    number : int
        As :class:`Late`'s.
    patience_seconds : float
        For :meth:`wait` and :meth:`close`.

    Attributes
    ----------
    under_way : dict of int to int
        The step of the order that a worker has and has not answered yet, by rank.
    since : dict of int to float
        When a worker was given that, in seconds of :meth:`now`.
    """

    def __init__(self, comm: Comm, hosts: Mapping[int, str], order_nbytes: int, answer_nbytes: int, number: int,
                 patience_seconds: float) -> None:
        self._comm, self.hosts, self.patience_seconds = comm, dict(hosts), patience_seconds
        self._late = Late(comm, list(hosts), order_nbytes, answer_nbytes, number)
        self.now: Callable[[], float] = self._late.now
        self.under_way: dict[int, int] = {}
        self.since: dict[int, float] = {}
        self.ended: set[int] = set()  # workers that have sent their last answer
        self._waits_for: set[int] = set()  # for whom MPI would wait at its end
        self.closed = self._abandoned = False
        self._settling: Callable[[], None] | None = None  # takes back that it is settled at the end
        self._dropped = weakref.finalize(self, send_all, self._late, tuple(hosts), DROPPED)

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank so far."""
        return self._late.sent_nbytes

    @property
    def gone(self) -> set[int]:
        """Workers that MPI has said are dead."""
        return self._late.gone

    def frame(self) -> Frame:
        """Return a frame for an order, with one user."""
        return self._late.frame()

    def drop(self, frame: Frame) -> None:
        """Have one user less."""
        self._late.drop(frame)

    def free(self, rank: int) -> bool:
        """Tell whether a worker has answered what it was given."""
        return rank not in self.under_way and rank not in self._late.gone and rank not in self.ended

    def order(self, rank: int, frame: Frame, nbytes: int | None = None) -> None:
        """Give a worker that is free its next order, or the first `nbytes` of its wire."""
        self.under_way[rank], self.since[rank] = frame.step, self.now()
        self._late.send(rank, frame, nbytes)

    def still(self, rank: int, step: int) -> None:
        """Say that what has come from a worker was not all of its answer."""
        self.under_way[rank] = step

    def also(self, rank: int, frame: Frame, nbytes: int | None = None) -> None:
        """Send a free worker something that needs no answer, before its next order, or the first `nbytes` of its wire."""
        self._late.send(rank, frame, nbytes)

    def look(self) -> list[tuple[int, Frame]]:
        """Return what has come: ranks and frames, whose one user is the caller. Does not wait."""
        arrived = self._late.poll()
        for rank, frame in arrived:
            if frame.step < 0:
                self.ended.add(rank)
            self.under_way.pop(rank, None)
        return arrived

    def looks(self, patience: float | None = None) -> Iterator[list[tuple[int, Frame]]]:
        """Yield what has come, again and again, until nothing has come for so many seconds."""
        patience, waited, before = self.patience_seconds if patience is None else patience, 0.0, self.now()
        while True:
            arrived = self.look()
            yield arrived
            if waited > patience:
                return
            if not arrived:
                self._late.rest()
            now = self.now()
            took, before = now - before, now
            waited = 0.0 if arrived else waited + min(took, _LONGEST_LOOK)
            if took > _LONGEST_LOOK:  # nor has a worker been silent while nobody looked
                for rank in self.since:
                    self.since[rank] += took - _LONGEST_LOOK

    def wait(self, enough: Callable[[], bool], take: Callable[[int, Frame], None]) -> bool:
        """Hand over what comes until there is enough; return False where nothing comes for as long as patience is.

        `take` drops the frame. What it does may make :meth:`order`.
        """
        for arrived in self.looks():
            for rank, frame in arrived:
                take(rank, frame)
            if enough():
                return True
            if not self.under_way and not arrived:
                return False  # nobody is left to wait for
        return False

    def listed(self, ranks: object) -> str:
        """Return "rank 3 on node1, rank 7 on node2", the first eight of them."""
        them = sorted(ranks)  # type: ignore[call-overload]
        more = f" and {len(them) - 8} more" if len(them) > 8 else ""
        return ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in them[:8]) + more

    def close(self, last: Frame, take: Callable[[int, Frame], None], subject: str, *,
              at_exit: bool = False) -> tuple[int, ...]:
        """Send the last order to each worker, when it has answered the one before, and wait for their last answers.

        A worker that has been silent for `patience_seconds` is not waited for. With `at_exit` all are sent the last order at
        once, and are waited for at the end of Python; workers do the same.

        Parameters
        ----------
        last : Frame
            Its step is made that of a last order.
        take : callable
            Gets late answers, and drops them.
        subject : str
            Of the line on stderr about those that have not ended.

        Returns
        -------
        tuple of int
            Ranks that have not ended. MPI_Finalize would wait for them: at the end of Python all processes are ended,
            after the other workers have come to their end.
        """
        if self.closed:
            return tuple(sorted(self._waits_for))
        last.step = (AT_EXIT if at_exit else LAST) + max(0, last.step)
        self._take, self._subject, begun = take, subject, self.now()
        told = set[int]()
        if at_exit:
            for rank in set(self.hosts) - self.ended:
                self._late.send(rank, last)
                self.since[rank] = begun
            self._dropped.detach()
            self.closed = True
            self._settling = later(self._comm, self.settle)
            return ()
        for arrived in self.looks(float("inf")):
            self._take_last(arrived)
            for rank in self.hosts:
                if rank not in told and self.free(rank):
                    told.add(rank)
                    self.order(rank, last)
            if self._all_ended():
                break
        return self._settled()

    def settled(self) -> bool:
        """Tell whether all have ended, after a close `at_exit`; nothing is left to do at the end of Python then."""
        if self._settling is not None:
            self._take_last(self.look())
            if not set(self.hosts) <= self.ended:
                return False
            self._settle()
        return True

    def settle(self, status: int = 1) -> None:
        """Wait for the last answers, after a close `at_exit`, and leave with this status, see :meth:`leave`."""
        if self._settling is None:
            return
        longest = self.now() - self.patience_seconds + min(self.patience_seconds, _LEAST_SECONDS)
        for rank, since in self.since.items():
            self.since[rank] = max(since, longest)
        for arrived in self.looks(float("inf")):
            self._take_last(arrived)
            if self._all_ended():
                break
        self._settle()
        self.leave(status)

    def _settle(self) -> None:
        if self._settling is not None:
            self._settling()
        self._settling = None
        self._settled()

    def _take_last(self, arrived: list[tuple[int, Frame]]) -> None:
        for rank, frame in arrived:
            self.since[rank] = self.now()
            if frame.step >= 0:
                self._take(rank, frame)
            else:
                self._late.drop(frame)

    def _all_ended(self) -> bool:
        """Tell whether nobody is left to wait for: all others are dead, or were silent for long."""
        now = self.now()
        return all(now - self.since.setdefault(rank, now) > self.patience_seconds for rank in self.hosts
                   if rank not in self.ended and rank not in self._late.gone)

    def _settled(self) -> tuple[int, ...]:
        self.closed = True
        self._dropped.detach()
        self._waits_for = set(self.hosts) - self.ended
        send_all(self._late, sorted(self.ended), LAST + len(self._waits_for))
        if self._waits_for:
            atexit.register(self.leave)
            say(sys.stderr, f"mpi-ef: {self._subject}: {self.listed(self._waits_for)} did not come to the end; MPI_Finalize "
                            "would wait for ever, so that all processes are ended when the others have come to theirs\n")
        self._late.close()
        return tuple(sorted(self._waits_for))

    def leave(self, status: int = 1) -> None:
        """End all processes, where MPI_Finalize would wait for workers that have not ended; where all have, return.

        It waits for the other workers to come to the end of their programs, as long as its patience is. It is called at the
        end of Python with status 1.
        """
        if self._settling is not None:
            self.settle(status)
        atexit.unregister(self.leave)
        if (mpi := mpi_of(self._comm)) is None or not self._waits_for or mpi.Is_finalized():
            return
        if self._abandoned:
            say(sys.stderr, f"mpi-ef: rank {self._comm.Get_rank()}, the server, has left its workers after an error; all "
                            "processes are ended\n")
        self._late.meet(sorted(self.ended), self.patience_seconds)
        end_without_all(mpi.COMM_WORLD, status)

    def abandon(self) -> None:
        """Wait for nobody: after an error. Workers are told, and at the end of Python all processes are ended."""
        if not self.closed:
            self.closed = self._abandoned = True
            self._dropped.detach()
            send_all(self._late, tuple(self.hosts), FAILED)
            self._waits_for = set(self.hosts) - self.ended
            self.ended.clear()
            self._late.close()
            if self._waits_for:
                atexit.register(self.leave)

    def __str__(self) -> str:
        return f"server of {counted(len(self.hosts), 'worker')}"
