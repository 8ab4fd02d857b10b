"""Pictures of experiments."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpi_ef.jobs import figures
from mpi_ef.jobs.reproduce.simulate import Curve

__all__ = ["Curves", "accuracies", "against", "floors", "stability", "times"]

Curves = Mapping[str, Curve]

LEAST = 1e-33  # what is drawn of ||grad f||^2; below it is rounding
_MOST = 1e3  # and so many times its first value is at the top
_COLUMNS = 4
_WINDOWS = 40  # running means are over so many parts of a curve

_LABELS = {"sent_bits": "bits sent per client, indices included", "paper_bits": "bits per client as papers count",
           "steps": "steps"}


def against(*abscissas: str) -> Callable[[Mapping[str, Curves], Path], None]:
    """Return what draws ||grad f||^2, up to four panels in a row, and under each one for each further abscissa."""
    return lambda panels, path: _squared_norms(panels, path, {abscissa: _LABELS[abscissa] for abscissa in abscissas})


def _squared_norms(panels: Mapping[str, Curves], path: Path, abscissas: Mapping[str, str]) -> None:
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns) * len(abscissas)
    size = (3.6 * columns, 3.2 * rows)
    figure, axes = figures.pyplot().subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (name, curves) in enumerate(panels.items()):
        for row, (abscissa, label) in enumerate(abscissas.items()):
            axis = axes[place // columns * len(abscissas) + row, place % columns]
            axis.set_axis_on()
            _descent(axis, curves, abscissa)
            axis.set_xlabel(label)
            if place % columns == 0:
                noisy = any(_is_noisy(curve.squared_norms) for panel in panels.values() for curve in panel.values())
                axis.set_ylabel(f"||grad f(x)||^2{', running mean' if noisy else ''}")
            if row == 0:
                axis.set_title(name)
                axis.legend(fontsize=8)
    figures.save(figure, path)


def _descent(axis: Any, curves: Curves, abscissa: str) -> None:
    """Draw ||grad f||^2 of several runs; what diverges leaves at the top."""
    for number, (run, curve) in enumerate(curves.items()):
        values, colour = curve.squared_norms, f"C{number % 10}"
        if _is_noisy(values):
            axis.plot(getattr(curve, abscissa), values, color=colour, alpha=0.15, linewidth=0.5, zorder=1.0)
            values = figures.running_mean(values, len(values) // _WINDOWS)
        axis.plot(getattr(curve, abscissa), values, label=run, linewidth=1.2, color=colour)
    ends = [getattr(curve, abscissa)[-1] for curve in curves.values()]
    wide = abscissa != "steps" and max(ends) > 10 * min(ends)
    axis.set(yscale="log", xscale="log" if wide else "linear")
    if not wide:
        axis.xaxis.set_major_formatter(figures.pyplot().matplotlib.ticker.EngFormatter(sep=""))
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, LEAST), min(high, _MOST * max(curve.squared_norms[0] for curve in curves.values())))
    axis.grid(visible=True, alpha=0.3)


def _is_noisy(values: Sequence[float]) -> bool:
    """Return whether a curve goes up about as often as down at its end, and far: several such curves cover each other."""
    end = np.asarray(values[len(values) // 2 :])
    if end.size < 2 * _WINDOWS or not np.all(end > 0) or not np.all(np.isfinite(end)):
        return False
    moves = np.diff(np.log10(end))
    return bool((moves > 0).mean() > 0.25 and np.abs(moves).sum() > 4 * max(0.5, float(np.ptp(np.log10(end)))))


def floors(levels: Mapping[str, Sequence[float]], sizes: Sequence[int], path: Path) -> None:
    """Draw where the error stays against the number of clients, both logarithmic; a line shows 1 / n."""
    figure, axes = figures.pyplot().subplots(figsize=(5.2, 4.2), layout="constrained")
    for method, values in levels.items():
        axes.plot(sizes, values, marker="o", label=method)
    first = next(iter(levels.values()))[0]
    axes.plot(sizes, [first / n for n in sizes], color="black", linestyle=":", label="1 / n")
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="||grad f||^2 that stays")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    figures.save(figure, path)


def accuracies(found: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw accuracies of every run in every panel, of all seeds."""
    figure, axes = figures.pyplot().subplots(figsize=(8.0, 1.0 + 0.25 * len(found)), layout="constrained")
    runs = list(dict.fromkeys(run for panel in found.values() for run in panel))
    for number, run in enumerate(runs):
        points = [(value, place) for place, panel in enumerate(found.values()) for value in panel.get(run, ())]
        axes.plot(*zip(*points, strict=True), "ox+"[number // 10 % 3], color=f"C{number % 10}", label=run)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.save(figure, path)


def times(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw seconds of every run in every panel as bars, those of a run in one colour."""
    figure, axes = figures.pyplot().subplots(figsize=(8.0, 1.2 + 0.22 * sum(map(len, found.values()))), layout="constrained")
    runs, places, names = list(dict.fromkeys(run for panel in found.values() for run in panel)), list[float](), list[str]()
    for number, (panel, seconds) in enumerate(found.items()):
        for place, (run, value) in enumerate(seconds.items(), start=len(places)):
            axes.barh(place + number, value, color=f"C{runs.index(run) % 10}")
            places.append(place + number)
            names.append(f"{panel}: {run}")
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.grid(visible=True, alpha=0.3, axis="x")
    figures.save(figure, path)


def stability(last: Any, etas: Sequence[float], factors: Sequence[float], path: Path) -> None:
    """Draw log10 of ||grad f||^2 at the end, (etas, factors), for every eta and step size."""
    figure, axes = figures.pyplot().subplots(figsize=(5.6, 4.4), layout="constrained")
    image = axes.imshow(np.log10(np.maximum(last, LEAST)), cmap="viridis_r", vmin=-30, vmax=5, aspect="auto",
                        origin="lower")
    axes.set_xticks(range(len(factors)), [f"{factor:g}" for factor in factors])
    axes.set_yticks(range(len(etas)), [f"{eta:g}" for eta in etas])
    axes.set(xlabel="step size, multiple of EF21's", ylabel="eta / delta",
             title="EControl: log10 ||grad f||^2 at the end")
    figure.colorbar(image, ax=axes)
    figures.save(figure, path)
