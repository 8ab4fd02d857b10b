"""What schemes would have taken where workers were late as recorded, and which is the fastest. No MPI.

A *profile* is an array (rounds, n), how many seconds each worker took beyond the fastest of the round: inf where no answer
came, NaN where it had nothing to do (counted as 0). :func:`profile_of` makes one of what `Lateness` has recorded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpi_ef.errors import OptionError, ShapeError
from mpi_ef.ranges import whole, within

from .schemes import GC, MSGC, SRSGC, Scheme
from .sequential import Schedule, scheduled

__all__ = ["Run", "candidates", "choose", "gilbert_elliott", "profile_of", "simulate"]

Profile = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What a simulation has seen.

    Parameters
    ----------
    scheme : Scheme
    rule : str
    load : float
        The share of a job's data that a worker computes in a round.
    delay : int
        T.
    jobs : int
        How many were decoded.
    seconds : float
        From the first round to the last; inf where a job could not be decoded without an answer that never came.
    waits : int
        In how many rounds one had to wait longer than `grace` says.
    """

    scheme: Scheme
    rule: str
    load: float
    delay: int
    jobs: int
    seconds: float
    waits: int


def gilbert_elliott(rounds: int, n: int, enter: float, leave: float, late: float, *,
                    seed: int | tuple[int, ...] = 0) -> Profile:
    """Return a profile (rounds, n) of workers that become slow with probability `enter` and fast again with `leave`. Local.

    A slow one is `late`, else 0; before the first round a worker is slow with probability enter / (enter + leave).
    """
    whole("gilbert_elliott", 1, "of the profile", rounds=rounds, n=n)
    within("gilbert_elliott", "(0, 1]", "a probability", enter=enter, leave=leave)
    rng = np.random.default_rng(seed)
    slow, profile = rng.random(n) < enter / (enter + leave), np.zeros((rounds, n))
    for row in profile:
        drawn = rng.random(n)
        slow = np.where(slow, drawn >= leave, drawn < enter)
        row[slow] = late
    return profile


def profile_of(rows: ArrayLike) -> Profile:
    """Return the profile of what was recorded, `Lateness.rows`, (rounds, n). Local.

    A worker of which an answer is awaited is asked nothing more: its inf before a later answer say that it had nothing to
    do, and become NaN. Those after its last answer stay.
    """
    late = np.array(rows, np.float64)
    if late.ndim != 2:
        raise ShapeError(f"profile: shape {late.shape}, where (rounds, workers) was expected; take Lateness.rows")
    answers_later = np.isfinite(late)[::-1].cumsum(axis=0)[::-1] > 0
    late[np.isinf(late) & answers_later] = np.nan
    return late


def simulate(scheme: Scheme, profile: ArrayLike, *, part_seconds: float, rest_seconds: float, jobs: int | None = None,
             rule: str = "lazy", grace: float = 0.25, relative: bool = False, restart: bool = False,
             vector_seconds: float = 0.0) -> Run:
    """Return what a scheme takes. Local, without chance.

    A worker with a share `load` of a job takes ``rest_seconds + n load part_seconds``, and what the profile says of it in
    that round. A round ends when the rule allows and (1 + grace) times as much time has passed as the first answer took, or
    when all have answered; with ``GC`` as soon as the job can be decoded.

    Parameters
    ----------
    scheme : Scheme
    profile : array_like
        (rounds, n); after its last row it begins again.
    part_seconds : float
        What a worker computes for 1 / n of the data of a job.
    rest_seconds : float
        Of a round, whatever is computed.
    jobs : int, optional
        By default as many as the profile has rows.
    rule : {"lazy", "paper"}
        See :func:`mpi_ef.coded.scheduled`.
    grace : float
    relative : bool
        The profile is in units of what a worker takes that is not late, in place of seconds: what is slow computes slowly.
    restart : bool
        At the end of a round, late work is thrown away and all workers are free, as papers assume. By default a worker goes
        on until it has answered, and its answer counts when it comes.
    vector_seconds : float
        For each vector that a worker sends beyond the first.

    Raises
    ------
    OptionError, ShapeError
    """
    late = _checked(profile, grace=grace, part_seconds=part_seconds, rest_seconds=rest_seconds,
                    vector_seconds=vector_seconds)
    rounds, n = late.shape
    jobs = rounds if jobs is None else jobs
    schedule, load = scheduled(scheme, n, jobs=jobs, rule=rule), scheme.load(n)
    own = rest_seconds + n * load * part_seconds + (scheme.vectors - 1) * vector_seconds
    takes = own + late * (own if relative else 1.0)
    at_once = isinstance(scheme, GC)
    now, waits, until = 0.0, 0, np.full(n, inf)  # until: when an answer comes
    while schedule.begin():
        busy = np.array(schedule.awaited(), np.intp)
        schedule.lost(busy if restart else busy[until[busy] == inf])
        row, waited = takes[schedule.round % rounds], False
        fresh = _given(schedule)
        until[fresh] = now + row[fresh]
        patient = now + (1.0 + grace) * float(row.min())
        enough = now if at_once else patient
        while (waiting := np.array(schedule.awaited(), np.intp)).size:
            times = until[waiting]
            nearest = float(times.min())
            if nearest > enough:
                if not schedule.must_wait():
                    now = max(now, enough)
                    break
                if nearest == inf:
                    return Run(scheme, rule, load, scheme.delay, jobs, inf, waits)
                waited |= nearest > patient
            come = waiting[times <= max(enough, nearest)]
            now = max(now, float(until[come].max()))
            schedule.deliver(come)
            again = _given(schedule)  # whose answers were late, at once
            until[again] += row[again]
        waits += waited
    return Run(scheme, rule, load, scheme.delay, jobs, now, waits)


def _given(schedule: Schedule) -> NDArray[np.intp]:
    """Give all free workers their tasks, and return who."""
    free = np.array(schedule.free(), np.intp)
    if free.size:
        schedule.assign(free)
    return free


def choose(profile: ArrayLike, *, part_seconds: float, rest_seconds: float, delay: int, jobs: int | None = None,
           schemes: Iterable[Scheme] | None = None, **options: Any) -> list[Run]:
    """Return what every scheme would have taken, the fastest first; among equals with less delay and load. Local.

    Parameters
    ----------
    profile : array_like
        (rounds, n); of a recorded run ``profile_of(lateness.rows)``.
    part_seconds, rest_seconds : float
    delay : int
        The largest T: one less than the number of models.
    jobs : int, optional
    schemes : iterable of Scheme, optional
        By default :func:`candidates`.
    **options
        As of :func:`simulate`.
    """
    whole("choose", 0, "the number of models less 1", delay=delay)
    n = _checked(profile).shape[1]
    found = [simulate(scheme, profile, part_seconds=part_seconds, rest_seconds=rest_seconds, jobs=jobs, **options)
             for scheme in (candidates(n, delay) if schemes is None else schemes) if scheme.delay <= delay]
    return sorted(found, key=lambda run: (run.seconds, run.delay, run.load))


def candidates(n: int, delay: int, rule: str = "lazy") -> list[Scheme]:
    """Return schemes for n workers with T up to `delay` that differ in what they do under a rule. Local.

    Uncoded; GC and SR-SGC with codes of s up to n / 2; M-SGC with all W and B, and lam of which there are codes, or n.
    """
    sizes = [s for s in range(1, n) if n % (s + 1) == 0 or s <= 4]
    found: list[Scheme] = [GC(0), *(GC(s) for s in sizes if 2 * s <= n)]
    for burst in range(1, delay + 1):
        for s in (s for s in sizes if 2 * s <= n):
            windows = [burst + 1] if rule == "lazy" else [burst * x + 1 for x in (1, 2, 3)]
            for window in windows:
                lam = s * (window - 1 + burst) // burst  # the most for this s
                found += [SRSGC(burst, window, lam)] * (lam <= n)
        found += [MSGC(burst, window, lam) for window in range(2, delay + 3 - burst) for lam in [*sizes, n]]
    return found


def _checked(profile: ArrayLike, **seconds: float) -> Profile:
    late = np.asarray(profile, np.float64)
    if late.ndim != 2 or not late.size:
        raise ShapeError(f"profile: shape {late.shape}, where (rounds, workers) was expected; take "
                         "profile_of(Lateness.rows)")
    late = np.where(np.isnan(late), 0.0, late)
    if (late < 0).any():
        raise OptionError(f"profile: {late.min():.3g} seconds in round {int(late.min(axis=1).argmin())} are negative; they "
                          "are seconds beyond the fastest")
    within("simulate", "[0, inf)", "seconds", **seconds)
    return late
