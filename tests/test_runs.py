"""What a run goes on with, and whose folder it is: inputs are known by content, one run at a time writes to a folder."""

import errno
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from unittest import mock

import numpy as np
import programs
import pytest
import virtual

from mpi_ef import registry
from mpi_ef.checkpoint import lock
from mpi_ef.compress import Identity
from mpi_ef.errors import ConfigError, DataError, DisagreementError, MpiEfError, everywhere
from mpi_ef.jobs.cli import main
from mpi_ef.jobs.metrics import Metrics
from mpi_ef.jobs.options import parse, to_toml
from mpi_ef.jobs.train import choices
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.datasets import Text
from mpi_ef.jobs.train.loop import Trainer
from mpi_ef.jobs.train.program import train
from mpi_ef.runtime import launch

LETTERS = "abcdefghij klmnop."
GPT = {"context": 8, "layers": 1, "heads": 2, "width": 8, "batch": 4, "steps": 8, "warmup": 2, "log_every": 2}
MLP = {"model": "mlp", "batch": 4, "steps": 8, "warmup": 2, "log_every": 2}
SAVING = {"checkpoint_every": 4, "stop_after": 4}


def text(seed, size=1000):
    return LETTERS + "".join(np.random.default_rng(seed).choice(list(LETTERS), size))


def refused(n, config, kind=MpiEfError):
    """Return the one line that all ranks raise together."""
    errors = virtual.run(n, lambda comm: train(comm, config))
    assert all(isinstance(error, kind) and error.everywhere for error in errors), errors
    (line,) = {str(error) for error in errors}
    assert "\n" not in line
    return line


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def somebody_in(folder):
    """Let another process have the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        owner = vars(lock.Owner.this_process("", "another run")) | {
            "pid": other.pid,
            "started": lock._started(other.pid),
        }
        (folder / "LOCK").write_text(json.dumps(owner))
        try:
            yield other
        finally:
            other.kill()


# ---- inputs


def test_the_same_text_elsewhere_is_the_same_text(tmp_path, capsys):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text").write_text(text(0))
    here, there = TrainConfig(text=tmp_path / "here/text", **GPT), TrainConfig(text=tmp_path / "there/text", **GPT)
    whole = programs.trained(2, replace(here, out=tmp_path / "whole"))[0]
    programs.trained(2, replace(here, out=tmp_path / "run", **SAVING))
    capsys.readouterr()
    ended = programs.trained(2, replace(there, out=tmp_path / "run", checkpoint_every=4, resume="exact"))[0]
    told = capsys.readouterr().out
    assert "resumed after step 4" in told
    assert "not as in the run" not in told
    assert ended["parameters_crc32"] == whole["parameters_crc32"]
    for summary in (whole, ended):
        assert summary["config"]["data"] == Text(tmp_path / "here/text", context=8, seed=0).content


@pytest.mark.parametrize("policy", ["exact", "redistribute"])
def test_another_text_behind_the_same_path_is_refused(tmp_path, policy):
    """It has the same characters and the same length: nothing but its content tells."""
    path, out = tmp_path / "text", tmp_path / "run"
    path.write_text(text(0))
    config = TrainConfig(text=path, out=out, **GPT, **SAVING)
    programs.trained(2, config)
    path.write_text(text(1))
    before = content(out)
    line = refused(2, replace(config, resume=policy), DataError)
    assert line.startswith("resume: the run that saved had other data (1018 characters, sha256 ")
    assert content(out) == before


def test_a_record_is_of_a_text_and_not_of_a_path(tmp_path):
    """Its config.toml runs again on the same text elsewhere, and not on another one behind its path."""
    path, file = tmp_path / "text", tmp_path / "run" / "config.toml"
    path.write_text(text(0))
    first = programs.trained(2, TrainConfig(text=path, out=file.parent, **GPT))[0]
    (tmp_path / "copy").write_text(text(0))
    path.write_text(text(1))

    def again(*flags):
        return parse(
            TrainConfig, ["--config", str(file), "--out", str(tmp_path / "again"), *flags], prog="", description=""
        )

    line = refused(2, again(), DataError)
    assert line.startswith(f"data={first['config']['data']}, but here there are 1018 characters, sha256 ")
    assert not (tmp_path / "again").exists()
    ended = programs.trained(2, again("--text", str(tmp_path / "copy")))[0]
    assert ended["parameters_crc32"] == first["parameters_crc32"]


def test_ranks_that_read_other_texts_are_told(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).write_text(text(rank))

    def program(comm):
        return train(comm, TrainConfig(text=tmp_path / str(comm.Get_rank()), out=tmp_path / "run", **GPT))

    for error in virtual.run(2, program):
        assert isinstance(error, DisagreementError)
        assert "ranks disagree on their content: 1018 characters, sha256 " in str(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "ef21-muon", "powersgd", "onebit-adam"])
def test_a_checkpoint_with_all_options_that_there_were_is_gone_on_from(tmp_path, optimizer, capsys):
    """As versions wrote it that recorded options without effect, and knew the text by its path."""
    once = {"rule": "ef14", "placement": "update", "momentum": 0.9, "ratio": 0.01, "block": 1024, "rank": 4, "freeze": 0,
            "local_steps": 200, "overlap": False, "per_parameter": False, "values": "bf16", "dense_steps": 0, "eta": None,
            "beta1": None, "beta2": 0.99, "compressor": None, "context": 64, "layers": 4, "heads": 4, "width": 128,
            "split": "shuffled", "text": "None"}
    position = Trainer.position

    def as_it_was(self):
        told = position(self)
        del told["data"]
        told["options"] = {name: value for name, value in told["options"].items() if name not in once} | once
        return told

    config = TrainConfig(**MLP, optimizer=optimizer)
    whole = programs.trained(2, replace(config, out=tmp_path / "whole"))[0]
    with mock.patch.object(Trainer, "position", as_it_was):
        programs.trained(2, replace(config, out=tmp_path / "run", **SAVING))
    capsys.readouterr()
    ended = programs.trained(2, replace(config, out=tmp_path / "run", checkpoint_every=4, resume="exact"))[0]
    assert "not as in the run" not in capsys.readouterr().out
    assert ended["parameters_crc32"] == whole["parameters_crc32"]


def test_the_same_parts_in_other_words_go_on(tmp_path, capsys):
    config = TrainConfig(**MLP, optimizer="sgd", compressor="TopK(0.3, values=Quantize('bf16'))", rule="econtrol(eta=0.1)",
                         out=tmp_path, **SAVING)
    programs.trained(2, config)
    again = replace(config, resume="exact", stop_after=0, compressor="TopK(values=Quantize(format='bf16'), ratio=0.3)",
                    rule="econtrol( eta=0.1 )")
    capsys.readouterr()
    programs.trained(2, again)
    assert "not as in the run that saved" not in capsys.readouterr().out


class Inherits(Identity):
    """Compared as an Identity is, whatever it has."""

    def __init__(self, number, more=None):
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "more", more)


class Plain:
    def __init__(self, config, *what, **options):
        self.what, self.options = what, options


@pytest.mark.parametrize(("kind", "first", "second", "wanted"), [
    ("compressor", "TopK(0.1, values=test_runs:Inherits(3))", "TopK(0.1, values=test_runs:Inherits(4))", False),
    ("compressor", "TopK(0.1, values=test_runs:Inherits(3))", "TopK(values=test_runs:Inherits(number=3),ratio=0.1)", True),
    ("compressor", "test_runs:Inherits(1, test_runs:Inherits(3))", "test_runs:Inherits(1, test_runs:Inherits(4))", False),
    ("compressor", "test_runs:Inherits(1, test_runs:Inherits(3))", "test_runs:Inherits(1,test_runs:Inherits(3))", True),
    ("compressor", "TopK(0.1, values=Quantize('bf16'))", "TopK(0.1, values=Quantize('int8'))", False),
    ("compressor", "TopK(0.1, values=Quantize('bf16'))", "TopK(0.1, values=Quantize())", True),
    ("compressor", "TopK(1)", "TopK(1.0)", True),
    ("model", "test_runs:Plain(1)", "test_runs:Plain(True)", False),
    ("model", "test_runs:Plain(a=[1, 2])", "test_runs:Plain( a=[1, 2.0])", True),
    ("model", "test_runs:Plain(a=[1, 2])", "test_runs:Plain(a=[1, 2, 3])", False),
    ("model", "test_runs:Plain(a=[1, 2])", "test_runs:Plain(a=[True, 2])", False),
    ("model", "test_runs:Plain('1')", "test_runs:Plain(1)", False),
    ("rule", "econtrol(0.1)", "econtrol(0.2)", False),
])
def test_which_words_mean_the_same(kind, first, second, wanted):
    """A run went on with another compressor inside of its own, whose class inherited `==`."""
    assert registry.same(kind, first, second) is wanted


def test_equal_runs_have_equal_checkpoints(tmp_path, capsys):
    """But for run and times: the generators of Python and NumPy, which models of users may draw from, are seeded too."""
    for name in "ab":
        programs.trained(1, TrainConfig(**MLP, out=tmp_path / name, **SAVING))
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")])
    assert (ended.value.code or 0) == 0, capsys.readouterr().out
    assert ", 0 not; 0 other differences\n" in capsys.readouterr().out


def test_what_a_checkpoint_brings_back_is_not_recorded_as_something_else(tmp_path, capsys):
    """Momentum, decay, strength of the feedback come from the checkpoint: another one is refused; rates are taken."""
    config = TrainConfig(
        **MLP, optimizer="sgd", placement="gradient", rule="econtrol", ratio=0.3, out=tmp_path, **SAVING
    )
    programs.trained(2, config)
    again = replace(config, resume="exact", lr=0.001)
    for options, words in (
        ({"momentum": 0.5}, "momentum was 0.9, is 0.5"), ({"weight_decay": 0.5}, "weight_decay was 0.0, is 0.5"),
        ({"eta": 0.5}, ", is 0.5"), ({"dense_steps": 7}, "dense_steps was 0, is 7"),
    ):
        assert words in refused(2, replace(again, **options), ConfigError)
    capsys.readouterr()
    ended = programs.trained(2, replace(again, stop_after=0))[0]
    assert "not as in the run that saved: lr was 0.006, is 0.001\n" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "summary.json").read_text())["config"]
    assert recorded == ended["config"]
    assert 0.0 < recorded["eta"] < 0.3
    assert (recorded["lr"], recorded["momentum"]) == (0.001, 0.9)


def test_a_strength_that_was_given_once_is_the_one_that_is_recorded(tmp_path):
    config = TrainConfig(**MLP, optimizer="sgd", placement="gradient", rule="econtrol", out=tmp_path, **SAVING)
    programs.trained(2, replace(config, eta=0.25))
    ended = programs.trained(2, replace(config, resume="exact", stop_after=0))[0]
    assert ended["config"]["eta"] == 0.25


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_a_run_that_goes_on_has_the_decay_of_its_record(tmp_path, decay, capsys):
    """The default of SGD was 0.1 once: who did not ask for one goes on with it, and it is recorded."""
    config = TrainConfig(**MLP, optimizer="sgd", placement="gradient", ratio=0.3)
    whole = programs.trained(2, replace(config, weight_decay=decay, out=tmp_path / "whole"))[0]
    programs.trained(2, replace(config, weight_decay=decay, out=tmp_path / "run", **SAVING))
    capsys.readouterr()
    ended = programs.trained(2, replace(config, out=tmp_path / "run", checkpoint_every=4, resume="exact"))[0]
    assert "not as in the run" not in capsys.readouterr().out
    assert ended["parameters_crc32"] == whole["parameters_crc32"]
    assert ended["config"]["weight_decay"] == decay
    assert f"weight_decay = {decay}\n" in (tmp_path / "run" / "config.toml").read_text()


# Other values than those of a small run, of options that may not change when it goes on, and of those that may.
ANOTHER = {
    "heads": 4, "layers": 2, "width": 16, "context": 16, "model": "mlp", "split": "by-label", "seed": 5, "optimizer": "sgd",
    "weight_decay": 0.2, "momentum": 0.3, "beta1": 0.3, "beta2": 0.3, "placement": "gradient", "rule": "ef21", "eta": 0.3,
    "beta": 0.3, "vote_beta1": 0.3, "vote_beta2": 0.3, "participation": 0.3, "smoothness": "1,2", "reply": 0.3, "zeta": 0.3,
    "correction": 0.3, "byzantine": 1, "aggregator": "Median()",
    "compressor": "sign", "plan": "TwoPhaseMean", "ratio": 0.3, "block": 64, "rank": 2, "freeze": 3,
    "local_steps": 3, "exchange_every": 3, "decay": 0.3, "outer_lr": 0.3, "outer_momentum": 0.3, "fragments": 2,
    "late": True, "precondition": "window", "sides": "inputs", "precondition_every": 3, "statistics": "bf16",
    "fallback": 0.3, "per_parameter": True, "values": "full", "dense_steps": 3, "sweep": "lr=0.3",
}
MAY_CHANGE = {"steps": 9, "batch": 5, "lr": 0.01, "warmup": 3, "clip": 0.5, "log_every": 3, "eval_every": 7, "keep": 2,
              "checkpoint_every": 3, "save_in_background": True}
ELSEWHERE = {
    "code",
    "dedicated",
    "compress_orders",
    "patience_seconds",
    "on_silence",
    "twins",
    "profile",
    "tensorboard",
    "text",
    "data",
    "overlap",
    "whole",
    "stop_after",
    "resume",
    "on_failure",
    "out",
    "overwrite",
    "device",
    "gpu_aware_mpi",
}  # other tests


def test_every_option_may_change_when_a_run_goes_on_or_may_not():
    assert choices.kept() == ANOTHER.keys()
    assert {f.name for f in fields(TrainConfig)} == ANOTHER.keys() | MAY_CHANGE.keys() | ELSEWHERE


@pytest.mark.parametrize("policy", ["exact", "redistribute"])
@pytest.mark.parametrize(
    "options", [GPT, MLP, MLP | {"optimizer": "powersgd", "seed": 1}], ids=["gpt", "mlp", "powersgd"]
)
def test_another_model_or_other_data_of_the_ranks_are_refused(tmp_path, options, policy):
    """Also where all shapes are the same: nothing would tell later."""
    config = TrainConfig(**options, out=tmp_path, **SAVING)
    programs.trained(2, config)
    before, tried = content(tmp_path), 0
    for name, value in ANOTHER.items():
        if name not in config.chosen() or name in ("model", "optimizer", "compressor", "rule", "placement"):
            continue
        line = refused(2, replace(config, resume=policy, **{name: value}))
        assert content(tmp_path) == before
        if not line.startswith("resume: the checkpoint at step 4 has "):  # it tells shapes and compressors
            assert line.startswith(f"resume: {name} was "), line
            assert f", is {value}; a run goes on with the model, data and optimizer that it has" in line
        tried += 1
    assert tried >= 5
    others = {name: value for name, value in MAY_CHANGE.items() if name != "keep"}
    assert programs.trained(2, replace(config, resume=policy, stop_after=0, **others))[0]["steps"] == 9


# ---- rounds of steps of every rank by itself

ROUNDS = {
    "plain": {"exchange_every": 3}, "late fragments": {"exchange_every": 3, "fragments": 2, "late": True},
    "momentum": {"exchange_every": 4, "outer_lr": 0.7, "outer_momentum": 0.9, "values": "2bit"},
}


@pytest.mark.parametrize("more", ROUNDS.values(), ids=ROUNDS)
def test_rounds_go_on_from_any_step(tmp_path, more):
    """To the last bit, also while messages travel; what was sent, rounds and what was not are in the summary."""
    config = TrainConfig(**MLP | {"steps": 14}, **more, eval_every=4, out=tmp_path / "whole")
    whole = programs.trained(2, config)[0]
    assert whole["rounds"] >= 14 // more["exchange_every"]
    assert whole["replicas_equal"]
    part = replace(config, out=tmp_path / "parts", checkpoint_every=5, stop_after=5)
    programs.trained(2, part)
    ended = programs.trained(2, replace(part, stop_after=0, resume="exact"))[0]
    for name in ("parameters_crc32", "val_loss", "loss", "sent_nbytes", "rounds", "skipped_rounds", "steps"):
        assert ended[name] == whole[name], name
    other = replace(part, out=tmp_path / "others")
    programs.trained(2, other)
    with pytest.warns(RuntimeWarning, match="step 5 of 2 ranks goes on with 3: errors and momenta are the mean"):
        ended = programs.trained(3, replace(other, stop_after=0, resume="redistribute"))[0]
    assert ended["ranks"] == 3
    assert ended["replicas_equal"]


def test_rounds_send_less(tmp_path):
    """One exchange in five; errors fade where exchanges are seldom, and momentum wants that they do not."""
    ten = MLP | {"steps": 10}
    configs = {every: TrainConfig(**ten, exchange_every=every, out=tmp_path / str(every)) for every in (1, 5)}
    sent = {every: programs.trained(2, config)[0]["sent_nbytes"] for every, config in configs.items()}
    assert sent[1] == 5 * sent[5] > 0
    assert configs[1].chosen()["decay"] == 1.0
    assert configs[5].chosen()["decay"] == 0.95
    assert replace(configs[5], outer_momentum=0.9).chosen()["decay"] == 1.0


@pytest.mark.parametrize(("options", "words"), [
    ({"rule": "ef21"}, "exchange_every=3 exchanges what steps have led to, by ef14: rule=ef21 has no effect with it"),
    ({"placement": "gradient"}, "placement=gradient has no effect with it"),
    ({"dense_steps": 2}, "dense_steps=2 has no effect with it"),
    ({"outer_momentum": 0.9, "decay": 0.9}, "outer_momentum=0.9 counts old messages again, decay=0.9 lets old errors fade"),
])
def test_what_does_not_go_with_rounds_is_refused(options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        TrainConfig(model="mlp", exchange_every=3, **options)


# ---- folders


@pytest.mark.parametrize("more", [{}, SAVING, {"resume": "exact"}, {"overwrite": True}], ids=str)
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path, more):
    config = TrainConfig(**MLP, out=tmp_path / "run", **more)
    with somebody_in(config.out) as other:
        (config.out / "metrics.jsonl").write_text('{"step": 2}\n')
        before = content(config.out)
        line = refused(2, config, DataError)
        assert line.startswith(f"{config.out}: process {other.pid} on ")
        assert "writes a run there; give this job another folder" in line
        assert content(config.out) == before
    programs.trained(2, config)  # its process is gone
    assert not (config.out / "LOCK").exists()


def test_a_finished_run_stays_unless_it_may_be_overwritten(tmp_path):
    config = TrainConfig(**MLP, out=tmp_path)
    first = programs.trained(2, config)[0]
    before, other = content(tmp_path), replace(config, seed=7, log_every=4)
    for more in ({}, {"checkpoint_every": 4}, {"resume": "exact"}, {"checkpoint_every": 4, "resume": "redistribute"}):
        line = refused(2, replace(other, **more), DataError)
        assert line == f"{tmp_path} has a finished run (summary.json); give another --out, or pass --overwrite"
        assert {name: data for name, data in content(tmp_path).items() if "checkpoints" not in name} == before
    second = programs.trained(2, replace(other, overwrite=True))[0]
    assert second["parameters_crc32"] != first["parameters_crc32"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [4, 8]
    assert "overwrite" not in (tmp_path / "config.toml").read_text()  # who runs that file again is asked again


def test_checkpoints_of_another_run_are_not_mixed_with(tmp_path):
    """Also by a run that has none; with --overwrite they go, and none of them is gone on from."""
    config = TrainConfig(**MLP, out=tmp_path)
    programs.trained(2, replace(config, **SAVING))
    before = content(tmp_path)
    for more in ({}, SAVING):
        assert "has checkpoints of another run, up to step 4" in refused(2, replace(config, seed=7, **more))
        assert content(tmp_path) == before
    programs.trained(2, replace(config, seed=7, overwrite=True))
    assert not list(tmp_path.glob("checkpoints/*"))
    assert not (tmp_path / "requeue").exists()
    assert (tmp_path / "summary.json").exists()


def test_what_a_killed_run_has_left_does_not_stop_another(tmp_path):
    with somebody_in(tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
        (tmp_path / "config.toml").write_text(to_toml(TrainConfig(steps=2).resolved()))
        (tmp_path / "metrics.csv").write_text("")
        (tmp_path / ".0a1b2c3d-config.toml").write_text("half of")
    assert programs.trained(2, TrainConfig(**MLP, out=tmp_path))[0]["steps"] == 8
    assert not list(tmp_path.glob(".*"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_has_lost_its_folder_writes_nothing_more(tmp_path):
    """Its host slept for minutes, and another one has taken the folder."""
    step = Trainer.step

    def robbed(self, **options):
        step(self, **options)
        if self.steps == 5 and self.comm.Get_rank() == 0:
            owner = json.loads((tmp_path / "LOCK").read_text()) | {"token": "theirs"}
            (tmp_path / "LOCK").write_text(json.dumps(owner))

    with mock.patch.object(Trainer, "step", robbed):
        errors = virtual.run(1, lambda comm: train(comm, TrainConfig(**MLP, out=tmp_path)))
    assert "the lock was taken over by process " in str(errors[0])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "LOCK").exists()  # it is the other one's


def test_a_disk_that_fails_in_the_middle_may_have_recovered_at_the_next_start(tmp_path):
    """Status 2 would say that options or data are wrong, and `mpi-ef supervise` would not start the job again."""
    config, write = TrainConfig(**MLP, out=tmp_path), Metrics.write

    def fails(self, row):
        if row["step"] == 4:
            raise OSError(errno.EIO, "Input/output error")
        write(self, row)

    with mock.patch.object(Metrics, "write", fails):
        [error] = virtual.run(1, lambda comm: train(comm, config))
    assert isinstance(error, DataError)
    assert error.may_pass
    (tmp_path / "metrics.jsonl").unlink()
    [error] = virtual.run(1, lambda comm: train(comm, replace(config, optimizer="sgd", resume="exact", overwrite=False,
                                                              data="mine")))
    assert isinstance(error, MpiEfError)
    assert not error.may_pass


def test_which_status_errors_end_with(monkeypatch):
    """1 where another start may succeed, else 2."""
    comm = mock.MagicMock()
    comm.Get_rank.return_value, comm.Get_size.return_value = 0, 1
    monkeypatch.setitem(sys.modules, "mpi4py", mock.MagicMock(MPI=mock.MagicMock(COMM_WORLD=comm)))
    monkeypatch.setattr(launch, "check_world", lambda _: None)
    monkeypatch.setattr(launch, "keep_status", lambda _: None)
    for may_pass in (False, True):
        error = everywhere(DataError("told once"))
        error.may_pass = may_pass

        def program(_, error=error):
            raise error

        with pytest.raises(SystemExit) as ended:
            launch.run(program)
        assert ended.value.code == (1 if may_pass else 2)


@pytest.mark.parametrize("keep", [None, 1, 2, 5])
def test_as_many_checkpoints_stay_as_are_recorded(tmp_path, keep):
    """Also when nobody says how many."""
    config = TrainConfig(**MLP | {"steps": 12}, out=tmp_path, checkpoint_every=2, keep=keep)
    kept = programs.trained(2, config)[0]["config"]["keep"]
    assert kept == (keep or 3)
    steps = [f"step-{step:08}" for step in range(2, 13, 2)]
    assert sorted(path.name for path in tmp_path.glob("checkpoints/step-*")) == steps[-kept:]


def test_a_finished_run_that_is_to_go_on_stays_as_it_is(tmp_path, capsys):
    """One line says so, whatever else is given now; fewer steps than were done are refused."""
    config = TrainConfig(**MLP, out=tmp_path, checkpoint_every=4)
    done = programs.trained(2, config)[0]
    before = content(tmp_path)
    for policy in ("exact", "redistribute"):
        for more in ({}, {"lr": 0.001, "log_every": 1}, {"checkpoint_every": 0}):
            capsys.readouterr()
            for summary in programs.trained(2, replace(config, resume=policy, **more)):
                assert summary == json.loads(before["summary.json"])
                assert summary["loss"] == done["loss"] > 0.0
            assert capsys.readouterr().out == "resumed after step 8; nothing is left to do\n"
            assert content(tmp_path) == before
    line = refused(2, replace(config, resume="exact", steps=5), ConfigError)
    assert line.startswith("resume: 8 steps are done, and steps=5 are fewer")
    assert content(tmp_path) == before
    assert programs.trained(2, replace(config, resume="exact", steps=10))[0]["steps"] == 10


def test_a_summary_that_is_missing_is_written_with_the_same_values(tmp_path):
    """The run was killed between its last checkpoint and its end."""
    config = TrainConfig(**MLP, out=tmp_path, checkpoint_every=4)
    done = programs.trained(2, config)[0]
    (tmp_path / "summary.json").unlink()
    again = programs.trained(2, replace(config, resume="exact"))[0]
    for name in ("steps", "loss", "val_loss", "val_accuracy", "sent_nbytes", "dense_nbytes", "parameters_crc32"):
        assert again[name] == done[name], name
    (tmp_path / "summary.json").write_text("{")
    assert "summary.json: cannot be read as JSON" in refused(2, replace(config, resume="exact"), DataError)


@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"resume": "exact"}, {"checkpoint_every": 4}], ids=str)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.toml", "steps = 8\n"),
        ("config.toml", "# tried on Monday\n" + to_toml(TrainConfig().resolved())),
        ("metrics.csv", "a,b\n1,2\n"),
        ("metrics.jsonl", "my notes\n"),
        ("checkpoints/step-00000005/thing", "hi"),
        ("checkpoints/step-by-step.txt", "hi"),
    ],
)
def test_what_no_run_has_written_stays(tmp_path, name, data, more):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(data)
    line = refused(2, TrainConfig(**MLP, out=tmp_path, **more), DataError)
    assert line.startswith(
        f"{tmp_path / name}: " if "/thing" not in name else f"{tmp_path / 'checkpoints/step-00000005'}: "
    )
    assert line.endswith("; move it, or give another --out")
    assert content(tmp_path) == {name: data.encode()}


def test_what_a_run_has_written_is_known_and_other_names_are_kept(tmp_path):
    """Also damaged and unfinished checkpoints, and beside files of other names."""
    config = TrainConfig(**MLP, out=tmp_path)
    programs.trained(2, replace(config, checkpoint_every=2))
    steps = sorted(tmp_path.glob("checkpoints/step-*"))
    for path in steps[0].iterdir():
        if path.name != "rank-00001.h5":
            path.unlink()
    steps[1].rename(tmp_path / "checkpoints" / ".tmp-step-00000006-0123456789ab")
    (tmp_path / "checkpoints" / ".tmp-drop-0123456789ab").mkdir()
    mine = {"notes.txt": b"mine", "checkpoints/mine/x": b"hi"}
    for name, data in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    programs.trained(2, replace(config, overwrite=True))
    left = content(tmp_path)
    assert {name: left.pop(name) for name in mine} == mine
    assert left.keys() == {"summary.json", "metrics.jsonl", "metrics.csv", "config.toml", "lateness.npz"}


def test_the_record_of_a_run_that_went_on_runs_anew(tmp_path):
    """How a launch began is not an option of the run: its config.toml may begin one, also over this one."""
    config = TrainConfig(**MLP, out=tmp_path, checkpoint_every=4)
    programs.trained(2, replace(config, stop_after=4))
    ended = programs.trained(2, replace(config, resume="exact"))[0]
    again = parse(TrainConfig, ["--config", str(tmp_path / "config.toml"), "--overwrite"], prog="", description="")
    assert again.resume == "no"
    assert programs.trained(2, again)[0]["parameters_crc32"] == ended["parameters_crc32"]


def test_a_run_of_a_version_with_fewer_options_is_known(tmp_path):
    """Whatever options have been added since: it goes on, and another run may take its place."""
    config = TrainConfig(**MLP, out=tmp_path, checkpoint_every=4)
    programs.trained(2, replace(config, stop_after=4))
    record, then = tmp_path / "config.toml", {
        "model", "steps", "batch", "optimizer", "clip", "seed", "log_every", "eval_every", "checkpoint_every", "out"}
    record.write_text("".join(line for line in record.read_text().splitlines(keepends=True) if line.split()[0] in then))
    assert len(record.read_text().splitlines()) == len(then)
    assert programs.trained(2, replace(config, resume="exact"))[0]["steps"] == 8
    record.write_text("".join(line for line in record.read_text().splitlines(keepends=True) if line.split()[0] in then))
    assert programs.trained(2, replace(config, overwrite=True))[0]["steps"] == 8
