"""What users bring to mpi-ef train and bench: optimizers, plans, rules, compressors, models and data, as specifications."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import virtual
from my_compressor import BlockMax
from my_plan import TrimmedMean
from my_rule import FADING
from programs import trained
from vectors_for_tests import gaussian

from mpi_ef.collectives import GatherMean
from mpi_ef.compress import Quantize, TopK
from mpi_ef.errors import ConfigError, DataError, DisagreementError, MpiEfError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.bench.methods import methods
from mpi_ef.jobs.methods import methods_in
from mpi_ef.jobs.options import parse, to_toml
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.datasets import Tensors
from mpi_ef.jobs.train.program import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = {"model": "mlp", "steps": 6, "batch": 8, "warmup": 1, "eval_every": 6, "log_every": 3}
MINE = SMALL | {"model": "my_model:build(width=8, samples=100)", "optimizer": "sgd", "lr": 0.05, "log_every": 1}


def read(*flags):
    return parse(TrainConfig, flags, prog="train", description="")


@pytest.mark.parametrize(("text", "options"), [
    ("OneBitAdam(betas=(0.9, 0.99), freeze_step=3, compressor=Sign(block=1024))", {"optimizer": "onebit-adam", "freeze": 3}),
    pytest.param("OneBitLamb(betas=(0.9, 0.99), freeze_step=3, compressor=TopK(0.05, values=Quantize('bf16')))",
                 {"optimizer": "onebit-lamb", "freeze": 3, "compressor": "topk", "ratio": 0.05},
                 marks=pytest.mark.exhaustive),
    pytest.param("Signum(momentum=0.8)", {"optimizer": "signum", "momentum": 0.8}, marks=pytest.mark.exhaustive),
    ("EF21Muon(TopK(0.05, values=Quantize('bf16')), beta=0.5, dense_steps=0)",
     {"optimizer": "ef21-muon", "ratio": 0.05, "momentum": 0.5}),
])
def test_a_specified_optimizer_is_the_one_of_the_options(text, options, tmp_path):
    """Same loss, same bytes; and what is recorded is what was built."""
    ended = [trained(2, TrainConfig(**SMALL, **more, lr=0.01, out=tmp_path / name))[0]
             for name, more in (("text", {"optimizer": text}), ("options", options))]
    for name in ("loss", "val_loss", "sent_nbytes", "parameters_crc32", "optimizer"):
        assert ended[0][name] == ended[1][name], name
    recorded = json.loads((tmp_path / "text" / "summary.json").read_text(encoding="utf-8"))
    assert recorded["config"]["optimizer"] == text
    assert tomllib.loads((tmp_path / "text" / "config.toml").read_text(encoding="utf-8"))["optimizer"] == text


@pytest.mark.filterwarnings("ignore:MoNNA. n=")
def test_ranks_that_do_not_wait_for_each_other_cannot_be_trained_here(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer=MoNNA\(f=0, wait_for=1\): with wait_for ranks do not wait"):
        trained(2, TrainConfig(**SMALL, optimizer="MoNNA(f=0, wait_for=1)", out=tmp_path))


def test_an_optimizer_and_a_plan_from_outside_train_stop_and_go_on(tmp_path, capsys):
    """To the last bit, through config.toml; other options are refused then."""
    for name, options in {
        "optimizer": {"optimizer": "my_optimizer:Normalized(beta=0.8, compressor=my_compressor.BlockMax(16))"},
        "plan": {"optimizer": "sgd", "plan": "my_plan:TrimmedMean(trim=1)", "dense_steps": 1},
    }.items():
        whole = TrainConfig(**SMALL, **options, lr=0.02, checkpoint_every=2, out=tmp_path / name / "whole")
        parts = replace(whole, out=tmp_path / name / "parts")
        ended = trained(3, whole)[0]
        assert ended["replicas_equal"]
        assert trained(3, replace(parts, stop_after=3))[0]["stopped"]
        file = tmp_path / "again.toml"
        file.write_text(to_toml(parts), encoding="utf-8")
        again = trained(3, read("--config", str(file), "--resume", "exact"))[0]
        assert again["parameters_crc32"] == ended["parameters_crc32"]
        assert again["sent_nbytes"] == ended["sent_nbytes"]
        assert "resumed after step 3" in capsys.readouterr().out
    other = replace(whole, plan=None, resume="exact", steps=8)
    with pytest.raises(MpiEfError, match="plan"):
        trained(3, other)


def test_replicas_that_come_apart_stop_all_ranks(tmp_path, monkeypatch):
    """At the first validation, and not after days; the run does not count as finished."""
    decode = TrimmedMean.decode
    monkeypatch.setattr(TrimmedMean, "decode", lambda self, out, s, **how: decode(self, out, s * (1 + self.rank), **how))
    options = {"optimizer": "sgd", "plan": "my_plan:TrimmedMean(trim=0)", "out": tmp_path}
    with pytest.raises(DisagreementError) as caught:
        trained(3, TrainConfig(**SMALL | {"eval_every": 2, "log_every": 1}, **options))
    assert str(caught.value).startswith("mpi-ef train: after step 2 parameters on ranks 1,2 are not those on rank 0; ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (["--optimizer", "OneBitAdam(freeze_stp=1)"], "OneBitAdam has no option freeze_stp; did you mean freeze_step?"),
    (["--optimizer", "OnebitAdam()"], "there is no optimizer 'OnebitAdam'; did you mean OneBitAdam?"),
    (["--optimizer", "onebit-adm"], "optimizer=onebit-adm: 'onebit-adm' is unknown; did you mean onebit-adam?"),
    (["--optimizer", "OneBitAdam(lr=0.1)"], "lr is an option of the run; give lr outside of the optimizer"),
    (["--optimizer", "Lion(weight_decay=0.1)"], "weight_decay is an option of the run"),
    (["--optimizer", "EF21()"], "EF21: missing a required argument: 'compressor'"),
    (["--optimizer", "OneBitAdam()", "--compressor", "topk"], "compressor=topk has no effect with optimizer=OneBitAdam()"),
    (["--optimizer", "OneBitAdam()", "--rule", "ef21"], "rule=ef21 has no effect with optimizer=OneBitAdam()"),
    (["--optimizer", "DistributedOptimizer()"], "DistributedOptimizer is not built on parameters; take adamw or sgd"),
    (["--optimizer", "my_optimizer:nothing"], "my_optimizer:nothing' cannot be loaded"),
    (["--plan", "TrimedMean"], "there is no plan 'TrimedMean'"),
    (["--plan", "my_plan:TrimmedMean(trimm=1)"], "has no option trimm; did you mean trim?"),
    (["--plan", "DenseMean", "--rule", "ef21-pp", "--placement", "gradient"], "rule=ef21-pp has a plan of its own"),
    (["--plan", "DenseMean", "--optimizer", "lion"], "plan=DenseMean has no effect with optimizer=lion"),
    (["--model", "mpl"], "model=mpl: 'mpl' is unknown; did you mean mlp?"),
    (["--model", "my_model:bild"], "cannot be loaded: .* has no attribute 'bild'"),
    (["--model", "my_model:build(widht=3)"], "my_model:build has no option widht; did you mean width?"),
    (["--model", "my_model:build", "--context", "8"], "context=8 has no effect with model=my_model:build"),
])
def test_what_does_not_fit_is_refused_before_mpi_is_started(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*flags)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.count("\n") == 1
    assert re.search(words.replace("()", r"\(\)"), told), told


def test_a_model_from_outside_trains_stops_and_goes_on(tmp_path):
    """On as many ranks to the last bit; on others, as after a death; not with another model or other data."""
    whole = TrainConfig(**MINE, checkpoint_every=2, out=tmp_path / "whole")
    parts = replace(whole, out=tmp_path / "parts")
    ended = trained(2, whole)[0]
    assert ended["val_accuracy"] is None  # a curve has no labels
    assert ended["config"]["model"] == MINE["model"]
    assert ended["config"]["data"].startswith("100 samples, sha256 ")
    assert trained(2, replace(parts, stop_after=3))[0]["stopped"]
    assert trained(2, replace(parts, resume="exact"))[0]["parameters_crc32"] == ended["parameters_crc32"]
    with pytest.warns(RuntimeWarning, match="step 6 of 2 ranks goes on with 1"):
        fewer = trained(1, replace(parts, resume="redistribute", steps=8))[0]
    assert fewer["steps"] == 8
    assert fewer["replicas_equal"]
    for model, kind, words in ((MINE["model"].replace("100", "90"), DataError, "the run that saved had other data"),
                               ("my_model:build(samples=100)", MpiEfError, "width|model|shape|has")):
        with pytest.raises(kind, match=words):
            trained(1, replace(parts, model=model, resume="redistribute", steps=10))


def test_what_a_function_returns_is_looked_at(monkeypatch):
    import my_model

    monkeypatch.setattr(my_model, "three", lambda config: 3, raising=False)
    monkeypatch.setattr(my_model, "pair", lambda config: (torch.nn.Linear(1, 1), 3), raising=False)
    for name, words in (("three", "returns int; return"), ("pair", "returns Linear, int; return")):
        outcomes = virtual.run(
            2, lambda comm, name=name: train(comm, TrainConfig(**MINE | {"model": f"my_model:{name}"}))
        )
        assert all(words in str(outcome) for outcome in outcomes)
    with pytest.raises(DataError, match="points: 3 inputs with 2 targets, and 1 with 1 held out"):
        Tensors((torch.ones(3, 1), torch.ones(2)), (torch.ones(1, 1), torch.ones(1)), "points")


def test_labels_give_accuracies_and_the_loss_is_cross_entropy_by_default(monkeypatch, tmp_path):
    import my_model

    def classes(config):
        x = torch.linspace(-1, 1, 40)[:, None]
        y = (x[:, 0] > 0).long()
        return torch.nn.Linear(1, 2), Tensors((x, y), (x[::4], y[::4]))

    monkeypatch.setattr(my_model, "classes", classes, raising=False)
    config = TrainConfig(**MINE | {"model": "my_model:classes", "lr": 0.5, "steps": 20}, clip=0.0, out=tmp_path)
    ended = trained(2, config)[0]
    assert ended["val_accuracy"] > 0.8
    assert ended["val_loss"] < 0.6


def test_bench_measures_what_is_specified():
    """Beside dense means."""
    own = "my_rule:FADING(fade=0.5) my_compressor:BlockMax(8) my_plan:TrimmedMean(trim=0)"
    text = f"ef21 TopK(0.1, values=Quantize('bf16')); {own}"

    def program(comm):
        x = gaussian(comm.Get_rank(), 1000)
        found = [m for m in methods(comm, 1000, 0.01, methods_in(text)) if m.kind != "dense"]
        expected = [ErrorFeedback("ef21", GatherMean(comm, TopK(0.1, values=Quantize("bf16")), 1000)),
                    ErrorFeedback(FADING, TrimmedMean(comm, BlockMax(8), 1000, trim=0), fade=0.5)]
        for method, feedback in zip(found, expected, strict=True):
            np.testing.assert_array_equal(method.call(x), feedback.step(x))
            assert method.sent_nbytes == feedback.plan.traffic.sent_nbytes
        return [method.name for method in found]

    mine = "my_rule:FADING(fade=0.5) BlockMax(block=8) my_plan:TrimmedMean(trim=0)"
    assert virtual.results(2, program)[0] == ["ef21 TopK(0.1, bf16)", mine]


def test_the_example_is_short():
    assert len((EXAMPLES / "my_model.py").read_text(encoding="utf-8").splitlines()) < 40
