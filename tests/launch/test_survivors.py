"""Ranks die, and the others go on without a new start: the same bits as stopping and starting with fewer ranks."""

import os
import signal
from pathlib import Path

import pytest
from launching import finish, run, start
from test_interruption import LIMIT, arguments, assert_same, ranks_of, summary, wait_for

from mpi_ef.errors import LaunchError
from mpi_ef.jobs.survivors import OPTIONS, check

ULFM = OPTIONS.split()


def with_ulfm():
    """Tell whether the MPI beside this Python can let ranks outlive others."""
    return run(1, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())").lines_with("Open MPI v5")


@pytest.fixture(scope="module", autouse=True)
def _open_mpi():
    if not with_ulfm():
        pytest.skip("only Open MPI 5 lets ranks outlive others")


def rank_of(pid):
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (rank,) = (word.partition(b"=")[2] for word in words if word.startswith(b"OMPI_COMM_WORLD_RANK="))
    return int(rank)


def kill(out, rank):
    (victim,) = (pid for pid in ranks_of(out) if rank_of(pid) == rank)
    os.kill(victim, signal.SIGKILL)


def shrinking(out, *more):
    return start(4, *arguments(out, "--on-failure", "shrink", *more), launcher=ULFM)


def resumed(ended):
    """Return the steps after which the run went on."""
    return [int(line.split()[3].rstrip(";")) for line in ended.lines_with("resumed after step")]


def stepwise(out, *parts):
    """Do the same by new starts: `parts` are numbers of ranks, each with the step after which the next takes over."""
    begun = 0
    for ranks, step in parts:
        ended = run(ranks, *arguments(out, "--resume", "redistribute", "--stop-after", step - begun), within=LIMIT)
        assert ended.status == 0, ended.text
        begun = step
    return out


def test_the_one_that_writes_dies(tmp_path):
    out = tmp_path / "run"
    process = shrinking(out)
    wait_for(lambda: (out / "checkpoints" / "step-00000060").exists(), process)
    kill(out, 0)
    ended = finish(process, within=LIMIT)
    assert ended.status == 0, ended.text
    assert ended.lines_with("rank 0 of 4 died; 3 go on"), ended.text
    (step,) = resumed(ended)
    assert summary(out)["ranks"] == 3
    assert_same(out, stepwise(tmp_path / "by-hand", (4, step), (3, 300)))


def test_two_die_one_after_the_other(tmp_path):
    out = tmp_path / "run"
    process = shrinking(out, "--keep", 20)
    for victim, after in ((3, 40), (1, 120)):
        wait_for(lambda step=after: (out / "checkpoints" / f"step-{step:08d}").exists(), process)
        kill(out, victim)
    ended = finish(process, within=LIMIT)
    assert ended.status == 0, ended.text
    first, second = resumed(ended)
    assert 40 <= first < second
    assert summary(out)["ranks"] == 2
    assert_same(out, stepwise(tmp_path / "by-hand", (4, first), (3, second), (2, 300)))


def test_death_before_the_first_checkpoint(tmp_path):
    out = tmp_path / "run"
    process = shrinking(out, "--checkpoint-every", 200)
    wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    kill(out, 1)
    ended = finish(process, within=LIMIT)
    assert ended.status == 0, ended.text
    assert len(ended.lines_with("no checkpoint yet")) == 1, ended.text
    assert_same(out, stepwise(tmp_path / "by-hand", (3, 300)))


def test_an_error_after_a_death_ends_all(tmp_path):
    out = tmp_path / "run"
    process = shrinking(out)
    wait_for(lambda: (out / "checkpoints" / "step-00000060").exists(), process)
    os.kill(process.pid, signal.SIGSTOP)  # the launcher tells of the death when it goes on
    kill(out, 3)
    for path in out.glob("checkpoints/step-*/rank-*"):
        path.write_bytes(b"")
    os.kill(process.pid, signal.SIGCONT)
    ended = finish(process, within=LIMIT)
    assert ended.status == 2, ended.text
    assert len(ended.lines_with("none is whole")) == 1, ended.text


def test_it_has_to_be_started_so():
    with pytest.raises(LaunchError, match="start it with Open MPI's mpirun --with-ft ulfm"):
        check({"OMPI_MCA_mpi_ft_enable": "1"})
    ended = run(2, *arguments("nowhere", "--on-failure", "shrink"), within=LIMIT)
    assert ended.status == 2
    assert ended.lines_with("srun cannot"), ended.text
