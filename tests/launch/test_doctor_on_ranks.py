"""The doctor as a whole program on several ranks, among them ranks that are broken."""

import json
import os
import subprocess
import sys

import patience
import pytest
from launching import run

LIMIT = 150


def doctor(n, *arguments, **environment):
    return run(n, "-m", "mpi_ef.jobs.doctor.program", *arguments, within=LIMIT, **environment)


def read(ended):
    """The document among what a launcher has to say itself."""
    text = ended.text
    return json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])


def names(ended):
    return {finding["name"]: finding for finding in read(ended)["findings"]}


def test_one_page_from_all_ranks(tmp_path):
    ended = doctor(2, "--out", tmp_path)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("started by mpiexec")) == 2  # title and finding
    assert len(ended.lines_with("verdict: ")) == 1
    assert all(len(line) <= 100 for line in ended.text.splitlines()), ended.text
    assert len(ended.text.splitlines()) < 60
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [1, 2, 4])
def test_all_findings_as_json(tmp_path, n):
    ended = doctor(n, "--json", "--out", tmp_path)
    assert ended.status == 0, ended.text
    found = names(ended)
    assert read(ended)["ranks"] == n
    assert f"one world of {n} rank" in found["world"]["what"]
    assert list(tmp_path.iterdir()) == []
    assert len(read(ended)["nodes"]) == 1
    expected = {"mpi", "thread-level", "large-counts", "world", "nodes", "threads", "gpu", "loader", "cache", "folder",
                "hdf5", "tmp", "shm", "versions", *(["allreduce"] if n > 1 else [])}
    assert expected <= found.keys()
    assert ("link-node" in found or "slow-node" in found) == (n > 1)
    assert {"binding", "oversubscribed"} & found.keys()
    if n > (os.cpu_count() or 1):
        assert found["oversubscribed"]["level"] == "warning"


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cold", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_the_warm_up_compiles_once_and_a_training_finds_everything_compiled(tmp_path, cold):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} if cold else {}
    for compiles in (True, False):
        ended = run(
            2, "-m", "mpi_ef.jobs.doctor.program", "--json", "--warmup", "--out", tmp_path, within=400, **environment
        )
        assert ended.status == 0, ended.text
        what = names(ended)["warm-up"]["what"]
        assert (
            "all loaded from disk" in what
        ) != compiles or not cold  # what was there before the test is there already
        assert "all loaded from disk" in what or compiles
        assert "warm-up-again" not in names(ended)
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
rank = launcher.launcher_of(os.environ).rank
if rank == {rank}:
    {fault}
doctor.main(["--json", "--out", {out!r}, "--patience", "{patience}"])
"""


def broken(tmp_path, n, fault, patience=20, rank=1):
    script = tmp_path / "program.py"
    script.write_text(BROKEN.format(fault=fault, out=str(tmp_path), patience=patience, rank=rank))
    return run(n, script, within=LIMIT, OMP_NUM_THREADS="1")


def raising(where):
    return f"def fault(*_): raise ValueError('rank one is broken')\n    {where} = fault"


NOT_DONE = "not looked at on rank 1 (HOST): ValueError: rank one is broken"


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        (raising("cores.collect"), "check-failed", f"cores: {NOT_DONE}"),
        (raising("link.collect"), "link-dead", "between rank 0 (HOST) and rank 1 (HOST) had not arrived"),
        (raising("allreduce.collect"), "check-failed", f"sum: {NOT_DONE}"),
        (
            "cores.collect = lambda *_: time.sleep(1000)",
            "check-hangs",
            "cores: not looked at on rank 1 (HOST): no end",
        ),
        ("all_ranks.local_rank = lambda comm: (time.sleep(1000), 0)", "hangs", "does not come back"),
        ("registry.Check.facts = lambda *_: time.sleep(1000)", "silent-ranks", "no answer from rank 1"),
        ("os.environ['OMP_NUM_THREADS'] = '7'", "threads-differ", "OMP_NUM_THREADS differs between ranks: 1, 7"),
        ("sys.modules['mpi_ef'].__version__ = '0.0.1'", "versions-differ", "ranks have different versions of mpi_ef"),
    ],
    ids=["check raises", "link raises", "sum raises", "check hangs", "MPI hangs", "silent", "threads", "versions"],
)
def test_a_broken_rank_hangs_nobody_and_is_named(tmp_path, fault, name, words):
    ended = broken(tmp_path, 2, fault, patience=4 if "sleep" in fault else 20)
    said = [finding["what"] for finding in read(ended)["findings"] if finding["name"] == name]
    assert any(words.replace("HOST", os.uname().nodename) in text for text in said), ended.text
    assert (ended.status != 0) == any(found["level"] == "error" for found in read(ended)["findings"])
    assert "Traceback" not in ended.text


def test_a_doctor_that_is_broken_itself_hangs_nobody(tmp_path):
    ended = broken(tmp_path, 2, "all_ranks.placements_of = None", rank=0)
    assert ended.status != 0
    assert "doctor: not looked at: TypeError" in names(ended)["check-failed"]["what"]
    assert "Traceback" not in ended.text
    assert ended.seconds < patience.limit(60)


def test_a_rank_that_is_killed_ends_the_doctor(tmp_path):
    ended = broken(tmp_path, 3, "registry.Check.facts = lambda *_: os.kill(os.getpid(), 9)")
    assert ended.status != 0
    assert ended.seconds < patience.limit(60)


# ---- tasks that are no world


def copy(rank, *arguments, tasks=2, **environment):
    """One of several copies that srun has started with the wrong --mpi=."""
    told = {"SLURM_STEP_NUM_TASKS": str(tasks), **({} if rank is None else {"SLURM_PROCID": str(rank)})}
    return alone(*arguments, **told, **environment)


def alone(*arguments, **environment):
    command = [sys.executable, "-m", "mpi_ef.jobs.doctor.program", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=patience.limit(60), check=False, env=os.environ | environment
    )


def test_one_of_the_lonely_copies_speaks_for_all():
    first, second = copy(0), copy(1)
    assert (first.returncode, second.returncode) == (1, 0)  # srun returns the highest
    assert second.stdout == ""
    assert "EVERY TASK IS RANK 0 OF ITS OWN WORLD" in first.stdout
    text = " ".join(first.stdout.split())
    assert "2 tasks were started by srun (SLURM_STEP_NUM_TASKS=2)" in text
    assert all(f"--mpi={choice}" in text for choice in ("pmix", "pmi2", "cray_shasta"))
    assert all(len(line) <= 100 for line in first.stdout.splitlines())


def test_lonely_copies_that_do_not_know_which_they_are_all_speak():
    done = copy(None, "--json")
    assert done.returncode == 1
    assert [finding["name"] for finding in json.loads(done.stdout)["findings"]] == ["lonely-ranks"]


def test_tasks_without_an_mpi_library(tmp_path):
    nowhere = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    first, second, third = (
        copy(rank, "--out", str(tmp_path), SLURM_LOCALID=str(rank % 2), **nowhere) for rank in range(3)
    )
    assert (first.returncode, second.returncode, third.returncode) == (1, 0, 0)
    assert "mpi4py finds no MPI library" in first.stdout
    assert second.stdout + second.stderr + third.stdout == ""
    assert third.stderr.startswith(f"mpi-ef doctor: task 2 on {os.uname().nodename} has no MPI: RuntimeError")
    assert "Traceback" not in first.stdout + first.stderr


def test_lonely_copies_under_another_mpiexec():
    done = alone(MV2_COMM_WORLD_SIZE="2", MV2_COMM_WORLD_RANK="0")
    assert done.returncode == 1
    assert "the mpiexec that belongs to this library" in " ".join(done.stdout.split())
