"""What plans keep from one exchange to the next."""

import numpy as np

from mpi_ef.statetree import Leaf, Reshard

__all__ = ["PlanState"]


class PlanState:
    """What a plan keeps from one exchange to the next; nothing, unless a plan says otherwise."""

    def leaves(self) -> dict[str, Leaf]:
        """Return this rank's named arrays that the next exchanges depend on, and what they are; they are saved. Local."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays of :meth:`leaves`. Not copies. Local."""
        return {name: leaf.array for name, leaf in self.leaves().items()}

    @property
    def share(self) -> Reshard | None:
        """How vectors get to other ranks that belong to clients, not to ranks; None where they belong to ranks."""
        return None

    def undo(self) -> None:
        """Take back what the last exchange has changed of :meth:`state`, because its messages will not be used. Local.

        Once, and only after one that has not raised.
        """
