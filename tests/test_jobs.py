"""Parts of the programs that need no MPI: options, data, shards, metrics, the command line."""

import io
import json
import os
import subprocess
import sys
import threading
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import virtual
from hypothesis import given
from hypothesis import strategies as st
from programs import trained

import mpi_ef
from mpi_ef.collectives import GatherMean, TwoPhaseMean
from mpi_ef.collectives.chosen import BY_WORD, plan_for
from mpi_ef.errors import ConfigError, DataError, DisagreementError, LaunchError, PeerError
from mpi_ef.jobs import cli
from mpi_ef.jobs.bench import program as bench
from mpi_ef.jobs.bench.methods import methods
from mpi_ef.jobs.bench.table import Link, Row, break_even, combine, table
from mpi_ef.jobs.bench.traffic import Counting
from mpi_ef.jobs.folder import replacing
from mpi_ef.jobs.link_fit import of_ends
from mpi_ef.jobs.metrics import Metrics, Progress, announcing, in_bytes
from mpi_ef.jobs.options import option, parse, to_toml
from mpi_ef.jobs.train import loop as trainer
from mpi_ef.jobs.train.config import PHASES, TrainConfig, learning_rate
from mpi_ef.jobs.train.datasets import Digits, Text, batches, shard
from mpi_ef.jobs.train.optimizers import build_compressor
from mpi_ef.jobs.train.program import train
from mpi_ef.jobs.train.showing import line
from mpi_ef.kernels import _jit, machine_code
from mpi_ef.runtime import ending
from mpi_ef.runtime.launch import check_world


@dataclass(frozen=True)
class Options:
    steps: int = option(10, "steps")
    lr: float = option(0.1, "rate")
    kind: str = option("a", "kind", choices=("a", "b"))
    text: Path | None = option(None, "file")
    weight_decay: float | None = option(None, "decay")
    fast: bool = option(False, "speed")


def options(*argv: str) -> Options:
    return parse(Options, argv, prog="test", description="")


def test_defaults_file_and_flags_in_that_order(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('steps = 20\nlr = 1\nkind = "b"\ntext = "t.txt"\nweight-decay = 0.5\nfast = true\n')
    assert options() == Options()
    read = options("--config", str(file))
    assert read == Options(20, 1.0, "b", Path("t.txt"), 0.5, True)
    assert isinstance(read.lr, float)
    assert options("--steps", "30", "--config", str(file), "--no-fast") == replace(read, steps=30, fast=False)


def test_toml_round_trip(tmp_path):
    file = tmp_path / "run.toml"
    for config in (Options(), Options(3, 1e-7, "b", Path('we"ird\\name'), 0.25, True)):
        file.write_text(to_toml(config))
        assert options("--config", str(file)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stesp = 3", "stesp is no option; did you mean steps?"),
        ("zebra = 3", "zebra is no option; see --help"),
        ('steps = "3"', "steps = '3' is str; it takes int"),
        ("steps = 3.5", "steps = 3.5 is float; it takes int"),
        ("steps = true", "steps = True is bool; it takes int"),
        ('kind = "c"', "kind = 'c' is not known; take one of a, b"),
        ("steps = ", "cannot be read as TOML"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, words, capsys):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        options("--config", str(file))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert str(file) in line


def test_a_missing_file_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options("--config", str(tmp_path / "absent.toml"))
    assert "absent.toml: cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stesp", "3"], "did you mean --steps?"),
        (["--steps", "x"], "invalid int value"),
        (["--kind", "c"], "invalid choice"),
    ],
)
def test_wrong_flags_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        options(*argv)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("environment", "waits"), [
    ({}, False), ({"OMPI_COMM_WORLD_RANK": "0", "SLURM_PROCID": "3"}, False), ({"OMPI_COMM_WORLD_RANK": "2"}, True),
    ({"PMI_RANK": "1"}, True), ({"SLURM_PROCID": "7"}, True), ({"SLURM_PROCID": "x"}, False),
])
def test_later_ranks_leave_it_to_the_first_to_say_what_is_wrong(environment, waits, monkeypatch, capsys):
    """A launcher ends them meanwhile; where theirs alone is wrong, they say so."""
    slept = []
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr("mpi_ef.jobs.options.sleep", lambda seconds: slept.append((seconds, capsys.readouterr().err)))
    with pytest.raises(SystemExit):
        options("--stesp", "3")
    assert slept == [(1.0, "")] * waits
    assert "did you mean --steps?" in capsys.readouterr().err


@given(st.integers(1, 300), st.integers(1, 9))
def test_every_sample_is_on_exactly_one_rank(size, ranks):
    if size < ranks:
        with pytest.raises(DataError, match=f"{size} samples for {ranks} ranks"):
            shard(size, ranks, 0)
        return
    parts = [shard(size, ranks, r, order=np.random.default_rng(0).permutation(size)) for r in range(ranks)]
    assert sorted(np.concatenate(parts)) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 50), st.integers(1, 60))
def test_every_epoch_takes_every_sample_once(size, batch):
    samples = np.arange(100, 100 + size)
    stream = batches(samples, batch, seed=1, rank=0)
    epochs = {0: [], 1: [], 2: []}
    for epoch, indices in stream:
        if epoch == 3:
            break
        assert 1 <= indices.size <= batch
        epochs[epoch] += indices.tolist()
    assert all(sorted(seen) == samples.tolist() for seen in epochs.values())
    assert size < 10 or epochs[0] != epochs[1]


def test_text_targets_are_the_next_characters(tmp_path):
    file = tmp_path / "text.txt"
    text = "".join(chr(97 + i * i % 26) for i in range(1000))
    file.write_text(text)
    data = Text(file, context=7, seed=0)
    letters = sorted(set(text))
    for epoch in range(5):
        inputs, targets = data.batch(np.arange(data.size), epoch)
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        seen = "".join(letters[i] for i in inputs.flatten())
        assert seen in text[:900]
        assert letters[targets[-1, -1]] == text[text.index(seen) + len(seen)]
    inputs, targets = data.held_out(np.arange(data.held_out_size))
    assert "".join(letters[i] for i in inputs.flatten()) in text[900:]


def test_the_default_text_comes_with_python():
    data = Text(None, context=64, seed=0)
    assert data.size > 5000
    assert 50 < data.vocabulary < 300


@pytest.mark.parametrize(("text", "words"), [("", "the file is empty"), ("short", "5 characters are too few")])
def test_unusable_texts(tmp_path, text, words):
    file = tmp_path / "text.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        Text(file, context=64, seed=0)


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Text(tmp_path / "absent", context=8, seed=0)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa" * 100)
    with pytest.raises(DataError, match="cannot be read"):
        Text(tmp_path / "binary", context=8, seed=0)


def test_digits():
    data = Digits()
    assert (data.size, data.held_out_size) == (1437, 360)
    x, y = data.batch(np.arange(5), 0)
    assert tuple(x.shape) == (5, 1, 8, 8)
    assert float(x.max()) <= 1
    assert y.tolist() == data.labels[:5].tolist()


def test_metrics_files_agree(tmp_path):
    metrics = Metrics(tmp_path, ["step", "loss"])
    metrics.write({"step": 1, "loss": 0.5})
    metrics.write({"step": 2})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "1,0.5", "2,"]


def test_metrics_go_on_and_a_kill_meanwhile_loses_nothing(tmp_path):
    metrics = Metrics(tmp_path, ["step", "loss"])
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": 0.5})
    metrics.close()
    before = (tmp_path / "metrics.jsonl").read_text()
    kill = "import os, pathlib; from mpi_ef.jobs.metrics import Metrics; Metrics.write = lambda *_: os._exit(9)"
    done = subprocess.run([sys.executable, "-c", f"{kill}; Metrics(pathlib.Path({str(tmp_path)!r}), [], after=2)"],
                          check=False, timeout=60)
    assert done.returncode == 9
    assert (tmp_path / "metrics.jsonl").read_text() == before
    metrics = Metrics(tmp_path, ["step", "loss"], after=2)
    metrics.write({"step": 3, "loss": 0.25})
    metrics.close()
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        0.5,
        0.5,
        0.25,
    ]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "1,0.5", "2,0.5", "3,0.25"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_the_time_that_is_left_is_that_of_timed_steps():
    stream = io.StringIO()
    Progress(100, stream=stream).show(10, "loss 1", step_seconds=2.0)
    assert stream.getvalue().endswith(" < 3:00\n")


def test_a_log_gets_lines_and_a_terminal_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, lines in ((io.StringIO(), 3), (Terminal(), 1)):
        progress = Progress(3, stream=stream)
        for step in (1, 2, 3):
            progress.show(step, f"loss {step}")
        progress.close()
        text = stream.getvalue()
        assert text.count("\n") == lines
        assert ("\r" in text) == (lines == 1)
        assert "3/3" in text


@pytest.mark.parametrize("columns", [5, 14, 20, 60, 80, 90, 103, 120, 200])
def test_a_live_line_cuts_off_all_but_the_time_that_is_left(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    stream.isatty = lambda: True
    Progress(1000, stream=stream).show(500, f"loss 2.345  val 2.345 (14.7 %)  {'sent 123.4 kB':42}", step_seconds=1.0)
    line = stream.getvalue().removeprefix("\r\x1b[K")
    assert len(line) <= columns - 1
    assert line.endswith(" < 8:20"[: columns - 1]) or columns < 14
    assert columns not in (80, 120) or ("#" in line) == (columns == 120)
    assert columns < 20 or "step" in line


def test_what_cannot_be_printed_ends_no_run_and_is_said(monkeypatch, capsys):
    """On a full disk; what prints what it finds has failed then, what writes files has not."""
    ended = []
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(
        main=lambda words: [print("x" * 9000, flush=True) for _ in range(3)] and ended.append(name)))
    for program, status in (("train", 0), ("reproduce", 0), ("checkpoint", 1), ("report", 1)):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:  # noqa: PTH123
            patch.setattr(sys, "stdout", full)
            assert status_of(program) == status
        assert capsys.readouterr().err == "mpi-ef: what was printed is lost: No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)  # as after >&-
    assert status_of("report") == 0
    assert len(ended) == 5


def status_of(*words):
    try:
        cli.main(words)
    except SystemExit as ended:
        return ended.code
    return 0


def test_names_that_are_not_utf_8(tmp_path, capfdbinary):
    """Folders are bytes: they are printed as they are, and what cannot be recorded is one line."""
    folder = tmp_path / os.fsdecode(b"Vers\xfcche")
    folder.mkdir()
    with io.TextIOWrapper(io.BytesIO(), "utf-8") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert status_of("checkpoint", "ls", str(folder)) in (0, 1, 2)
        printed = stream.buffer.getvalue() + capfdbinary.readouterr().err
    assert b"Traceback" not in printed
    with pytest.raises(ConfigError, match=r'out = ".*Vers\\udcfcche" is not UTF-8 and cannot be recorded'):
        to_toml(TrainConfig(out=folder))


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (25_000, "25.0 kB"), (3.2e9, "3.2 GB"), (2e15, "2000.0 TB")]
)
def test_in_bytes(n, text):
    assert in_bytes(n) == text


def test_learning_rate_schedule():
    config = TrainConfig(lr=1.0, warmup=10, steps=110)
    rates = [learning_rate(config, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(TrainConfig(lr=1.0, warmup=0, steps=110), 0) == 1.0  # of a run without a step


def test_every_compressor_can_be_built():
    for name in ("topk", "randk", "sign", "quantize", "identity"):
        assert build_compressor(TrainConfig(compressor=name)).wire_nbytes(1000) > 0


@pytest.mark.parametrize(("sent", "dense", "shown"), [
    (1500, 0, "sent 1.5 kB"), (1500, 150_000, "sent 1.5 kB (100x less than dense)"), (0, 150_000, "sent 0 B"),
    (1500, 1000, "sent 1.5 kB (1.5x more than dense)"), (1500, 2000, "sent 1.5 kB (75 % of dense)"),
    (1500, 1500, "sent 1.5 kB (100 % of dense)"), (1500, 3000, "sent 1.5 kB (2x less than dense)")])
def test_bytes_are_compared_where_some_are_sent(sent, dense, shown):
    row = {"loss": 1.0, "val_loss": None, "val_accuracy": None, "sent_nbytes": sent, "dense_nbytes": dense}
    assert line(row) == f"loss 1.000  {shown}"


@pytest.mark.parametrize("model", ["gpt", "mlp", "cnn"])
def test_training_on_virtual_ranks(tmp_path, model):
    """The whole program, small: same summary on all ranks, loss falls, files are complete."""
    small = {"context": 16, "layers": 1, "heads": 2, "width": 16} if model == "gpt" else {}
    config = TrainConfig(model=model, steps=12, warmup=2, batch=8, eval_every=6, log_every=3, lr=0.02,
                         out=tmp_path / "run", **small)
    one, two = trained(2, config)
    times = {"seconds", "seconds_per_step", "phases_seconds_per_step", "untimed_seconds"}
    assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in two.items() if k not in times}
    assert one["replicas_equal"]
    assert one["sent_nbytes"] * 9 < one["dense_nbytes"]
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert [row["val_loss"] is None for row in rows] == [True, False, True, False]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert json.loads((config.out / "summary.json").read_text())["val_loss"] == rows[-1]["val_loss"]
    again = parse(TrainConfig, ["--config", str(config.out / "config.toml")], prog="", description="")
    assert again == replace(config.resolved(), data=one["config"]["data"])


@pytest.mark.parametrize(("plan", "label"), [("NodeMean(node=1, inner='TwoPhaseMean')", "NodeMean of TwoPhaseMean"),
                                             ("auto", "GatherMean")])
def test_the_plan_that_is_taken_is_named(tmp_path, capsys, monkeypatch, plan, label):
    monkeypatch.setitem(BY_WORD, "auto", plan_for)  # which says it of a run that measures, too
    trained(2, TrainConfig(model="mlp", steps=2, batch=8, plan=plan, out=tmp_path / "run"))
    assert f"); {label}" in capsys.readouterr().out


def test_a_run_goes_on_with_the_plan_that_was_taken(tmp_path, monkeypatch):
    """Though another one is the fastest by now; one that may redistribute takes that, and by its name it is the same run."""
    options = {"model": "mlp", "batch": 8, "checkpoint_every": 2, "keep": 1}

    def run(folder, fastest, plan="auto", *, steps, **more):
        monkeypatch.setitem(BY_WORD, "auto", fastest)
        trained(2, TrainConfig(**options, plan=plan, steps=4, out=tmp_path / folder, stop_after=steps, **more))
        return tomllib.loads((tmp_path / folder / "config.toml").read_text())["plan"]

    for folder, go_on, plan in [("one", {"resume": "exact"}, "GatherMean"),
                                ("two", {"resume": "redistribute"}, "TwoPhaseMean"),
                                ("named", {"plan": "GatherMean", "resume": "exact"}, "GatherMean")]:
        assert run(folder, GatherMean, steps=2) == "GatherMean"
        assert run(folder, TwoPhaseMean, steps=0, **go_on) == plan


class _PerRank(threading.local):
    """Stands for what Numba does in the process of a virtual rank, which is a thread."""

    made = 0


@pytest.mark.parametrize(("log_every", "unsettled"), [(4, 1000), (12, 5)])
def test_a_step_in_which_one_rank_makes_kernels_is_timed_on_none(tmp_path, monkeypatch, log_every, unsettled):
    """By a clock that gives 1 s to every phase of a step, and 100 s more where rank 1 compiles or rank 0 waits for it."""
    kernels, step = _PerRank(), trainer.Trainer._step

    def counted_step(self, *, watched):
        step(self, watched=watched)
        self.clock = getattr(self, "clock", 0.0) + (101.0 if self.steps in (5, 11) else 1.0)
        kernels.made += self.comm.Get_rank() == 1 and self.steps in (5, 11)

    def measured(self):
        return np.full(1 + len(PHASES), getattr(self, "clock", 0.0))

    monkeypatch.setattr(trainer, "machine_code", kernels)
    monkeypatch.setattr(trainer, "_UNSETTLED", unsettled)
    monkeypatch.setattr(trainer.Trainer, "_step", counted_step)
    monkeypatch.setattr(trainer.Trainer, "_measured", measured)
    config = TrainConfig(model="mlp", steps=12, log_every=log_every, eval_every=12, out=tmp_path / "whole")
    stops = replace(config, checkpoint_every=6, stop_after=6, out=tmp_path / "parts")
    assert [one["stopped"] for one in trained(2, stops)] == ["after 6 steps of this launch"] * 2
    for one in (*trained(2, config), *trained(2, replace(stops, stop_after=0, resume="exact"))):
        assert (one["untimed_steps"], one["untimed_seconds"]) == (2, 202.0)
        assert one["seconds"] == 10.0
        assert one["seconds_per_step"] == 1.0
        assert set(one["phases_seconds_per_step"].values()) == {1.0}


def test_rank_zero_says_that_it_compiles(capsys):
    """Once, before the first kernel; nothing for calls of ready ones. Where no cache is possible, too."""
    functions: dict[str, object] = {}
    exec("def first(x): return x + 1\ndef second(x): return x + 2", functions)  # no file, so no cache
    first, second = (_jit.jit(functions[name]) for name in ("first", "second"))

    def rank(number):
        return type("Comm", (), {"Get_rank": lambda _: number})()

    with announcing(rank(1)):
        assert machine_code.announce is None
    with announcing(rank(0)):
        made = [machine_code.made]
        for kernel in (first, second, first):
            kernel(1)
            made.append(machine_code.made)
        assert made[0] < made[1] < made[2] == made[3]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("compiling kernels, in every process")
    with announcing(rank(0)):
        pass
    assert machine_code.announce is None
    first(1.0)
    assert not capsys.readouterr().out


def test_fewer_samples_than_ranks(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij" * 7)
    config = TrainConfig(text=tmp_path / "text.txt", context=6, out=tmp_path)
    errors = virtual.run(10, lambda comm: train(comm, config))
    assert {type(error) for error in errors} == {DataError}
    assert all(error.everywhere for error in errors)
    assert "9 samples for 10 ranks" in str(errors[0])


def bench_row(name, kind, milliseconds, sent, own=None, messages=0):
    return Row(name, kind, milliseconds / 1e3, 0.001, 1.0, sent, None, None, own and own / 1e3, None, messages)


def on_link(link, kind, own, sent, messages, beyond=0.0):
    """Return a method that takes on a link, in milliseconds, its computation, its messages, and what no model explains."""
    seconds = (own or 0.0) / 1e3 + messages * link.latency_seconds + sent / link.bytes_per_second
    return bench_row(kind, kind, 1e3 * seconds + beyond, sent, own, messages)


LINKS = [Link(latency, bandwidth) for latency in (0.0, 2e-6, 5e-3) for bandwidth in (1e8, 1e9, 1e11)]


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_break_even_bandwidth(link):
    """On links of which the truth is known: below it the method takes less time than the dense one, above it more."""
    for own, sent, messages in ((30, 1_000_000, 3), (5, 1_000_000, 300), (0.1, 50_000_000, 1), (2, 99_000_000, 2)):
        for dense_own in (None, 10):
            dense = on_link(link, "dense", dense_own, 100_000_000, 6)
            row = on_link(link, "compressed", own, sent, messages)
            limit = break_even(row, dense, link)
            for b in (1e5, 1e7, 1e9, 1e11, 1e13, *(() if limit is None else (0.99 * limit, 1.01 * limit))):
                there = [on_link(Link(link.latency_seconds, b), *method).median_seconds for method in (
                    ("compressed", own, sent, messages), ("dense", dense_own, 100_000_000, 6))]
                assert (there[0] < there[1]) is (limit is None or b < limit)
    assert break_even(on_link(link, "big", 30, 200_000_000, 3), dense, link) == 0.0  # never


def test_latency_is_charged_to_whom_it_belongs():
    """A hundred messages of a millisecond are not worth 80 MB that take 80 ms, and pay where these take longer."""
    link = Link(1e-3, 1e9)
    dense = on_link(link, "dense", None, 100_000_000, 2)
    row = on_link(link, "compressed", 1, 20_000_000, 102)
    assert row.median_seconds > dense.median_seconds
    assert break_even(row, dense, link) == pytest.approx(80_000_000 / 0.101)
    few = on_link(link, "compressed", 1, 20_000_000, 1)  # a message less is worth its computation
    assert break_even(few, dense, link) is None


def test_a_link_is_measured_at_its_ends():
    """100 Mbit/s that let the first 128 KiB pass, and a busy machine in the middle: a line through all is above both."""
    sizes = [1 << power for power in range(10, 25, 2)]
    seconds = [1e-4 + max(0, size - (1 << 17)) / 12.5e6 for size in sizes]
    seconds[3] += 0.02
    latency, speed = of_ends(sizes, seconds)
    assert latency == pytest.approx(1e-4, rel=0.9)
    assert speed == pytest.approx(12.5e6)
    assert of_ends([1, 2], [1.0, 1.0])[1] == pytest.approx(1e15)


def test_a_method_with_more_computation_does_not_pay_on_any_link():
    """Of four ranks: a dense mean needs the latency of two messages, one in pairs not that of each of its thousands."""
    link = Link(1e-4, 12.5e6)
    counting = Counting(mock.Mock(**{"Get_size.return_value": 4}))
    for _ in range(3000):
        counting.Isend(1, 2)
    assert counting.messages == 375
    reduced = Counting(mock.Mock(**{"Get_size.return_value": 4}))
    reduced.Allreduce(1, 2)
    assert reduced.messages == 2
    dense = on_link(link, "dense", None, 6_000_000, reduced.messages)
    limit = break_even(on_link(link, "compressed", 2, 92_400, 3), dense, link)
    assert limit == pytest.approx(5_907_600 / 2.1e-3)


@pytest.mark.parametrize("own", [0.1, 5, 40, 57])
def test_what_no_link_explains_is_computation_of_neither(own):
    """Beside "0.58x": of the dense mean 48 of 58 ms are beyond the fit, and of the method all but its own 5, 40, 57."""
    link = Link(1e-6, 10e9)
    dense = on_link(link, "dense", None, 100_000_000, 2, beyond=48)
    row = on_link(link, "compressed", own, 1_000_000, 1, beyond=99.9 - own)
    assert dense.median_seconds / row.median_seconds == pytest.approx(0.58, abs=0.01)
    limit = break_even(row, dense, link)
    assert limit == pytest.approx(min(10e9, 99_000_000 / (1e-3 * own)), rel=1e-2)
    faster = on_link(link, "compressed", own, 1_000_000, 1)  # than the dense mean is on this link
    assert break_even(faster, dense, link) >= 10e9
    even = on_link(link, "compressed", own, 1_000_000, 1, beyond=58)
    assert break_even(even, on_link(link, "dense", 60, 100_000_000, 2, beyond=-12), link) == 10e9  # not on "any link"


def test_messages_are_counted():
    """One after the other, of one rank: of plans on three ranks, and of what MPI does itself."""

    def program(comm):
        counting, x = Counting(comm), np.ones(100, np.float32)
        found = {}
        for method in methods(counting, 100, 0.1):
            if method.kind == "compressed" or method.name == "DenseMean" or "Allgather" in method.name:
                before = counting.messages
                method.call(x)
                found[method.name.partition("(")[0]] = counting.messages - before
        return found

    assert virtual.results(3, program, ranks_per_node=3)[1] == {
        "DenseMean": 8, "ef21 TopK": 2, "ef14 TopK": 2, "econtrol TopK": 2, "ef14 RandK": 2, "ef14 Sign": 4,
        "ef14 Quantize": 4, "ef21 by torch.topk + Allgather": 4, "signs by np.packbits + Allgather": 4,
    }
    mpi = Counting(mock.Mock(**{"Get_size.return_value": 3}))
    mpi.Allreduce(1, 2)
    mpi.Iallreduce(1, 2).Wait()
    assert mpi.messages == 4
    assert Row(**{name: value for name, value in asdict(bench_row("x", "dense", 1, 8)).items() if name != "messages"})


def test_launches_are_combined_by_their_medians():
    def launch(milliseconds):
        rows = [asdict(bench_row("MPI_Allreduce", "dense", milliseconds, 8)),
                asdict(bench_row("x", "compressed", 2 * milliseconds, 1, milliseconds))]
        return {"ranks": 2, "d": 100, "ratio": 0.1, "repeats": 1, "launches": 1, "mpi": "M", "rows": rows,
                "link": {"latency_seconds": 1e-6 * milliseconds, "bytes_per_second": 1e9}}

    result = combine([launch(1), launch(50), launch(2)])
    assert [row["median_seconds"] for row in result["rows"]] == [0.002, 0.004]
    assert result["rows"][1]["local_seconds"] == 0.002
    assert result["link"]["latency_seconds"] == 2e-6
    assert result["launches"] == 3
    assert "0.50x" in table(result)
    with pytest.raises(DataError, match="launches differ in d: 100 and 7"):
        combine([launch(1), launch(1) | {"d": 7}])
    with pytest.raises(DataError, match="one launch is there twice"):
        combine([launch(1), launch(50), launch(1)])


@pytest.mark.parametrize("option", ["d=1000", "ratio=0.1", "repeats=3", "only=ef21"])
def test_what_is_measured_is_no_option_of_combining(option, capsys):
    name, value = option.split("=")
    with pytest.raises(SystemExit):
        bench.main(["--combine", "a.json,b.json", f"--{name}", value])
    assert f"{option} has no effect with combine" in capsys.readouterr().err


def test_words_that_no_method_has_are_refused():
    bench._check_words(["ef21", "Sign("], ["ef21 TopK(0.01)", "ef14 Sign()"])
    with pytest.raises(ConfigError, match="only=ef22: no method has that in its name; take of ef21 TopK") as caught:
        bench._check_words(["ef21", "ef22"], ["ef21 TopK(0.01)", "ef14 Sign()"])
    assert caught.value.everywhere


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    """Of two programs that write it at a time the last one has written all of it."""
    path = tmp_path / "new" / "figures.json"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
            assert not path.exists()
        assert path.read_text() == "second"
    assert path.read_text() == "first"

    def half():
        with replacing(path) as draft:
            draft.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="figures.json: cannot be written"):
        half()
    assert [(one.name, one.read_text()) for one in path.parent.iterdir()] == [("figures.json", "first")]


def test_command_line(capsys):
    cli.main([])
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did you mean train?"):
        cli.main(["trian"])


@pytest.mark.parametrize("program", cli.PROGRAMS)
def test_help_never_starts_mpi_and_imports_nothing_large(program):
    large = {"mpi4py.MPI", "torch", "numba", "scipy", "h5py", "matplotlib", "sklearn"}
    if program != "least-squares":  # an example, which names NumPy where readers look for it
        large.add("numpy")
    code = f"""
import sys
from mpi_ef.jobs import cli
from mpi_ef.runtime import launch
try:
    cli.main([{program!r}, "--help"])
except SystemExit as end:
    print(end.code, *{large} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "usage: mpi-ef" in done.stdout
    assert done.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": -1}, "batch=-1 is not a positive integer; the default is 16"),
        ({"steps": 0}, "steps=0 is not a positive integer; the default is 800"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"context": 0}, "context=0"),
        ({"seed": -1}, "seed=-1 is negative; the default is 0"),
        ({"lr": -1.0}, "lr=-1.0 is negative; the default is 0.006"),
        ({"lr": float("nan")}, "lr=nan is not in [0, inf); the default is 0.006"),
        ({"lr": float("inf")}, "lr=inf is not in [0, inf); the default is 0.006"),
        ({"beta1": 1.5}, "beta1=1.5 is not in [0, 1)"),
        ({"heads": 3}, "width=128 is not divisible by heads=3"),
        ({"ratio": 1.5}, "ratio=1.5 is not in (0, 1]; the default is 0.01 with compressor=topk, randk"),
        ({"compressor": "quantize", "values": "full"}, "quantizes nothing; take compressor=identity"),
        ({"placement": "gradient", "overlap": True}, "pass clip=0 with it"),
        ({"rule": "ef21-pp", "placement": "gradient", "overlap": True, "clip": 0.0}, "which rule=ef21-pp cannot"),
        ({"rule": "marina", "compressor": "randk"}, "pass placement=gradient and clip=0 with it"),
        ({"rule": "marina", "placement": "gradient", "clip": 0.0}, "pass compressor=randk, not topk"),
        ({"rule": "ef21-w", "smoothness": "1,-2"}, "smoothness=1,-2 is no list of positive numbers"),
        ({"rule": "ef21-bc", "reply": 0.0}, "reply=0.0 is not in (0, 1]"),
        ({"rule": "econtrol", "eta": 2.0}, "eta=2.0 is not in [0, 1]"),
        ({"rule": "ef41"}, "there is no rule 'ef41'; did you mean ef"),
        ({"overwrite": True, "resume": "exact"}, "overwrite begins anew, resume=exact goes on; pass one of them"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**options)
    assert words in str(caught.value)


def test_data_that_only_one_rank_cannot_read_stop_all_ranks(tmp_path):
    """For example a text on the disk of one node."""
    (tmp_path / "text.txt").write_text("some text " * 500)

    def program(comm):
        name = "absent.txt" if comm.Get_rank() == 1 else "text.txt"
        return train(comm, TrainConfig(text=tmp_path / name, out=tmp_path / "run"))

    errors = virtual.run(3, program)
    assert [type(error) for error in errors] == [PeerError, DataError, PeerError]
    assert "train: rank 1 raised" in str(errors[0])


def test_data_that_differ_between_ranks_stop_all_ranks(tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}.txt").write_text(f"some text {rank} " * 500)
    errors = virtual.run(
        2, lambda comm: train(comm, TrainConfig(text=tmp_path / f"{comm.Get_rank()}.txt", out=tmp_path))
    )
    assert [type(error) for error in errors] == [DisagreementError] * 2
    assert "disagree on their content" in str(errors[0])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4, but the MPI world has 1 rank"),
        ({"PMI_SIZE": "2"}, "the mpiexec that belongs to the MPI library"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun --mpi=pmix, --mpi=pmi2 or --mpi=cray_shasta"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun starts no MPI"),
    ],
)
def test_n_copies_of_rank_zero_are_noticed(environment, words):
    with pytest.raises(LaunchError) as caught:
        check_world(1, environment)
    assert words in str(caught.value)
    check_world(2, environment)
    check_world(1, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "8", "WORLD_SIZE": "8"})
    check_world(1, environment | {"MPI_EF_ALONE": "1"})
    for off in ("0", ""):
        with pytest.raises(LaunchError):
            check_world(1, environment | {"MPI_EF_ALONE": off})


def test_nothing_runs_after_an_abort_that_returns(monkeypatch):
    told, waited = [], []
    comm = type("Comm", (), {"Abort": staticmethod(told.append)})

    def leave(status):
        raise SystemExit(status)  # os._exit never returns

    monkeypatch.setattr(ending.os, "_exit", leave)
    monkeypatch.setattr(ending, "sleep", waited.append)
    monkeypatch.setattr(ending.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        ending.abort(comm, 3)
    assert ended.value.code == 3
    assert told == [3]
    assert waited == [ending.FORWARDING_SECONDS, ending.PATIENCE_SECONDS]


def test_the_command_says_its_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"mpi-ef {mpi_ef.__version__}\n"
