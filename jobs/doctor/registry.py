"""What a check is; doing checks on a rank, and judging what they have found on all ranks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.doctor.finding import Finding, finding
from mpi_ef.jobs.doctor.ranks import FAILED, Facts, Placement, RankFacts, Ranks, error_text
from mpi_ef.jobs.doctor.report import DoctorConfig
from mpi_ef.jobs.doctor.watchdog import run_with_timeout

__all__ = ["Check", "Context", "Launcher", "collect", "failure", "judge", "longest_seconds"]

_LEAST_SECONDS = 3.0  # for a check that comes after one that has used up the time


@dataclass(frozen=True)
class Launcher:
    """What has started this process, as the environment tells."""

    name: str
    variable: str  # with the number of tasks
    tasks: int
    rank: int | None  # number of this task
    first_on_node: bool = True  # as far as the launcher tells


@dataclass(frozen=True)
class Context:
    """What a check may look at on a rank."""

    config: DoctorConfig
    environment: Mapping[str, str]
    placement: Placement = field(default_factory=Placement)
    placements: Sequence[Placement] = (Placement(),)  # of all ranks
    mpi: Mapping[str, Any] = field(default_factory=dict)  # facts of MPI, which has been started before
    launcher: Launcher | None = None
    comm: "MpiComm | None" = None  # of all ranks; None where they are no world
    tokens: Mapping[str, str] = field(default_factory=dict)  # files of rank 0 in folders of checks, by check
    shared_cache: bool = False  # whether all nodes keep machine code in one folder
    turn: int = 0  # of checks that not all ranks do at a time

    @property
    def world(self) -> MpiComm:
        """The communicator of all ranks, for checks that run where there is one."""
        assert self.comm is not None  # noqa: S101
        return self.comm

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return len({placement.node for placement in self.placements})

    @property
    def ranks_here(self) -> int:
        """How many ranks are on this node."""
        return sum(placement.node == self.placement.node for placement in self.placements)


class _Module(Protocol):
    def collect(self, context: Context, /) -> Facts:
        """Return facts of this rank that JSON can hold; whatever it raises becomes a finding."""

    def judge(self, ranks: Ranks, /) -> Iterable[Finding]:
        """Yield what the facts of all ranks mean."""


@dataclass(frozen=True)
class Check:
    """Something to look at: a module with ``collect`` and ``judge``."""

    name: str
    topic: str
    module: _Module
    per_node: bool = False  # whether the first rank of every node is enough
    seconds: float = 0.0  # how long it may take, if not as long as the user has patience
    turns: int = 1  # how often it is called, one time after the other
    uses_mpi: bool = False  # then in the main thread; others are left behind in a thread when they hang

    def concerns(self, placement: Placement) -> bool:
        """Return whether a rank takes part."""
        return placement.local == 0 or not self.per_node

    def facts(self, context: Context, seconds: float) -> Facts | None:
        """Return the facts of this rank, or why there are none, within so many seconds; None where it takes no part."""
        if not self.concerns(context.placement):
            return None
        if not self.uses_mpi:
            return run_with_timeout(lambda: self.module.collect(context), seconds)
        try:
            return self.module.collect(context)
        except Exception as error:
            return {FAILED: error_text(error)}


def collect(context: Context, seconds: float, checks: Sequence[Check]) -> dict[str, Facts | None]:
    """Return the facts of all checks on this rank, by name. Local; takes so many seconds and a few, whatever hangs."""
    limit = monotonic() + seconds
    return {check.name: check.facts(context, max(_LEAST_SECONDS, limit - monotonic())) for check in checks}


def longest_seconds(seconds: float, checks: Sequence[Check]) -> float:
    """Return how long `collect` takes at most that was given so many seconds, with some to spare."""
    return seconds + (_LEAST_SECONDS + 1.0) * len(checks) + 5.0


def judge(check: Check, placements: Iterable[Placement], facts: Iterable[Facts | None]) -> Iterator[Finding]:
    """Yield the findings of a check from the facts of all ranks; also that it was not done on some, or cannot be judged."""
    pairs = [(p, some) for p, some in zip(placements, facts, strict=True) if some is not None and check.concerns(p)]
    ranks = Ranks(RankFacts(placement.rank, placement.node, some) for placement, some in pairs)
    for reason, failed in ranks.which(lambda one: one[FAILED] is not None).by(lambda one: str(one[FAILED])).items():
        yield failure(check.topic, check.name, reason, failed)
    done = Ranks(ranks.which(lambda one: one[FAILED] is None))
    try:
        if done:
            yield from check.module.judge(done)
    except Exception as error:
        yield failure(check.topic, check.name, error_text(error))


def failure(topic: str, name: str, reason: str, ranks: Ranks | tuple[int, ...] = ()) -> Finding:
    """Return the finding that a check was not done, and why."""
    if reason.startswith(("ImportError", "ModuleNotFoundError")):
        return finding("check-import", ranks, topic=topic, check=name, reason=reason)
    if reason.startswith("no end"):
        return finding("check-hangs", ranks, topic=topic, check=name, reason=reason)
    return finding("check-failed", ranks, topic=topic, check=name, reason=reason)
