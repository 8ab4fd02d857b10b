"""``mpi-ef train --sweep``: each training is as by itself, whatever the scheme; it goes on; schemes are chosen."""

import json
from functools import partial
from itertools import count
from unittest import mock

import numpy as np
import pytest
import torch
import virtual

from mpi_ef.coded import scheme_of
from mpi_ef.collectives import Lateness
from mpi_ef.collectives.server import Server
from mpi_ef.errors import ConfigError, MpiEfError
from mpi_ef.jobs.delays import load_lateness, save_lateness
from mpi_ef.jobs.options import parse
from mpi_ef.jobs.report import program as report
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.program import train
from mpi_ef.jobs.train.sweep import SweepTrainer

MLP = {"model": "mlp", "optimizer": "sgd", "batch": 4, "steps": 6, "warmup": 2, "log_every": 2, "eval_every": 6,
       "weight_decay": 0.01, "sweep": "lr=0.3,0.1,0.03"}


def trained(n, **options):
    """Return what each rank returns."""
    def program(comm):
        torch.set_flush_denormal(True)
        return train(comm, TrainConfig(**MLP | options))

    return virtual.results(n, program)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank, with batches as large as those of four."""
    return trained(1, code="gc:0", batch=16, out=tmp_path_factory.mktemp("alone"))[0]["jobs"]


@pytest.mark.parametrize("code", ["gc:0", "srsgc:1,2,2", "srsgc:2,3,2", "msgc:1,3,4", "msgc:2,2,1"])
def test_each_training_is_as_by_itself(code, alone, tmp_path):
    done, *workers = trained(4, code=code, out=tmp_path)
    assert list(done["jobs"]) == ["lr=0.3", "lr=0.1", "lr=0.03"]
    for name, one in done["jobs"].items():
        assert one["val_loss"] == pytest.approx(alone[name]["val_loss"], rel=1e-4)
        assert one["loss"] == pytest.approx(alone[name]["loss"], rel=1e-4)
        assert one["config"]["lr"] == float(name.partition("=")[2])
        assert one["steps"] == 6
        assert [row["step"] for row in rows(tmp_path / name)] == [2, 4, 6]
        assert json.loads((tmp_path / name / "summary.json").read_text()) == one
    assert len({one["val_loss"] for one in done["jobs"].values()}) == 3
    assert len({one["parameters_crc32"] for one in workers}) == 1
    assert load_lateness(tmp_path / "lateness.npz").n == 4


def test_the_model_that_is_none_of_digits_is_swept_too(tmp_path):
    """Its sizes are defaults, which trainings of a sweep had not."""
    text = tmp_path / "text"
    text.write_text("What a user has written, many times over. " * 40)
    done = trained(2, model="gpt", text=text, code="srsgc:1,2,1", sweep="lr=0.1,0.01", steps=2, context=8,
                   out=tmp_path / "out")
    assert [one["steps"] for one in done[0]["jobs"].values()] == [2, 2]


@pytest.mark.parametrize("sweep", ["seed=1,2", "momentum=0.5,0.9", "clip=0,0.1"])
def test_any_of_these_options_makes_trainings_differ(sweep, tmp_path):
    done = trained(2, code="srsgc:1,2,1", sweep=sweep, out=tmp_path, dedicated=False)[0]["jobs"]
    assert list(done) == [f"{sweep.partition('=')[0]}={value}" for value in sweep.partition("=")[2].split(",")]
    assert len({one["parameters_crc32"] for one in done.values()}) == 2
    again = parse(TrainConfig, ["--config", str(tmp_path / "config.toml"), "--overwrite"], prog="", description="")
    assert again.sweep == sweep
    repeated = virtual.results(2, lambda comm: train(comm, again))[0]["jobs"]
    assert [one["parameters_crc32"] for one in repeated.values()] == [one["parameters_crc32"] for one in done.values()]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_sweep_that_is_stopped_goes_on_to_the_same_bits(optimizer, tmp_path, capsys):
    whole = trained(4, code="srsgc:1,2,2", optimizer=optimizer, out=tmp_path / "whole")[0]["jobs"]
    options = {"code": "srsgc:1,2,2", "optimizer": optimizer, "out": tmp_path / "parts", "checkpoint_every": 2}
    stopped = trained(4, **options, stop_after=4)[0]
    assert stopped["steps"] == 4
    assert "stopped after step 4" in capsys.readouterr().out
    done = trained(4, **options, resume="exact")[0]["jobs"]
    assert "resumed after step 4; 2 steps left" in capsys.readouterr().out
    for name, one in done.items():
        assert one["parameters_crc32"] == whole[name]["parameters_crc32"]
        assert one["loss"] == whole[name]["loss"]
        assert [row["step"] for row in rows(tmp_path / "parts" / name)] == [2, 4, 6]
    again = trained(4, **options, resume="exact")[0]
    assert again["jobs"] == done  # nothing was left to do
    with pytest.raises(MpiEfError, match="has checkpoints of another run|has a finished run"):
        trained(4, **options)
    with pytest.raises(MpiEfError, match="resume: sweep was "):
        trained(4, **options | {"sweep": "lr=0.3,0.1,0.02"}, resume="exact", steps=8)
    with pytest.raises(MpiEfError, match="was saved by 4 ranks, here there are 2; pass --resume redistribute"):
        trained(2, **options | {"code": "gc:1"}, resume="exact", steps=8)
    more = trained(2, **options | {"code": "gc:1"}, resume="redistribute", steps=8)[0]["jobs"]
    assert {one["steps"] for one in more.values()} == {8}


def test_a_training_that_diverges_ends_alone(tmp_path, capsys):
    done = trained(2, code="srsgc:1,2,1", sweep="lr=1e30,0.1", clip=0.0, warmup=0, out=tmp_path)[0]["jobs"]
    assert done["lr=1e30"]["ended_at"] is not None
    assert done["lr=1e30"]["steps"] == done["lr=1e30"]["ended_at"] < 6
    assert (done["lr=0.1"]["ended_at"], done["lr=0.1"]["steps"]) == (None, 6)
    assert "model 0 ends: its gradient of step " in capsys.readouterr().err
    options = {"code": "srsgc:1,2,1", "sweep": "lr=1e30,0.1", "clip": 0.0, "warmup": 0, "checkpoint_every": 2}
    trained(2, **options, stop_after=4, out=tmp_path / "parts")
    again = trained(2, **options, resume="exact", out=tmp_path / "parts")[0]["jobs"]  # it stays as it was
    for name, one in again.items():
        for what in ("ended_at", "steps", "parameters_crc32"):
            assert one[what] == done[name][what]


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_training_that_has_diverged_has_a_last_row_and_a_place_in_a_report(log_every, tmp_path, capsys):
    options = {"code": "gc:0", "sweep": "lr=1e30,0.1", "warmup": 0, "log_every": log_every, "out": tmp_path}
    done = trained(2, **options, checkpoint_every=3, stop_after=3)[0]
    assert done["stopped"]
    done = trained(2, **options, checkpoint_every=3, resume="exact")[0]["jobs"]["lr=1e30"]
    last = rows(tmp_path / "lr=1e30")
    assert [row["step"] for row in last].count(done["ended_at"]) == (2 if log_every == 1 else 1)
    assert last[-1]["step"] == done["steps"] == done["ended_at"]
    assert last[-1]["val_loss"] == pytest.approx(done["val_loss"], nan_ok=True)
    capsys.readouterr()
    report.main([str(tmp_path)])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["lr=1e30", "lr=0.1"]


def test_a_scheme_is_chosen_from_what_was_recorded(tmp_path, capsys):
    """One rank in its turn is late by much: a scheme with delay; nobody is: uncoded. The choice is recorded."""
    late, quiet = Lateness(4), Lateness(4)
    for step in range(60):
        delays = np.zeros(4)
        quiet.add(delays)
        delays[step // 2 % 4] = 5.0 if step % 3 else 0.0
        late.add(delays)
    late.part_seconds = quiet.part_seconds = 0.1
    for name, what in (("late", late), ("quiet", quiet)):
        save_lateness(tmp_path / f"{name}.npz", what)
        done = trained(4, code="auto", profile=tmp_path / f"{name}.npz", out=tmp_path / name)[0]["jobs"]
        chosen = done["lr=0.1"]["config"]["code"]
        told = capsys.readouterr().out
        assert "60 rows; a part takes 100 ms, as that run says" in told
        (line,) = [line for line in told.splitlines() if "; taken" in line]
        assert line.split("  ")[1].strip().startswith(chosen.split(")")[0])
        assert (chosen == "GC(0)") == (name == "quiet")
        assert f'code = "{chosen}"' in (tmp_path / name / "config.toml").read_text()
        assert "profile" not in (tmp_path / name / "config.toml").read_text()
    with pytest.raises(MpiEfError, match="60 rows of 4 workers, here there are 2; take the run of as many ranks"):
        trained(2, code="auto", profile=tmp_path / "late.npz", out=tmp_path / "other")
    with pytest.raises(MpiEfError, match=r"nothing\.npz"):
        trained(4, code="auto", profile=tmp_path / "nothing.npz", out=tmp_path / "other")


def test_a_report_of_a_sweep_is_of_its_trainings(tmp_path, capsys):
    trained(2, code="gc:0", out=tmp_path)
    capsys.readouterr()
    report.main([str(tmp_path), "--plot", str(tmp_path / "x.png")])
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()[1:4]] == ["lr=0.3", "lr=0.1", "lr=0.03"]
    assert [line.rpartition("  ")[2] for line in told.splitlines()[1:4]] == ["sgd, dense, gc:0"] * 3
    assert (tmp_path / "x.png").exists()
    report.main([str(tmp_path), "--best"])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(("code", "dedicated"), [("gc:1", False), ("gc:1", True), ("srsgc:1,2,2", False)])
def test_a_sweep_and_its_report_say_once_who_was_slow(code, dedicated, tmp_path, capsys):
    """By the ranks' own numbers; what a code of rounds has saved, and of no scheme that ranks were waited for."""
    n, gradient = 4 + dedicated, SweepTrainer._gradient

    def slow(trainer, *arguments):
        trainer.comm.pause(0.25 if trainer.comm.Get_rank() == n - 1 else 0.01)
        return gradient(trainer, *arguments)

    with mock.patch.object(SweepTrainer, "_gradient", slow), \
            mock.patch("mpi_ef.jobs.train.sweep.perf_counter", partial(next, count(0, 1e-3))):
        done = trained(n, code=code, dedicated=dedicated, out=tmp_path)[0]
    late = done["lateness"]
    assert late["lines"][0].startswith(f"rank {n - 1} is ")
    assert ("the code (s=1) has saved" in late["lines"][1]) == (code == "gc:1")
    assert late["ranks"] == list(range(dedicated, n))
    assert f"rank {n - 1}: of 18 answers" in late["lines"][-1]
    told = capsys.readouterr().out
    assert f"; sgd, {code}: an order of 19.2 kB and an answer of as much per round and worker\n" in told
    assert told.count("who is slow") == 1
    assert "waiting for" not in told
    report.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"{tmp_path.name}: ")] == [f"{tmp_path.name}: {line}"
                                                                             for line in late["lines"]]
    assert [line.split()[0] for line in lines[-4:]] == [*map(str, range(dedicated, n))]
    damaged = done | {"lateness": late | {"last": 3}}
    (tmp_path / "summary.json").write_text(json.dumps(damaged))
    with pytest.raises(SystemExit, match="summary.json is damaged"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize(("code", "line"), [
    ("gc:2", "s=2 of 2 workers cannot all be missing; take gc:1 or less"),
    ("srsgc:1,2,3", "srsgc: LAM=3 of 2 workers cannot be slow; take srsgc:1,2,2 or less"),
    ("MSGC(1, 3, 4)", "msgc: LAM=4 of 2 workers cannot be slow; take msgc:1,3,2 or less"),
])
def test_a_scheme_that_the_ranks_do_not_fit_is_told_with_texts_that_are_taken(code, line, tmp_path):
    errors = virtual.run(2, lambda comm: train(comm, TrainConfig(**MLP | {"code": code}, out=tmp_path / "run")))
    assert [str(error) for error in errors] == [line] * 2
    scheme_of(line.rpartition("; take ")[2].removesuffix(" or less")).check(2)
    assert not (tmp_path / "run").exists()
def test_a_sweep_that_cannot_go_on_ends_as_other_runs_do(tmp_path, monkeypatch):
    """It said that rank 0 had left its workers, and ended with another status."""
    left = []
    monkeypatch.setattr(Server, "abandon", lambda server: left.append(server))
    options = {"code": "gc:0", "out": tmp_path, "checkpoint_every": 2}
    trained(2, **options, stop_after=2)
    with pytest.raises(MpiEfError, match=r"resume: sweep was lr=0\.3,0\.1,0\.03, is lr=0\.3,0\.1,0\.02"):
        trained(2, **options, resume="exact", sweep="lr=0.3,0.1,0.02")
    (tmp_path / "lr=0.1" / "metrics.csv").write_text("mine")
    with pytest.raises(MpiEfError, match=r"metrics\.csv: no run has written it"):
        trained(2, **options, resume="exact")
    assert not left


def test_what_another_program_has_written_stays(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "metrics.csv").write_text("mine")
    with pytest.raises(MpiEfError, match=r"metrics\.csv: no run has written it"):
        trained(2, code="gc:0", out=tmp_path)
    assert (tmp_path / "lr=0.1" / "metrics.csv").read_text() == "mine"


@pytest.mark.parametrize(("options", "line"), [
    ({"code": "srsgc:1,2,2", "sweep": None}, "code=srsgc:1,2,2 is for several trainings at once; pass sweep="),
    ({"code": "fr:1"}, "sweep=lr=0.3,0.1,0.03 has no effect with code=fr:S"),
    ({"code": "none"}, "sweep=lr=0.3,0.1,0.03 has no effect with code=none; it goes with code=gc:S"),
    ({"code": "srsgc:3,4,2"}, "sweep=lr=0.3,0.1,0.03 is of 3 trainings, and code=srsgc:3,4,2 is for 4 or more"),
    ({"code": "srsgc:1"}, "code=srsgc:1: scheme 'srsgc:1' is not known"),
    ({"code": "srsgc:2,4,1"}, "code=srsgc:2,4,1: srsgc: B=2 does not divide W - 1=3; take srsgc:2,3,1"),
    ({"code": "SRSGC(2, 4, 1)"}, "code=SRSGC(2, 4, 1): srsgc: B=2 does not divide W - 1=3; take srsgc:2,3,1"),
    ({"code": "msgc:1,1,1"}, "code=msgc:1,1,1: msgc: W=1 is less than 2; a window has 2 rounds or more"),
    ({"code": "auto"}, "code=auto wants profile, a lateness.npz of a run; pass one"),
    ({"code": "gc:1", "profile": "x.npz"}, "code=gc:1 takes no profile"),
    ({"code": "gc:1", "sweep": "lr"}, "sweep=lr is no option with different values; write for example lr="),
    ({"code": "gc:1", "sweep": "lr=0.1,0.1"}, "sweep=lr=0.1,0.1 is no option with different values"),
    ({"code": "gc:1", "sweep": f"seed=1,{1 << 63}"}, "seed=9223372036854775808 is too large for torch's generators"),
    ({"code": "gc:1", "sweep": "lr=0.1,.1"}, "sweep=lr=0.1,.1: two values are the same; leave one out"),
    ({"code": "gc:1", "sweep": "width=1,2"}, "sweep=width=1,2 is no option with different values"),
    ({"code": "gc:1", "sweep": "lr=0.1,x"}, "sweep=lr=0.1,x: values of lr are numbers"),
    ({"code": "gc:1", "sweep": "lr=0.1,-1"}, "lr=-1"),
    ({"code": "gc:1", "sweep": "beta1=0.1,0.2"}, "sweep=beta1=0.1,0.2: beta1 has no effect with optimizer=sgd"),
    ({"code": "gc:1", "sweep": "momentum=0.1,0.2", "momentum": 0.3}, "momentum=0.3 has no effect with sweep=momentum="),
    ({"code": "gc:1", "compressor": "topk"}, "compressor=topk has no effect with code=gc:1, where all draw from all"),
    ({"code": "gc:1", "split": "by-label"}, "split=by-label has no effect with code=gc:1"),
    ({"code": "gc:1", "rule": "ef21"}, "rule=ef21 has no effect with code=gc:1, where a server has the parameters"),
    ({"code": "gc:1", "on_silence": "wait"}, "on_silence=wait has no effect with code=gc:S"),
])
def test_what_does_not_go_with_a_sweep_is_one_line(options, line):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**MLP | options)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
