"""Messages between two ranks for which nobody has to wait: some ranks may be late, stopped, resumed, silent, or lie.

::

    frame   | step (i64), negative: the last one of its sender | wire, of one size |

A collective cannot tell which rank is missing, and none goes on without it. Here every rank sends to each of its peers by
itself, and takes what comes:

* One receive per peer is posted all the time. What has come is handed over in its memory, and the next one has other memory.
* A send owns its frame until MPI is done with it; a frame may be under way to several peers. That a send is done does not
  say that it was received: MPICH ends short ones at once. Nothing follows from it but that the memory is free. How much is
  sent to a peer before it answers is for the caller to limit, by what has come from it.
* A rank that waits looks, and rests for 20 us, then longer, up to 1 ms: it needs no core of its own.
* Sends are never cancelled: MPI 4 has deprecated it, and it may not return. Receives are, at the end.
"""

import atexit
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from time import monotonic, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.protocol import Comm
from mpi_ef.runtime.timeouts import wait_until

from .frames import LARGEST_COUNT
from .in_flight import outlives, took_off
from .pairwise import apart

__all__ = ["LONGEST_NBYTES", "Frame", "Late", "next_number"]

_HEADER_NBYTES = 8
LONGEST_NBYTES = LARGEST_COUNT - _HEADER_NBYTES  # of a wire
_SHORTEST_REST, _LONGEST_REST = 20e-6, 1e-3  # seconds
_ENDING_SECONDS = 1.0  # for a receive that was cancelled after its message had begun to come
_FIRST_TAG, _TAGS = 0x4E00, 0x2000
_MEETING_TAG = 0x4DFF
_numbers = count()


def next_number() -> int:
    """Return a `number` that nothing else of this process has. Local; ranks take that of rank 0."""
    return next(_numbers)


class Frame:
    """Memory of a message: its step, and its wire, (nbytes,) uint8. It is used again when all its users have dropped it."""

    __slots__ = ("_step", "bytes", "users", "wire")

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.zeros(_HEADER_NBYTES + nbytes, np.uint8)
        self._step, self.wire = self.bytes[:_HEADER_NBYTES].view(np.int64), self.bytes[_HEADER_NBYTES:]
        self.users = 1

    @property
    def step(self) -> int:
        """What the header says."""
        return int(self._step[0])

    @step.setter
    def step(self, step: int) -> None:
        self._step[0] = step


class Late:
    """Frames between this rank and each of its `peers`, as they come. Construction is collective; all else is local.

    Memory: two frames for each peer, one under way and one that is looked at, and as many as are held beyond.

    Parameters
    ----------
    comm : Communicator
        MPI's, of which a duplicate is used, so that no message meets those of the program; or of virtual ranks.
    peers : sequence of int
        Ranks; each of them has this one among its own.
    send_nbytes, receive_nbytes : int
        Sizes of the wires that go to a peer, and come from one.
    number : int
        The same on all ranks, and another one for each that is in use on this communicator.

    Attributes
    ----------
    gone : set of int
        Peers of which MPI has said that they are dead: nothing is sent there or received any more.
    garbled : int
        Messages that were too long for a frame.
    sent_nbytes : int
    """

    def __init__(self, comm: Comm, peers: Sequence[int], send_nbytes: int, receive_nbytes: int, number: int) -> None:
        self._mpi, self._comm = mpi_of(comm), apart(comm)
        self._tag = _FIRST_TAG + number % _TAGS
        self._pause = getattr(comm, "pause", sleep)  # virtual ranks have a clock of their own
        self.now = getattr(comm, "clock", monotonic)
        self._rest = _SHORTEST_REST
        self._send_nbytes, self._receive_nbytes = send_nbytes, receive_nbytes
        self._free: dict[int, list[Frame]] = {send_nbytes: [], receive_nbytes: []}
        self._sends: dict[int, deque[tuple[Any, Frame]]] = {peer: deque() for peer in peers}
        self._receives: dict[int, tuple[Any, Frame]] = {}
        self.gone: set[int] = set()
        self.garbled = self.sent_nbytes = 0
        for peer in peers:
            self.listen(peer)
        self._end = weakref.finalize(self, _leave, self._mpi, self._receives, self._sends)

    def frame(self) -> Frame:
        """Return a frame to send, with one user: who asks."""
        return self._new(self._send_nbytes)

    def drop(self, frame: Frame) -> None:
        """Have one user less."""
        frame.users -= 1
        if not frame.users:
            self._free[frame.wire.size].append(frame)

    def send(self, peer: int, frame: Frame, nbytes: int | None = None) -> None:
        """Send a frame, or the first `nbytes` of its wire; it does not change until MPI is done with it. Does not wait."""
        if peer in self.gone:
            return
        sent = frame.bytes if nbytes is None else frame.bytes[: _HEADER_NBYTES + nbytes]
        try:
            request = self._comm.Isend(sent, peer, self._tag)
        except Exception as error:
            self._lose(peer, error)
            return
        frame.users += 1
        self.sent_nbytes += sent.nbytes
        self._sends[peer].append((request, frame))

    def under_way(self, peer: int) -> int:
        """Return how many frames to a peer MPI has not done with."""
        return len(self._sends[peer])

    def poll(self) -> list[tuple[int, Frame]]:
        """Return what has come since the last call, at most one frame of each peer; each has one user, the caller.

        Does not wait.
        """
        arrived = []
        for peer, sends in self._sends.items():
            while sends and self._done(peer, sends[0][0]):
                self.drop(sends.popleft()[1])
        for peer, (request, frame) in list(self._receives.items()):
            if self._done(peer, request):
                del self._receives[peer]
                if frame.step >= 0:
                    self.listen(peer)
                arrived.append((peer, frame))
        if arrived:
            self._rest = _SHORTEST_REST
        return arrived

    def rest(self) -> None:
        """Pause, a little longer each time until something comes."""
        self._pause(self._rest)
        self._rest = min(2 * self._rest, _LONGEST_REST)

    def meet(self, peers: Iterable[int], seconds: float) -> bool:
        """Return True once all these peers have called it as well, False after so many seconds. Collective between them."""
        word, requests = np.zeros(1, np.uint8), list[Any]()
        for peer in peers:
            with suppress(Exception):  # of MPI, where it has died
                room = np.zeros(1, np.uint8)
                requests += [self._comm.Irecv(room, peer, _MEETING_TAG), self._comm.Isend(word, peer, _MEETING_TAG)]
                outlives((room, word))
        return wait_until(lambda: all(request.Test() for request in requests), seconds, rest=_LONGEST_REST)

    def word_at_the_end(self, step: int) -> Callable[[], None]:
        """Send this step to all peers, with an empty wire, at the end of Python, unless what is returned is called.

        Also when this object is no more. Peers that have dropped theirs do not miss it.
        """
        word = np.zeros(_HEADER_NBYTES, np.uint8)
        word.view(np.int64)[0] = step
        told = partial(_tell, self._mpi, self._comm, self._tag, tuple(self._sends), word)
        atexit.register(told)
        return partial(atexit.unregister, told)

    def close(self) -> None:
        """Receive no more. What is still being sent keeps its memory."""
        self._end.detach()
        for entry in _cancelled(self._mpi, self._receives, self._sends):
            took_off(entry, entry[0])

    def _new(self, nbytes: int) -> Frame:
        if not self._free[nbytes]:
            return Frame(nbytes)
        frame = self._free[nbytes].pop()
        frame.users = 1
        return frame

    def listen(self, peer: int) -> None:
        """Post the receive for a peer whose final message has come, or that has none yet."""
        frame = self._new(self._receive_nbytes)
        frame.step = 0
        try:
            self._receives[peer] = self._comm.Irecv(frame.bytes, peer, self._tag), frame
        except Exception as error:
            self._lose(peer, error)

    def _done(self, peer: int, request: Any) -> bool:
        if peer in self.gone:
            return False
        try:
            return bool(request.Test())
        except Exception as error:
            self._lose(peer, error)
            return False

    def _lose(self, peer: int, error: Exception) -> None:
        """Send nothing to a peer and receive nothing from it any more, after an error of MPI."""
        if self._mpi is None or not isinstance(error, self._mpi.Exception):
            raise error
        if error.Get_error_class() == self._mpi.ERR_TRUNCATE:
            self.garbled += 1
            self.listen(peer)
            return
        self.gone.add(peer)


def _cancelled(mpi: Any, receives: dict[int, tuple[Any, Frame]], sends: dict[int, deque[tuple[Any, Frame]]]) -> list[Any]:
    """Cancel receives; return requests and frames that MPI has not done with."""
    left = [entry for waiting in sends.values() for entry in waiting]
    if mpi is None or not mpi.Is_finalized():
        for entry in receives.values():
            with suppress(Exception):  # of MPI, where a peer has died
                entry[0].Cancel()
                if wait_until(entry[0].Test, _ENDING_SECONDS, rest=1e-3):
                    continue
            left.append(entry)
    receives.clear()
    return left


def _tell(mpi: Any, comm: Any, tag: int, peers: Iterable[int], word: NDArray[np.uint8]) -> None:
    if mpi is None or mpi.Is_finalized():
        return
    outlives(word)
    for peer in peers:
        with suppress(Exception):  # of MPI, where it has died, or the communicator is no more
            comm.Isend(word, peer, tag)


def _leave(mpi: Any, receives: dict[int, tuple[Any, Frame]], sends: dict[int, deque[tuple[Any, Frame]]]) -> None:
    for entry in _cancelled(mpi, receives, sends):
        outlives(entry)
