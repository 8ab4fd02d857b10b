"""Sequential gradient coding: loads, every job in time whatever is late, two rules of waiting, simulations. No ranks."""

import numpy as np
import pytest
import virtual
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_ef.coded import (
    GC,
    MSGC,
    SRSGC,
    Blocks,
    Cyclic,
    FractionalRepetition,
    choose,
    code_for,
    gilbert_elliott,
    profile_of,
    scheduled,
    scheme_of,
    simulate,
)
from mpi_ef.coded.blocks import quorums
from mpi_ef.coded.codes import mask_of
from mpi_ef.coded.simulator import candidates
from mpi_ef.collectives.lateness import Lateness
from mpi_ef.errors import OptionError, ShapeError
from mpi_ef.jobs import figures
from mpi_ef.jobs.report import program as report
from mpi_ef.jobs.reproduce import program as reproduce
from mpi_ef.jobs.reproduce.outcome import ReproduceConfig


@pytest.mark.parametrize(("n", "burst", "window", "lam", "reattempt", "multiplexed"), [
    (6, 1, 2, 2, 1 / 3, 0.25), (6, 2, 3, 2, 1 / 3, 0.25), (16, 2, 5, 4, 0.1875, 0.0852272727),
    (16, 1, 2, 4, 0.1875, 0.1041666667), (256, 1, 2, 256, None, 0.0078125),
])
def test_loads(n, burst, window, lam, reattempt, multiplexed):
    """Golden values of the design; what a worker is given adds up to the load."""
    assert MSGC(burst, window, lam).load(n) == pytest.approx(multiplexed, abs=1e-10)
    if reattempt is not None:
        assert SRSGC(burst, window, lam).load(n) == pytest.approx(reattempt, abs=1e-12)
    for scheme in (MSGC(burst, window, lam), GC(1), *([SRSGC(burst, window, lam)] if reattempt else [])):
        shares = scheme.shares(n)
        assert shares.sum() == pytest.approx(1)
        slots = scheme.own if lam == n and isinstance(scheme, MSGC) else scheme.slots
        given = [sum(shares[chunk] for slot in range(slots) for chunk in scheme.task(0, i, slot, n).chunks)
                 for i in (0, n - 1)]
        assert given == pytest.approx([scheme.load(n) * slots / scheme.slots] * 2)
        bounds = scheme.bounds(n, 1000)
        assert (bounds[0], bounds[-1], bounds.size) == (0, 1000, shares.size + 1)
        assert (np.diff(bounds) >= 0).all()


def test_loads_without_a_code_are_those_of_the_next():
    """There is no well-conditioned code for 256 workers and lam = 27 (golden: .00754): FR(31) costs 0.5 % more."""
    assert MSGC(1, 2, 27).code(256) == FractionalRepetition(31)
    assert 0.0075431035 < MSGC(1, 2, 27).load(256) < 1.005 * 0.0075431035
    assert code_for(7, 1) == Blocks(2)
    assert GC(1).load(7) == 3 / 7


@pytest.mark.parametrize("s", range(8))
def test_blocks_are_a_code_of_the_same_load(s):
    """Laws of gradient codes: any n - s answers give the sum of all parts, each worker has s + 1 of them."""
    rng = np.random.default_rng(s)
    for n in range(s + 1, 20):
        code = Blocks(s)
        if n % (s + 1) and (n - s) % 2 == 0 and (s % 2 or n < 2 * s + 2):
            with pytest.raises(OptionError, match=f"take s={s + 1}"):
                code.check(n)
            continue
        b = code.matrix(n)
        assert ((b != 0).sum(axis=1) == s + 1).all()
        members, least = quorums(code, n)
        for _ in range(40):
            have = np.ones(n, bool)
            have[rng.choice(n, rng.integers(0, min(n, s + 3)), replace=False)] = False
            mask = mask_of(np.flatnonzero(have).tolist())
            assert code.decodable(mask, n) == (have @ members >= least).all()
            assert code.decodable(mask, n) or have.sum() < n - s
            if code.decodable(mask, n):
                a = code.decode(mask, n)
                assert not a[~have].any()
                assert np.abs(a @ b - 1).max() < 1e-10
            else:
                with pytest.raises(OptionError, match="always are"):
                    code.decode(mask, n)


def test_blocks_amplify_less_than_one_circle():
    assert Blocks(3).amplification(10) == pytest.approx(Cyclic(3).amplification(6))
    assert Blocks(5).amplification(16) < Cyclic(5).amplification(16) / 7
    for n, s in ((5, 1), (9, 2), (12, 4), (13, 5), (24, 6), (32, 9)):
        code = code_for(n, s)
        assert code.s >= s
        assert code_for(n, code.s) == code


def small_schemes(rng, n):
    burst = int(rng.integers(1, 4))
    lam = int(rng.integers(0, n + 1))
    if rng.random() < 0.5:
        return MSGC(burst, int(rng.integers(2, 5)), lam)
    scheme = SRSGC(burst, 1 + burst * int(rng.integers(1, 3)), lam)
    return scheme if scheme.s < n else GC(min(lam, n - 1))


class Workers:
    """Workers that compute tasks of jobs with random gradients, and a server that keeps the results."""

    def __init__(self, scheme, n, jobs, rule, rng):
        self.schedule, self.n, self.jobs = scheduled(scheme, n, jobs=jobs, rule=rule), n, jobs
        chunks = scheme.shares(n).size
        self.gradients = rng.normal(size=(jobs, chunks, 3))
        self.results, self.under_way, self.decoded, self.waits, self.late = {}, {}, {}, 0, 0

    def give(self):
        for worker in self.schedule.free():
            tasks = self.schedule.tasks(worker)
            if tasks:
                assert len({task.job for task in tasks}) == len(tasks)
                self.under_way[worker] = (self.schedule.round, [
                    np.array(task.weights) @ self.gradients[task.job, list(task.chunks)] for task in tasks], tasks)

    def answer(self, worker):
        began, vectors, tasks = self.under_way.pop(worker)
        self.late += began < self.schedule.round
        counts = self.schedule.delivered(worker)
        assert len(counts) == len(vectors) == len(tasks)
        for task, asked, vector in zip(counts, tasks, vectors, strict=True):
            assert task in (asked, None)
            if task is not None:
                assert task not in self.results
                self.results[task] = vector

    def decode(self):
        for job in self.schedule.finished():
            g = sum(a * self.results[task] for task, a in self.schedule.decode(job))
            whole = self.gradients[job].sum(axis=0)
            self.decoded[job] = self.schedule.round, np.abs(g - whole).max() / np.abs(self.gradients[job]).sum()

    def run(self, slow, restart):
        """Let those answer in a round that are not slow, and if one must wait all others too, first the first."""
        while self.schedule.begin():
            if restart:
                self.schedule.lost(np.array(self.schedule.awaited(), int))
                self.under_way.clear()
            self.give()
            asleep = slow[self.schedule.round]
            for worker in [worker for worker in self.under_way if not asleep[worker]]:
                self.answer(worker)
            self.give()  # whose answer was late
            for worker in [worker for worker in self.under_way if not asleep[worker]]:
                self.answer(worker)
            self.waits += self.schedule.must_wait()
            while self.schedule.must_wait():
                self.answer(min(self.under_way))
                self.give()
            self.decode()
        return self


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from(["lazy", "paper"]), st.booleans(), st.floats(0.0, 0.9))
def test_every_job_is_decoded_in_time(seed, n, rule, restart, share):
    """Law 7, with real vectors, late answers that count and such that are thrown away."""
    rng = np.random.default_rng(seed)
    scheme, jobs = small_schemes(rng, n), int(rng.integers(1, 9))
    run = Workers(scheme, n, jobs, rule, rng).run(rng.random((jobs + scheme.delay, n)) < share, restart)
    assert sorted(run.decoded) == list(range(jobs))
    for job, (decoded_in, error) in run.decoded.items():
        assert job <= decoded_in <= job + scheme.delay
        assert error <= 1e-12
    assert not restart or run.late == 0
    assert not run.schedule.begin()


def test_the_lazy_rule_waits_less_in_all():
    """Law 8: over many random patterns in total; there may be a run in which it waits more often."""
    total = {"lazy": 0, "paper": 0}
    for seed in range(120):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(4, 10))
        scheme = small_schemes(rng, n)
        late = gilbert_elliott(30 + scheme.delay, n, rng.uniform(0.02, 0.2), rng.uniform(0.2, 0.9), 9.0, seed=seed)
        for rule in total:
            total[rule] += simulate(scheme, late, part_seconds=1.0, rest_seconds=0.0, jobs=30, rule=rule, grace=0.0,
                                    restart=True).waits
    assert 0 < total["lazy"] < 0.85 * total["paper"], total


def test_a_late_answer_counts_and_frees_its_worker():
    """M-SGC, 3 workers: worker 2 answers two rounds late, and is given tasks of that round, none of those between."""
    schedule = scheduled(MSGC(1, 3, 1), 3, jobs=4)  # T = 2, two chunks of each worker's own, one group
    assert schedule.begin()
    given = {worker: schedule.tasks(worker) for worker in schedule.free()}
    assert [(task.job, task.slot, task.chunks) for task in given[2]] == [(0, 0, (4,))]
    schedule.delivered(0), schedule.delivered(1)
    assert not schedule.must_wait()
    assert schedule.begin()
    assert schedule.free() == [0, 1]
    assert [(task.job, task.slot) for task in schedule.tasks(0)] == [(1, 0), (0, 1)]
    schedule.tasks(1), schedule.delivered(0), schedule.delivered(1)
    assert schedule.must_wait()  # of job 0 both of worker 2's chunks are missing, and one round is left
    assert schedule.awaited() == [2]
    assert schedule.delivered(2) == given[2]
    assert schedule.free() == [2]
    assert not schedule.must_wait()
    assert [(task.job, task.slot) for task in schedule.tasks(2)] == [(1, 0), (0, 1)]
    assert schedule.begin()
    assert [[(task.job, task.slot) for task in schedule.tasks(worker)] for worker in schedule.free()] == [
        [(2, 0), (1, 1), (0, 2)]] * 2
    schedule.delivered(0), schedule.delivered(1)
    assert schedule.must_wait()
    schedule.delivered(2)
    assert schedule.finished() == [0]  # without worker 2's sum
    assert [(task.worker, task.slot) for task, _ in schedule.decode(0)] == [
        *((i, j) for i in range(3) for j in range(2)), (0, 2)]
    assert [(task.job, task.slot) for task in schedule.tasks(2)] == [(2, 0), (1, 1)]  # none of the finished job


def test_selective_reattempt_asks_only_as_many_as_are_needed():
    """4 workers, FR(1): twins are 0, 2 and 1, 3. Of job 0 nobody but worker 0 has answered."""
    schedule = scheduled(SRSGC(1, 2, 2), 4, jobs=3)
    schedule.begin()
    for worker in schedule.free():
        schedule.tasks(worker)
    schedule.delivered(0)
    assert not schedule.must_wait()
    schedule.lost(np.array([1, 2, 3]))
    schedule.begin()
    assert [schedule.tasks(worker)[0].job for worker in schedule.free()] == [1, 0, 1, 1]
    schedule.delivered(0), schedule.delivered(2), schedule.delivered(3)
    assert schedule.must_wait()
    schedule.delivered(1)
    assert schedule.finished() == [0, 1]
    assert [(task.worker, a) for task, a in schedule.decode(0)] == [(0, 1.0), (1, 1.0)]


def test_what_comes_of_a_finished_job_does_not_count():
    """The job is decoded from what it was finished with: nothing else was kept."""
    schedule = scheduled(SRSGC(1, 2, 2), 4, jobs=3)
    schedule.begin()
    for worker in schedule.free():
        schedule.tasks(worker)
    schedule.delivered(2), schedule.delivered(3)
    assert schedule.finished() == [0]
    assert schedule.finished() == []
    assert schedule.delivered(0) == (None,)
    assert [task.worker for task, _ in schedule.decode(0)] == [2, 3]
    schedule.begin(), schedule.tasks(0), schedule.tasks(2)
    assert schedule.delivered(1) == (None,)
    assert [task.worker for task, _ in schedule.decode(0)] == [2, 3]
    schedule.tasks(1), schedule.delivered(0), schedule.delivered(1), schedule.begin()
    with pytest.raises(OptionError, match="job 0 cannot be decoded in round 2"):
        schedule.decode(0)


def test_the_rule_of_the_paper_lets_rounds_with_few_slow_workers_pass():
    """The second model of SR-SGC: up to s slow workers in each round, whoever they are."""
    def waits(scheme, slow):
        rng = np.random.default_rng(0)
        return Workers(scheme, 6, len(slow) - scheme.delay, "paper", rng).run(np.array(slow, bool), restart=True).waits

    one_each = np.eye(6)
    always = np.eye(6)[[0] * 6]
    assert waits(SRSGC(1, 2, 2), one_each) == waits(SRSGC(1, 2, 2), always) == 0  # s = 1
    assert waits(SRSGC(1, 3, 2), np.eye(6)[[0, 0, 1, 2, 3, 4]]) == 0  # the same of windows of 3
    assert waits(SRSGC(1, 2, 2), np.eye(6)[[0] * 6] + np.eye(6)[[1] * 6]) == 2  # 2 > s: every other round
    assert waits(MSGC(1, 2, 1), one_each) == 3  # lam = 1: of two rounds one; none at the end is left out
    twice = np.zeros((5, 6))
    twice[:3:2, :3] = 1
    assert waits(MSGC(1, 3, 5), twice) == 1  # who was slow in round 0 is so in round 2, more than B = 1 round later
    assert waits(MSGC(2, 3, 5), twice) == 1
    assert waits(MSGC(3, 3, 5), twice) == 0
    assert waits(MSGC(2, 3, 5), twice[[0, 0, 1, 1, 1]]) == 0


@pytest.mark.parametrize(("make", "text"), [
    (lambda: SRSGC(2, 4, 1), "SRSGC: burst=2 does not divide window - 1=3; take window=3"),
    (lambda: SRSGC(3, 2, 1), "SRSGC: burst=3 does not divide window - 1=1; take window=4"),
    (lambda: MSGC(0, 3, 1), "MSGC: burst=0 is not a positive integer"),
    (lambda: MSGC(1, 1, 1), "MSGC: window=1 is less than 2"),
    (lambda: MSGC(1, 2, -1), "MSGC: lam=-1 is negative"),
    (lambda: GC(1.5), "GC: s=1.5 is not a non-negative integer"),
    (lambda: scheduled(MSGC(1, 2, 5), 4), "MSGC: lam=5 of 4 workers cannot be slow; take lam=4 or less"),
    (lambda: scheduled(GC(4), 4), "s=4 of 4 workers cannot all be missing; take s=3 or less"),
    (lambda: scheduled(GC(1), 4, rule="lzy"), "there is no rule 'lzy'; did you mean lazy"),
    (lambda: scheduled("gc", 4), "'gc' is no scheme"),
    (lambda: scheme_of("sgc:1"), "scheme 'sgc:1' is not known; take for example gc:1, srsgc:1,2,2 or"),
    (lambda: scheme_of("msgc:1,2"), "scheme 'msgc:1,2' is not known"),
    (lambda: scheme_of("srsgc:2,4,1"), "SRSGC: burst=2 does not divide window - 1=3"),
    (lambda: scheduled(GC(1), 4).tasks(0), "worker 0 of 4 is not free in round -1"),
    (lambda: scheduled(GC(1), 4).delivered(0), "nothing of worker 0 is under way in round -1"),
    (lambda: scheduled(GC(1), 4).decode(0), "job 0 cannot be decoded in round -1"),
    (lambda: simulate(GC(1), [[-1.0, 0.0]], part_seconds=1, rest_seconds=0), "-1 seconds in round 0 are negative"),
    (lambda: simulate(GC(1), [1.0, 0.0], part_seconds=1, rest_seconds=0), "shape (2,), where (rounds, workers) was"),
    (lambda: simulate(GC(1), [[1.0, 0.0]], part_seconds=-1, rest_seconds=0), "part_seconds=-1 is negative"),
    (lambda: gilbert_elliott(3, 3, 0.0, 0.5, 1.0), "enter=0.0 is not in (0, 1]"),
])
def test_wrong_options_are_told_in_one_line(make, text):
    with pytest.raises((OptionError, ShapeError)) as caught:
        make()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", [GC(3), SRSGC(2, 5, 3), MSGC(1, 3, 4)])
def test_schemes_are_texts_too(scheme):
    text = repr(scheme).lower().replace("(", ":").rstrip(")")
    assert scheme_of(repr(scheme)) == scheme_of(text) == scheme_of(scheme) == scheme


@pytest.mark.parametrize("scheme", [GC(1), SRSGC(2, 3, 2), MSGC(2, 3, 2), MSGC(1, 3, 4)])
def test_there_may_be_no_last_job(scheme):
    """The same tasks as with a number of jobs, up to that."""
    endless, ending = scheduled(scheme, 4), scheduled(scheme, 4, jobs=9)
    for number in range(9):
        assert endless.begin()
        assert ending.begin()
        for worker in range(4):
            assert endless.tasks(worker) == ending.tasks(worker)
            endless.delivered(worker), ending.delivered(worker)
        assert endless.finished() == ending.finished() == [
            job for job in [number - (scheme.delay if isinstance(scheme, MSGC) and scheme.lam < 4 else
                                      scheme.own - 1 if isinstance(scheme, MSGC) else 0)] if job >= 0]
    assert endless.begin()
    assert ending.begin() == (scheme.delay > 0)


def test_a_round_that_must_not_end_does_not():
    schedule = scheduled(GC(0), 2, jobs=2)
    schedule.begin()
    with pytest.raises(OptionError, match="round 0 cannot end.* wait for workers \\[0, 1\\]"):
        schedule.begin()
    schedule.tasks(0), schedule.tasks(1), schedule.delivered(1)
    assert schedule.must_wait()
    with pytest.raises(OptionError, match="wait for workers \\[0\\]"):
        schedule.begin()


def test_times_by_hand():
    """Round without anybody late: 1 + 2 load n."""
    late = np.zeros((4, 4))
    late[1, 2] = 10.0
    times = {"part_seconds": 2.0, "rest_seconds": 1.0}
    assert simulate(GC(0), late, **times).seconds == 4 * 3 + 10
    assert simulate(GC(1), late, **times).seconds == 4 * 5
    assert simulate(GC(1), late, relative=True, **times).seconds == 4 * 5
    assert simulate(GC(0), late, relative=True, **times).seconds == 3 * 3 + 3 * 11
    # Load n = 1.5, rounds of 4; the late one has begun at 4. At the end of round 2 its second chunk of job 0 is wanted.
    run = simulate(MSGC(1, 3, 4), late, grace=0.0, **times)
    assert (run.delay, run.load, run.waits) == (2, 3 / 8, 1)
    assert run.seconds == 18 + 3 * 4  # rounds 3 to 5 begin when it has come
    late[1, 2] = np.inf
    assert simulate(GC(0), late, **times).seconds == np.inf
    assert simulate(GC(1), late, **times).seconds == 4 * 5
    assert simulate(MSGC(1, 3, 4), late, grace=0.0, **times).seconds == 5 * 4  # what was lost is given again
    late[1, 2] = np.nan
    assert simulate(GC(0), late, **times).seconds == 4 * 3
    assert simulate(SRSGC(1, 2, 2), late, vector_seconds=5.0, **times).seconds == 4 * 5  # nothing is left for round 4
    assert simulate(MSGC(1, 2, 4), late, vector_seconds=5.0, **times).seconds == 4 * (1 + 4 + 5)


def test_the_fastest_scheme_is_chosen():
    """Nobody late: uncoded. One always late, another one each time: gradient coding. Models to spare: less load."""
    times = {"part_seconds": 1.0, "rest_seconds": 0.1}
    assert choose(np.zeros((5, 4)), delay=0, **times)[0].scheme == GC(0)
    late = 50.0 * np.eye(6)
    assert choose(late, delay=0, **times)[0].scheme == GC(1)
    ranked = choose(late, delay=4, restart=True, grace=0.1, **times)
    assert ranked[0].scheme.delay > 0
    assert ranked[0].seconds < 0.9 * next(run.seconds for run in ranked if run.scheme == GC(1))
    assert [run.seconds for run in ranked] == sorted(run.seconds for run in ranked)
    assert len({run.scheme for run in ranked}) == len(ranked)
    assert {run.scheme for run in ranked} == set(candidates(6, 4))
    assert choose(late.astype(np.float32), delay=4, restart=True, grace=0.1, **times) == ranked


def test_slow_workers_come_in_bursts():
    slow = gilbert_elliott(4000, 8, 0.05, 0.5, 2.0, seed=3) > 0
    assert slow.mean() == pytest.approx(0.05 / 0.55, rel=0.1)
    begun = slow[1:] & ~slow[:-1]
    assert slow.sum() / begun.sum() == pytest.approx(2.0, rel=0.1)


def test_a_report_draws_what_was_simulated(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, path: path.write_text("drawn"))
    virtual.results(1, lambda comm: reproduce.run(comm, "sequential", ReproduceConfig(out=tmp_path, steps=4)))
    assert "times: on real ranks, 4 or more; mpiexec -n 4 mpi-ef reproduce sequential" in (tmp_path / "sequential" /
                                                                                         "table.txt").read_text()
    report.main([str(tmp_path / "sequential"), "--plot", str(tmp_path / "drawn.png")])
    assert (tmp_path / "drawn.png").read_text() == "drawn"
    assert "what is demanded is of runs of all steps" in (tmp_path / "sequential" / "table.txt").read_text()


def test_what_was_recorded_is_a_profile():
    """Worker 1 answers its first step late, and is asked nothing meanwhile; worker 2 has answered for the last time."""
    seen = Lateness(3)
    for step, answers in enumerate([{0: 5, 2: 5}, {0: 6}, {0: 7}, {1: 15, 0: 16}]):
        seen.begin(step)
        for worker, seconds in answers.items():
            if step == 3 and worker == 1:
                seen.arrived(0, 1, 14)
            seen.arrived(step, worker, seconds)
        seen.over(step)
    profile = profile_of(seen.rows)
    assert profile.tolist() == [[0, 9, 0], [0, pytest.approx(np.nan, nan_ok=True), np.inf],
                                [0, pytest.approx(np.nan, nan_ok=True), np.inf], [1, 0, np.inf]]
    times = {"part_seconds": 1.0, "rest_seconds": 0.0}
    assert simulate(GC(0), profile[:, :2], **times).seconds == 9 + 4 + 1
    assert simulate(GC(0), profile, **times).seconds == np.inf
    with pytest.raises(ShapeError, match="\\(3,\\), where"):
        profile_of([1, 2, 3])
