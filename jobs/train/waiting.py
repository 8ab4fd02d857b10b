"""Which ranks the others wait for: delays of all steps, a file of them, and what is said at the end of a run."""

from pathlib import Path
from platform import node
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import Lateness
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DataError
from mpi_ef.jobs.delays import FILE, load_lateness, said_of, save_lateness
from mpi_ef.optim.flat import FlatOptimizer
from mpi_ef.optim.waits import delays

__all__ = ["Waiting"]


class Waiting:
    """How late the ranks come to the steps of an optimizer. Rank 0 keeps it.

    Attributes
    ----------
    lateness : Lateness or None
    """

    def __init__(self, comm: Comm, optimizer: FlatOptimizer) -> None:
        self._comm, self._optimizer, self._seen = comm, optimizer, 0
        self.lateness = Lateness(int(comm.Get_size())) if comm.Get_rank() == 0 else None

    def last(self) -> float:
        """Return how long this rank has waited for others since the last call; NaN where ranks have not met. Local."""
        count, seconds = self._optimizer.waited
        met, self._seen = count > self._seen, count
        return seconds if met else np.nan

    def add(self, waits: NDArray[np.float64], left_out: NDArray[np.bool_]) -> None:
        """Add steps, given what :meth:`last` has returned on all ranks, (ranks, steps), but those left out. Local.

        A step counts where all ranks have met in it.
        """
        if self.lateness is not None:
            for row in delays(waits.T[np.isfinite(waits).all(axis=0) & ~left_out]):
                self.lateness.add(row)

    def save(self, folder: Path) -> None:
        """Write the file of a run that may go on from here, or has ended; nothing without a step of several ranks. Local."""
        if self.lateness is not None and self.lateness.n > 1 and self.lateness.steps:
            save_lateness(folder / FILE, self.lateness)

    def load(self, folder: Path) -> None:
        """Go on from that file, where there is one of as many ranks. Local."""
        if self.lateness is not None:
            try:
                found = load_lateness(folder / FILE)
            except DataError:  # what is said at the end is of the rest of the run then
                return
            self.lateness = found if found.n == self.lateness.n else self.lateness

    def summary(self, seconds: float, computing: float, *, rounds: bool) -> dict[str, Any]:
        """Return for the summary of a run who is slow, on all ranks; nothing where nothing is known. Collective.

        Parameters
        ----------
        seconds, computing : float
            That all steps have taken, and what data and gradients have on this rank. A part of a code would take what they
            do on the median rank.
        rounds : bool
            Whether rows are of rounds of several steps.
        """
        hosts, spent = zip(*self._comm.allgather((node(), computing)), strict=True)
        said = dict[str, Any]()
        if self.lateness is not None and self.lateness.n > 1 and self.lateness.steps:
            late = self.lateness
            late.part_seconds = sorted(spent)[(late.n - 1) // 2] / late.steps  # of two the quick one: the other may be slow
            names = [f"rank {rank}" + f" on {host}" * (len({*hosts}) > 1) for rank, host in enumerate(hosts)]
            said = said_of(late, late.lines(seconds, names, steps="rounds" if rounds else "steps"), range(late.n))
        everybodys: list[dict[str, Any]] = self._comm.allgather(said)
        return {"lateness": everybodys[0]} if everybodys[0] else {}
