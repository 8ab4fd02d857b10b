"""The picture of a forecast."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ef.jobs import figures

if TYPE_CHECKING:
    from mpi_ef.collectives.forecast import Forecast

__all__ = ["draw"]

_COLOURS = {"dense": "tab:gray", "gather": "tab:orange", "signs": "tab:green", "local": "tab:purple",
            "two-phase": "tab:blue"}
_MOST_LABELS = 9


def draw(ranks: Sequence[int], found: Mapping[str, Sequence["Forecast"]], title: str, path: Path) -> None:
    """Draw seconds, and bytes on a node's link, against numbers of ranks; plans that add inside of nodes first dashed.

    Raises
    ------
    DataError
        When matplotlib is not installed, or the file cannot be written.
    """
    figure, (time, link) = figures.pyplot().subplots(1, 2, figsize=(10.5, 5.2), layout="constrained")
    for plan, forecasts in found.items():
        _line(time, plan, ranks, [one.seconds for one in forecasts])
        _line(link, plan, ranks, [one.link_nbytes for one in forecasts])
    time.set(xlabel="ranks", ylabel="seconds of an exchange")
    link.set(xlabel="ranks", ylabel="over the link of a node, each way")
    crossing = [one.link_nbytes for forecasts in found.values() for one in forecasts if one.link_nbytes]
    seconds = [one.seconds for forecasts in found.values() for one in forecasts]
    figures.spread(time.yaxis, min(seconds), max(seconds))
    if crossing:
        figures.spread(link.yaxis, min(crossing), max(crossing), figures.bytes_text)
    for panel in (time, link):
        labelled = ranks[:: -(-len(ranks) // _MOST_LABELS)]
        panel.set_xscale("log", base=2)
        panel.set_xticks(labelled, [f"{count:,}" for count in labelled])
        panel.set_xlim(ranks[0] / 1.2, ranks[-1] * 1.2)
        panel.grid(visible=True, alpha=0.3)
    figure.suptitle(title, fontsize=10)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=5)
    figures.save(figure, path)


def _line(panel: Any, plan: str, ranks: Sequence[int], values: Sequence[float]) -> None:
    colour = next(colour for word, colour in _COLOURS.items() if word in plan)
    style = "--" if plan.startswith("nodes") else ":" if plan == "dense, rank order" else "-"
    points = [(rank, value) for rank, value in zip(ranks, values, strict=True) if value > 0]
    panel.plot([rank for rank, _ in points], [value for _, value in points], style, color=colour, marker=".", label=plan)
