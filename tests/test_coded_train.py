"""``mpi-ef train --code``: a run whose server evaluates, writes and saves alone."""

import json
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import virtual

from mpi_ef.checkpoint.manifest import committed_steps
from mpi_ef.coded import code_of, gradients
from mpi_ef.errors import ConfigError, DataError, MpiEfError, SilenceError
from mpi_ef.jobs.cli import main
from mpi_ef.jobs.delays import load_lateness
from mpi_ef.jobs.train.coded import CodedTrainer
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.program import train

MLP = {"model": "mlp", "batch": 8, "steps": 8, "warmup": 2, "log_every": 2, "eval_every": 4, "code": "fr:1"}


def trained(n, config, late=()):
    """What all ranks return; those that are `late` sleep in each step."""
    took = CodedTrainer.step

    def step(self, number):
        if self.comm.Get_rank() in late:
            self.comm.pause(0.05)
        took(self, number)
        self.comm.pause(0.005)

    with mock.patch.object(CodedTrainer, "step", step):
        return virtual.results(n, lambda comm: train(comm, config))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_rank_that_sleeps_changes_no_bit_and_is_named(tmp_path, optimizer, capsys):
    config = TrainConfig(**MLP, optimizer=optimizer, compressor="identity")
    whole, *workers = trained(4, replace(config, out=tmp_path / "whole"))
    told = capsys.readouterr().out
    assert f"; {optimizer}, fr:1, Identity(): an order of 19.2 kB and an answer of 19.2 kB per step and worker\n" in told
    assert re.search(r"bytes sent per rank +\S+ kB \(dense: \S+ kB; \d+ % of dense\)\n", told)
    assert [one["steps"] for one in workers] == [7] * 3
    late = trained(4, replace(config, out=tmp_path / "late"), late=[2])[0]
    assert late["parameters_crc32"] == whole["parameters_crc32"]
    assert late["late"] > 0
    assert late["missing"] == []
    assert (late["loss"], late["val_loss"]) == (whole["loss"], whole["val_loss"])
    assert json.loads((tmp_path / "late/summary.json").read_text()) == late
    assert [row["step"] for row in rows_of(tmp_path / "late")] == [2, 4, 6, 8]
    assert any(line.startswith("rank 2") for line in late["lateness"]["lines"])
    phases = late["phases_seconds_per_step"]  # in which no kernels are loaded; a part takes half of what s + 1 = 2 do
    part = load_lateness(tmp_path / "late/lateness.npz").part_seconds
    assert part == pytest.approx((phases["data"] + phases["compute"]) / 2)
    capsys.readouterr()
    main(["report", str(tmp_path / "late"), str(tmp_path / "whole"), "--plot", str(tmp_path / "figure.png")])
    told = capsys.readouterr().out
    assert "rank 2" in told
    assert [line.rpartition("  ")[2] for line in told.splitlines()[1:3]] == [f"{optimizer}, dense, fr:1"] * 2
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("options", [{}, {"compressor": "identity"}, {"code": "cyclic:1", "optimizer": "sgd"},
                                     {"code": "fr:0", "dedicated": True}])
def test_a_run_that_was_stopped_goes_on(tmp_path, options, capsys):
    """To the same bits: its order of samples, rates, moments, rows, losses since the last row."""
    config = TrainConfig(**MLP | options)
    whole = trained(4, replace(config, out=tmp_path / "whole"))[0]
    stopped = trained(4, replace(config, out=tmp_path / "run", checkpoint_every=2, stop_after=5))[0]
    assert stopped == {"steps": 5, "stopped": "after 5 steps of this launch"}
    capsys.readouterr()
    again = replace(config, out=tmp_path / "run", checkpoint_every=2, resume="exact")
    ended = trained(4, again)[0]
    told = capsys.readouterr().out
    assert "resumed after step 5; 3 steps left" in told
    assert "not as in the run" not in told
    for name in ("parameters_crc32", "loss", "val_loss", "steps"):
        assert ended[name] == whole[name], name
    assert [row["loss"] for row in rows_of(tmp_path / "run")] == [row["loss"] for row in rows_of(tmp_path / "whole")]
    assert trained(4, again) == [ended] * 4  # finished: nothing is done


def test_other_ranks_and_codes_go_on_where_they_are_asked_to(tmp_path, capsys):
    config = TrainConfig(**MLP, out=tmp_path, checkpoint_every=4, stop_after=4)
    trained(4, config)
    errors = virtual.run(2, lambda comm: train(comm, replace(config, resume="exact")))
    assert all(isinstance(error, MpiEfError) and error.everywhere for error in errors)
    assert str(errors[0]) == ("resume: step 4 was saved by 4 ranks, here there are 2; pass --resume redistribute")
    capsys.readouterr()
    ended = trained(3, replace(config, resume="redistribute", stop_after=0, code="fr:2"))[0]
    told = capsys.readouterr().out
    assert "not as in the run that saved: code was fr:1, is fr:2" in told
    assert ended["steps"] == 8
    assert ended["val_loss"] < 2.3


def test_another_model_or_a_run_without_code_is_refused(tmp_path):
    config = TrainConfig(**MLP, out=tmp_path, checkpoint_every=4, stop_after=4)
    trained(2, config)
    for other in (replace(config, seed=5), replace(config, split="by-label"), TrainConfig(
            model="mlp", steps=8, out=tmp_path, checkpoint_every=4)):
        errors = virtual.run(2, lambda comm, other=other: train(comm, replace(other, resume="exact")))
        assert all(isinstance(error, MpiEfError) and str(error).startswith("resume: ") for error in errors)
    assert isinstance(virtual.run(2, lambda comm: train(comm, config))[0], DataError)  # there are checkpoints


def test_too_many_silent_ranks_end_a_run_with_a_checkpoint_of_its_last_step(tmp_path, capsys):
    """Also where none was asked for; a run that goes on has the bits of one that was not disturbed."""
    took = CodedTrainer.step

    def step(self, number):
        if self.comm.Get_rank() in (1, 3) and number >= 3:
            self.comm.pause(1e9)
        took(self, number)

    config = TrainConfig(**MLP, compressor="identity", patience_seconds=0.2)
    whole = trained(4, replace(config, out=tmp_path / "whole"))[0]
    capsys.readouterr()
    with mock.patch.object(CodedTrainer, "step", step):
        error = virtual.run(4, lambda comm: train(comm, replace(config, out=tmp_path / "run")))[0]
    assert isinstance(error, SilenceError)
    assert error.ranks == (1, 3)
    ((last, _),) = committed_steps(tmp_path / "run/checkpoints")
    assert last >= 3
    assert f"saved after step {last}; go on with --resume redistribute" in capsys.readouterr().out
    ended = trained(4, replace(config, out=tmp_path / "run", resume="exact"))[0]
    assert ended["parameters_crc32"] == whole["parameters_crc32"]


@pytest.mark.parametrize(("options", "line"), [
    ({"code": "mds:1"}, "code=mds:1: code 'mds:1' is not known"),
    ({"rule": "ef21"}, "rule=ef21 has no effect with code=fr:1, where a server has the parameters; it goes with code=none"),
    ({"overlap": True}, "overlap=True has no effect with code=fr:1"),
    ({"decay": 0.5}, "decay=0.5 has no effect with code=fr:1"),
    ({"compressor": "vote"}, "compressor=vote sends signs"),
    ({"gpu_aware_mpi": True}, "gpu_aware_mpi=True is for ranks that do all together"),
    ({"checkpoint_every": 2, "on_failure": "shrink"}, "on_failure=shrink is for ranks that do all together"),
    ({"optimizer": "lion"}, "code=fr:1 has no effect with optimizer=lion; it goes with optimizer=adamw, sgd"),
    ({"patience_seconds": 0.0}, "patience_seconds"),
    ({"seed": 1 << 63}, "seed=9223372036854775808 is too large for torch's generators; take one below 2**63"),
])
def test_what_does_not_go_with_a_code_is_told_before_mpi_starts(options, line):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**MLP | options)
    assert str(caught.value).startswith(line), caught.value


@pytest.mark.parametrize(("n", "code", "line"), [
    (3, "fr:1", "fr:1: s=1 with 3 workers; 2 does not divide 3; take fr:0, fr:2, or cyclic:2"),
    (4, "FractionalRepetition(2)", "fr:2: s=2 with 4 workers; 3 does not divide 4; take fr:1, fr:3, or cyclic:3"),
    (6, "cyclic:2", "cyclic:2: there is no such code where n - s is even, n=6 workers and s=2; take cyclic:1 or cyclic:3, "
     "or fr:2"),
    (4, "cyclic:4", "cyclic:4: s=4 of 4 workers cannot all be missing; take cyclic:3 or less"),
    (4, "blocks:2", "blocks:2: there is no such code for 4 workers; take blocks:3"),
])
def test_a_code_that_the_ranks_do_not_fit_is_told_on_all_of_them(n, code, line, tmp_path):
    """With advice that --code takes."""
    errors = virtual.run(n, lambda comm: train(comm, TrainConfig(**MLP | {"code": code}, out=tmp_path / "run")))
    assert [str(error) for error in errors] == [line] * n
    assert all(isinstance(error, MpiEfError) for error in errors)
    assert not (tmp_path / "run").exists()
    for advised in re.findall(r"\b(?:fr|cyclic|blocks):\d+", line.partition("; take ")[2]):
        code_of(advised).check(n)


def test_a_code_that_rounds_too_much_is_told_with_one_that_does_not(tmp_path):
    config = TrainConfig(**MLP | {"code": "cyclic:3"}, out=tmp_path / "run")
    with mock.patch.object(gradients, "LARGEST_AMPLIFICATION", 1.5):
        errors = virtual.run(8, lambda comm: train(comm, config))
    assert re.fullmatch(r"CodedGradients: cyclic:3 lets rounding grow \d+ times with n=8 workers, too much for float32; "
                        "take fr:3, a smaller s, or float64", str(errors[0]))
    assert len({*map(str, errors)}) == 1


def test_a_model_with_statistics_of_its_own_trains(tmp_path):
    """BatchNorm's are the server's; text models too."""
    torch.manual_seed(0)
    gpt = TrainConfig(model="gpt", context=8, layers=1, heads=2, width=8, batch=4, steps=3, warmup=1, code="fr:1",
                      out=tmp_path)
    assert trained(2, gpt)[0]["val_loss"] > 0
