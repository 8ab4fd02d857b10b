"""Virtual ranks: threads in one process that communicate through a stand-in for an MPI communicator.

A program written for ``MPI.Comm`` runs on any number of them, without MPI and without processes, and gives the bits
that real ranks give. Only the calls that mpi_ef makes exist.
"""

import pickle
import threading
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np

from mpi_ef.comm.attributes import DerivedCalls
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import MpiEfError

__all__ = ["Request", "VirtualComm", "results", "run"]

patience_seconds = 240.0  # for a rank to finish
world: Comm | None = None  # real ranks, on which programs for as many run; set by the plugin for pytest


class DeadlockError(AssertionError):
    """Ranks wait for others that have come to their end, or failed."""


class _Turns:
    """What all ranks share. They take turns: a rank runs until it needs what another one has not sent yet, or pauses."""

    def __init__(self, size: int, ranks_per_node: int = 1, *, eager: bool = False) -> None:
        self.ranks_per_node, self.eager = ranks_per_node, eager
        self._turns = [threading.Lock() for _ in range(size)]  # held where it is not that rank's turn
        self.ready = deque(range(size))  # ranks that only wait for their turn
        self.waiting: dict[int, str] = {}  # by rank, in which collective
        self.broken = ""
        self.now = 0.0  # seconds of a clock that goes on where all ranks wait or pause
        self._pausing: list[tuple[float, int, int]] = []  # a heap: until when, in which order they began, who
        self._pauses = 0
        for turn in self._turns:
            turn.acquire()

    def enter(self, rank: int) -> None:
        """Wait for the next turn of a rank."""
        self._turns[rank].acquire()

    def next(self) -> None:
        """Let another rank run. Where all that are left wait for one that has ended, let them fail."""
        if not self.ready and self._pausing:
            self.now, _, rank = heappop(self._pausing)
            self.ready.append(rank)
        if not self.ready and self.waiting:
            self.fail("have come to their end")
        if self.ready:
            self._turns[self.ready.popleft()].release()

    def pause(self, rank: int, seconds: float) -> None:
        """Let others run until the clock is so many seconds on."""
        self._pauses += 1
        heappush(self._pausing, (self.now + seconds, self._pauses, rank))
        self.next()
        self.enter(rank)
        if self.broken:
            raise DeadlockError(self.broken)

    def fail(self, how: str) -> None:
        """Let all ranks that wait, or will, fail."""
        waiting = ", ".join(f"rank {rank} in {call}" for rank, call in sorted(self.waiting.items()))
        self.broken = self.broken or f"ranks {how}; those that wait for them: {waiting or 'none yet'}"
        self.ready.extend(self.waiting)
        self.waiting = {}


class _World:
    """The ranks of a communicator, by their number among all, and what they share."""

    def __init__(self, size: int, turns: _Turns | None = None, members: Sequence[int] = ()) -> None:
        self.size, self.members, self.turns = size, members or range(size), turns or _Turns(size)
        self._arrived: dict[int, tuple[Any, Any]] = {}  # by rank, in the collective that some wait in
        self._complete: list[tuple[Any, Any]] = []  # the same of all ranks, in the last one that all have made
        self._split: list[tuple[Any, Any]] = []  # the last one that was a split
        self._parts: dict[int, _World] = {}  # which it has made, by color
        self._mail: dict[Any, deque[np.ndarray]] = {}  # messages to one rank, by sender, receiver and tag
        self._expecting: dict[int, Any] = {}  # by rank, which of these it waits for

    def post(self, place: Any, message: np.ndarray) -> None:
        """Leave a message at its place, (sender, receiver, tag)."""
        self._mail.setdefault(place, deque()).append(message)
        if self._expecting.get(place[1]) == place:
            del self._expecting[place[1]]
            if self.turns.waiting.pop(self.members[place[1]], None):
                self.turns.ready.append(self.members[place[1]])

    def there(self, place: Any) -> bool:
        """Tell whether there is a message at its place."""
        return bool(self._mail.get(place))

    def taken(self, place: Any, message: np.ndarray) -> bool:
        """Tell whether a message that was left there has been collected."""
        return not any(left is message for left in self._mail.get(place, ()))

    def collect(self, place: Any) -> np.ndarray:
        """Return the first message at its place, when it is there."""
        turns, mine = self.turns, self.members[place[1]]
        if not self._mail.get(place) and not turns.broken:
            self._expecting[place[1]], turns.waiting[mine] = place, "Irecv"
            turns.next()
            turns.enter(mine)
        if not self._mail.get(place):
            raise DeadlockError(turns.broken)
        return self._mail[place].popleft()

    def share(self, rank: int, kind: Any, value: Any) -> list[Any]:
        """Return the values of all ranks, when all have come here. They are what the ranks share, not copies."""
        before, turns, mine = self._complete, self.turns, self.members[rank]
        if not turns.broken:
            self._arrived[rank] = kind, value
            if len(self._arrived) == self.size:
                self._complete = [self._arrived.pop(r) for r in range(self.size)]
                others = [member for member in self.members if member != mine]
                turns.ready.extend(others)
                for member in others:
                    del turns.waiting[member]
            else:
                turns.waiting[mine] = kind[0]
                turns.next()
                turns.enter(mine)
        if self._complete is before:
            raise DeadlockError(turns.broken)
        if len({kind for kind, _ in self._complete}) != 1:
            raise AssertionError(f"ranks make different MPI calls: {[kind for kind, _ in self._complete]}")
        return [value for _, value in self._complete]

    def split(self, rank: int, color: int, key: int) -> "tuple[_World, int]":
        """Return the ranks of this one's color, in the order of their keys, and its number among them."""
        said = self.share(rank, ("Split", None), (color, key))
        if self._split is not self._complete:  # this is the first rank that goes on
            self._split, self._parts = self._complete, {}
        members = [r for r in sorted(range(self.size), key=lambda r: (said[r][1], r)) if said[r][0] == color]
        if color not in self._parts:
            self._parts[color] = _World(len(members), self.turns, [self.members[r] for r in members])
        return self._parts[color], members.index(rank)


class Request:
    """A communication whose messages arrive in :meth:`Wait`, or in :meth:`Test` where `ready` tells that they can."""

    def __init__(self, finish: Callable[[], None], ready: Callable[[], bool] = lambda: False) -> None:
        self._finish, self._ready = finish, ready

    def Wait(self) -> None:
        self._finish()

    def Test(self) -> bool:
        if not self._ready():
            return False
        self._finish()
        self.Cancel()
        return True

    def Cancel(self) -> None:
        self._finish, self._ready = lambda: None, lambda: True


class VirtualComm(DerivedCalls):
    """One rank's end of a virtual world."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world, self._rank = world, rank

    def Get_size(self) -> int:
        return self._world.size

    def Get_rank(self) -> int:
        return self._rank

    def Split(self, color: int = 0, key: int = 0) -> "VirtualComm":
        """Return a communicator of the ranks with this color, in the order of their keys, then of their numbers."""
        return VirtualComm(*self._world.split(self._rank, color, key))

    def _share(self, call: str, value: Any) -> list[Any]:
        """Share `value`, which is nobody else's, with all ranks.

        Ranks that make different calls, or send arrays of different sizes, fail here as they might hang under MPI.
        """
        return self._world.share(self._rank, (call, value.nbytes if isinstance(value, np.ndarray) else None), value)

    @property
    def node_name(self) -> str:
        return f"node {self._world.members[self._rank] // self._world.turns.ranks_per_node}"

    def Isend(self, array: np.ndarray, dest: int, tag: int = 0) -> Request:
        """Copy what is sent at once. The request is done when it has been received, or at once where sends are `eager`."""
        assert array.flags.c_contiguous
        place, message, world = (self._rank, dest, tag), array.copy(), self._world
        world.post(place, message)
        return Request(lambda: None, lambda: world.turns.eager or world.taken(place, message))

    def Irecv(self, array: np.ndarray, source: int, tag: int = 0) -> Request:
        """Until the end, what is received is garbage; it may be shorter than there is room."""
        assert array.flags.c_contiguous
        array.view(np.uint8).fill(0xA5)

        def finish() -> None:
            message = self._world.collect((source, self._rank, tag))
            assert message.size <= array.size
            array.reshape(-1)[: message.size] = message.reshape(-1)

        return Request(finish, lambda: self._world.there((source, self._rank, tag)))

    def clock(self) -> float:
        """Return seconds of the ranks' own clock, which stands still while a rank runs."""
        return self._world.turns.now

    def pause(self, seconds: float) -> None:
        """Let other ranks run until that clock is so many seconds on."""
        self._world.turns.pause(self._world.members[self._rank], seconds)

    def Barrier(self) -> None:
        self._share("Barrier", None)

    def allgather(self, value: Any) -> list[Any]:
        return [pickle.loads(sent) for sent in self._share("allgather", pickle.dumps(value))]  # noqa: S301

    def _post(self, call: str, send: np.ndarray, receive: np.ndarray, part: Callable[[np.ndarray], Any]) -> Request:
        """Copy what is sent at the start; until the end, what is received is garbage."""
        assert send.flags.c_contiguous
        assert receive.flags.c_contiguous
        sent = send.copy()
        receive.view(np.uint8).fill(0xA5)

        def finish() -> None:
            for row, value in zip(receive.reshape(self._world.size, -1), self._share(call, sent), strict=True):
                row[:] = part(value).reshape(-1)

        return Request(finish)

    def Allgather(self, send: np.ndarray, receive: np.ndarray) -> None:
        self._post("Allgather", send, receive, lambda value: value).Wait()

    def Alltoallv(self, send: Any, receive: Any) -> None:
        """Take buffers [array, (counts, displacements)], counted in entries; parts of `receive` may be part of `send`."""
        (x, (counts, places)), (y, (room, targets)) = send, receive
        parts = [x.reshape(-1)[place : place + count].copy() for count, place in zip(counts, places, strict=True)]
        arrived = self._share("Alltoallv", parts)
        for r, (count, place) in enumerate(zip(room, targets, strict=True)):
            part = arrived[r][self._rank]
            assert part.size == count
            y.reshape(-1)[place : place + count] = part

    def Allgatherv(self, send: np.ndarray, receive: Any) -> None:
        """Receive into [array, (counts, displacements)], counted in entries."""
        array, (counts, places) = receive
        for part, count, place in zip(self._share("Allgatherv", [send.copy()]), counts, places, strict=True):
            assert part[0].size == count
            array[place : place + count] = part[0]

    def Iallgather(self, send: np.ndarray, receive: np.ndarray) -> Request:
        return self._post("Iallgather", send, receive, lambda value: value)

    def Ialltoall(self, send: np.ndarray, receive: np.ndarray) -> Request:
        return self._post("Ialltoall", send, receive, lambda value: value[self._rank])

    def Bcast(self, array: np.ndarray, root: int = 0) -> None:
        assert array.flags.c_contiguous
        array[...] = self._share("Bcast", array.copy())[root]


def run(size: int, program: Callable[[Any], Any], *, virtual: bool = False, ranks_per_node: int = 1,
        eager: bool = False) -> list[Any]:
    """Call ``program(comm)`` on `size` virtual ranks and return what each of them returned or raised.

    A rank that raises, or ends while others wait for it, lets these fail, so that none waits for ever; its result is the
    exception.

    With as many real ranks, see :mod:`mpi_ef.testing.plugin`, and without `virtual`, it runs on these, and all return the
    results of all. Every `ranks_per_node` virtual ranks are on a node of their own. MPI may complete a send before it is
    received, or not until then: `eager` says which.
    """
    if world is not None and size == world.Get_size() and not virtual:
        return _run_for_real(world, program)
    turns, results = _Turns(size, ranks_per_node, eager=eager), list[Any]([None] * size)
    shared = _World(size, turns)

    def rank_main(rank: int) -> None:
        turns.enter(rank)
        try:
            results[rank] = program(VirtualComm(shared, rank))
        except BaseException as error:  # what pytest.raises raises is no Exception
            results[rank] = error
            if not isinstance(error, MpiEfError):  # those the library raises on all ranks that need to know
                turns.fail("have failed")
        turns.next()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    turns.next()
    for thread in threads:
        thread.join(timeout=patience_seconds)
        if thread.is_alive():
            raise TimeoutError(f"a virtual rank has not come to its end within {patience_seconds:.0f} s")
    return results


def _run_for_real(comm: Comm, program: Callable[[Any], Any]) -> list[Any]:
    try:
        mine = program(comm)
    except MpiEfError as error:  # all others end the test, and with it all ranks
        mine = error
    gathered = comm.allgather(mine)
    gathered[comm.Get_rank()] = mine  # itself, with what cannot travel
    return gathered


def results(size: int, program: Callable[[Any], Any], *, virtual: bool = False, ranks_per_node: int = 1,
            eager: bool = False) -> list[Any]:
    """Like :func:`run`, but raise the first error of any rank."""
    values = run(size, program, virtual=virtual, ranks_per_node=ranks_per_node, eager=eager)
    errors = [value for value in values if isinstance(value, BaseException)]
    causes = [error for error in errors if not isinstance(error, DeadlockError)]
    for error in causes or errors:
        raise error
    return values
