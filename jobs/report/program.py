"""Tabulate and draw finished runs: ``mpi-ef report RUN... --html report.html``. Needs no MPI.

A RUN is a folder that ``mpi-ef train`` or ``mpi-ef reproduce`` has written, or a file of ``mpi-ef bench --json``.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi_ef.documents import MARK, lines, read, read_json, shown
from mpi_ef.errors import DataError, MpiEfError, briefly, nearest
from mpi_ef.jobs.delays import table_of
from mpi_ef.jobs.metrics import in_bytes, is_number, made_in, row_of, suspects
from mpi_ef.jobs.report.html import Section, write
from mpi_ef.jobs.report.naming import method, methods
from mpi_ef.jobs.train.config import PHASES

__all__ = ["main", "read_sections"]


PROOF = "table.txt"  # of mpi-ef reproduce


@dataclass(frozen=True)
class _Run:
    name: str
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    made: str  # when, by how many ranks, where


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables of the runs, and draw them with ``--plot`` and ``--html``."""
    parser = argparse.ArgumentParser(prog="mpi-ef report", description=(__doc__ or "").partition("\n")[2])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder or file of a finished run")
    parser.add_argument("--plot", type=Path, metavar="PNG",
                        help="draw losses against bytes, time and steps; what is lost, state, times of phases")
    parser.add_argument("--panels", metavar="NAMES",
                        help="of trained runs draw these only, separated by commas: bytes, time, steps, lost, norms, phases")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write tables and pictures into one page")
    parser.add_argument("--best", action="store_true",
                        help="of trained runs that differ in the learning rate only, show the best")
    arguments = parser.parse_args(argv)
    try:
        sections = read_sections(arguments.runs, best=arguments.best, panels=_panels(arguments.panels))
        print("\n\n".join(section.text for section in sections))
        if arguments.plot:
            for section in sections:
                path = arguments.plot
                section.draw(path if len(sections) == 1 else path.with_stem(f"{path.stem}-{section.kind}"))
        if arguments.html:
            write(sections, arguments.html)
    except MpiEfError as error:
        raise SystemExit(f"mpi-ef: {shown(error)}") from None


def _panels(names: str | None) -> list[str]:
    """Return the panels that are named; none for all of them."""
    from mpi_ef.jobs.report.figures import PANELS

    found = [name.strip() for name in names.split(",")] if names is not None else []
    for name in found:
        if name not in PANELS:
            hint = nearest(name, PANELS, f"take of {', '.join(PANELS)}")
            raise DataError(f"report: panels={name} is unknown; {hint}")
    return found


def read_sections(paths: Sequence[Path], *, best: bool = False, panels: Sequence[str] = ()) -> list[Section]:
    """Return a section for each run; for trained ones a common one, dense runs first.

    With `best`, of trained runs that differ in the learning rate (and in folders) only, the one that ended best. Pictures of
    trained runs have these `panels`; all without any.

    Raises
    ------
    DataError
        When a path holds no finished run.
    """
    trained, others = [], []
    for path in _each(paths):
        if path.is_file():
            others.append(_benched(path))
        elif (path / PROOF).is_file():
            others.append(_reproduced(path))
        else:
            trained.append(_trained(path))
    if not trained:
        if best:
            raise DataError("report: best has no effect here: none of these is a trained run")
        return others
    if best:
        trained = _best(trained)
    names = _short_names([run.name for run in trained])
    trained = [_Run(name, run.summary, run.rows, run.made) for name, run in zip(names, trained, strict=True)]
    trained.sort(key=lambda run: run.summary["config"]["compressor"] != "identity")  # stable: the order given otherwise

    def draw(path: Path) -> None:
        from mpi_ef.jobs.report.figures import PANELS, training

        for run in trained:
            if not _has_times(run.rows[-1]):
                raise DataError(f"{run.name}: metrics.jsonl ends in a row without times of phases; it cannot be drawn")
        labels = methods([run.summary for run in trained], [run.name for run in trained])
        training({label: run.rows for label, run in zip(labels, trained, strict=True)}, path, panels or PANELS)

    made = "\n".join(f"{run.name}: {run.made}" for run in trained)
    left_out = [f"{run.name}: left out were {suspects(run.summary['suspicion'])}" for run in trained
                if run.summary.get("suspicion")]
    slow = [line for run in trained for line in _who_is_slow(run.name, run.summary)]
    slow += [line for path in paths for line in _who_is_slow(path.resolve().name, _sweep(path))]
    return [Section("train", "Training", "\n".join([table(trained), *left_out, *slow]), draw, made), *others]


def _each(paths: Sequence[Path]) -> list[Path]:
    """Return the paths; in place of a sweep of ``mpi-ef train`` the folders of its trainings."""
    found = list[Path]()
    for path in paths:
        found += [path / name for name in _sweep(path).get("jobs", [])] or [path]
    return found


def _sweep(path: Path) -> dict[str, Any]:
    """Return the summary of a sweep of ``mpi-ef train``; nothing of what is something else.

    Raises `DataError` where its lateness is damaged.
    """
    try:
        whole: dict[str, Any] = read_json(path / "summary.json", follow=True)
        inside = [name for name in whole["jobs"] if (path / name).resolve().parent == path.resolve()]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    try:
        if "lateness" in whole:
            table_of(whole["lateness"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: summary.json is damaged ({briefly(error)}); run the sweep again") from None
    return whole | {"jobs": inside}


def _who_is_slow(name: str, summary: Mapping[str, Any]) -> list[str]:
    found = table_of(summary["lateness"]) if "lateness" in summary else []
    return [line if line.startswith("  ") else f"{name}: {line}" for line in found]


def _best(runs: Sequence[_Run]) -> list[_Run]:
    kept: dict[str, _Run] = {}
    for run in runs:
        config = run.summary["config"]
        apart = ("lr", "out", "text") if "data" in config else ("lr", "out")  # a text is known by its content
        key = json.dumps({key: value for key, value in config.items() if key not in apart}, sort_keys=True)
        if key not in kept or _end(run) < _end(kept[key]):
            kept[key] = run
    return list(kept.values())


def _end(run: _Run) -> float:
    """Return the last validation loss, infinite for a run that diverged."""
    loss = float(run.summary["val_loss"])
    return math.inf if math.isnan(loss) else loss


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the last parts of paths where they differ, else the paths."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _trained(path: Path) -> _Run:
    try:
        summary = _summary(path)
        rows = _rows(path)
        _check_numbers(rows)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: holds no finished run ({error}); name a folder that mpi-ef train or reproduce has "
                        "written, or a file of mpi-ef bench --json") from None
    return _Run(str(path), summary, rows, made_in(summary, path / "summary.json"))


def _summary(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = read_json(path / "summary.json", follow=True)
    figures = [summary[name] for name in ("val_loss", "sent_nbytes", "dense_nbytes", "seconds_per_step")]
    figures += [summary[name] for name in ("nodes", "link_nbytes") if name in summary]
    figures += summary.get("suspicion", [])
    if "lateness" in summary:
        table_of(summary["lateness"])
    if not all(map(is_number, figures)) or not isinstance(summary["config"]["compressor"], str):
        raise ValueError("summary.json has figures that are no numbers")
    return summary


def _check_numbers(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows or not all(value is None or is_number(value) for row in rows for value in row.values()):
        raise ValueError("metrics.jsonl has no rows of numbers")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in lines(path / "metrics.jsonl"):
        row = row_of(line)
        if row is None:
            raise ValueError("metrics.jsonl has a line that is no JSON")
        rows.append(row)
    return rows


def _has_times(row: Mapping[str, Any]) -> bool:
    times = [row.get(f"{which}seconds_{phase}") for phase in PHASES for which in ("", "min_", "max_")]
    return row["step"] > 0 and all(map(is_number, times))


def _reproduced(path: Path) -> Section:
    from mpi_ef.jobs.reproduce.simulate import Curve

    panels: dict[str, dict[str, Curve]] = {}
    accuracies: dict[str, dict[str, list[float]]] = {}
    times: dict[str, dict[str, float]] = {}
    try:
        text = read(path / PROOF, MARK, follow=True).decode("utf-8").rstrip()
        for row in _rows(path):
            if "accuracy" in row:
                accuracies.setdefault(row["panel"], {}).setdefault(row["run"], []).append(float(row["accuracy"]))
            elif "seconds" in row:
                times.setdefault(row["panel"], {})[row["run"]] = float(row["seconds"])
            else:
                panels.setdefault(row["panel"], {}).setdefault(row["run"], Curve()).append_row(row)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: metrics.jsonl is damaged ({briefly(error)}); run mpi-ef reproduce again") from None

    def draw(target: Path) -> None:
        from mpi_ef.jobs.reproduce import figures

        if panels:
            figures.against("sent_bits", "steps")(panels, target)
        elif times:
            figures.times(times, target)
        else:
            figures.accuracies(accuracies, target)

    try:
        summary = read_json(path / "summary.json", follow=True)
    except (OSError, ValueError):
        summary = {}
    return Section(path.name, f"Reproduced: {path.name}", text, draw, made_in(summary, path / PROOF))


def _benched(path: Path) -> Section:
    from mpi_ef.jobs.bench import table as bench_table

    try:
        result = read_json(path, follow=True)
        bench_table.check(result)
        text = bench_table.table(result)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no result of mpi-ef bench --json ({briefly(error)})") from None
    made = made_in(result, path)
    return Section(path.stem, f"Benchmark: {path.stem}", text, lambda target: bench_table.plot(result, target), made)


def _of_node(summary: Mapping[str, Any]) -> str:
    """Return what has come over the link of a node in a run on several of them."""
    return in_bytes(summary["link_nbytes"]) if summary.get("nodes", 1) > 1 and "link_nbytes" in summary else "-"


def table(runs: Sequence[_Run]) -> str:
    """Return one line per run: losses, bytes, times; the first run is what the others are compared with."""
    first = runs[0].summary["val_loss"]
    width = max(3, *(len(run.name) for run in runs))
    on_nodes = any(run.summary.get("nodes", 1) > 1 for run in runs)  # earlier runs do not say
    node = f"{'node':>9}  " if on_nodes else ""
    lines = [f"{'run':<{width}}  val. loss  to first  sent/rank  {node} dense/sent  ms/step  method"]
    for run in runs:
        summary, sent = run.summary, run.summary["sent_nbytes"]
        node = f"{_of_node(summary):>9}  " if on_nodes else ""
        apart = 100 * (summary["val_loss"] / first - 1) if first else math.nan
        lines.append(
            f"{run.name:<{width}}  {summary['val_loss']:9.4f}  {apart:+7.1f}%  "
            f"{in_bytes(sent):>9}  {node}{summary['dense_nbytes'] / max(1, sent):10.1f}x  "
            f"{1e3 * summary['seconds_per_step']:7.1f}  {method(summary)}"
        )
    return "\n".join(lines)
