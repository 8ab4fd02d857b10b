"""How the exchanges on a communicator go: what MPI is given of a device, and who waits for it."""

from typing import Protocol

from mpi_ef.comm.attributes import kept_with
from mpi_ef.comm.protocol import Comm

__all__ = ["Departing", "Ways", "ways_of"]


class Departing(Protocol):
    """An exchange of which MPI has been given nothing so far."""

    def has_been_sent(self) -> bool:
        """Tell whether a device has done its part. Local."""

    def depart(self) -> None:
        """Give its first round to MPI, after waiting for the device. Collective."""

    def go_on(self, *, wait: bool) -> bool:
        """Begin its second round when the first has arrived, waiting for that or not; tell whether it has been seen to."""


class Ways:
    """What plans look up when they are built on a communicator.

    Attributes
    ----------
    direct : bool
        MPI is given memory of devices, not the twins on the host.
    queue : list, or None
        Nothing but exchanges of plans happens on this communicator, which can therefore be begun when the device has done
        its part: those that wait for that, in the order in which all ranks begin them. None: every one begins at once.
    second : communicator, or None
        Of the same ranks, for second rounds that begin while first ones of others are under way: when a first round has
        arrived differs between ranks, and MPI wants one order on all of them on a communicator.
    later : list
        Exchanges whose second round has not begun, in the order in which all ranks begin these.
    begun : int
        Second rounds that this rank has begun there.
    """

    def __init__(self) -> None:
        self.direct = False
        self.queue: list[Departing] | None = None
        self.second: Comm | None = None
        self.later: list[Departing] = []
        self.begun = 0


def ways_of(comm: Comm) -> Ways:
    """Return the ways of `comm`, which may be changed, the same on all ranks; those of others than MPI's are lost. Local."""
    return kept_with(comm, Ways) if hasattr(type(comm), "Create_keyval") else Ways()
