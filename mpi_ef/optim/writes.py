"""What a program writes to parameters between steps, and when ranks compare what they have then."""

from zlib import crc32

from mpi_ef.compress.combination import Vector
from mpi_ef.vectors import FlatParameters

__all__ = ["Writes"]


class Writes:
    """Notices that something was written to parameters, also to those that are not trained. Local."""

    EVERY = 16  # of steps in a row that all come after writes, as where weights are clipped in every step

    def __init__(self, flat: FlatParameters) -> None:
        self._flat, self._in_a_row, self._versions = flat, 0, flat.versions()
        self.settle()

    def settle(self, *, but_frozen: bool = False) -> None:
        """Take all parameters as they are now, or those that are trained, for what was compared, or changed by a step."""
        frozen = self._versions[len(self._flat.parameters):] if but_frozen else []
        self._versions, self._adopted = self._flat.versions(), False
        if frozen:
            self._versions[-len(frozen):] = frozen

    def adopt(self) -> None:
        """Do :meth:`FlatParameters.adopt`, and remember whether there was something."""
        self._adopted = self._flat.adopt() or self._adopted

    @property
    def any(self) -> bool:
        """Whether something was written."""
        return self._adopted or self._flat.versions() != self._versions

    def compares(self) -> bool:
        """Return whether ranks are to compare parameters in this step. Called once in every step."""
        self._in_a_row = self._in_a_row + 1 if self.any else 0
        return self._in_a_row % self.EVERY == 1

    def hash(self, values: Vector) -> int:
        """Return a hash of `values`, (d,), and of what is not trained where that was written to."""
        trained, frozen = len(self._flat.parameters), self._flat.frozen
        found = crc32(self._flat.fingerprints(values).data)
        if frozen and self._flat.versions()[trained:] != self._versions[trained:]:
            found = crc32(self._flat.hashes()[trained:].data, found)
        return found
