"""``mpi-ef train`` on a device: the same numbers, and runs that go on elsewhere."""

import json
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import programs
import pytest
import torch
import virtual

from mpi_ef.errors import ConfigError
from mpi_ef.jobs.cli import main
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.loop import Trainer
from mpi_ef.jobs.train.models import GPT
from mpi_ef.jobs.train.program import train
from mpi_ef.kernels.backend import on_device_side

MLP = {"model": "mlp", "batch": 4, "steps": 6, "warmup": 2, "log_every": 2, "eval_every": 3}
GRADIENT = {"optimizer": "sgd", "placement": "gradient", "lr": 0.05}
KINDS = {
    "adamw": {},
    "econtrol, two phases": GRADIENT | {"rule": "econtrol", "compressor": "sign"},
    "clients": GRADIENT | {"rule": "ef21-pp"},
    "reply": GRADIENT | {"rule": "ef21-bc", "compressor": "sign"},
    "changes": GRADIENT | {"rule": "ef21-page", "clip": 0.0, "whole": 0.3},
    "named plan": GRADIENT | {"plan": "TwoPhaseMean"},
    "overlap": GRADIENT | {"rule": "ef21", "overlap": True, "clip": 0.0},
    "powersgd": {"optimizer": "powersgd", "clip": 0.0, "lr": 0.05},
    "muon": {"optimizer": "ef21-muon"},
    "onebit-adam": {"optimizer": "onebit-adam", "freeze": 3},
}
SAME = ("loss", "val_loss", "val_accuracy", "sent_nbytes", "parameters_crc32")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.exhaustive] * (kind not in ("adamw", "changes")))
                                  for kind in KINDS])
def test_the_numbers_of_the_host(tmp_path, kind):
    ends = []
    for side, name in ((nullcontext, "host"), (on_device_side, "device")):
        with side():
            ends.append(programs.trained(2, TrainConfig(**MLP, **KINDS[kind], device="cpu", out=tmp_path / name))[0])
    for name in SAME:
        if kind == "powersgd":  # products of matrices are rounded as each side does it
            assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-4) or name == "parameters_crc32"
        else:
            assert ends[0][name] == ends[1][name]
    assert ends[0]["devices"] == {"cpu, kernels in Numba": "ranks 0,1"}
    (said,) = ends[1]["devices"]
    assert said.startswith("cpu, kernels in ")
    assert "Numba" not in said
    assert ends[1] == json.loads((tmp_path / "device/summary.json").read_text())
    assert tomllib.loads((tmp_path / "device/config.toml").read_text())["device"] == "cpu"
    first, second = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                     for name in ("host", "device"))
    for mine, its in zip(first, second, strict=True):
        assert mine["lost"] == pytest.approx(its["lost"])
        assert {name: mine[name] for name in mine if name.startswith("norm_")} == pytest.approx(
            {name: its[name] for name in its if name.startswith("norm_")}, rel=1e-4)


@pytest.mark.parametrize("first", [nullcontext, on_device_side])
def test_a_run_goes_on_on_the_other_side(tmp_path, first, capsys):
    second = on_device_side if first is nullcontext else nullcontext
    config = TrainConfig(**MLP, **KINDS["changes"], checkpoint_every=3, out=tmp_path / "whole")
    whole = programs.trained(2, config)[0]
    parts = replace(config, out=tmp_path / "parts", device="cpu", stop_after=3)
    with first():
        programs.trained(2, parts)
    with second():
        end = programs.trained(2, replace(parts, resume="exact", device="auto", stop_after=0))[0]
    assert {name: end[name] for name in SAME} == {name: whole[name] for name in SAME}
    assert "not as in the run" not in capsys.readouterr().out


def test_gpu_aware_mpi_is_asked_for_and_absent(capsys, tmp_path, monkeypatch):
    """Without a GPU a run says so in one line; with what is taken for one it ends with the same numbers."""
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: None)  # of a whole process, which has other tests as well
    asked = ["train", "--model", "mlp", "--steps", "2", "--gpu-aware-mpi", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--device", "cpu"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "use_gpu_aware_mpi: no rank has its vectors on a device; leave" in line
    main([*asked[:-3], "--device", "cpu", "--out", str(tmp_path / "plain")])
    with on_device_side():
        main([*asked, "--device", "cpu"])
    ends = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "run")]
    assert ends[0]["parameters_crc32"] == ends[1]["parameters_crc32"]


def test_a_device_that_is_none(capsys):
    for text in ("gpu", "cuda:", "cuda:-1", "cpu:0", "cuda:01", ""):
        with pytest.raises(ConfigError, match="device=.* is no device; take auto, cpu, cuda, or cuda:0"):
            TrainConfig(device=text)
    with pytest.raises(SystemExit):
        main(["train", "--device", "gpu"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device != "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    errors = virtual.run(2, lambda comm: train(comm, TrainConfig(**MLP, device=device, out=tmp_path)))
    (line,) = {str(error) for error in errors}
    assert all(isinstance(error, ConfigError) and error.everywhere for error in errors)
    seen = "0 GPUs" if device == "cuda" else "1 GPU"
    assert line == f"device={device}: torch sees {seen} here; ask for more of them, or take device=auto or cpu"
    assert list(tmp_path.iterdir()) == []


def test_one_gpu_for_each_rank_by_default(monkeypatch):
    """As far as there is none: what the model and its data would be moved to."""
    from mpi_ef.jobs import device
    from mpi_ef.jobs.train import loop

    seen = []
    monkeypatch.setattr(device, "local_device", lambda comm, **options: seen.append(options) or torch.device("cpu"))

    def program(comm):
        return Trainer(comm, TrainConfig(**MLP)).device

    assert virtual.results(2, program) == [torch.device("cpu")] * 2
    assert seen == [{"share": True}] * 2
    moved = []
    monkeypatch.setattr(loop, "device_for", lambda *_: torch.device("meta"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: moved.append(where) or self)
    monkeypatch.setattr(loop, "described", lambda *_: {})

    def batch(comm):
        trainer = Trainer(comm, TrainConfig(**MLP))
        return [x.device.type for x in trainer._there(trainer.data.batch(trainer._next(), 0))]

    assert virtual.results(1, batch) == [["meta", "meta"]]
    assert moved == [torch.device("meta")]


def test_a_model_that_finds_no_room(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    errors = virtual.run(2, lambda comm: train(comm, TrainConfig(**MLP, out=tmp_path)))
    assert {str(error) for error in errors} == {
        "train: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); take a smaller model, fewer ranks for each "
        "device, or what keeps fewer vectors"}
    assert all(error.everywhere for error in errors)


def test_a_gpt_computes_where_its_tokens_are():
    """No other device is here: positions are asked for on theirs."""
    with mock.patch.object(torch, "arange", wraps=torch.arange) as positions:
        net = GPT(10, context=8, layers=1, heads=2, width=8).to("meta")
        assert net(torch.zeros(2, 8, dtype=torch.int64, device="meta")).device.type == "meta"
    assert positions.call_args.kwargs["device"] == torch.device("meta")
