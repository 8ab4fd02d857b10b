"""Whole programs under a launcher: what users type, and what happens when a rank breaks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import patience
import pytest
from launching import TMPDIR_OF_PRTE, finish, run, start
from test_interruption import handles, wait_for

from mpi_ef.runtime import launch

SHORT = ["--steps", 20, "--warmup", 2, "--batch", 4, "--log-every", 5]
SMALL = [*SHORT, "--context", 16, "--layers", 1, "--heads", 2, "--width", 16]
# A stuck run is ended by the test after this time; a healthy one needs a few seconds.
LIMIT = 90
TESTS = Path(__file__).parents[1]


def train(n, *arguments, **options):
    return run(n, "-m", "mpi_ef.jobs.train.program", *SMALL, *arguments, within=LIMIT, **options)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_train(tmp_path, n):
    ended = train(n, "--out", tmp_path / "run", real=n == 2)
    assert ended.status == 0, ended.text
    assert "equal bit for bit" in ended.text
    if n == 2:  # forks have another parent than a launcher
        assert "\r" not in ended.text  # no live line in a log
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ranks"] == n
    assert summary["skipped_steps"] == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_train_on_your_own_text_with_a_file_of_options(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "run.toml").write_text(f'text = "{text}"\ncompressor = "sign"\nlr = 0.02\n')
    ended = train(2, "--config", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert ended.status == 0, ended.text
    assert "Sign(block=1024)" in ended.text


@pytest.mark.parametrize("options", [["--rule", "ef21"], ["--rule", "econtrol"], ["--compressor", "identity"]])
def test_train_with_gradient_placement(tmp_path, options):
    ended = run(2, "-m", "mpi_ef.jobs.train.program", *SHORT, "--model", "mlp", "--split", "by-label", "--optimizer", "sgd",
                "--placement", "gradient", "--dense-steps", 1, *options, "--out", tmp_path, within=LIMIT)
    assert ended.status == 0, ended.text
    assert "validation accuracy" in ended.text


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_bench(tmp_path, n):
    """Figures are complete and add up; medians over launches; a picture. How fast anything is decides nothing."""
    files = [tmp_path / f"{launch}.json" for launch in range(2)]
    for file in files:
        ended = run(n, "-m", "mpi_ef.jobs.bench.program", "--d", 20_000, "--repeats", 2, "--json", file, within=LIMIT)
        assert ended.status == 0, ended.text
        assert ended.text.count("median") == 1  # one rank prints
    result = json.loads(files[0].read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert result["ranks"] == n
    assert all(0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"] for row in rows.values())
    assert rows["ef21 TopK(0.01)"]["sent_nbytes"] * 25 <= rows["MPI_Allreduce"]["sent_nbytes"] * (max(1, n))
    assert rows["ef21 TopK(0.01, bf16)"]["entry_bits"] <= 25
    assert rows["ef21 TopK(0.01)"]["touched_bytes"] < 12
    combined = tmp_path / "both.json"
    ended = run(1, "-m", "mpi_ef.jobs.bench.program", "--combine", f"{files[0]},{files[1]}", "--json", combined,
                "--plot", tmp_path / "bench.png", within=LIMIT)
    assert ended.status == 0, ended.text
    assert "2 launches" in ended.text
    assert json.loads(combined.read_text())["launches"] == 2
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_least_squares():
    ended = run(3, "-m", "mpi_ef.jobs.least_squares", "--rows", 300, "--columns", 60, "--ratio", 0.05, "--steps", 1500)
    assert ended.status == 0, ended.text
    assert float(re.search(r"relative error of x +(\S+)", ended.text).group(1)) < 1e-6
    sent, dense = (
        int(number.replace(",", "")) for number in re.search(r"rank +(\S+) \(dense: (\S+)\)", ended.text).groups()
    )
    assert sent * 4 < dense


def test_reproduce(tmp_path):
    """More ranks than clients of an experiment, an uneven number of them, and missing data."""
    tables = []
    for n in (1, 3):
        ended = run(n, "-m", "mpi_ef.jobs.cli", "reproduce", "speedup", "--steps", 8, "--out", tmp_path / str(n))
        assert ended.status == 0, ended.text
        tables.append((tmp_path / str(n) / "speedup" / "table.txt").read_text())
        assert tables[0] in ended.text
    assert tables[0] == tables[1]
    ended = run(2, "-m", "mpi_ef.jobs.cli", "reproduce", "ef21", "--data", tmp_path)
    assert ended.status == 2
    assert len(ended.lines_with("has no file phishing; get it from https://")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "EMPTY"], "the file is empty"),
        (["--text", "ABSENT"], "cannot be read"),
        (["--text", "SHORT"], "30 characters are too few for blocks of 16"),
        (["--ratio", "1.5"], "ratio=1.5 is not in (0, 1]"),
    ],
)
def test_bad_input_is_one_line_for_all_ranks(tmp_path, arguments, words):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("abcdefghij" * 3)
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    ended = train(3, *arguments, "--out", tmp_path / "run")
    assert ended.status != 0
    # Rank 0 speaks for all; before MPI is there nobody knows who that is, and the launcher may end ranks before they speak.
    lines = ended.lines_with(words)
    assert len(lines) == 1 if "--text" in arguments else 1 <= len(lines) <= 3, ended.text
    assert "Traceback" not in ended.text
    assert ended.seconds < patience.limit(30)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--stepps", "3"], "did you mean --steps?"), (["--config", "RUN"], "stepps is no option; did you mean steps?")],
)
def test_wrong_options_need_no_mpi_to_be_noticed(tmp_path, arguments, words):
    (tmp_path / "RUN").write_text("stepps = 3\n")
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    done = subprocess.run([sys.executable, "-m", "mpi_ef.jobs.cli", "train", *arguments], capture_output=True, text=True,
                          timeout=patience.limit(60), check=False,
                          env=os.environ | {"MPI4PY_LIBMPI": "/nowhere"})
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_killed_launcher_has_left_does_not_stop_another(tmp_path, monkeypatch):
    """Open MPI's does not start where one with its process number has left a folder."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    for number in (dead.pid, os.getpid()):
        (tmp_path / f"ompi.{number}" / "1").mkdir(parents=True)
    monkeypatch.setenv(TMPDIR_OF_PRTE, str(tmp_path))
    ended = run(1, "-c", "print('well')")
    assert ended.lines_with("well"), ended.text
    assert [path.name for path in tmp_path.iterdir()] == [f"ompi.{os.getpid()}"]


@pytest.mark.parametrize("told", [False, True], ids=["", "the first to leave ends the others"])
def test_n_copies_of_rank_zero(told):
    """Each says what is wrong before the first leaves, and ends with the same status, also when srun ends it."""
    began = time.monotonic()
    task = subprocess.Popen([sys.executable, "-m", "mpi_ef.jobs.train.program"], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, env=os.environ | {"SLURM_STEP_NUM_TASKS": "2"})
    first = task.stdout.readline()
    if told:
        wait_for(lambda: handles(task.pid, signal.SIGTERM), task)
        task.terminate()
    text = first + task.communicate(timeout=patience.limit(60))[0]
    assert task.returncode == 2, text
    assert "SLURM_STEP_NUM_TASKS=2, but the MPI world has 1 rank" in first
    assert "--mpi=pmix" in first
    if not told:
        assert time.monotonic() - began >= launch.PATIENCE_SECONDS


PROGRAM = """
import sys, time
import numpy as np
from mpi_ef import GatherMean, TopK, allreduce
from mpi_ef.errors import MpiEfError
from mpi_ef.runtime.launch import run

def program(comm):
    rank, x = comm.Get_rank(), np.ones(100, np.float32)
    plan = GatherMean(comm, TopK(0.1), 100)
    for step in range(1000000):
        if step == 50:
            print("running", rank, flush=True)
        plan.exchange(x)
        if step == 100 and rank == 1:
            {fault}

run(program)
"""


@pytest.mark.parametrize(
    ("fault", "words", "status"),
    [
        ("raise ValueError('rank one is broken')", "ValueError: rank one is broken", 1),
        ("plan.exchange(x[1:])", "x has shape (99,); this plan takes (100,)", 2),
        ("raise MpiEfError('subject: wrong; do this')", "rank 1: subject: wrong; do this", 2),
    ],
)
def test_a_rank_that_raises_ends_all_with_its_message(tmp_path, fault, words, status):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(fault=fault))
    ended = run(3, script, within=LIMIT)
    assert ended.status == status, ended.text
    assert ended.lines_with(words), ended.text
    assert ended.seconds < patience.limit(30)


DIFFERING = """
import numpy as np
from mpi_ef import GatherMean, TopK
from mpi_ef.runtime.launch import run

def program(comm):
    pair = comm.Split(comm.Get_rank() // 2)
    if comm.Get_rank() < 2:
        GatherMean(pair, TopK(0.1), 100 + comm.Get_rank())  # both raise, the third rank knows nothing of it
    for _ in range(1000000):
        comm.Iallgather(np.zeros(100), np.zeros((comm.Get_size(), 100))).Wait()

run(program)
"""


def test_ranks_that_fail_together_on_a_part_of_the_world_end_all_of_it(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(DIFFERING)
    ended = run(3, script, within=LIMIT)
    assert ended.status == 2, ended.text
    assert ended.lines_with("GatherMean: ranks disagree on d: 100 on rank 0; 101 on rank 1"), ended.text
    assert ended.seconds < patience.limit(45)


def test_options_that_differ_between_ranks_are_told(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(f"""
from dataclasses import replace
from mpi_ef.runtime.launch import run
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.program import train
config = TrainConfig(model="mlp", steps=5, out={str(tmp_path)!r})
run(lambda comm: train(comm, replace(config, log_every=5 + comm.Get_rank())))
""")
    ended = run(2, script, within=LIMIT)
    assert ended.status == 2, ended.text
    assert len(ended.lines_with("disagree on option log_every: 5 on rank 0; 6 on rank 1")) == 1, ended.text


def test_a_rank_that_is_killed_ends_all(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(fault="import os; os.kill(os.getpid(), 9)"))
    ended = run(3, script, within=LIMIT)
    assert ended.status != 0
    assert ended.seconds < patience.limit(30)
    assert re.search("signal 9|KILLED BY SIGNAL: 9|SIGKILL|Killed", ended.text), ended.text


def test_a_terminated_run_leaves_its_metrics(tmp_path):
    process = start(
        2, "-m", "mpi_ef.jobs.train.program", *SMALL, "--steps", 100000, "--eval-every", 100000, "--out", tmp_path
    )
    rows = tmp_path / "metrics.jsonl"
    wait_for(lambda: rows.exists() and len(rows.read_text().splitlines()) > 3, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process, within=30).status != 0
    assert all(json.loads(line)["step"] for line in rows.read_text().splitlines())


def test_abort_on_exception_in_a_script_of_your_own(tmp_path):
    script = tmp_path / "own.py"
    script.write_text("""
from mpi4py import MPI
from mpi_ef.runtime.launch import abort_on_exception
comm = MPI.COMM_WORLD
abort_on_exception(comm)
if comm.rank == 1:
    raise RuntimeError("lost on rank one")
comm.Barrier()
""")
    ended = run(2, script, within=LIMIT)
    assert ended.status == 1
    assert ended.lines_with("RuntimeError: lost on rank one"), ended.text
    assert ended.seconds < patience.limit(30)


FAILING_SUITE = """
import pytest
@pytest.mark.mpi
def test_one_rank_fails():
    from mpi4py import MPI
    assert MPI.COMM_WORLD.rank != 1, "rank one says no"
    MPI.COMM_WORLD.Barrier()
"""


def test_a_test_that_fails_on_one_rank_ends_the_suite(tmp_path):
    """The suite's own safety: a failure is seen in seconds, and skipped MPI tests count as failure."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "test_it.py").write_text(FAILING_SUITE)
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", "/dev/null", folder]
    ended = run(2, *options, "--with-mpi", within=LIMIT, PYTHONPATH=str(TESTS))
    assert ended.status == 3, ended.text
    assert ended.lines_with("rank one says no")
    assert ended.seconds < patience.limit(30)
    (folder / "test_it.py").write_text(
        FAILING_SUITE.replace("!= 1", ">= 0").replace("mark.mpi", "mark.mpi(min_size=3)")
    )
    ended = run(2, *options, "--with-mpi", within=LIMIT, MPI_EF_TEST_RANKS="2", PYTHONPATH=str(TESTS))
    assert ended.status != 0, ended.text
    assert ended.lines_with("expected all tests to run on 2 ranks"), ended.text


PEAK = """
import sys
from pathlib import Path
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
from mpi_ef import ErrorFeedback, GatherMean, Quantize, Sign, TopK, TwoPhaseMean, DenseMean

d, which, copies = 4_000_000, sys.argv[1], int(sys.argv[2])
build = {
    "topk": lambda: ErrorFeedback("ef14", GatherMean(comm, TopK(0.01, values=Quantize("bf16")), d)),
    "econtrol": lambda: ErrorFeedback("econtrol", GatherMean(comm, TopK(0.01), d), eta=0.1),
    "sign": lambda: ErrorFeedback("ef14", TwoPhaseMean(comm, Sign(block=4096), d)),
    "dense": lambda: ErrorFeedback("ef21", DenseMean(comm, d)),
}
feedback = build[which]()
vectors = [np.random.default_rng((comm.rank, t)).normal(size=d).astype(np.float32) for t in range(2)]
for t in range(4):
    feedback.step(vectors[t % 2])

def kilobytes(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])

Path("/proc/self/clear_refs").write_text("5")  # the peak so far (compiling) is forgotten
before, held = kilobytes("VmRSS"), []
for t in range(20):
    feedback.step(vectors[t % 2])
    for _ in range(copies):  # what the test must be able to see: a vector more in every step
        held.append(vectors[t % 2] + np.float32(0))
grown = kilobytes("VmHWM") - before
print("grown", comm.allreduce(grown, max), "kB", flush=True)
"""


@pytest.mark.parametrize("which", ["topk", pytest.param("econtrol", marks=pytest.mark.exhaustive), "sign",
                                   pytest.param("dense", marks=pytest.mark.exhaustive)])
def test_steps_do_not_raise_the_peak_of_memory(tmp_path, which):
    """On real ranks, everything counted that a process holds, MPI's buffers too; a vector has 15,625 kB. (What comes and
    goes within a step is looked for in test_costs.py.)"""
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    grown = []
    for copies in (0, 1):
        ended = run(2, "-m", "mpi4py", script, which, copies, within=LIMIT)
        assert ended.status == 0, ended.text
        grown.append(int(re.search(r"grown (\d+) kB", ended.text).group(1)))
    assert grown[0] < 2_000
    assert grown[1] > 10 * 15_625


@pytest.mark.exhaustive  # compiles for half a minute; what decides is in test_jobs.py
def test_kernels_are_compiled_once_and_outside_of_the_times(tmp_path):
    """Rank 0 says so, and a run that compiles leaves out the same steps as one that loads."""
    said, summaries = [], []
    for out in (tmp_path / "cold", tmp_path / "warm"):
        program = ["-m", "mpi_ef.jobs.train.program", *SMALL, "--compressor", "identity", "--out", out]  # few kernels
        ended = run(2, *program, within=280, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert ended.status == 0, ended.text
        said.append(ended.lines_with("compiling kernels"))
        summaries.append(json.loads((out / "summary.json").read_text()))
    assert [len(lines) for lines in said] == [1, 0]
    assert f"once per machine; they are kept in {tmp_path / 'cache'}" in said[0][0]
    cold, warm = summaries
    assert 0 < cold["untimed_steps"] == warm["untimed_steps"] <= 5
    for summary in (cold, warm):  # compiling takes seconds, the timed steps of this model together a tenth of one
        phases = sum(summary["phases_seconds_per_step"].values()) * (summary["steps"] - summary["untimed_steps"])
        assert max(phases, summary["seconds"]) < cold["untimed_seconds"]
