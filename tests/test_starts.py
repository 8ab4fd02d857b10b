"""The starts of the papers: rules and optimizers against plain loops, written from the papers' formulas, from step 0 on."""

import copy
from functools import partial
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import virtual
from programs import same_bits
from vectors_for_tests import gaussian

from mpi_ef.collectives import ClientsMean, GatherMean, RobustMean
from mpi_ef.compress import Identity, RandK, TopK
from mpi_ef.errors import NonFiniteError
from mpi_ef.feedback import RULES, ErrorFeedback
from mpi_ef.optim import EF21Muon
from mpi_ef.robust import Median

CLIENTS, D, K, STEPS, GAMMA = 5, 40, 4, 100, 0.05
DRAWN = np.random.default_rng(17)
HESSIANS = [q @ np.diag(np.linspace(0.2, 1.0 + i, D)) @ q.T  # clients of different smoothness and different minima
            for i in range(CLIENTS) for q in [np.linalg.qr(DRAWN.normal(size=(D, D)))[0]]]
MINIMA = DRAWN.normal(size=(CLIENTS, D))
WEIGHTS = np.arange(1.0, CLIENTS + 1) / (CLIENTS * (CLIENTS + 1) / 2)


def gradient(i, x, step):
    """A stochastic gradient of client i; a third of the features are in no sample of a minibatch, which is no late start."""
    seen = np.random.default_rng((i, step)).random(D) > 1 / 3
    return seen * (HESSIANS[i] @ (x - MINIMA[i]))


def top(v):
    out = np.zeros_like(v)
    chosen = np.argsort(-np.abs(v), kind="stable")[:K]
    out[chosen] = v[chosen]
    return out


def descent(clients_gradient):
    """The loop of all of them: x^{t+1} = x^t - gamma g^t."""
    x, path = np.ones(D), []
    for step in range(STEPS):
        x = x - GAMMA * clients_gradient(x, step)
        path.append(x)
    return path


def plain_momentum(dense, etas):
    """EF21-SGDM and, with two etas, EF21-SGD2M: v_i^0 = u_i^0 = grad_i, and g_i^0 as well, or C(grad_i) without."""
    estimates, averages = np.zeros((CLIENTS, D)), None

    def mean(x, step):
        nonlocal averages
        grads = np.array([gradient(i, x, step) for i in range(CLIENTS)])
        if step == 0:
            averages = [grads.copy() for _ in etas]
        else:
            new = grads
            for average, eta in zip(averages, etas, strict=True):
                average[:] = (1 - eta) * average + eta * new
                new = average
        for i in range(CLIENTS):
            target = averages[-1][i]
            estimates[i] = target if step == 0 and dense else estimates[i] + top(target - estimates[i])
        return estimates.mean(axis=0)

    return descent(mean)


def drawn(share, step):
    """Which clients take part: the documented draw of the step with that number, from 0."""
    return np.random.Generator(np.random.Philox(key=[3, step])).permutation(CLIENTS) < max(1, round(share * CLIENTS))


def plain_partial(dense, share, weights):
    """EF21-PP and EF21-W-PP: only clients in S_t move their estimates of grad_i / (n w_i); g_i^0 is that of all."""
    estimates, messages = np.zeros((CLIENTS, D)), []

    def mean(x, step):
        takes_part = drawn(share, step)
        for i in range(CLIENTS):
            target = gradient(i, x, step) / (CLIENTS * weights[i])
            if step == 0 and dense:
                estimates[i] = target
            elif takes_part[i]:
                estimates[i] = estimates[i] + top(target - estimates[i])
        messages.append(takes_part)
        return weights @ estimates

    path = descent(mean)
    assert any((a != b).any() for a, b in zip(messages, messages[1:], strict=False))
    return path


EVEN = np.full(CLIENTS, 1 / CLIENTS)
PLAIN = {
    "ef21-sgdm": ({"eta": 0.3}, None, lambda dense: plain_momentum(dense, [0.3])),
    "ef21-sgd2m": ({"eta": 0.3}, None, lambda dense: plain_momentum(dense, [0.3, 0.3])),
    "ef21(momentum=0.75)": ({}, None, lambda dense: plain_momentum(dense, [0.25])),
    "ef21-sgdm(momentum=0.75)": ({"eta": 0.5}, None, lambda dense: plain_momentum(dense, [0.25, 0.5])),
    "ef21-pp": ({"participation": 0.4, "seed": 3}, None, lambda dense: plain_partial(dense, 0.4, EVEN)),
    "ef21-w": ({"participation": 0.4, "seed": 3}, WEIGHTS, lambda dense: plain_partial(dense, 0.4, WEIGHTS)),
}


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("rule", PLAIN)
def test_rules_are_the_papers_from_the_first_step_on(rule, dense):
    options, weights, plain = PLAIN[rule]
    expected = plain(dense)

    def program(comm):
        plan = ClientsMean(comm, TopK(k=K), D, np.float64, clients=CLIENTS, weights=weights)
        feedback, x, path = ErrorFeedback(rule, plan, dense_steps=dense, **options), np.ones(D), []
        for step in range(STEPS):
            grads = np.array([gradient(i, x, step) for i in range(plan.first, plan.first + plan.own)])
            x = x - GAMMA * feedback.step(grads)
            path.append(x)
        return path

    for n in (1, 2):
        for path in virtual.results(n, program):
            for step, (mine, theirs) in enumerate(zip(path, expected, strict=True)):
                assert np.linalg.norm(mine - theirs) < 1e-12 * np.linalg.norm(theirs), f"after step {step}"
    assert np.linalg.norm(expected[-1] - expected[0]) > 1  # it went somewhere


SHAPES = ((6, 4), (5,), (3, 2, 4))


def plain_muon(dense, beta, lr, decay, radius):
    """EF21-Muon: M_j^0 = grad_j, and G_j^0 as well, or C(grad_j); a step of each matrix along U V^T, by Newton-Schulz."""
    bounds = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES)])
    x, path = np.linspace(-1, 1, bounds[-1]), []
    momenta = estimates = np.zeros((CLIENTS, bounds[-1]))
    for step in range(STEPS):
        grads = np.array([muon_gradient(j, x, step) for j in range(CLIENTS)])
        momenta = grads if step == 0 else (1 - beta) * momenta + beta * grads
        if step == 0 and dense:
            estimates = momenta.copy()
        else:
            estimates = np.array([g + top(m - g) for m, g in zip(momenta, estimates, strict=True)])
        mean, x = estimates.mean(axis=0), (1 - lr * decay) * x
        for shape, start, stop in zip(SHAPES, bounds, bounds[1:], strict=False):
            if len(shape) == 1:
                x[start:stop] -= lr * radius * np.sign(mean[start:stop])
                continue
            matrix = mean[start:stop].reshape(shape[0], -1)
            matrix = matrix / max(np.linalg.norm(matrix), 1e-300)  # nothing of it may have been sent yet
            for _ in range(5):
                square = matrix @ matrix.T
                matrix = 3.4445 * matrix + (-4.7750 * square + 2.0315 * square @ square) @ matrix
            x[start:stop] -= lr * np.sqrt(max(1, shape[0] / matrix.shape[1])) * matrix.reshape(-1)
        path.append(x)
    return path


def muon_gradient(j, x, step):
    scale = np.linspace(0.1, 1.0 + j, x.size)
    return scale * (x - np.sin(np.arange(x.size) + j)) + 0.1 * np.random.default_rng((j, step)).normal(size=x.size)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dense", [0, 1])
def test_ef21_muon_is_the_papers_from_the_first_step_on(dense, overlap):
    options = {"beta": 0.2, "lr": 0.02}
    expected = plain_muon(dense, decay=0.1, radius=0.3, **options)

    def program(comm):
        parameters = [torch.nn.Parameter(torch.empty(shape, dtype=torch.float64)) for shape in SHAPES]
        places = np.cumsum([0, *(p.numel() for p in parameters)])
        with torch.no_grad():
            for p, start in zip(parameters, places, strict=False):
                p.copy_(torch.from_numpy(np.linspace(-1, 1, places[-1])[start : start + p.numel()].reshape(p.shape)))
        optimizer, path = EF21Muon(parameters, comm, TopK(k=K), weight_decay=0.1, vector_radius=0.3, dense_steps=dense,
                                   overlap=overlap, **options), []
        for step in range(STEPS):
            x = np.concatenate([p.detach().numpy().reshape(-1) for p in parameters])
            target = torch.from_numpy(muon_gradient(comm.Get_rank(), x, step))
            optimizer.zero_grad()
            torch.cat([p.reshape(-1) for p in parameters]).dot(target).backward()  # whose gradient is the target
            optimizer.step()
            path.append(np.concatenate([p.detach().numpy().reshape(-1) for p in parameters]))
        return path

    for path in virtual.results(CLIENTS, program):
        for step, (mine, theirs) in enumerate(zip(path, expected, strict=True)):
            assert np.linalg.norm(mine - theirs) < 1e-12 * np.linalg.norm(theirs), f"after step {step}"


STARTS = {  # of what a rule keeps, after a first step through the identity, as a multiple of its first vector
    "ef14": {"e_i": 0}, "ef21": {"g_i": 1}, "econtrol": {"e_i": 0, "h_i": 1}, "ef14-momentum": {"e_i": 0, "m": 0.1},
    "lion": {"m_i": 0.01}, "ef21-sgdm": {"g_i": 1, "v_i": 1}, "ef21-sgd2m": {"g_i": 1, "v_i": 1, "u_i": 1},
    "ef21-hb": {"g_i": 1, "v": 1}, "ef21-pp": {"g_i": 1}, "ef21-w": {"g_i": 1}, "ef21-bc": {"g_i": 1, "g": 1},
    "ef21-plus": {"all_i": 1}, "ef21-page": {"g_i": 1, "v_i": 1}, "marina": {"g": 1}, "clag": {"g_i": 1, "y_i": 1},
    "d-ec-sgd": {"e_i": 0},
    "byz-ef21": {"rows": 1, "g": 1}, "byz-ef21-sgdm": {"rows": 1, "g": 1, "v_i": 1},
    "byz-ef21-bc": {"rows": 1, "aggregate": 1, "g": 1, "behind": 0},
}


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}], ids=["as it is", "with momentum"])
@pytest.mark.parametrize("rule", RULES)
def test_where_every_rule_starts(rule, momentum):
    """The table of docs/algorithms.md: a dense first step on one rank leaves this in its arrays."""

    def program(comm):
        robust, usual = partial(RobustMean, aggregator=Median(), f=0), partial(ClientsMean, weights=np.ones(1))
        kind = robust if rule.startswith("byz-") else usual
        plan = kind(comm, RandK(0.2) if rule == "marina" else TopK(0.2), D, np.float64, clients=1)
        feedback, x = ErrorFeedback(rule, plan, dense_steps=1, **momentum), gaussian(0, D, np.float64)
        feedback.step(x, **({"full": True} if rule == "ef21-page" else {}))
        kept = feedback.per_rank() | feedback.replicated()
        for name, multiple in (STARTS[rule] | ({"averaged_i": 1} if momentum else {})).items():
            np.testing.assert_allclose(kept[name], multiple * x, rtol=1e-12, atol=1e-15, err_msg=name)

    virtual.results(1, program)


@pytest.mark.parametrize("rule", ["ef21-pp", "ef21-w"])
def test_all_clients_take_part_in_whole_steps_and_none_is_drawn_twice(rule):
    """Also in a whole step in between, and through the identity as compressor they are drawn; the same after a resume."""

    def program(comm, compressor):
        def build():
            plan = ClientsMean(comm, compressor, D, np.float64, clients=CLIENTS, weights=EVEN)
            return ErrorFeedback(rule, plan, dense_steps=1, participation=0.4, seed=3)

        def moved(feedback, step):
            plan, before = feedback.plan, feedback.state.g_i.copy()
            clients = range(plan.first, plan.first + plan.own)
            feedback.step(np.array([gaussian(i, D, np.float64, step=step) for i in clients]), whole=step == 4)
            changed = (feedback.state.g_i != before).reshape(plan.own, D).any(axis=1)
            whole = np.zeros(CLIENTS, bool)
            whole[plan.first : plan.first + plan.own] = changed
            return np.logical_or.reduce(comm.allgather(whole))

        feedback = build()
        who = [moved(feedback, step) for step in range(6)]
        again = build()
        again.load_state_dict(copy.deepcopy(feedback.state_dict()))
        assert same_bits([moved(feedback, 6)], [moved(again, 6)])
        return who

    for compressor in (TopK(k=K), Identity()):
        for who in virtual.results(2, lambda comm, compressor=compressor: program(comm, compressor)):
            assert who[0].all()
            assert who[4].all()
            np.testing.assert_array_equal(who[1:4], [drawn(0.4, step) for step in (1, 2, 3)])
            assert who[5].sum() == 2


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("rule", ["ef21-sgdm(eta=0.25)", "ef21-sgd2m(eta=0.25)", "econtrol(eta=0.1, momentum=0.75)"])
def test_only_a_step_that_was_taken_is_the_first(rule, dense):
    """A NaN on one rank or a step that is taken back begins nothing, nor does a restart; also where states are loaded."""

    def program(comm):
        rank = comm.Get_rank()

        def build():
            return ErrorFeedback(rule, GatherMean(comm, TopK(k=K), D, np.float64), dense_steps=dense)

        def vector(step):
            return gaussian(rank, D, np.float64, step=step)

        straight, stumbling = build(), build()
        bad = np.full(D, np.nan if rank else 1.0)
        with pytest.raises(NonFiniteError):
            stumbling.step(bad)
        stumbling.start(vector(9))
        stumbling.wait()
        stumbling.rollback()
        resumed = build()
        resumed.load_state_dict(copy.deepcopy(stumbling.state_dict()))
        for step in range(3):
            expected = straight.step(vector(step))
            assert same_bits(stumbling.step(vector(step)), expected)
            assert same_bits(resumed.step(vector(step)), expected)
        average = next(name for name in ("averaged_i", "v_i") if name in straight.per_rank())
        for feedback in (straight, resumed):
            before = feedback.per_rank()[average].copy()
            feedback.forget()
            feedback.step(vector(3))
            expected = 0.75 * before + 0.25 * vector(3)
            np.testing.assert_allclose(feedback.per_rank()[average], expected, rtol=1e-14, atol=1e-15)

    virtual.results(2, program)


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("rule", ["ef21-sgdm(eta=0.25)", "ef21-sgd2m(eta=0.25)", "ef21(momentum=0.75)"])
def test_states_of_earlier_versions_go_on_as_before(rule, when):
    """They do not say what is late: averages have begun, with a part of the first vector."""

    def program(comm):
        feedback, again = (ErrorFeedback(rule, GatherMean(comm, TopK(k=K), D, np.float64)) for _ in range(2))
        for step in range(when):
            feedback.step(gaussian(comm.Get_rank(), D, np.float64, step=step))
        saved = copy.deepcopy(feedback.state_dict())
        assert saved.pop("late") == ("" if when else f"0:{D}")
        again.load_state_dict(saved)
        name = "averaged_i" if "momentum" in rule else "v_i"
        before, x = again.per_rank()[name].copy(), gaussian(comm.Get_rank(), D, np.float64, step=5)
        again.step(x)
        np.testing.assert_allclose(again.per_rank()[name], 0.75 * before + 0.25 * x, rtol=1e-14, atol=1e-15)

    virtual.results(2, program)


def test_averages_in_buckets_of_ddp_begin_once():
    """DDP builds its buckets again after the first step; states of earlier versions do not say that they have begun."""
    from mpi_ef.ddp.bucket import FeedbackBucket, Place

    def program(comm):
        def bucket(*names):
            feedback = ErrorFeedback("ef21-sgdm(eta=0.25)", GatherMean(comm, TopK(k=K), D, np.float64))
            return FeedbackBucket(feedback, [Place(name, (D // 2,), (1,), D // 2 * at) for at, name in enumerate(names)])

        x, y = (gaussian(comm.Get_rank(), D, np.float64, step=step) for step in range(2))
        fresh, first, second, third = bucket("a", "b"), bucket("a", "b"), bucket("b", "a"), bucket("b", "a")
        second.fill(fresh.state(), {})
        second.feedback.step(x)
        np.testing.assert_array_equal(second.feedback.state.v_i, x)
        first.feedback.step(x)
        saved = first.state()
        third.fill(saved, {})
        third.feedback.step(y)
        np.testing.assert_allclose(third.feedback.state.v_i, 0.75 * np.roll(x, D // 2) + 0.25 * y, rtol=1e-14, atol=1e-15)
        fourth = bucket("a", "b")
        fourth.fill({name: {key: value for key, value in of.items() if key != "late"} for name, of in saved.items()}, {})
        assert not fourth.feedback.state.late

    virtual.results(2, program)


def test_entries_begin_where_they_are_late_and_do_not_rest():
    state = RULES["ef21-sgdm"].state
    rng = np.random.default_rng(0)
    for _ in range(200):
        d = int(rng.integers(0, 12))
        plan = mock.Mock(d=d, own_d=d)
        rule, begun = state(late=f"0:{d}", **dict.fromkeys(("v_i", "spare", "g_i", "g"))), np.zeros(d, bool)
        for _ in range(4):
            cuts = np.unique(rng.integers(-3, 15, 6)).tolist()
            resting = [slice(*pair) for pair in pairwise(cuts)][:: int(rng.integers(1, 3))]
            rests = np.array([any(part.start <= at < part.stop for part in resting) for at in range(d)], bool)
            rule.late = rule.begin(plan, resting)
            begins = np.zeros(d, bool)
            for part in rule.begins:
                assert not begins[part].any()
                begins[part] = True
            np.testing.assert_array_equal(begins, ~rests & ~begun)
            begun |= begins
