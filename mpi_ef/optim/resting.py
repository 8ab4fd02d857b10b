"""Parameters and entries without gradient: they stay, and take part in exchanges with nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.kernels.backend import backend_of
from mpi_ef.statetree import NODES, PER_RANK, REPLICATED
from mpi_ef.vectors import Mask

__all__ = ["ASKS", "AWAKE", "QUIET", "STIRS", "Asleep", "memories", "momenta", "silent"]

Placed = tuple[Vector, int]  # an array, and the entry of the vector of all parameters at which it begins

# What a rank says of entries that sleep in the handshake of a step: nothing; some have a gradient here; it does not know
# which sleep; none does, as all have a gradient here.
QUIET, STIRS, ASKS, AWAKE = range(4)


class Asleep:
    """Which entries of a vector sleep, the same on all ranks: none has had a gradient yet, and they stay where they are.

    Signs move all entries alike: what a compressed exchange brings to one that sleeps is not meant for it.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.sent_nbytes = 0  # what the last wake() has sent from this rank
        self.mask: Mask | None = None  # (d,); None where no entry sleeps. Never changed in place
        self._placed: tuple[Mask | None, Vector] | None = None  # the same where vectors are

    def fall(self, mask: Mask | None) -> None:
        """Let these entries sleep, (d,), and no others. Local, alike on all ranks."""
        self.mask = mask if mask is not None and mask.any() else None

    def stir(self, gradients: Vector) -> bool:
        """Return whether an entry that sleeps has a gradient on this rank. Local."""
        return self.mask is not None and backend_of(gradients).stirs(gradients, self._where(gradients))

    def wake(self, stirring: Mask) -> NDArray[np.intp]:
        """Wake the entries that sleep and are `stirring`, (d,), on any rank, and return them. Collective.

        Cost: an alltoall and an allgather of a bit for every entry that sleeps.
        """
        asleep, n = self.mask, int(self._comm.Get_size())
        assert asleep is not None  # noqa: S101
        packed = np.packbits(stirring[asleep])
        sent = np.zeros((n, -(-packed.size // n)), np.uint8)
        sent.reshape(-1)[: packed.size] = packed
        arrived = np.empty_like(sent)
        self._comm.Alltoall(sent, arrived)
        self._comm.Allgather(np.bitwise_or.reduce(arrived, axis=0), sent)
        self.sent_nbytes = 2 * (n - 1) * sent.shape[1]
        found = np.zeros_like(asleep)
        found[asleep] = np.unpackbits(sent.reshape(-1), count=np.count_nonzero(asleep))
        self.fall(asleep & ~found)
        return np.flatnonzero(found)

    def hush(self, array: Vector, start: int = 0) -> None:
        """Set the part of `array`, which begins at entry `start`, that belongs to entries that sleep to zero. Local."""
        if self.mask is not None:
            backend_of(array).silence(array, self._where(array)[start : start + array.size])

    def _where(self, like: Vector) -> Vector:
        """Return the mask in the memory that `like` is in, to which it goes once."""
        assert self.mask is not None  # noqa: S101
        if self._placed is None or self._placed[0] is not self.mask:
            self._placed = self.mask, backend_of(like).place(self.mask)
        return self._placed[1]


def memories(rules: Iterable[tuple[ErrorFeedback, int]]) -> list[Placed]:
    """Return what rules, each with where its vector begins, keep of entries, such as errors. Not copies. Local."""
    found: list[Placed] = []
    for rule, first in rules:
        for name, leaf in rule.state_tree().arrays().items():
            if name == NODES:
                continue
            if name == "rows":  # those of all clients
                rows = leaf.array.reshape(-1, rule.plan.d)
                found.extend((row, first + rule.first) for row in rows)
                continue
            cut = leaf.reshard is not None and leaf.reshard.how == "cut" and leaf.array.size < rule.plan.d
            of_entries = leaf.array.size == rule.plan.d and not (leaf.kind == REPLICATED and name.startswith("plan."))
            if cut or of_entries:
                found.append((leaf.array, first + (leaf.reshard.start if cut and leaf.reshard else rule.first)))
    return found


def momenta(rules: Iterable[tuple[ErrorFeedback, int]]) -> list[Placed]:
    """Return the averages of this rank's own gradients that rules keep, not of its node's. Not copies. Local."""
    return [(leaf.array, first) for rule, first in rules if not rule.of_node for leaf in rule.state.leaves().values()
            if leaf.kind == PER_RANK and not leaf.resets]


@contextmanager
def silent(places: Sequence[slice], arrays: Callable[[], Iterable[Placed]]) -> Iterator[None]:
    """Let arrays be zero at these places of the vector meanwhile, and afterwards what they were. Local.

    ``arrays()`` returns them, the same ones in the same order each time: rules exchange theirs for spare ones.
    """

    def parts() -> Iterator[Vector]:
        for array, start in arrays() if places else ():
            for place in places:
                yield array[max(place.start - start, 0) : max(place.stop - start, 0)]

    before = []
    for part in parts():
        before.append(part.copy())
        part.fill(0)
    try:
        yield
    finally:
        for part, was in zip(parts(), before, strict=True):
            part[...] = was
