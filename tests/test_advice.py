"""Which plan is advised: from what was measured, by trying, and what becomes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import virtual
from vectors_for_tests import gaussian

from mpi_ef import DistributedOptimizer, ErrorFeedback, LowRank, advise
from mpi_ef.collectives import DenseMean, GatherMean, LowRankMean, NodeMean, TwoPhaseMean, build_plan
from mpi_ef.collectives import advice as advice_module
from mpi_ef.collectives import survey as survey_module
from mpi_ef.collectives.forecast import Cluster, Costs
from mpi_ef.collectives.survey import Survey, survey
from mpi_ef.comm.attributes import kept_with
from mpi_ef.compress import Identity, Quantize, Sign, TopK
from mpi_ef.errors import DisagreementError, OptionError
from mpi_ef.optim import hindsight as hindsight_module

BF16 = Quantize("bf16")


def known(comm, cluster, *, costs=None, free=0):
    """Let this be what was measured on a communicator."""
    kept_with(comm, survey_module._Known).survey = Survey(cluster, costs or Costs(), free, False, 0.0)


def waits(every, rail=0.0, node=0.0):
    of = {("gather", "all"): every, ("scatter", "all"): every}
    return of | ({("gather", "rail"): rail, ("scatter", "rail"): rail, ("barrier", "node"): node} if rail else {})


# Measured on throttled hosts, and of clusters in docs/scaling.md: nodes, ranks of each, latency, bytes a second, waits,
# entries, what is sent, and the plan that follows.
RECORDED = [
    (4, 1, 1.3e-4, 11.8e6, waits(4e-3), 2_000_000, TopK(0.01, values=BF16), "gather"),
    (4, 1, 1.3e-4, 11.8e6, waits(4e-3), 2_000_000, TopK(0.1, values=BF16), "gather"),
    (16, 1, 1.3e-4, 11.8e6, waits(8e-3), 2_000_000, TopK(0.1, values=BF16), "two-phase"),
    (4, 4, 6e-4, 11.8e6, waits(2e-2, 1e-2, 5e-3), 2_000_000, TopK(0.01, values=BF16), "nodes, gather"),
    (32, 8, 1e-5, 1.2e9, {}, 100_000_000, TopK(0.01, values=BF16), "nodes, two-phase"),
    (32, 8, 1e-5, 1.2e9, {}, 100_000_000, Sign(block=4096), "nodes, two-phase"),
    (4, 8, 1e-5, 1.2e9, {}, 100_000_000, Identity(), "nodes, dense"),
    (32, 8, 1e-5, 1.2e9, {}, 100_000_000, Identity(), "dense"),  # takes a ninth longer, and its bits do not depend on nodes
    (64, 1, 1e-5, 1.2e9, {}, 10_000_000, Identity(), "dense"),
]


@pytest.mark.parametrize(("nodes", "each", "latency", "speed", "of", "d", "what", "plan"), RECORDED)
def test_what_was_recorded_leads_to_the_plan(nodes, each, latency, speed, of, d, what, plan):
    def program(comm):
        known(comm, Cluster(nodes, each, latency, speed, of))
        return advise(comm, d, what, probe=False)

    found = virtual.results(4, program, ranks_per_node=2 if each > 1 else 1)
    assert {advice.plan for advice in found} == {plan}
    assert "dense" not in plan or isinstance(what, Identity)  # the compressor is what was asked for
    assert all(row.measured is None for row in found[0].rows)
    assert f"->{plan}" in found[0].table()


def test_a_plan_that_wants_too_much_memory_is_none():
    """Gathered messages of 4 ranks, and owners whose buffers are smaller; a tenth of what is free may be taken."""
    def program(comm, free):
        known(comm, Cluster(4, 1, 1e-4, 1e9), free=free)
        return advise(comm, 10_000_000, TopK(0.01, values=BF16), probe=False)

    plenty = virtual.results(4, lambda comm: program(comm, 10**12))[0]
    assert plenty.plan == "gather"
    assert all(row.fits for row in plenty.rows)
    narrow = {row.plan: row.forecast.memory_nbytes for row in plenty.rows}
    assert narrow["gather"] < narrow["two-phase"]
    little = virtual.results(4, lambda comm: program(comm, int(9 * narrow["two-phase"])))[0]
    assert [row.plan for row in little.rows if not row.fits] == ["dense", "two-phase"]
    assert "more than a tenth" in little.table()


def test_what_was_tried_decides():
    """All ranks take the times of the slowest of them; a forecast three times the best is not tried."""
    def program(comm):
        mine = advise(comm, 20_000, TopK(0.05), seconds=0.05)
        return mine, survey(comm)

    for found, surveyed in virtual.results(4, program, ranks_per_node=2):
        tried = [row for row in found.rows if row.measured is not None]
        assert 2 <= len(tried) <= 3
        assert found.plan in {row.plan for row in tried}
        assert found.seconds <= 1.2 * min(row.measured for row in tried)
        assert surveyed is found.survey
        assert surveyed.cluster.nodes == surveyed.cluster.ranks_per_node == 2
        assert surveyed.costs.select > 0 < surveyed.cluster.bytes_per_second
        assert {("gather", "all"), ("scatter", "rail"), ("barrier", "node")} <= surveyed.cluster.waits.keys()


def test_of_two_that_take_about_as_long_the_more_exact_is_taken():
    rows = [advice_module.Row(plan, None, seconds) for plan, seconds in (("gather", 1.19), ("two-phase", 1.0))]
    assert advice_module._chosen(rows) == "gather"
    assert advice_module._chosen([replace(rows[0], measured=1.21), rows[1]]) == "two-phase"


def test_auto_builds_what_is_advised_once_for_vectors_of_one_length():
    """Also for several buckets; where nothing is advised it is the plan of the compressor."""
    def program(comm):
        known(comm, Cluster(4, 1, 1e-4, 1e7))
        plans = [build_plan("auto", comm, what, d, np.float32) for what, d in (
            (TopK(0.01), 50_000), (TopK(0.01), 40_000), (Identity(), 50_000), (LowRank(1, shapes=((8, 8),)), 64))]
        rule = build_plan("auto", comm, TopK(0.01), 50_000, np.float32, gather=True)
        return [type(plan) for plan in plans], [plan.advice is not None for plan in plans], type(rule)

    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advice_module, "advise", lambda *of: asked.append(of) or advise(*of, probe=False))
        rows = virtual.results(4, program)
    assert len(asked) == 2 * 4
    for kinds, advised, rule in rows:
        assert kinds == [GatherMean, GatherMean, DenseMean, LowRankMean]
        assert advised == [True, True, True, False]
        assert rule is GatherMean
    assert virtual.results(1, lambda comm: type(build_plan("auto", comm, TopK(0.01), 50, np.float32))) == [GatherMean]


@pytest.mark.parametrize("kind", [GatherMean, TwoPhaseMean, NodeMean])
def test_who_was_advised_badly_is_told_once(kind):
    """After 24 steps, on rank 0, with how far off it was."""
    def program(comm):
        net = torch.nn.Linear(20, 10)
        names = {GatherMean: "gather", TwoPhaseMean: "two-phase", NodeMean: "nodes, gather"}
        known(comm, Cluster(2, 2, 1e-4, 1e9))
        said = replace(advise(comm, 210, TopK(0.1), probe=False), plan=names[kind])
        rows = tuple(replace(row, measured=1e-9) for row in said.rows)
        kept_with(comm, advice_module._Given).advice[TopK(0.1), (210).bit_length()] = replace(said, rows=rows)
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.1), plan="auto")
        for step in range(30):
            for p in net.parameters():
                p.grad = torch.from_numpy(gaussian(comm.Get_rank(), p.numel(), step=step)).view_as(p)
            optimizer.step()
            steps[comm.Get_rank()] = step + 1
        return type(getattr(optimizer.feedback, "node", optimizer.feedback.plan))

    steps, told = {}, []

    def show(message, *_, **more):
        if "plan='auto'" in str(message):
            told.append((steps[0], str(message)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hindsight_module.warnings, "warn", show)
        assert set(virtual.results(4, program, ranks_per_node=2)) == {kind}
    [(step, text)] = told
    assert step == 23
    assert "times as long as when" in text


@pytest.mark.parametrize(("arguments", "text"), [
    ((0,), "advise: d=0 is not the length of a vector"),
    ((10, "TopK"), "advise: compressor='TopK' is no compressor"),
    ((10, LowRank(2)), "advise: what LowRank(rank=2, seed=0) costs is not known; take its own plan"),
    ((10, TopK(0.1), 0.0), "advise: seconds=0.0"),
])
def test_a_mistake_is_told_on_all_ranks(arguments, text):
    def program(comm):
        of = dict(zip(("d", "compressor", "seconds"), arguments, strict=False))
        return advise(comm, **of)

    for error in virtual.run(3, program):
        assert isinstance(error, OptionError)
        assert text in str(error)
    for error in virtual.run(2, lambda comm: advise(comm, 10 + comm.Get_rank(), probe=False)):
        assert isinstance(error, DisagreementError)


def test_a_rule_works_through_what_is_advised():
    def program(comm):
        known(comm, Cluster(2, 2, 1e-4, 1e7))
        plan = build_plan("auto", comm, TopK(0.05), 4000, np.float32)
        feedback = ErrorFeedback("ef14", plan)
        return [feedback.step(gaussian(comm.Get_rank(), 4000, step=step)).copy() for step in range(3)]

    rows = virtual.results(4, program, ranks_per_node=2)
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_communicators_that_cannot_be_split_are_advised_what_needs_no_nodes():
    """Such as process groups of torch, with several ranks on a host."""
    class Whole:
        def __init__(self, comm):
            self._comm = comm

        def __getattr__(self, name):
            if name == "Split":
                raise AttributeError(name)
            return getattr(self._comm, name)

    def program(comm):
        whole = Whole(comm)
        plan = build_plan("auto", whole, TopK(0.05), 2000, np.float32)
        return [row.plan for row in advise(whole, 2000, TopK(0.05), probe=False).rows], type(plan)

    for plans, kind in virtual.results(4, program, ranks_per_node=2):
        assert plans == ["dense", "gather", "two-phase"]
        assert kind in {GatherMean, TwoPhaseMean}


def test_on_one_node_no_plan_is_advised_that_compresses_nothing():
    """As all plans of nodes are there, whatever is between nodes."""
    def program(comm, what, **options):
        known(comm, Cluster(1, 4, 0.0, np.inf, waits(1e-4)))
        return advise(comm, 10_000_000, what, probe=False, **options)

    found = virtual.results(4, lambda comm: program(comm, TopK(0.01)), ranks_per_node=4)[0]
    assert [row.plan for row in found.rows] == ["dense", "nodes, dense", "gather", "two-phase"]
    assert found.plan in {"gather", "two-phase"}
    assert virtual.results(4, lambda comm: program(comm, Identity()), ranks_per_node=4)[0].plan in {"dense", "nodes, dense"}
    exact = virtual.results(4, lambda comm: program(comm, TopK(0.01), dense=True), ranks_per_node=4)[0]
    assert exact.plan in {"dense", "nodes, dense"}


def test_what_is_advised_can_be_built_by_its_name():
    def program(comm):
        known(comm, Cluster(2, 2, 1e-4, 1e7))
        said = advise(comm, 2000, Identity(), probe=False)
        return [type(build_plan(replace(said, plan=name).specification, comm, Identity(), 2000, np.float32))
                for name in advice_module._PLANS]

    assert virtual.results(4, program, ranks_per_node=2)[0] == [DenseMean, NodeMean, GatherMean, NodeMean, TwoPhaseMean,
                                                                NodeMean]


def test_nothing_is_tried_for_which_there_is_no_room(monkeypatch):
    """Neither vectors nor buffers; where no plan fits, it is the one with the smallest buffers, and none that is dense."""
    monkeypatch.setattr(advice_module, "_tried", lambda *_: pytest.fail("tried"))

    def program(comm, free):
        known(comm, Cluster(4, 1, 1e-4, 1e9), free=free)
        return advise(comm, 10**11, TopK(0.01))

    for free in (10**9, 10**12):
        found = virtual.results(4, lambda comm, free=free: program(comm, free))[0]
        assert found.plan == "gather"
        assert found.rows[0].plan == "dense"
        assert not found.rows[0].fits


def test_ranks_on_hosts_and_on_devices_take_the_plan_of_the_compressor():
    def program(comm):
        device = "side:cpu" if comm.Get_rank() % 2 else "cpu"
        plan = build_plan("auto", comm, TopK(0.05), 5000, np.float32, device)
        return plan.advice is None, plan.device

    assert virtual.results(4, program) == [(True, "cpu"), (True, "side:cpu")] * 2


class Channel:
    """An exchange that takes so many seconds, through a plan that was advised or not."""

    def __init__(self, each, said=None, d=100, dtype=np.float32):
        self.each, self.seconds, self.d, self.dtype = each, {"communicate": 0.0}, d, np.dtype(dtype)
        self.advice = None if said is None else Advised(said)

    def step(self):
        self.seconds["communicate"] += self.each


class Advised:
    plan, d = "gather", 100

    def __init__(self, seconds):
        self.seconds = seconds


@pytest.mark.parametrize(("channels", "warns"), [
    ([Channel(4.0, 1.0)], True),
    ([Channel(4.0, 1.0), Channel(4.0, 2.0)], False),
    ([Channel(2.0, 1.0), Channel(9.0)], False),  # the other one was not advised
    ([Channel(8.0, 1.0, d=190, dtype=np.float64)], False),  # advice was for 100 entries of float32
    ([Channel(13.0, 1.0, d=190, dtype=np.float64)], True),
])
def test_exchanges_are_compared_with_advice_of_theirs(channels, warns, recwarn):
    hindsight = hindsight_module.Hindsight(channels)
    for _ in range(30):
        for channel in channels:
            channel.step()
        hindsight.look(channels, 0)
    assert len(recwarn) == warns


def test_a_pause_is_no_slow_link(recwarn):
    """Exchanges that are as fast as was said, but for some that wait for processors."""
    channel = Channel(1.0, 1.0)
    hindsight = hindsight_module.Hindsight([channel])
    for step in range(30):
        channel.seconds["communicate"] += 1.0 if step % 3 else 100.0
        hindsight.look([channel], 0)
    assert not len(recwarn)


def test_dense_steps_are_not_compared_with_what_was_advised(recwarn):
    """Nor is what building the plan after them takes."""
    def program(comm):
        feedback = ErrorFeedback("ef14", GatherMean(comm, TopK(0.1), 100), dense_steps=40)
        feedback.plan.advice = Advised(1.0)
        hindsight = hindsight_module.Hindsight([feedback])
        for step in range(70):
            feedback.step(gaussian(comm.Get_rank(), 100, step=step))
            (feedback._dense or feedback.plan).seconds["communicate"] += 100.0 if step < 40 else 1.0
            hindsight.look([feedback], comm.Get_rank())
        return hindsight._advice

    assert virtual.results(1, program) == [[]]
    assert not [one for one in recwarn if "auto" in str(one.message)]
