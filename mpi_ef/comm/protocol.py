"""The calls of a communicator that plans, optimizers, samplers and saves make."""

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

__all__ = ["Comm", "Communicator", "MpiComm", "Request"]

MpiComm: TypeAlias = "Intracomm"  # of programs that need more than a plan does: point to point, splitting, reductions


class Request(Protocol):
    """A communication that has been started. Its buffers belong to it until it is done."""

    def Wait(self) -> Any:
        """Return when it is done."""

    def Test(self) -> bool:
        """Return whether it is done, after some progress."""


@runtime_checkable
class Communicator(Protocol):
    """An intracommunicator: one of mpi4py, of virtual ranks, or over a process group of torch.

    Buffers are contiguous NumPy arrays, a row per rank where all ranks send to one. The signatures are mpi4py's, where `Any`
    stands for what it takes as a buffer. A communicator that has been freed is false.
    """

    def Get_size(self) -> int:
        """Return the number of ranks."""

    def Get_rank(self) -> int:
        """Return the number of this rank."""

    def Is_inter(self) -> bool:
        """Return False."""

    def Isend(self, buf: Any, /, dest: int, tag: int = 0) -> Request:
        """Start to send an array to one rank."""

    def Irecv(self, buf: Any, /, source: int, tag: int = 0) -> Request:
        """Start to receive one of the same size from one rank."""

    def Barrier(self) -> None:
        """Return when all ranks have called it. Collective, as all that follow."""

    def allgather(self, sendobj: Any, /) -> list[Any]:
        """Return the objects of all ranks, in their order."""

    def Bcast(self, buf: Any, /, root: int = 0) -> None:
        """Overwrite `buf` on all ranks with that of one."""

    def Allgather(self, sendbuf: Any, recvbuf: Any, /) -> None:
        """Send a row to all ranks, receive a row of each."""

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, /) -> None:
        """Do the same with rows of different sizes: ``recvbuf = [array, (counts, displacements)]``."""

    def Alltoall(self, sendbuf: Any, recvbuf: Any, /) -> None:
        """Send row r to rank r, receive a row of every rank."""

    def Alltoallv(self, sendbuf: Any, recvbuf: Any, /) -> None:
        """Do the same with rows of different sizes: both are ``[array, (counts, displacements)]``."""

    def Iallgather(self, sendbuf: Any, recvbuf: Any, /) -> Request:
        """Start what :meth:`Allgather` does."""

    def Ialltoall(self, sendbuf: Any, recvbuf: Any, /) -> Request:
        """Start what :meth:`Alltoall` does."""


Comm = Communicator
