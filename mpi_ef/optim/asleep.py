"""Entries of which no rank has had a gradient yet: they stay where they are."""

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress.combination import Vector
from mpi_ef.vectors import Mask

__all__ = ["ASKS", "AWAKE", "QUIET", "STIRS", "Asleep"]

# What a rank says of them in the handshake of a step: nothing; some that sleep have a gradient here; it does not know which
# sleep; none does, as all have one here.
QUIET, STIRS, ASKS, AWAKE = range(4)


class Asleep:
    """Which entries of a vector sleep, the same on all ranks.

    Signs move all entries alike: what a compressed exchange brings to one that sleeps is not meant for it.

    Parameters
    ----------
    comm : MPI.Comm

    Attributes
    ----------
    mask : (d,) array of bool, or None
        None where no entry sleeps. Never changed in place.
    sent_nbytes : int
        What the last :meth:`wake` has sent from this rank.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm, self.sent_nbytes = comm, 0
        self.mask: Mask | None = None

    def fall(self, mask: Mask | None) -> None:
        """Let these entries sleep, (d,), and no others. Local, alike on all ranks."""
        self.mask = mask if mask is not None and mask.any() else None

    def stir(self, gradients: Vector) -> bool:
        """Return whether an entry that sleeps has a gradient on this rank. Local."""
        return self.mask is not None and bool(np.logical_and(gradients, self.mask).any())

    def wake(self, stirring: Mask) -> NDArray[np.intp]:
        """Wake the entries that sleep and stir on any rank, and return them. Collective.

        Cost: an alltoall and an allgather of a bit for every entry that sleeps.

        Parameters
        ----------
        stirring : (d,) array of bool
        """
        assert self.mask is not None  # noqa: S101
        found = np.zeros_like(self.mask)
        found[self.mask] = self._anywhere(stirring[self.mask])
        self.fall(self.mask & ~found)
        return np.flatnonzero(found)

    def _anywhere(self, mask: Mask) -> Mask:
        """Return which entries are True on any rank. Collective."""
        n, packed = int(self._comm.Get_size()), np.packbits(mask)
        sent = np.zeros((n, -(-packed.size // n)), np.uint8)
        sent.reshape(-1)[: packed.size] = packed
        arrived = np.empty_like(sent)
        self._comm.Alltoall(sent, arrived)
        self._comm.Allgather(np.bitwise_or.reduce(arrived, axis=0), sent)
        self.sent_nbytes = 2 * (n - 1) * sent.shape[1]
        return np.unpackbits(sent.reshape(-1), count=mask.size).astype(bool)

    def hush(self, array: Vector, start: int = 0) -> None:
        """Set the part of `array`, which begins at entry `start`, that belongs to entries that sleep to zero. Local."""
        if self.mask is not None:
            np.copyto(array, 0, where=self.mask[start : start + array.size])
