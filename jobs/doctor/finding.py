"""Findings, and the table of their texts: ``python -m mpi_ef.jobs.doctor.finding`` prints it for the documentation."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

from mpi_ef.jobs.doctor.ranks import Ranks

__all__ = ["LEVELS", "TOPICS", "Finding", "Level", "documentation", "finding", "texts"]

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


@dataclass(frozen=True)
class _Text:
    topic: str
    levels: tuple[Level, ...]
    what: str
    todo: str
    means: str


@cache
def texts() -> Mapping[str, _Text]:
    """Return the texts of all findings by name, or by name and variant ("threads.unset"). Local."""
    table = tomllib.loads(Path(__file__).with_name("findings.toml").read_text(encoding="utf-8"))
    return {key: text for topic, names in table.items() for key, text in _entries(topic, names)}


def _entries(topic: str, names: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, _Text]]:
    for name, entry in names.items():
        if isinstance(entry, dict):
            if "what" in entry:
                level = entry.get("level", "ok")
                levels = (level,) if isinstance(level, str) else tuple(level)
                yield above + name, _Text(topic, levels, entry["what"], entry.get("todo", ""), entry.get("means", ""))
            yield from _entries(topic, entry, f"{above}{name}.")


def finding(
    key: str, ranks: Ranks | Iterable[int] = (), /, *, topic: str = "", severe: bool = True, **values: Any
) -> Finding:
    """Return a finding about some ranks with the texts of the table, whose fields are facts of the first rank, or `values`.

    `key` is its name there, with the variant if it has any; `topic` counts where the table has none, and `severe` chooses
    between two levels.
    """
    text = texts()[key]
    if isinstance(ranks, Ranks):
        about, values = ranks.about, {**ranks[0].facts, "where": ranks.where, **values}
    else:
        about, values = tuple(ranks), {"where": "", **values}
    what, todo = (some.replace("`", "").format_map(values) for some in (text.what, text.todo))
    return Finding(topic or text.topic, key.partition(".")[0], text.levels[0 if severe else -1], what, todo, about)


_PAGE = """\
# Findings of `mpi-ef doctor`

Everything that can be wrong, by the name that stands in brackets behind a finding. Words in *italics* stand for what was
found. Made from `jobs/doctor/findings.toml` by `python -m mpi_ef.jobs.doctor.finding > docs/findings.md`.
"""


def documentation() -> str:
    """Return the page of the documentation on all findings that are not well by themselves."""
    lines = [_PAGE, "| name | level | message | meaning | what to do |", "|---|---|---|---|---|"]
    for key, text in texts().items():
        if text.levels != ("ok",):
            cells = (" or ".join(text.levels), _plain(text.what), text.means, _plain(text.todo))
            lines.append(f"| `{key.partition('.')[0]}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
