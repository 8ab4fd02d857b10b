"""Which scheme of sequential gradient coding is the fastest where ranks are late as in an earlier run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mpi_ef.coded import GC, choose, profile_of
from mpi_ef.documents import shown
from mpi_ef.errors import ConfigError, counted
from mpi_ef.jobs.delays import load_lateness

__all__ = ["chosen_scheme"]

_LONGEST_DELAY, _JOBS, _SHOWN = 5, 240, 6


def chosen_scheme(path: Path, workers: int, models: int, part_seconds: Callable[[], float], *,
                  dedicated: bool) -> tuple[str, list[str]]:
    """Return the scheme that would have taken least, as a text, and lines that say so. Local.

    Parameters
    ----------
    path : Path
        ``lateness.npz`` of a run on as many ranks.
    part_seconds : callable
        Measures what a worker takes for its share of a step without a code, where the run has not told it.
    dedicated : bool
        The first of its ranks is no worker.

    Raises
    ------
    DataError, ConfigError
        There are no delays in it, or they are of another number of ranks.
    """
    late = load_lateness(path)
    rows = late.rows[:, 1:] if dedicated and late.n == workers + 1 else late.rows
    if rows.shape[1] != workers or not len(rows):
        raise ConfigError(f"profile={path}: {counted(len(rows), 'row')} of {counted(rows.shape[1], 'worker')}, here there "
                          f"are {workers}; take the run of as many ranks")
    told = late.part_seconds > 0
    seconds = late.part_seconds if told else part_seconds()
    runs = choose(profile_of(rows), part_seconds=seconds, rest_seconds=0.0, delay=min(models - 1, _LONGEST_DELAY),
                  jobs=min(_JOBS, max(len(rows), models)))
    uncoded = next(run for run in runs if run.scheme == GC(0))
    source = "as that run says" if told else "as measured now"
    of = f"{shown(str(path))}, {counted(len(rows), 'row')}"
    lines = [f"code=auto: {of}; a part takes {1e3 * seconds:.3g} ms, {source}; messages not counted; per step of one:"]
    for run in dict.fromkeys([*runs[:_SHOWN], uncoded]):
        each = 1e3 * run.seconds / run.jobs if np.isfinite(run.seconds) else np.inf
        lines.append(f"  {run.scheme!s:<16} {each:10.3g} ms, each worker computes {100 * run.load:.0f} % of a step's data"
                     f"{'; taken' * (run is runs[0])}{'; uncoded' * (run is uncoded)}")
    return repr(runs[0].scheme), lines
