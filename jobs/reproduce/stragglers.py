"""How long steps of coded gradients take on real ranks of which one is stopped, or some sleep."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import gethostname
from time import perf_counter, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.coded import CodedGradients, FractionalRepetition, Order
from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import SilenceError

__all__ = ["Timed", "timed"]

Vector = NDArray[np.float64]

LEAST = 4  # ranks
_D, _PART = 68, 4e-3  # entries; seconds that a part takes
_ASLEEP, _ENTER, _LEAVE = 0.5, 0.05, 0.7  # seconds; chances that a rank falls asleep, and that it wakes
_STOPS_AT, _PATIENCE = 5, 2.0
_STEPS, _SLEEPY_STEPS = 100, 200
HOW = (f"times of steps: on real ranks, {LEAST} or more, one of which is stopped for some seconds; "
       f"mpiexec -n {LEAST} mpi-ef reproduce gradient-coding")


@dataclass
class Timed:
    """Lines, rows of metrics, and figures by name; on ranks other than 0 without content."""

    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def timed(comm: MpiComm, steps: int) -> Timed:
    """Take the times where there are enough real ranks, else say how to get them. Collective.

    Nothing collective runs while a rank is stopped, and it goes on afterwards.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    if mpi_of(comm) is None or size < LEAST:
        return Timed([HOW])
    n = size // 2 * 2
    ranks = comm.Split(int(rank < n), rank)
    found = _Times(ranks, steps).all() if rank < n else Timed()
    ranks.Free()
    comm.Barrier()
    return found


class _Times:
    """All methods are collective among an even number of ranks."""

    def __init__(self, comm: Any, steps: int) -> None:
        self.comm, self.n, self.rank = comm, comm.Get_size(), comm.Get_rank()
        self.steps, self.sleepy_steps = steps or _STEPS, steps or _SLEEPY_STEPS
        where = comm.allgather((gethostname(), os.getpid()))
        here = [i for i, (host, _) in enumerate(where) if host == where[0][0]]
        self.stopped, self.process = here[-1], where[here[-1]][1]  # it stops itself, and rank 0 lets it go on
        self.found = Timed([f"seconds of a step on {self.n} ranks, {1e3 * _PART:g} ms a part; ranks that sleep: all but 0",
                            f"{'':44}{'steps':>6}{'median':>9}{'mean':>9}{'p95':>9}"] if not self.rank else [])

    def all(self) -> Timed:
        """Return all that there is to say."""
        plain, twins = FractionalRepetition(0), FractionalRepetition(1)
        quiet = self._run("repetition s=1, none is late", twins, self.steps)
        if self.stopped:
            still = self._run(f"repetition s=1, rank {self.stopped} stopped", twins, self.steps + _STOPS_AT, stops=True)
            self._run(f"uncoded, rank {self.stopped} stopped", plain, _STOPS_AT + 1, stops=True)
            self._note(stopped=lambda: np.median(still) / np.median(quiet))
        waiting = self._run(f"uncoded, ranks sleep {_ASLEEP:g} s", plain, self.sleepy_steps, sleeps=True)
        coded = self._run(f"repetition s=1, ranks sleep {_ASLEEP:g} s", twins, self.sleepy_steps, sleeps=True)
        self._note(p95=lambda: np.quantile(coded, 0.95) / np.quantile(waiting, 0.95))
        return self.found

    def _note(self, **figures: Callable[[], Any]) -> None:
        if self.rank == 0:
            self.found.figures |= {name: float(figure()) for name, figure in figures.items()}

    def _run(self, name: str, code: FractionalRepetition, steps: int, *, stops: bool = False,
             sleeps: bool = False) -> list[float]:
        """Return the seconds of steps, of those with a stopped rank where one is; on workers nothing. Add lines and rows."""
        asleep, seconds = self._asleep(steps) if sleeps else np.zeros(steps, np.bool_), list[float]()
        coded = CodedGradients(self.comm, _D, np.float64, code, patience_seconds=_PATIENCE if stops and not code.s else 60.0)
        with coded:
            if not coded.is_server:
                for order in coded.orders():
                    if stops and self.rank == self.stopped and order.step == _STOPS_AT:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    coded.answer(_gradient(coded, order, asleep=asleep[order.step]))
                return seconds
            error, x = "", np.ones(_D)
            try:
                for step in range(steps):
                    began = perf_counter()
                    if (own := coded.begin(x)) is not None:
                        coded.answer(_gradient(coded, own, asleep=False))
                    x = x - 0.1 * coded.end().vector
                    if step >= _STOPS_AT or not stops:
                        seconds.append(perf_counter() - began)
            except SilenceError as silence:
                error = str(silence)
                self._note(raised=lambda: perf_counter() - began)
            finally:
                if stops:
                    os.kill(self.process, signal.SIGCONT)
            coded.decider.server.patience_seconds = 60.0
            if error:
                coded.end()
            coded.close(x)
        self._tell(name, seconds, error, coded.lateness.lines(sum(seconds), s=code.s) if sleeps else [])
        return seconds

    def _tell(self, name: str, seconds: list[float], error: str, lateness: list[str]) -> None:
        times = np.median(seconds or [0.0]), np.mean(seconds or [0.0]), np.quantile(seconds or [0.0], 0.95)
        figures = f"  {error}" if error else f"{len(seconds):6}" + "".join(f"{value:9.4f}" for value in times)
        self.found.lines += [f"{name:44}{figures}", *(f"    {line}" for line in lateness)]
        self.found.rows += [{"panel": "times", "run": name, "step": t, "seconds": took} for t, took in enumerate(seconds)]

    def _asleep(self, steps: int) -> NDArray[np.bool_]:
        """Return in which steps this rank sleeps, if it computes them (Gilbert-Elliott)."""
        draw, state, states = np.random.default_rng((3, self.rank)), False, np.zeros(steps, np.bool_)
        for step in range(steps):
            state = draw.random() < (1 - _LEAVE if state else _ENTER)
            states[step] = state
        return states


def _gradient(coded: CodedGradients, order: Order, *, asleep: bool) -> Vector:
    """Compute for as long as the parts take."""
    if asleep:
        sleep(_ASLEEP)
    total = np.zeros(_D)
    for part, weight in zip(order.parts, order.weights, strict=True):
        total += weight * (order.x - part) / coded.n
        sleep(_PART)
        coded.progress()
    return total
