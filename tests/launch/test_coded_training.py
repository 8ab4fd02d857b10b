"""``mpi-ef train --code`` on real ranks of which some are stopped."""

import json
from pathlib import Path

import pytest
import torch
import virtual
from launching import run
from patience import limit

from mpi_ef.checkpoint.manifest import committed_steps
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.program import train

PROGRAM = Path(__file__).with_name("coded_training.py")
OPTIONS = {"code": "fr:1", "model": "mlp", "compressor": "identity", "batch": 4, "steps": 12, "warmup": 2, "log_every": 4,
           "eval_every": 12}
LIMIT = 100


def flags(**options):
    return [word for name, value in (OPTIONS | options).items() for word in (f"--{name.replace('_', '-')}", str(value))]


def crc(folder):
    return json.loads((folder / "summary.json").read_text())["parameters_crc32"]


def on_virtual_ranks(**options):
    """None of which is late."""
    def program(comm):
        torch.set_flush_denormal(True)  # as the program does; of this thread
        return train(comm, TrainConfig(**OPTIONS, **options))

    return virtual.results(4, program)[0]["parameters_crc32"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return on_virtual_ranks(out=tmp_path_factory.mktemp("undisturbed"))


def test_a_worker_that_is_stopped_changes_nothing(tmp_path, undisturbed):
    """The end has the same bits, names it, and the program ends well."""
    ended = run(4, PROGRAM, json.dumps({3: 4}), *flags(out=tmp_path, patience_seconds=limit(2)), within=LIMIT)
    assert ended.status == 0, ended.text
    assert crc(tmp_path) == undisturbed
    assert json.loads((tmp_path / "summary.json").read_text())["missing"] == [3]
    assert ended.lines_with("missing at the end: rank 3"), ended.text


def test_where_too_many_are_stopped_the_last_step_is_saved_and_gone_on_from(tmp_path, undisturbed, capsys):
    """One line names both ranks; as many ranks go on to the same bits."""
    ended = run(4, PROGRAM, json.dumps({1: 4, 3: 4}), *flags(out=tmp_path, patience_seconds=limit(2)), within=LIMIT)
    assert ended.status not in (0, None), ended.text
    (line,) = ended.lines_with(": CodedGradients: rank 1 on ") or pytest.fail(ended.text)
    assert ", rank 3 on " in line
    (step, _), = committed_steps(tmp_path / "checkpoints")
    assert 4 <= step < 12
    assert ended.lines_with(f"saved after step {step}; go on with --resume redistribute"), ended.text
    assert not (tmp_path / "summary.json").exists()
    assert on_virtual_ranks(out=tmp_path, resume="exact") == crc(tmp_path) == undisturbed
    assert f"resumed after step {step}; {12 - step} steps left" in capsys.readouterr().out
