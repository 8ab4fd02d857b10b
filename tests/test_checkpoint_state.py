"""A training that is saved and put back: on as many ranks to the last bit, on others with the means over the ranks kept."""

import copy
import functools
import io
import json
import random
import warnings
from collections import Counter, OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import virtual
from programs import (
    CLIENT_OPTIONS,
    CLIENT_RULES,
    OPTIMIZERS,
    PLANS,
    build_optimizer,
    clients_feedback,
    own_vectors,
    same_bits,
)
from stored import MemoryStore
from training import loss_in, net_of, parameters_of, seeded
from vectors_for_tests import gaussian

from mpi_ef.checkpoint import BFLOAT16, Store
from mpi_ef.collectives import ClientsMean, GatherMean, RobustMean, TwoPhaseMean, plan_for
from mpi_ef.compress import RandK, Sign, TopK
from mpi_ef.data import ShardedSampler
from mpi_ef.errors import MpiEfError, OptionError, PeerError
from mpi_ef.feedback import RULES, ErrorFeedback
from mpi_ef.optim import (
    DistributedOptimizer,
    EF21Muon,
    Lion,
    OneBitAdam,
    OneBitLamb,
    PowerSGD,
    ZeroOneAdam,
)
from mpi_ef.robust import Median
from mpi_ef.state.components import GeneratorComponent, RandomComponent
from mpi_ef.state.reshard import RestoreView, mean_over_ranks
from mpi_ef.state.training import Training
from mpi_ef.state.tree import decoded, encoded, tensor_of

SIGNS = Sign(block=64)
zero_one = functools.partial(ZeroOneAdam, compressor=SIGNS, lr=0.01, var_freeze_step=4, var_update_scaler=2,
                             local_step_scaler=2, local_step_clipper=4)

BUILDERS = {
    name: functools.partial(lambda name, net, comm: build_optimizer(name, net, comm), name) for name in OPTIMIZERS
}
BUILDERS |= {
    "1-bit adam": lambda net, comm: OneBitAdam(net.parameters(), comm, freeze_step=6, compressor=SIGNS, lr=0.01),
    "0/1 adam": lambda net, comm: zero_one(net.parameters(), comm),
    "1-bit lamb": lambda net, comm: OneBitLamb(net.parameters(), comm, freeze_step=6, lr=0.01),
    "lion": lambda net, comm: Lion(net.parameters(), comm, lr=1e-3, weight_decay=0.1),
    "ef21 muon": lambda net, comm: EF21Muon(net.parameters(), comm, TopK(0.2), lr=0.05),
    "powersgd": lambda net, comm: PowerSGD(net.parameters(), comm, lr=0.05, rank=2),
    "overlap": lambda net, comm: DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), comm, SIGNS, placement="gradient", overlap=True,
        bucket_nbytes=100,
    ),
    "buckets of econtrol": lambda net, comm: DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05), comm, TopK(0.3), placement="gradient", rule="econtrol",
        bucket_nbytes=100, dense_steps=1,
    ),
    "two-phase ef21-bc": lambda net, comm: DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05), comm, TopK(0.3), placement="gradient", rule="ef21-bc", plan=TwoPhaseMean
    ),
}


def trained(net, optimizer, comm, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_in(net, comm.Get_rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(net, optimizer):
    return parameters_of(net), optimizer.replicated(), optimizer.per_rank(), optimizer.sent_nbytes, optimizer.steps


def quiet(n, program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return virtual.results(n, program)


@pytest.mark.parametrize("fresh", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["new", "used"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_resume_that_fails_changes_nothing(name, fresh):
    """Whichever array it is that one rank cannot read: all is as it was, on all ranks, and goes on the same."""
    build, store = BUILDERS[name], MemoryStore()

    def program(comm):
        net = net_of()
        optimizer = build(net, comm)
        trained(net, optimizer, comm, range(5))
        Training(model=net, optimizer=optimizer, random=False).save(store, comm, 5)
        twins = []
        for _ in range(2):
            other = seeded(net_of())
            twins.append((other, build(other, comm)))
            trained(*twins[-1], comm, range(0 if fresh else 5))  # some optimizers are refused by state of before their start
        one, twin = twins
        for array in sorted({*store.last.shared, *store.last.ranks[0]})[::5]:
            comm.allgather(None)
            store.last.broken = {array}
            with pytest.raises(MpiEfError, match="cannot be read"):
                Training(model=one[0], optimizer=one[1], random=False).resume(store, comm)
            assert same_bits(state_of(*one), state_of(*twin)), array
        for each in twins:
            trained(*each, comm, range(5, 8))
        assert same_bits(state_of(*one), state_of(*twin))

    virtual.results(2, program)


@pytest.mark.parametrize("before", [1, 5, 9])
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("n", [1, 3])
def test_save_load_step_is_step(n, name, before):
    """Law 7."""
    build, after = BUILDERS[name], 4

    def program(comm):
        store = stores[0]
        net = net_of()
        optimizer = build(net, comm)
        trained(net, optimizer, comm, range(before))
        Training(model=net, optimizer=optimizer, random=False).save(store, comm, before)
        other = net_of()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        resumed = build(other, comm)
        assert Training(model=other, optimizer=resumed, random=False).resume(store, comm) == before
        assert same_bits(state_of(other, resumed), state_of(net, optimizer))
        trained(net, optimizer, comm, range(before, before + after))
        trained(other, resumed, comm, range(before, before + after))
        assert same_bits(state_of(other, resumed), state_of(net, optimizer))

    stores = [MemoryStore()]
    virtual.results(n, program)


def with_rule(rule, net, comm, dense_steps=0, **options):
    """Any rule on gradients: those that want clients have one on every rank."""
    plan = plan_for
    if rule in ("clag", "ef21-plus", "ef21-pp", "ef21-w"):
        weights = np.arange(1.0, comm.Get_size() + 1) / sum(range(comm.Get_size() + 1)) if rule == "ef21-w" else None
        plan = functools.partial(ClientsMean, clients=comm.Get_size(), weights=weights)
    if rule.startswith("byz-"):
        plan = functools.partial(RobustMean, aggregator=Median(), f=0)  # which is no mean
    compressor = RandK(0.2, seed=3) if rule == "marina" else TopK(0.2)
    sgd, more = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.5), CLIENT_OPTIONS.get(rule, {})
    options = more | ({"participation": 0.4} if rule == "ef21-w" else {}) | options
    return DistributedOptimizer(sgd, comm, compressor, placement="gradient", rule=rule, plan=plan, dense_steps=dense_steps,
                                **options)


def stepped(net, optimizer, comm, steps):
    """Parameters and state after every step; in some of them nobody has a gradient of the last layer."""
    for step in steps:
        optimizer.zero_grad()
        loss_in(net, comm.Get_rank(), step).backward()
        if step % 3 == 1:
            net.last.weight.grad = None
        optimizer.step()
        yield copy.deepcopy(state_of(net, optimizer))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_goes_on_exactly_inside_of_its_dense_steps_and_after(rule):
    """Saved after every step, by `Training`, and by torch.save and torch.load with their defaults."""
    dense_steps, last = 3, 9

    def program(comm):
        net, stores, files, path = net_of(), everywhere, [], []
        optimizer = with_rule(rule, net, comm, dense_steps)
        for number, state in enumerate(stepped(net, optimizer, comm, range(last)), 1):
            path.append(state)
            Training(model=net, optimizer=optimizer, random=False).save(stores[number], comm, number)
            files.append(io.BytesIO())
            torch.save((net.state_dict(), optimizer.state_dict()), files[-1])
        for number in range(1, dense_steps + 3):
            twins = [(other, with_rule(rule, other, comm, dense_steps)) for other in (net_of(), net_of())]
            assert (
                Training(model=twins[0][0], optimizer=twins[0][1], random=False).resume(stores[number], comm) == number
            )
            files[number - 1].seek(0)
            for part, state in zip(twins[1], torch.load(files[number - 1]), strict=True):
                part.load_state_dict(state)
            for twin in twins:
                assert same_bits(state_of(*twin), path[number - 1])
                for step, state in enumerate(stepped(*twin, comm, range(number, last)), number):
                    assert same_bits(state, path[step]), f"saved after {number}, differs after {step + 1} steps"

    everywhere = {number: MemoryStore() for number in range(1, last + 1)}
    virtual.results(2, program)


@pytest.mark.parametrize("rule", CLIENT_RULES)
def test_every_rule_by_itself_goes_on_exactly_inside_of_its_dense_steps(rule):
    """With several clients on a rank; states of plain numbers, texts and arrays."""

    def program(comm):
        feedback, path, states = clients_feedback(comm, rule, dense_steps=3), [], []
        for step in range(7):
            path.append(feedback.step(own_vectors(feedback.plan, step)).copy())
            states.append(feedback.state_dict())
        assert {type(option) for option in states[-1]["options"].values()} <= {int, float}
        others = {type(value) for value in states[-1].values()}
        assert others <= {int, str, dict}
        for number in range(1, 6):
            twin = clients_feedback(comm, rule, dense_steps=3)
            twin.load_state_dict(states[number - 1])
            for step in range(number, 7):
                assert same_bits(twin.step(own_vectors(twin.plan, step)).copy(), path[step]), (number, step)
                assert same_bits(twin.state_dict(), states[step])
        feedback.load_state_dict(states[4])  # it has sent more since
        assert same_bits(feedback.state_dict(), states[4])

    virtual.results(2, program)


@pytest.mark.parametrize("rule", ["ef21-bc", "d-ec-sgd"])
def test_states_of_earlier_versions_have_compressors_and_are_loaded(rule):
    def program(comm):
        nets = net_of(), net_of()
        optimizer, other = (with_rule(rule, net, comm) for net in nets)
        trained(nets[0], optimizer, comm, range(3))
        state = optimizer.state_dict()
        state["feedback"][0]["options"] = dict(optimizer.feedback.options)
        assert not all(isinstance(option, int | float) for option in optimizer.feedback.options.values())
        nets[1].load_state_dict(nets[0].state_dict())
        other.load_state_dict(state)
        for net, each in zip(nets, (optimizer, other), strict=True):
            trained(net, each, comm, range(3, 6))
        assert same_bits(state_of(nets[0], optimizer), state_of(nets[1], other))

    virtual.results(2, program)


def test_options_that_are_numbers_of_numpy_are_plain_ones_in_states():
    def program(comm):
        net = net_of()
        optimizer, file = with_rule("econtrol", net, comm, eta=np.linspace(0, 1, 5)[1]), io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert torch.load(file)["feedback"][0]["options"] == {"eta": 0.25}

    virtual.results(2, program)


def moved(store, n, build, steps, policy="redistribute", dtype=torch.float32, **more):
    """Resume on n ranks, train, save; return per rank the losses, parameters and the optimizer."""

    def program(comm):
        net = net_of(dtype)
        optimizer = build(net, comm)
        training = Training(model=net, optimizer=optimizer, random=False, **more)
        start = training.resume(store, comm, policy=policy)
        at_start = parameters_of(net), {k: a.copy() for k, a in (optimizer.per_rank() | optimizer.replicated()).items()}
        losses = trained(net, optimizer, comm, range(start, start + steps))
        training.save(store, comm, start + steps)
        return losses, parameters_of(net), at_start, optimizer, training.notes

    return quiet(n, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_four_ranks_two_three_and_four_again(name):
    store, path, replicas = MemoryStore(), [], name != "0/1 adam"
    for n in (4, 2, 3, 4):
        rows = moved(store, n, BUILDERS[name], 15)
        for row in rows[1:]:
            assert same_bits(row[2][0], rows[0][2][0])  # as loaded, also where 0/1 Adam's ranks had gone on alone
            assert not replicas or same_bits(row[1], rows[0][1])
        path.append(np.mean([row[0] for row in rows], axis=0))
        assert all(row[3].steps == store.last.step for row in rows)
    losses = np.concatenate(path)
    assert losses[-1] < losses[0]
    for place in (15, 30, 45):  # data differ from step to step and from world to world, but no jump
        assert losses[place : place + 3].mean() < 1.5 * losses[place - 5 : place].mean()


@pytest.mark.parametrize("name", ["ef21", "econtrol", "buckets of econtrol", "ef21 muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimates_have_the_aggregate_as_their_mean_to_the_last_bit(name, dtype):
    store = MemoryStore()
    moved(store, 4, BUILDERS[name], 7, dtype=dtype)
    for n in (3, 2, 4):
        old = store.last
        rows = moved(store, n, BUILDERS[name], 5, dtype=dtype)
        for _, _, (_, arrays), _, _ in rows:
            for key in arrays:
                if key.endswith(("g_i", "h_i")):
                    aggregate = arrays[key.removesuffix("_i")]
                    assert same_bits(arrays[key], aggregate)
                    assert same_bits(aggregate, old.replicated(f"optimizer.{key.removesuffix('_i')}"))
                if key.endswith("e_i"):
                    of_old = np.mean(
                        [old.per_rank(f"optimizer.{key}", r).astype("f8") for r in range(old.world_size)], axis=0
                    )
                    np.testing.assert_allclose(arrays[key], of_old, rtol=2.0**-23 if dtype == torch.float32 else 1e-15,
                                               atol=1e-18)


# What the papers rely on, rule by rule, with the bits of a rule's own state ------------------------------------------


MOVES = {
    "ef14": {"e_i": "mean"},
    "ef21": {"g_i": "copy of g + residual"},
    "econtrol": {"e_i": "mean", "h_i": "copy of h + residual"},
    "ef14-momentum": {"e_i": "mean"},
    "lion": {"m_i": "mean"},
    "ef21-sgdm": {"g_i": "copy of g + residual", "v_i": "mean"},
    "ef21-sgd2m": {"g_i": "copy of g + residual", "v_i": "mean", "u_i": "mean"},
    "ef21-hb": {"g_i": "copy of g + residual"},
    "ef21-pp": {"g_i": "copy of g + residual"},
    "ef21-w": {"g_i": "copy of g + residual"},
    "ef21-bc": {"g_i": "mean"},
    "ef21-plus": {},
    "ef21-page": {"g_i": "copy of g + residual", "v_i": "mean"},
    "marina": {},
    "clag": {"g_i": "copy of g + residual", "y_i": "mean"},
    "d-ec-sgd": {"e_i": "mean", "h_i": "copy of h"},
    "byz-ef21": {"g_i": "copy of g"},
    "byz-ef21-sgdm": {"g_i": "copy of g", "v_i": "copy of g"},
    "byz-ef21-bc": {"g_i": "copy of g"},
}


def test_the_table_says_for_every_array_how_it_moves():
    def text(move):
        return move.how + (f" of {move.of}" if move.of else "") + (f" + {move.owed}" if move.owed else "")

    table = {name: {key: text(mark.reshard) for key, mark in rule.state.marks().items() if mark.reshard}
             for name, rule in RULES.items()}
    assert table == MOVES
    for rule in RULES.values():
        marks = rule.state.marks()
        assert all((mark.reshard is None) == (mark.kind == "replicated") for mark in marks.values())
        assert all(mark.reshard.of in marks for mark in marks.values() if mark.reshard and mark.reshard.how == "copy")


FORGOTTEN = {  # what policy="reset" sets to zero
    "ef14": "e_i", "ef21": "g g_i", "econtrol": "e_i h h_i", "ef14-momentum": "e_i", "lion": "", "ef21-sgdm": "g g_i",
    "ef21-sgd2m": "g g_i", "ef21-hb": "g g_i", "ef21-pp": "g g_i", "ef21-w": "g g_i", "ef21-bc": "behind g g_i",
    "ef21-plus": "all_i g", "ef21-page": "g g_i", "marina": "", "clag": "g g_i y_i", "d-ec-sgd": "e_i h h_i",
    "byz-ef21": "g rows suspects", "byz-ef21-sgdm": "g rows suspects", "byz-ef21-bc": "aggregate behind g rows suspects",
}


@pytest.mark.parametrize("rule", RULES)
def test_reset_forgets_errors_and_estimates_and_no_momenta(rule):
    def program(comm):
        feedback = clients_feedback(comm, rule) if rule != "ef14-momentum" else (
            ErrorFeedback(rule, GatherMean(comm, TopK(0.1), 20, np.float64)))
        for array in (feedback.per_rank() | feedback.replicated()).values():
            array.fill(1)
        feedback.steps = 5
        feedback.forget()
        arrays = feedback.per_rank() | feedback.replicated()
        assert " ".join(sorted(name for name, array in arrays.items() if not array.any())) == FORGOTTEN[rule]
        assert feedback.steps == (0 if "g" in FORGOTTEN[rule] or "h" in FORGOTTEN[rule] else 5)

    virtual.results(2, program)


@pytest.mark.parametrize("rule", CLIENT_RULES)
def test_clients_move_with_their_number(rule):
    """On any sequence of worlds the results are those of one rank that was never interrupted, to the last bit."""

    def program(comm, resume, count):
        feedback = clients_feedback(comm, rule)
        training, start = Training(rule=feedback, random=False), 0
        if resume:
            start = training.resume(store, comm, policy="redistribute")
        steps = range(start, start + count)
        out = [feedback.step(own_vectors(feedback.plan, step)).copy() for step in steps]
        training.save(store, comm, start + count)
        return out, feedback.replicated()

    store = MemoryStore()
    expected = virtual.results(1, lambda comm: program(comm, False, 12))[0]
    store, out = MemoryStore(), []
    for n in (4, 2, 3, 4):
        out += quiet(n, lambda comm: program(comm, bool(store.steps), 3))[0][0]
    assert same_bits(out, expected[0])


@pytest.mark.parametrize("rule", ["ef14", "ef14-momentum", "econtrol", "ef21", "ef21-sgdm", "ef21-bc"])
@pytest.mark.parametrize("name", ["gather topk", "two-phase sign", "two-phase topk", "low rank"])
def test_nothing_is_lost_and_nothing_sent_twice(rule, name):
    """What was told plus what is still owed is what was meant, over a sequence of worlds: the rules' own identities."""
    d, options = 2100, {"eta": 0.1} if rule == "econtrol" else {}
    owed, meant, told = [], np.zeros(d), np.zeros(d)

    def program(comm, start):
        feedback = ErrorFeedback(rule, PLANS[name](comm, d, np.float64), **options)
        training = Training(rule=feedback, random=False)
        assert training.resume(store, comm, policy="redistribute") == start
        loaded = {key: a.copy() for key, a in (feedback.per_rank() | feedback.replicated()).items()}
        told = [
            feedback.step(gaussian(comm.Get_rank(), d, np.float64, step=step)).copy()
            for step in range(start, start + 4)
        ]
        training.save(store, comm, start + 4)
        return loaded, feedback.per_rank() | feedback.replicated(), told

    def debt(states):
        parts = [state["plan.residual"] for state in states if "plan.residual" in state]
        error = np.mean([state["e_i"] for state in states], axis=0) if "e_i" in states[0] else np.zeros(d)
        return error + (np.concatenate(parts) if parts else 0.0)

    store = MemoryStore()
    for start, n in ((0, 4), (4, 2), (8, 3), (12, 4)):
        rows = quiet(n, functools.partial(program, start=start))
        loaded, states = [row[0] for row in rows], [row[1] for row in rows]
        scale = max(1.0, np.abs(debt(states)).max())
        if owed:
            np.testing.assert_allclose(debt(loaded), owed[-1], rtol=0, atol=1e-14 * scale)
        owed.append(debt(states))
        meant += sum(
            np.mean([gaussian(r, d, np.float64, step=s) for r in range(n)], axis=0) for s in range(start, start + 4)
        )
        told += sum(rows[0][2])
        if rule == "ef14" and name != "low rank":
            np.testing.assert_allclose(told + owed[-1], meant, rtol=0, atol=1e-12 * scale)
        for state in loaded[1:]:
            shared = [key for key in state if key != "plan.residual"]
            assert all(same_bits(state[key], loaded[0][key]) for key in shared)
        for estimate in {"g_i", "h_i"} & loaded[0].keys() if start and rule != "ef21-bc" else ():
            residuals = [state["plan.residual"] for state in loaded if "plan.residual" in state]
            whole = loaded[0][estimate[0]] + (np.concatenate(residuals) if residuals else 0.0)
            mean = np.mean([state[estimate].astype(np.longdouble) for state in loaded], axis=0)
            assert np.array_equal(mean, whole)


# Everything else that belongs to a training ---------------------------------------------------------------------------


def everything(net, comm):
    """An Adam on updates with a scheduler of each difficult kind, a scaler, a sampler."""
    adam = torch.optim.AdamW(net.parameters(), lr=0.02)
    optimizer = DistributedOptimizer(adam, comm, TopK(0.2))
    steps = torch.optim.lr_scheduler.MultiStepLR(adam, [3, 3, 7])  # a Counter with whole numbers as keys
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=1)  # infinities
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    sampler = ShardedSampler(101, comm, batch=4, seed=1)
    parts = {"optimizer": optimizer, "steps": steps, "plateau": plateau, "scaler": scaler, "sampler": sampler}
    return parts, Training(model=net, random=False, **parts)


def run_everything(net, parts, comm, steps):
    for step in steps:
        parts["optimizer"].zero_grad()
        loss = loss_in(net, comm.Get_rank(), step)
        parts["scaler"].scale(loss).backward()
        parts["scaler"].step(parts["optimizer"])
        parts["scaler"].update()
        parts["steps"].step()
        parts["plateau"].step(loss.item() if comm.Get_size() == 1 else 1.0 / (1 + step // 2))
        parts["sampler"].advance()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2])
def test_a_whole_training_goes_on_to_the_last_bit(n, dtype):
    def program(comm):
        net, other = net_of(dtype), net_of(dtype)
        parts, training = everything(net, comm)
        run_everything(net, parts, comm, range(5))
        if comm.Get_rank() == n - 1:
            parts["scaler"].load_state_dict(parts["scaler"].state_dict() | {"scale": 2.0})
        training.save(store, comm, 5, document={"at": (3, None), "best": float("inf")})
        resumed_parts, resumed = everything(other, comm)
        assert resumed.resume(store, comm) == 5
        assert resumed.document == {"at": (3, None), "best": float("inf")}
        assert resumed.notes == ()
        assert set(resumed.versions) == {"mpi_ef", "numpy", "python", "torch"}

        def state(net, parts):
            optimizer = parts["optimizer"]
            rest = [parts[name].state_dict() for name in ("steps", "plateau", "scaler", "sampler")]
            return (
                parameters_of(net),
                optimizer.flat.values,
                optimizer.per_rank(),
                repr(rest),
                repr(optimizer.state_dict()),
            )

        assert same_bits(state(net, parts), state(other, resumed_parts))
        run_everything(net, parts, comm, range(5, 11))
        run_everything(other, resumed_parts, comm, range(5, 11))
        assert same_bits(state(net, parts), state(other, resumed_parts))
        return [next(iter(parts["sampler"])) for _ in range(1)]

    store = MemoryStore()
    virtual.results(n, program)
    assert n == 1 or "scaler" in store.last.rank_document(0)["values"]  # it differs
    assert "steps" in store.last.document["values"]  # it does not


def test_moments_of_each_rank_become_their_mean_and_masters_stay():
    store = MemoryStore()

    def program(comm, steps):
        net = net_of(torch.bfloat16)
        parts, training = everything(net, comm)
        start = training.resume(store, comm, policy="redistribute")
        state = copy.deepcopy(parts["optimizer"].optimizer.state_dict()["state"])
        values, place = (parts["optimizer"].flat.values.copy(), parameters_of(net)), parts["sampler"].state_dict()
        run_everything(net, parts, comm, range(start, start + steps))
        training.save(store, comm, start + steps)
        return state, values, parts["optimizer"], training.notes, place

    rows = quiet(4, lambda comm: program(comm, 5))
    old = [row[2].optimizer.state_dict()["state"] for row in rows]
    masters = rows[0][2].flat.values.copy()
    for state, (values, _), _, notes, place in quiet(3, lambda comm: program(comm, 4)):
        assert same_bits(values, masters)
        assert place["position"] == 4 * 4 * 5
        assert "errors and momenta are the mean over the old ranks" in notes[0]
        for number, slots in state.items():
            assert slots["step"] == 5
            for slot in ("exp_avg", "exp_avg_sq"):
                mean = torch.stack([of_rank[number][slot].double() for of_rank in old]).mean(0)
                torch.testing.assert_close(slots[slot].double(), mean, rtol=1e-6, atol=1e-12)


def test_zero_one_adam_between_synchronisations_meets_in_the_middle():
    store = MemoryStore()
    rows = moved(store, 4, BUILDERS["0/1 adam"], 9)
    assert not any(row[3].synchronized for row in rows)
    assert not same_bits(rows[0][1], rows[1][1])
    middle = [np.mean([row[1][number] for row in rows], axis=0) for number in range(len(rows[0][1]))]
    later = moved(store, 3, BUILDERS["0/1 adam"], 7)
    for mine, theirs in zip(later[0][2][0], middle, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert all(same_bits(later[2][2][1][key], array) for key, array in later[0][2][1].items() if key != "plan.residual")
    assert same_bits(later[0][3].arrays["x"], later[1][3].arrays["x"])


class WithBuffers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(7)
        self.last = torch.nn.Linear(7, 3)
        self.frozen = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.short = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.seen = 0
        seeded(self)

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_buffers_that_differ_are_of_each_rank_and_others_are_written_once():
    def program(comm):
        torch_net, other = WithBuffers(), WithBuffers()
        torch_net.norm.running_mean += comm.Get_rank()
        torch_net.short += 2
        torch_net.mask[1] = True
        torch_net.seen = 7
        sgd = torch.optim.SGD(torch_net.parameters(), lr=0.1, momentum=0.9)  # a plain optimizer is a part as well
        Training(model=torch_net, optimizer=sgd, random=False).save(store, comm, 3)
        other_sgd = torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.9)
        training = Training(model=other, optimizer=other_sgd, random=False)
        assert training.resume(store, comm, policy="redistribute") == 3
        assert other.state_dict().keys() == torch_net.state_dict().keys()
        for name, value in torch_net.state_dict().items():
            assert torch.equal(other.state_dict()[name], value) if isinstance(value, torch.Tensor) else other.seen == 7
        assert other_sgd.param_groups[0]["lr"] == 0.1

    store = MemoryStore()
    virtual.results(2, program)
    assert set(store.last.rank_document(1)["values"]) == {"model.norm.running_mean"}
    assert store.last.shared["model.short"].dtype == BFLOAT16

    def fewer(comm):
        net = WithBuffers()
        training = Training(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9), random=False)
        with pytest.warns(RuntimeWarning, match="model.norm.running_mean differed between ranks: averaged"):
            training.resume(store, comm, policy="redistribute")
        return net.norm.running_mean.tolist()

    assert virtual.results(1, fewer) == [[0.5] * 7]


class Shares:
    """An object of a user: each rank has a part of a sum, beside something large that is the same everywhere."""

    def __init__(self, rank):
        self.state = {"rank": rank, "part": torch.tensor([rank + 1.0]), "of": {"all": ({"large": torch.arange(5.0)},)},
                      "ready": {"set": torch.ones(1)}}
        self.forgotten = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        assert type(state["of"]) is type(state["ready"]) is dict  # also where it has only been passed on
        self.state = state

    def state_dict_from(self, states, rank, size):
        assert [state["rank"] for state in states] == list(range(len(states)))
        assert states[0].keys() == self.state.keys()
        part = sum(state["part"] for state in states) / size
        return {**states[0], "rank": rank, "part": part, "ready": {**states[-1]["ready"]}}

    def forget(self):
        self.forgotten = self.state["part"].item()  # it has been loaded


@pytest.mark.parametrize("policy", ["redistribute", "reset"])
def test_objects_of_users_say_how_they_go_on_with_other_ranks(policy):
    def program(comm):
        shares = Shares(comm.Get_rank())
        training = Training(shares=shares, random=False)
        start = training.resume(store, comm, policy=policy)
        training.save(store, comm, start + 1)
        return shares, training.notes

    store = MemoryStore()
    for n in (1, 3, 2, 1):
        resumed = bool(store.steps)
        for rank, (shares, notes) in enumerate(quiet(n, program)):
            assert shares.state["rank"] == rank
            assert shares.state["of"]["all"][0]["large"].tolist() == [0, 1, 2, 3, 4]
            assert shares.state["ready"]["set"].tolist() == [1]
            assert shares.state["part"].item() * n == pytest.approx(1)
            assert not any(note.startswith("shares differed") for note in notes)
            anew = resumed and policy == "reset"
            assert ("shares starts without errors and estimates" in notes) == anew
            assert shares.forgotten == (shares.state["part"].item() if anew else 0)


def test_of_the_states_of_other_ranks_only_what_is_asked_for_is_read():
    class Frugal(Shares):
        def state_dict_from(self, states, rank, size):
            return {**states[1], "part": states[0]["part"], "of": {}}

    store = MemoryStore()
    virtual.results(2, lambda comm: Training(x=Frugal(comm.Get_rank()), random=False).save(store, comm, 1))
    store.last.broken = {"x.of.all.0.large"}
    frugal = Frugal(0)
    with pytest.warns(RuntimeWarning, match="step 1 of 2 ranks goes on with 1"):
        virtual.results(1, lambda comm: Training(x=frugal, random=False).resume(store, comm, policy="redistribute"))
    assert (frugal.state["rank"], frugal.state["part"].item(), frugal.state["of"]) == (1, 1.0, {})
    assert frugal.state["ready"]["set"].tolist() == [1]


def test_objects_that_cannot_say_so_take_the_state_of_an_old_rank():
    class Plain:
        def __init__(self, comm):
            self.state = {"saved by": comm.Get_rank()}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    def resume(comm):
        plain = Plain(comm)
        training = Training(plain=plain, random=False)
        training.resume(store, comm, policy="redistribute")
        return plain.state["saved by"], training.notes[1]

    store, note = MemoryStore(), "plain differed between ranks: rank r takes that of old rank r mod 2"
    virtual.results(2, lambda comm: Training(plain=Plain(comm), random=False).save(store, comm, 1))
    assert quiet(3, resume) == [(0, note), (1, note), (0, note)]


def test_random_numbers_go_on_and_new_ranks_begin_anew():
    def save(comm):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(8)
        Training(generator=generator, seed=3).save(store, comm, 2)
        return torch.rand(3), np.random.rand(3), random.random(), torch.rand(3, generator=generator)  # noqa: NPY002

    def resume(comm):
        generator = torch.Generator()
        Training(generator=generator, seed=3).resume(store, comm)
        return torch.rand(3), np.random.rand(3), random.random(), torch.rand(3, generator=generator)  # noqa: NPY002

    store = MemoryStore()
    [before], [after] = virtual.results(1, save), virtual.results(1, resume)
    assert repr(before) == repr(after)
    past, drawn = RestoreView(store.last, 2, 3), []
    for _ in range(2):
        generator = torch.Generator()
        GeneratorComponent("generator", generator).restore(past)
        RandomComponent(SimpleNamespace(Get_rank=lambda: 2)).restore(past)
        drawn.append((torch.rand(3), np.random.rand(3), random.random(), torch.rand(3, generator=generator)))  # noqa: NPY002
    assert repr(drawn[0]) == repr(drawn[1])
    assert not torch.equal(drawn[0][0], after[0])
    assert past.notes[0] == "random numbers of ranks 1 to 2 begin anew from seed 3 and the step"


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(n, store, build, policy="exact", make_net=net_of, **more):
    """Return the error of every rank, after a look that nothing has changed."""

    def program(comm):
        net = make_net()
        optimizer = build(net, comm)
        before = copy.deepcopy(state_of(net, optimizer)), repr(optimizer.param_groups)
        training = Training(model=net, optimizer=optimizer, random=False, **more)
        try:
            training.resume(store, comm, policy=policy)
        finally:
            assert same_bits(before, (state_of(net, optimizer), repr(optimizer.param_groups)))

    errors = virtual.run(n, program)
    assert all(isinstance(error, MpiEfError) for error in errors), errors
    assert all("\n" not in str(error) for error in errors)
    return [str(error) for error in errors]


def test_exact_refuses_another_number_of_ranks_and_names_both():
    store = MemoryStore()
    moved(store, 4, BUILDERS["ef21"], 3)
    for text in refused(2, store, BUILDERS["ef21"]):
        assert text == ('resume: step 3 was saved by 4 ranks, here there are 2; pass policy="redistribute" or "reset", or '
                        "start 4 ranks")


def test_reset_says_so():
    store = MemoryStore()
    moved(store, 4, BUILDERS["econtrol"], 6)

    def program(comm):
        net = net_of()
        optimizer = BUILDERS["econtrol"](net, comm)
        training = Training(model=net, optimizer=optimizer, random=False)
        training.resume(store, comm, policy="reset")
        assert not any(array.any() for array in (optimizer.per_rank() | optimizer.replicated()).values())
        assert optimizer.feedback.steps == 0  # the first step is dense again, as at the start
        assert optimizer.steps == 6
        assert optimizer.optimizer.state_dict()["state"][2]["momentum_buffer"].any()
        trained(net, optimizer, comm, range(6, 9))
        return training.notes, parameters_of(net)

    with pytest.warns(
        RuntimeWarning, match=r"step 6 of 4 ranks goes on with 2: errors, residuals and estimates begin anew"
    ):
        rows = virtual.results(2, program)
    assert rows[0][0][1] == "optimizer starts without errors and estimates"
    assert same_bits(rows[0][1], rows[1][1])


@pytest.mark.parametrize("rule", ["ef14", "ef21", "econtrol", "ef21-sgdm"])
def test_nothing_is_lost_where_another_number_of_ranks_gathers(rule):
    """Messages go through owners on 8 ranks, and are gathered on 3; also where the same ranks take the other plan."""
    d, options = 12_000, {"eta": 0.1} if rule == "econtrol" else {}
    store, told, meant, kinds = MemoryStore(), np.zeros(d), np.zeros(d), []

    def program(comm, start, plan):
        feedback = ErrorFeedback(rule, plan(comm, TopK(0.02), d, np.float64), **options)
        training = Training(rule=feedback, random=False)
        assert training.resume(store, comm, policy="redistribute") == start
        loaded = {key: a.copy() for key, a in (feedback.per_rank() | feedback.replicated()).items()}
        results = [feedback.step(gaussian(comm.Get_rank(), d, np.float64, step=step)).copy()
                   for step in range(start, start + 3)]
        training.save(store, comm, start + 3)
        return loaded, feedback.per_rank() | feedback.replicated(), sum(results), type(feedback.plan)

    worlds = ((3, plan_for), (8, plan_for), (3, plan_for), (3, TwoPhaseMean), (3, plan_for), (7, plan_for), (7, GatherMean))
    owed = np.zeros(d)
    for start, (n, plan) in enumerate(worlds):
        rows = quiet(n, functools.partial(program, start=3 * start, plan=plan))
        kinds.append(rows[0][3])
        for moment, states in ((0, [row[0] for row in rows]), (1, [row[1] for row in rows])):
            parts = [state["plan.residual"] for state in states if "plan.residual" in state]
            residual = np.concatenate(parts) if parts else np.zeros(d)
            assert parts == [] if kinds[-1] is GatherMean else n < 7 or residual.any() or not moment
            if rule == "ef14":
                debt = np.mean([state["e_i"] for state in states], axis=0) + residual
                if not moment:
                    np.testing.assert_allclose(debt, owed, rtol=0, atol=1e-12)
                owed = debt
            else:
                of = "h" if rule == "econtrol" else "g"
                mean = np.mean([state[f"{of}_i"] for state in states], axis=0)
                np.testing.assert_allclose(states[0][of] + residual, mean, rtol=0, atol=1e-12)
        told += rows[0][2]
        meant += sum(np.mean([gaussian(r, d, np.float64, step=s) for r in range(n)], axis=0)
                     for s in range(3 * start, 3 * start + 3))
        if rule == "ef14":
            np.testing.assert_allclose(told + owed, meant, rtol=0, atol=1e-11)
    assert kinds == [GatherMean, TwoPhaseMean, GatherMean, TwoPhaseMean, GatherMean, TwoPhaseMean, GatherMean]


SPARSE = TopK(0.2)


def sgd_with(
    rule="ef14", compressor=SPARSE, nbytes=None, plan=GatherMean, torch_optimizer=torch.optim.SGD, split=False
):
    def build(net, comm):
        named = list(net.parameters())
        groups = [{"params": named[:2]}, {"params": named[2:]}] if split else named
        return DistributedOptimizer(torch_optimizer(groups, lr=0.1), comm, compressor, placement="gradient", rule=rule,
                                    bucket_nbytes=nbytes, plan=plan)

    return build


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (sgd_with(rule="ef21"), "has optimizer: rule ef14, here it is ef21;"),
        (sgd_with(compressor=TopK(0.3)), "has optimizer: compressor TopK(ratio=0.2"),
        (sgd_with(plan=lambda comm, *of: ClientsMean(comm, *of, clients=4)),
         "has optimizer: plan GatherMean, here it is ClientsMean;"),
        (sgd_with(nbytes=100), "has optimizer: number of buckets 1, here it is"),
        (
            sgd_with(torch_optimizer=torch.optim.Adam),
            "has optimizer: optimizer DistributedOptimizer of SGD, here it is Distrib",
        ),
        (sgd_with(split=True), "has optimizer: parameters by group"),
        (BUILDERS["lion"], "has optimizer: optimizer DistributedOptimizer of SGD, here it is Lion;"),
    ],
)
@pytest.mark.parametrize("policy", ["exact", "redistribute"])
def test_a_checkpoint_of_another_optimizer_is_refused(build, text, policy):
    store = MemoryStore()
    moved(store, 2, sgd_with(), 2)
    texts = refused(2 if policy == "exact" else 3, store, build, policy=policy)
    assert len(set(texts)) == 1
    assert text in texts[0]
    assert texts[0].startswith("resume: the checkpoint at step 2 has ")
    assert texts[0].endswith("build the training as it was, or start from nothing in another directory")


def test_a_checkpoint_of_another_model_or_with_other_parts_is_refused():
    store = MemoryStore()
    moved(store, 2, sgd_with(), 2)
    [text, _] = refused(2, store, sgd_with(), make_net=lambda: net_of(torch.float64))
    assert "step 2 has model.first.bias float32 (5,), here it is float64 (5,);" in text

    def wider():
        net = net_of()
        net.more = torch.nn.Linear(2, 2)
        return net

    [text, _] = refused(2, store, sgd_with(), make_net=wider)
    assert "step 2 has model.more.bias not at all, here it is float32 (2,);" in text
    [text, _] = refused(2, store, sgd_with(), sampler=torch.Generator())
    assert "step 2 has no sampler, here there is one;" in text
    [text, _] = refused(2, store, sgd_with(), policy="both")
    assert text == "Training.resume: policy='both' is unknown; take one of exact, redistribute, reset"


def test_what_goes_wrong_on_one_rank_is_raised_on_all():
    def program(comm, broken):
        store, rank = stores[0], comm.Get_rank()
        net = net_of()
        optimizer = BUILDERS["ef21"](net, comm)
        training = Training(model=net, optimizer=optimizer, random=False, odd=Odd(broken if rank == 1 else ""))
        training.save(store, comm, 1 if not (broken == "step" and rank) else 2)
        training.resume(store, comm)

    class Odd:
        def __init__(self, broken):
            self.broken = broken

        def state_dict(self):
            return {"f": print} if self.broken == "save" else {}

        def load_state_dict(self, state):
            if self.broken == "load":
                raise KeyError("momentum")

    for broken, texts in {
        "save": "checkpoint: odd.f is of builtin_function_or_method, which is not stored",
        "load": "resume: load_state_dict: KeyError: 'momentum'",
        "step": "Training.save: ranks disagree on step: 1 on rank 0; 2 on rank",
    }.items():
        stores = [MemoryStore()]
        errors = virtual.run(3, lambda comm, broken=broken: program(comm, broken))
        assert all(isinstance(error, MpiEfError) and texts in str(error) for error in errors), errors
        assert broken == "step" or [isinstance(error, PeerError) for error in errors] == [True, False, True]


def test_an_array_that_one_rank_cannot_read_is_an_error_on_all():
    store = MemoryStore()
    moved(store, 2, BUILDERS["ef21"], 2)
    real = store.last

    class Torn:
        def newest(self, comm):
            found = copy.copy(real)
            found.broken = {"optimizer.g_i"} if comm.Get_rank() == 1 else set()
            return found

    def program(comm):
        net = net_of()
        optimizer = BUILDERS["ef21"](net, comm)
        Training(model=net, optimizer=optimizer, random=False).resume(Torn(), comm)

    errors = virtual.run(2, program)
    assert "optimizer.g_i cannot be read" in str(errors[1])
    assert isinstance(errors[0], PeerError)
    assert str(errors[0]) == "Training.resume: rank 1 raised: optimizer.g_i cannot be read"


# Trees ----------------------------------------------------------------------------------------------------------------


PLAIN = [
    None, True, 0, -(2**80), 0.1, -0.0, 5e-324, float("inf"), "é\u2028\0", b"\x00\xff", 1 + 2j, (), [], {}, (1, (2, [3])),
    {1: "a", "1": "b", None: 2, (1, 2): 3, False: 4, 0.5: 5}, {"~": "tensor"}, OrderedDict(b=1, a=2), Counter({3: 2}),
    {"a": {"b": [(None, {"c": -1})]}},
]
NUMBERS = [
    *(torch.tensor([[0, 1], [1, 0]], dtype=dtype) for dtype in (torch.bool, torch.int8, torch.int64, torch.uint8,
      torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint16,
      torch.float8_e4m3fn)),
    torch.tensor(float("nan")), torch.tensor([-0.0, float("inf")], dtype=torch.bfloat16), torch.zeros(0, 3),
    torch.arange(6).view(2, 3).t(),
]
ARRAYS = [np.float32(0.1), np.int64(3), np.bool_(True), np.arange(6.0).reshape(2, 3).T, np.array(2), np.zeros((0, 2)),
          np.arange(3, dtype=">i4")]


def there_and_back(value):
    arrays = {}
    tree = json.loads(json.dumps(encoded(value, "x", arrays), allow_nan=False))
    return decoded(tree, lambda leaf: tensor_of(arrays[leaf["name"]], leaf["dtype"], leaf["shape"]), arrays.__getitem__)


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_come_back_as_they_were(value):
    back = there_and_back(value)
    assert repr(back) == repr(value)
    assert type(back) is type(value)


def test_a_tensor_of_several_groups_is_one_again():
    """As with torch.save; equal tensors stay several, also those of files from before."""
    shared, arrays = torch.tensor(0.25), {}
    value = [{"lr": shared, "eps": (shared, torch.tensor(0.25))}, {"lr": shared}]
    first, second = there_and_back(value)
    assert first["lr"] is second["lr"] is first["eps"][0] is not first["eps"][1]
    assert first["lr"] == first["eps"][1] == 0.25
    encoded(value, "x", arrays)
    assert list(arrays) == ["x.0.lr", "x.0.eps.1"]
    again = there_and_back([torch.tensor(0.5), torch.tensor(0.5)])
    assert again[0] is not again[1]


def test_names_that_read_alike_are_several():
    value = {1: torch.tensor(1), "1": torch.tensor(2), "a.b": torch.tensor(3), "a": {"b": np.arange(4)}}
    back = there_and_back(value)
    assert [int(back[key]) for key in (1, "1", "a.b")] == [1, 2, 3]
    assert back["a"]["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["wrapped", "replicated"])
def test_a_learning_rate_that_groups_share_is_shared_after_a_resume(kind):
    """A scheduler writes to it for one group after the other: the last one counts, for all, as in torch."""
    store = MemoryStore()

    def program(comm):
        def build():
            net = net_of()
            named, lr = list(net.parameters()), torch.tensor(0.02)
            groups = [{"params": named[:2]}, {"params": named[2:]}]
            optimizer = OneBitAdam(groups, comm, lr=lr, freeze_step=3, compressor=SIGNS) if kind == "replicated" else (
                DistributedOptimizer(torch.optim.AdamW(groups, lr=lr), comm, TopK(0.2)))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 1 / (1 + e), lambda e: 0.9**e])
            return (
                net,
                optimizer,
                scheduler,
                Training(model=net, optimizer=optimizer, scheduler=scheduler, random=False),
            )

        def run(net, optimizer, scheduler, steps):
            path = []
            for step in steps:
                trained(net, optimizer, comm, [step])
                scheduler.step()
                path.append((parameters_of(net), [float(group["lr"]) for group in optimizer.param_groups]))
            return path

        net, optimizer, scheduler, training = build()
        run(net, optimizer, scheduler, range(5))
        training.save(store, comm, 5)
        state = optimizer.state_dict()
        path = run(net, optimizer, scheduler, range(5, 9))
        other, resumed, scheduler, training = build()
        training.resume(store, comm)
        assert same_bits(run(other, resumed, scheduler, range(5, 9)), path)
        rates = [
            group["lr"] for group in (state["groups"] if kind == "replicated" else state["optimizer"]["param_groups"])
        ]
        assert rates[0] is rates[1]
        assert rates[0] != path[-1][1][0]  # a copy, which schedulers do not write to

    virtual.results(2, program)


def test_not_a_number_comes_back():
    assert repr(there_and_back({"a": (float("nan"), float("-inf"))})) == "{'a': (nan, -inf)}"


@pytest.mark.parametrize("value", NUMBERS, ids=lambda t: f"{t.dtype} {tuple(t.shape)}")
def test_tensors_come_back_bit_for_bit(value):
    [back] = there_and_back([value])
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    assert (
        back.contiguous().view(-1).view(torch.uint8).tolist() == value.contiguous().view(-1).view(torch.uint8).tolist()
    )


@pytest.mark.parametrize("value", ARRAYS, ids=repr)
def test_numpy_numbers_come_back(value):
    back = there_and_back((value,))[0]
    assert type(back) is type(value)
    assert np.array_equal(back, value)
    assert back.dtype == value.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    "value", [print, {1}, torch.zeros(2).to_sparse(), np.array(["a"]), np.array([print])], ids=repr
)
def test_what_is_not_stored_is_refused_by_name(value):
    with pytest.raises(MpiEfError, match=r"^checkpoint: x\.part is .*not stored; (give|make) it"):
        encoded({"part": value}, "x", {})


def test_means_keep_bits_that_are_equal_and_refuse_whole_numbers():
    third = torch.tensor([1 / 3, -0.0], dtype=torch.float64)
    assert torch.equal(mean_over_ranks([third] * 7, "x"), third)
    assert mean_over_ranks([torch.tensor(2)] * 3, "x").item() == 2
    with pytest.raises(OptionError, match="x holds whole numbers that differ between the 2 ranks"):
        mean_over_ranks([torch.tensor(2), torch.tensor(3)], "x")


# On disk --------------------------------------------------------------------------------------------------------------


def test_through_files_on_other_ranks_and_in_the_background(tmp_path):
    def program(comm, policy):
        store = Store(tmp_path / "run")
        net = net_of(torch.bfloat16)
        parts, training = everything(net, comm)
        start = training.resume(store, comm, policy=policy)
        at_start = parts["optimizer"].flat.values.copy()
        run_everything(net, parts, comm, range(start, start + 3))
        training.save(store, comm, start + 3, document={"n": (comm.Get_size(),)}, background=True)
        saved = parts["optimizer"].flat.values.copy()
        run_everything(net, parts, comm, [start + 3])  # changes what is being written
        store.finish(comm)
        store.close()
        return start, training.document, at_start, saved

    before = None
    for number, n in enumerate((3, 2, 4)):
        rows = quiet(n, functools.partial(program, policy="redistribute"))
        assert all(row[:2] == (3 * number, {"n": (before[0],)} if before else None) for row in rows)
        assert before is None or all(same_bits(row[2], before[1]) for row in rows)
        before = n, rows[0][3]


def damaged(change):
    store = MemoryStore()
    moved(store, 2, BUILDERS["adamw update"], 2)
    shared, ranks = store.last.document, [store.last.rank_document(rank) for rank in range(2)]
    change(shared, ranks)
    store.last.text, store.last.texts = json.dumps(shared), [json.dumps(document) for document in ranks]
    return store


@pytest.mark.parametrize(
    "change",
    [
        lambda shared, ranks: shared.pop("values"),
        lambda shared, ranks: shared.update(format=2),
        lambda shared, ranks: shared.update(parts=[]),
        lambda shared, ranks: shared["values"].pop("optimizer:settings"),
        lambda shared, ranks: shared["values"]["model.first.bias"].update(shape=[1]),
        lambda shared, ranks: shared["values"].update({"optimizer:settings": 3}),
        lambda shared, ranks: shared["values"]["optimizer:settings"].update(groups=[]),
        lambda shared, ranks: shared["values"]["optimizer:settings"].update({"~": "made up"}),
        lambda shared, ranks: ranks[1].pop("values"),
        lambda shared, ranks: ranks[1]["values"]["optimizer:own"]["state"]["value"][0][1]["exp_avg"].update(
            dtype="load"
        ),
        lambda shared, ranks: ranks[1]["values"]["optimizer:own"]["state"]["value"][0][1]["exp_avg"].update(
            shape=[9**9]
        ),
        lambda shared, ranks: ranks[1]["values"].pop("optimizer.e_i"),
    ],
)
def test_strange_content_is_an_error_of_one_line_on_all_ranks(change):
    def program(comm):
        net = net_of()
        optimizer = BUILDERS["adamw update"](net, comm)
        Training(model=net, optimizer=optimizer, random=False).resume(store, comm)

    store = damaged(change)
    for error in virtual.run(2, program):
        assert isinstance(error, MpiEfError), repr(error)
        assert "\n" not in str(error)


# Parts that do not fit, and values that say one thing and hold another ------------------------------------------------


class Stubborn:
    def __init__(self, comm):
        self.rank = comm.Get_rank()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        if self.rank == 1:
            raise OptionError("stubborn: no state fits; build another one")


@pytest.mark.parametrize(("parts", "text"), [
    (lambda comm: {"document": torch.Generator()}, "Training: document is no name for a part; pass it to save()"),
    (lambda comm: {"steps": 3}, "Training: steps is a int without state_dict() and load_state_dict(); give it both"),
    (lambda comm: {"x": Stubborn(comm)}, "stubborn: no state fits; build another one"),
])
def test_parts_that_are_none_or_refuse_their_state(parts, text):
    def program(comm):
        training = Training(random=False, **parts(comm))
        training.save(store, comm, 1)
        training.resume(store, comm)

    store = MemoryStore()
    errors = virtual.run(2, program)
    assert text in str(errors[1])
    assert all(isinstance(error, MpiEfError) and text in str(error) for error in errors)


def each_rank(name, **facts):
    """A change of what every rank says of its array of that name."""

    def change(shared, ranks, found):
        for number, rank in enumerate(ranks):
            rank["values"][name].update({key: value(number) for key, value in facts.items()})

    return change


def own_counter(shared, ranks, found):
    ranks[1]["values"]["optimizer:own"]["state"]["value"][0][1]["step"] = 7.0


RESIDUAL = "optimizer.plan.residual"


@pytest.mark.parametrize(("name", "n", "change", "text"), [
    ("adamw update", 2, lambda shared, ranks, found: [rank["values"].pop("optimizer.e_i") for rank in ranks],
     "resume: optimizer.e_i is only here; build the training as it was"),
    ("adamw update", 2, lambda shared, ranks, found: shared["values"].update({"optimizer.more": 1}),
     "resume: optimizer.more is only in the checkpoint; build"),
    ("adamw update", 2, each_rank("optimizer.e_i", dtype=lambda rank: "float64"),
     "resume: optimizer.e_i is float64 in the checkpoint and float32 here; build the model as it was"),
    ("adamw update", 3, own_counter,
     "resume: optimizer:own differs between the 2 ranks that saved it, not in tensors alone; resume on 2 ranks"),
    ("ef21", 2, lambda shared, ranks, found: found.shared.update({"optimizer.g": np.zeros(3, np.float32)}),
     "resume: optimizer.g was read as (3,) float32, here it is (91,) float32; the checkpoint is damaged"),
    ("sign update", 3, each_rank(RESIDUAL, shape=lambda rank: [50 + rank]),
     f"resume: {RESIDUAL} has 101 entries on all ranks together in the checkpoint and 91 here; build the model as it was"),
    ("sign update", 3, lambda shared, ranks, found: found.ranks[1].update({RESIDUAL: np.zeros(9, np.float32)}),
     f"resume: {RESIDUAL} has 55 entries on all ranks together;"),
])
def test_values_that_do_not_fit_are_told_on_all_ranks(name, n, change, text):
    store = MemoryStore()
    moved(store, 2, BUILDERS[name], 2)
    shared, ranks = store.last.document, [store.last.rank_document(rank) for rank in range(2)]
    change(shared, ranks, store.last)
    store.last.text, store.last.texts = json.dumps(shared), [json.dumps(document) for document in ranks]

    def program(comm):
        net = net_of()
        optimizer = BUILDERS[name](net, comm)
        Training(model=net, optimizer=optimizer, random=False).resume(store, comm, policy="redistribute")

    errors = virtual.run(n, program)
    assert all(isinstance(error, MpiEfError) and text in str(error) for error in errors), errors
