"""Checkpoints of real processes: round trips at several world sizes, a rank that fails, all ranks killed inside a save."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from launching import run, start

from mpi_ef.checkpoint import lock, open_checkpoint

LIMIT = 120

PROGRAM = """
import os, sys
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
from mpi_ef.checkpoint import Store
from mpi_ef.errors import CheckpointError

store, first, last, bad = Store(sys.argv[1], keep_last=2), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
found = store.newest(comm)
if comm.rank == 0:
    print("found", found and (found.step, found.world_size), flush=True)
x = np.empty(500_000, np.float32)
for step in range(first, last):
    x[:] = step
    state = dict(replicated={"x": x}, per_rank={"e": np.full(1000 + comm.rank, step + 0.25 * comm.rank)},
                 document=[step], rank_document=[step, comm.rank])
    if bad == str(comm.rank):
        import mpi_ef.checkpoint.rankfile as rankfile
        def full(*arguments):
            raise OSError(28, "No space left on device")
        rankfile.os.posix_fallocate = full
    try:
        if step % 2:
            store.save(comm, step, **state)
        else:
            store.save_async(comm, step, **state)
        if comm.rank == 0:
            print("saved", step, flush=True)
    except CheckpointError as error:
        print(f"rank {comm.rank}: {error}", flush=True)
try:
    store.finish(comm)
except CheckpointError as error:
    print(f"rank {comm.rank}: {error}", flush=True)
"""


@pytest.fixture
def program(tmp_path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


def is_whole(path: Path) -> None:
    found = open_checkpoint(path)
    step = found.step
    assert found.document == [step]
    assert (found.replicated("x") == np.float32(step)).all()
    for rank in range(found.world_size):
        assert (found.per_rank("e", rank) == step + 0.25 * rank).all()
        assert found.rank_document(rank) == [step, rank]
    assert found.verify() == []


def test_from_three_ranks_to_two_and_back(program, tmp_path):
    for n, steps, told in ((3, (1, 4), "None"), (2, (4, 5), "(3, 3)"), (4, (5, 7), "(4, 2)")):
        ended = run(n, program, tmp_path / "run", *steps, "nobody", within=LIMIT)
        assert ended.status == 0, ended.text
        assert f"found {told}" in ended.text
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "LATEST",
        "RUNS",
        "step-00000005",
        "step-00000006",
    ]
    is_whole(tmp_path / "run" / "step-00000006")


def test_a_rank_without_space_fails_all_and_nothing_else(program, tmp_path):
    assert run(2, program, tmp_path / "run", 1, 2, "nobody", within=LIMIT).status == 0
    ended = run(3, program, tmp_path / "run", 2, 4, "2", within=LIMIT)
    assert ended.status == 0, ended.text
    lines = ended.lines_with("No space left on device")
    assert len({line.partition(": ")[0] for line in lines}) == 3, ended.text
    assert all("rank 2; 1 of 3 ranks failed" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["LATEST", "RUNS", "step-00000001"]
    is_whole(tmp_path / "run" / "step-00000001")


def test_all_ranks_killed_inside_a_save(program, tmp_path):
    rng, first = np.random.default_rng(0), 1
    for _ in range(4):
        process = start(3, program, tmp_path / "run", first, 100_000, "nobody")
        lines = []
        while not lines or not lines[-1].startswith("saved"):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        kill_all(program)
        while (owner := lock.Owner.read(tmp_path / "run" / lock.LOCK)) and not owner.gone(0.0):
            time.sleep(0.01)  # the rank that publishes may be a fork without the name of the program
        text = process.communicate()[0]
        saved = [int(line.split()[1]) for line in [*lines, *text.splitlines()] if line.startswith("saved ")]
        steps = sorted((tmp_path / "run").glob("step-*"))
        is_whole(steps[-1])
        newest = int(steps[-1].name[5:])
        assert newest >= max(saved) - 1  # the last one may have been in flight
        first = newest + 1
    ended = run(2, program, tmp_path / "run", first, first + 1, "nobody", within=LIMIT)
    assert f"found ({first - 1}, 3)" in ended.text
    is_whole(tmp_path / "run" / f"step-{first:08d}")
    assert not list((tmp_path / "run").glob(".tmp*"))


def kill_all(program: Path) -> None:
    """Kill the ranks too: a launcher gives them process groups of their own."""
    left = True
    while left:
        left = False
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and str(program) in (entry / "cmdline").read_text(errors="replace"):
                    os.kill(int(entry.name), signal.SIGKILL)
                    left |= (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            except (FileNotFoundError, ProcessLookupError):
                continue
