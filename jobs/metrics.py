"""Output of a run: metrics as JSONL and CSV, a progress bar on a terminal, lines in a log."""

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from time import perf_counter
from typing import IO, Any

from mpi_ef.comm.protocol import Comm
from mpi_ef.documents import lines, shown
from mpi_ef.errors import DataError, counted
from mpi_ef.jobs.events import Events, remove_events

__all__ = ["Metrics", "Progress", "announcing", "in_bytes", "is_number", "made_here", "made_in", "row_of",
           "suspects"]

SUSPECT = 0.8  # a rank that was left out so much more than others is named


class Metrics:
    """Append rows with fixed columns to ``metrics.jsonl`` and ``metrics.csv`` in `folder`, which is made if it is missing.

    Rows of an earlier run in the folder stay up to the step `after`. A column that a row leaves out is null in JSON, empty
    in CSV. With `events` they are also written for TensorBoard; without, event files of another run are removed.
    """

    def __init__(self, folder: Path, columns: list[str], *, after: int = 0, events: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._columns = columns
        finals = [folder / "metrics.jsonl", folder / "metrics.csv"]
        earlier = _rows_up_to(after, finals[0]) if after else []
        drafts = [path.with_name(f".{path.name}") for path in finals]
        self._json, self._csv = (path.open("w", encoding="utf-8", newline="") for path in drafts)
        self._writer = csv.DictWriter(self._csv, columns)
        self._writer.writeheader()
        self._events: Events | None = None
        for row in earlier:
            self.write({name: row.get(name) for name in columns})
        for file, draft, path in zip((self._json, self._csv), drafts, finals, strict=True):
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)  # the earlier rows outlive a death before this, and a power loss
        if events:
            self._events = Events(folder, earlier)
        elif not after:
            remove_events(folder)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and flush, so that a killed run keeps it."""
        self._json.write(json.dumps({name: row.get(name) for name in self._columns}) + "\n")
        self._writer.writerow(row)
        self._json.flush()
        self._csv.flush()
        if self._events is not None:
            self._events.write(row)

    def close(self) -> None:
        """Close the files. What a full disk has refused of a row, it refuses again: :meth:`write` has raised it."""
        for file in (self._json, self._csv):
            with suppress(OSError):
                file.close()
        if self._events is not None:
            with suppress(OSError):
                self._events.close()


def _rows_up_to(step: int, path: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier run; a last line that was cut off is none."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    try:
        for line in lines(path):
            row = row_of(line)
            if row is None:
                break
            if row["step"] <= step:
                rows.append(row)
    except ValueError as error:
        raise DataError(f"{path}: {error}; move it away") from None
    return rows


def row_of(line: str) -> dict[str, Any] | None:
    """Return a row of ``metrics.jsonl``; None for a line that is no JSON, as one that was cut off. Local.

    Raises
    ------
    ValueError
        It is JSON, but no row: an object of numbers, texts and null, with the number of a step.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError("it has a line that is no row of numbers by their names with a step")
    if not all(value is None or isinstance(value, str) or is_number(value) for value in row.values()):
        raise ValueError(f"its row of step {row['step']} has a value that is no number")
    return row


def is_number(value: object) -> bool:
    """Return whether a value of a document is a number that can be drawn; NaN and infinities are. Local."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def made_here(comm: Comm) -> dict[str, Any]:
    """Return for a document when and where results were made: time of rank 0, names of all hosts. Collective."""
    told: list[tuple[str, str]] = comm.allgather((node(), datetime.now(UTC).isoformat(timespec="seconds")))
    return {"finished": told[0][1], "hosts": sorted({host for host, _ in told})}


def made_in(document: Any, path: Path) -> str:
    """Return what a document says about ranks, hosts and time, as text; else the time of its file. Local."""
    document = document if isinstance(document, dict) else {}
    ranks, hosts, finished = (document.get(name) for name in ("ranks", "hosts", "finished"))
    words = [counted(ranks, "rank")] if type(ranks) is int and 0 < ranks < 2**31 else []
    if isinstance(hosts, list) and hosts and all(isinstance(host, str) for host in hosts):
        more = f" and {len(hosts) - 3} more hosts" if len(hosts) > 3 else ""
        words.append(f"on {', '.join(shown(host)[:60] for host in hosts[:3])}{more}")
    try:
        when = f"finished {datetime.fromisoformat(finished).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError, OverflowError):
        when = f"file of {datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC"
    return ", ".join([*words, when]).replace(", on ", " on ", 1)


class Progress:
    """Show the position of a run of `steps` steps: one live line on a terminal, else a line every few seconds in a log."""

    def __init__(self, steps: int, *, every_seconds: float = 5.0, stream: IO[str] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty() if stream else _on_terminal()
        self._steps, self._every = steps, 0.1 if self._live else every_seconds
        self._began = perf_counter()
        self._next = self._began

    def due(self) -> bool:
        """Return whether it is time to show something."""
        return perf_counter() >= self._next

    def show(self, step: int, text: str, *, step_seconds: float | None = None) -> None:
        """Show `text` next to the position and the time that is left: for steps of `step_seconds`, or as those so far."""
        spent = perf_counter() - self._began
        left = (spent / max(step, 1) if step_seconds is None else step_seconds) * (self._steps - step)
        begin, end = f"step {step:>{len(str(self._steps))}}/{self._steps}  ", f"  {_clock(spent)} < {_clock(left)}"
        line = f"{begin}{text}{end}"
        if self._live:
            room = shutil.get_terminal_size((100, 24)).columns - 1
            if room > len(line) + 5:  # the bar has what the text leaves, the text what the time leaves
                length = min(20, room - len(line) - 3)
                done = length * step // self._steps
                line = f"[{'#' * done}{'.' * (length - done)}] {line}"
            elif room < len(line):
                line = ((begin + text)[: max(0, room - len(end))] + end)[: max(0, room)]
            self._stream.write(f"\r\x1b[K{line}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._next = perf_counter() + self._every

    def close(self) -> None:
        """End the live line."""
        if self._live:
            self._stream.write("\n")
            self._stream.flush()


_LAUNCHERS = ("mpiexec", "mpirun", "prterun", "prted", "orterun", "orted", "hydra", "srun", "slurmstepd")


def _on_terminal() -> bool:
    """Return whether stdout is a terminal: the launcher's, because launchers put pipes or terminals of their own between.

    Open MPI gives every rank a pseudo-terminal even when its own output goes to a file, Hydra a pipe even when it goes
    to a terminal. False without /proc.
    """
    outermost, process = 0, os.getppid()
    try:
        while process > 1:
            name, _, rest = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").partition("(")[2].rpartition(")")
            if not name.startswith(_LAUNCHERS):
                break
            outermost, process = process, int(rest.split()[1])
        if not outermost:
            return sys.stdout.isatty()
        return os.readlink(f"/proc/{outermost}/fd/1").startswith(("/dev/pts/", "/dev/tty"))  # noqa: PTH115
    except OSError:
        return False


@contextmanager
def announcing(comm: Comm) -> Iterator[None]:
    """Let rank 0 print a line before the first kernel that it compiles inside of the block; none for loaded ones. Local."""
    from mpi_ef.kernels import machine_code

    if comm.Get_rank():
        yield
        return
    machine_code.announce = _say_compiling
    try:
        yield
    finally:
        machine_code.announce = None


def _say_compiling(folder: str) -> None:
    where = f"once per machine; they are kept in {folder}" if folder else \
        "in every process; for once per machine name a folder that can be written: NUMBA_CACHE_DIR"
    clear = "\r\x1b[K" if _on_terminal() else ""  # a live line may stand there
    print(f"{clear}compiling kernels, {where}", flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def in_bytes(nbytes: float) -> str:
    """Return a number of bytes as text, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000.0:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000.0
    return f"{nbytes:.1f} TB"


def suspects(suspicion: Sequence[float]) -> str:
    """Return which ranks a robust rule has left out, of what ``summary.json`` says under "suspicion", in words."""
    found = [f"rank {rank}, {100 * share:.0f} %" for rank, share in enumerate(suspicion) if share >= SUSPECT]
    return "; ".join(found) or f"nobody (at most {100 * max(suspicion):.0f} %)"
