"""The findings as a page for terminals and as JSON for programs."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

import mpi_ef
from mpi_ef.errors import counted
from mpi_ef.jobs.doctor.finding import LEVELS, TOPICS, Finding, finding
from mpi_ef.jobs.doctor.registry import Context

__all__ = ["Report", "columns", "document", "page", "verdict"]

_LABELS = {"ok": ("ok", "32"), "note": ("note", "36"), "warning": ("WARNING", "33;1"), "error": ("ERROR", "31;1")}  # colour
_MARGIN = 11


class Report:
    """The findings, which are printed once."""

    def __init__(self, context: Context) -> None:
        self.context, self.started_by = context, ""
        self.findings: list[Finding] = []
        self._shown = False

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings."""
        self.findings.extend(findings)

    @property
    def status(self) -> int:
        """Exit status: 1 when there is an error."""
        return int(any(found.level == "error" for found in self.findings))

    def text(self, findings: Sequence[Finding]) -> str:
        """Return the page with these findings, or the document."""
        places = self.context.placements
        ranks, nodes = len(places), list(dict.fromkeys(place.node for place in places))
        if self.context.config.json:
            return document(findings, version=mpi_ef.__version__, ranks=ranks, nodes=nodes)
        # Some launchers give every rank a terminal, whatever becomes of what it prints.
        color = self.context.launcher is None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        where = f"{counted(ranks, 'rank')} on {nodes[0] if len(nodes) == 1 else f'{len(nodes)} nodes'}"
        title = f"mpi-ef doctor {mpi_ef.__version__}: {where}{self.started_by}"
        return page(title, findings, width=columns(), color=color)

    def show(self, more: str = "") -> int:
        """Print everything, and `more` below a page, if that was not done yet; return the exit status."""
        if not self._shown:
            self._shown = True
            below = f"\n{more}\n" if more and not self.context.config.json else ""
            sys.stdout.write(f"{self.text(self.findings)}\n{below}")  # in one piece: nothing of other ranks gets in between
            sys.stdout.flush()
        return self.status

    def show_hanging(self, call: str) -> None:
        """Add that a call of MPI hangs, and print everything."""
        self.add([finding("hangs", call=call)])
        self.show()


def columns() -> int:
    """Return how many columns a page has here."""
    return min(120, max(80, shutil.get_terminal_size((100, 24)).columns))


def verdict(findings: Sequence[Finding]) -> str:
    """Return the last line of the page."""
    names = {level: [found.name for found in findings if found.level == level] for level in LEVELS}
    errors, warnings = (", ".join(dict.fromkeys(names[level])) for level in ("error", "warning"))
    count = f"{counted(len(names['warning']), 'warning')} ({warnings})" if warnings else ""
    if errors:
        return f"{counted(len(names['error']), 'error')}: put right first what stops a training ({errors})"
    if "no-launcher" in names["note"]:
        return f"{count or 'nothing stands in the way here'}; what lies between ranks was not looked at"
    if warnings:
        return f"a training works; {count} of what makes it slow or fragile"
    return "nothing stands in the way of a training"


def page(title: str, findings: Sequence[Finding], *, width: int = 100, color: bool = False) -> str:
    """Return the findings by topic, for a terminal of so many columns, with or without colours."""
    lines = wrap(title, width)
    for topic in TOPICS:
        shown = [line for found in findings if found.topic == topic for line in _lines(found, width - _MARGIN, color)]
        lines += ["", topic, *shown] if shown else []
    return "\n".join([*lines, "", *wrap(f"verdict: {verdict(findings)}", width)])


def _lines(found: Finding, width: int, color: bool) -> Iterator[str]:
    name = "" if found.level == "ok" else f" [{found.name}]"  # which leads to the documentation
    label, code = _LABELS[found.level]
    label = f"{label:<{_MARGIN - 2}}"
    mark = "  " + (f"\x1b[{code}m{label}\x1b[0m" if color else label)
    for line in wrap(found.what + name, width, break_long_words=False, break_on_hyphens=False) or [""]:
        yield mark + line
        mark = " " * _MARGIN
    mark += "-> "
    for line in wrap(found.todo, width - 3, break_long_words=False, break_on_hyphens=False):
        yield mark + line
        mark = " " * len(mark)


def document(findings: Sequence[Finding], **facts: Any) -> str:
    """Return the findings as a JSON document."""
    counts = {level: sum(found.level == level for found in findings) for level in LEVELS}
    rows = [asdict(found) for found in findings]
    return json.dumps(facts | {"verdict": verdict(findings), "counts": counts, "findings": rows}, indent=1)
