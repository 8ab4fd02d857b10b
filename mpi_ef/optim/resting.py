"""Parameters that take part in an exchange with nothing, because they have no gradient: what is kept for them stays."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.statetree import PER_RANK, REPLICATED

__all__ = ["Placed", "memories", "momenta", "silent"]

Placed = tuple[Vector, int]  # an array, and the entry of the vector of all parameters at which it begins


def memories(rules: Iterable[tuple[ErrorFeedback, int]]) -> list[Placed]:
    """Return what rules keep of entries, such as errors and estimates. Not copies. Local.

    Parameters
    ----------
    rules : iterable of (ErrorFeedback, int)
        Each with the entry at which its vector begins.
    """
    found = []
    for rule, first in rules:
        for name, leaf in rule.state_tree().arrays().items():
            cut = leaf.reshard is not None and leaf.reshard.how == "cut" and leaf.array.size < rule.plan.d
            of_entries = leaf.array.size == rule.plan.d and not (leaf.kind == REPLICATED and name.startswith("plan."))
            if cut or of_entries:
                found.append((leaf.array, first + (leaf.reshard.start if cut and leaf.reshard else 0)))
    return found


def momenta(rules: Iterable[tuple[ErrorFeedback, int]]) -> list[Placed]:
    """Return the averages of this rank's own gradients that rules keep. Not copies. Local; as :func:`memories`."""
    return [(leaf.array, first) for rule, first in rules for leaf in rule.state.leaves().values()
            if leaf.kind == PER_RANK and not leaf.resets]


@contextmanager
def silent(places: Sequence[slice], arrays: Callable[[], Iterable[Placed]]) -> Iterator[None]:
    """Let `arrays` be zero at these places of the vector meanwhile, and afterwards what they were. Local.

    Parameters
    ----------
    places : sequence of slice
    arrays : callable
        Returns them, the same ones in the same order: rules exchange theirs for spare ones.
    """

    def parts() -> Iterator[Vector]:
        for array, start in arrays() if places else ():
            for place in places:
                yield array[max(place.start - start, 0) : max(place.stop - start, 0)]

    before = [part.copy() for part in parts()]
    for part in parts():
        part.fill(0)
    try:
        yield
    finally:
        for part, was in zip(parts(), before, strict=True):
            np.copyto(part, was)
