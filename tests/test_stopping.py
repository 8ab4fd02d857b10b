"""All ranks stop after the same step."""

import os
import re
import signal
import time

import pytest
import virtual

from mpi_ef.errors import DisagreementError, OptionError
from mpi_ef.runtime.stopper import Stopper


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_one_rank_asks_and_all_stop_after_the_same_step(n, tmp_path):
    def program(comm):
        stopper = Stopper(comm, signals=())
        for step in range(20):
            if comm.Get_rank() == n - 1 and step == 7:
                stopper.request(signal.SIGUSR2)
            if stopper.should_stop():
                assert stopper.should_stop()
                stopper.mark_requeue(tmp_path / "new" / "requeue")
                return step, stopper.reason
        return None

    assert virtual.results(n, program) == [(7, f"SIGUSR2 on rank {n - 1}")] * n
    reason, steps = (tmp_path / "new" / "requeue").read_text().splitlines()
    assert reason == f"SIGUSR2 on rank {n - 1}"
    assert re.fullmatch(r"steps from \d{10,}\.\d{3} to \d{10,}\.\d{3}", steps)


def test_the_time_of_steps_is_that_of_the_process(tmp_path, monkeypatch):
    """A stopper that is built again after a rank has died counts from the first one's first step."""
    clock = iter(range(1000, 2000, 10))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(Stopper, "_first_asked", None)

    def program(comm):
        first, second = Stopper(comm, signals=()), Stopper(comm, signals=())
        for _ in range(3):
            first.should_stop()
        second.mark_requeue(tmp_path / "own", "a reason of its own")
        second.request()
        assert second.should_stop()
        second.mark_requeue(tmp_path / "mark")

    virtual.results(1, program)
    assert (tmp_path / "own").read_text() == "a reason of its own\n"
    assert (tmp_path / "mark").read_text() == "SIGTERM on rank 0\nsteps from 1000.000 to 1010.000\n"


def test_asking_seldom():
    def program(comm):
        stopper = Stopper(comm, signals=(), every=5)
        stopper.request(200)
        return [stopper.should_stop() for _ in range(6)], stopper.reason

    assert virtual.results(2, program) == [([False] * 4 + [True] * 2, "signal 200 on rank 0")] * 2


def test_the_deadline_of_rank_0_counts():
    def program(comm):
        late = time.time() + (30 if comm.Get_rank() == 0 else -1000)
        stopper = Stopper(comm, signals=(), deadline=late, margin_seconds=60)
        other = Stopper(comm, signals=(), deadline=time.time() + 100, margin_seconds=60)
        return stopper.should_stop(), stopper.reason, other.should_stop()

    assert virtual.results(2, program) == [(True, "the deadline is near", False)] * 2


def test_signals_set_a_flag_and_handlers_come_back():
    (comm,) = virtual.results(1, lambda comm: comm)
    before = signal.getsignal(signal.SIGUSR1)
    with Stopper(comm, signals=(signal.SIGUSR1,)) as stopper:
        assert not stopper.should_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopper.should_stop()
        assert stopper.reason == "SIGUSR1 on rank 0"
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"every": 0}, OptionError, "every=0 is not a positive integer"),
    ({"margin_seconds": -1.0}, OptionError, "margin_seconds=-1.0"),
])
def test_bad_options(options, error, text):
    for outcome in virtual.run(2, lambda comm: Stopper(comm, signals=(), **options)):
        assert isinstance(outcome, error)
        assert text in str(outcome)


def test_ranks_that_disagree_and_marks_without_a_reason(tmp_path):
    for outcome in virtual.run(2, lambda comm: Stopper(comm, signals=(), every=1 + comm.Get_rank())):
        assert isinstance(outcome, DisagreementError)
    for outcome in virtual.run(1, lambda comm: Stopper(comm, signals=()).mark_requeue(tmp_path / "x")):
        assert isinstance(outcome, OptionError)
    assert not (tmp_path / "x").exists()
