"""A signal to one process of a running program stops all of it, with status 0; so does a deadline."""

import os
import signal
import time
from pathlib import Path

import pytest
from launching import finish, run, start
from test_interruption import wait_for

PROGRAM = Path(__file__).with_name("stopping_program.py")


def left_after(folder, n):
    """Return the steps and reasons with which the ranks have left."""
    words = [(folder / f"left-{rank}").read_text().split(maxsplit=1) for rank in range(n)]
    return {step for step, _ in words}, {reason for _, reason in words}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_one_rank(tmp_path, number):
    process = start(3, "-m", "mpi4py", PROGRAM, tmp_path, 0)
    files = [tmp_path / f"pid-{rank}" for rank in range(3)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), process)
    time.sleep(0.3)
    os.kill(int((tmp_path / "pid-1").read_text()), number)
    ended = finish(process, within=30)
    assert ended.status == 0, ended.text
    steps, reasons = left_after(tmp_path, 3)
    assert len(steps) == 1
    assert reasons == {f"{number.name} on rank 1"}
    assert (tmp_path / "requeue").read_text().startswith(f"{number.name} on rank 1\nsteps from ")


def test_a_deadline(tmp_path):
    ended = run(2, "-m", "mpi4py", PROGRAM, tmp_path, 2, within=30)
    assert ended.status == 0, ended.text
    steps, reasons = left_after(tmp_path, 2)
    assert len(steps) == 1
    assert reasons == {"the deadline is near"}
