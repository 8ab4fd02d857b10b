"""Parameters in runs: of one group, one after the other, that an optimizer treats alike."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

__all__ = ["Advance", "Run", "runs"]


class Run(NamedTuple):
    """Parameters one after the other, of one group, with one S and D; see :class:`ZeroOneAdam`.

    `moves` tells whether they have a gradient in this step, `moved` whether one since the last synchronisation.
    """

    numbers: range
    part: slice
    group: dict[str, Any]
    covered: float
    left: float
    moves: bool
    moved: bool


class Advance(NamedTuple):
    """What a step makes of a run: weight of the newest momentum in u, S, D, and whether it has moved."""

    part: slice
    weight: float
    covered: float
    left: float
    moved: bool


def runs(
    starts: Sequence[int],
    slices: Sequence[tuple[dict[str, Any], slice]],
    keys: Sequence[tuple[float, float, bool, bool]],
) -> Iterator[Run]:
    """Yield runs as long as they can be.

    Parameters
    ----------
    starts : where parameters begin in the vectors, and d
    slices : groups and their parts of the vectors
    keys : of every parameter, what a run has in common: `covered`, `left`, `moves`, `moved`
    """
    number = 0
    for group, part in slices:
        first = number
        while starts[number] < part.stop:
            number += 1
        for key, of_it in groupby(range(first, number), keys.__getitem__):
            numbers = list(of_it)
            whole = slice(starts[numbers[0]], starts[numbers[-1] + 1])
            yield Run(range(numbers[0], numbers[-1] + 1), whole, group, *key)
