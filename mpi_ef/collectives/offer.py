"""An exchange that a rule asks for, and its driver makes."""

from dataclasses import dataclass
from typing import Any

from mpi_ef.compress import Combination, Keep
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError

__all__ = ["Offer"]


@dataclass(frozen=True)
class Offer:
    """An exchange that its driver makes, at once or in two parts. See :meth:`Plan.exchange` for what it takes."""

    plan: Any
    x: Vector | Combination
    keep: Keep | None
    options: dict[str, Any]  # further arguments of the plan, for example which clients participate

    def exchange(self) -> Any:
        """Do it now, and return the plan. Collective."""
        return self.plan.exchange(self.x, keep=self.keep, **self.options)

    def start(self) -> None:
        """Start it; ``plan.wait()`` finishes. Collective."""
        if self.options:
            raise OptionError(f"{type(self.plan).__name__}: an exchange with {', '.join(self.options)} cannot be split")
        self.plan.start(self.x, keep=self.keep)
