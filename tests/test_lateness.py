"""Who is slow, by numbers that were worked out by hand."""

import json
import tracemalloc
import warnings
from dataclasses import replace
from io import BytesIO

import numpy as np
import programs
import pytest
import torch
import virtual

from mpi_ef import MpiEfError
from mpi_ef.coded import Blocks, Cyclic, FractionalRepetition
from mpi_ef.collectives import Lateness
from mpi_ef.collectives.lateness import _has_code
from mpi_ef.compress import TopK
from mpi_ef.errors import OptionError
from mpi_ef.jobs.delays import load_lateness, said_of, table_of
from mpi_ef.jobs.report import program as report
from mpi_ef.jobs.train import loop, waiting
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.optim import DistributedOptimizer, LocalSteps, OneBitAdam, waits

INF = np.inf


def told(n, steps, keep=4096):
    """Return what has seen these rows of delays."""
    lateness = Lateness(n, keep)
    for row in steps:
        lateness.add(row)
    return lateness


class TestCounts:
    def test_answers_in_time_late_and_missing(self):
        """Of four workers one is late in step 0, one does not come in it; in step 1 all come, one of them twice."""
        lateness = Lateness(4)
        lateness.begin(0)
        for i, seconds in ((2, 10.0), (0, 10.5)):
            lateness.arrived(0, i, seconds)
        lateness.over(0)
        lateness.over(0)
        lateness.begin(1)
        lateness.arrived(0, 1, 11.0)  # late
        for i in (0, 1, 2, 3, 3):
            lateness.arrived(1, i, 12.0 + i)
        assert lateness.in_time.tolist() == [1, 0, 1, 0]
        assert lateness.steps == 1  # step 1 is not over
        lateness.over(1)
        assert lateness.in_time.tolist() == [2, 1, 2, 1]
        assert lateness.late.tolist() == [0, 1, 0, 0]
        assert lateness.missing.tolist() == [0, 0, 0, 1]
        assert lateness.rows.tolist() == [[0.5, 1.0, 0.0, INF], [0.0, 1.0, 2.0, 3.0]]
        assert lateness.rows.dtype == np.float32
        assert lateness.numbers.tolist() == [0, 1]

    def test_an_answer_that_came_before_the_one_told_first(self):
        lateness = Lateness(3)
        lateness.begin(7)
        for i, seconds in ((0, 5.0), (1, 5.25), (2, 4.0)):
            lateness.arrived(7, i, seconds)
        assert lateness.rows.tolist() == [[1.0, 1.25, 0.0]]

    def test_a_step_without_an_answer_in_time(self):
        lateness = Lateness(2)
        lateness.begin(0)
        lateness.over(0)
        lateness.arrived(0, 1, 3.0)
        assert lateness.rows.tolist() == [[INF, 0.0]]
        assert lateness.late.tolist() == [0, 1]

    def test_lines_of_steps_in_which_most_are_missing_warn_of_nothing(self):
        lateness = told(4, [[0.0, INF, INF, INF], [0.0, 0.1, 0.2, 5.0], [0.0, 0.1, 0.2, 5.0]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lateness.lines(10.0)[0].startswith("waiting for the last rank took 98 % of 10 s")

    def test_the_ring_forgets_rows_but_no_count_and_no_sum(self):
        """Long runs say the same as if all had been kept; what comes for a row that is gone counts as late."""
        generator = np.random.default_rng(1)
        steps = generator.exponential(size=(50, 5))
        steps[generator.random(steps.shape) < 0.1] = INF
        short, long = told(5, steps, keep=8), told(5, steps)
        assert short.rows.shape == (8, 5)
        assert (short.rows == long.rows[-8:]).all()
        assert short.numbers.tolist() == [*range(42, 50)]
        assert (short.in_time == np.isfinite(steps).sum(axis=0)).all()
        assert (short.missing == long.missing).all()
        assert short.steps == 50
        assert [short.would_save(s) for s in range(5)] == pytest.approx([long.would_save(s) for s in range(5)], rel=1e-12)
        short.arrived(3, 2, 1.0)
        assert short.late.tolist() == [0, 0, 1, 0, 0]

    def test_steps_with_gaps(self):
        lateness = Lateness(2, keep=2)
        for step in (3, 10, 11):
            lateness.begin(step)
            lateness.arrived(step, 0, 1.0)
            lateness.over(step)
        lateness.arrived(10, 1, 4.0)
        lateness.arrived(3, 1, 9.0)
        assert lateness.rows.tolist() == [[0.0, 3.0], [0.0, INF]]
        assert lateness.late.tolist() == [0, 2]

    def test_nothing_is_kept_of_a_step_but_its_row(self):
        lateness = Lateness(16, keep=32)

        def steps(first):
            for step in range(first, first + 200):
                lateness.begin(step)
                for i in range(16):
                    lateness.arrived(step, i, step + 0.01 * i)
                lateness.over(step)

        steps(0)
        tracemalloc.start()
        steps(200)
        before = tracemalloc.get_traced_memory()[0]
        steps(400)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert abs(after - before) < 512
        assert peak - before < 4096


class TestWhoIsSlow:
    STEPS = ([0, 0.1, 0.6, 0.2], [0.1, 0, 0.5, 0.2], [0.1, 0.4, 0.15, 0], [0, 0.1, 0.8, INF])

    def test_what_a_code_would_have_saved(self):
        """By hand: largest less (n - s)-th of each step; with one that has not come, the last that has."""
        lateness = told(4, self.STEPS)
        assert lateness.would_save(0) == 0
        assert lateness.would_save(1) == pytest.approx(0.4 + 0.3 + 0.25 + 0.0)
        assert lateness.would_save(2) == pytest.approx(0.5 + 0.4 + 0.3 + 0.7)
        lateness.part_seconds = 0.125
        assert lateness.would_save(1) == pytest.approx(0.95 - 4 * 0.125)
        assert lateness.would_save(2) == pytest.approx(1.9 - 4 * 2 * 0.125)
        lateness.part_seconds = 10.0
        assert lateness.would_save(1) == pytest.approx(0.95 - 40)
        assert lateness.best() == (0, 0.0)

    def test_who_holds_up_the_others(self):
        lateness = told(4, self.STEPS)
        assert lateness.holding().astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
        assert lateness.quantiles() == pytest.approx(np.array([[0, 0.1, 0.5, 0.2], *[[0.1, 0.4, 0.8, INF]] * 2]))

    def test_two_slow_ranks_are_both_named_and_two_answers_less_are_needed(self):
        lateness = told(6, [[0, 0.01, 0.02, 1.0, 1.1, 0.01]] * 20)
        assert lateness.best()[0] == 2
        assert lateness.slow() == [3, 4]
        assert lateness.lines(40.0) == [
            "rank 3 is last in 100 % of steps, by .99 s (median)", "rank 4 is last in 100 % of steps, by 1.09 s (median)",
            "waiting for the last rank took 55 % of 40 s",
            "a code with s=2 would have saved 54 % of 40 s, not counting that each rank computes 3 parts instead of 1"]

    def test_a_code_that_is_there_is_named_before_one_that_is_not(self):
        """Of four ranks two are slow: s = 2, for which there is no code, saves most; one of s = 1 saves much as well."""
        lateness = told(4, [[0, 0.01, 0.5, 1.0]] * 20)
        lateness.part_seconds = 0.01
        assert lateness.best()[0] == 2
        assert lateness.lines(20.0)[-1] == "a code with s=1 would have saved 49 % of 20 s"
        both = told(4, [[0, 0.01, 1.0, 1.0]] * 20)  # s = 1 saves nothing here
        both.part_seconds = 0.01
        assert both.lines(20.0)[-1] == (
            "a code with s=2 would have saved 97 % of 20 s; there is none for 4 ranks, start one more or less")

    def test_most_workers_are_slow_where_one_is_quick(self):
        assert not told(3, [[0, 1.0, 1.0]] * 9).holding().any()

    def test_one_slow_rank_by_name(self):
        lateness = told(4, [[0, 0.01, 0.02, 0.53]] * 71 + [[0, 0.01, 0.02, 0.02]] * 29)
        lateness.part_seconds = 0.01
        assert lateness.lines(100.0, [f"rank {i} on node{i + 4}" for i in range(4)]) == [
            "rank 3 on node7 is last in 71 % of steps, by .52 s (median)",
            "waiting for the last rank took 37 % of 100 s", "a code with s=1 would have saved 35 % of 100 s"]
        lateness.part_seconds = 0.5  # a second part takes longer than waiting; who is slow is true all the same
        assert lateness.lines(100.0)[1:] == [
            "waiting for the last rank took 37 % of 100 s",
            "no code would have saved much: what it has each rank compute takes longer than waiting"]

    def test_nothing_to_say(self):
        generator = np.random.default_rng(2)
        assert Lateness(4).lines(0.0) == []
        assert told(1, [[0.0]]).lines(1.0) == []
        assert told(4, generator.random((100, 4)) * 1e-4).lines(10.0) == []  # all alike, and quick
        assert told(3, [[0, 0, 1.0]]).lines(100.0) == []  # 1 %

    @pytest.mark.parametrize("n", [2, 3, 8])
    def test_no_rank_is_named_where_each_is_last_as_often(self, n):
        """One of them is last, each in its turn: the code would help, and nobody is slow."""
        lines = told(n, [np.eye(n)[step % n] for step in range(24 * n)]).lines(48.0 * n)
        whom = "and no rank is it clearly more often than others"
        assert lines[0] == f"waiting for the last rank took 50 % of {48 * n} s, {whom}"
        assert lines[1].startswith(f"a code with s=1 would have saved 50 % of {48 * n} s, not counting")
        assert lines[1].endswith("; there is none for 3 ranks, start one more or less") == (n == 3)
        assert len(lines) == 2

    def test_a_run_with_a_code(self):
        """What it has saved, and whose answers nobody has waited for."""
        lateness = told(4, [[0, 0.1, 0, 5.0]] * 10)
        lateness.late[3], lateness.in_time[3] = 9, 1
        assert lateness.lines(10.0, s=1) == [
            "rank 3 is last in 100 % of steps, by 5 s (median)",
            "the code (s=1) has saved 49 s, in steps that took 10 s, "
            "not counting that each rank computes 2 parts instead of 1",
            "rank 3: of 10 answers 9 came late, 0 not at all"]
        lateness.part_seconds = 100.0  # a code that has only cost
        assert lateness.lines(10.0, s=1)[1] == "the code (s=1) has saved 0 s, in steps that took 10 s"


    def test_a_rank_that_is_stopped_for_good_is_missing_and_not_late_by_what_it_was_before(self):
        """No time from two answers before, no inf; and its answers, which have no time, are not what a code has saved."""
        lateness = told(4, [[0, 0.1, 0.005, 0.1]] * 2 + [[0, 0.1, INF, 0.11]] * 38)
        assert lateness.lines(4.0, s=1) == ["rank 2 is missing in the last 38 of 40 steps",
                                            "what the code (s=1) has saved is not known: 38 answers never came"]
        later = told(4, [[0, 0.1, INF, 0.1]] + [[0, 0.1, 5, 0.1]] * 15 + [[0, 0.1, INF, 0.1]] * 24)  # also after 15 answers
        assert later.lines(4.0)[0] == "rank 2 is missing in 25 of 40 steps"
        lateness.late[2], lateness.in_time[2] = 1, 1
        assert lateness.lines(4.0, s=1)[2:] == ["rank 2: of 40 answers 1 came late, 38 not at all"]
        short = told(4, [[0, 0.1, INF, 0.2]] * 20, keep=10)
        assert short.lines(1.0)[0] == "rank 2 is missing in all of the last 10 steps"
        assert short.lines(1.0)[-1] == "rank 2: of 20 answers 0 came late, 20 not at all"  # the rows tell of 10

    def test_a_rank_that_is_late_and_skips_steps_is_late_by_those_that_came(self):
        often = told(4, [[0, 0, 0.01, 0.31]] * 15 + [[0, 0, 0.01, INF]])  # its last answer is still to come
        assert often.lines(5.0, s=1)[0] == "rank 3 is last in 100 % of steps: missing in 1, else by .31 s (median of 15)"
        lateness = told(4, [[0, 0, 0.01, 0.31], [0, 0, 0.01, INF]] * 15)
        lateness.part_seconds = 0.01
        assert lateness.lines(5.0, s=1) == [
            "rank 3 is last in 100 % of steps: missing in 15, else by .31 s (median of 15)",
            "the code (s=1) has saved 4.2 s or more, in steps that took 5 s; 15 answers never came",
            "rank 3: of 30 answers 0 came late, 15 not at all"]

    def test_where_nobody_has_waited_for_all_nothing_is_said_of_it(self):
        lateness = told(4, [[0, 0.1, 0, 5.0]] * 10)
        assert lateness.lines(10.0, s=None, steps="rounds") == ["rank 3 is last in 100 % of rounds, by 5 s (median)"]


def test_it_is_known_for_how_many_workers_there_is_a_code():
    def there(code, n):
        try:
            code.check(n)
        except OptionError:
            return False
        return True

    for n in range(1, 49):
        for s in range(n):
            assert _has_code(n, s) == any(there(kind(s), n) for kind in (FractionalRepetition, Cyclic, Blocks)), (n, s)


class TestOverRestarts:
    def test_goes_on_as_if_it_had_not_stopped(self):
        generator = np.random.default_rng(3)
        steps = generator.exponential(size=(40, 3))
        whole, first, second = told(3, steps, 16), told(3, steps[:25], 16), Lateness(3, 16)
        second.load_state_dict(first.state_dict())
        for row in steps[25:]:
            second.add(row)
        for name, array in whole.state_dict().items():
            np.testing.assert_allclose(second.state_dict()[name], array, rtol=1e-12, err_msg=name)
        assert second.late is not first.late
        assert second.numbers.tolist() == [*range(24, 40)]

    def test_a_step_that_is_not_over_is_saved_as_over_and_goes_on_here(self):
        lateness = Lateness(2)
        lateness.begin(0)
        lateness.arrived(0, 0, 1.0)
        saved = Lateness(2)
        saved.load_state_dict(lateness.state_dict())
        assert saved.missing.tolist() == [0, 1]
        assert lateness.steps == 0
        lateness.arrived(0, 1, 2.0)
        lateness.over(0)
        assert lateness.in_time.tolist() == [1, 1]

    def test_into_a_shorter_ring(self):
        steps = np.random.default_rng(4).exponential(size=(30, 3))
        whole, short = told(3, steps), Lateness(3, 7)
        short.load_state_dict(whole.state_dict())
        assert (short.rows == whole.rows[-7:]).all()
        assert short.would_save(1) == pytest.approx(whole.would_save(1), rel=1e-6)

    def test_of_another_number_of_workers(self):
        with pytest.raises(MpiEfError, match=r"^Lateness: a state of 3 workers with 2 here; begin anew$"):
            Lateness(2).load_state_dict(Lateness(3).state_dict())

    def test_what_is_no_state_changes_nothing(self):
        lateness = told(2, [[0, 1.0]])
        before = lateness.state_dict()
        short = before | {"numbers": np.zeros(3)}
        for wrong, text in (({}, "the state has no rows"), (short, r"numbers .* \(3,\), not \(1,\)")):
            with pytest.raises(MpiEfError, match=rf"^Lateness: {text}.*; load what state_dict\(\) has returned$"):
                lateness.load_state_dict(wrong)
        assert all((lateness.state_dict()[name] == array).all() for name, array in before.items())


@pytest.mark.parametrize(("wrong", "text"), [
    (lambda: Lateness(0), r"Lateness: n=0 is not a positive integer; as many as there are workers"),
    (lambda: Lateness(2, keep=0), r"Lateness: keep=0 is not a positive integer; 4096 is usual"),
    (lambda: Lateness(2).arrived(0, 1, 1.0), r"Lateness: step 0 has not begun; call begin\(0\) first"),
    (lambda: Lateness(2).over(3), r"Lateness: step 3 has not begun; call begin\(3\) first"),
    (lambda: told(2, [[0, 1]]).begin(0), r"Lateness: step 0 begins after step 0; numbers of steps grow"),
    (lambda: told(2, [[0, 1]]).add([1, 2, 3]), r"Lateness.add: delays have shape \(3,\), not \(2,\): one for each worker"),
    (lambda: Lateness(2).would_save(2),
     r"Lateness.would_save: s=2 is not a non-negative integer up to 1; there are 2 workers"),
])
def test_what_it_refuses(wrong, text):
    with pytest.raises(MpiEfError, match=rf"^{text}$"):
        wrong()


# ---- of optimizers, by the clock of virtual ranks, which stands still while a rank computes

BUILT = {
    "gradient": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.5), placement="gradient"),
    "overlap": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.5), placement="gradient", overlap=True,
                                                     bucket_nbytes=24),
    "update": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.5)),
    "one-bit": lambda net, comm: OneBitAdam(net.parameters(), comm, freeze_step=3),
    "local": lambda net, comm: LocalSteps(sgd(net), comm, TopK(0.5), every=3),
}


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


def walk(net, optimizer, comm, pauses):
    """Take a step after each of these pauses, of this rank."""
    for seconds in pauses:
        comm.pause(seconds)
        optimizer.zero_grad()
        net(torch.ones(1, 3) + comm.Get_rank()).sum().backward()
        optimizer.step()


def seen(n, name, pauses):
    """Return the rows of delays that each rank has, given the pauses of each rank before each step."""
    def program(comm):
        net = torch.nn.Linear(3, 2)
        optimizer = BUILT[name](net, comm)
        walk(net, optimizer, comm, pauses[:, comm.Get_rank()])
        return optimizer.lateness().rows

    return virtual.results(n, program)


class TestOfOptimizers:
    @pytest.mark.parametrize("name", BUILT)
    def test_rows_are_how_late_each_rank_comes(self, name):
        """Ranks that have met begin the next step at one time, so they are as late as they have paused longer."""
        pauses = np.array([[5.0, 0, 0], [0, 0, 0.5], [0.25, 0, 1.0], [0, 0, 0], [0.5, 0.75, 0.125], [0, 0, 2.0]])
        expected = pauses[1:]  # the first meeting does not count
        if name == "local":
            expected = pauses.reshape(2, 3, 3).sum(axis=1)[1:]  # a round
        expected = expected - expected.min(axis=1, keepdims=True)
        for rows in seen(3, name, pauses):
            np.testing.assert_allclose(rows, expected, atol=1e-6)

    def test_calls_add_what_is_new_and_two_optimizers_have_their_own(self):
        def program(comm):
            nets = [torch.nn.Linear(3, 2) for _ in range(2)]
            optimizers = [BUILT["gradient"](net, comm) for net in nets]
            for step in range(6):
                for number, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                    walk(net, optimizer, comm, [(1 + number) * (comm.Get_rank() == number)])
                if step == 3:
                    assert [optimizer.lateness().steps for optimizer in optimizers] == [3, 3]
            found = [optimizer.lateness() for optimizer in optimizers]
            assert found[0] is optimizers[0].lateness()
            return [(lateness.rows.tolist(), lateness.lines(15.0)) for lateness in found]

        for (first, said), (second, said_second) in virtual.results(2, program):
            assert (first, second) == ([[1.0, 0.0]] * 5, [[0.0, 2.0]] * 5)
            assert said[0] == "rank 0 is last in 100 % of steps, by 1 s (median)"
            assert said_second[:2] == ["rank 1 is last in 100 % of steps, by 2 s (median)",
                                       "waiting for the last rank took 67 % of 15 s"]

    def test_steps_in_which_a_rank_has_no_data_are_no_rows(self):
        def program(comm):
            net, rank = torch.nn.Linear(3, 2), comm.Get_rank()
            optimizer = BUILT["gradient"](net, comm)
            with optimizer.join():
                walk(net, optimizer, comm, [rank] * (3 if rank == 0 else 7))
            return optimizer.lateness().rows.tolist()

        assert virtual.results(2, program) == [[[0.0, 1.0]] * 2] * 2

    def test_only_the_last_are_kept(self, monkeypatch):
        monkeypatch.setattr(waits, "KEEP", 3)
        pauses = np.zeros((9, 2))
        pauses[:, 1] = np.arange(9)
        for rows in seen(2, "gradient", pauses):
            assert rows.tolist() == [[0.0, 6.0], [0.0, 7.0], [0.0, 8.0]]

    def test_ranks_that_have_met_another_number_of_times_say_nothing(self):
        """So that no row is of different steps on different ranks."""
        def program(comm):
            net = torch.nn.Linear(3, 2)
            optimizer = BUILT["gradient"](net, comm)
            walk(net, optimizer, comm, [0.0] * 3)
            optimizer._handshake.waits.count += comm.Get_rank()
            walk(net, optimizer, comm, [0.0] * 2)
            return optimizer.lateness().steps

        assert virtual.results(2, program) == [0, 0]

    def test_ranks_that_ask_different_optimizers_raise(self):
        def program(comm):
            optimizers = [BUILT["gradient"](net, comm) for net in [torch.nn.Linear(3, 2) for _ in range(2)]]
            with pytest.raises(MpiEfError, match=r"lateness of optimizer \d+: ranks are in different calls"):
                optimizers[comm.Get_rank()].lateness()

        virtual.results(2, program)

    def test_of_one_rank_and_without_a_step(self):
        def program(comm):
            net = torch.nn.Linear(3, 2)
            optimizer = BUILT["gradient"](net, comm)
            none = optimizer.lateness().rows.shape
            walk(net, optimizer, comm, [0.0] * 3)
            return none, optimizer.lateness().rows.tolist(), optimizer.lateness().lines(10.0)

        assert virtual.results(1, program) == [((0, 1), [[0.0], [0.0]], [])]


# ---- of runs of mpi-ef train, by the same clock


@pytest.fixture
def slow_second_rank(monkeypatch):
    """Let rank 1 load its batches .25 s later than others."""
    next_batch = loop.Trainer.next_batch

    def slow(trainer):
        trainer.comm.pause(0.25 * (trainer.comm.Get_rank() == 1))
        return next_batch(trainer)

    monkeypatch.setattr(loop.Trainer, "next_batch", slow)


MLP = TrainConfig(model="mlp", batch=4, steps=12, warmup=2, log_every=3)


@pytest.mark.usefixtures("slow_second_rank")
class TestOfRuns:
    def test_a_run_says_who_was_slow(self, tmp_path, capsys):
        programs.trained(3, replace(MLP, out=tmp_path))
        assert "\nwho is slow           rank 1 is last in 100 % of steps, by .25 s (median)\n" in capsys.readouterr().out
        rows = load_lateness(tmp_path / "lateness.npz").rows  # of all steps but those in which kernels were loaded
        assert 4 <= len(rows) <= 11
        np.testing.assert_allclose(rows, np.tile([0, 0.25, 0], (len(rows), 1)), atol=1e-6)
        report.main([str(tmp_path)])
        shown = capsys.readouterr().out.splitlines()
        assert f"{tmp_path.name}: rank 1 is last in 100 % of steps, by .25 s (median)" in shown
        assert "  1         100 %     0.25 s     0.25 s     0.25 s" in shown

    def test_waiting_for_a_slow_rank_is_communicating(self, tmp_path):
        """Of the times of a step, the mean over ranks, of which two of three wait .25 s; it is no part of the update."""
        phases = programs.trained(3, replace(MLP, out=tmp_path))[0]["phases_seconds_per_step"]
        assert phases["communicate"] > 0.25 * 2 / 3 * 0.99

    def test_a_run_of_one_rank_says_nothing(self, tmp_path, capsys):
        programs.trained(1, replace(MLP, out=tmp_path))
        report.main([str(tmp_path)])
        assert "last in" not in capsys.readouterr().out
        assert not (tmp_path / "lateness.npz").exists()

    def test_rounds_of_local_steps(self, tmp_path):
        summary = programs.trained(2, replace(MLP, out=tmp_path, exchange_every=3))[0]
        assert summary["lateness"]["lines"][0] == "rank 1 is last in 100 % of rounds, by .75 s (median)"

    def test_a_run_that_went_on_tells_of_all_its_steps(self, tmp_path):
        """On another number of ranks of those there."""
        config = replace(MLP, out=tmp_path, checkpoint_every=4)
        programs.trained(2, replace(config, stop_after=4))
        first = load_lateness(tmp_path / "lateness.npz").steps
        programs.trained(2, replace(config, stop_after=4, resume="exact"))
        second = load_lateness(tmp_path / "lateness.npz").steps
        assert second >= first + 3 > 3
        with pytest.warns(RuntimeWarning, match="goes on with 3"):
            programs.trained(3, replace(config, resume="redistribute"))
        last = load_lateness(tmp_path / "lateness.npz")
        assert (last.n, last.steps) == (3, 3)

    def test_a_file_that_is_something_else_hinders_no_run(self, tmp_path):
        config = replace(MLP, out=tmp_path, checkpoint_every=4)
        programs.trained(2, replace(config, stop_after=4))
        (tmp_path / "lateness.npz").write_bytes(b"PK")
        programs.trained(2, replace(config, resume="exact"))
        assert load_lateness(tmp_path / "lateness.npz").steps <= 8


def test_what_a_part_takes_is_not_what_the_slow_one_of_two_ranks_takes():
    class Two:
        def Get_size(self): return 2
        def Get_rank(self): return 0
        def allgather(self, mine): return [mine] * 2 if isinstance(mine, dict) else [("n", 0.1), ("n", 10.0)]

    late = waiting.Waiting(Two(), None)
    late.add(np.array([[0.25] * 40, [0.0] * 40]), np.zeros(40, bool))
    lines = late.summary(11.0, 0.1, rounds=False)["lateness"]["lines"]
    assert lines[-1] == "a code with s=1 would have saved 90 % of 11 s"


def archive(**arrays):
    content = BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


@pytest.mark.parametrize("content", [
    b"", b"PK", b"\x93NUMPY", archive(), archive(rows=np.zeros((2, 2))), archive(in_time=np.array({}, object)),
    archive(zeros=np.zeros(9 << 20)), archive(**told(2, [[0, 1]]).state_dict() | {"late": np.zeros(3, np.int64)}),
    archive(**told(2, [[0, 1]]).state_dict() | {"numbers": np.zeros(3)})])
def test_what_is_no_file_of_delays(tmp_path, content):
    path = tmp_path / "lateness.npz"
    path.write_bytes(content)
    with pytest.raises(MpiEfError, match=r"lateness.npz: holds no delays of a run \(.*\); mpi-ef train writes them$"):
        load_lateness(path)


def test_what_a_summary_says_of_a_worker_that_is_missing_is_json():
    late = Lateness(2)
    for step in range(4):
        late.begin(step)
        late.arrived(step, 0, 0.1 * step)
        late.over(step)
    said = json.loads(json.dumps(said_of(late, ["x"], [0, 1]), allow_nan=False))
    assert said["median"][1] is None
    assert "missing" in table_of(said)[-1]


def test_a_table_of_many_ranks_has_those_that_are_last_most_often():
    many = {name: [rank / 100 for rank in range(40)] for name in ("last", "median", "quantile_95", "largest")}
    table = table_of({"lines": ["rank 39 is\x1b[2J slow"], **many})
    assert table[0] == "rank 39 is\\x1b[2J slow"
    assert [line.split()[0] for line in table[2:-1]] == [str(rank) for rank in range(24, 40)]
    assert table[-1] == "  and 24 ranks that are last less often"
    assert table_of({"lines": [], **many}) == []
    few = {name: [0.5, 0.5 if name == "last" else INF] for name in many}
    assert table_of({"lines": ["x"], "ranks": [3, 7], **few})[2:] == [  # of a run whose rank 0 is no worker, for example
        "  3          50 %      0.5 s      0.5 s      0.5 s", "  7          50 %    missing    missing    missing"]


@pytest.mark.parametrize("wrong", [
    {}, {"lines": [3]}, {"lines": ["a"], "last": [1]}, {"lines": ["a"], "last": [1], "median": ["x"]}, [], "x",
    {"lines": ["a"], "last": [1], "median": [1, 2], "quantile_95": [1], "largest": [1]},
    *({"lines": ["a"], "last": [1], "median": [1], "quantile_95": [1], "largest": [1], "ranks": ranks}
      for ranks in ([], ["x"], 3))])
def test_a_summary_with_wrong_lateness(tmp_path, wrong):
    programs.trained(1, replace(MLP, out=tmp_path, steps=3))
    found = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(found | {"lateness": wrong}))
    with pytest.raises(SystemExit, match="holds no finished run"):
        report.main([str(tmp_path)])
