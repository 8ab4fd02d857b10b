"""Virtual ranks: threads in one process that communicate through a stand-in for an MPI communicator.

A program written for ``MPI.Comm`` runs on any number of them, without MPI and without processes, and gives the bits
that real ranks give. Only the calls that mpi_ef makes exist.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from mpi_ef.comm.attributes import DerivedCalls
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import MpiEfError

__all__ = ["Request", "VirtualComm", "results", "run"]

patience_seconds = 240.0  # for a rank to finish
world: Comm | None = None  # real ranks, on which programs for as many run; set by the plugin for pytest


class _World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size


class Request:
    """A communication whose messages arrive in :meth:`Wait`."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def Wait(self) -> None:
        self._finish()

    def Test(self) -> bool:
        return False


class VirtualComm(DerivedCalls):
    """One rank's end of a virtual world."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world, self._rank = world, rank

    def Get_size(self) -> int:
        return self._world.size

    def Get_rank(self) -> int:
        return self._rank

    def Split(self, color: int) -> "VirtualComm":
        """Return a communicator of this rank alone; only where every rank is alone afterwards."""
        colors = self._share("Split", color)
        assert len(set(colors)) == len(colors)
        return VirtualComm(_World(1), 0)

    def _share(self, call: str, value: Any) -> list[Any]:
        """Share `value` with all ranks; two barriers keep the slots from being overwritten too early.

        Ranks that make different calls, or send arrays of different sizes, fail here as they might hang under MPI.
        """
        world = self._world
        kind = (call, value.nbytes if isinstance(value, np.ndarray) else None)
        world.slots[self._rank] = (kind, value)
        world.barrier.wait()
        kinds = [slot[0] for slot in world.slots]
        values = [copy.deepcopy(slot[1]) for slot in world.slots]
        world.barrier.wait()
        if len(set(kinds)) != 1:
            raise AssertionError(f"ranks make different MPI calls: {kinds}")
        return values

    def Barrier(self) -> None:
        self._share("Barrier", None)

    def allgather(self, value: Any) -> list[Any]:
        return self._share("allgather", value)

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
        array[...] = self._share("Bcast", array)[root]


def run(size: int, program: Callable[[Any], Any], *, virtual: bool = False) -> list[Any]:
    """Call ``program(comm)`` on `size` virtual ranks and return what each of them returned or raised.

    A rank that raises breaks the barrier, so that no other rank waits for it for ever; its result is the exception.

    With as many real ranks, see :mod:`mpi_ef.testing.plugin`, and without `virtual`, it runs on these, and all return the
    results of all.
    """
    if world is not None and size == world.Get_size() and not virtual:
        return _run_for_real(world, program)
    shared = _World(size)
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        try:
            results[rank] = program(VirtualComm(shared, rank))
        except BaseException as error:  # what pytest.raises raises is no Exception
            results[rank] = error
            if not isinstance(error, MpiEfError):  # those the library raises on all ranks that need to know
                shared.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
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


def results(size: int, program: Callable[[Any], Any], *, virtual: bool = False) -> list[Any]:
    """Like :func:`run`, but raise the first error of any rank."""
    values = run(size, program, virtual=virtual)
    errors = [value for value in values if isinstance(value, BaseException)]
    broken = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in broken or errors:
        raise error
    return values
