"""The doctor as a whole program on several ranks, among them ranks that are broken."""

import json
import os
import subprocess
import sys

import patience
import pytest
from launching import run

LIMIT = 150
PROGRAM = ("-m", "mpi_ef.jobs.doctor.program")
HOST = os.uname().nodename


def read(ended):
    """The document among what a launcher prints itself, and its findings by name."""
    document = json.loads(ended.text[ended.text.index("{\n") : ended.text.rindex("\n}") + 2])
    return document, {finding["name"]: finding for finding in document["findings"]}


def test_one_page_from_all_ranks(tmp_path):
    ended = run(2, *PROGRAM, "--out", tmp_path, within=LIMIT)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("started by mpiexec")) == 2  # title and finding
    assert len(ended.lines_with("verdict: ")) == 1
    assert all(len(line) <= 100 for line in ended.text.splitlines()), ended.text
    assert len(ended.text.splitlines()) < 60
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [1, 2, 4])
def test_all_findings_as_json(tmp_path, n):
    ended = run(n, *PROGRAM, "--json", "--out", tmp_path, within=LIMIT)
    assert ended.status == 0, ended.text
    document, found = read(ended)
    assert (document["ranks"], len(document["nodes"])) == (n, 1)
    assert f"one world of {n} rank" in found["world"]["what"]
    assert list(tmp_path.iterdir()) == []
    expected = {"mpi", "thread-level", "large-counts", "world", "nodes", "threads", "gpu", "loader", "cache", "folder",
                "hdf5", "tmp", "shm", "versions", *(["allreduce"] if n > 1 else [])}
    assert expected <= found.keys()
    assert ("link-node" in found or "slow-node" in found) == (n > 1)
    assert {"binding", "oversubscribed"} & found.keys()
    assert n <= (os.cpu_count() or 1) or found["oversubscribed"]["level"] == "warning"


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cold", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_the_warm_up_compiles_once_and_a_training_finds_everything_compiled(tmp_path, cold):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} if cold else {}
    for compiles in (True, False):
        ended = run(2, *PROGRAM, "--json", "--warmup", "--out", tmp_path, within=400, **environment)
        assert ended.status == 0, ended.text
        _, found = read(ended)
        loaded = "all loaded from disk" in found["warm-up"]["what"]
        assert loaded != compiles or not cold  # what was there before the test is there already
        assert loaded or compiles
        assert "warm-up-again" not in found
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    ended = run(2, script, tmp_path / "run", within=LIMIT, **environment)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("compiled by the training: []")) == 2, ended.text


TRAINING = """
import sys
from pathlib import Path
from mpi4py.MPI import COMM_WORLD as comm
from mpi_ef import kernels
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.program import train
small = dict(model="mlp", steps=6, warmup=1, batch=4, out=Path(sys.argv[1]), overwrite=True)
for optimizer in ("adamw", "onebit-adam", "lion", "ef21-muon", "powersgd"):
    train(comm, TrainConfig(optimizer=optimizer, **small, **({"freeze": 2} if optimizer == "onebit-adam" else {})))
for options in (dict(compressor="sign"), dict(compressor="randk"), dict(rule="ef21", placement="gradient", optimizer="sgd")):
    train(comm, TrainConfig(**small, **options))
named = {name: getattr(kernels, name) for name in kernels.__all__}
late = [name for name, kernel in named.items() if hasattr(kernel, "stats") and sum(kernel.stats.cache_misses.values())]
sys.stdout.write(f"compiled by the training: {late}\\n")
"""


# ---- ranks that are broken: a program that spoils something on one of them and then runs the doctor

BROKEN = """
import os, sys, time
import mpi_ef.jobs.doctor.program as doctor
from mpi_ef.jobs.doctor import all_ranks, checks, registry
from mpi_ef.jobs.doctor.checks import allreduce, cores, launcher, link
checks.CHECKS = [check for check in checks.CHECKS if check.name in ("cores", "versions")]  # the fast ones
def fault(*_): raise ValueError('rank one is broken')
def hang(*_): time.sleep(1000)
if launcher.launcher_of(os.environ).rank == {rank}:
    {fault}
doctor.main(["--json", "--out", {out!r}, "--patience", "{patience}"])
"""


def broken(tmp_path, n, fault, rank=1):
    """In 4 seconds of patience the other ranks start MPI and do their checks."""
    seconds = patience.limit(4 if "hang" in fault else 20)
    script = tmp_path / "program.py"
    script.write_text(BROKEN.format(fault=fault, out=str(tmp_path), patience=seconds, rank=rank))
    ended = run(n, script, within=LIMIT, OMP_NUM_THREADS="1")
    assert "Traceback" not in ended.text
    return ended


NOT_DONE = f"not looked at on rank 1 ({HOST}): "
RAISED = f"{NOT_DONE}ValueError: rank one is broken"


@pytest.mark.parametrize(("fault", "name", "words"), [
    ("cores.collect = fault", "check-failed", f"cores: {RAISED}"),
    ("link.collect = fault", "link-dead", f"between rank 0 ({HOST}) and rank 1 ({HOST}) had not arrived"),
    pytest.param("allreduce.collect = fault", "check-failed", f"sum: {RAISED}", marks=pytest.mark.exhaustive),
    pytest.param("cores.collect = hang", "check-hangs", f"cores: {NOT_DONE}no end", marks=pytest.mark.exhaustive),
    ("all_ranks.local_rank = hang", "hangs", "does not come back"),
    ("registry.Check.facts = hang", "silent-ranks", "no answer from rank 1"),
    ("os.environ['OMP_NUM_THREADS'] = '7'", "threads-differ", "OMP_NUM_THREADS differs between ranks: 1, 7"),
    ("sys.modules['mpi_ef'].__version__ = '0.0.1'", "versions-differ", "ranks have different versions of mpi_ef")])
def test_a_broken_rank_is_named_and_no_rank_hangs(tmp_path, fault, name, words):
    ended = broken(tmp_path, 2, fault)
    document, _ = read(ended)
    findings = document["findings"]
    assert document["ranks"] == (1 if name == "hangs" else 2)  # as far as that is known
    assert any(found["name"] == name and words in found["what"] for found in findings), ended.text
    assert (ended.status != 0) == any(found["level"] == "error" for found in findings)


@pytest.mark.parametrize(("n", "fault", "rank", "words"), [
    (2, "all_ranks.placements_of = None", 0, "doctor: not looked at: TypeError"),  # of the doctor itself
    (3, "registry.Check.facts = lambda *_: os.kill(os.getpid(), 9)", 1, None)])
def test_a_doctor_that_breaks_or_is_killed_ends_all_ranks(tmp_path, n, fault, rank, words):
    ended = broken(tmp_path, n, fault, rank)
    assert ended.status != 0
    assert words is None or words in read(ended)[1]["check-failed"]["what"]
    assert ended.seconds < patience.limit(60)


# ---- tasks that are no world

def alone(*arguments, **environment):
    command = [sys.executable, *PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=patience.limit(60), check=False,
                          env=os.environ | environment)


def task(rank, *arguments, **environment):
    """One of several tasks that srun has started with the wrong --mpi=."""
    number = {} if rank is None else {"SLURM_PROCID": str(rank)}
    return alone(*arguments, SLURM_STEP_NUM_TASKS="2", **number, **environment)


def test_the_first_of_the_singleton_worlds_prints_for_all():
    first, second = task(0), task(1)
    assert (first.returncode, second.returncode) == (1, 0)  # srun returns the highest
    assert second.stdout == ""
    text = " ".join(first.stdout.split())
    assert all(words in text for words in ("EVERY TASK IS RANK 0 OF ITS OWN WORLD", "--mpi=pmix", "--mpi=pmi2",
                                           "2 tasks were started by srun (SLURM_STEP_NUM_TASKS=2)", "--mpi=cray_shasta"))
    assert all(len(line) <= 100 for line in first.stdout.splitlines())


def test_singleton_worlds_without_a_number_all_print():
    done = task(None, "--json")
    assert done.returncode == 1
    assert [finding["name"] for finding in json.loads(done.stdout)["findings"]] == ["lonely-ranks"]


def test_tasks_without_an_mpi_library(tmp_path):
    nowhere = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    first, second, third = (task(rank, "--out", str(tmp_path), SLURM_LOCALID=str(rank % 2), **nowhere) for rank in range(3))
    assert (first.returncode, second.returncode, third.returncode) == (1, 0, 0)
    assert "mpi4py finds no MPI library" in first.stdout
    assert second.stdout + second.stderr + third.stdout == ""
    assert third.stderr.startswith(f"mpi-ef doctor: task 2 on {HOST} has no MPI: RuntimeError")
    assert "Traceback" not in first.stdout + first.stderr


def test_singleton_worlds_of_another_mpiexec():
    done = alone(MV2_COMM_WORLD_SIZE="2", MV2_COMM_WORLD_RANK="0")
    assert done.returncode == 1
    assert "the mpiexec that belongs to this library" in " ".join(done.stdout.split())
