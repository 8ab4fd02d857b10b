"""Sequential gradient coding against gradient coding (Krishnan et al. 2023, arXiv 2211.13802).

Simulated, and on four real ranks or more also timed: see interleaved.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mpi_ef.coded import GC, MSGC, SRSGC, Cyclic, GradientCode, Scheme, gilbert_elliott, simulate
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.reproduce import figures, interleaved
from mpi_ef.jobs.reproduce.monna import demanded, verdicts
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig

__all__ = ["sequential"]

N, _JOBS = 32, 120
_SETTINGS = ((0.05, 0.9), (0.05, 0.5), (0.02, 0.3))  # a worker becomes slow with probability p, and fast again with q
_SLOWNESS = 4.0  # what a slow worker takes beyond the others, in units of these
_TIMES = {"part_seconds": 0.5, "rest_seconds": 0.3}  # a round takes .3 + 16 load seconds
_LARGEST_DELAY = 7
_SEEDS = 3  # on profiles that were not searched


@dataclass(frozen=True)
class _AnySet(Cyclic):
    """A code of which n - s answers are enough and none less, for every n and s: its coefficients are not asked for."""

    def check(self, n: int) -> None:
        GradientCode.check(self, n)


class _CountedGC(GC):
    def code(self, n: int) -> GradientCode:  # noqa: ARG002
        return _AnySet(self._missing())


class _CountedSRSGC(SRSGC):
    def code(self, n: int) -> GradientCode:  # noqa: ARG002
        return _AnySet(self._missing())


class _CountedMSGC(MSGC):
    def code(self, n: int) -> GradientCode | None:
        return None if self.lam == n else _AnySet(self.lam)


@dataclass(frozen=True)
class _Family:
    """Schemes among which the fastest is looked for; `longer`: so many (B, W, lam) for each s, which only rules see."""

    name: str
    rule: str
    schemes: Callable[[int, int], Iterable[Scheme]]  # of the largest T, and `longer`
    longer: int = 1


def _gc(kind: type[GC], sizes: Iterable[int]) -> Callable[[int, int], Iterator[Scheme]]:
    return lambda _delay, _longer: (kind(s) for s in sizes)


def _reattempts(kind: type[SRSGC], sizes: Iterable[int]) -> Callable[[int, int], Iterator[Scheme]]:
    def schemes(delay: int, longer: int) -> Iterator[Scheme]:
        for burst in range(1, delay + 1):
            for s in sizes:
                for times in range(1, longer + 1):
                    if s * (times + 1) <= N:
                        yield kind(burst, 1 + burst * times, s * (times + 1))  # the most that s allows
    return schemes


def _multiplexed(kind: type[MSGC], sizes: Iterable[int]) -> Callable[[int, int], Iterator[Scheme]]:
    return lambda delay, _longer: (kind(burst, window, lam) for burst in range(1, delay + 1)
                                   for window in range(2, delay + 3 - burst) for lam in sizes)


_COUNTED, _DIVIDING = (1, 2, 3, 4, 6, 8), (1, 3, 7)
_AS_PAPERS = (
    _Family("uncoded", "lazy", _gc(GC, (0,))),
    _Family("GC", "lazy", _gc(_CountedGC, range(9))),
    _Family("SR-SGC", "paper", _reattempts(_CountedSRSGC, _COUNTED), 3),
    _Family("M-SGC", "paper", _multiplexed(_CountedMSGC, (4, 8, 16, 32))),
    _Family("SR-SGC, lazy", "lazy", _reattempts(_CountedSRSGC, _COUNTED)),
    _Family("M-SGC, lazy", "lazy", _multiplexed(_CountedMSGC, (4, 8, 16, 32))),
)
_AS_HERE = (
    _Family("GC", "lazy", _gc(GC, (0, 1, 2, 3, 7))),
    _Family("SR-SGC, lazy", "lazy", _reattempts(SRSGC, _DIVIDING)),
    _Family("M-SGC, lazy", "lazy", _multiplexed(MSGC, (1, 3, 7, 15, 32))),
)
_COUNTED_PART, _HERE, _LATE = "any n - s answers", "codes of mpi_ef", "the same, late answers count"
_PARTS = {_COUNTED_PART: _AS_PAPERS, _HERE: _AS_HERE, _LATE: _AS_HERE}  # without the last: late work is thrown away
_TOLERANCES = ((16, 1, 2, 4), (256, 1, 2, 27))  # n, B, W, lam: loads are compared


@dataclass(frozen=True)
class _Best:
    """The best of a family, and its seconds: where it was searched, and the mean over other profiles."""

    scheme: Scheme
    searched: float
    seconds: float


def sequential(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Search the best parameters of every scheme over a profile, simulate them over others, and time some. Collective."""
    jobs = config.steps or _JOBS
    delay = min(_LARGEST_DELAY, max(1, jobs // 4))
    lines, rows, found = list[str](), list[dict[str, object]](), dict[tuple[str, tuple[float, float], str], _Best]()
    for part, families in _PARTS.items():
        lines += [*([""] if lines else []), f"{N} workers, {jobs} jobs, seconds: {part}"]
        lines.append(f"{'p, q: slow, burst':26}{'scheme':16}{'best (B, W, lam) or (s)':26}{'load n':>7}{'T':>4}"
                     f"{'searched':>10}{'others':>8}")
        for setting in _SETTINGS:
            p, q = setting
            title = f"{p:g}, {q:g}: {p / (p + q):.0%}, {1 / q:.1f}"
            for family in families:
                best = found[part, setting, family.name] = _searched(comm, family, setting, jobs, delay, part != _LATE)
                load = N * best.scheme.load(N)
                lines.append(f"{title:26}{family.name:16}{_parameters(best.scheme):26}{load:7.2f}{best.scheme.delay:4}"
                             f"{best.searched:10.1f}{best.seconds:8.1f}")
                rows.append({"panel": f"{part}, {p:g}, {q:g}", "run": family.name, "step": jobs, "seconds": best.seconds,
                             "searched_seconds": best.searched, "load": best.scheme.load(N), "delay": best.scheme.delay,
                             "parameters": _parameters(best.scheme)})
    lines += ["", f"{'n, lam: load of':26}{'GC':>10}{'SR-SGC':>10}{'M-SGC':>10}"]
    for n, burst, window, lam in _TOLERANCES:
        loads = [scheme.load(n) for scheme in (_CountedGC(lam), _CountedSRSGC(burst, window, lam),
                                               _CountedMSGC(burst, window, lam))]
        lines.append(f"{f'{n}, {lam}; B={burst}, W={window}':26}" + "".join(f"{load:10.5f}" for load in loads))
    timed = interleaved.timed(comm, config.steps and max(1, config.steps // interleaved.MODELS))
    lines += ["", *timed.lines, "", *demanded(config.steps, lambda: verdicts(list(_acceptance(found))))]
    drawn: dict[str, dict[str, float]] = {}
    for (part, (p, q), name), best in found.items():
        drawn.setdefault(f"{part}, {p:g}, {q:g}", {})[name] = best.seconds
    return Outcome(rows + timed.rows, "\n".join(lines), partial(figures.times, drawn))


def _parameters(scheme: Scheme) -> str:
    return repr(scheme)[repr(scheme).index("(") :]


def _profile(setting: tuple[float, float], jobs: int, seed: int) -> NDArray[np.float64]:
    return gilbert_elliott(jobs + _LARGEST_DELAY, N, *setting, _SLOWNESS, seed=(seed, _SETTINGS.index(setting)))


def _searched(comm: MpiComm, family: _Family, setting: tuple[float, float], jobs: int, delay: int, restart: bool) -> _Best:
    """Let each rank simulate some of the schemes, and take the fastest, the first one of them. Collective."""
    def taken(scheme: Scheme, seed: int) -> float:
        return simulate(scheme, _profile(setting, jobs, seed), jobs=jobs, rule=family.rule, grace=0.0, relative=True,
                        restart=restart, **_TIMES).seconds

    schemes, rank, size = list(family.schemes(delay, family.longer)), comm.Get_rank(), comm.Get_size()
    own = [taken(scheme, 0) for scheme in schemes[rank::size]]
    seconds = np.zeros(len(schemes))
    for other, theirs in enumerate(comm.allgather(own)):
        seconds[other::size] = theirs
    best = int(seconds.argmin())
    others = [taken(schemes[best], seed) for seed in range(1, 1 + _SEEDS)]
    return _Best(schemes[best], float(seconds[best]), float(np.mean(others)))


def _acceptance(found: Mapping[tuple[str, tuple[float, float], str], _Best]) -> Iterator[tuple[str, str,
                                                                                             Callable[[], float]]]:
    """Yield what was demanded before these were built, of the table as papers count, and the like of our codes."""
    def ratio(part: str, setting: tuple[float, float], one: Iterable[str], other: str) -> Callable[[], float]:
        return lambda: min(found[part, setting, name].seconds for name in one) / found[part, setting, other].seconds

    both = ["M-SGC, lazy", "SR-SGC, lazy"]
    for setting in _SETTINGS:
        title = f"{setting[0]:g}, {setting[1]:g}"
        yield f"{title}, {_COUNTED_PART}: M-SGC, lazy / GC", "<= 0.85", ratio(_COUNTED_PART, setting, both[:1], "GC")
        yield f"{title}, {_COUNTED_PART}: M-SGC, lazy / M-SGC", "<= 1", ratio(_COUNTED_PART, setting, both[:1], "M-SGC")
    for part in (_HERE, _LATE):
        for setting in _SETTINGS:
            title = f"{setting[0]:g}, {setting[1]:g}"
            yield f"{title}, {part}: the better one / GC", "<= 0.85", ratio(part, setting, both, "GC")
