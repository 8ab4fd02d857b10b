"""Metrics as event files, which TensorBoard and whatever reads its files show."""

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpi_ef.errors import ConfigError

__all__ = ["Events", "check_installed", "remove_events"]

_FOLDER, _SUFFIX = "tensorboard", ".mpi-ef"  # files of others in the folder have another suffix


def check_installed() -> None:
    """Raise `ConfigError` unless the package `tensorboard` is there. Local."""
    if find_spec("tensorboard") is None:
        raise ConfigError("tensorboard: the package tensorboard is not installed; pip install 'mpi_ef[tensorboard]', or "
                          "leave the option out: metrics.csv has the same numbers")


def remove_events(folder: Path) -> None:
    """Remove the event files that runs have left in the folder of a run. Local."""
    for path in (folder / _FOLDER).glob(f"events.out.tfevents.*{_SUFFIX}"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or has files of others
        (folder / _FOLDER).rmdir()


class Events:
    """Write the numbers of rows to an event file in the folder ``tensorboard`` of a run.

    The files that earlier starts of the run have left are replaced by one that begins with their rows: so no step is there
    twice, and none is missing. The time of a row is that of the training, without interruptions.
    """

    def __init__(self, folder: Path, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        remove_events(folder)
        rows = list(earlier)
        self._began = time.time() - (rows[-1].get("seconds") or 0.0 if rows else 0.0)
        self._writer = EventFileWriter(str(folder / _FOLDER), filename_suffix=_SUFFIX)
        for row in rows:
            self._add(row)
        self._writer.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush, so that a killed run keeps it."""
        self._add(row)
        self._writer.flush()

    def _add(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()
                  if name != "step" and isinstance(value, int | float)]
        wall_time = self._began + (row.get("seconds") or 0.0)
        self._writer.add_event(Event(wall_time=wall_time, step=row["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
