"""Virtual ranks: threads in one process that talk through a stand-in for an MPI communicator.

A program written for ``MPI.Comm`` runs on any number of them, without MPI and without processes, and gives the bits
that real ranks give. Only the calls that mpi_ef makes are there.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class _World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size


class _Request:
    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def Wait(self) -> None:
        self._finish()


class VirtualComm:
    """One rank's end of a virtual world."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world, self._rank = world, rank
        self._attributes: dict[int, Any] = {}

    def Get_size(self) -> int:
        return self._world.size

    def Get_rank(self) -> int:
        return self._rank

    def Is_inter(self) -> bool:
        return False

    @classmethod
    def Create_keyval(cls) -> int:
        return 0

    def Get_attr(self, keyval: int) -> Any:
        return self._attributes.get(keyval)

    def Set_attr(self, keyval: int, value: Any) -> None:
        self._attributes[keyval] = value

    def allgather(self, value: Any) -> list[Any]:
        """Share `value` with all ranks; two barriers keep the slots from being overwritten too early."""
        world = self._world
        world.slots[self._rank] = value
        world.barrier.wait()
        values = copy.deepcopy(world.slots)
        world.barrier.wait()
        return values

    def Allgather(self, send: np.ndarray, receive: np.ndarray) -> None:
        for row, value in zip(receive.reshape(self._world.size, -1), self.allgather(send), strict=True):
            row[:] = value.reshape(-1)

    def Iallgather(self, send: np.ndarray, receive: np.ndarray) -> _Request:
        return _Request(lambda: self.Allgather(send, receive))

    def Ialltoall(self, send: np.ndarray, receive: np.ndarray) -> _Request:
        def finish() -> None:
            for row, value in zip(receive, self.allgather(send), strict=True):
                row[:] = value[self._rank]

        return _Request(finish)

    def Bcast(self, array: np.ndarray, root: int = 0) -> None:
        array[...] = self.allgather(array)[root]

    def bcast(self, value: Any, root: int = 0) -> Any:
        return self.allgather(value)[root]

    def allreduce(self, value: Any, op: Any = None) -> Any:
        assert op is None
        return sum(self.allgather(value))


def run(size: int, program: Callable[[Any], Any]) -> list[Any]:
    """Call ``program(comm)`` on `size` virtual ranks and return what each of them returned or raised.

    A rank that raises breaks the barrier, so that no other rank waits for it for ever. An `Exception` is returned in
    the place of the result: tests say themselves which ranks may fail.
    """
    world = _World(size)
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        try:
            results[rank] = program(VirtualComm(world, rank))
        except Exception as error:
            results[rank] = error
            if not getattr(error, "everywhere", False):
                world.barrier.abort() if not _expected(error) else None

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a virtual rank hangs"
    return results


def _expected(error: Exception) -> bool:
    from mpi_ef.errors import MpiEfError

    return isinstance(error, MpiEfError)


def results(size: int, program: Callable[[Any], Any]) -> list[Any]:
    """Like :func:`run`, but raise the first error of any rank."""
    values = run(size, program)
    errors = [value for value in values if isinstance(value, Exception)]
    broken = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in broken or errors:
        raise error
    return values
