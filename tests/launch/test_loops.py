"""Loops of other libraries on real ranks; what needs none of them is in tests/test_integrations.py."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAM = Path(__file__).with_name("loops_program.py")
PROGRAMS = {"transformers": "hf_trainer.py", "accelerate": "accelerate_loop.py", "lightning": "lightning_module.py"}
# Losses end a little above what the noise in the labels leaves. With three or four seeds, those of two ranks were up to 3 %
# from those of one process with accelerate and Lightning, and up to 7.5 % with Trainer, whose single process spreads by
# 10 %: its held-out labels are few and a tenth of them wrong. Twice that; what has not learned has 5 times the loss, with
# Trainer twice.
NOISE = {"transformers": 0.15, "accelerate": 0.06, "lightning": 0.06}
pytestmark = pytest.mark.exhaustive


@pytest.fixture(params=PROGRAMS)
def library(request):
    if find_spec(request.param) is None:
        pytest.skip(f"needs {request.param}, which is not installed: pip install mpi_ef[integrations]")
    return request.param


def trained(n, script, *arguments):
    """Return what a program printed that processes of their own have run: these libraries look at how they were started."""
    ended = run(n, "-m", "mpi4py", script, *arguments, within=240, real=True, HF_HUB_OFFLINE="1")
    assert ended.status == 0, ended.text
    return ended.text


def loss_in(text):
    (loss,) = re.findall(r"^final loss (\S+)", text, flags=re.MULTILINE)  # of rank 0 alone
    return float(loss)


def test_two_ranks_reach_the_loss_of_one(tmp_path, library):
    script = EXAMPLES / PROGRAMS[library]
    alone, both = (loss_in(trained(n, script, tmp_path / str(n))) for n in (1, 2))
    assert both == pytest.approx(alone, rel=NOISE[library])


@pytest.mark.parametrize(("library", "first", "last"), [
    ("transformers", "checkpoint-128", "checkpoint-256/model.safetensors"), ("lightning", "epoch=2.ckpt", None),
], indirect=["library"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, library, first, last):
    """With dropout, an optimizer whose state differs between ranks, and a mean over ranks of BatchNorm's statistics."""
    script = EXAMPLES / PROGRAMS[library]
    whole = trained(2, script, tmp_path / "whole")
    resumed = trained(2, script, tmp_path / "resumed", tmp_path / "whole" / first)
    assert loss_in(resumed) == loss_in(whole)
    if last is not None:
        assert (tmp_path / "resumed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_accelerate_saves_and_loads_what_each_rank_has(tmp_path):
    if find_spec("accelerate") is None:
        pytest.skip("needs accelerate, which is not installed: pip install mpi_ef[integrations]")
    assert "rank 1: 20 steps" in trained(2, PROGRAM, "accelerate", "resumes", tmp_path)


def test_what_one_rank_decides_all_do(tmp_path, library):
    text = trained(2, PROGRAM, library, "stops", tmp_path)
    steps = re.findall(r"rank \d: (\d+) steps", text)
    assert len(steps) == 2, text
    assert steps[0] == steps[1]
    assert int(steps[0]) <= 32  # an epoch, at the end of which Lightning looks


def test_data_and_metrics_are_those_of_all_ranks(tmp_path, library):
    """And ranks that all have the same are told so, once."""
    text = trained(2, PROGRAM, library, "data", tmp_path)
    assert text.count("all 2 ranks began with the same batch") == 1, text


def test_a_rank_that_raises_ends_all(tmp_path, library):
    ended = run(2, "-m", "mpi4py", PROGRAM, library, "raises", tmp_path, within=120, real=True, HF_HUB_OFFLINE="1")
    assert ended.status != 0
    assert "RuntimeError: no more" in ended.text
    assert not re.findall(r"rank \d: \d+ steps", ended.text)


def test_a_resumed_run_has_every_step_once_in_tensorboard(tmp_path):
    if find_spec("tensorboard") is None:
        pytest.skip("needs tensorboard, which is not installed: pip install mpi_ef[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--steps", "6", "--layers", "1", "--width", "16", "--context", "8", "--log-every", "1", "--eval-every", "3",
               "--checkpoint-every", "2", "--out", tmp_path, "--tensorboard"]
    for more in (["--stop-after", "4"], ["--resume", "exact"]):
        ended = run(2, "-m", "mpi_ef.jobs.cli", "train", *options, *more, within=120, real=True)
        assert ended.status == 0, ended.text
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val_loss")] == [3, 6]
