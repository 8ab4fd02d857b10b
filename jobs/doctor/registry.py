"""Options, and what a check is; a check on one rank, and the judgement of what it has found on all ranks."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import ConfigError
from mpi_ef.jobs.doctor.finding import FAILED, Facts, Finding, Findings, Placement, RankFacts, Ranks, finding
from mpi_ef.jobs.doctor.watchdog import error_text, run_with_timeout
from mpi_ef.jobs.options import option

__all__ = ["Check", "Context", "DoctorConfig", "Launcher", "failure", "judge", "lines_of", "remove_trials",
           "trial_in"]


@dataclass(frozen=True)
class DoctorConfig:
    """Options of the doctor; every field is a flag."""

    out: Path = option(Path("runs"), "folder that runs write to; what checkpoints need is tried there")
    warmup: bool = option(False, "compile the kernels: one rank of each node first, then the others load them")
    advise: int = option(0, "measure links, and say which plan is fastest for a model of so many parameters; 0 does not", 0)
    ratio: float = option(0.01, "share of entries that TopK keeps, of --advise", "(0, 1]")
    json: bool = option(False, "print all findings as JSON")
    patience: float = option(60.0, "seconds after which a check that does not come back counts as hanging")

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise ConfigError(f"patience={self.patience} is not positive; take for example 60")
        if self.advise and self.json:
            raise ConfigError("--advise prints a table, which is no finding in JSON; take one of --advise and --json")


@dataclass(frozen=True)
class Launcher:
    """What has started this process, according to the environment."""

    name: str
    variable: str  # with the number of tasks
    tasks: int
    rank: int | None  # number of this task
    first_on_node: bool = True  # as far as the launcher shows


@dataclass
class Context:
    """What a check may look at on a rank; it grows as more is known."""

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


@dataclass(frozen=True)
class Check:
    """A module with two functions.

    ``collect(context)`` returns facts of this rank that JSON can hold; whatever it raises becomes a finding.
    ``judge(ranks)`` yields the findings that follow from the facts of all ranks.
    """

    name: str
    topic: str
    module: ModuleType
    per_node: bool = False  # whether the first rank of every node is enough
    seconds: float = 0.0  # how long it may take, if not as long as the user has patience
    turns: int = 1  # how often it is called, one time after the other
    uses_mpi: bool = False  # then in the main thread; others are left behind in a thread when they hang

    def concerns(self, placement: Placement) -> bool:
        """Return whether a rank takes part."""
        return placement.local == 0 or not self.per_node

    def facts(self, context: Context, seconds: float) -> Facts:
        """Return the facts of this rank, or why there are none, within so many seconds; none where it takes no part."""
        if not self.concerns(context.placement):
            return {}
        if not self.uses_mpi:
            return run_with_timeout(lambda: self.module.collect(context), seconds)
        try:
            return dict(self.module.collect(context))
        except Exception as error:
            return {FAILED: error_text(error)}


def judge(check: Check, placements: Iterable[Placement], facts: Iterable[Facts]) -> Findings:
    """Yield the findings of a check from the facts of all ranks; also that it was not done on some, or cannot be judged."""
    ranks = Ranks(RankFacts(p, some) for p, some in zip(placements, facts, strict=True) if check.concerns(p))
    for reason, failed in ranks.which(FAILED).by(lambda one: str(one[FAILED])).items():
        yield failure(check.topic, check.name, reason, failed)
    try:
        if done := Ranks(one for one in ranks if not one[FAILED]):
            yield from check.module.judge(done)
    except Exception as error:
        yield failure(check.topic, check.name, error_text(error))


def failure(topic: str, name: str, reason: str, ranks: Ranks | tuple[int, ...] = ()) -> Finding:
    """Return the finding that a check was not done, and why."""
    imports = reason.startswith(("ImportError", "ModuleNotFoundError"))
    key = "check-import" if imports else "check-hangs" if reason.startswith("no end") else "check-failed"
    return finding(key, ranks, topic=topic, check=name, reason=reason)


_trials: set[Path] = set()  # folders that are there while something is tried in them


@contextmanager
def trial_in(folder: Path) -> Iterator[Path]:
    """Make a folder with a new name in `folder`, which is gone afterwards, or after `remove_trials`. Local.

    Raises OSError where it cannot be made.
    """
    path = Path(tempfile.mkdtemp(prefix=".mpi-ef-doctor-", dir=folder))
    _trials.add(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _trials.discard(path)


def remove_trials() -> None:
    """Remove what checks that have not come back have left, if that comes back. Local."""

    def remove() -> Facts:
        for path in tuple(_trials):
            shutil.rmtree(path, ignore_errors=True)
        return {}

    if _trials:
        run_with_timeout(remove, 3.0)


def lines_of(file: str | Path) -> list[str]:
    """Return the lines of a file of the system; none where it has no such file. Local."""
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
