"""1-bit Adam: Adam before the freeze, signs after it, and nothing that explodes."""

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from programs import loss_of, same_bits
from training import (
    alone,
    assert_close,
    assert_replicas,
    assert_resumes,
    assert_skips_broken_gradients,
    net_of,
    parameters_of,
    seeded,
    trained,
)

from mpi_ef import kernels
from mpi_ef.compress import Identity, Sign, TopK
from mpi_ef.errors import OptionError
from mpi_ef.kernels import reference
from mpi_ef.optim import OneBitAdam
from mpi_ef.optim.adam import VarianceWatch, inverse_roots

each_world = pytest.mark.parametrize("n", [1, 2, 3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernels_are_their_twins(dtype):
    @given(st.integers(0, 300), st.integers(0, 2**32))
    def check(d, seed):
        rng = np.random.default_rng(seed)
        grad, m, x = (rng.normal(size=d).astype(dtype) for _ in range(3))
        v, scalars = rng.random(d).astype(dtype) ** 8, [dtype(value) for value in rng.random(6)]
        for name, inputs, count, outputs in (
            ("update_moments", (grad,), 2, (m, v)), ("adam_step", (m, v), 4, (x,)),
            ("adam", (grad,), 6, (m, v, x)),
            ("preconditioned_step", (m, v), 2, (x,)), ("sign_step", (grad,), 2, (x,)),
        ):  # fmt: skip
            mine, theirs = [a.copy() for a in outputs], [a.copy() for a in outputs]
            getattr(kernels, name)(*inputs, *scalars[:count], *mine)
            getattr(reference, name)(*inputs, *scalars[:count], *theirs)
            for a, b in zip(mine, theirs, strict=True):
                assert a.tobytes() == b.tobytes(), name
        assert kernels.l1_norm(x) == reference.l1_norm(x)

    check()


@each_world
@pytest.mark.parametrize("compressor", [Sign(block=64), Identity()], ids=str)
def test_before_the_freeze_it_is_adamw(n, compressor):
    """To rounding, step by step, with groups, decay and a schedule."""

    def groups(net):
        named = list(net.parameters())
        return [{"params": named[:3], "lr": 2e-2}, {"params": named[3:], "weight_decay": 0.3}]

    def schedule(optimizer, step):
        optimizer.param_groups[0]["lr"] = 2e-2 * 0.9**step

    def build(net, comm):
        return OneBitAdam(groups(net), comm, lr=1e-2, betas=(0.8, 0.99), freeze_step=99, compressor=compressor)

    rows = trained(n, 25, build, dtype=torch.float64, each=schedule)
    adamw = alone(n, 25, lambda net: torch.optim.AdamW(groups(net), lr=1e-2, betas=(0.8, 0.99), weight_decay=0.0),
                  dtype=torch.float64, each=schedule)  # fmt: skip
    assert_close(rows[0][0], adamw, rtol=1e-12, atol=1e-14)
    assert_replicas(rows)


class PlainAdam(torch.optim.Optimizer):
    """Adam as in the paper on 1-bit Adam: the variance is frozen after some steps; float64 loops."""

    def __init__(self, params, *, lr, freeze, betas, eps, bias_correction, floor):
        super().__init__(params, {"lr": lr})
        self.freeze, self.betas, self.eps, self.correct, self.floor, self.t = (
            freeze,
            betas,
            eps,
            bias_correction,
            floor,
            0,
        )

    @torch.no_grad()
    def step(self):
        self.t += 1
        b1, b2 = self.betas
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                s = self.state[p]
                if not s:
                    s["m"], s["v"] = torch.zeros_like(p), torch.zeros_like(p)
                s["m"].mul_(b1).add_((1 - b1) * p.grad)
                if self.t <= self.freeze:
                    s["v"].mul_(b2).add_((1 - b2) * p.grad**2)
                t2 = min(self.t, self.freeze)
                c1, c2 = (1 - b1**self.t, 1 - b2**t2) if self.correct else (1, 1)
                root = (s["v"] / c2).sqrt()
                if self.t > self.freeze:
                    root = root.clamp(min=float(self.floor * (s["v"] / c2).mean().sqrt()))
                update = s["m"] / c1 / (root + self.eps)
                p.sub_(group["lr"] * torch.where(root > 0, update, torch.zeros_like(update)) if self.t > self.freeze
                       else group["lr"] * update)  # fmt: skip


@each_world
@pytest.mark.parametrize("bias_correction", [True, False])
def test_with_the_identity_it_is_adam_with_a_frozen_variance(n, bias_correction):
    rows = trained(n, 30, lambda net, comm: OneBitAdam(
        net.parameters(), comm, lr=1e-2, freeze_step=12, compressor=Identity(), bias_correction=bias_correction,
        variance_floor=0.5), dtype=torch.float64)  # fmt: skip
    plain = alone(n, 30, lambda net: PlainAdam(net.parameters(), lr=1e-2, freeze=12, betas=(0.9, 0.999), eps=1e-8,
                                               bias_correction=bias_correction, floor=0.5), dtype=torch.float64)  # fmt: skip
    assert rows[0][2].frozen_step == 12
    assert_close(rows[0][0], plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("compressor", [Sign(block=16), TopK(0.1)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_replicas_are_equal_and_learn(n, compressor):
    rows = trained(n, 120, lambda net, comm: OneBitAdam(net.parameters(), comm, lr=1e-2, freeze_step=20,
                                                        compressor=compressor))  # fmt: skip
    assert_replicas(rows)
    for _, losses, optimizer in rows:
        assert optimizer.frozen_step == 20
        assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[18:22])


@pytest.mark.parametrize("before", [3, 9, 14])
def test_saved_and_loaded_a_step_is_the_same(before):
    """In the warm-up, at the freeze, and after it."""
    signs = Sign(block=16)
    assert_resumes(2, lambda net, comm: OneBitAdam(net.parameters(), comm, lr=1e-2, freeze_step=9, compressor=signs),
                   before=before)  # fmt: skip


def test_the_watch_over_the_variance_is_saved():
    """So that a run that was interrupted freezes when it would have."""

    def build(net, comm):
        return OneBitAdam(net.parameters(), comm, lr=1e-3, betas=(0.9, 0.9), compressor=Sign(block=16))

    frozen = [optimizer.frozen_step for _, _, optimizer in trained(2, 40, build)]
    assert frozen[0] == frozen[1]
    assert 11 <= frozen[0] < 40

    def program(comm):
        net = net_of()
        optimizer = build(net, comm)
        for step in range(40):
            if step == 8:
                again = build(net, comm)
                again.load_state_dict(optimizer.state_dict())
                optimizer = again
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
        return optimizer.frozen_step

    assert virtual.results(2, program) == frozen


def test_a_warm_up_is_loaded_into_an_optimizer_that_was_further():
    def program(comm):
        nets = [net_of(), net_of()]
        young, old = (OneBitAdam(net.parameters(), comm, freeze_step=4, compressor=Sign(block=16)) for net in nets)
        for optimizer, net, steps in ((young, nets[0], range(2)), (old, nets[1], range(7))):
            for step in steps:
                optimizer.zero_grad()
                loss_of(net, comm.Get_rank(), step).backward()
                optimizer.step()
        assert (young.frozen_step, old.frozen_step) == (None, 4)
        old.load_state_dict(young.state_dict())
        nets[1].load_state_dict(nets[0].state_dict())
        for optimizer, net in ((young, nets[0]), (old, nets[1])):
            for step in range(2, 8):
                optimizer.zero_grad()
                loss_of(net, comm.Get_rank(), step).backward()
                optimizer.step()
        assert same_bits(*map(parameters_of, nets))
        assert young.frozen_step == old.frozen_step == 4

    virtual.results(2, program)


def test_broken_gradients_are_skipped_before_and_after_the_freeze():
    for freeze in (2, 50):
        assert_skips_broken_gradients(3, lambda net, comm, freeze=freeze: OneBitAdam(
            net.parameters(), comm, lr=1e-2, freeze_step=freeze, compressor=Sign(block=16)))  # fmt: skip


def dying_network():
    """Half of the hidden units are dead: their inputs are below zero for all data, so their gradients are exactly zero."""
    net = seeded(torch.nn.Sequential(torch.nn.Linear(7, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)))
    with torch.no_grad():
        net[0].bias[:16] = -100.0
    return net


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("compressor", [Sign(), Sign(block=64)], ids=str)
def test_dead_units_do_not_explode(bias_correction, compressor):
    """What turned other implementations into NaN three steps after the freeze; 500 steps here."""

    def program(comm):
        net = dying_network()
        optimizer = OneBitAdam(net.parameters(), comm, lr=3e-3, betas=(0.9, 0.99), freeze_step=50, compressor=compressor,
                               bias_correction=bias_correction)  # fmt: skip
        errors, losses = [], []
        for step in range(550):
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            errors.append(float(np.linalg.norm(optimizer.per_rank()["e_i"])))
            losses.append(loss.item())
        return losses, errors

    for losses, errors in virtual.results(2, program):
        assert np.isfinite(losses).all()
        assert np.mean(losses[-20:]) < np.mean(losses[45:55])
        assert max(errors[300:]) < 5 * max(errors[50:150])


def test_roots_of_the_variance_have_a_floor():
    v = np.array([0.0, 4.0, 4.0, 0.0, 0.0, 1.0, 1e-12], np.float64)
    inverse = inverse_roots(v, 0.25, [0, 3, 5, 7, 7], 0.0, 0.5)
    least = 0.5 * np.sqrt(0.25 * 8 / 3)
    np.testing.assert_allclose(inverse, [1 / least, 1, 1, 0, 0, 2, 1 / (0.5 * np.sqrt(0.25 * 0.5))], rtol=1e-9)
    assert (inverse_roots(v, 1.0, [0, 7], 1e-3, 0.0)[[0, 3, 4]] == 1000).all()  # no floor: eps alone, as in Adam


def test_the_variance_settles():
    """Not while it changes, not while the learning rate grows; then at the first look."""

    def frozen(lrs, scales):
        watch, v = VarianceWatch(0.9), np.zeros(130, np.float32)
        for step, (lr, scale) in enumerate(zip(lrs, scales, strict=True), start=1):
            v = np.float32(0.9) * v + np.float32(0.1 * scale)
            if watch.settled(step, v, lr):
                return step
        return None

    steady = [1.0] * 60
    assert frozen(steady, steady) == 11
    assert frozen([min(1.0, 0.05 * (step + 1)) for step in range(60)], steady) == 30
    assert frozen(steady, [0.9**step for step in range(60)]) is None
    assert frozen(steady, [1.0] * 5 + [2.0] * 55) in range(20, 45)
    assert frozen(steady, [0.0] * 60) is None


def test_clipping_is_global():
    """All ranks scale by the same factor, so that the mean of their squared norms is clip^2 at most; also once frozen."""
    seen = {}

    def program(comm):
        net = net_of()
        optimizer = OneBitAdam(net.parameters(), comm, lr=1e-3, freeze_step=2, clip=0.5, compressor=Sign(block=16))
        for step in range(4):
            optimizer.zero_grad()
            (100 * (comm.Get_rank() + 1) * loss_of(net, comm.Get_rank(), step)).backward()
            before = optimizer.flat.gradients.copy()
            optimizer.step()
            seen[step, comm.Get_rank()] = before, optimizer.flat.gradients.copy()

    virtual.results(2, program)
    for step in range(4):
        (a, a_clipped), (b, b_clipped) = seen[step, 0], seen[step, 1]
        norm = np.sqrt((np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2) / 2)
        assert norm > 5
        np.testing.assert_allclose(a_clipped, a * (0.5 / norm), rtol=1e-5)
        np.testing.assert_allclose(b_clipped, b * (0.5 / norm), rtol=1e-5)


def test_momentum_that_is_not_sent_is_in_the_errors():
    """Law 5: sum of m_t + mean e_i + residuals = sum of beta m_(t-1) + (1 - beta) mean gradient."""
    from mpi_ef.collectives import TwoPhaseMean
    from mpi_ef.feedback import ErrorFeedback

    d, beta = 101, 0.8

    def program(comm):
        feedback = ErrorFeedback("ef14-momentum", TwoPhaseMean(comm, Sign(block=16), d, np.float64), beta=beta)
        total, wanted, m = np.zeros(d), np.zeros(d), np.zeros(d)
        for step in range(9):
            rows = [np.random.default_rng((rank, step)).normal(size=d) for rank in range(comm.Get_size())]
            wanted += beta * m + (1 - beta) * np.mean(rows, axis=0)
            m = feedback.step(rows[comm.Get_rank()]).copy()
            total += m
        return total, wanted, feedback.per_rank()

    rows = virtual.results(3, program)
    errors = np.mean([row[2]["e_i"] for row in rows], axis=0) + np.concatenate(
        [row[2]["plan.residual"] for row in rows]
    )
    np.testing.assert_allclose(rows[0][0] + errors, rows[0][1], atol=1e-12)


def test_a_step_takes_three_collectives_and_a_thirtieth_of_the_bytes():
    calls = []

    def program(comm):
        net = torch.nn.Linear(200, 50)
        optimizer = OneBitAdam(net.parameters(), comm, lr=1e-3, freeze_step=2, compressor=Sign(block=1024))
        for step in range(3):
            net.zero_grad()
            net(torch.full((1, 200), 1.0 + comm.Get_rank() + step)).square().sum().backward()
            if step == 2:
                before = optimizer.sent_nbytes
                for name in ("Allgather", "Alltoall", "Alltoallv", "allgather"):
                    call = getattr(comm, name)
                    setattr(comm, name, lambda *a, call=call, name=name: calls.append(name) or call(*a))
            optimizer.step()
        assert optimizer.dense_nbytes > 28 * (optimizer.sent_nbytes - before)

    virtual.results(2, program)
    assert sorted(calls) == ["Allgather"] * 4 + ["Alltoall"] * 2  # of two ranks


@pytest.mark.parametrize(("options", "text"), [
    ({"betas": (1.0, 0.9)}, "betas=(1.0, 0.9) are not in [0, 1)"), ({"freeze_step": 0}, "freeze_step=0; the"),
    ({"variance_floor": 2.0}, "variance_floor=2.0 is not in [0, 1]"), ({"clip": -1.0}, "clip=-1.0 is negative"),
])  # fmt: skip
def test_bad_options(options, text):
    for outcome in virtual.run(2, lambda comm: OneBitAdam(net_of().parameters(), comm, **options)):
        assert isinstance(outcome, OptionError)
        assert text in str(outcome)


def test_state_of_another_optimizer_is_refused():
    from mpi_ef.optim import Lion

    def program(comm):
        adam, lion = OneBitAdam(net_of().parameters(), comm), Lion(net_of().parameters(), comm)
        with pytest.raises(OptionError, match="the state is of Lion, this is OneBitAdam"):
            adam.load_state_dict(lion.state_dict())

    virtual.results(2, program)
