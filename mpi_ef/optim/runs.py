"""Parameters in runs: of one group, one after the other, that an optimizer treats alike."""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

__all__ = ["Advance", "Run", "Stretch", "stretches"]

Key = TypeVar("Key", bound=Hashable)
Stretch = tuple[range, slice, dict[str, Any], Key]


class Run(NamedTuple):
    """Parameters one after the other, of one group, with one S, D and number of steps; see :class:`ZeroOneAdam`.

    `moves` tells whether they have a gradient in this step, `moved` whether one since the last synchronisation.
    """

    numbers: range
    part: slice
    group: dict[str, Any]
    covered: float
    left: float
    moves: bool
    moved: bool
    steps: int


class Advance(NamedTuple):
    """What a step makes of a run: weight of the newest momentum in u, S, D, and whether it has moved."""

    weight: float
    covered: float
    left: float
    moved: bool


def stretches(
    starts: Sequence[int], slices: Sequence[tuple[dict[str, Any], slice]], keys: Sequence[Key]
) -> Iterator[Stretch[Key]]:
    """Yield runs as long as they can be: which parameters, where they are, of which group, and their key.

    Parameters
    ----------
    starts : where parameters begin in the vectors, and d
    slices : groups and their parts of the vectors
    keys : of every parameter, what those of a run have in common
    """
    number, alike = 0, keys.count(keys[0]) == len(keys)
    for group, part in slices:
        first, number = number, bisect_left(starts, part.stop, number)
        if alike:
            yield range(first, number), part, group, keys[0]
            continue
        for key, of_it in groupby(range(first, number), keys.__getitem__):
            numbers = list(of_it)
            whole = slice(starts[numbers[0]], starts[numbers[-1] + 1])
            yield range(numbers[0], numbers[-1] + 1), whole, group, key
