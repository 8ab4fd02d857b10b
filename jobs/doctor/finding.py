"""Facts of ranks, findings, and the table of their texts: ``python -m mpi_ef.jobs.doctor.finding`` prints its page."""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

from mpi_ef.comm.consensus import ranks_text

__all__ = ["FAILED", "LEVELS", "TOPICS", "Facts", "Finding", "Findings", "Placement", "RankFacts", "Ranks",
           "documentation", "finding", "listed", "texts"]

Facts = dict[str, Any]
FAILED = "failed"  # the fact that stands for all others where a check has raised or has not come back
Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)
TOPICS = ("MPI", "Ranks", "GPU", "Data", "Kernels", "Files", "Network", "Versions")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: a line on what is, and a line on what to do."""

    topic: str
    name: str  # short and stable: the documentation lists findings by it
    level: Level  # note: worth knowing; warning: makes runs slow or fragile; error: they fail, or are wrong
    what: str
    todo: str = ""
    ranks: tuple[int, ...] = ()  # that it concerns; empty for all


Findings = Iterator[Finding]


@dataclass(frozen=True)
class Placement:
    """Where a rank runs: its number, the name of its node, and its number on the node."""

    rank: int = 0
    node: str = "this node"
    local: int = 0


class RankFacts(Facts):
    """What a check has found on one rank, by name; None for a fact that is not there."""

    def __init__(self, placement: Placement, facts: Facts) -> None:
        super().__init__(facts)
        self.rank, self.node = placement.rank, placement.node

    def __missing__(self, name: str) -> None:
        """Return None."""


class Ranks(list[RankFacts]):
    """Facts of some ranks, in their order, or of all of them; of how many is `total`."""

    def __init__(self, facts: Iterable[RankFacts], total: int | None = None) -> None:
        super().__init__(facts)
        self.total = len(self) if total is None else total

    def which(self, test: str | Callable[[RankFacts], object]) -> "Ranks":
        """Return those for which something holds, or that have a fact of that name which is true."""
        return Ranks((one for one in self if (one[test] if isinstance(test, str) else test(one))), self.total)

    def by(self, key: Callable[[RankFacts], str]) -> dict[str, "Ranks"]:
        """Return the ranks of every value, in the order of their first ranks."""
        found: dict[str, Ranks] = {}
        for one in self:
            found.setdefault(key(one), Ranks((), self.total)).append(one)
        return found

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


@cache
def texts() -> Mapping[str, Mapping[str, str]]:
    """Return topic, level, what, todo and means of all findings by name, or name and variant ("threads.unset"). Local."""
    table = tomllib.loads(Path(__file__).with_name("findings.toml").read_text(encoding="utf-8"))
    well = {"level": "ok", "todo": "", "means": ""}
    return {name: {"topic": topic, **(text if isinstance(text, dict) else well | {"what": text})}
            for topic, entries in table.items() for name, text in entries.items()}


def finding(key: str, ranks: Ranks | Iterable[int] = (), /, *, topic: str = "", severe: bool = True,
            **values: Any) -> Finding:
    """Return a finding about some ranks with the texts of the table, whose fields are facts of the first rank, or `values`.

    `key` is its name there, with the variant if it has any; `topic` counts where the table has none, and `severe` chooses
    between two levels.
    """
    text = texts()[key]
    if isinstance(ranks, Ranks):
        about, fields = ranks.about, {**ranks[0], "where": ranks.where, **values}
    else:
        about, fields = tuple(ranks), {"where": "", **values}
    level: Any = text["level"].split(" or ")[0 if severe else -1]
    what, todo = (text[name].replace("`", "").format_map(fields) for name in ("what", "todo"))
    return Finding(topic or text["topic"], key.partition(".")[0], level, what, todo, about)


_PAGE = """\
# Findings of `mpi-ef doctor`

Everything that can be wrong, by the name that stands in brackets behind a finding. Words in *italics* stand for what was
found. Made from `jobs/doctor/findings.toml` by `python -m mpi_ef.jobs.doctor.finding > docs/findings.md`.

| name | level | message | meaning | what to do |
|---|---|---|---|---|
"""


def documentation() -> str:
    """Return the page of the documentation on all findings that are not well by themselves."""
    rows = [(f"`{key.partition('.')[0]}`", text["level"], _plain(text["what"]), text["means"], _plain(text["todo"]))
            for key, text in texts().items() if text["level"] != "ok"]
    return _PAGE + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _plain(text: str) -> str:
    """Return a text with the names of its fields in the place of their values, also within backticks."""
    shown = ""
    for literal, field, _, _ in Formatter().parse(text):
        shown += literal
        if field and field != "where":
            shown += field.upper() if shown.count("`") % 2 else f"*{field}*"
    return shown.replace("|", "\\|")


if __name__ == "__main__":
    print(documentation(), end="")
