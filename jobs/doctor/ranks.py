"""Facts of ranks, and where the ranks run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mpi_ef.comm.consensus import ranks_text

__all__ = ["FAILED", "Facts", "Placement", "RankFacts", "Ranks", "counted", "error_text", "listed", "placements_of"]

Facts = dict[str, Any]
FAILED = "failed"  # the fact that stands for all others where a check has raised or has not come back


@dataclass(frozen=True)
class Placement:
    """Where a rank runs: its number, the name of its node, and its number on the node."""

    rank: int = 0
    node: str = "this node"
    local: int = 0


@dataclass(frozen=True)
class RankFacts:
    """What a check has found on one rank."""

    rank: int
    node: str
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return one fact, None when there is none of that name."""
        return self.facts.get(name)


class Ranks(tuple[RankFacts, ...]):
    """Facts of some ranks, in their order, or of all of them; of how many is `total`."""

    total: int

    def __new__(cls, facts: Iterable[RankFacts], total: int | None = None) -> Self:
        """Take facts of ranks, of so many in all."""
        self = super().__new__(cls, facts)
        self.total = len(self) if total is None else total
        return self

    def which(self, test: str | Callable[[RankFacts], object]) -> "Ranks":
        """Return those for which something holds, or that have a fact of that name which is true."""
        holds = (lambda one: one[test]) if isinstance(test, str) else test
        return Ranks((one for one in self if holds(one)), self.total)

    def by(self, key: Callable[[RankFacts], str]) -> dict[str, "Ranks"]:
        """Return the ranks of every value, in the order of their first ranks."""
        found: dict[str, list[RankFacts]] = {}
        for one in self:
            found.setdefault(key(one), []).append(one)
        return {value: Ranks(some, self.total) for value, some in found.items()}

    def by_value(self, name: str) -> dict[str, "Ranks"]:
        """Return the ranks of every value of a fact, the value as text, most common first."""
        return dict(sorted(self.by(lambda one: str(one[name])).items(), key=lambda item: -len(item[1])))

    @property
    def about(self) -> tuple[int, ...]:
        """The numbers of the ranks; nothing when these are all ranks."""
        return () if len(self) == self.total else tuple(sorted(one.rank for one in self))

    @property
    def where(self) -> str:
        """Return " on rank 1 (n2)"; nothing when these are all ranks."""
        return f" on {ranks_text(self.about)} ({listed(one.node for one in self)})" if self.about else ""


def listed(names: Iterable[str]) -> str:
    """Return "n1", "n1, n2", or "n1, n2, n3 and 5 more"."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")


def counted(count: int, noun: str) -> str:
    """Return "1 rank" or "3 ranks"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def error_text(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def placements_of(answers: Iterable[tuple[str, int, int]]) -> list[Placement]:
    """Return where the ranks are, from host, number on the node, and first rank of the node of every rank.

    Nodes are what shares memory, and are named by their hosts.
    """
    answers = list(answers)
    leaders: dict[str, list[int]] = {}
    for host, _, leader in answers:
        if leader not in leaders.setdefault(host, []):
            leaders[host].append(leader)
    return [
        Placement(rank, host if len(leaders[host]) == 1 else f"{host}#{leaders[host].index(leader) + 1}", local)
        for rank, (host, local, leader) in enumerate(answers)
    ]
