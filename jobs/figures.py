"""Pictures of runs: what the experiments and ``mpi-ef report`` draw. The only programs that ask for matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpi_ef.errors import DataError
from mpi_ef.jobs.folder import replacing
from mpi_ef.jobs.simulate import Curve
from mpi_ef.jobs.train import PHASES

__all__ = [
    "Curves",
    "against_bits",
    "against_bits_and_steps",
    "against_steps",
    "floors",
    "pyplot",
    "save",
    "stability",
    "training",
]

Curves = Mapping[str, Curve]
Rows = Sequence[Mapping[str, Any]]

LEAST = 1e-33  # what is drawn of ||grad f||^2; below it is rounding
_MOST = 1e3  # and above so many times its first value nobody wants to know
_COLUMNS = 4


def pyplot() -> Any:
    """Return matplotlib.pyplot, drawing to files only.

    Raises
    ------
    DataError
        When matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise DataError("a picture needs matplotlib, which is not installed; pip install matplotlib") from None
    return plt


def save(figure: Any, path: Path) -> None:
    """Write the figure, in the format that the name says, and let go of it."""
    try:
        with replacing(path) as draft:
            figure.savefig(draft, dpi=120)
    except (DataError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise DataError(f"{path}: the picture cannot be written ({error}); name a .png or .svg file") from None
    finally:
        pyplot().close(figure)


def against_bits(panels: Mapping[str, Curves], path: Path) -> None:
    """Draw ||grad f||^2, a panel for each problem: above against bits really sent, below against bits as papers count."""
    abscissas = {"sent_bits": "bits sent per client, indices included", "paper_bits": "bits per client as papers count"}
    _squared_norms(panels, path, abscissas)


def against_steps(panels: Mapping[str, Curves], path: Path) -> None:
    """Draw ||grad f||^2 against steps, a panel for each problem."""
    _squared_norms(panels, path, {"steps": "steps"})


def against_bits_and_steps(panels: Mapping[str, Curves], path: Path) -> None:
    """Draw ||grad f||^2, a panel for each problem: above against bits really sent, below against steps."""
    _squared_norms(panels, path, {"sent_bits": "bits sent per client, indices included", "steps": "steps"})


def _squared_norms(panels: Mapping[str, Curves], path: Path, abscissas: Mapping[str, str]) -> None:
    """Draw a panel for each problem, up to four in a row, and under it one for each further abscissa."""
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns) * len(abscissas)
    size = (3.6 * columns, 3.2 * rows)
    figure, axes = pyplot().subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (name, curves) in enumerate(panels.items()):
        for row, (abscissa, label) in enumerate(abscissas.items()):
            axis = axes[place // columns * len(abscissas) + row, place % columns]
            axis.set_axis_on()
            _descent(axis, curves, abscissa)
            axis.set_xlabel(label)
            if place % columns == 0:
                axis.set_ylabel("||grad f(x)||^2")
            if row == 0:
                axis.set_title(name)
                axis.legend(fontsize=8)
    save(figure, path)


def _descent(axis: Any, curves: Curves, abscissa: str) -> None:
    """Draw ||grad f||^2 of several runs; what diverges leaves at the top."""
    for run, curve in curves.items():
        axis.plot(getattr(curve, abscissa), curve.squared_norms, label=run, linewidth=1.2)
    ends = [getattr(curve, abscissa)[-1] for curve in curves.values()]
    wide = abscissa != "steps" and max(ends) > 10 * min(ends)
    axis.set(yscale="log", xscale="log" if wide else "linear")
    if not wide:
        axis.xaxis.set_major_formatter(pyplot().matplotlib.ticker.EngFormatter(sep=""))
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, LEAST), min(high, _MOST * max(curve.squared_norms[0] for curve in curves.values())))
    axis.grid(visible=True, alpha=0.3)


def floors(levels: Mapping[str, Sequence[float]], sizes: Sequence[int], path: Path) -> None:
    """Draw where the error stays against the number of clients, both logarithmic; a line shows 1 / n."""
    figure, axes = pyplot().subplots(figsize=(5.2, 4.2), layout="constrained")
    for method, values in levels.items():
        axes.plot(sizes, values, marker="o", label=method)
    first = next(iter(levels.values()))[0]
    axes.plot(sizes, [first / n for n in sizes], color="black", linestyle=":", label="1 / n")
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="||grad f||^2 that stays")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def stability(last: Any, etas: Sequence[float], factors: Sequence[float], path: Path) -> None:
    """Draw log10 of ||grad f||^2 at the end, (etas, factors), for every eta and step size."""
    figure, axes = pyplot().subplots(figsize=(5.6, 4.4), layout="constrained")
    image = axes.imshow(
        np.log10(np.maximum(last, LEAST)), cmap="viridis_r", vmin=-30, vmax=5, aspect="auto", origin="lower"
    )
    axes.set_xticks(range(len(factors)), [f"{factor:g}" for factor in factors])
    axes.set_yticks(range(len(etas)), [f"{eta:g}" for eta in etas])
    axes.set(
        xlabel="step size, multiple of EF21's", ylabel="eta / delta", title="EControl: log10 ||grad f||^2 at the end"
    )
    figure.colorbar(image, ax=axes)
    save(figure, path)


def training(runs: Mapping[str, Rows], path: Path) -> None:
    """Draw losses against bytes, time and steps; what compression loses; norms of the state; where the time goes.

    Parameters
    ----------
    runs : mapping from the name of a run to the rows of its metrics, as ``mpi-ef train`` writes them
    path : Path
    """
    figure, axes = pyplot().subplots(2, 3, figsize=(13, 7.6), layout="constrained")
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
                  label=f"{name}: {column.removeprefix('norm_')}")  # fmt: skip
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
    save(figure, path)


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
              yticklabels=PHASES, xscale="log")  # fmt: skip
    panel.invert_yaxis()
    panel.grid(visible=True, alpha=0.3, axis="x")
