"""Where a rank is, kept while its parameters are others for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError
from mpi_ef.vectors import FlatParameters

__all__ = ["Aside"]


class Aside:
    """Lets parameters be others meanwhile, and gives them back. Local.

    Attributes
    ----------
    active : bool
        Whether that is so now.
    values : (d,) array or None
        What the parameters were and will be again, where they are others.
    """

    def __init__(self, flat: FlatParameters, subject: str) -> None:
        self._flat, self._subject, self.active = flat, subject, False
        self.values: Vector | None = None
        self._memory: Vector | None = None

    @contextmanager
    def instead(self, others: Vector | None) -> Iterator[None]:
        """Let the parameters be `others`, (d,), or what they are. Inside of another such context nothing changes."""
        if self.active:
            yield
            return
        flat, self.active = self._flat, True
        try:
            if others is None:
                yield
                return
            flat.adopt()
            if self._memory is None:
                self._memory = flat.kernels.zeros(flat.d)
            self.values = self._memory
            self.values[:] = flat.values
            flat.values[:] = others
            flat.write_back()
            yield
        finally:
            self.back()

    def back(self) -> None:
        """Let the parameters be what they were, also where such a context was left half-way and not closed."""
        values, self.active, self.values = self.values, False, None
        if values is None:
            return
        try:
            self._flat.adopt()  # memory that the program has given parameters meanwhile, where they would stay others
        finally:
            self._flat.values[:] = values
            self._flat.write_back()

    def refuse(self, call: str) -> None:
        """Raise where parameters are others now, or may be."""
        if self.active:
            raise OptionError(f"{self._subject}: {call} inside of `with optimizer.shared():`, after which this rank goes on "
                              "from where it was; leave it first")
