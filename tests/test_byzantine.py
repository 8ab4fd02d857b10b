"""Robust plans and rules: what wrong clients can do, and that nobody can tell on how many ranks the clients are."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import virtual
from programs import same_bits
from stored import MemoryStore
from vectors_for_tests import gaussian

from mpi_ef.collectives import ClientsMean, GatherMean, RobustMean, robust_mean
from mpi_ef.compress import Identity, Quantize, RandK, Sign, TopK
from mpi_ef.errors import DisagreementError, DtypeError, NonFiniteError, OptionError, PeerError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.optim import ByzEF21
from mpi_ef.robust import (
    NNM,
    Bucketing,
    CenteredClip,
    ClipLargest,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    TrimmedMean,
    aggregate,
)
from mpi_ef.state.training import Training

D, N, F = 300, 7, 2
TOP = TopK(0.02)  # few enough to compute only what has changed
RULES = {"byz-ef21": {}, "byz-ef21-sgdm": {"eta": 0.3}, "byz-ef21-bc": {"reply": TopK(0.3)}}
AGGREGATORS = [NNM(TrimmedMean()), TrimmedMean(), Median(), Krum(), GeometricMedian(), CenteredClip(3.0, 2), Mean(),
               Bucketing(Median(), s=1, seed=3), ClipLargest(TrimmedMean())]
each_rule = pytest.mark.parametrize("rule", RULES)


def at_work(comm, rule="byz-ef21", aggregator=None, *, compressor=TOP, f=F, shards=False, kind=RobustMean, clients=N,
            **more):
    plan = kind(comm, compressor, D, np.float32, aggregator, f=f, clients=clients, shards=shards)
    return ErrorFeedback(rule, plan, **{"dense_steps": 1, **RULES[rule], **more})


def vectors_of(plan, step, bad=()):
    rows = np.array([gaussian(c, D, plan.dtype, step=step) + 3 for c in range(plan.first, plan.first + plan.own)])
    for client, what in dict(bad).items():
        if plan.first <= client < plan.first + plan.own:
            rows[client - plan.first] = what if isinstance(what, float) else rows[client - plan.first] * np.float32(what[0])
    return rows


def trajectory(rule, aggregator=None, *, steps=8, bad=(), **options):
    def program(comm):
        feedback = at_work(comm, rule, aggregator, **options)
        out = [feedback.step(vectors_of(feedback.plan, step, bad)).copy() for step in range(steps)]
        return out, feedback.state.suspicion.copy(), feedback.plan.broken.copy(), feedback.state.by_client.copy()

    return program


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=str)
@pytest.mark.parametrize("shards", [False, True])
def test_any_number_of_ranks_and_shards_give_the_same_bits(aggregator, shards):
    for rule in RULES:
        bad = {1: (-50.0,), 4: float("nan")}
        alone = virtual.results(1, trajectory(rule, aggregator, bad=bad))[0]
        for n in (2, 4):
            rows = virtual.results(n, trajectory(rule, aggregator, bad=bad, shards=shards))
            for results, suspicion, broken, _ in rows:
                assert same_bits(results, alone[0])
                assert broken.tolist() == alone[2].tolist() == [c == 4 for c in range(N)]
                assert same_bits(suspicion, alone[1])
            if shards:
                assert same_bits(np.concatenate([row[3] for row in rows], axis=1), alone[3])


@pytest.mark.parametrize("byz", RULES)
@pytest.mark.parametrize("aggregator", [Mean(), TrimmedMean(), NNM(TrimmedMean()), NNM(Krum())], ids=str)
@pytest.mark.parametrize("compressor", [TOP, TopK(0.1, values=Quantize("bf16")), Sign(block=32), RandK(0.1, seed=3)],
                         ids=str)
def test_without_wrong_clients_these_are_the_plain_rules(byz, aggregator, compressor):
    def program(comm):
        plain = byz.removeprefix("byz-")
        robust = at_work(comm, byz, aggregator, compressor=compressor, f=0)
        usual = ErrorFeedback(plain, ClientsMean(comm, compressor, D, np.float32, clients=N), dense_steps=1, **RULES[byz])
        for step in range(6):
            x = vectors_of(robust.plan, step)
            assert same_bits(robust.step(x), usual.step(x))
        assert same_bits(robust.state.own, usual.state.g_i)

    virtual.results(2, program)


def test_one_client_a_rank_is_as_gathered_messages():
    def program(comm):
        robust = at_work(comm, f=0, clients=None)
        usual = ErrorFeedback("ef21", GatherMean(comm, TOP, D, np.float32), dense_steps=1)
        for step in range(6):
            x = gaussian(comm.Get_rank(), D, np.float32, step=step)
            assert same_bits(robust.step(x), usual.step(x))

    virtual.results(4, program)


@each_rule
@pytest.mark.parametrize("aggregator", [NNM(TrimmedMean()), TrimmedMean(), Krum()], ids=str)
def test_the_result_is_the_aggregate_of_the_rows_bit_for_bit(rule, aggregator):
    """Also where only what has changed is computed; and rows are what clients know of themselves."""

    def program(comm):
        feedback = at_work(comm, rule, aggregator, dense_steps=0)
        for step in range(8):
            g = feedback.step(vectors_of(feedback.plan, step, {3: (-9.0,)}), whole=step == 4)
            if rule != "byz-ef21-bc":
                assert same_bits(g, aggregate(feedback.state.by_client, aggregator, f=F))

    virtual.results(2, program)


@each_rule
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, -1e25, 3e18], ids=str)
def test_broken_and_huge_clients_decide_nothing(rule, bad):
    def program(comm):
        feedback, clean = at_work(comm, rule), at_work(comm, rule)
        for step in range(6):
            x = vectors_of(feedback.plan, step)
            wrong = vectors_of(feedback.plan, step, {2: bad, 5: -bad})
            with np.errstate(over="ignore", invalid="ignore"):
                g = feedback.step(wrong)
            others = clean.step(x)
            assert np.isfinite(g).all()
            assert np.abs(g - others).max() < 8
        assert feedback.state.suspicion[[2, 5]].min() > 0.9
        assert feedback.state.suspicion[[0, 1, 3, 4, 6]].max() < 0.5

    virtual.results(2, program)


def test_a_mean_never_recovers_from_a_huge_client():
    def program(comm):
        feedback = at_work(comm, aggregator=Mean())
        for step in range(3):
            g = feedback.step(vectors_of(feedback.plan, step, {2: 1e15} if step == 0 else {}))
        assert np.abs(g).max() > 1e13

    virtual.results(2, program)


@each_rule
def test_a_client_that_was_broken_goes_on_from_what_all_know_of_it(rule):
    def program(comm):
        feedback = at_work(comm, rule, momentum=0.5) if rule == "byz-ef21" else at_work(comm, rule)
        for step in range(8):
            with np.errstate(invalid="ignore"):
                feedback.step(vectors_of(feedback.plan, step, {2: float("nan"), 6: float("inf")} if step in (0, 3) else {}))
            assert feedback.plan.broken.sum() == 2 * (step == 3)  # the first step goes through the dense plan
        for array in (*feedback.per_rank().values(), *feedback.replicated().values()):
            assert np.isfinite(array).all()
        assert np.abs(feedback.state.by_client[[2, 6]]).max() > 0

    virtual.results(3, program)


@pytest.mark.parametrize("rule", ["ef14", "econtrol", "ef14-momentum", "lion", "ef21-sgdm", "ef21-sgd2m", "ef21-page",
                                  "d-ec-sgd", "ef14 with momentum", "byz-ef21-sgdm", "byz-ef21 with momentum"])
def test_a_nan_breaks_its_client_in_one_step_only(rule):
    """What the client owes, and its averages, are as they were before."""

    def program(comm):
        name, *momentum = rule.split(" with ")
        feedback = ErrorFeedback(name, RobustMean(comm, TOP, D, np.float32, Median(), f=1), **dict.fromkeys(momentum, 0.9))
        for step in range(4):
            x = gaussian(comm.Get_rank(), D, np.float32, step=step)
            bad = step == 2 and comm.Get_rank() == 1
            before = {name: array.copy() for name, array in feedback.per_rank().items()}
            with np.errstate(invalid="ignore"):
                g = feedback.step(x * np.float32("nan" if bad else 1))
            assert np.isfinite(g).all()
            assert np.flatnonzero(feedback.plan.broken).tolist() == [1] * (step == 2)
            if bad:
                assert all(same_bits(array, before[name]) for name, array in feedback.per_rank().items())

    virtual.results(4, program)


@pytest.mark.parametrize("n", [1, 3])
def test_more_broken_clients_than_f_are_an_error_that_changes_nothing(n):
    def program(comm):
        feedback = at_work(comm, "byz-ef21-sgdm")
        feedback.step(vectors_of(feedback.plan, 0))
        before = feedback.state_dict()
        with pytest.raises(NonFiniteError, match=r"3 clients, on rank.* sent NaN, Inf or nothing, and f=2") as error:
            feedback.step(vectors_of(feedback.plan, 1, dict.fromkeys((1, 3, 6), float("nan"))))
        after = feedback.state_dict()
        for name, array in before["arrays"].items():
            assert same_bits(array, after["arrays"][name])
        feedback.step(vectors_of(feedback.plan, 2))
        return error.value.ranks

    assert set(virtual.results(n, program)) == {(0,) if n == 1 else (0, 1, 2)}


class Garbled(RobustMean):
    """Some clients send any bytes."""

    garbled = (1, 4)

    def encode(self, x, *, split):
        finite = super().encode(x, split=split)
        rng = np.random.default_rng(self.exchanges)
        for client in self.garbled:
            if self.first <= client < self.first + self.own:
                self._send[client - self.first] = rng.integers(0, 256, self._codec.nbytes, np.uint8)
        return finite


@pytest.mark.parametrize("compressor", [TOP, TopK(0.1, values=Quantize("int8")), RandK(0.1), Sign(block=32), Identity(),
                                        Quantize("fp16")], ids=str)
@pytest.mark.parametrize("aggregator", [NNM(TrimmedMean()), Median(), Krum()], ids=str)
def test_wires_of_any_bytes_decide_nothing(compressor, aggregator):
    def program(comm):
        feedback = at_work(comm, aggregator=aggregator, compressor=compressor, kind=Garbled, dense_steps=0)
        honest = [c for c in range(N) if c not in Garbled.garbled]
        for step in range(30):
            with np.errstate(over="ignore", invalid="ignore"):
                g = feedback.step(vectors_of(feedback.plan, step)).copy()
            rows = feedback.state.by_client[honest]
            assert np.isfinite(g).all()
            assert np.linalg.norm(g - rows.mean(0)) <= max(np.linalg.norm(x - y) for x in rows for y in rows)
        return g

    assert same_bits(*virtual.results(2, program))


class Silent(RobustMean):
    """Some clients say nothing."""

    silent = (0, 5)

    def exchange(self, x, **options):
        numbers = np.arange(self.first, self.first + self.own)
        return super().exchange(x, **options | {"participates": ~np.isin(numbers, self.silent)})


def test_silent_clients_stay_where_they_were():
    def program(comm):
        feedback = at_work(comm, kind=Silent, dense_steps=0)
        for step in range(4):
            feedback.step(vectors_of(feedback.plan, step))
            assert np.flatnonzero(feedback.plan.broken).tolist() == [0, 5]
        assert not feedback.state.by_client[[0, 5]].any()
        assert feedback.state.by_client[[1, 2, 3, 4, 6]].any(axis=1).all()
        assert feedback.state.suspicion[[0, 5]].tolist() == [1, 1]

    virtual.results(2, program)


def test_who_participates_stays_what_the_caller_has_said():
    def program(comm):
        plan = RobustMean(comm, TOP, D, np.float32, f=F, clients=N)
        said = np.ones(plan.own, np.bool_)
        plan.exchange(vectors_of(plan, 0, {2: float("nan")}).reshape(-1), participates=said)
        assert said.all()
        assert np.flatnonzero(plan.broken).tolist() == [2]

    virtual.results(2, program)


def test_a_rank_of_shards_sends_no_memory_that_it_receives_in():
    """MPI forbids that."""

    class Watched:
        def __init__(self, comm):
            self._comm = comm

        def __getattr__(self, name):
            return getattr(self._comm, name)

        def Allgatherv(self, mine, received):
            assert not np.shares_memory(mine, received[0])
            self._comm.Allgatherv(mine, received)

    def program(comm):
        feedback = at_work(Watched(comm), shards=True)
        for step in range(3):
            feedback.step(vectors_of(feedback.plan, step))

    virtual.results(2, program)


@each_rule
@pytest.mark.parametrize("shards", [False, True])
def test_saved_and_loaded_a_step_is_the_same(rule, shards):
    def program(comm):
        first, second = (at_work(comm, rule, shards=shards) for _ in range(2))
        for step in range(3):
            first.step(vectors_of(first.plan, step))
        for step in range(2):
            second.step(vectors_of(second.plan, 7 + step))  # something else, which loading ends
        second.load_state_dict(first.state_dict())
        for step in range(3, 6):
            x = vectors_of(first.plan, step)
            assert same_bits(first.step(x), second.step(x))
        assert same_bits(first.state.suspicion, second.state.suspicion)

    virtual.results(2, program)


@pytest.mark.parametrize("aggregator", [Median(), TrimmedMean(), Bucketing(Median(), s=1)], ids=str)
def test_suspicion_is_that_of_a_run_that_was_not_interrupted(aggregator):
    """Also where all columns are computed after loading."""

    def program(comm):
        one, other = at_work(comm, aggregator=aggregator), at_work(comm, aggregator=aggregator)
        for step in range(8):
            one.step(vectors_of(one.plan, step, {3: (9.0,)}))
            other.step(vectors_of(one.plan, step, {3: (9.0,)}))
            assert same_bits(one.state.suspicion, other.state.suspicion)
            saved, other = other.state_dict(), at_work(comm, aggregator=aggregator)
            other.load_state_dict(saved)

    virtual.results(2, program)


def test_what_is_loaded_has_the_same_aggregator_and_f():
    def program(comm):
        saved = at_work(comm).state_dict()
        for other in (at_work(comm, f=1), at_work(comm, aggregator=Median()), at_work(comm, shards=True)):
            with pytest.raises(OptionError, match="the saved plan is RobustMean"):
                other.load_state_dict(saved)

    virtual.results(2, program)


def test_after_forgetting_it_begins_again():
    def program(comm):
        feedback, fresh = at_work(comm), at_work(comm)
        for step in range(3):
            feedback.step(vectors_of(feedback.plan, step))
        feedback.forget()
        for step in range(3, 6):
            assert same_bits(feedback.step(vectors_of(fresh.plan, step)), fresh.step(vectors_of(fresh.plan, step)))

    virtual.results(2, program)


def test_messages_themselves_are_aggregated_where_a_rule_takes_their_mean():
    def program(comm):
        plan = RobustMean(comm, Identity(), D, np.float32, Median(), f=2, clients=N)
        for step in range(3):
            x = vectors_of(plan, step, {1: (100.0,), 5: float("nan")})
            plan.exchange(x.reshape(-1))
            out = np.ones(D, np.float32)
            plan.set_mean(out)
            rows = np.array([gaussian(c, D, np.float32, step=step) + 3 for c in range(N)])
            rows[1] *= 100
            assert same_bits(out, aggregate(np.delete(rows, 5, axis=0), Median(), f=1))
            plan.add_mean(out, -1.0)
            assert not out.any()

    virtual.results(3, program)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("aggregator", [None, Median(), GeometricMedian()], ids=str)
def test_robust_mean_in_one_line(aggregator, dtype):
    def program(comm):
        rows = np.random.default_rng(0).normal(size=(5, 6, 4)).astype(dtype)
        rows[3] = np.nan
        for _ in range(2):
            result = robust_mean(comm, rows[comm.Get_rank()], aggregator, f=1)
            expected = aggregate(np.delete(rows, 3, axis=0).reshape(4, -1), aggregator or NNM(TrimmedMean()), f=0)
            assert same_bits(result, expected.reshape(6, 4))
        rows[3] = 1e6
        result = robust_mean(comm, rows[comm.Get_rank()], aggregator, f=1)
        assert same_bits(result, aggregate(rows.reshape(5, -1), aggregator or NNM(TrimmedMean()), f=1).reshape(6, 4))
        mine = rows[comm.Get_rank()].copy()
        assert robust_mean(comm, mine, aggregator, f=1, out=mine) is mine
        assert same_bits(mine, result)

    virtual.results(5, program)


@pytest.mark.parametrize("aggregator", [Mean(), TrimmedMean(), CenteredClip(np.inf)], ids=str)
def test_what_robust_mean_leaves_out_is_not_zero(aggregator):
    def program(comm):
        x = np.full(5, 1.5 if comm.Get_rank() else np.nan)
        assert robust_mean(comm, x, aggregator, f=1).tolist() == [1.5] * 5

    virtual.results(4, program)


def test_a_mean_of_nothing_is_an_error():
    """Also where f says that all may be wrong, which only a mean takes."""

    def program(comm):
        with pytest.raises(NonFiniteError, match="3 clients, on ranks 0-2, sent NaN, Inf or nothing"):
            robust_mean(comm, np.full(5, np.nan), Mean(), f=7)
        feedback = at_work(comm, aggregator=Mean(), kind=Silent, dense_steps=0)
        feedback.step(vectors_of(feedback.plan, 0))
        assert feedback.state.suspicion.tolist() == [1, 0, 0, 0, 0, 1, 0]

    virtual.results(3, program)


def test_robust_mean_raises_on_all_ranks():
    def program(comm):
        x, rank = np.ones(4, np.float32), comm.Get_rank()
        with pytest.raises(OptionError, match="f=2 of n=3 clients; it needs 5 or more; take f=1 or fewer"):
            robust_mean(comm, x, f=2)
        with pytest.raises(DisagreementError, match="disagree"):
            robust_mean(comm, x, f=rank % 2)
        with pytest.raises(DtypeError if rank == 1 else PeerError):
            robust_mean(comm, x.astype(np.int64) if rank == 1 else x, f=1)
        with pytest.raises(NonFiniteError):
            robust_mean(comm, x * np.nan if rank else x, f=1)
        with pytest.raises(OptionError, match="no aggregator|is none"):
            robust_mean(comm, x, "median", f=1)
        assert (robust_mean(comm, x, f=1) == 1).all()

    virtual.results(3, program)


@pytest.mark.parametrize(("build", "text"), [
    (lambda comm: RobustMean(comm, TOP, D, clients=N), "f is missing, the number of clients that may be wrong"),
    (lambda comm: RobustMean(comm, TOP, D, clients=N, f=4), "f=4 of n=7 clients; it needs 9 or more; take f=3 or fewer"),
    (lambda comm: RobustMean(comm, TOP, D, f=1), "f=1 of n=2 clients; it needs 3 or more; take f=0 or fewer"),
    (lambda comm: RobustMean(comm, TOP, D, aggregator="median", f=0), "no aggregator 'median'; did you mean Median?"),
    (lambda comm: RobustMean(comm, TOP, D, aggregator=Median, f=0), "is no aggregator; pass for example NNM(TrimmedMean())"),
    (lambda comm: RobustMean(comm, TOP, D, f=0, shards=2), "shards=2 is no bool"),
    (lambda comm: RobustMean(comm, TOP, D, f=0, device="meta"), "RobustMean"),
    (lambda comm: ErrorFeedback("byz-ef21", GatherMean(comm, TOP, D)), "this rule needs a RobustMean"),
    (lambda comm: ErrorFeedback("byz-ef21", RobustMean(comm, TOP, D, f=0), f=1), "f")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_refused_in_one_line(build, text):
    def program(comm):
        with pytest.raises(OptionError) as error:
            build(comm)
        assert text in str(error.value)
        assert "\n" not in str(error.value)

    virtual.results(2, program)


@pytest.mark.parametrize("rule", ["clag", "ef21-pp", "ef21-w"])
def test_rules_with_silent_clients_are_refused(rule):
    """They would be more than f in most steps, which would be skipped."""

    def program(comm):
        feedback = ErrorFeedback(rule, RobustMean(comm, TOP, D, np.float32, f=F, clients=N))
        with pytest.raises(OptionError, match=f"^{rule}: clients keep silent in turn, and to a RobustMean a silent one"):
            feedback.step(np.zeros(N * D, np.float32))

    virtual.results(1, program)


def test_ranks_agree_on_the_aggregator():
    def program(comm):
        with pytest.raises(DisagreementError, match="aggregator"):
            RobustMean(comm, TOP, D, aggregator=[Median(), TrimmedMean()][comm.Get_rank()], f=0)

    virtual.results(2, program)


def test_the_trimmed_mean_stays_between_honest_rows():
    def program(comm):
        feedback = at_work(comm, aggregator=TrimmedMean())
        for step in range(5):
            g = feedback.step(vectors_of(feedback.plan, step, {0: (30.0,), 1: (-30.0,)}))
            honest = np.sort(feedback.state.by_client[2:], axis=0)
            assert (g >= honest[0] - 1e-6).all()
            assert (g <= honest[-1] + 1e-6).all()

    virtual.results(2, program)


def test_bytes_that_are_counted_are_those_that_travel():
    def program(comm):
        whole, cut = at_work(comm, dense_steps=0), at_work(comm, dense_steps=0, shards=True)
        sent = []
        for feedback in (whole, cut):
            for step in range(2):
                feedback.step(vectors_of(feedback.plan, step))
                sent.append(feedback.sent_nbytes)
        one, two, three, four = sent
        assert two == 2 * one
        assert four - three > one  # parts of distances, and columns of the result
        return [b - a for a, b in pairwise(sent)]

    virtual.results(2, program)


def net_of():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def take_step(net, optimizer, rank, step, factor=1.0):
    optimizer.zero_grad()
    rng = np.random.default_rng([rank, step])
    x = torch.tensor(rng.normal(size=(8, 6)), dtype=torch.float32)
    (factor * (net(x) - x[:, :2]).square().mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"eta": 0.3}, {"reply": TopK(0.5)}, {"shards": True}, {"overlap": True},
                                     {"aggregator": GeometricMedian()}], ids=str)
def test_a_training_goes_on_where_ranks_are_wrong(options):
    """One rank has NaN in some steps, in others lies; all replicas stay equal, and losses fall as without it."""

    def program(comm, wrong):
        net, rank = net_of(), comm.Get_rank()
        optimizer = ByzEF21(net.parameters(), comm, TopK(0.2), lr=0.2, f=1, **options)
        optimizer.check_replicas_every = 1
        for step in range(60):
            factor = 1.0 if rank != 2 or not wrong else float("nan") if step % 7 == 3 else -40.0
            take_step(net, optimizer, rank, step, factor)
        assert optimizer.steps == 60
        assert optimizer.skipped_steps == 0
        x = torch.tensor(np.random.default_rng(5).normal(size=(400, 6)), dtype=torch.float32)
        return (net(x) - x[:, :2]).square().mean().item(), optimizer.suspicion

    clean, wrong = (virtual.results(5, lambda comm, wrong=wrong: program(comm, wrong)) for wrong in (False, True))
    assert wrong[0][0] < clean[0][0] * 1.25 < 0.5
    assert wrong[0][1].argmax() == 2
    assert wrong[0][1][2] > 0.8 > 2 * np.delete(wrong[0][1], 2).max()
    for _, suspicion in wrong[1:]:
        assert same_bits(suspicion, wrong[0][1])


def test_parameters_that_rest_while_another_rank_is_chosen():
    """What is computed after that is as in a run that goes on from a state: nothing is left of an earlier mixture."""

    def program(comm):
        rank, runs = comm.Get_rank(), []
        for _ in range(2):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(40, 10, bias=False), torch.nn.Linear(10, 40, bias=False))
            runs.append((net, ByzEF21(net.parameters(), comm, TopK(0.04), lr=0.1, f=1, aggregator=Krum())))
        for step in range(8):
            for net, optimizer in runs:
                optimizer.zero_grad()
                a, b = net.parameters()
                if step % 4:
                    a.grad = torch.zeros_like(a)
                    a.grad[9, -10:] = 1 + 0.01 * rank
                b.grad = torch.zeros_like(b)
                b.grad[:10, 0] = abs(rank - 3 * (step >= 4)) * 10 + 0.1 * rank
                optimizer.step()
            runs[1][1].load_state_dict(runs[1][1].state_dict())
            assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net, _ in runs), strict=True))

    virtual.results(5, program)


def test_a_rank_that_overflows_is_silent_also_where_its_gradient_is_clipped():
    """With GradScaler, which sees it before."""

    def program(comm):
        net, rank, scaler = net_of(), comm.Get_rank(), torch.amp.GradScaler("cpu")
        optimizer = ByzEF21(net.parameters(), comm, TopK(0.1), lr=0.1, f=1)
        for step in range(3):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in net.parameters())
            scaler.scale(loss * (3e36 if rank == 2 and step == 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_value_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert np.flatnonzero(optimizer.buckets[0].feedback.plan.broken).tolist() == [2] * (step == 1)
        assert optimizer.steps == 3
        assert all(p.isfinite().all() and p.grad.isfinite().all() for p in net.parameters())

    virtual.results(5, program)


def test_a_step_with_more_broken_ranks_than_f_is_skipped():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = ByzEF21(net.parameters(), comm, TopK(0.2), lr=0.2, f=1)
        for step in range(3):
            take_step(net, optimizer, rank, step)
        before = [p.detach().clone() for p in net.parameters()]
        take_step(net, optimizer, rank, 3, float("inf") if rank in (0, 3) else 1.0)
        assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))
        assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)
        take_step(net, optimizer, rank, 4)
        assert optimizer.steps == 4

    with pytest.warns(RuntimeWarning, match="step 3 skipped on all ranks: NaN or Inf in the gradient on ranks 0,3"):
        virtual.results(5, program)


@pytest.mark.parametrize("options", [{}, {"eta": 0.3}, {"reply": TopK(0.5)}], ids=str)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(options):
    """On as many ranks rows and suspicion are what they were; on others every rank begins from the aggregate."""
    store = MemoryStore()

    def program(comm, resume, count):
        net, rank = net_of(), comm.Get_rank()
        optimizer = ByzEF21(net.parameters(), comm, TopK(0.2), lr=0.2, f=1, **options)
        training = Training(model=net, optimizer=optimizer, random=False)
        start = training.resume(store, comm, policy="redistribute") if resume else 0
        state = optimizer.feedback.state
        rows, suspicion = state.by_client.copy(), optimizer.suspicion.copy()
        aggregate = state.aggregate if "reply" in options else state.g
        if resume and comm.Get_size() != 5:
            assert (rows == aggregate).all()
            assert not suspicion.any()
            assert same_bits(getattr(state, "v_i", state.g), state.g)  # nothing of the momentum of a wrong rank
        for step in range(start, start + count):
            take_step(net, optimizer, rank, step, -9.0 if rank == 1 else 1.0)
        if not resume:
            training.save(store, comm, start + count)
        assert optimizer.suspicion.argmax() == 1
        return rows, suspicion, state.by_client.copy(), optimizer.suspicion.copy(), [*map(torch.clone, net.parameters())]

    saved = virtual.results(5, lambda comm: program(comm, False, 6))
    again = virtual.results(5, lambda comm: program(comm, True, 4))
    assert same_bits(again[3][0], saved[0][2])
    assert same_bits(again[3][1], saved[0][3])
    store_of_ten, store = store, MemoryStore()
    whole = virtual.results(5, lambda comm: program(comm, False, 10))
    assert all(torch.equal(p, q) for p, q in zip(again[0][4], whole[0][4], strict=True))
    store = store_of_ten
    for n in (4, 7):
        with pytest.warns(RuntimeWarning, match="of 5 ranks goes on with"):
            virtual.results(n, lambda comm: program(comm, True, 4))


def test_errors_and_momenta_of_wrong_ranks_stay_behind():
    """On another number of ranks: with any rule on a RobustMean, and with momentum for any rule."""
    store = MemoryStore()

    def program(comm, rule, **options):
        plan = RobustMean(comm, TOP, D, np.float32, f=1)
        feedback = ErrorFeedback(rule, plan, **options)
        training = Training(rule=feedback, random=False)
        if store.steps:
            training.resume(store, comm, policy="redistribute")
            own = {name: array for name, array in feedback.per_rank().items() if name in ("e_i", "averaged_i")}
            assert own
            assert not any(array.any() for array in own.values())
        feedback.step(gaussian(comm.Get_rank(), D) * np.float32(1e6 if comm.Get_rank() == 2 else 1))
        if not store.steps:
            training.save(store, comm, 1)

    for rule, options in (("ef14", {}), ("byz-ef21", {"momentum": 0.5})):
        store = MemoryStore()
        virtual.results(5, partial(program, rule=rule, **options))
        with pytest.warns(RuntimeWarning, match="of robust rules none"):
            virtual.results(3, partial(program, rule=rule, **options))


def test_a_compressed_way_back_has_no_momentum():
    def program(comm):
        with pytest.raises(OptionError, match="there is no momentum with a compressed way back"):
            ByzEF21(net_of().parameters(), comm, TopK(0.2), lr=0.2, f=0, eta=0.1, reply=TopK(0.5))

    virtual.results(2, program)


def test_aggregators_are_texts_too():
    def program(comm):
        plan = RobustMean(comm, TOP, D, np.float32, "NNM(Median())", f=0)
        assert plan.aggregator == NNM(Median())
        x = np.full(3, float(comm.Get_rank()))
        assert same_bits(robust_mean(comm, x, "Median()", f=1), robust_mean(comm, x, Median(), f=1))

    virtual.results(3, program)
@pytest.mark.parametrize("clients", [None, N])
@pytest.mark.parametrize("compressor", [TopK(0.1), Identity()], ids=str)
def test_what_is_lost_is_lost_of_this_message(compressor, clients):
    """Not of the one of the step before."""
    def program(comm, kind, **options):
        plan, lost = kind(comm, compressor, D, np.float32, clients=clients or comm.Get_size(), **options), []
        plan.watched = True
        for step in range(3):
            plan.exchange(np.concatenate([gaussian(c, D, step=step) for c in range(plan.first, plan.first + plan.own)]))
            lost.append(plan.lost)
        return lost

    robust = virtual.results(3, lambda comm: program(comm, RobustMean, f=1))
    assert robust == virtual.results(3, lambda comm: program(comm, ClientsMean))
    assert all(0 < lost < 1 for lost in robust[0]) or robust[0] == [0] * 3
