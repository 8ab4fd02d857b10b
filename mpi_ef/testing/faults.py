"""A communicator that counts its calls, and fails at the one that a test selects."""

from collections.abc import Callable, Sequence
from time import sleep
from typing import Any, Literal

import numpy as np

from mpi_ef.comm.protocol import Comm

from .virtual import Request

__all__ = ["CommunicationError", "Fault", "FaultyComm"]

Fault = Literal["", "raise", "die", "delay", "corrupt"]
_ALIKE = {"Iallgather": "Allgather", "Ialltoall": "Alltoall"}
_COUNTED = ["Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Bcast", "Iallgather", "Ialltoall", "Isend", "allgather",
            "Barrier"]


class CommunicationError(RuntimeError):
    """A simulated error of MPI."""


class FaultyComm:
    """Does what another communicator does, but for one call of this rank.

    Parameters
    ----------
    comm : Communicator
    fault : str
        "raise": the call raises :class:`CommunicationError` and nothing is sent. "die": so do all that follow. "delay": it
        comes `seconds` late. "corrupt": the first byte of what arrives from every rank is another one, which in frames is
        part of the header; nothing does in Isend. "": none.
    at : int
        Which call, from 0 on; of communicators that :meth:`arm` was called for, from there on.
    seconds : float

    Attributes
    ----------
    calls : list of str
        Names of all collectives so far, and an Isend for every message to one rank.
    sent_nbytes : int
        Bytes of arrays that have left this rank for others.
    parts : list of FaultyComm
        What :meth:`Split` has returned, which count by themselves.
    """

    def __init__(self, comm: Comm, fault: Fault = "", at: int = 0, *, seconds: float = 0.002) -> None:
        self.comm, self.fault, self.at, self.seconds = comm, fault, at, seconds
        self.calls: list[str] = []
        self.sent_nbytes = 0
        self.parts: list[FaultyComm] = []

    def arm(self, fault: Fault, at: int = 0) -> None:
        """Fail at the call that comes after `at` others from now on. Local."""
        self.fault, self.at = fault, len(self.calls) + at

    def Split(self, color: int = 0, key: int = 0) -> "FaultyComm":
        """Split the communicator; the part counts, and has no fault."""
        comm: Any = self.comm
        self.parts.append(FaultyComm(comm.Split(color, key)))
        return self.parts[-1]

    def __getattr__(self, name: str) -> Any:
        if name == "comm":  # not there yet: it is being copied
            raise AttributeError(name)
        of_comm = getattr(self.comm, name)
        return self._counted(name, of_comm) if name in _COUNTED else of_comm

    def __bool__(self) -> bool:
        return bool(self.comm)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*buffers: Any, **options: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            due = number == self.at or (self.fault == "die" and number > self.at)
            if due and self.fault in ("raise", "die"):
                raise CommunicationError(f"{name}, call {number} of this rank, fails as the test has set")
            if due and self.fault == "delay":
                sleep(self.seconds)
            self.sent_nbytes += self._leaving(_ALIKE.get(name, name), buffers, options)
            request = call(*buffers, **options)
            if not (due and self.fault == "corrupt" and len(buffers) > 1) or name == "Isend":
                return request

            def arrive() -> None:
                if request is not None:
                    request.Wait()
                self._corrupt(buffers[1])

            if request is None:
                return arrive()
            return Request(arrive)

        return counted

    def _leaving(self, name: str, buffers: Sequence[Any], options: dict[str, Any]) -> int:
        size, rank = self.comm.Get_size(), self.comm.Get_rank()
        if name == "Alltoallv":
            array, (counts, _) = buffers[0]
            return int(array.itemsize * (sum(counts) - counts[rank]))
        if name == "Isend":
            return int(buffers[0].nbytes)
        if name == "Bcast" and options.get("root", buffers[1] if len(buffers) > 1 else 0) != rank:
            return 0
        nbytes = _array(buffers[0]).nbytes if buffers and name != "allgather" else 0
        return int(nbytes * (size - 1) // (size if name == "Alltoall" else 1))

    def _corrupt(self, buffer: Any) -> None:
        rows = _array(buffer).reshape(-1).view(np.uint8).reshape(self.comm.Get_size(), -1)
        if rows.size:
            rows[:, 0] ^= 0xFF


def _array(buffer: Any) -> "np.ndarray[Any, Any]":
    array: np.ndarray[Any, Any] = buffer[0] if isinstance(buffer, list | tuple) else buffer
    return array
