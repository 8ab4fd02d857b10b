"""Pictures of trainings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpi_ef.jobs import figures
from mpi_ef.jobs.train.config import PHASES

__all__ = ["training"]

Rows = Sequence[Mapping[str, Any]]


def training(runs: Mapping[str, Rows], path: Path) -> None:
    """Draw losses against bytes, time and steps; what compression loses; norms of the state; where the time goes.

    Parameters
    ----------
    runs : mapping from the name of a run to the rows of its metrics, as ``mpi-ef train`` writes them
    path : Path
    """
    figure, axes = figures.pyplot().subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    (by_bytes, by_time, by_steps), (error, norms, phases) = axes
    colours = {name: f"C{number % 10}" for number, name in enumerate(runs)}
    for name, rows in runs.items():
        colour = colours[name]
        for panel, column in ((by_bytes, "sent_nbytes"), (by_time, "seconds"), (by_steps, "step")):
            _line(panel, rows, column, "val_loss", color=colour, marker=".", label=name)
        _line(by_steps, rows, "step", "loss", color=colour, alpha=0.35, linewidth=0.8)
        if rows[-1].get("lost"):  # not for what loses nothing
            _line(error, rows, "step", "lost", color=colour, linewidth=1.0)
        columns = [column for column, value in rows[-1].items() if column.startswith("norm_") and value]
        for style, column in zip(("-", "--", ":", "-."), columns, strict=False):
            _line(norms, rows, "step", column, color=colour, linestyle=style, linewidth=1.0,
                  label=f"{name}: {column.removeprefix('norm_')}")
    _phases(phases, runs)
    by_bytes.set(xscale="log", xlabel="bytes sent per rank", ylabel="validation loss")
    by_time.set(xlabel="seconds of training", ylabel="validation loss")
    by_steps.set(xlabel="steps", ylabel="validation loss (pale: training loss)")
    error.set(xlabel="steps", ylabel="lost: ||x - C(x)||^2 / ||x||^2")
    norms.set(yscale="log", xlabel="steps", ylabel="norm of the rule's state")
    if error.get_ylim()[0] > 0.01:
        error.set_ylim(0.0, 1.0)
    else:
        error.set_yscale("log")
    for panel in (by_bytes, by_time, by_steps, error, norms):
        panel.grid(visible=True, alpha=0.3)
    by_steps.legend(fontsize=8)
    if norms.lines:
        norms.legend(fontsize=7)
    for panel in (error, norms):
        if not panel.lines:
            panel.text(0.5, 0.5, "nothing is compressed here", ha="center", transform=panel.transAxes, color="gray")
    figures.save(figure, path)


def _line(panel: Any, rows: Rows, abscissa: str, ordinate: str, **style: Any) -> None:
    """Draw the rows that have both columns."""
    shown = [row for row in rows if row.get(ordinate) is not None]
    if shown:
        panel.plot([max(1, row[abscissa]) for row in shown], [row[ordinate] for row in shown], **style)


def _phases(panel: Any, runs: Mapping[str, Rows]) -> None:
    """Draw milliseconds per step by phase, a group of bars for each; whiskers go from the fastest to the slowest rank."""
    height = 0.8 / len(runs)
    for number, (name, rows) in enumerate(runs.items()):
        last = rows[-1]
        each = 1e3 / last["step"]
        mean, low, high = (
            [each * last[f"{prefix}seconds_{phase}"] for phase in PHASES] for prefix in ("", "min_", "max_")
        )
        places = [place + (number - (len(runs) - 1) / 2) * height for place in range(len(PHASES))]
        reach = np.array([np.subtract(mean, low), np.subtract(high, mean)])
        panel.barh(places, mean, height, xerr=reach, color=f"C{number % 10}", label=name, error_kw={"lw": 0.8})
    panel.set(xlabel="ms per step (whiskers: fastest, slowest rank)", yticks=range(len(PHASES)),
              yticklabels=PHASES, xscale="log")
    panel.invert_yaxis()
    panel.grid(visible=True, alpha=0.3, axis="x")
