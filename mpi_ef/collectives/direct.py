"""GPU-aware MPI: messages that go from the memory of one device to that of another, where MPI can do that."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.consensus import agree, check_not_freed, gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import MpiEfError, OptionError, briefly, everywhere, told
from mpi_ef.kernels.backend import backend, side_of

from .ways import ways_of

__all__ = ["use_gpu_aware_mpi"]

SIZES = (64, 1 << 18)  # bytes for each rank: MPI sends short and long messages in different ways
_REMEDY = "leave it out, and messages go through memory of the host, or load an MPI that is (mpi-ef doctor tries it)"


def use_gpu_aware_mpi(comm: Comm, device: Any) -> None:
    """Let MPI have memory of devices in exchanges of plans that are built on `comm` from now on. Collective.

    Without it MPI sees page-locked memory of the host alone, which works with every MPI. With it, messages go to the device
    of another rank in whatever way MPI knows. Only gathers and exchanges of bytes do: sums are never formed inside MPI.
    Data of every rank travel first, through every call that plans make. What is built before, plans that one-call forms
    have kept included, stays as it is; dense exchanges and factors of LowRank are summed on the host and go through it.

    Parameters
    ----------
    comm : MPI.Comm
        Of MPI: a process group of torch takes care of that itself.
    device : torch.device or str
        Of the vectors of this rank, ``"cuda:0"``; "cpu" on a rank without one, of which there may be some.

    Raises
    ------
    OptionError
        On all ranks, where MPI does not take memory of a device, raises an exception or brings other data than were sent;
        where no rank has a device; where `comm` is not of MPI. Nothing is changed then. An MPI that crashes on such memory
        ends the job: ``mpi-ef doctor`` tries it in a process of its own.

    Notes
    -----
    Cost: ten collectives, up to 256 KiB from each rank to each.
    """
    check_not_freed(comm, "use_gpu_aware_mpi")
    mpi = mpi_of(comm)
    if mpi is None or comm.Is_inter():
        raise OptionError(f"use_gpu_aware_mpi: comm={briefly(comm)} is not an intracommunicator of MPI; pass for example "
                          "MPI.COMM_WORLD")
    trial: list[Trial] = []
    side: list[str] = []  # facts add that of this rank, before it is sent

    def facts() -> dict[str, object]:
        trial.append(Trial(comm, device))
        side.append(trial[0].side)
        trial[0].offer(mpi)
        return {}

    there = agree(comm, "use_gpu_aware_mpi", facts, "", value=side)
    if all(theirs == ["cpu"] for theirs in there):
        raise everywhere(OptionError("use_gpu_aware_mpi: no rank has its vectors on a device; leave it out"))
    problems = gather_values(comm, "use_gpu_aware_mpi", trial[0].problem())
    for rank, problem in enumerate(problems):
        if problem:
            raise everywhere(OptionError(f"use_gpu_aware_mpi: this MPI is not GPU-aware, or not for such devices: on rank "
                                         f"{rank} {problem}; {_REMEDY}"))
    ways_of(comm).direct = True


class Trial:
    """Bytes of this rank that travel through every call that plans make; all memory is there before the first one.

    Raises
    ------
    OptionError
        `device` is none.
    """

    def __init__(self, comm: Any, device: Any) -> None:
        self._comm, self._n, self._rank = comm, int(comm.Get_size()), int(comm.Get_rank())
        kind, _, index = str(device).partition(":")
        try:
            self.side = side_of(kind, int(index) if index else None)
            self._kernels = backend(np.float32, self.side)
            self._memory = [self._kernels.zeros(self._n * SIZES[-1], np.uint8) for _ in range(2)]
        except MpiEfError:
            raise
        except Exception as error:
            raise OptionError(f"use_gpu_aware_mpi: device={briefly(device)} cannot be used ({told(error)}); pass that of "
                              "this rank's parameters, cuda:0, or cpu on a rank without one") from error

    def _message(self, array: Any) -> Any:
        return array if self.side == "cpu" else self._kernels.message(array)

    def offer(self, mpi: Any) -> None:
        """Raise `OptionError` where MPI's library for Python does not take an array of the device."""
        array = self._kernels.zeros(8, np.uint8)
        try:
            mpi.buffer.frombuffer(self._message(array))
        except Exception as error:
            raise OptionError(f"use_gpu_aware_mpi: mpi4py does not take memory of {self.side} ({told(error)}); "
                              f"{_REMEDY}") from error

    def problem(self) -> str:
        """Return what has gone wrong first on this rank; it makes all calls, as the others do. Collective."""
        problems = []
        for size in SIZES:
            for call, send, expected in self._calls(size):
                out, received = (memory[: like.size].reshape(like.shape)
                                 for memory, like in zip(self._memory, (send, expected), strict=True))
                try:
                    out[...] = send
                    received.fill(0xA5)
                    self._travel(call, out, received)
                    if not np.array_equal(self._kernels.fetch(received), expected):
                        problems.append(f"{call} of {size} bytes brought other bytes than were sent")
                except Exception as error:
                    problems.append(f"{call} of {size} bytes raised {told(error)}")
        return (problems or [""])[0]

    def _calls(self, size: int) -> "Iterator[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]]":
        n, mine = self._n, self._rank
        ranks, along = np.arange(n).astype(np.uint8)[:, None], np.arange(size).astype(np.uint8)[None] * np.uint8(11)

        def rows(first: int, second: int) -> "np.ndarray[Any, Any]":
            return ranks * np.uint8(first) + along + np.uint8(second % 256)

        for number, call in enumerate(("Allgather", "Iallgather", "Allgatherv")):
            of_all = rows(37, number)
            yield call, of_all[mine], of_all
        for number, call in enumerate(("Alltoall", "Ialltoall")):
            yield call, rows(37, 101 * mine + number), rows(101, 37 * mine + number)

    def _travel(self, call: str, send: Any, received: Any) -> None:
        if self.side != "cpu":
            self._kernels.settled().wait()
        out, into = self._message(send), self._message(received)
        if call == "Allgatherv":
            size = send.size
            into = [into, (np.full(self._n, size), np.arange(self._n) * size)]
        request = getattr(self._comm, call)(out, into)
        if request is not None:
            request.Wait()
