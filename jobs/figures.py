"""Pictures: the only module that imports matplotlib."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpi_ef.errors import DataError
from mpi_ef.jobs.folder import replacing

__all__ = ["bytes_text", "pyplot", "running_mean", "save", "spread"]

_LINEAR = 4.0  # an axis whose ends differ by less than this factor is linear: a logarithmic one would have one label


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


def bytes_text(value: float, _place: object = None) -> str:
    """Return a number of bytes as the label of a tick: 200 kB, 1 MB, 2.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000.0 or unit == "TB":
            break
        value /= 1000.0
    return f"{value:g} {unit}"


def _number_text(value: float, _place: object = None) -> str:
    return f"{value:g}"


def spread(axis: Any, low: float, high: float, text: Callable[[float, object], str] = _number_text) -> None:
    """Make an axis from `low` to `high` logarithmic, or linear where they are near each other, with few plain labels."""
    ticker = pyplot().matplotlib.ticker
    if low <= 0 or high / low < _LINEAR:
        axis.set_major_locator(ticker.MaxNLocator(5))
    else:
        (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
        decades = math.log10(high / low)
        factors = (1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.2 else (1,)
        axis.set_major_locator(ticker.LogLocator(subs=factors, numticks=7))
        axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_major_formatter(ticker.FuncFormatter(text))


def running_mean(values: Sequence[float], count: int) -> list[float]:
    """Return the mean of up to `count` values around each: of fewer at the end, of as many after as before at the start."""
    means, half = [], count // 2
    for place in range(len(values)):
        near = values[max(0, place - half) : place + min(half, place) + 1]
        means.append(math.fsum(near) / len(near) if all(map(math.isfinite, near)) else math.nan)
    return means


def save(figure: Any, path: Path) -> None:
    """Write the figure, in the format of the file's ending, and close it."""
    try:
        with replacing(path) as draft:
            figure.savefig(draft, dpi=120)
    except (DataError, ValueError) as error:  # ValueError: an unknown format
        raise DataError(f"{path}: the picture cannot be written ({error}); name a .png or .svg file") from None
    finally:
        pyplot().close(figure)
