"""Parts of the programs that need no MPI: options, data, shards, metrics, the command line."""

import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_type_hints

import mpi4py
import numpy as np
import patience
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from programs import trained

import mpi_ef
from mpi_ef.errors import CheckpointError, ConfigError, DataError, DisagreementError, LaunchError, PeerError
from mpi_ef.jobs import bench, bench_checkpoint, cli, launch, survivors, trainer
from mpi_ef.jobs import metrics as metrics_module
from mpi_ef.jobs.bench import BenchConfig
from mpi_ef.jobs.bench_checkpoint import CheckpointBenchConfig
from mpi_ef.jobs.bench_report import Link, Row, break_even, combine, table
from mpi_ef.jobs.config import option, parse, to_toml
from mpi_ef.jobs.data import Digits, Text, batches, shard
from mpi_ef.jobs.launch import check_world
from mpi_ef.jobs.metrics import Metrics, Progress, announcing, in_bytes
from mpi_ef.jobs.optimizers import build_compressor, build_optimizer
from mpi_ef.jobs.train import PHASES, TrainConfig, learning_rate, train
from mpi_ef.kernels import _jit, machine_code


@dataclass(frozen=True)
class Options:
    steps: int = option(10, "steps")
    lr: float = option(0.1, "rate")
    kind: Literal["a", "b"] = option("a", "kind")
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
    assert "cannot be read" in capsys.readouterr().err


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
                          check=False, timeout=60)  # fmt: skip
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


def test_every_compressor_can_be_built():
    for name in ("topk", "randk", "sign", "quantize", "identity"):
        assert build_compressor(TrainConfig(compressor=name)).wire_nbytes(1000) > 0


@pytest.mark.parametrize("model", ["gpt", "mlp", "cnn"])
def test_training_on_virtual_ranks(tmp_path, model):
    """The whole program, small: same summary on all ranks, loss falls, files are complete."""
    config = TrainConfig(model=model, steps=12, warmup=2, batch=8, context=16, layers=1, heads=2, width=16, eval_every=6,
                         log_every=3, lr=0.02, out=tmp_path / "run")  # fmt: skip
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
    assert again == config


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


def bench_row(name, kind, milliseconds, sent, own=None):
    return Row(name, kind, milliseconds / 1e3, 0.001, 1.0, sent, None, None, own and own / 1e3, None)


def test_break_even_bandwidth():
    """Below it the method's time c + bytes / b is less than the dense one's, above it more."""
    link = Link(1e-6, 10e9)
    dense = bench_row("MPI_Allreduce", "dense", 20, 100_000_000)  # of these 10 ms are bytes on this link
    slow, fast = bench_row("slow", "compressed", 99, 1_000_000, 30), bench_row("fast", "compressed", 99, 1_000_000, 5)
    limit = break_even(slow, dense, link)
    assert limit == pytest.approx(99_000_000 / 0.020)
    for b, wins in ((0.99 * limit, True), (1.01 * limit, False)):
        assert (0.030 + slow.sent_nbytes / b < 0.010 + dense.sent_nbytes / b) is wins
    assert break_even(fast, dense, link) is None  # at any bandwidth
    assert break_even(bench_row("big", "compressed", 99, 200_000_000, 30), dense, link) == 0.0  # never


def test_launches_are_combined_by_their_medians():
    def launch(milliseconds):
        rows = [asdict(bench_row("MPI_Allreduce", "dense", milliseconds, 8)),
                asdict(bench_row("x", "compressed", 2 * milliseconds, 1, milliseconds))]  # fmt: skip
        return {"ranks": 2, "d": 100, "ratio": 0.1, "repeats": 1, "launches": 1, "mpi": "M", "rows": rows,
                "link": {"latency_seconds": 1e-6 * milliseconds, "bytes_per_second": 1e9}}  # fmt: skip

    result = combine([launch(1), launch(50), launch(2)])
    assert [row["median_seconds"] for row in result["rows"]] == [0.002, 0.004]
    assert result["rows"][1]["local_seconds"] == 0.002
    assert result["link"]["latency_seconds"] == 2e-6
    assert result["launches"] == 3
    assert "0.50x" in table(result)
    with pytest.raises(DataError, match="launches differ in d: 100 and 7"):
        combine([launch(1), launch(1) | {"d": 7}])


def test_command_line(capsys):
    cli.main([])
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did you mean train?"):
        cli.main(["trian"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "slurm list", "slurm show train", "checkpoint ls ."])
def test_a_reader_that_has_seen_enough(tmp_path, words, unbuffered):
    """As of ``mpi-ef slurm list | head -1``: no error, whether lines leave at once or at the end of Python."""
    (tmp_path / ".tmp-step-00000005-aaaaaaaaaaaa").mkdir()
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(Path(mpi_ef.__file__).parents[1])}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "mpi_ef.jobs.cli", *words.split()], stdout=writing, check=False,
                          stderr=subprocess.PIPE, timeout=patience.limit(60), env=environment, cwd=tmp_path)  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("program", cli.PROGRAMS)
def test_help_never_starts_mpi_and_imports_nothing_large(program):
    large = {"mpi4py.MPI", "torch", "numba", "scipy", "h5py", "matplotlib", "sklearn"}
    if program != "least-squares":  # an example, which names NumPy where readers look for it
        large.add("numpy")
    code = f"""
import sys
from mpi_ef.jobs import cli, launch
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
        ({"batch": -1}, "batch=-1 is too small; the least is 1"),
        ({"steps": 0}, "steps=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"context": 0}, "context=0"),
        ({"seed": -1}, "seed=-1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"beta1": 1.5}, "beta1=1.5 is not in [0, 1)"),
        ({"heads": 3}, "width=128 is not divisible by heads=3"),
        ({"ratio": 1.5}, "ratio=1.5 is not in (0, 1]"),
        ({"per_parameter": True, "compressor": "sign"}, "per_parameter goes with compressor=topk"),
        ({"split": "by-label"}, "needs labels"),
        ({"on_failure": "shrink", "checkpoint_every": 0}, "on_failure=shrink goes on from a checkpoint; pass"),
        ({"overlap": True, "clip": 1.0}, "overlap sends gradients before their norm is known; pass clip=0 with it"),
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
    ],
)
def test_n_copies_of_rank_zero_are_noticed(environment, words):
    with pytest.raises(LaunchError) as caught:
        check_world(1, environment)
    assert words in str(caught.value)
    check_world(2, environment)
    check_world(1, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "8"})


def test_nothing_runs_after_an_abort_that_returns(monkeypatch):
    told, waited = [], []
    comm = type("Comm", (), {"Abort": staticmethod(told.append)})

    def leave(status):
        raise SystemExit(status)  # os._exit never returns

    monkeypatch.setattr(launch.os, "_exit", leave)
    monkeypatch.setattr(launch, "sleep", waited.append)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        launch.abort(comm, 3)
    assert ended.value.code == 3
    assert told == [3]
    assert waited == [launch.FORWARDING_SECONDS, launch.PATIENCE_SECONDS]


# Programs with files and machines that are not as they should be ------------------------------------------------------


@pytest.mark.parametrize(("config", "options", "words"), [
    (BenchConfig, {"d": 99}, "d=99 is too short to say anything; take at least 100"),
    (BenchConfig, {"ratio": 0.0}, "ratio=0.0 is not in (0, 1]; 0.01 keeps one entry in a hundred"),
    (BenchConfig, {"repeats": 0}, "repeats=0 is not positive; take for example 9"),
    (CheckpointBenchConfig, {"d": 0}, "d=0 is not positive; leave it out for a default"),
    (CheckpointBenchConfig, {"repeats": -1}, "repeats=-1 is not positive"),
    (CheckpointBenchConfig, {"folder": Path(__file__).parent}, "exists, and would be deleted; name one that does not"),
])  # fmt: skip
def test_benchmarks_that_say_nothing_are_refused(config, options, words):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "[1, 2]", '{"rows": []}'])
def test_what_is_no_result_of_a_benchmark_is_not_combined(tmp_path, text):
    path = tmp_path / "1.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"^mpi-ef: .*1\.json: is no result of mpi-ef bench.*; write one with --json$"):
        bench.main(["--combine", f"{path}"])


def test_what_pays_on_any_link_and_on_none():
    dense = bench_row("MPI_Allreduce", "dense", 20, 100_000_000)
    unknown, fast = bench_row("unknown", "compressed", 30, 1), bench_row("fast", "compressed", 99, 1_000_000, 5)
    assert break_even(unknown, dense, Link(1e-6, 1e9)) == 0.0
    launch = {"ranks": 2, "d": 100, "ratio": 0.1, "repeats": 1, "launches": 1, "mpi": "M",
              "link": {"latency_seconds": 1e-6, "bytes_per_second": 1e10}}  # fmt: skip
    shown = table(launch | {"rows": [asdict(row) for row in (dense, unknown, fast)]})
    verdicts = {line.split()[0]: line for line in shown.splitlines() if line.split()[:1] in (["unknown"], ["fast"])}
    assert verdicts["unknown"].endswith("never")
    assert verdicts["fast"].endswith("any link")
    with pytest.raises(DataError, match="launches measured different methods; combine those with the same --only"):
        combine([launch | {"rows": [asdict(dense)]}, launch | {"rows": [asdict(fast)]}])


def test_checkpoints_are_measured_beside_plain_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "run", lambda program: virtual.results(3, program))
    words = {"--d": 3000, "--repeats": 2, "--folder": tmp_path / "bench", "--json": tmp_path / "new" / "bench.json"}
    bench.main(["checkpoint", *(str(word) for pair in words.items() for word in pair)])
    told = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert list(told["seconds"]) == list(bench_checkpoint.NAMES)
    assert all(len(times) == 2 and min(times) > 0 for times in told["seconds"].values())
    assert (told["ranks"], told["written_nbytes"], told["read_nbytes"]) == (3, 12_000 + 12_000, 48_000)
    assert list(told["ratios"]) == ["save", "copy", "readinto", "load"]
    out = capsys.readouterr().out
    assert all(text in out for text in bench_checkpoint.NAMES.values())
    assert not (tmp_path / "bench").exists()


def test_a_benchmark_of_checkpoints_looks_at_what_it_reads(tmp_path):
    config = CheckpointBenchConfig(d=100, folder=tmp_path / "bench")

    def program(comm):
        turns = bench_checkpoint._Turns(comm, config)
        with pytest.raises(CheckpointError, match="bench: nothing to read in"):
            turns.load(0)
        turns.save(0)
        loaded = turns.load(0)
        turns.check(loaded)
        loaded[-1][17] += comm.Get_rank()
        if comm.Get_rank():
            with pytest.raises(CheckpointError, match="gave other numbers than were saved; this must not happen"):
                turns.check(loaded)
        turns.store.close()

    virtual.results(2, program)


def test_digits_want_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="digits: scikit-learn is not installed; pip install scikit-learn"):
        Digits()


def test_a_row_that_was_cut_off_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    metrics = Metrics(tmp_path, ["step", "loss"], after=2)
    metrics.write({"step": 2, "loss": 1.5})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_without_proc_nobody_watches(monkeypatch):
    monkeypatch.setattr(metrics_module, "Path", lambda _: Path("/nowhere/stat"))
    assert metrics_module._on_terminal() is False


@pytest.mark.parametrize("name", get_args(get_type_hints(TrainConfig)["optimizer"]))
def test_every_optimizer_can_be_built(name):
    """With the options that the command line gives it."""

    def program(comm):
        model = torch.nn.Linear(4, 3)
        optimizer = build_optimizer(
            TrainConfig(optimizer=name, freeze=7, local_steps=5, lr=0.25, clip=0.0), model, comm
        )
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 15
        freeze = {"onebit-adam": "freeze_step", "onebit-lamb": "freeze_step", "zero-one-adam": "var_freeze_step"}
        assert getattr(optimizer, freeze.get(name, ""), 7) == 7
        assert getattr(optimizer, "local_step_scaler", 5) == 5

    virtual.results(2, program)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    config = TrainConfig(model="mlp", steps=2, warmup=1, out=tmp_path / "file" / "run")
    [error] = virtual.run(1, lambda comm: train(comm, config))
    assert isinstance(error, DataError)
    assert str(error).endswith("file/run: Not a directory; make room there, or give another --out")


class Died(Exception):
    """Ends a rank in the place of MPI_Abort."""


@pytest.fixture
def dying(monkeypatch):
    """A world of two ranks of which this is rank 1, and the other one never comes; what is said at its end."""
    said = []

    def die(comm, text, status, seconds=0.0):
        said.append((text, status))
        raise Died

    request = SimpleNamespace(Test=lambda: False)
    comm = SimpleNamespace(
        Get_size=lambda: 2, Get_rank=lambda: 1, Dup=lambda: SimpleNamespace(Ibarrier=lambda: request)
    )
    mpi = SimpleNamespace(COMM_WORLD=comm)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    monkeypatch.setattr(mpi4py, "MPI", mpi, raising=False)
    monkeypatch.setattr(launch, "_die", die)
    monkeypatch.setattr(launch, "PATIENCE_SECONDS", 0.05)
    return said


def everywhere(error):
    error.everywhere = True
    return error


@pytest.mark.parametrize(("error", "status", "text"), [
    (DataError("x: is empty; fill it"), 2, "mpi-ef: rank 1: x: is empty; fill it"),
    (everywhere(DataError("all: are empty; fill them")), 2, "mpi-ef: rank 1: all: are empty; fill them"),
    (ZeroDivisionError("by zero"), 1, "mpi-ef: rank 1 failed:\nTraceback (most recent call last):"),
])  # fmt: skip
def test_an_error_ends_all_ranks(dying, error, status, text):
    """Also one that all raise, when nobody comes. With real ranks: launch/test_programs.py, whose end is MPI_Abort."""

    def program(comm):
        raise error

    with pytest.raises(Died):
        launch.run(program)
    [(said, ended)] = dying
    assert said.startswith(text)
    assert str(error) in said
    assert ended == status


def test_an_exception_of_a_script_ends_all_ranks(dying, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    launch.abort_on_exception(mpi4py.MPI.COMM_WORLD)
    with pytest.raises(Died):
        sys.excepthook(KeyError, KeyError("lost"), None)
    assert dying == [("rank 1 failed:\nKeyError: 'lost'\n", 1)]


class Failure(Exception):
    """An error of MPI."""


@pytest.mark.parametrize("error", [Failure("truncated"), ZeroDivisionError("by zero")])
def test_an_error_without_a_death_is_not_outlived(monkeypatch, error):
    """It would happen again. With deaths: launch/test_survivors.py, whose processes leave without MPI_Finalize."""
    nobody = SimpleNamespace(Get_size=lambda: 0)
    comm = SimpleNamespace(Set_errhandler=lambda _: None, Get_group=lambda: nobody, Get_size=lambda: 4, Iprobe=lambda: False,
                           Is_revoked=lambda: False, Get_failed=lambda: nobody)  # fmt: skip
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace(Exception=Failure, ERRORS_RETURN=None))
    monkeypatch.setattr(mpi4py, "MPI", sys.modules["mpi4py.MPI"], raising=False)
    monkeypatch.setattr(survivors, "_without_the_dead", lambda comm, everyone: comm)
    monkeypatch.setattr(survivors, "_DETECTION_SECONDS", 0.02)

    def program(comm, failures):
        assert failures == 0
        raise error

    with pytest.raises(type(error)):
        survivors.outlive(comm, program)
    assert not survivors._some_are_dead(comm)

    def broken():
        raise Failure("of a peer")

    comm.Iprobe = broken
    assert survivors._some_are_dead(comm)
    comm.Is_revoked, comm.Iprobe = lambda: True, None
    assert survivors._some_are_dead(comm)
