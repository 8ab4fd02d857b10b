"""A rank that works for a server, see server.py."""

import atexit
import weakref
from collections.abc import Callable

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import PeerError
from mpi_ef.runtime.ending import end_without_all, outliving

from .ends import DROPPED, FAILED, LAST, later, send_all
from .late import Frame, Late

__all__ = ["Worker"]


class Worker:
    """A rank that works for the server. All is local.

    Parameters
    ----------
    comm, order_nbytes, answer_nbytes, number, patience_seconds
        As the :class:`Server`'s.
    server : int
        Its rank.
    """

    def __init__(self, comm: Comm, server: int, order_nbytes: int, answer_nbytes: int, number: int,
                 patience_seconds: float) -> None:
        self._comm, self._server, self.patience_seconds = comm, server, patience_seconds
        self._late = Late(comm, [server], answer_nbytes, order_nbytes, number)
        self.now: Callable[[], float] = self._late.now
        self.closed = False
        self._settling: Callable[[], None] | None = None  # takes back that it is settled at the end
        self._dropped = weakref.finalize(self, send_all, self._late, (server,), LAST)

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank so far."""
        return self._late.sent_nbytes

    def next(self) -> Frame:
        """Wait for the next order, however long that takes; its step is negative where it is the last one.

        The caller is its one user.

        Raises
        ------
        PeerError
            The server has failed, or is dead. It has time to save something, and to end all processes, before.
        """
        while not (arrived := self._late.poll()):
            if self._server in self._late.gone:
                raise PeerError(f"worker {self._comm.Get_rank()}: the server, rank {self._server}, is dead; start again "
                                "from what it has saved")
            self._late.rest()
        frame = arrived[0][1]
        if frame.step == DROPPED:
            raise PeerError(f"worker {self._comm.Get_rank()}: the server, rank {self._server}, has gone without close(); "
                            "call it when its work is done")
        if frame.step == FAILED:
            end = self.now() + self.patience_seconds
            while self.now() < end:
                self._late.rest()
            raise PeerError(f"worker {self._comm.Get_rank()}: the server, rank {self._server}, has failed; see what it "
                            "has said")
        return frame

    def frame(self) -> Frame:
        """Return a frame for an answer, with one user."""
        return self._late.frame()

    def drop(self, frame: Frame) -> None:
        """Have one user less."""
        self._late.drop(frame)

    def answer(self, frame: Frame, nbytes: int | None = None) -> None:
        """Send an answer, whose step is that of the order, or the first `nbytes` of its wire."""
        self._late.send(self._server, frame, nbytes)

    def close(self, *, at_exit: bool = False) -> None:
        """Answer the last order, and wait for the server's verdict on who has come to the end; or at Python's end."""
        if self.closed:
            return
        self.closed = True
        self._dropped.detach()
        self._late.listen(self._server)
        send_all(self._late, (self._server,), LAST)
        if not at_exit:
            self._settle(self.next())
        else:
            self._settling = later(self._comm, self.settle)

    def settled(self) -> bool:
        """Tell whether the verdict is here, after a close `at_exit`; nothing is left to do at the end of Python then."""
        for _, verdict in self._late.poll() if self._settling is not None else ():
            self._settle(verdict)
        return self._settling is None

    def settle(self, status: int = 1) -> None:  # noqa: ARG002 - it is the server's
        """Wait for the verdict, after a close `at_exit`, and leave where some ranks are missing."""
        if self._settling is not None and self._settle(self.next()):
            self.leave()

    def _settle(self, verdict: Frame) -> bool:
        """Take the verdict; return whether some ranks are missing."""
        if self._settling is not None:
            self._settling()
        self._settling = None
        missing = verdict.step != LAST
        if missing:
            atexit.register(self.leave)
        self._late.drop(verdict)
        while self._late.under_way(self._server):
            self._late.poll()
            self._late.rest()
        self._late.close()
        return missing

    def leave(self) -> None:
        """Tell the server that this rank has come to its end, which ends all processes then."""
        atexit.unregister(self.leave)
        if (mpi := mpi_of(self._comm)) is not None and not mpi.Is_finalized():
            self._late.meet([self._server], self.patience_seconds)
            if outliving():
                end_without_all(mpi.COMM_WORLD, 0)
