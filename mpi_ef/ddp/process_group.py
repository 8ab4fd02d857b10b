"""A process group of torch.distributed in the place of an MPI communicator."""

import atexit
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any
from weakref import ref

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mpi_ef.comm.attributes import DerivedCalls
from mpi_ef.errors import OptionError, ShapeError

__all__ = ["ProcessGroupComm"]

_LETTING_GO_SECONDS = 2.0
_lent: deque[ref[Any]] = deque(maxlen=256)  # memory that was passed to torch last
_TAG = 0x4546  # of messages between two ranks, so that they do not meet those of other users of the group


class _Request:
    """Started communication, with the interface of mpi4py. The threads of gloo make progress by themselves."""

    def __init__(self, *works: Any) -> None:
        self._works = works

    def Wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = ()  # they hold the memory

    def Test(self) -> bool:
        return all(work.is_completed() for work in self._works)


class ProcessGroupComm(DerivedCalls):
    """A torch.distributed process group that can be used like an mpi4py communicator: those calls that plans make.

    Plans, rules, :func:`mpi_ef.allreduce` and the optimizers run on it unchanged, and give the bits they give over MPI.
    NumPy arrays are handed to torch without a copy.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        One that moves CPU memory, as gloo does; that of all processes by default. This process must be in it.

    Attributes
    ----------
    ranks : list of int
        The members, by their ranks among all processes.

    Raises
    ------
    OptionError
        When torch.distributed is not initialised, this process is not in the group, or the group moves no CPU memory.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise OptionError("ProcessGroupComm: torch.distributed is not initialised; call "
                              "torch.distributed.init_process_group('gloo') first")
        self._rank = dist.get_rank(group)
        if self._rank < 0:
            raise OptionError(
                f"ProcessGroupComm: process {dist.get_rank()} is not in the group; use it on its members only"
            )
        backends = dist.get_backend_config(group)
        if "cpu:" not in backends:
            raise OptionError(f"ProcessGroupComm: the group's backend is {backends}, which moves no CPU memory; pass "
                              "torch.distributed.new_group(backend='gloo')")
        self._group, self.ranks = group, dist.get_process_group_ranks(group)

    def Get_size(self) -> int:
        return len(self.ranks)

    def Get_rank(self) -> int:
        return self._rank

    def Barrier(self) -> None:
        dist.barrier(self._group)

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.Get_size()
        dist.all_gather_object(values, value, self._group)
        return values

    def Bcast(self, array: Any, root: int = 0) -> None:
        dist.broadcast(_bytes("Bcast", array), self.ranks[root], self._group)

    def Isend(self, array: Any, dest: int, tag: int = 0) -> _Request:
        return _Request(dist.isend(_read_only_bytes("Isend", array), self.ranks[dest], self._group, _TAG + tag))

    def Irecv(self, array: Any, source: int, tag: int = 0) -> _Request:
        return _Request(dist.irecv(_bytes("Irecv", array), self.ranks[source], self._group, _TAG + tag))

    def Iallgather(self, send: Any, receive: Any) -> _Request:
        x = _read_only_bytes("Iallgather", send)
        rows = _bytes("Iallgather", receive).view(self.Get_size(), x.numel()).unbind()
        return _Request(dist.all_gather(list(rows), x, self._group, async_op=True))

    def Ialltoall(self, send: Any, receive: Any) -> _Request:
        x, y = _read_only_bytes("Ialltoall", send), _bytes("Ialltoall", receive)
        return _Request(dist.all_to_all_single(y, x, group=self._group, async_op=True))

    def Allgatherv(self, send: Any, receive: Any) -> None:
        self._exchange([_read_only_bytes("Allgatherv", send)] * self.Get_size(), _parts("Allgatherv", receive, _bytes))

    def Alltoallv(self, send: Any, receive: Any) -> None:
        """Do what the protocol says; what is received may lie in the array that is sent from, beside what is sent."""
        self._exchange(_parts("Alltoallv", send, _read_only_bytes), _parts("Alltoallv", receive, _bytes))

    def _exchange(self, outward: list[Tensor], inward: list[Tensor]) -> None:
        """Send ``outward[r]`` to rank r and fill ``inward[r]``; empty parts are not sent."""
        inward[self._rank].copy_(outward[self._rank])
        others = [r for r in range(self.Get_size()) if r != self._rank]
        works = [dist.irecv(inward[r], self.ranks[r], self._group, _TAG) for r in others if inward[r].numel()]
        works += [dist.isend(outward[r], self.ranks[r], self._group, _TAG) for r in others if outward[r].numel()]
        _Request(*works).Wait()


@atexit.register
def _wait_until_torch_lets_go() -> None:
    """Wait, before Python ends, for threads of gloo that have not dropped NumPy's memory yet: later they would abort."""
    limit = monotonic() + _LETTING_GO_SECONDS
    while any(memory() is not None for memory in _lent) and monotonic() < limit:
        sleep(0.001)


def _bytes(call: str, array: Any) -> Tensor:
    """Return the memory of `array` as a tensor of bytes."""
    if not isinstance(array, np.ndarray):
        raise OptionError(f"ProcessGroupComm.{call}: messages above 2 GiB are counted in datatypes of MPI, which a process "
                          "group does not know; exchange shorter vectors (bucket_cap_mb of DDP)")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ShapeError(f"ProcessGroupComm.{call}: an array {array.shape} is read-only or not contiguous; pass one that "
                         "can be written as a whole")
    memory = array.reshape(-1).view(np.uint8)
    _lent.append(ref(memory))
    return torch.from_numpy(memory)


def _read_only_bytes(call: str, array: Any) -> Tensor:
    """Return the same for an array that is only read. A read-only one is copied, because torch has no such tensors."""
    return _bytes(call, array if not isinstance(array, np.ndarray) or array.flags.writeable else array.copy())


def _parts(call: str, message: Any, as_bytes: Callable[[str, Any], Tensor]) -> list[Tensor]:
    array, (counts, places) = message
    memory, nbytes = as_bytes(call, array), array.itemsize
    return [memory[place * nbytes : (place + size) * nbytes] for size, place in zip(counts, places, strict=True)]
