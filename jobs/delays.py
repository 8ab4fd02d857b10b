"""Who was slow in a run: a file of delays, and a table of what its summary says. Needs no MPI."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

from mpi_ef.documents import DOCUMENT, read, shown
from mpi_ef.errors import DataError
from mpi_ef.jobs.folder import replacing

if TYPE_CHECKING:
    from mpi_ef.collectives import Lateness

__all__ = ["FILE", "load_lateness", "said_of", "save_lateness", "table_of"]

FILE = "lateness.npz"
_COLUMNS = ("last", "median", "quantile_95", "largest")  # of "lateness" in a summary, a number for each worker
_MOST = 16  # ranks in a table


def save_lateness(path: Path, lateness: "Lateness") -> None:
    """Write what :func:`load_lateness` reads. Local."""
    import numpy as np

    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, **lateness.state_dict())  # type: ignore[arg-type]


def load_lateness(path: Path) -> "Lateness":
    """Return what a run has saved as ``lateness.npz``; its `rows`, (m, n) float32, are the delays of the last steps. Local.

    Raises
    ------
    DataError
        There is no such file, or it is something else.
    """
    import numpy as np

    from mpi_ef.collectives import Lateness

    try:
        with np.load(_archive(path), allow_pickle=False) as state:
            late = Lateness(state["in_time"].size)
            late.load_state_dict(state)
    except Exception as error:  # of reading, of NumPy, of what is in it
        raise DataError(f"{path}: holds no delays of a run ({error}); mpi-ef train writes them") from None
    return late


def _archive(path: Path) -> BytesIO:
    """Return what is in a file, if it takes no more memory than the file itself may have. Local."""
    content = BytesIO(read(path, DOCUMENT, follow=True))
    with ZipFile(content) as parts:
        if sum(part.file_size for part in parts.infolist()) > DOCUMENT:
            raise ValueError(f"more than {DOCUMENT:,} bytes are in it")
    content.seek(0)
    return content


def said_of(lateness: "Lateness", lines: Sequence[str], ranks: Sequence[int]) -> dict[str, Any]:
    """Return what a summary says under "lateness": these lines, and numbers of the workers, which are these ranks. Local.

    A number is None where answers are missing: JSON has no infinities.
    """
    numbers = zip(_COLUMNS, [lateness.holding().mean(axis=0), *lateness.quantiles()], strict=True)
    return {"lines": list(lines), "ranks": list(ranks),
            **{name: [float(f"{value:.4g}") if isfinite(value) else None for value in values] for name, values in numbers}}


def table_of(said: Mapping[str, Any]) -> list[str]:
    """Return lines of a report, given what a summary says under "lateness"; none where nobody was slow.

    Raises `ValueError` or another error of types and names where it is not what ``mpi-ef train`` has written.
    """
    lines, columns = list(said["lines"]), [[inf if v is None else float(v) for v in said[name]] for name in _COLUMNS]
    ranks = list(said.get("ranks", range(len(columns[0]))))
    if not all(isinstance(line, str) for line in lines) or not all(isinstance(rank, int) for rank in ranks) or not all(
            len(column) == len(ranks) for column in columns):
        raise ValueError("lateness in summary.json is no report")
    if not lines:
        return []
    shown_ones = sorted(range(len(ranks)), key=lambda worker: -columns[0][worker])[:_MOST]
    table = [f"  {'rank':<6}{'last in':>9}{'median':>11}{'95 %':>11}{'largest':>11}"]
    for worker in sorted(shown_ones):
        last, *seconds = (column[worker] for column in columns)
        table.append(f"  {ranks[worker]:<6}{100 * last:7.0f} %" + "".join(
            f"{value:9.3g} s" if isfinite(value) else f"{'missing':>11}" for value in seconds))
    left = len(ranks) - len(shown_ones)
    return [*map(shown, lines), *table, *[f"  and {left} ranks that are last less often"] * bool(left)]
