"""Ranks die, and the others go on without a new start: the same bits as stopping and starting with fewer ranks."""

import os
import signal
from pathlib import Path

import pytest
import resident
from launching import finish, run, start
from test_interruption import LIMIT, MLP, STEPS, assert_same, is_stopped, ranks_of, summary, wait_for
from test_interruption import arguments as training
from test_interruption import faulty as faulty_training

from mpi_ef.comm.nodes import RANKS_PER_NODE
from mpi_ef.errors import LaunchError
from mpi_ef.runtime.ulfm import OPTIONS, check

ULFM = OPTIONS.split()


def with_ulfm():
    """Tell whether the MPI beside this Python can let ranks outlive others."""
    return run(1, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())").lines_with("Open MPI v5")


@pytest.fixture(scope="module", autouse=True)
def _open_mpi():
    if not with_ulfm():
        pytest.skip("only Open MPI 5 lets ranks outlive others")


def arguments(out, *more):
    return training(out, *MLP, *more)


def by_rank(out):
    """Return the processes that train into this folder by their ranks, all seen at one moment."""
    return {int(environment["OMPI_COMM_WORLD_RANK"]): pid
            for pid, (words, environment) in resident.processes().items() if str(out) in words}


def faulty(signal_, at, ranks, out, *more):
    """Start 4 ranks of which some send themselves a signal at a known place."""
    words = faulty_training(signal_, at, ranks, out, *MLP, "--on-failure", "shrink", "--keep", 40, *more)
    return start(4, *words, launcher=ULFM)


def resumed(ended):
    """Return the steps after which the run went on."""
    return [int(line.split()[3].rstrip(";")) for line in ended.lines_with("resumed after step")]


def stepwise(out, *parts):
    """Do the same by new starts: `parts` are numbers of ranks, each with the step after which the next takes over."""
    begun = 0
    for ranks, step in parts:
        ended = run(ranks, *arguments(out, "--steps", parts[-1][1], "--resume", "redistribute", "--stop-after",
                                      step - begun), within=LIMIT)
        assert ended.status == 0, ended.text
        begun = step
    return out


def test_the_one_that_writes_dies(tmp_path):
    out = tmp_path / "run"
    ended = finish(faulty("SIGKILL", 67, [0], out), within=LIMIT)
    assert ended.status == 0, ended.text
    assert ended.lines_with("rank 0 died; 3 of 4 go on"), ended.text
    (step,) = resumed(ended)
    assert summary(out)["ranks"] == 3
    assert summary(out)["config"]["resume"] == "no"  # as it was started
    assert_same(out, stepwise(tmp_path / "by-hand", (4, step), (3, STEPS)))


IN_PAIRS = """
import os
import signal
import numpy as np
from mpi4py import MPI
from mpi_ef.collectives import DenseMean, pairwise
from mpi_ef.runtime.ulfm import outlive

pairwise.UNDER_WAY = 1  # so that with four ranks too one waits for a message of a rank that has left

def program(comm, failures):
    plan = DenseMean(comm, 300_000)
    assert plan.between_nodes is not None
    x = np.full(plan.d, 1.0 + comm.Get_rank(), np.float32)
    for step in range(4):
        if comm.Get_rank() == 2 and step == 2 and not failures:
            plan._rank_order._pairs._kernels.mean_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        plan.exchange(x)
    if comm.Get_rank() == 0:
        print(f"{failures} died; mean {plan.mean.min():.1f} {plan.mean.max():.1f}", flush=True)

outlive(MPI.COMM_WORLD, program)
"""


def test_a_death_in_the_middle_of_a_mean_in_pairs():
    """Those that wait for one of the living, which has left, learn of it."""
    ended = run(4, "-c", IN_PAIRS, launcher=ULFM, within=LIMIT, **{RANKS_PER_NODE: "1"})
    assert ended.lines_with("rank 2 died; 3 of 4 go on"), ended.text
    assert ended.lines_with("1 died; mean 2.0 2.0"), ended.text


def test_two_die_one_after_the_other(tmp_path):
    """While another holds its breath: all others wait for it."""
    out = tmp_path / "run"
    process = faulty("SIGSTOP", [70, 130], [2], out)
    for victim in (1, 3):
        wait_for(lambda: any(is_stopped(pid) for pid in ranks_of(out)), process)
        ranks = by_rank(out)
        os.kill(ranks[victim], signal.SIGKILL)
        os.kill(ranks[2], signal.SIGCONT)
    ended = finish(process, within=LIMIT)
    assert ended.status == 0, ended.text
    assert ended.lines_with("rank 3 died; 2 of 4 go on"), ended.text
    first, second = resumed(ended)
    assert 40 <= first < second
    assert summary(out)["ranks"] == 2
    assert_same(out, stepwise(tmp_path / "by-hand", (4, first), (3, second), (2, STEPS)))


def test_death_before_the_first_checkpoint(tmp_path):
    out = tmp_path / "run"
    ended = finish(faulty("SIGKILL", 15, [1], out, "--checkpoint-every", 200), within=LIMIT)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("no checkpoint yet")) == 1, ended.text
    assert_same(out, stepwise(tmp_path / "by-hand", (3, STEPS)))


def stopped(process, out, victim):
    """Kill a rank and let the others wait for it: the launcher, which tells of deaths, is stopped."""
    wait_for(lambda: any(is_stopped(pid) for pid in ranks_of(out)), process)
    process.send_signal(signal.SIGSTOP)
    os.kill(by_rank(out)[victim], signal.SIGKILL)


def test_a_signal_is_not_forgotten(tmp_path):
    """It reaches a rank that waits for the dead one."""
    out = tmp_path / "run"
    process = faulty("SIGSTOP", 67, [3], out)
    stopped(process, out, 3)
    os.kill(by_rank(out)[1], signal.SIGUSR1)
    process.send_signal(signal.SIGCONT)
    ended = finish(process, within=LIMIT)
    assert ended.status == 0, ended.text
    (step,) = resumed(ended)
    assert ended.lines_with(f"stopped after step {step + 1}: SIGUSR1 on rank 1"), ended.text
    assert (out / "requeue").exists()
    assert not (out / "summary.json").exists()


def test_an_error_after_a_death_ends_all(tmp_path):
    out = tmp_path / "run"
    process = faulty("SIGSTOP", 67, [3], out)
    stopped(process, out, 3)
    for path in out.glob("checkpoints/step-*/rank-*"):
        path.write_bytes(b"")
    process.send_signal(signal.SIGCONT)
    ended = finish(process, within=LIMIT)
    assert ended.status == 2, ended.text
    assert len(ended.lines_with("none is whole")) == 1, ended.text


def test_a_death_does_not_open_the_folder_of_another_run(tmp_path):
    """A new run is refused there, also when a rank dies while it is starting."""
    out = tmp_path / "run"
    assert run(1, *arguments(out, "--stop-after", 20), within=LIMIT).status == 0
    before = (out / "metrics.jsonl").read_bytes()
    ended = finish(faulty("SIGKILL", "building", [2], out), within=LIMIT)
    assert ended.status == 2, ended.text
    assert ended.lines_with("rank 2 died"), ended.text
    assert len(ended.lines_with("has checkpoints of another run")) == 1, ended.text
    assert (out / "metrics.jsonl").read_bytes() == before


def test_it_has_to_be_started_so():
    good = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_mpi_ft_enable": "1", "OMPI_MCA_mpi_preconnect_mpi": "1"}
    check(good | {"OMPI_MCA_coll": "^hcoll,han"})
    for bad in ({}, {"OMPI_MCA_coll": "han"}, {"OMPI_MCA_coll": "^hcoll"}):
        with pytest.raises(LaunchError, match="start with Open MPI's mpirun --with-ft ulfm"):
            check(good | bad)
    ended = run(2, *arguments("nowhere", "--on-failure", "shrink"), within=LIMIT)
    assert ended.status == 2
    assert len(ended.lines_with("ranks would not outlive others")) == 1, ended.text


@pytest.mark.exhaustive
def test_a_model_and_an_optimizer_of_ones_own_outlive_a_death(tmp_path):
    """What is run with two ranks to the end is what the third one's death has left of three."""
    out, root = tmp_path / "run", Path(__file__).parents[2]
    mine = ["--model", "my_model:build(samples=400)", "--optimizer", "my_optimizer:Normalized", "--lr", "0.02"]
    words = faulty_training("SIGKILL", 67, [2], out, *mine, "--on-failure", "shrink")
    path = {"PYTHONPATH": f"{root / 'examples'}:{root}"}
    ended = finish(start(3, *words, launcher=ULFM, **path), within=LIMIT)
    assert ended.status == 0, ended.text
    (step,) = resumed(ended)
    assert summary(out)["ranks"] == 2
    by_hand = tmp_path / "by-hand"
    for ranks, more in ((3, ["--stop-after", step]), (2, ["--resume", "redistribute"])):
        again = run(ranks, *training(by_hand, *mine, *more), within=LIMIT, **path)
        assert again.status == 0, again.text
    assert_same(out, by_hand)


IN_ROUNDS = """
import os, signal
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
from mpi_ef.collectives import Peers

peers = Peers(comm, 200_000, wait_for=3, patience_seconds=200.0)
while peers.round < 20:
    if comm.rank == 2 and peers.round >= 10:
        os.kill(os.getpid(), signal.SIGKILL)
    peers.exchange(np.full(200_000, comm.rank, np.float32))
print(f"rank {comm.rank} has not heard {peers.close()}", flush=True)
peers.leave(0)
"""


def test_rounds_between_peers_go_on_without_a_dead_one():
    """Nobody waits for it at the end, as MPI says that it is dead."""
    ended = run(4, "-c", IN_ROUNDS, launcher=ULFM, within=LIMIT)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("has not heard (2,)")) == 3, ended.text
