"""What plans keep from one exchange to the next, and what becomes of it when the number of ranks changes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Memory", "Move"]


@dataclass(frozen=True)
class Move:
    """What becomes of an array that every rank has when a run goes on with another number of ranks.

    Attributes
    ----------
    how : str
        "mean": every new rank gets the mean of the old ranks' arrays, so that their mean is what it was.
        "copy": every new rank gets the replicated array `of`, of which the arrays are to be the mean, and what is `owed`.
        "cut": the old ranks' arrays, one after the other, are one vector, of which this rank gets ``start ... stop - 1``.
        "same": it is the same on all ranks.
    of : str
    owed : str
        The array of which the old ranks' pieces, one after the other, are what `of` lacks of the mean; "" where it lacks
        nothing.
    start, stop : int
    """

    how: Literal["mean", "copy", "cut", "same"]
    of: str = ""
    owed: str = ""
    start: int = 0
    stop: int = 0


class Memory:
    """What a plan keeps from one exchange to the next; nothing, unless a plan says otherwise."""

    def state(self) -> dict[str, np.ndarray]:
        """Return this rank's named arrays that the next exchanges depend on; a checkpoint saves them. Local."""
        return {}

    def moves(self) -> dict[str, Move]:
        """Return how each array of :meth:`state` gets to other ranks. Local."""
        return {}

    @property
    def share(self) -> Move | None:
        """How vectors get to other ranks that belong to clients, not to ranks; None where they belong to ranks."""
        return None

    def undo(self) -> None:
        """Take back what the last exchange has changed of :meth:`state`, because nobody will use its messages. Local.

        Once, and only after one that has not raised.
        """
