"""Programs with files, machines and peers that are not as they should be: one line, the right status, nothing left."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import mpi4py
import patience
import pytest
import torch
import virtual
from test_jobs import bench_row

import mpi_ef
from mpi_ef.errors import CheckpointError, ConfigError, DataError
from mpi_ef.jobs import metrics as metrics_module
from mpi_ef.jobs.bench import checkpoint as bench_checkpoint
from mpi_ef.jobs.bench import methods as bench_methods
from mpi_ef.jobs.bench import program as bench
from mpi_ef.jobs.bench.checkpoint import CheckpointBenchConfig
from mpi_ef.jobs.bench.program import BenchConfig
from mpi_ef.jobs.bench.table import Link, break_even, combine, table
from mpi_ef.jobs.least_squares import LeastSquaresConfig
from mpi_ef.jobs.metrics import Metrics
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.datasets import Digits
from mpi_ef.jobs.train.optimizers import build_optimizer
from mpi_ef.jobs.train.program import train
from mpi_ef.runtime import ending, launch
from mpi_ef.runtime import ulfm as survivors


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "slurm list", "slurm show train", "checkpoint ls ."])
def test_a_reader_that_has_seen_enough(tmp_path, words, unbuffered):
    """As of ``mpi-ef slurm list | head -1``: no error, whether lines leave at once or at the end of Python."""
    (tmp_path / ".tmp-step-00000005-aaaaaaaaaaaa").mkdir()
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(Path(mpi_ef.__file__).parents[1])}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "mpi_ef.jobs.cli", *words.split()], stdout=writing, check=False,
                          stderr=subprocess.PIPE, timeout=patience.limit(60), env=environment, cwd=tmp_path)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("config", "options", "words"), [
    (BenchConfig, {"d": 99}, "d=99 is not in [100, inf); the default is 25000000"),
    (BenchConfig, {"ratio": 0.0}, "ratio=0.0 is not in (0, 1]; the default is 0.01"),
    (BenchConfig, {"methods": "ef21"}, "methods: 'ef21' is not RULE COMPRESSOR or RULE COMPRESSOR PLAN"),
    (BenchConfig, {"methods": "ef22 TopK(0.1)"}, "methods: there is no rule 'ef22'; did you mean ef2"),
    (BenchConfig, {"methods": "ef21 TopK(0.1); ef21 TopK(ration=1)"}, "TopK has no option ration; did you mean ratio?"),
    (BenchConfig, {"methods": "econtrol(etta=0.1) TopK(0.1)"}, "econtrol has no option etta; did you mean eta?"),
    (BenchConfig, {"methods": "ef21 TopK(0.1) Gather"}, "there is no plan 'Gather'; did you mean GatherMean?"),
    (BenchConfig, {"methods": "ef21 TopK(0.1)", "only": "ef"}, "only=ef has no effect with methods"),
    (BenchConfig, {"repeats": 0}, "repeats=0 is not a positive integer; the default is 9"),
    (BenchConfig, {"plot": Path("p.xyz")}, "plot=p.xyz is no name of a picture; take one that ends in .png, .svg"),
    (CheckpointBenchConfig, {"d": 0}, "d=0 is not a positive integer; the default is 25000000"),
    (CheckpointBenchConfig, {"repeats": -1}, "repeats=-1 is not a positive integer; the default is 5"),
    (LeastSquaresConfig, {"rows": 0}, "rows=0 is not a positive integer; the default is 2000"),
    (LeastSquaresConfig, {"ratio": 2.0}, "ratio=2.0 is not in (0, 1]; the default is 0.02"),
    (CheckpointBenchConfig, {"folder": Path(__file__).parent}, "exists, and would be deleted; name one that does not"),
    (TrainConfig, {"on_failure": "shrink", "checkpoint_every": 0}, "checkpoint_every"),
    (TrainConfig, {"rule": "econtrol(eta=2.0)"}, "rule=econtrol(eta=2.0): ErrorFeedback: eta=2.0 is not in [0, 1]"),
    (TrainConfig, {"rule": "ef14(momentum=1.0)"}, "momentum=1.0 is not in [0, 1)"),
    (TrainConfig, {"placement": "gradient", "overlap": True, "clip": 1.0}, "pass clip=0 with it"),
])
def test_programs_that_would_be_of_no_use_are_refused(config, options, words):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert words in str(caught.value)


def test_methods_that_differ_in_their_plan_have_other_names():
    specified = [["ef14", "TopK(0.05)", *plan] for plan in ([], ["TwoPhaseMean(residual=False)"], ["GatherMean"])]
    names = virtual.results(2, lambda comm: [m.name for m in bench_methods.methods(comm, 200, 0.1, specified)])[0]
    assert names[-3:] == ["ef14 TopK(0.05)", "ef14 TopK(0.05) TwoPhaseMean(residual=False)", "ef14 TopK(0.05) GatherMean"]


@pytest.mark.parametrize("text", [None, "{", "[1, 2]", '{"rows": []}'])
def test_what_is_no_result_of_a_benchmark_is_not_combined(tmp_path, text):
    path = tmp_path / "1.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"^mpi-ef: .*1\.json: is no result of mpi-ef bench.*; write one with --json$"):
        bench.main(["--combine", f"{path}"])


def test_what_pays_on_any_link_and_on_none():
    dense = bench_row("MPI_Allreduce", "dense", 20, 100_000_000)
    unknown, fast = bench_row("unknown", "compressed", 30, 1), bench_row("fast", "compressed", 9, 1_000_000, 1e-9)
    dense = replace(dense, messages=4)
    assert break_even(unknown, dense, Link(1e-6, 1e9)) == 0.0
    launch = {"ranks": 2, "d": 100, "ratio": 0.1, "repeats": 1, "launches": 1, "mpi": "M",
              "link": {"latency_seconds": 1e-6, "bytes_per_second": 1e10}}
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


def test_zero_one_adam_gets_its_options():
    config = TrainConfig(optimizer="zero-one-adam", freeze=7, local_steps=5, lr=0.25, clip=0.5)

    def program(comm):
        optimizer = build_optimizer(config, torch.nn.Linear(4, 3), comm)
        assert type(optimizer).__name__ == "ZeroOneAdam"
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}
        return optimizer.var_freeze_step, optimizer.local_step_scaler, optimizer.clip

    assert virtual.results(2, program) == [(7, 5, 0.5)] * 2


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
    """A world of two ranks of which this is rank 1, and the other one never comes; the statuses at its end."""
    statuses = []

    def abort(status):
        statuses.append(status)
        raise Died

    request = SimpleNamespace(Test=lambda: False)
    comm = SimpleNamespace(Get_size=lambda: 2, Get_rank=lambda: 1, Abort=abort)
    comm.Dup = lambda: SimpleNamespace(Ibarrier=lambda: request)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace(COMM_WORLD=comm))
    monkeypatch.setattr(mpi4py, "MPI", sys.modules["mpi4py.MPI"], raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the one of this process stays as it is
    monkeypatch.setattr(launch, "PATIENCE_SECONDS", 0.05)
    return statuses


def everywhere(error):
    error.everywhere = True
    return error


@pytest.mark.parametrize(("error", "status", "text"), [
    (DataError("x: is empty; fill it"), 2, "mpi-ef: rank 1: x: is empty; fill it"),
    (everywhere(DataError("all: are empty; fill them")), 2, "mpi-ef: rank 1: all: are empty; fill them"),
    (ZeroDivisionError("by zero"), 1, "mpi-ef: rank 1 failed:\nTraceback (most recent call last):"),
])
def test_an_error_ends_all_ranks(dying, capsys, error, status, text):
    """Also one that all raise, when nobody comes. With real ranks: launch/test_programs.py, whose end is MPI_Abort."""

    def program(comm):
        raise error

    with pytest.raises(Died):
        launch.run(program)
    said = capsys.readouterr().err
    assert said.startswith(text)
    assert str(error) in said
    assert dying == [status]


def test_an_exception_of_a_script_ends_all_ranks(dying, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    launch.abort_on_exception(mpi4py.MPI.COMM_WORLD)
    with pytest.raises(Died):
        sys.excepthook(KeyError, KeyError("lost"), None)
    assert capsys.readouterr().err == "rank 1 failed:\nKeyError: 'lost'\n\n"
    assert dying == [1]


class RanksOfMpi(SimpleNamespace):
    """Stands for the class of MPI's communicators."""


@pytest.fixture
def two_ranks(dying, monkeypatch):
    """A communicator of MPI, of two ranks, in a program whose exceptions are Python's to print."""
    monkeypatch.setattr(sys.modules["mpi4py.MPI"], "Comm", RanksOfMpi, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "orig_argv", ["python", "program.py"])
    monkeypatch.delitem(sys.modules, "mpi4py.run", raising=False)
    return RanksOfMpi(Get_size=lambda: 2)


def raised(error):
    sys.excepthook(type(error), error, None)


def test_the_hook_of_another_library_is_called_before_all_ranks_end(two_ranks, dying, capsys):
    """Once, however many plans there are, and whether it was there before the first of them."""

    def another(kind, value, trace):
        print("another library:", value, file=sys.stderr)

    for turn in range(2):
        sys.excepthook = another
        for _ in range(3):
            ending.end_together(two_ranks)
        with pytest.raises(Died):
            raised(ValueError("mine\nand more"))
        assert capsys.readouterr().err == "another library: mine\nand more\nrank 1 failed: ValueError: mine\n"
        assert dying == [1] * (turn + 1)


def test_the_hook_of_another_library_that_raises_keeps_no_rank_alive(two_ranks, dying, capsys):
    def another(kind, value, trace):
        raise ZeroDivisionError

    sys.excepthook = another
    ending.end_together(two_ranks)
    with pytest.raises(Died):
        raised(ValueError())
    assert capsys.readouterr().err == "rank 1 failed: ValueError\n"
    assert dying == [1]


def test_ranks_of_a_script_that_asked_itself_end_once(two_ranks, dying, capsys):
    ending.end_together(two_ranks)
    launch.abort_on_exception(mpi4py.MPI.COMM_WORLD)
    ending.end_together(two_ranks)
    with pytest.raises(Died):
        raised(ValueError("mine"))
    assert capsys.readouterr().err == "rank 1 failed:\nValueError: mine\n\n"
    assert dying == [1]


@pytest.mark.parametrize("where", ["prompt", "python -i", "MPI_EF_ABORT=0", "python -m mpi4py", "python -m mpi4py.run"])
def test_exceptions_that_somebody_else_sees_to_are_left_alone(two_ranks, monkeypatch, where):
    def another(kind, value, trace):
        pass

    for hook in (another,) if "mpi4py" in where else (another, sys.__excepthook__):
        monkeypatch.setattr(sys, "excepthook", hook)
        if where == "prompt":
            monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        elif where == "python -i":
            monkeypatch.setattr(sys, "flags", SimpleNamespace(interactive=1))
        elif where == "MPI_EF_ABORT=0":
            monkeypatch.setenv("MPI_EF_ABORT", "0")
        elif where == "python -m mpi4py":
            monkeypatch.setitem(sys.modules, "mpi4py.run", SimpleNamespace())
        else:
            monkeypatch.setattr(sys, "orig_argv", where.split())
        ending.end_together(two_ranks)
        assert sys.excepthook is hook


class Failure(Exception):
    """An error of MPI."""


@pytest.mark.parametrize("error", [Failure("truncated"), ZeroDivisionError("by zero")])
def test_an_error_without_a_death_is_not_outlived(monkeypatch, error):
    """It would happen again. With deaths: launch/test_survivors.py, whose processes leave without MPI_Finalize."""
    nobody = SimpleNamespace(Get_size=lambda: 0)
    comm = SimpleNamespace(Set_errhandler=lambda _: None, Get_group=lambda: nobody, Get_size=lambda: 4, Iprobe=lambda: False,
                           Is_revoked=lambda: False, Get_failed=lambda: nobody)
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
