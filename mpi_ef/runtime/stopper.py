"""Stopping on a signal to any rank, or near a deadline: all ranks leave the loop after the same step."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Self

import numpy as np

from mpi_ef.comm.consensus import agree, check_not_freed
from mpi_ef.comm.protocol import Comm
from mpi_ef.documents import shown, written
from mpi_ef.errors import OptionError
from mpi_ef.ranges import whole, within

__all__ = ["SIGNALS", "Stopper"]

# What batch systems send before the end: Slurm TERM and whatever --signal asks for, usually one of the others.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_DEADLINE = 255  # stands for the deadline where a signal's number would


class Stopper:
    """Stops a training loop, on all ranks after the same step. Construction is collective.

    ::

        stopper = Stopper(comm, deadline=time.time() + 3500)
        for step in range(start, steps):
            ...
            if stopper.should_stop():
                save(step + 1)
                stopper.mark_requeue(folder / "requeue")
                break

    Handlers only set a flag; they replace earlier ones until :meth:`close`. Construct it in the main thread, after mpi4py
    has been imported.

    Parameters
    ----------
    comm : MPI.Comm
    signals : sequence of signal numbers
        Any of them, to any rank, stops all. Empty where the caller calls :meth:`request` itself.
    deadline : float, optional
        Unix time by which the program has to be gone; rank 0's counts.
    margin_seconds : float
        How long before the deadline to stop: time to save.
    every : int
        Ask the other ranks in every so-many-th call only.

    Attributes
    ----------
    reason : str or None
        Why all stop, the same on all ranks; None before.
    """

    _first_asked: ClassVar[float | None] = None  # when the first step of this process ended, also after a rank has died

    def __init__(self, comm: Comm, *, signals: Sequence[int] = SIGNALS, deadline: float | None = None,
                 margin_seconds: float = 60.0, every: int = 1) -> None:
        self.comm = comm
        self.reason: str | None = None
        self._every, self._calls, self._asked = every, 0, 0
        self._before: dict[int, Any] = {}
        self._stopped = 0.0

        def facts() -> dict[str, object]:
            whole("Stopper", 1, "1 asks in every call", every=every)
            within("Stopper", "[0, inf)", "pass the time that saving takes", margin_seconds=margin_seconds)
            return {"every": every, "signals": tuple(map(int, signals))}

        agree(comm, "Stopper", facts, "build it from the same arguments everywhere")
        self._stop_time = None if deadline is None else deadline - margin_seconds
        for number in signals:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._asked = int(number)

    @property
    def asked(self) -> int:
        """The signal that has reached this rank; SIGTERM when all stop for another reason, 0 when none do. Local."""
        return self._asked or (0 if self.reason is None else int(signal.SIGTERM))

    def request(self, number: int = int(signal.SIGTERM)) -> None:
        """Do what a signal to this rank does. Local, also in a signal handler."""
        self._asked = int(number)

    def should_stop(self) -> bool:
        """Return whether to stop now; the same answer on all ranks. Collective: all call it equally often.

        Cost: one allgather of a byte. Once the answer is yes, it stays yes and costs nothing.
        """
        if self.reason is not None:
            return True
        self._calls += 1
        if Stopper._first_asked is None:
            Stopper._first_asked = time.time()
        if self._calls % self._every:
            return False
        check_not_freed(self.comm, "Stopper")
        mine = self._asked
        if not mine and self.comm.Get_rank() == 0 and self._stop_time is not None and time.time() >= self._stop_time:
            mine = _DEADLINE
        answers = np.zeros(self.comm.Get_size(), np.uint8)
        self.comm.Allgather(np.array([mine], np.uint8), answers)
        asked = np.flatnonzero(answers)
        if asked.size:
            rank, number = int(asked[0]), int(answers[asked[0]])
            self.reason = "the deadline is near" if number == _DEADLINE else f"{_name(number)} on rank {rank}"
            self._stopped = time.time()
        return self.reason is not None

    def mark_requeue(self, path: Path, reason: str | None = None) -> None:
        """Write the reason to `path` on rank 0: the mark of a run that is to be continued, for a batch script. Local.

        After a signal or near the deadline a second line says from when to when, in seconds since 1970, the process has
        asked :meth:`should_stop`: `mpi-ef supervise` compares that with the time that the start took.

        Parameters
        ----------
        path : Path
        reason : str, optional
            Of the program itself.

        Raises
        ------
        OptionError
            Before :meth:`should_stop` has said yes, when there is no other reason.
        """
        spent = f"steps from {self._first_asked:.3f} to {self._stopped:.3f}\n" if self.reason else ""
        reason = self.reason if reason is None else reason
        if reason is None:
            raise OptionError("Stopper: mark_requeue was called although nothing has stopped the run")
        if self.comm.Get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with written(path) as descriptor:
                    os.write(descriptor, f"{reason}\n{spent}".encode("utf-8", "replace"))
            except ValueError as error:
                raise OptionError(f"Stopper: mark_requeue: {shown(path.parent)}: {error}; remove it") from None

    def close(self) -> None:
        """Put back the handlers that were there before. Local."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")
