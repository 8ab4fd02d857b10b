"""Metrics for TensorBoard, with a stand-in for its package; with the real one: tests/launch/test_loops.py."""

import json
import sys
from importlib.util import find_spec
from itertools import count
from types import ModuleType, SimpleNamespace

import pytest

from mpi_ef.errors import ConfigError
from mpi_ef.jobs import events
from mpi_ef.jobs.metrics import Metrics
from mpi_ef.jobs.train.config import TrainConfig

_starts = count()


class EventFileWriter:
    """Write an event as a line, with the names that TensorBoard's has."""

    def __init__(self, logdir, filename_suffix):
        self.folder = events.Path(logdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"events.out.tfevents.{next(_starts)}.host.7{filename_suffix}"
        self.lines = []

    def add_event(self, event):
        self.lines.append(json.dumps([event.step, event.wall_time, {v.tag: v.simple_value for v in event.summary.value}]))

    def flush(self):
        self.path.write_text("".join(line + "\n" for line in self.lines))

    def close(self):
        self.flush()


@pytest.fixture
def tensorboard(monkeypatch):
    record = SimpleNamespace
    record_with_value = type("Summary", (SimpleNamespace,), {"Value": record})
    for name, content in {"summary.writer.event_file_writer": {"EventFileWriter": EventFileWriter},
                          "compat.proto.event_pb2": {"Event": record},
                          "compat.proto.summary_pb2": {"Summary": record_with_value}}.items():
        path = "tensorboard"
        for part in ["", *name.split(".")]:
            path = f"{path}.{part}" if part else path
            monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or ModuleType(path))
        vars(sys.modules[path]).update(content)


def written(folder):
    """Return steps, and what there is of each, of all event files of runs in a folder."""
    rows = [json.loads(line) for path in folder.glob("tensorboard/*.mpi-ef") for line in path.read_text().splitlines()]
    return [(step, values) for step, _, values in rows]


def trained(folder, steps, after=0, **options):
    metrics = Metrics(folder, ["step", "loss", "val_loss", "seconds"], after=after, **options)
    for step in steps:
        metrics.write({"step": step, "loss": step / 8, "val_loss": None, "seconds": 2.0 * step})
    return metrics


@pytest.mark.usefixtures("tensorboard")
def test_a_row_is_there_when_it_was_written(tmp_path):
    running = trained(tmp_path, [1, 2], events=True)
    assert written(tmp_path) == [(1, {"loss": 0.125, "seconds": 2.0}), (2, {"loss": 0.25, "seconds": 4.0})]
    running.close()


@pytest.mark.usefixtures("tensorboard")
def test_a_resumed_run_has_each_step_once(tmp_path):
    """Steps after the checkpoint are written again; those before, by another start, are not lost."""
    trained(tmp_path, range(1, 6), events=True).close()
    trained(tmp_path, [4, 5, 6], after=3, events=True).close()
    assert [step for step, _ in written(tmp_path)] == [1, 2, 3, 4, 5, 6]
    (file,) = tmp_path.glob("tensorboard/*")
    times = [json.loads(line)[1] for line in file.read_text().splitlines()]
    assert [later - sooner for sooner, later in zip(times, times[1:], strict=False)] == pytest.approx([2.0] * 5, abs=0.01)


@pytest.mark.usefixtures("tensorboard")
def test_a_run_that_went_on_without_them_has_all_steps_later(tmp_path):
    trained(tmp_path, [1, 2], events=True).close()
    trained(tmp_path, [3, 4], after=2).close()
    assert [step for step, _ in written(tmp_path)] == [1, 2]
    trained(tmp_path, [5], after=4, events=True).close()
    assert [step for step, _ in written(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("tensorboard")
def test_a_new_run_leaves_none_of_an_old_one_and_all_of_others(tmp_path):
    trained(tmp_path, [1, 2], events=True).close()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.other").write_text("")
    trained(tmp_path, [1]).close()
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["events.out.tfevents.1.other"]
    (tmp_path / "tensorboard" / "events.out.tfevents.1.other").unlink()
    trained(tmp_path, [1], events=True).close()
    trained(tmp_path, [1]).close()
    assert not (tmp_path / "tensorboard").exists()


def test_without_the_package_it_is_one_line_before_anything_starts(monkeypatch):
    monkeypatch.setattr(events, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"tensorboard is not installed; pip install 'mpi_ef\[tensorboard\]'"):
        TrainConfig(tensorboard=True)
    TrainConfig()
    monkeypatch.setattr(events, "find_spec", lambda _: find_spec("json"))
    assert TrainConfig(tensorboard=True).resolved().tensorboard
