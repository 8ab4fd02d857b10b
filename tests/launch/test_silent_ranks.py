"""MoNNA from rank to rank, with one that lies and one that is stopped; ranks for which MPI would wait at its end."""

import json
import re
from pathlib import Path

import pytest
from launching import run
from patience import limit

MONNA, TRAINING = (Path(__file__).with_name(name) for name in ("monna_program.py", "monna_training.py"))
LIMIT = 100


def monna(program=MONNA, **options):
    """Return what each rank has printed at the end of a run on 7 ranks."""
    ended = run(7, program, json.dumps(options), within=LIMIT)
    assert ended.status == 0, ended.text
    told = {one["rank"]: one for one in map(json.loads, re.findall(r"\{[^{}]*\}", ended.text))}
    assert sorted(told) == list(range(7)), ended.text
    return told


def test_a_training_ends_well_with_a_liar_and_a_rank_that_is_stopped():
    """`mpi_ef.MoNNA` under any pace: all honest ranks end near each other, and the liar is the one that they leave out."""
    told = monna(TRAINING, steps=90, liar=1, stopped=[3, 30, 60])
    honest = [one for rank, one in told.items() if rank != 1]
    accuracies = [one["accuracy"] for one in honest]
    assert min(accuracies) > 0.85
    assert max(accuracies) - min(accuracies) <= 0.05
    assert told[3]["jumps"] >= 1
    assert told[3]["steps"] < 90
    assert all(one["left"] == 0 for one in honest)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_every_honest_rank_is_trained_as_far_as_without_attack():
    quiet = [one["accuracy"] for one in monna(TRAINING).values()]
    for again in range(10):
        told = monna(TRAINING, liar=1, stopped=[3, 67, 133])
        accuracies = [one["accuracy"] for rank, one in told.items() if rank != 1]
        print(again, accuracies, quiet, [one["jumps"] for one in told.values()])
        assert max(*accuracies, *quiet) - min(*accuracies, *quiet) <= 0.05


@pytest.mark.exhaustive
def test_a_liar_and_a_rank_that_is_stopped_for_a_third_of_the_run_change_little():
    told = monna(rounds=120, liar=1, stopped=[3, 40, 80])
    honest = [one for rank, one in told.items() if rank != 1]
    accuracies = [one["accuracy"] for one in honest]
    assert min(accuracies) > 0.85
    assert max(accuracies) - min(accuracies) <= 0.05
    assert told[3]["jumps"] >= 1
    assert told[3]["rounds"] < 120
    assert all(one["silent"] == 0 for one in honest)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lie", [-1.0, 1000.0])
def test_every_honest_rank_comes_as_far_as_without_attack(lie):
    quiet = [one["accuracy"] for one in monna().values()]
    for again in range(10 if lie < 0 else 2):
        told = monna(liar=1, stopped=[3, 67, 133], lie=lie)
        accuracies = [one["accuracy"] for rank, one in told.items() if rank != 1]
        print(again, accuracies, quiet, told[3]["jumped_to"], [one["jumps"] for one in told.values()])
        assert max(*accuracies, *quiet) - min(*accuracies, *quiet) <= 0.05


LEFT_BEHIND = """
import json, os, signal, sys
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
from mpi_ef.collectives import Peers
from mpi_ef.errors import SilenceError

options = json.loads(sys.argv[1])
peers = Peers(comm, 3, wait_for=options["wait_for"], patience_seconds=options["patience"])
while peers.round < 20:
    if comm.rank in options["stopped"] and peers.round >= 10:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        heard = peers.exchange(np.full(3, comm.rank, np.float32))
    except SilenceError as error:
        print(f"caught by rank {comm.rank}: {error}", flush=True)
        break
else:
    print(f"rank {comm.rank} has not heard {peers.close()}", flush=True)
if "status" in options:
    peers.leave(options["status"])
"""


@pytest.fixture
def left_behind(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(LEFT_BEHIND, encoding="utf-8")
    return lambda n, **options: run(n, script, json.dumps(options | {"patience": limit(3)}), within=LIMIT)


def test_ranks_that_are_stopped_for_good_do_not_keep_mpi_from_ending(left_behind):
    ended = left_behind(4, wait_for=3, stopped=[2])
    assert ended.status not in (0, None), ended.text
    assert len(ended.lines_with("has not heard (2,)")) == 3, ended.text
    lines = ended.lines_with("mpi-ef: Peers: rank 2 on ")  # where the last rounds take long, others name it as silent before
    assert len([line for line in lines if " did not end with rank " in line]) == 3, ended.text


@pytest.mark.exhaustive
def test_a_program_may_end_well_without_them(left_behind):
    ended = left_behind(4, wait_for=3, stopped=[0], status=0)
    assert len(ended.lines_with("has not heard (0,)")) == 3, ended.text
    assert ended.status == 0, ended.text


@pytest.mark.exhaustive
def test_where_too_few_are_left_all_say_so_and_end(left_behind):
    ended = left_behind(4, wait_for=3, stopped=[1, 2])
    assert ended.status not in (0, None), ended.text
    for rank in (0, 3):
        (line,) = ended.lines_with(f"caught by rank {rank}: Peers: rank {rank} has ") or pytest.fail(ended.text)
        assert "rank 1 on " in line
        assert "rank 2 on " in line
