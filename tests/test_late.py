"""Parameters and entries whose first gradient comes late, or never, under the optimizers that send signs."""

import copy
import io
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import virtual
from optimizer_table import ROWS, adamw_updates, rows
from programs import same_bits
from stored import MemoryStore
from training import (
    ALONE,
    LATE,
    NEVER,
    USED,
    everything,
    loss_in,
    net_with_more,
    of_late,
    parameters_of,
    train,
)

from mpi_ef import reference
from mpi_ef.collectives import TwoPhaseMean, plan_for
from mpi_ef.compress import Identity, Sign, TopK
from mpi_ef.errors import NonFiniteError
from mpi_ef.optim import DistributedOptimizer, EF21Muon, Lion, OneBitAdam, OneBitLamb, Signum, ZeroOneAdam
from mpi_ef.state.training import POLICIES, Training

each_world = pytest.mark.parametrize("n", [1, 2, 3])
WITH_VARIANCE = ("OneBitAdam", "OneBitAdam TopK", "OneBitLamb", "OneBitLamb TopK", "ZeroOneAdam", "ZeroOneAdam TopK")
with_variance = pytest.mark.parametrize("row", [pytest.param(ROWS[name], id=name) for name in WITH_VARIANCE])


# ---- a parameter whose first gradient comes late


def alone_of(kind, x, lr, freeze):
    """Return the steps of one parameter by the plain algorithm."""
    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    plain = kind([p], lr=lr, freeze_step=freeze)

    def step(grad):
        p.grad = torch.from_numpy(grad)
        plain.step()
        return p.detach().numpy()

    return step


KINDS = {
    "OneBitAdam": (OneBitAdam, {"freeze_step": 9}),
    "OneBitLamb": (OneBitLamb, {"freeze_step": 9}),
    "ZeroOneAdam": (ZeroOneAdam, {"var_freeze_step": 12, "var_update_scaler": 2, "local_step_clipper": 1}),
    "ZeroOneAdam, seldom": (ZeroOneAdam, {"var_freeze_step": 12, "var_update_scaler": 2, "local_step_scaler": 6,
                                          "local_step_clipper": 4}),
}


@pytest.mark.parametrize("compressor", [Identity(), Sign(block=16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("way", "first", "n"), [
    ("unused", 4, 2), ("frozen", 10, 3), ("zero", 15, 2), pytest.param("unused", 26, 1, marks=pytest.mark.exhaustive),
    pytest.param("frozen", 10, 2, marks=pytest.mark.exhaustive), ("unused", 26, 2),
])
def test_a_late_parameter_has_a_warm_up_of_its_own_as_in_torch(kind, compressor, way, first, n):
    """With any compressor it takes the steps of dense Adam or LAMB, as many as there were of the others: in step 9 of
    0/1 Adam 5, later 6. With the identity also the steps after them are those of 1-bit Adam or LAMB."""
    make, options = KINDS[kind]
    own = 9 if "ZeroOne" not in kind else 5 if first == 4 else 6

    def program(comm):
        rank, net, path = comm.Get_rank(), net_with_more(torch.float64), []
        start = net.late.weight.detach().numpy().copy()
        optimizer = make(net.parameters(), comm, lr=1e-2, compressor=compressor, **options)
        for step in range(first + 40):
            optimizer.zero_grad()
            net.late.weight.requires_grad_(way != "frozen" or step >= first)
            loss = loss_in(net, rank, step)
            if step >= first or way == "zero":
                loss = loss + of_late(net, rank, step) * float(step >= first)
            loss.backward()
            optimizer.step()
            path.append(net.late.weight.detach().numpy().copy())
            if step + 1 == first:
                assert same_bits(path[-1], start)
        optimizer.synchronize()
        gradients = []
        for step, x in enumerate([start, *path[first:-1]], first):
            net.late.weight.data.copy_(torch.from_numpy(x))
            net.late.weight.grad = None
            of_late(net, rank, step).backward()
            gradients.append(net.late.weight.grad.numpy().copy())
        return start, path[first:], gradients

    runs = virtual.results(n, program)
    start, path = runs[0][:2]
    follow = alone_of(reference.OneBitLamb, start, 1e-2, 9) if make is OneBitLamb else \
        alone_of(reference.OneBitAdam, start, 1e-2, own)
    exact = compressor == Identity() and kind != "ZeroOneAdam, seldom" and own != 5
    for t in range(40 if exact else own):
        expected = follow(np.mean([run[2][t] for run in runs], axis=0))
        np.testing.assert_allclose(path[t], expected, rtol=1e-10, atol=1e-12, err_msg=f"step {t}")
    if kind != "ZeroOneAdam, seldom":
        assert all(same_bits(run[1], path) for run in runs)


@pytest.mark.parametrize(("n", "first"), [
    (2, 26), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((3, 4), (1, 14)))
])
@with_variance
def test_a_late_parameter_trains_and_replicas_stay_equal(row, first, n):
    """In its own warm-up and after it; the others train as well, and bytes fall back to what they were."""

    def program(comm):
        net, sent = net_with_more(), []
        optimizer = row(net, comm, **row.learning)
        optimizer.check_replicas_every = 3
        losses = [of_late(net, comm.Get_rank(), 10**6).item()]
        for step in range(150):
            before = optimizer.sent_nbytes
            train(net, optimizer, range(step, step + 1), layer=first)
            sent.append(optimizer.sent_nbytes - before)
            if step in (first - 1, first + 5, 149):
                losses.append(of_late(net, comm.Get_rank(), 10**6).item())
        optimizer.synchronize()
        return parameters_of(net), losses, sent

    runs = virtual.results(n, program)
    for parameters, (start, at_first, soon, last), sent in runs:
        assert same_bits(parameters, runs[0][0])
        assert at_first == start
        assert soon < start
        assert last < 0.5 * start
        assert max(sent[-8:]) == max(sent[-16:-8])  # nothing travels whole any more
        assert n == 1 or max(sent[-16:]) < 0.7 * sent[0]


# ---- entries without gradient


@pytest.mark.parametrize(("n", "when"), [
    (2, 26), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((3, 10), (1, 14)))
])
@rows(lambda row: row.rests)
def test_what_never_had_a_gradient_stays_and_what_gets_one_late_trains(row, when, n):
    """To the last bit; whatever rank has the gradient, in compressed steps and between two synchronisations."""

    def program(comm):
        net = net_with_more()
        start, optimizer = net.words.weight.detach().clone(), row(net, comm)
        train(net, optimizer, range(when), words=when)
        assert torch.equal(net.words.weight[LATE], start[LATE])
        train(net, optimizer, range(when, when + 60), words=when)
        optimizer.synchronize()
        assert torch.equal(net.words.weight[NEVER], start[NEVER])
        goal = 2.0 + 0.1 * (n - 1) / 2
        # Those who have no gradient of a word vote as well, and one rank cannot outvote them.
        for words in (USED, LATE) if row.own == {"m_i"} and n > 1 else (USED, LATE, ALONE):
            far, near = ((w[words].detach() - goal).abs().mean().item() for w in (start, net.words.weight))
            assert near < far - 0.02
        return parameters_of(net)

    runs = virtual.results(n, program)
    assert all(same_bits(run, runs[0]) for run in runs)


@each_world
@with_variance
def test_nothing_is_remembered_of_entries_that_sleep(row, n):
    """No momentum and no error, that would be let loose on the first gradient."""

    def program(comm):
        net = net_with_more()
        optimizer, seen = row(net, comm), 0
        for step in range(40):
            train(net, optimizer, range(step, step + 1))
            if optimizer._asleep.mask is None:
                continue
            asleep, seen = optimizer._asleep.mask, seen + 1
            words = asleep[optimizer.flat.place(len(optimizer.flat.parameters) - 1)].reshape(10, 3)
            assert words[LATE + NEVER].all()
            assert not words[USED + ALONE].any()
            assert not optimizer.arrays["v"][asleep].any()
            arrays = optimizer.replicated() | optimizer.per_rank()
            for name in ("m", "u", "fresh", "e_i"):
                assert name not in arrays or not arrays[name][asleep].any(), name
            if "plan.residual" in arrays:
                move = optimizer.state_tree().arrays()["plan.residual"].reshard
                assert not arrays["plan.residual"][asleep[move.start : move.stop]].any()
        return seen

    assert min(virtual.results(n, program)) > 20


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "make", [Lion, Signum, lambda *a, **o: Signum(*a, momentum=0.0, **o)], ids=["lion", "signum", "sign"]
)
def test_the_sign_of_nothing_is_nothing(make, n):
    """What has neither momentum nor gradient on any rank does not move; without momentum that is asked in every step."""

    def program(comm):
        table = torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(8, 3))
        optimizer, again = make([table], comm, lr=0.125), []
        for step in range(12):
            before, seen = table.detach().clone(), [step % 4, (step + comm.Get_rank()) % 4, *([5] if step == 7 else [])]
            optimizer.zero_grad()
            (table[seen] + 4).square().sum().backward()
            optimizer.step()
            everywhere = {step % 4} | {(step + rank) % 4 for rank in range(n)} | ({5} if step == 7 else set())
            moved = {row for row in range(8) if not torch.equal(table[row], before[row])}
            assert step % 4 in moved
            assert moved <= {0, 1, 2, 3, 5}
            again.append(moved <= everywhere)
            assert (5 in moved) <= (step >= 7)
        return again, table.detach().numpy().copy()

    runs = virtual.results(n, program)
    assert all(same_bits(run[1], runs[0][1]) for run in runs)
    assert all(runs[0][0]) == (make not in (Lion, Signum))


# ---- state, errors, messages

FIRST = {"layer": 14, "words": 15}


@pytest.mark.parametrize(("n", "before"), [
    (2, 17), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((2, 10), (3, 15), (3, 22)))
])
@rows(lambda row: row.rests)
def test_a_resume_is_exact_in_a_warm_up_of_its_own(row, before, n):
    """While the layer sleeps, before and after its first step, when it has joined; and with words that have woken."""

    def program(comm):
        net, other = net_with_more(), net_with_more()
        optimizer = row(net, comm)
        train(net, optimizer, range(before), **FIRST)
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = row(other, comm)
        train(other, resumed, range(2))  # further than nothing
        other.load_state_dict(saved["net"])
        resumed.load_state_dict(saved["optimizer"])
        steps = range(before, before + 12)
        assert same_bits(train(net, optimizer, steps, **FIRST), train(other, resumed, steps, **FIRST))
        assert same_bits(everything(net, optimizer), everything(other, resumed))

    virtual.results(n, program)


@pytest.mark.parametrize("before", [7, 8, 11])
@with_variance
def test_a_resume_is_exact_after_rests(row, before):
    """Of a layer that has no gradient in steps 7 and 11, which update the variance."""

    def program(comm):
        net, other = net_with_more(), net_with_more()
        optimizer = row(net, comm)

        def steps(net, optimizer, numbers):
            return [train(net, optimizer, [step], layer=None if step in (6, 10) else 0) for step in numbers]

        steps(net, optimizer, range(before))
        model, state = copy.deepcopy(net.state_dict()), optimizer.state_dict()
        resumed = row(other, comm)
        other.load_state_dict(model)
        resumed.load_state_dict(state)
        rest = range(before, before + 9)
        assert same_bits(steps(net, optimizer, rest), steps(other, resumed, rest))
        assert same_bits(everything(net, optimizer), everything(other, resumed))

    virtual.results(2, program)


@pytest.mark.parametrize("before", [17, *(pytest.param(when, marks=pytest.mark.exhaustive) for when in (10, 27))])
@rows(lambda row: row.rests and hasattr(row.make, "counters"))
def test_checkpoints_in_a_warm_up_of_its_own(row, before):
    """The same number of ranks goes on to the last bit; another one with equal replicas, and what sleeps sleeps on."""
    store, start = MemoryStore(), net_with_more().words.weight.detach()

    def begin(comm):
        net = net_with_more()
        optimizer = row(net, comm)
        training = Training(model=net, optimizer=optimizer, random=False)
        train(net, optimizer, range(before), **FIRST)
        training.save(store, comm, before)
        return train(net, optimizer, range(before, before + 12), **FIRST)

    def go_on(comm, policy):
        net = net_with_more()
        optimizer = row(net, comm)
        assert Training(model=net, optimizer=optimizer, random=False).resume(store, comm, policy=policy) == before
        path = train(net, optimizer, range(before, before + 12), **FIRST)
        optimizer.synchronize()
        assert torch.equal(net.words.weight[NEVER], start[NEVER])
        assert not torch.equal(net.late.weight, net_with_more().late.weight)
        return path, parameters_of(net)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        path = virtual.results(3, begin)
        again = virtual.results(3, lambda comm: go_on(comm, "exact"))
        others = [virtual.results(2, lambda comm, policy=policy: go_on(comm, policy)) for policy in POLICIES[1:]]
    assert same_bits([row[0] for row in again], path)
    assert all(same_bits(a[1], b[1]) for a, b in others)


@pytest.mark.parametrize("before", [6, 16, 25])
@with_variance
def test_states_of_earlier_versions_are_loaded(row, before):
    """They do not say who is late, and have momenta and errors of entries that sleep."""

    def program(comm):
        net = net_with_more()
        optimizer = row(net, comm)
        train(net, optimizer, range(before))
        state, start = optimizer.state_dict(), net.words.weight.detach().clone()
        late, model = net.late.weight.detach().clone(), copy.deepcopy(net.state_dict())
        for name in ("counted", "renewed"):
            state["counters"].pop(name, None)
        for arrays in (state["arrays"], state["rules"]["momentum"]["arrays"]):
            for name in arrays.keys() & {"m", "fresh", "e_i"} if optimizer._asleep.mask is not None else ():
                arrays[name][torch.from_numpy(optimizer.arrays["v"] == 0)] = 0.01
        resumed = row(net, comm)
        train(net, resumed, range(20))  # which knows that nobody is late
        net.load_state_dict(model)
        resumed.load_state_dict(state)
        assert resumed.counted[len(resumed.counted) - 2] == 0
        assert set(resumed.counted) == {0, before}
        train(net, resumed, range(before, before + 30), layer=before + 10)
        resumed.synchronize()
        assert torch.equal(net.words.weight[NEVER], start[NEVER])
        assert not torch.equal(net.late.weight, late)
        return parameters_of(net)

    assert same_bits(*virtual.results(2, program))


@pytest.mark.parametrize("first", [16, 26])
@with_variance
def test_what_cannot_be_exchanged_wakes_nothing(row, first):
    """An overflow that only an exchange sees, in the step in which the layer and the words have their first gradient."""

    def program(comm):
        net, twin = net_with_more(), net_with_more()
        optimizer, undisturbed = row(net, comm), row(twin, comm)
        for pair in ((net, optimizer), (twin, undisturbed)):
            train(*pair, range(first))
        before, rule = everything(net, optimizer, "sent_nbytes", "other_nbytes"), optimizer.rules["momentum"]

        def overflow(*_, **__):
            raise NonFiniteError("overflow", (0,))

        options = {"layer": first, "words": first}
        for where, name in ((rule, "step"), (optimizer, "mean")):
            setattr(where, name, overflow)
            if (
                name == "mean"
                or getattr(optimizer, "local_step_interval", 1) == getattr(optimizer, "local_steps", 0) + 1
            ):
                with pytest.raises(NonFiniteError):
                    train(net, optimizer, range(first, first + 1), **options)
                assert same_bits(everything(net, optimizer, "sent_nbytes", "other_nbytes"), before)
            delattr(where, name)
        steps = range(first, first + 12)
        assert same_bits(train(net, optimizer, steps, **options), train(twin, undisturbed, steps, **options))

    virtual.results(2, program)


CALLS = ("Allgather", "Alltoall", "Alltoallv", "Iallgather", "allgather", "Bcast")


@with_variance
def test_sleepers_cost_messages_only_when_they_wake(row):
    """A handshake of 40 bytes; then, in the one step, one alltoall and one allgather of a bit for each of them."""

    def program(comm):
        net, calls, shakes = net_with_more(), [], set()
        optimizer = row(net, comm)
        for name in CALLS:
            call = getattr(comm, name)
            setattr(comm, name, lambda *a, call=call, name=name: calls.append((name, *a)) or call(*a))
        counts, sent = [], []
        for step in range(32):
            calls.clear()
            before = optimizer.sent_nbytes
            train(net, optimizer, range(step, step + 1), words=24)
            shakes.add(calls[0][1].nbytes)
            counts.append([name for name, *_ in calls])
            sent.append(optimizer.sent_nbytes - before)
        assert shakes == {40}
        return counts, sent

    for counts, sent in virtual.results(2, program):
        assert len(counts[24]) in (len(counts[16]) + 2, 3)  # 0/1 Adam exchanges nothing else in this step
        assert counts[24][1:3] == ["Alltoall", "Allgather"]
        a_rank = 2  # bytes, of 3 unused parameters, 8 entries of the layer and 15 of words
        assert sent[24] == 2 * a_rank + (sent[16] if len(counts[24]) > 3 else 0)
        assert all(len(names) <= len(counts[16]) for names in counts[25:])


@pytest.mark.parametrize(("n", "before"), [(2, 17), pytest.param(3, 24, marks=pytest.mark.exhaustive)])
@with_variance
def test_what_comes_late_in_16_bits(row, before, n):
    """It trains, replicas stay equal, what never had a gradient stays, and a resume is exact, masters included."""

    def program(comm):
        net, other = net_with_more(torch.bfloat16), net_with_more(torch.bfloat16)
        start, rank = copy.deepcopy(net), comm.Get_rank()
        optimizer = row(net, comm, **row.learning)
        optimizer.check_replicas_every = 3
        train(net, optimizer, range(before), layer=10, words=14)
        model, state = copy.deepcopy(net.state_dict()), optimizer.state_dict()
        resumed = row(other, comm, **row.learning)
        other.load_state_dict(model)
        resumed.load_state_dict(state)
        steps = range(before, 100)
        paths = [train(*pair, steps, layer=10, words=14) for pair in ((net, optimizer), (other, resumed))]
        assert same_bits(*paths)
        assert same_bits(everything(net, optimizer), everything(other, resumed))
        optimizer.synchronize()
        assert torch.equal(net.words.weight[NEVER], start.words.weight[NEVER])
        assert not torch.equal(net.words.weight[LATE], start.words.weight[LATE])
        assert of_late(net, rank, 10**6) < 0.7 * of_late(start, rank, 10**6)
        return parameters_of(net), optimizer.flat.values.copy()

    rows_ = virtual.results(n, program)
    assert all(same_bits(row, rows_[0]) for row in rows_)


@rows(lambda row: row.rests and row.make is not adamw_updates and not row.own & {"m_i", "v_i", "y"})
def test_what_comes_late_when_a_rank_has_run_out_of_data(row):
    """The same bits as where that rank has no gradients any more, but for what goes on by a momentum of its own there."""
    last, options = 13, {"layer": 16, "words": 16}  # steps of rank 1, and when the others come to what is late

    def program(comm, joins):
        net = net_with_more()
        optimizer, out = row(net, comm), comm.Get_rank() == 1
        with optimizer.join() if joins else nullcontext():
            train(net, optimizer, range(last if out else 45), **options)
            for _ in range(45 - last if out and not joins else 0):
                optimizer.zero_grad()
                optimizer.step()
        assert optimizer.steps == 45
        optimizer.synchronize()
        return everything(net, optimizer)

    expected = virtual.results(3, lambda comm: program(comm, joins=False))
    assert same_bits(virtual.results(3, lambda comm: program(comm, joins=True)), expected)


# ---- parameters that rest


def kept_for(optimizer, number):
    """Copies of all that optimizer and rules keep for a parameter."""
    flat, found = optimizer.flat, []
    rules = [(bucket.feedback, bucket.part) for bucket in getattr(optimizer, "buckets", ())]
    owners = rules or [(optimizer, slice(0, flat.d))]
    for owner, part in owners:
        for name, leaf in owner.state_tree().arrays().items():
            array, move = leaf.array, leaf.reshard
            start = part.start + (move.start if move is not None and move.how == "cut" else 0)
            size = move.stop - move.start if move is not None and move.how == "cut" else part.stop - part.start
            place = flat.place(number)
            if array.size == size and name not in ("u", "x"):
                found.append(array[max(place.start - start, 0) : max(place.stop - start, 0)].copy())
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
@rows(lambda row: row.own and row.saves > 1 and row.rests)
def test_what_rests_keeps_its_errors_momenta_and_estimates(row, n):
    def program(comm):
        net = net_with_more()
        optimizer, rank = row(net, comm), comm.Get_rank()
        for step in range(19):
            optimizer.zero_grad()
            (loss_in(net, rank, step) + of_late(net, rank, step)).backward()
            optimizer.step()
        optimizer.synchronize()
        number = len(optimizer.flat.parameters) - 2
        before = kept_for(optimizer, number)
        assert any(array.any() for array in before)
        train(net, optimizer, range(19, 31))
        optimizer.synchronize()
        assert same_bits(kept_for(optimizer, number), before)

    virtual.results(n, program)


def going_on(comm, rule, plan, compressor, *, overlap, rests):
    """Return the path of a layer in buckets of its own in the steps in which it has a gradient."""
    net, path = net_with_more(), []
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1)
    optimizer = DistributedOptimizer(sgd, comm, compressor, placement="gradient", rule=rule, plan=plan, bucket_nbytes=1,
                                     overlap=overlap)
    for step in range(24):
        optimizer.zero_grad()
        loss = loss_in(net, comm.Get_rank(), step)
        if step not in rests:
            loss = loss + of_late(net, comm.Get_rank(), step - sum(rest < step for rest in rests))
        before = net.late.weight.detach().clone()
        loss.backward()
        optimizer.step()
        if step in rests:
            assert torch.equal(net.late.weight, before)
        else:
            path.append(net.late.weight.detach().numpy().copy())
    return path


# What needs only a gradient, and draws nothing by the number of the step.
SIMPLE = ("ef14", "ef21", "econtrol", "ef14-momentum", "lion", "ef21-sgdm", "ef21-sgd2m", "ef21-hb", "ef21-bc")


WAYS = {"TopK": (plan_for, TopK(0.4)), "TopK two phases": (TwoPhaseMean, TopK(0.4)), "Sign": (plan_for, Sign(block=4))}


@pytest.mark.parametrize(("rule", "way"), [
    pytest.param(rule, way, marks=[pytest.mark.exhaustive] * (way != "TopK two phases" and (rule, way) != ("ef21", "Sign")))
    for rule in SIMPLE for way in WAYS
])
def test_a_layer_goes_on_after_a_rest_as_if_there_had_been_none(rule, way):
    """All that is kept for it waits: errors, estimates, momenta of rule and torch optimizer."""

    def program(comm):
        expected = going_on(comm, rule, *WAYS[way], overlap=False, rests=())
        for overlap in (False, True):
            path = going_on(comm, rule, *WAYS[way], overlap=overlap, rests=range(9, 15))
            assert len(path) == 18
            assert same_bits(path, expected[:18])

    virtual.results(2, program)


STARTING = ("ef14", "ef21(momentum=0.75)", "ef21-sgdm", "ef21-sgd2m")


@pytest.mark.parametrize(("rule", "way"), [
    *((rule, "TopK") for rule in STARTING), ("ef21-sgdm", "TopK two phases"), ("ef21-sgd2m", "Sign"),
])
def test_a_layer_that_comes_late_begins_as_if_all_began_with_it(rule, way):
    """An average of its own gradients with the first of them, as in the papers; without dense steps."""

    def program(comm):
        expected = going_on(comm, rule, *WAYS[way], overlap=False, rests=())
        for overlap in (False, True):
            path = going_on(comm, rule, *WAYS[way], overlap=overlap, rests=range(6))
            assert len(path) == 18
            assert same_bits(path, expected[:18])

    virtual.results(2, program)


def muon(net, comm, **options):
    return EF21Muon(net.parameters(), comm, TopK(0.3), lr=0.02, beta=0.25, **options)


def wrapped(net, comm, **options):
    return DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), comm, TopK(0.3), placement="gradient",
                                rule="ef21-sgd2m", eta=0.25, dense_steps=1, **options)


@pytest.mark.parametrize(("make", "options"), [
    (muon, {}), (muon, {"overlap": True}), (wrapped, {}), (wrapped, {"bucket_nbytes": 40}),
    (wrapped, {"bucket_nbytes": 40, "overlap": True}),
])
def test_averages_of_what_comes_late_begin_with_its_first_gradient(make, options):
    """On all ranks where one has it; not in a step that is skipped, and once after a resume and a rest."""
    def program(comm):
        rank, net, other = comm.Get_rank(), net_with_more(), net_with_more()
        optimizer = make(net, comm, **options)
        number = next(n for n, p in enumerate(optimizer.flat.parameters) if p is net.late.weight)
        names = [name for name in ("v_i", "u_i") if name in optimizer.feedback.state.leaves()]

        def averages():
            place = optimizer.flat.place(number)
            (bucket,) = [b for b in optimizer.buckets if b.part.start <= place.start < b.part.stop]
            part = slice(place.start - bucket.part.start, place.stop - bucket.part.start)
            return [getattr(bucket.feedback.state, name)[part].copy() for name in names]

        def step(number, grad=None):
            optimizer.zero_grad()
            loss = loss_in(net, rank, number)
            if grad is not None:
                loss = loss + (net.late.weight * grad).sum()
            loss.backward()
            optimizer.step()

        for at in range(3):
            step(at)
        assert not any(average.any() for average in averages())
        step(3, torch.full((2, 4), torch.nan) if rank else torch.ones(2, 4))
        assert optimizer.skipped_steps == 1
        assert not any(average.any() for average in averages())
        model, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
        resumed = make(other, comm, **options)
        other.load_state_dict(model)
        resumed.load_state_dict(state)
        net, optimizer = other, resumed
        first, second = (torch.arange(8.0).reshape(2, 4) + 10 * n - rank for n in (0, 1))
        step(4, first if rank else None)  # rank 0 takes part with zeros
        begun = first.numpy().reshape(-1) if rank else np.zeros(8, np.float32)
        assert same_bits(averages(), [begun] * len(names))
        step(5)
        assert same_bits(averages(), [begun] * len(names))
        step(6, second)
        expected = 0.75 * begun + 0.25 * second.numpy().reshape(-1)
        np.testing.assert_allclose(averages()[0], expected, rtol=1e-6)

    with warnings.catch_warnings():  # outside of the ranks, which are threads
        warnings.simplefilter("ignore", RuntimeWarning)
        virtual.results(2, program)
