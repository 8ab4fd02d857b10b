"""What the doctor has found: findings, whom they are about, and the page and the document that show them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any, Literal

__all__ = [
    "LEVELS",
    "TOPICS",
    "Finding",
    "Level",
    "Spot",
    "Told",
    "by_value",
    "document",
    "nodes_text",
    "page",
    "ranks_text",
    "status_of",
    "verdict",
    "who",
]

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")
TOPICS = ("MPI", "Ranks", "GPU", "Data", "Kernels", "Files", "Network", "Versions")

_WORDS = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}
_COLORS = {"ok": "32", "note": "36", "warning": "33;1", "error": "31;1"}
_MARGIN = 11


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    topic : str
        One of `TOPICS`.
    name : str
        Short and stable: the troubleshooting table of the documentation is sorted by it.
    level : str
        "ok"; "note": worth knowing; "warning": makes runs slow or fragile; "error": they fail, or are wrong.
    what, todo : str
        One line each: what is, and what to do.
    ranks : tuple of int
        Whom it is about; empty for all.
    """

    topic: str
    name: str
    level: Level
    what: str
    todo: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spot:
    """Where a rank runs.

    Attributes
    ----------
    rank : int
    node : str
    local : int
        Number of the rank on its node.
    """

    rank: int = 0
    node: str = "this node"
    local: int = 0


@dataclass(frozen=True)
class Told:
    """What a check has found on one rank."""

    spot: Spot
    facts: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Rank in the world."""
        return self.spot.rank

    @property
    def node(self) -> str:
        """Name of its node."""
        return self.spot.node

    def __getitem__(self, name: str) -> Any:
        """Return one fact, None when there is none of that name."""
        return self.facts.get(name)


def by_value(told: Iterable[Told], name: str) -> dict[str, list[Told]]:
    """Return who has told which value of a fact, the value as text, most common first."""
    found: dict[str, list[Told]] = {}
    for one in told:
        found.setdefault(str(one[name]), []).append(one)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def ranks_text(ranks: Iterable[int]) -> str:
    """Return "rank 3", "ranks 0-2,5", or "ranks 0,2,4,6,8,10 and 12 more"."""
    ordered = sorted(set(ranks))
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown, rest = runs[:6], sum(len(run) for run in runs[6:])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in shown)
    return f"rank{'s' if len(ordered) > 1 else ''} {text}{f' and {rest} more' if rest else ''}"


def nodes_text(nodes: Iterable[str]) -> str:
    """Return "n1", "n1, n2", or "n1, n2, n3 and 5 more"."""
    names = list(dict.fromkeys(nodes))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def who(some: Sequence[Told], everybody: Sequence[Told]) -> tuple[str, tuple[int, ...]]:
    """Return " on rank 1 (n2)", or nothing when all ranks are meant, and the ranks."""
    ranks = {one.rank for one in some}
    if ranks == {one.rank for one in everybody}:
        return "", ()
    return f" on {ranks_text(ranks)} ({nodes_text(one.node for one in some)})", tuple(sorted(ranks))


def status_of(findings: Iterable[Finding]) -> int:
    """Return the exit status: 1 when there is an error."""
    return int(any(finding.level == "error" for finding in findings))


def verdict(findings: Sequence[Finding]) -> str:
    """Return the last line of the page."""
    names = {level: [f.name for f in findings if f.level == level] for level in LEVELS}
    errors, warnings = (list(dict.fromkeys(names[level])) for level in ("error", "warning"))
    if errors:
        return f"{_count(names['error'], 'error')}: put right first what stops a training ({', '.join(errors)})"
    count = f"{_count(names['warning'], 'warning')} ({', '.join(warnings)})" if warnings else ""
    if "no-launcher" in names["note"]:
        return f"{count or 'nothing stands in the way here'}; what lies between ranks was not looked at"
    return (
        f"a training works; {count} of what makes it slow or fragile"
        if count
        else "nothing stands in the way of a training"
    )


def _count(names: list[str], word: str) -> str:
    return f"{len(names)} {word}{'s' if len(names) > 1 else ''}"


def page(title: str, findings: Sequence[Finding], *, width: int = 100, color: bool = False) -> str:
    """Return the findings by topic, for people.

    Parameters
    ----------
    title : str
    findings : sequence of Finding
    width : int
        Columns of the terminal.
    color : bool
        Whether it knows colours.
    """
    lines = wrap(title, width)
    for topic in TOPICS:
        chosen = [finding for finding in findings if finding.topic == topic]
        if chosen:
            lines += ["", topic]
        for finding in chosen:
            lines += _lines(finding, width, color)
    return "\n".join([*lines, "", *wrap(f"verdict: {verdict(findings)}", width)])


def _lines(finding: Finding, width: int, color: bool) -> Iterator[str]:
    # The name leads to the documentation; where all is well nobody looks for it.
    name = "" if finding.level == "ok" else f" [{finding.name}]"
    first, *more = wrap(finding.what + name, width - _MARGIN, break_long_words=False, break_on_hyphens=False) or [""]
    word = f"{_WORDS[finding.level]:<{_MARGIN - 2}}"
    yield "  " + (f"\x1b[{_COLORS[finding.level]}m{word}\x1b[0m" if color else word) + first
    yield from (" " * _MARGIN + line for line in more)
    todo = wrap(finding.todo, width - _MARGIN - 3, break_long_words=False, break_on_hyphens=False)
    yield from (" " * _MARGIN + ("   " if number else "-> ") + line for number, line in enumerate(todo))


def document(findings: Sequence[Finding], **facts: Any) -> str:
    """Return the findings as a JSON document, for programs."""
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    rows = [asdict(finding) for finding in findings]
    return json.dumps(facts | {"verdict": verdict(findings), "counts": counts, "findings": rows}, indent=1)
