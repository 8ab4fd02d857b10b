"""The table of checks that need no word between ranks, done on all of them and judged on rank 0."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

from mpi_ef.jobs.doctor.finding import Finding, Spot, Told, who
from mpi_ef.jobs.doctor.roll import FAILED, bounded

__all__ = ["CHECKS", "Asked", "Check", "Group", "collect", "failure", "failures", "judge", "longest_seconds"]

Facts = dict[str, Any]
_LEAST_SECONDS = 3.0  # for a check that comes after one that has used up the time


@dataclass(frozen=True)
class Asked:
    """What a check may look at on a rank.

    Attributes
    ----------
    spot : Spot
    environment : mapping of str to str
    out : Path
        The folder of runs.
    """

    spot: Spot
    environment: Mapping[str, str]
    out: Path


@dataclass(frozen=True)
class Group:
    """What is known of all ranks together when their facts are judged.

    Attributes
    ----------
    spots : sequence of Spot
    warm_up : bool
        Whether the kernels are going to be compiled.
    launched : bool
        Whether these are the processes of a job, with the cores and threads that a training would have.
    """

    spots: Sequence[Spot]
    warm_up: bool = False
    launched: bool = True

    @property
    def ranks_on(self) -> Mapping[str, int]:
        """How many ranks a node has."""
        return Counter(spot.node for spot in self.spots)


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes
    ----------
    name, topic : str
    facts : callable
        Called on the ranks; whatever it raises becomes a finding. Returns what can be pickled.
    judge : callable
        Called on rank 0 with what the ranks have told.
    every_rank : bool
        False: the first rank of every node is enough.
    """

    name: str
    topic: str
    facts: Callable[[Asked], Facts]
    judge: Callable[[Sequence[Told], Group], Iterator[Finding]]
    every_rank: bool = True


def _from(module: str) -> Any:
    """Return a module of the doctor, imported when a check of it begins: it may lack what it imports."""
    return import_module(f"mpi_ef.jobs.doctor_{module}")


CHECKS = (
    Check(
        "cores",
        "Ranks",
        lambda asked: _from("ranks").rank_facts(asked.environment),
        lambda told, group: _from("ranks").judge_ranks(told, group.launched),
    ),
    Check(
        "GPU",
        "GPU",
        lambda asked: _from("torch").gpu_facts(asked.spot, asked.environment),
        lambda told, _: _from("torch").judge_gpu(told),
    ),
    Check(
        "workers",
        "Data",
        lambda _: _from("torch").loader_facts(),
        lambda told, _: _from("torch").judge_loader(told),
        every_rank=False,
    ),
    Check(
        "kernels",
        "Kernels",
        lambda asked: _from("kernels").kernel_facts(asked.environment),
        lambda told, group: _from("kernels").judge_kernels(told, len(group.ranks_on) > 1, group.warm_up),
    ),
    Check(
        "folder",
        "Files",
        lambda asked: _from("files").folder_facts(asked.environment, asked.out),
        lambda told, _: _from("files").judge_folder(told),
        every_rank=False,
    ),
    Check(
        "space",
        "Files",
        lambda asked: _from("space").space_facts(asked.environment),
        lambda told, group: _from("space").judge_space(told, group.ranks_on),
        every_rank=False,
    ),
    Check(
        "versions",
        "Versions",
        lambda _: _from("versions").version_facts(),
        lambda told, _: _from("versions").judge_versions(told),
    ),
)


def collect(asked: Asked, seconds: float, checks: Iterable[Check] | None = None) -> dict[str, Facts]:
    """Return the facts of all checks on this rank, by name. Local; takes so many seconds and a few, whatever hangs."""
    limit, found = monotonic() + seconds, {}
    for check in CHECKS if checks is None else checks:
        if check.every_rank or asked.spot.local == 0:
            left = max(_LEAST_SECONDS, limit - monotonic())
            found[check.name] = bounded(lambda check=check: check.facts(asked), left)  # type: ignore[misc]
    return found


def longest_seconds(seconds: float) -> float:
    """Return how long `collect` takes at most that was given so many seconds, with some to spare."""
    return seconds + (_LEAST_SECONDS + 1.0) * len(CHECKS) + 5.0


def judge(told: Sequence[Told], group: Group, checks: Iterable[Check] | None = None) -> Iterator[Finding]:
    """Yield the findings of all checks.

    Parameters
    ----------
    told : sequence of Told
        What `collect` has returned on every rank.
    group : Group
    """
    for check in CHECKS if checks is None else checks:
        some = [Told(one.spot, one[check.name]) for one in told if one[check.name] is not None]
        good = [one for one in some if one[FAILED] is None]
        yield from failures(check.name, check.topic, some)
        if good:
            try:
                yield from list(check.judge(good, group))
            except Exception as error:
                yield failure(check.topic, check.name, f"{type(error).__name__}: {error}")


def failures(name: str, topic: str, told: Sequence[Told]) -> Iterator[Finding]:
    """Yield a finding for every reason why ranks have not done a check."""
    reasons: dict[str, list[Told]] = {}
    for one in told:
        if one[FAILED] is not None:
            reasons.setdefault(str(one[FAILED]), []).append(one)
    for reason, some in reasons.items():
        yield failure(topic, name, reason, *who(some, told))


def failure(topic: str, name: str, reason: str, where: str = "", ranks: tuple[int, ...] = ()) -> Finding:
    """Return the finding that a check was not done, and why."""
    lacking = reason.startswith(("ImportError", "ModuleNotFoundError"))
    hangs = reason.startswith("no end")
    todo = (
        "install what is missing, in the environment that the job uses"
        if lacking
        else "a file system or a device of the node may be dead: look at it there (df, dmesg), or leave the node out"
        if hangs
        else "the message tells what to look at; mpi-ef doctor --json has all of it"
    )
    return Finding(
        topic,
        "check-import" if lacking else "check-hangs" if hangs else "check-failed",
        "error" if lacking else "warning",
        f"{name}: not looked at{where}: {reason}",
        todo,
        ranks,
    )
