"""What plans, optimizers, samplers and saves ask of a communicator."""

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

__all__ = ["Comm", "Communicator", "MpiComm", "Request"]

MpiComm: TypeAlias = "Intracomm"  # of programs that need more than a plan does: point to point, splitting, reductions


class Request(Protocol):
    """A communication that has been started. Its buffers are MPI's until it is done."""

    def Wait(self) -> Any:  # noqa: N802
        """Return when it is done."""

    def Test(self) -> bool:  # noqa: N802
        """Let it make progress, and return whether it is done."""


@runtime_checkable
class Communicator(Protocol):
    """An intracommunicator: one of mpi4py, of virtual ranks, or over a process group of torch.

    Buffers are contiguous NumPy arrays, a row per rank where all ranks send to one. The signatures are mpi4py's, where `Any`
    stands for what it takes as a buffer. A communicator that has been freed is false.
    """

    def Get_size(self) -> int:  # noqa: N802
        """Return the number of ranks."""

    def Get_rank(self) -> int:  # noqa: N802
        """Return the number of this rank."""

    def Is_inter(self) -> bool:  # noqa: N802
        """Return False."""

    def Barrier(self) -> None:  # noqa: N802
        """Return when all ranks have come here. Collective, as all that follow."""

    def allgather(self, sendobj: Any, /) -> list[Any]:
        """Return the objects of all ranks, in their order."""

    def Bcast(self, buf: Any, /, root: int = 0) -> None:  # noqa: N802
        """Overwrite `buf` on all ranks with that of one."""

    def Allgather(self, sendbuf: Any, recvbuf: Any, /) -> None:  # noqa: N802
        """Send a row to all ranks, receive a row of every one."""

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, /) -> None:  # noqa: N802
        """Do the same with rows of different sizes: ``recvbuf = [array, (counts, displacements)]``."""

    def Alltoall(self, sendbuf: Any, recvbuf: Any, /) -> None:  # noqa: N802
        """Send row r to rank r, receive a row of every rank."""

    def Alltoallv(self, sendbuf: Any, recvbuf: Any, /) -> None:  # noqa: N802
        """Do the same with rows of different sizes: both are ``[array, (counts, displacements)]``."""

    def Iallgather(self, sendbuf: Any, recvbuf: Any, /) -> Request:  # noqa: N802
        """Start what :meth:`Allgather` does."""

    def Ialltoall(self, sendbuf: Any, recvbuf: Any, /) -> Request:  # noqa: N802
        """Start what :meth:`Alltoall` does."""


Comm = Communicator
