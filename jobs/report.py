"""Tabulate and draw finished runs: ``mpi-ef report runs/dense runs/topk --plot curves.png``. Needs no MPI."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpi_ef.errors import DataError, MpiEfError
from mpi_ef.jobs.metrics import in_bytes

__all__ = ["main", "pyplot", "read_run"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of the runs, the first one as the baseline, and draw them when asked to."""
    parser = argparse.ArgumentParser(prog="mpi-ef report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that mpi-ef train has written")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw validation loss against bytes and steps")
    arguments = parser.parse_args(argv)
    try:
        runs = {str(path): read_run(path) for path in arguments.runs}
        print(table(runs))
        if arguments.plot:
            plot(runs, arguments.plot)
    except MpiEfError as error:
        raise SystemExit(f"mpi-ef: {error}") from None


def read_run(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary and the metrics rows of a finished run.

    Raises
    ------
    DataError
        When the folder holds no finished run.
    """
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return summary, [json.loads(line) for line in lines]
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: holds no finished run ({error}); name a folder that mpi-ef train has written"
        ) from None


def table(runs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    """Return one line per run: losses, bytes, times."""
    first = next(iter(runs.values()))[0]["val_loss"]
    width = max(len(name) for name in runs)
    lines = [f"{'run':<{width}}  val. loss  to first  sent/rank   dense/sent  ms/step"]
    for name, (summary, _) in runs.items():
        sent = summary["sent_nbytes"]
        lines.append(
            f"{name:<{width}}  {summary['val_loss']:9.4f}  {100 * (summary['val_loss'] / first - 1):+7.1f}%  "
            f"{in_bytes(sent):>9}  {summary['dense_nbytes'] / max(1, sent):10.1f}x  "
            f"{1e3 * summary['seconds_per_step']:7.1f}"
        )
    return "\n".join(lines)


def pyplot(program: str) -> Any:
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
        raise DataError(f"{program}: matplotlib is not installed; pip install matplotlib") from None
    return plt


def plot(runs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], path: Path) -> None:
    """Draw validation loss against bytes sent per rank (logarithmic) and against steps.

    Raises
    ------
    DataError
        When matplotlib is not installed.
    """
    plt = pyplot("report")
    figure, (by_bytes, by_steps) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, (_, rows) in runs.items():
        shown = [row for row in rows if row["val_loss"] is not None]
        losses = [row["val_loss"] for row in shown]
        by_bytes.plot([max(1, row["sent_nbytes"]) for row in shown], losses, marker=".")
        by_steps.plot([row["step"] for row in shown], losses, marker=".", label=Path(name).name)
    by_bytes.set(xscale="log", xlabel="bytes sent per rank", ylabel="validation loss (nats)")
    by_steps.set(xlabel="steps")
    by_steps.legend(loc="upper right")
    for axes in (by_bytes, by_steps):
        axes.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
