"""How long each rank waits for the last one at the beginning of steps, and who is late therefore."""

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import Lateness
from mpi_ef.comm.consensus import gather_values
from mpi_ef.comm.protocol import Comm

__all__ = ["Waits", "delays"]

KEEP = 4096


def delays(waits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return how much later than the first each rank has come, given how long each has waited for the last: (..., ranks)."""
    late: NDArray[np.floating] = waits.max(axis=-1, keepdims=True) - waits
    return late


class Waits:
    """Seconds that this rank has waited in the last 4096 meetings of all ranks of `comm`, and what they say of all.

    Memory: 4 bytes for each of these, and as many for each rank from the first call of :meth:`gathered` on.

    Attributes
    ----------
    count : int
        Meetings so far.
    last : float
        Seconds of the last one; NaN where it does not count.
    total : float
        Seconds of all, also of those that do not count.
    """

    def __init__(self, comm: Comm, call: str) -> None:
        self._comm, self._call = comm, call
        self._seconds = np.zeros(KEEP, np.float32)
        self.count, self._taken, self.last, self.total = 0, 0, np.nan, 0.0
        self._rows: Lateness | None = None
        self._began = False

    def note(self, seconds: float, *, counts: bool) -> None:
        """Note a meeting, alike on all ranks. The first one does not count: kernels and data are loaded before it. Local."""
        self.total += seconds
        if not counts or not self._began:
            self._began, self.last = True, np.nan
            return
        self._seconds[self.count % KEEP] = self.last = seconds
        self.count += 1

    def gathered(self) -> Lateness:
        """Return the delays of all ranks, with the rows since the last call. Collective.

        Raises `DisagreementError` on all ranks where they are in other calls, or in that of another optimizer.
        """
        if self._rows is None:
            self._rows = Lateness(int(self._comm.Get_size()), KEEP)
        new = range(max(self._taken, self.count - KEEP), self.count)
        answers = gather_values(self._comm, self._call, (new.start, new.stop))
        self._taken = self.count
        if answers.count(answers[0]) == len(answers) and new:  # else an error was caught on some ranks
            waits = np.empty((len(answers), len(new)), np.float32)
            self._comm.Allgather(self._seconds[np.arange(new.start, new.stop) % KEEP], waits)
            for row in delays(waits.T):
                self._rows.add(row)
        return self._rows
