"""Schemes of sequential gradient coding: what each worker computes of several jobs in a round, and how much. No MPI.

Krishnan, Ebrahimi, Khisti, ICLR 2023 (arXiv 2211.13802). Job t, the gradient of one model, begins in round t and can be
decoded at the end of round t + T, T being the *delay*: so it wants T + 1 models that do not depend on one another, and job t
is one of model t mod (T + 1). A round's work of a worker is made of *tasks*, each of one job; the result of a task is a
vector, the weighted sum of the gradients over a few *chunks* of that job's data.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import OptionError, briefly, counted
from mpi_ef.ranges import whole

from .blocks import code_for
from .codes import Coefficients, GradientCode

__all__ = ["GC", "MSGC", "SRSGC", "Scheme", "Task", "scheme_of"]


@dataclass(frozen=True)
class Task:
    """A part of a job: the result is ``sum_k weights[k] * (sum of the gradients over chunk chunks[k])``.

    Parameters
    ----------
    job : int
    worker : int
        Who computes it.
    slot : int
        Which one of this worker's tasks of this job: `Scheme.task` makes a task of (job, worker, slot).
    chunks : tuple of int
        Numbers of chunks, see `Scheme.bounds`.
    weights : tuple of float
    """

    job: int
    worker: int
    slot: int
    chunks: tuple[int, ...]
    weights: tuple[float, ...]


class Scheme(ABC):
    """A scheme, a frozen dataclass; the number of workers n comes with each call. All is local, nothing is random."""

    @property
    @abstractmethod
    def delay(self) -> int:
        """Return T: job t can be decoded at the end of round t + T at the latest."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Return how many tasks of a job a worker may be given."""

    @property
    @abstractmethod
    def vectors(self) -> int:
        """Return how many vectors a worker sends in a round, at most."""

    @abstractmethod
    def code(self, n: int) -> GradientCode | None:
        """Return the code of tasks that are coded."""

    @abstractmethod
    def shares(self, n: int) -> Coefficients:
        """Return what share of a job's data each chunk has, (chunks,); they sum to 1."""

    @abstractmethod
    def load(self, n: int) -> float:
        """Return the share of a job's data that a worker computes in a round."""

    @abstractmethod
    def task(self, job: int, worker: int, slot: int, n: int) -> Task:
        """Return what a worker computes in that slot of a job."""

    def check(self, n: int) -> None:
        """Raise `OptionError` where there is no such scheme for n workers."""
        self.code(n)

    def bounds(self, n: int, samples: int) -> NDArray[np.int64]:
        """Return where chunks of a job's samples begin and end, (chunks + 1,): chunk k is bounds[k] to bounds[k + 1]."""
        edges = np.concatenate([[0.0], np.cumsum(self.shares(n))])
        places: NDArray[np.int64] = np.rint(edges / edges[-1] * samples).astype(np.int64)
        return places


def _coded(code: GradientCode, job: int, worker: int, slot: int, n: int, first: int) -> Task:
    chunks, weights = _row(code, worker, n)
    return Task(job, worker, slot, tuple(first + part for part in chunks), weights)


@lru_cache(4096)
def _row(code: GradientCode, worker: int, n: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return code.parts(worker, n), tuple(map(float, code.row(worker, n)))


class _Whole(Scheme):
    """What codes all of a job at once."""

    @abstractmethod
    def _missing(self) -> int:
        """Return s."""

    @property
    def slots(self) -> int:
        """Return 1."""
        return 1

    @property
    def vectors(self) -> int:
        """Return 1."""
        return 1

    def code(self, n: int) -> GradientCode:
        """Return the code, see :func:`mpi_ef.coded.code_for`."""
        return code_for(n, self._missing())

    def shares(self, n: int) -> Coefficients:
        """Return 1 / n, n times."""
        return np.full(n, 1 / n)

    def load(self, n: int) -> float:
        """Return (s + 1) / n, of the code's s."""
        return self.code(n).load(n)

    def task(self, job: int, worker: int, slot: int, n: int) -> Task:
        """Return the coded gradient of a worker."""
        return _coded(self.code(n), job, worker, slot, n, 0)


@dataclass(frozen=True, repr=False)
class GC(_Whole):
    """Gradient coding, round by round: no delay, load (s + 1) / n. ``GC(0)`` is uncoded.

    Parameters
    ----------
    s : int
        How many workers may be missing in a round; where there is no code for n and s, the next larger s.
    """

    s: int = 1

    def __post_init__(self) -> None:
        whole("GC", 0, "s workers may be missing; 1 is usual", s=self.s)

    def __repr__(self) -> str:
        return f"GC({self.s})"

    def _missing(self) -> int:
        return self.s

    @property
    def delay(self) -> int:
        """Return 0."""
        return 0


@dataclass(frozen=True, repr=False)
class SRSGC(_Whole):
    """Selective-reattempt sequential gradient coding: who is missed of job r - B does that one again in round r, if need be.

    All workers compute job r with an (n, s) code, s = ceil(B lam / (W - 1 + B)). Where more than s answers of job r - B have
    not come, enough of those workers compute that job in round r and not job r. T = B, load (s + 1) / n.

    Parameters
    ----------
    burst : int
        B: a worker that is slow twice in `window` rounds is so within this many rounds.
    window : int
        W; B divides W - 1.
    lam : int
        How many workers are slow at some time in W rounds, at most.
    """

    burst: int = 1
    window: int = 2
    lam: int = 1

    def __post_init__(self) -> None:
        burst, window = self.burst, self.window
        _bursty("SRSGC", burst, window, self.lam)
        if (window - 1) % burst:
            near = max(burst, (window - 1) // burst * burst) + 1
            raise OptionError(f"SRSGC: burst={burst} does not divide window - 1={window - 1}; take window={near}")

    def __repr__(self) -> str:
        return f"SRSGC({self.burst}, {self.window}, {self.lam})"

    @property
    def s(self) -> int:
        """Return ceil(B lam / (W - 1 + B)): how many answers of a job need not come in its round."""
        return -(-self.burst * self.lam // (self.window - 1 + self.burst))

    def _missing(self) -> int:
        return self.s

    def check(self, n: int) -> None:
        """Raise `OptionError` unless lam <= n and s < n."""
        _at_most(self.lam, n, "SRSGC")
        super().check(n)

    @property
    def delay(self) -> int:
        """Return B."""
        return self.burst


@dataclass(frozen=True, repr=False)
class MSGC(Scheme):
    """Multiplexed sequential gradient coding: many small tasks of W - 1 + B jobs in a round, most of them not coded.

    Of a job's data each worker has W - 1 chunks of its own, of size (lam + 1) c; the rest are B groups of n chunks of size
    c, each group with an (n, lam) code. Task m of round r is of job r - m: a chunk of the worker's own that has not come
    yet; where all have, from m = W - 1 on the coded sum of group m - (W - 1). T = W - 2 + B, and the load is
    (lam + 1) (W - 1 + B) / (n (B + (W - 1) (lam + 1))): hardly more than 1 / n. With lam = n there are no groups, and all
    workers may be slow at once: (W - 1 + B) / (n (W - 1)). Where there is no code for n and lam, the next larger lam of
    which there is one takes its place.

    Workers send up to W - 1 + B vectors in a round: it saves computing, not bytes.

    Parameters
    ----------
    burst : int
        B: a worker that is slow twice in `window` rounds is so within this many rounds.
    window : int
        W.
    lam : int
        How many workers are slow at some time in W rounds, at most.
    """

    burst: int = 1
    window: int = 3
    lam: int = 1

    def __post_init__(self) -> None:
        _bursty("MSGC", self.burst, self.window, self.lam)

    def __repr__(self) -> str:
        return f"MSGC({self.burst}, {self.window}, {self.lam})"

    @property
    def own(self) -> int:
        """Return W - 1: how many chunks of a job are a worker's own."""
        return self.window - 1

    @property
    def delay(self) -> int:
        """Return W - 2 + B."""
        return self.own + self.burst - 1

    @property
    def slots(self) -> int:
        """Return W - 1 + B."""
        return self.own + self.burst

    @property
    def vectors(self) -> int:
        """Return W - 1 + B."""
        return self.slots

    def check(self, n: int) -> None:
        """Raise `OptionError` unless lam <= n."""
        _at_most(self.lam, n, "MSGC")

    def code(self, n: int) -> GradientCode | None:
        """Return the code of a group; None: there are no groups."""
        self.check(n)
        return None if self.lam == n else code_for(n, self.lam)

    def shares(self, n: int) -> Coefficients:
        """Return those of the workers' own chunks, worker by worker, then those of the groups."""
        code, own = self.code(n), n * self.own
        if code is None:
            return np.full(own, 1 / own)
        c = 1 / (n * (self.burst + self.own * (code.s + 1)))
        return np.concatenate([np.full(own, (code.s + 1) * c), np.full(n * self.burst, c)])

    def load(self, n: int) -> float:
        """Return W - 1 + B chunks of a worker's own."""
        return self.slots * float(self.shares(n)[0])

    def task(self, job: int, worker: int, slot: int, n: int) -> Task:
        """Return a chunk of the worker's own, or from slot W - 1 on the coded sum of a group."""
        if slot < self.own:
            return Task(job, worker, slot, (worker * self.own + slot,), (1.0,))
        code = self.code(n)
        if code is None:
            raise OptionError(f"{self}: slot={slot}, where {counted(n, 'worker')} have {self.own} each")
        return _coded(code, job, worker, slot, n, n * slot)


def _bursty(subject: str, burst: int, window: int, lam: int) -> None:
    whole(subject, 1, "a slow worker is so for this many rounds; 1 or 2 are usual", burst=burst)
    whole(subject, 0, "this many workers may be slow in a window; 1 is usual", lam=lam)
    if whole(subject, 1, "a window has 2 rounds or more", window=window) < 2:
        raise OptionError(f"{subject}: window={window} is less than 2; a window has 2 rounds or more")


def _at_most(lam: int, n: int, subject: str) -> None:
    whole(subject, 1, "the number of workers", n=n)
    if lam > n:
        raise OptionError(f"{subject}: lam={lam} of {counted(n, 'worker')} cannot be slow; take lam={n} or less")




def scheme_of(text: "str | Scheme") -> Scheme:
    """Return the scheme that a text names: ``gc:1``, ``srsgc:1,2,2``, ``msgc:1,3,4``, or as schemes print themselves. Local.

    Raises
    ------
    OptionError
        ``"scheme 'sgc:1' is not known; ..."``, or its numbers are wrong.
    """
    if isinstance(text, Scheme):
        return text
    kinds: dict[str, tuple[type[GC | SRSGC | MSGC], int]] = {"gc": (GC, 1), "srsgc": (SRSGC, 3), "msgc": (MSGC, 3)}
    if match := re.fullmatch(r"\s*(gc|srsgc|msgc)\s*[:(]\s*(\d+(?:\s*,\s*\d+)*)\s*\)?\s*", str(text), re.IGNORECASE):
        kind, count = kinds[match[1].lower()]
        numbers = [int(number) for number in match[2].split(",")]
        if len(numbers) == count:
            return kind(*numbers)
    raise OptionError(f"scheme {briefly(text)} is not known; take for example gc:1, srsgc:1,2,2 or msgc:1,3,4: s, or "
                      "B, W, lam")
