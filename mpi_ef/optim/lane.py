"""Communicators for messages of backward passes, which may never be answered: the user's own stays free of them."""

import gc
from typing import Any

from mpi_ef.comm.attributes import kept_with
from mpi_ef.comm.consensus import gather_values
from mpi_ef.comm.protocol import Comm

from .line import mpi_of

__all__ = ["Lane"]


class _Lanes:
    """The lanes of a communicator, numbered alike on all ranks, as far as this rank knows them."""

    def __init__(self) -> None:
        self.comms: list[Comm] = []
        self.closed: dict[int, int] = {}  # how many exchanges were started on those that no optimizer has


class Lane:
    """A communicator that the buckets of one optimizer have for themselves. Construction is collective.

    What a rank has sent in a backward pass is never answered where another rank has left before. A later optimizer gets the
    same communicator only where all ranks have started as many exchanges there.

    Parameters
    ----------
    comm : MPI.Comm
        Is duplicated where no lane of it can be used again; other communicators than MPI's are used as they are.

    Attributes
    ----------
    comm : MPI.Comm
    closed : bool
        Whether nothing may be sent any more: the optimizer is gone, whatever hooks of autograd there still are.
    started : int
        How many exchanges this rank has started.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm, self.closed, self.started = comm, False, 0
        if mpi_of(comm) is None:
            self._lanes, self._number = _Lanes(), 0
            return
        lanes = kept_with(comm, _Lanes)
        if not lanes.closed and lanes.comms:
            gc.collect()  # optimizers that schedulers refer to, for example
        first, *others = gather_values(comm, "the lanes of an optimizer", list(lanes.closed.items()))
        alike = set(first).intersection(*others)
        if not alike:
            mpi_comm: Any = comm
            lanes.comms.append(mpi_comm.Dup())
        self._number, _ = min(alike, default=(len(lanes.comms) - 1, 0))
        lanes.closed.pop(self._number, None)
        self.comm, self._lanes = lanes.comms[self._number], lanes

    def close(self) -> None:
        """Leave it to later optimizers, as it is. Local."""
        self.closed = True
        self._lanes.closed[self._number] = self.started
