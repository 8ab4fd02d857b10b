"""An exchange that is offered, for somebody else to make."""

from dataclasses import dataclass
from typing import Any

from mpi_ef.compress import Combination, Keep
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError

__all__ = ["Offer"]


@dataclass(frozen=True)
class Offer:
    """An exchange that somebody else makes, at once or in two parts. See :meth:`Plan.exchange` for what it takes.

    Attributes
    ----------
    plan : Plan
    x, keep
    words : dict
        What the plan wants to know besides, for example who speaks.
    """

    plan: Any
    x: Vector | Combination
    keep: Keep | None
    words: dict[str, Any]

    def exchange(self) -> Any:
        """Do it now, and return the plan. Collective."""
        return self.plan.exchange(self.x, keep=self.keep, **self.words)

    def start(self) -> None:
        """Start it; ``plan.wait()`` finishes. Collective."""
        if self.words:
            raise OptionError(f"{type(self.plan).__name__}: an exchange with {', '.join(self.words)} cannot be split")
        self.plan.start(self.x, keep=self.keep)
