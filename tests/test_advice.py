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
