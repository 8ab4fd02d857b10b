"""Two levels: sums inside a node, compressed messages between nodes."""

import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import virtual
from stored import MemoryStore
from vectors_for_tests import gaussian

from mpi_ef import Training
from mpi_ef.collectives import DenseMean, GatherMean, NodeMean, TwoPhaseMean, build_plan, plan_for
from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK, lazy
from mpi_ef.errors import DisagreementError, DtypeError, NonFiniteError, OptionError, PeerError, ShapeError
from mpi_ef.feedback import ErrorFeedback, NodeFeedback
from mpi_ef.jobs.bench.traffic import counted
from mpi_ef.optim import DistributedOptimizer, OneBitAdam
from mpi_ef.testing.faults import FaultyComm
from mpi_ef.testing.law import same_bits
from mpi_ef.testing.plan_laws import PlanLaws
from mpi_ef.testing.regression import loss_of, net_of

D = 3001
TOP = TopK(0.05, values=Quantize("bf16"))
# Ranks, and which are on one node: all numbers a node, unequal nodes, ranks that are not in the order of their nodes.
PLACES = {"4 = 4 x 1": (4, 1), "4 = 2 x 2": (4, 2), "4 = 1 x 4": (4, 4), "6 = 2 x 3": (6, 3), "5 = 3 + 2": (5, 3),
          "7 = 3 + 3 + 1": (7, 3), "6, in turns": (6, lambda rank: rank % 2), "5, odd": (5, lambda r: int(r in (0, 3)))}
each_place = pytest.mark.parametrize(("n", "node"), PLACES.values(), ids=PLACES)
each_inner = pytest.mark.parametrize("inner", ["GatherMean", TwoPhaseMean, "TwoPhaseMean(reply=TopK(0.2))"])


def mine(comm, step=0, d=D, dtype=np.float32):
    return gaussian(comm.Get_rank(), d, dtype, step=step)


def rule_on(comm, node, inner="GatherMean", rule="ef14", compressor=TOP, d=D, dtype=np.float32, **options):
    return ErrorFeedback(rule, NodeMean(comm, compressor, d, dtype, inner=inner, node=node), **options)


def held(feedback, name="e_i"):
    """Return the whole vector of which this rank has a slice, with zeros elsewhere."""
    whole = np.zeros(feedback.node.d)
    part = feedback.per_rank()[name]
    start = feedback.state_tree().leaves[name].reshard.start
    whole[start : start + part.size] = part
    return whole


def owed(rows, names=("e_i",)):
    """Return E: of what is kept by nodes the mean, of what owners keep all, from what `held` returned on all ranks."""
    return sum(sum(row[name] for row in rows) / (1 if name == "plan.residual" else rows[0]["nodes"]) for name in names)


@each_place
@each_inner
def test_nothing_is_lost(n, node, inner):
    """Law L1: what was told, plus what nodes and owners still owe, is the mean of what all ranks meant; the same bits."""

    def program(comm):
        feedback, told, meant = rule_on(comm, node, inner), np.zeros(D), np.zeros(D)
        for step in range(10):
            x = mine(comm, step)
            told += feedback.step(x)
            meant += x / n
        names = [name for name in ("e_i", "plan.residual") if name in feedback.per_rank()]
        return {"told": told, "meant": meant, "names": names, "nodes": feedback.node.placement.nodes} | {
            name: held(feedback, name) for name in names}

    rows = virtual.results(n, program)
    meant, debt = sum(row["meant"] for row in rows), owed(rows, rows[0]["names"])
    assert all(same_bits(row["told"], rows[0]["told"]) for row in rows)
    assert np.abs(rows[0]["told"] + debt - meant).max() <= 1e-6 * np.abs(meant).max()
    assert (rows[0]["nodes"] == 1) == (not debt.any())


@each_place
@pytest.mark.parametrize("rule", ["ef21", *(pytest.param(rule, marks=pytest.mark.exhaustive)
                                            for rule in ("econtrol", "ef21-sgdm"))])
def test_estimates_have_the_aggregate_as_mean(n, node, rule):
    """Law L2: g and what owners owe are the mean over nodes of their estimates."""

    def program(comm):
        feedback = rule_on(comm, node, "TwoPhaseMean", rule, dense_steps=1)
        for step in range(8):
            feedback.step(mine(comm, step))
        estimate, of = ("h_i", "h") if rule == "econtrol" else ("g_i", "g")
        return {"nodes": feedback.node.placement.nodes, "g_i": held(feedback, estimate), "g": held(feedback, of),
                "plan.residual": held(feedback, "plan.residual")}

    rows = virtual.results(n, program)
    np.testing.assert_allclose(owed(rows, ["g", "plan.residual"]), owed(rows, ["g_i"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", ["ef14", "ef21", "econtrol", "ef21-hb"])
@pytest.mark.parametrize(("plan", "compressor"), [("GatherMean", TOP), ("TwoPhaseMean", TOP), ("GatherMean", RandK(0.1)),
                                                  ("TwoPhaseMean", Sign(64)), ("DenseMean", TOP)])
def test_with_one_rank_a_node_it_is_the_inner_plan(rule, plan, compressor):
    """I2, bit for bit, arrays included."""

    def program(comm):
        two = rule_on(comm, 1, plan, rule, compressor)
        one = ErrorFeedback(rule, build_plan(plan, comm, compressor, D, np.float32))
        for step in range(5):
            assert same_bits(two.step(mine(comm, step)), one.step(mine(comm, step)))
        for name, array in one.state_dict()["arrays"].items():
            assert same_bits(array, two.state_dict()["arrays"][name])

    virtual.results(3, program)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_with_one_node_it_is_the_dense_mean(n):
    """I3: nothing is compressed, nothing owed; the bits of DenseMean, with a rule and without."""

    def program(comm):
        plan = NodeMean(comm, TOP, D, node=n)
        dense, flat = DenseMean(comm, D), ErrorFeedback("ef14", DenseMean(comm, D))
        feedback = ErrorFeedback("ef14", plan)
        for step in range(4):
            x, out = mine(comm, step), np.zeros(D, np.float32)
            x[:9] = -0.0
            plan.exchange(x).set_mean(out)
            assert same_bits(out, dense.exchange(x).mean)
            assert same_bits(feedback.step(x), flat.step(x))
        assert not feedback.state.e_i.any()
        assert feedback.between_nbytes == plan.between.sent_nbytes == 0

    virtual.results(n, program)


def test_a_node_keeps_one_vector_and_counts_as_one():
    """I5: nodes are the clients, each rank of one keeps a slice, at multiples of 64."""

    def program(comm):
        feedback = rule_on(comm, 3, "TwoPhaseMean", d=4000)
        feedback.step(mine(comm, d=4000))
        return feedback.plan.clients, feedback.state.e_i.size, feedback.node.part.start

    rows = virtual.results(6, program)
    assert [clients for clients, *_ in rows] == [2] * 6
    assert [size for _, size, _ in rows[:3]] == [size for _, size, _ in rows[3:]]
    assert sum(size for _, size, _ in rows[:3]) == 4000
    assert all(start % 64 == 0 for _, _, start in rows)


def test_what_a_rank_gives_may_be_a_combination_or_come_in_parts():
    def program(comm):
        lazily, eagerly, first, second = (rule_on(comm, 2, "TwoPhaseMean") for _ in range(4))
        for step in range(3):
            a, b = mine(comm, step), mine(comm, step + 50)
            expected = eagerly.step(a - b).copy(), second.step(b).copy()
            assert same_bits(lazily.step(lazy(a) - b), expected[0])
            first.start(b)
            b.fill(7)
            first.wait()
            assert same_bits(first.commit(), expected[1])

    virtual.results(4, program)


def test_a_step_that_is_rolled_back_has_changed_nothing():
    def program(comm):
        one, two = (rule_on(comm, 2, "TwoPhaseMean") for _ in range(2))
        for step in range(4):
            one.start(mine(comm, step + 70))
            one.wait()
            one.rollback()
            one.plan.exchanges = two.plan.exchanges
            assert same_bits(one.step(mine(comm, step)), two.step(mine(comm, step)))

    virtual.results(5, program)


def in_parts(feedback, x):
    feedback.start(x)
    feedback.progress()
    feedback.wait()
    return feedback.commit()


WRONG = {
    "NaN": (lambda x: np.where(np.arange(x.size) == 7, np.nan, x).astype(x.dtype), NonFiniteError, NonFiniteError),
    "Inf": (lambda x: np.where(np.arange(x.size) == D - 1, np.inf, x).astype(x.dtype), NonFiniteError, NonFiniteError),
    "short": (lambda x: x[:-1], ShapeError, PeerError),
    "dtype": (lambda x: x.astype(np.float64), DtypeError, PeerError),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("n", "node"), [(6, 2), (5, 3), (3, 3), (3, 1)])
def test_what_one_rank_cannot_do_no_rank_does(wrong, n, node):
    """On any rank of any node: all raise together, in a step at once and in parts, and nothing has changed."""
    spoil, kind, others = WRONG[wrong]

    def program(comm):
        one, twin = (rule_on(comm, node, "TwoPhaseMean") for _ in range(2))
        for bad in range(n):
            for split in (False, True):
                x = mine(comm, bad)
                x = spoil(x) if comm.Get_rank() == bad else x
                with pytest.raises(kind if comm.Get_rank() == bad else others) as told:
                    in_parts(one, x) if split else one.step(x)
                assert "\n" not in str(told.value)
                assert kind is not NonFiniteError or told.value.ranks == (bad,)
                assert kind is NonFiniteError or f"rank {bad} raised" in str(told.value) or comm.Get_rank() == bad
            assert same_bits(one.step(mine(comm, bad)), twin.step(mine(comm, bad)))
        for name, array in twin.per_rank().items():
            assert same_bits(array, one.per_rank()[name])

    virtual.results(n, program)


def test_sums_that_overflow_are_told_on_all_ranks():
    """On one rail alone: all ranks raise, and all rails are as they were."""

    def program(comm):
        one, twin = (rule_on(comm, 2, compressor=TopK(1e-9)) for _ in range(2))
        x = mine(comm)
        x[5:7] = 3e38  # on rail 0, which can send one of them
        assert same_bits(one.step(x), twin.step(x))
        with pytest.raises(NonFiniteError, match="overflows"):
            one.step(x)
        one.plan.exchanges = twin.plan.exchanges
        assert same_bits(one.step(mine(comm, 1)), twin.step(mine(comm, 1)))

    virtual.results(4, program)


def test_a_rank_in_another_step_is_told():
    def program(comm):
        feedback = rule_on(comm, 2)
        feedback.step(mine(comm))
        if comm.Get_rank() == 2:
            feedback.steps += 1
        with pytest.raises(DisagreementError, match="out of step"):
            feedback.step(mine(comm))

    virtual.results(6, program)


@pytest.mark.parametrize(("options", "words"), [
    ({"node": 0}, "node=0 ranks; a node has at least one"),
    ({"node": "two"}, "node='two'; pass how many ranks a node has"),
    ({"node": 2, "inner": "Gather"}, "there is no plan 'Gather'"),
    ({"node": 2, "inner": "ClientsMean(clients=8)"}, "inner=ClientsMean has .* pass a plan for one of"),
    ({"node": 2, "inner": "NodeMean"}, "inner=NodeMean is a plan of nodes, too; take GatherMean"),
    ({"node": 2, "inner": "ClientsMean"}, "'ClientsMean': ClientsMean: missing a required argument: 'clients'"),
])
def test_what_cannot_be_built_is_said_on_all_ranks(options, words):
    def program(comm):
        with pytest.raises(OptionError, match=words) as told:
            NodeMean(comm, TOP, D, **options)
        assert "\n" not in str(told.value)

    virtual.results(4, program)


def test_ranks_agree_on_nodes():
    def program(comm):
        with pytest.raises(DisagreementError, match="disagree on node"):
            NodeMean(comm, TOP, D, node=1 + comm.Get_rank() // 2)
        with pytest.raises((OptionError, PeerError)):
            NodeMean(comm, TOP, D, node=2, inner="Gather" if comm.Get_rank() == 3 else "GatherMean")
        with pytest.raises(OptionError, match="messages are those of nodes"):
            NodeMean(comm, TOP, D, node=2).exchange(mine(comm)).add_own(np.zeros(D, np.float32))
        with pytest.raises(OptionError, match="OneBitAdam: plan=NodeMean keeps parts"):
            OneBitAdam(net_of().parameters(), comm, plan=partial(NodeMean, node=2))

    virtual.results(4, program)


def test_compressors_that_are_bound_to_shapes_of_parameters_are_refused():
    def program(comm):
        with pytest.raises(OptionError) as told:
            DistributedOptimizer(torch.optim.SGD(net_of().parameters(), lr=0.1), comm, LowRank(2),
                                 plan=partial(NodeMean, node=2))
        assert "\n" not in str(told.value)

    virtual.results(4, program)


@pytest.mark.parametrize("inner", ["GatherMean", "TwoPhaseMean"])
def test_a_share_of_every_parameter_is_kept_of_what_a_rank_has_of_it(inner):
    """Also on a rank that has a rail for itself and no slice."""
    def program(comm):
        net = net_of()
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.1, segments="parameters"),
                                         plan=partial(NodeMean, node=2, inner=inner))
        for step in range(3):
            for number, p in enumerate(net.parameters()):
                p.grad = torch.full_like(p, 1.0 + comm.Get_rank() + step + number)
            optimizer.step()
        compressor = optimizer.feedback.plan.compressor
        return [p.detach().numpy().tobytes() for p in net.parameters()], sum(compressor.segments), optimizer.flat.d

    for n, slices in ((4, 2), (3, 1)):
        rows = virtual.results(n, program)
        assert all(row[0] == rows[0][0] for row in rows)
        assert sum(row[1] for row in rows[:2]) == rows[0][2]
        assert rows[0][1] < rows[0][2] or slices == 1


class TestLaws(PlanLaws):
    """Those of a plan by itself that do not ask for messages of ranks, or count what leaves through other communicators."""

    plan = "NodeMean(node=2, inner='TwoPhaseMean')"
    other = "NodeMean(node=1)"
    test_a_mean_is_the_mean_of_the_messages = test_combinations_are_what_they_stand_for = None
    test_each_exchange_draws_anew_on_each_rank = test_a_state_that_was_loaded_goes_on = None
    test_exchanges_are_counted = test_errors_of_communication_are_passed_on = None


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_inside_nodes_and_between():
    """A counting communicator has what `traffic` says, node and rail apart."""

    def program(comm):
        counting = FaultyComm(comm)
        feedback = rule_on(counting, 4, "TwoPhaseMean", d=20_000)
        node, rail = counting.parts
        node.sent_nbytes = rail.sent_nbytes = counting.sent_nbytes = 0
        for step in range(3):
            feedback.step(mine(comm, step, 20_000))
        assert rail.sent_nbytes == 3 * feedback.node.between.sent_nbytes == feedback.between_nbytes
        assert node.sent_nbytes == 3 * feedback.node.inside.sent_nbytes
        assert feedback.sent_nbytes == 3 * feedback.node.traffic.sent_nbytes
        assert counting.sent_nbytes == 0

    virtual.results(8, program)


def test_little_crosses_the_link_of_a_node():
    """Acceptance: 16 ranks on 4 nodes, 1 % of 2e6 entries in bf16, against a flat gather and a ring of dense vectors."""
    d, n, s, compressor = 2_000_000, 16, 4, TopK(0.01, values=Quantize("bf16"))

    def program(comm):
        plan = NodeMean(comm, compressor, d, inner=partial(TwoPhaseMean, reply=compressor), node=s)
        return plan.between.sent_nbytes, plan.link_traffic.nbytes

    rows = virtual.results(n, program)
    link = sum(sent for sent, _ in rows[:s])
    assert rows[0][1] == link
    frame = virtual.results(2, lambda comm: GatherMean(comm, compressor, d).traffic.sent_nbytes)[0]
    assert (n - s) * frame >= 7 * link  # what leaves a node where frames go around
    assert 2 * (n - 1) * d * 4 // n >= 130 * link


def calls_of_a_step(n, node):
    """Return how many functions of mpi_ef rank 0 calls in a step."""

    def program(comm):
        feedback, calls = rule_on(comm, node, "GatherMean"), Counter()
        for step in range(3):
            feedback.step(mine(comm, step))

        def seen(frame, event, _):
            name = frame.f_globals.get("__name__", "")
            if event == "call" and name.startswith("mpi_ef") and not name.startswith("mpi_ef.testing"):
                calls[f"{name}.{frame.f_code.co_qualname}"] += 1

        if comm.Get_rank() == 0:
            sys.setprofile(seen)
        try:
            feedback.step(mine(comm, 4))
        finally:
            sys.setprofile(None)
        return calls

    return virtual.results(n, program)[0]


@pytest.mark.parametrize("plan", ["NodeMean", "NodeMean(inner='TwoPhaseMean')", "GatherMean", "DenseMean"])
def test_an_optimizer_counts_what_crosses_the_link_of_a_node(plan):
    """In steps of compressed messages that of its plan, though ranks of a node send each other whole vectors here."""

    def program(comm):
        net = net_of()
        compressor = Identity() if plan == "DenseMean" else TopK(0.1)
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, compressor, plan=plan)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
        crossed = optimizer.crossed_nbytes(optimizer.sent_nbytes)
        assert crossed == 5 * optimizer.means()[0].link_traffic.nbytes > 0
        sent = optimizer.sent_nbytes + 600
        assert optimizer.crossed_nbytes(sent) == crossed + optimizer.means()[0].nodes.crossing(0, 600)

    virtual.results(6, program, ranks_per_node=3)


def test_a_step_does_not_do_more_in_python_on_more_ranks():
    few = calls_of_a_step(8, 4)
    assert few == calls_of_a_step(64, 32)
    assert sum(few.values()) < 400


# What goes on ---------------------------------------------------------------------------------------------------------


def whole_arrays(feedback):
    """Return for each array the vector that this rank has a part of, zeros elsewhere, so that :func:`owed` sums them up."""
    tree, nodes = feedback.state_tree(), getattr(feedback, "node", None)
    found = {"nodes": feedback.plan.clients if nodes is None else nodes.placement.nodes}
    for name, leaf in tree.arrays().items():
        if name != "nodes":
            whole, start = np.zeros(D), 0 if leaf.reshard is None else leaf.reshard.start
            whole[start : start + leaf.array.size] = leaf.array
            found[name] = whole
    return found


WORLDS = [(8, 2), (6, 2), (5, None), (7, 3), (7, lambda rank: rank % 2), (3, 3), (4, 2)]


@pytest.mark.parametrize("inner", ["GatherMean", "TwoPhaseMean"])
@pytest.mark.parametrize("rule", ["ef14", "ef21", "econtrol"])
def test_other_numbers_of_ranks_and_nodes_owe_the_same(inner, rule):
    """8 = 4 x 2, 6 = 3 x 2, 5 without nodes, 7 = 3 + 3 + 1, 7 in turns, one node of 3: E, and g, are what they were."""
    store = MemoryStore()

    def program(comm, node, at):
        plan = build_plan(inner if node is None else partial(NodeMean, inner=inner, node=node), comm, TOP, D, np.float64)
        feedback = ErrorFeedback(rule, plan)
        training = Training(rule=feedback, random=False)
        assert training.resume(store, comm, policy="redistribute") == at
        before = whole_arrays(feedback)
        for step in range(at, at + 3):
            feedback.step(mine(comm, step, dtype=np.float64))
        training.save(store, comm, at + 3)
        return before, whole_arrays(feedback)

    last, at = {}, 0
    for n, node in WORLDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            rows = virtual.results(n, partial(program, node=node, at=at))
        loaded, saved = ([row[i] for row in rows] for i in range(2))
        names = {*loaded[0]} - {"nodes"} - ({"g_i", "h_i"} if inner == "TwoPhaseMean" else set())
        for name in names if last else ():
            np.testing.assert_allclose(owed(loaded, [name]), last[name], rtol=0, atol=1e-13, err_msg=f"{name} on {n}")
        last, at = {name: owed(saved, [name]) for name in names}, at + 3


@pytest.mark.parametrize("options", [{}, {"bucket_nbytes": 100}, {"placement": "gradient", "rule": "ef21"}],
                         ids=["update", "buckets", "gradient"])
def test_a_training_goes_on_with_other_nodes(options):
    """4 = 2 x 2, then 3 without nodes, 5 = 3 + 2, and 4 = 2 x 2 twice, which goes on as if it had not been interrupted."""
    store, ends = MemoryStore(), {}

    def program(comm, node, start, count, interrupted):
        net = net_of()
        inner = torch.optim.SGD(net.parameters(), lr=0.02)
        plan = "TwoPhaseMean" if node is None else partial(NodeMean, node=node, inner="TwoPhaseMean")
        optimizer = DistributedOptimizer(inner, comm, TopK(0.3), plan=plan, **options)
        training = Training(model=net, plan=optimizer, random=False)
        assert training.resume(store, comm, policy="redistribute") == start
        for step in range(start, start + count):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
        if interrupted:
            training.save(store, comm, start + count)
        return [p.detach().numpy().copy() for p in net.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for n, node, start, count in ((4, 2, 0, 4), (3, None, 4, 2), (5, 3, 6, 2), (4, 2, 8, 2)):
            rows = virtual.results(n, partial(program, node=node, start=start, count=count, interrupted=True))
            assert all(same_bits(row, rows[0]) for row in rows)
        del store.steps[10]
        ends["whole"] = virtual.results(4, partial(program, node=2, start=8, count=4, interrupted=False))[0]
        virtual.results(4, partial(program, node=2, start=8, count=2, interrupted=True))
        ends["parts"] = virtual.results(4, partial(program, node=2, start=10, count=2, interrupted=False))[0]
    assert same_bits(ends["whole"], ends["parts"])


def test_other_nodes_are_no_exact_resume():
    """As many ranks, but not on the same nodes: refused, or said."""
    store = MemoryStore()

    def program(comm, node, policy):
        training = Training(rule=rule_on(comm, node), random=False)
        if policy is None:
            training.save(store, comm, 3)
            return ()
        training.resume(store, comm, policy=policy)
        return training.notes

    virtual.results(4, partial(program, node=2, policy=None))
    assert virtual.results(4, partial(program, node=2, policy="exact")) == [()] * 4
    for node in (1, 4, lambda rank: rank % 2):
        for outcome in virtual.run(4, partial(program, node=node, policy="exact")):
            assert isinstance(outcome, OptionError)
            assert "ranks were on other nodes at step 3" in str(outcome)
        with pytest.warns(RuntimeWarning, match="of 4 ranks goes on with 4 on other nodes: errors and momenta"):
            virtual.results(4, partial(program, node=node, policy="redistribute"))


def test_a_state_goes_back_to_the_ranks_and_nodes_it_came_from():
    def program(comm):
        one, two, other = rule_on(comm, 2, "TwoPhaseMean"), rule_on(comm, 2, "TwoPhaseMean"), rule_on(
            comm, lambda rank: rank % 2, "TwoPhaseMean")
        for step in range(3):
            one.step(mine(comm, step))
        two.load_state_dict(one.state_dict())
        assert same_bits(one.step(mine(comm, 5)), two.step(mine(comm, 5)))
        with pytest.raises(OptionError, match="ranks were on other nodes"):
            other.load_state_dict(one.state_dict())
        flat = ErrorFeedback("ef14", TwoPhaseMean(comm, TOP, D))
        with pytest.raises(ShapeError):
            flat.load_state_dict(one.state_dict())
        with pytest.raises(ShapeError):
            one.load_state_dict(flat.state_dict())
        one.forget()
        assert not any(array.any() for array in one.per_rank().values())

    virtual.results(4, program)


OPTIMIZERS = {
    "update": {}, "gradient": {"placement": "gradient", "rule": "ef21", "dense_steps": 1},
    "buckets": {"bucket_nbytes": 100}, "overlap": {"placement": "gradient", "overlap": True, "bucket_nbytes": 100},
    "econtrol": {"placement": "gradient", "rule": "econtrol"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("n", "node"), [(5, 3), *(pytest.param(*place, marks=pytest.mark.exhaustive)
                                                   for place in ((4, 2), (2, 2), (3, 1)))])
def test_optimizers_train_through_it(name, n, node):
    """Replicas stay equal bit for bit, with a layer that is not used, and all skip a NaN."""

    def program(comm):
        net, options, losses = net_of(), OPTIMIZERS[name], []
        make = torch.optim.SGD if "placement" in options else torch.optim.AdamW
        inner = make(net.parameters(), lr=0.02)
        optimizer = DistributedOptimizer(inner, comm, TopK(0.3), plan=partial(NodeMean, node=node), **options)
        optimizer.check_replicas_every = 1
        assert all(isinstance(channel, NodeFeedback) for channel in optimizer.channels())
        for step in range(25):
            optimizer.zero_grad()
            broken = step == 5 and comm.Get_rank() == n - 1
            loss = loss_of(net, comm.Get_rank(), step) * (float("nan") if broken else 1.0)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert optimizer.skipped_steps == 1
        assert torch.equal(net.unused, net_of().unused)
        return [p.detach().numpy().copy() for p in net.parameters()], losses[:5] + losses[-5:]

    with pytest.warns(RuntimeWarning, match="skipped"):
        rows = virtual.results(n, program)
    assert all(same_bits(row[0], rows[0][0]) for row in rows)
    assert np.mean([row[1][5:] for row in rows]) < np.mean([row[1][:5] for row in rows])


def test_a_layer_that_one_rank_does_not_use_makes_no_rank_wait():
    """With overlap that rank sends its bucket in step(), others in the backward pass, where they must not wait for it."""

    def program(comm):
        model = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(3)])
        for number, p in enumerate(model.parameters()):
            p.data[:] = torch.from_numpy(gaussian(number, p.numel())).view(p.shape)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), comm, TopK(0.5), placement="gradient",
                                         overlap=True, bucket_nbytes=40, plan=partial(NodeMean, node=2))
        for step in range(4):
            optimizer.zero_grad()
            x = torch.from_numpy(gaussian(comm.Get_rank(), 6, step=step)).view(2, 3)
            for number, layer in enumerate(model):
                x = layer(x) if number != step % 3 or comm.Get_rank() != 1 else x
            torch.tanh(x).sum().backward()
            optimizer.step()
        return [p.detach().numpy().copy() for p in model.parameters()]

    rows = virtual.results(4, program)
    assert all(same_bits(row, rows[0]) for row in rows)


@pytest.mark.parametrize("options", [{"bucket_nbytes": 100}, {"placement": "gradient", "rule": "ef21-sgdm"}],
                         ids=["update", "gradient"])
@pytest.mark.parametrize("node", [1, 2])
def test_ranks_may_run_out_of_data(node, options):
    """Others go on; with one rank a node to the bits of a run without nodes, layers that are not used included."""

    def program(comm):
        ends = []
        for plan in (partial(NodeMean, node=node), plan_for):
            net = net_of()
            inner = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
            optimizer = DistributedOptimizer(inner, comm, TopK(0.3), plan=plan, **options)
            with optimizer.join():
                for step in range(3 + 2 * comm.Get_rank()):
                    optimizer.zero_grad()
                    loss_of(net, comm.Get_rank(), step).backward()
                    optimizer.step()
            ends.append([p.detach().numpy().copy() for p in net.parameters()])
        return ends

    rows = virtual.results(4, program)
    assert all(same_bits(row[0], rows[0][0]) for row in rows)
    assert node > 1 or same_bits(*rows[0])


def test_identity_between_nodes_is_a_mean():
    def program(comm):
        plan, out = NodeMean(comm, Identity(), D, inner="DenseMean", node=2), np.zeros(D, np.float32)
        plan.exchange(mine(comm)).add_mean(out)
        plan.start(mine(comm, 1))
        plan.progress()
        plan.wait().set_mean(out, 2.0)
        return out, mine(comm, 1)

    rows = virtual.results(5, program)
    np.testing.assert_allclose(rows[0][0], 2 * np.mean([x for _, x in rows], axis=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("s", [4, 8])
def test_memory_is_touched_as_often_as_counted(s):
    """A rank reads its part of all rows, and the rule's 13.4 bytes are for a slice; to read the result comes on top."""
    d = 200_000

    def program(comm):
        feedback = rule_on(comm, s, compressor=TopK(0.01), d=d)
        for step in range(3):
            feedback.step(mine(comm, step, d))
        comm.allgather("ready")
        with counted() if comm.Get_rank() == 0 else nullcontext() as touched:  # of the whole process
            comm.allgather("counting")
            feedback.step(mine(comm, 3, d))
            comm.allgather("done")
        return touched

    touched = virtual.results(2 * s, program)[0]
    print({name: round(nbytes / (2 * s * d), 2) for name, nbytes in touched.items()})
    assert touched["mean_slice"] == 2 * s * (4 + 4 / s) * d
    assert touched.total() <= 2 * s * (5 + 13.4 / s) * d
