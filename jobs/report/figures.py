"""Pictures of trainings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpi_ef.jobs import figures
from mpi_ef.jobs.train.config import PHASES

__all__ = ["PANELS", "training"]

Rows = Sequence[Mapping[str, Any]]

PANELS = ("bytes", "time", "steps", "lost", "norms", "phases")
_STYLES = ("-", "--", ":", "-.")
_MOST_WITH_NUMBERS = 6  # runs whose bars have their numbers beside them


def training(runs: Mapping[str, Rows], path: Path, panels: Sequence[str] = PANELS) -> None:
    """Draw losses against bytes, time and steps; what compression loses; norms of the state; where the time goes.

    Parameters
    ----------
    runs : mapping from the label of a run to the rows of its metrics, as ``mpi-ef train`` writes them
    path : Path
    panels : sequence of str
        Which of PANELS, in this order.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (6.5, 3.9) if len(panels) == 1 else (4.33 * columns, 3.8 * rows)
    size = (size[0], size[1] + 0.25 * len(runs))
    figure, axes = figures.pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for panel, name in zip(axes.flat, panels, strict=False):
        _DRAW[name](panel, runs)
    handles = [figures.pyplot().matplotlib.lines.Line2D([], [], color=f"C{n % 10}", marker=".", label=name)
               for n, name in enumerate(runs)]
    one = len(panels) == 1 or max(map(len, runs)) > 50
    figure.legend(handles=handles, fontsize=9, loc="outside lower center", ncols=1 if one else 2)
    figures.save(figure, path)


def _line(panel: Any, rows: Rows, abscissa: str, ordinate: str, count: int = 1, **style: Any) -> None:
    """Draw the rows that have both columns, or running means over so many of them."""
    with_both = [row for row in rows if row.get(ordinate) is not None]
    values = figures.running_mean([row[ordinate] for row in with_both], count)
    if with_both:
        least = 1.0 if abscissa == "sent_nbytes" else 0.0  # of a logarithmic axis
        panel.plot([max(least, row[abscissa]) for row in with_both], values, **style)


def _losses(panel: Any, runs: Mapping[str, Rows], abscissa: str) -> None:
    for number, rows in enumerate(runs.values()):
        _line(panel, rows, abscissa, "val_loss", color=f"C{number % 10}", marker=".")
    panel.set_ylabel("validation loss")
    panel.grid(visible=True, alpha=0.3)


def _by_bytes(panel: Any, runs: Mapping[str, Rows]) -> None:
    _losses(panel, runs, "sent_nbytes")
    panel.set_xlabel("sent per rank")
    sent = [x for line in panel.lines for x in line.get_xdata()] or [1.0]
    figures.spread(panel.xaxis, min(sent), max(sent), figures.bytes_text)


def _by_time(panel: Any, runs: Mapping[str, Rows]) -> None:
    _losses(panel, runs, "seconds")
    panel.set_xlabel("seconds of training")


def _by_steps(panel: Any, runs: Mapping[str, Rows]) -> None:
    """Draw the training loss as well, as running means: the losses of single rows cover each other."""
    _losses(panel, runs, "step")
    count = max(1, max(map(len, runs.values())) // 20)
    for number, rows in enumerate(runs.values()):
        _line(panel, rows, "step", "loss", count, color=f"C{number % 10}", alpha=0.35, linewidth=0.8)
    means = f", means over {count} rows" if count > 2 else ""
    panel.set(xlabel=f"steps (pale: training loss{means})")


def _lost(panel: Any, runs: Mapping[str, Rows]) -> None:
    for number, rows in enumerate(runs.values()):
        if rows[-1].get("lost"):  # not for what loses nothing
            _line(panel, rows, "step", "lost", color=f"C{number % 10}", linewidth=1.0)
    panel.set(xlabel="steps", ylabel="lost: ||x - C(x)||^2 / ||x||^2")
    if panel.get_ylim()[0] > 0.01:
        panel.set_ylim(0.0, 1.0)
    else:
        panel.set_yscale("log")
    _note_nothing(panel)


def _norms(panel: Any, runs: Mapping[str, Rows]) -> None:
    """Draw the norms of all arrays of the state, each kind with a style of its own."""
    styles: dict[str, str] = {}
    for number, rows in enumerate(runs.values()):
        for column in (column for column, value in rows[-1].items() if column.startswith("norm_") and value):
            style = styles.setdefault(column, _STYLES[len(styles) % len(_STYLES)])
            _line(panel, rows, "step", column, color=f"C{number % 10}", linestyle=style, linewidth=1.0)
    panel.set(xlabel="steps", ylabel="norm of the rule's state")
    norms = [y for line in panel.lines for y in line.get_ydata() if y > 0]
    if norms:
        figures.spread(panel.yaxis, min(norms), max(norms))
        line = figures.pyplot().matplotlib.lines.Line2D
        panel.legend(fontsize=7, handles=[line([], [], color="black", linestyle=style, label=column.removeprefix("norm_"))
                                          for column, style in styles.items()])
    _note_nothing(panel)


def _note_nothing(panel: Any) -> None:
    panel.grid(visible=True, alpha=0.3)
    if not panel.lines:
        panel.text(0.5, 0.5, "nothing is compressed here", ha="center", transform=panel.transAxes, color="gray")


def _phases(panel: Any, runs: Mapping[str, Rows]) -> None:
    """Draw milliseconds per step by phase, bars from zero, and their numbers; whiskers are the fastest and slowest rank."""
    height, most = 0.8 / len(runs), 0.0
    for number, rows in enumerate(runs.values()):
        last = rows[-1]
        each = 1e3 / last["step"]
        mean, low, high = (
            [each * last[f"{prefix}seconds_{phase}"] for phase in PHASES] for prefix in ("", "min_", "max_")
        )
        places = [place + (number - (len(runs) - 1) / 2) * height for place in range(len(PHASES))]
        reach = np.array([np.subtract(mean, low), np.subtract(high, mean)])
        panel.barh(places, mean, height, xerr=reach, color=f"C{number % 10}", error_kw={"lw": 0.8})
        most = max(most, *high)
        if len(runs) <= _MOST_WITH_NUMBERS:
            for place, value, end in zip(places, mean, high, strict=True):
                text = f"{value:.0f}" if value >= 10 else f"{value:.2g}"
                panel.annotate(text, (end, place), (3, 0), textcoords="offset points", va="center",
                               fontsize=min(8.0, 32.0 / len(runs)))
    panel.set(xlabel="ms per step (whiskers: fastest, slowest rank)", yticks=range(len(PHASES)), yticklabels=PHASES,
              xlim=(0.0, 1.2 * most or 1.0))
    panel.invert_yaxis()
    panel.grid(visible=True, alpha=0.3, axis="x")


_DRAW = {"bytes": _by_bytes, "time": _by_time, "steps": _by_steps, "lost": _lost, "norms": _norms, "phases": _phases}
