"""Messages that stay until they have been replaced entry by entry."""

from collections.abc import Callable
from typing import Any

from mpi_ef.compress.combination import Vector

__all__ = ["Turns"]


class Turns:
    """Messages of the last exchange and, where :meth:`Plan.set_mean` replaces them entry by entry, of the one before."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build, self.now = build, build()
        self.before: Any = None
        self._written: tuple[Vector, int] | None = None  # what was last written to, after which turn
        self._turn = 0

    def prepare(self) -> None:
        """Take the memory for two of them, if it is wanted: where an exchange can tell all ranks that there is none."""
        if self._written is not None and self.before is None:
            self.before = self._build()

    def next(self) -> Any:
        """Return where the next messages go."""
        self._turn += 1
        if self.before is not None:
            self.now, self.before = self.before, self.now
        return self.now

    def forget(self) -> None:
        """Forget what was written to."""
        self._written = None

    def follows(self, out: Vector) -> bool:
        """Tell whether `out` was last written to, and holds what the messages :attr:`before` say; it is written to now."""
        written, self._written = self._written, (out, self._turn)
        return self.before is not None and written is not None and written[0] is out and written[1] == self._turn - 1
