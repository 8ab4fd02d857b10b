"""1-bit LAMB: LAMB before the freeze, signs after it, and nothing that explodes."""

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from programs import loss_of, same_bits
from test_adam import dying_network
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
from mpi_ef.errors import DisagreementError, OptionError
from mpi_ef.kernels import reference
from mpi_ef.optim import OneBitLamb

each_world = pytest.mark.parametrize("n", [1, 2, 3])
SIGNS = Sign(block=16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernels_are_their_twins(dtype):
    @given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.booleans(), st.integers(0, 2**32))
    def check(sizes, long, seed):
        sizes = [*sizes, 5000] if long else sizes
        rng, layers, d = np.random.default_rng(seed), len(sizes), sum(sizes)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        x, m, out = (rng.normal(size=d).astype(dtype) for _ in range(3))
        fresh, inverse = (rng.random(d).astype(dtype) ** 4 for _ in range(2))
        inverse[rng.random(d) < 0.3] = 0
        inverse[: sizes[0]] = 0
        factors, least = ((rng.random(layers) + 0.1).astype(dtype) for _ in range(2))
        beta, root_factor, eps = dtype(0.9), dtype(1.3), dtype(1e-8)
        for name, inputs, outputs in (
            ("layer_norms", (x, starts), (np.empty(layers),)), ("add_layers", (x, factors, starts), (out,)),
            ("scaled_momentum", (x, m, beta, factors, starts), (out,)),
            ("follow_momentum", (x, inverse, np.array([0.9, 0.99], dtype), root_factor, eps, factors, least, starts),
             (m, fresh, np.empty(layers, dtype))),
        ):  # fmt: skip
            mine, theirs = ([a.copy() for a in outputs] for _ in range(2))
            getattr(kernels, name)(*inputs, *mine)
            getattr(reference, name)(*inputs, *theirs)
            for a, b in zip(mine, theirs, strict=True):
                assert a.tobytes() == b.tobytes(), name
        np.testing.assert_allclose(
            [np.linalg.norm(part.astype(float)) for part in np.split(x, starts[1:-1])],
            _norms(x, starts), rtol=1e-14)  # fmt: skip

    check()


def _norms(x, starts):
    norms = np.empty(starts.size - 1)
    kernels.layer_norms(x, starts, norms)
    return norms


class PlainLamb(torch.optim.Optimizer):
    """1-bit LAMB as in the paper, without compression: per layer, in the order of the formulas."""

    def __init__(self, params, *, lr=1e-2, weight_decay=0.0, freeze=10**9, betas=(0.9, 0.999), eps=1e-8, floor=0.1,
                 bias_correction=True, bounds=(0.01, 10.0), coeff_beta=0.9, factors=(0.5, 4.0), threshold=0.1):  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.freeze, self.betas, self.eps, self.floor, self.correct = freeze, betas, eps, floor, bias_correction
        self.bounds, self.coeff_beta, self.factor_bounds, self.threshold, self.t = (
            bounds,
            coeff_beta,
            factors,
            threshold,
            0,
        )
        self.factors = []

    def correction(self, beta, t):
        return 1 - beta**t if self.correct else 1.0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    s = self.state[p]
                    if not s:
                        s |= {
                            "m": torch.zeros_like(p),
                            "v": torch.zeros_like(p),
                            "average": 0.0,
                            "counted": 0,
                            "factor": 1.0,
                        }
                    (self.warm_up if self.t <= self.freeze else self.follow)(p, s, group["lr"], group["weight_decay"])

    def warm_up(self, p, s, lr, decay):
        (b1, b2), t = self.betas, self.t
        s["m"] = b1 * s["m"] + (1 - b1) * p.grad
        s["v"] = b2 * s["v"] + (1 - b2) * p.grad**2
        m, v = s["m"] / self.correction(b1, t), s["v"] / self.correction(b2, t)
        update = m / (v.sqrt() + self.eps) + decay * p
        coefficient, of_p, of_update = 1.0, float(p.norm()), float(update.norm())
        if of_p and of_update:
            coefficient = min(max(of_p / of_update, self.bounds[0]), self.bounds[1])
            s["average"] = self.coeff_beta * s["average"] + (1 - self.coeff_beta) * coefficient
            s["counted"] += 1
        p.sub_(lr * coefficient * update)
        s["fresh"] = s["v"].clone()

    def follow(self, p, s, lr, decay):
        (b1, b2), t = self.betas, self.t
        v = s["v"] / self.correction(b2, self.freeze)
        least = self.floor * v.mean().sqrt()
        alive = bool(v.any())
        old, s["m"] = s["m"], b1 * s["m"] + (1 - b1) * p.grad
        rebuilt = (s["m"] - b1 * old) / (1 - b1)
        s["fresh"] = b2 * s["fresh"] + (1 - b2) * rebuilt**2
        root = v.sqrt().clamp(min=float(least)) + self.eps
        fresh_root = (s["fresh"] / self.correction(b2, t)).sqrt().clamp(min=float(least)) + self.eps
        direction = s["m"] / self.correction(b1, t) / root if alive else torch.zeros_like(p)
        update, factor = direction + decay * p, float((root / fresh_root).max()) if alive else 1.0
        if decay > 0:
            share = min(1.0, float(direction.norm() / update.norm())) if update.any() else 1.0
            factor = factor * share + 1 - share
        factor = min(max(factor, self.factor_bounds[0]), self.factor_bounds[1])
        factor = min(max(factor, s["factor"] * (1 - self.threshold)), s["factor"] * (1 + self.threshold))
        s["factor"] = factor
        self.factors.append(factor)
        coefficient = s["average"] / self.correction(self.coeff_beta, s["counted"]) if s["counted"] else 1.0
        p.sub_(lr * coefficient * factor * update)


def groups_of(net):
    named = list(net.parameters())
    return [{"params": named[:3], "lr": 2e-2}, {"params": named[3:], "weight_decay": 0.3}]


def schedule(optimizer, step):
    optimizer.param_groups[0]["lr"] = 2e-2 * 0.98**step


@each_world
@pytest.mark.parametrize("compressor", [SIGNS, Identity()], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_before_the_freeze_it_is_lamb(n, compressor, dtype, tolerance):
    rows = trained(n, 25, lambda net, comm: OneBitLamb(groups_of(net), comm, lr=1e-2, betas=(0.8, 0.99), freeze_step=99,
                                                       compressor=compressor), dtype=dtype, each=schedule)  # fmt: skip
    plain = alone(n, 25, lambda net: PlainLamb(groups_of(net), betas=(0.8, 0.99)), dtype=dtype, each=schedule)
    assert_close(rows[0][0], plain, rtol=tolerance, atol=10 * tolerance)
    assert_replicas(rows)


@each_world
@pytest.mark.parametrize(("options", "dtype", "tolerance"), [
    ({}, torch.float64, 1e-11), ({}, torch.float32, 1e-5), ({"bias_correction": False}, torch.float64, 1e-11),
    ({"factor_min": 0.9, "factor_max": 1.2, "factor_threshold": 0.02}, torch.float64, 1e-11),
    ({"variance_floor": 0.0, "coeff_beta": 0.5, "max_coeff": 0.2}, torch.float64, 1e-11),
], ids=str)  # fmt: skip
def test_with_the_identity_it_is_the_plain_algorithm(n, options, dtype, tolerance):
    """Step by step, with groups, decay and a schedule; scaling momenta changes nothing."""

    def lamb(net, comm):
        return OneBitLamb(groups_of(net), comm, betas=(0.9, 0.95), freeze_step=12, compressor=Identity(), **options)

    rows, of_adam = trained(n, 50, lamb, dtype=dtype, each=schedule), {"betas": (0.9, 0.95), "freeze": 12}
    plainly = {"floor": options.get("variance_floor", 0.1), "threshold": options.get("factor_threshold", 0.1),
               "factors": (options.get("factor_min", 0.5), options.get("factor_max", 4.0)),
               "bounds": (0.01, options.get("max_coeff", 10.0)), "coeff_beta": options.get("coeff_beta", 0.9),
               "bias_correction": options.get("bias_correction", True)}  # fmt: skip
    built = []

    def build(net):
        built.append(PlainLamb(groups_of(net), lr=1e-3, **of_adam, **plainly))
        return built[0]

    plain = alone(n, 50, build, dtype=dtype, each=schedule)
    assert rows[0][2].frozen_step == 12
    for step, (mine, theirs) in enumerate(zip(rows[0][0], plain, strict=True)):
        distance, size = (np.sqrt(sum(float(np.sum(np.square(a))) for a in arrays)) for arrays in
                          ([a - b for a, b in zip(mine, theirs, strict=True)], theirs))  # fmt: skip
        assert distance <= tolerance * size, f"step {step}"
    assert len(set(built[0].factors)) > 20


@pytest.mark.parametrize("compressor", [SIGNS, TopK(0.1)], ids=str)
@each_world
def test_replicas_are_equal_and_learn(n, compressor):
    rows = trained(n, 150, lambda net, comm: OneBitLamb(net.parameters(), comm, lr=2e-2, freeze_step=20,
                                                        compressor=compressor))  # fmt: skip
    assert_replicas(rows)
    for _, losses, optimizer in rows:
        assert optimizer.frozen_step == 20
        assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[18:22])
        assert same_bits(optimizer.replicated(), rows[0][2].replicated())
        assert set(optimizer.per_rank()) <= {"e_i", "plan.residual"}


def test_layers_are_scaled_to_one_size():
    """So that a block of signs which lies across two layers does not drown the smaller one."""

    def program(comm):
        shapes = ((7, 3), (7, 3), (4, 3))
        net = seeded(torch.nn.ModuleList([torch.nn.Linear(*shape, bias=shape[0] == 7) for shape in shapes]))
        optimizer = OneBitLamb(net.parameters(), comm, lr=1e-3, freeze_step=5, compressor=Sign())
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(net[0], comm.Get_rank(), step) + 1e-4 * loss_of(net[1], comm.Get_rank(), step)
            (loss + net[2](torch.zeros(1, 4)).sum()).backward()
            optimizer.step()
            if step == 4:
                m = optimizer.arrays["m"].copy()
        scales, starts = optimizer.arrays["scales"], optimizer.flat.starts
        sizes = [np.sqrt(np.mean((scale * m[start:stop].astype(float)) ** 2)) for scale, start, stop in
                 zip(scales, starts, starts[1:], strict=False)]  # fmt: skip
        np.testing.assert_allclose(sizes[:4], sizes[0], rtol=1e-5)
        assert (scales[2:4] > 1e3 * scales[:2]).all()
        assert scales[4] == 1
        assert sizes[4] == 0

    virtual.results(2, program)


def test_errors_stay_bounded():
    def program(comm):
        net, norms, losses = net_of(), [], []
        optimizer = OneBitLamb(net.parameters(), comm, lr=1e-2, freeze_step=20, compressor=SIGNS)
        for step in range(320):
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            norms.append(float(np.linalg.norm(optimizer.per_rank()["e_i"])))
            losses.append(loss.item())
        return norms, losses

    for norms, losses in virtual.results(2, program):
        assert not any(norms[:20])
        assert max(norms[150:]) < 2 * max(norms[20:100])
        assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:5])


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("compressor", [Sign(), Sign(block=64)], ids=str)
def test_dead_units_do_not_explode(bias_correction, compressor):
    """Entries whose variance is zero, and a layer whose inputs always are."""

    def program(comm):
        net, losses = dying_network(), []
        net.append(seeded(torch.nn.Linear(3, 3)))
        asleep = torch.nn.Linear(4, 3, bias=False)
        optimizer = OneBitLamb([*net.parameters(), *asleep.parameters()], comm, lr=1e-2, betas=(0.9, 0.99), freeze_step=50,
                               compressor=compressor, bias_correction=bias_correction)  # fmt: skip
        before = asleep.weight.detach().clone()
        for step in range(550):
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            (loss + asleep(torch.zeros(2, 4)).sum()).backward()
            optimizer.step()
            losses.append(loss.item())
        assert (asleep.weight == before).all()
        return losses, optimizer

    for losses, optimizer in virtual.results(2, program):
        assert np.isfinite(losses).all()
        assert all(np.isfinite(array).all() for array in (optimizer.replicated() | optimizer.per_rank()).values())
        assert np.mean(losses[-20:]) < np.mean(losses[45:55])


@pytest.mark.parametrize("before", [3, 9, 10, 16])
def test_saved_and_loaded_a_step_is_the_same(before):
    """In the warm-up, at the freeze, and after it."""
    assert_resumes(2, lambda net, comm: OneBitLamb(groups_of(net), comm, lr=1e-2, freeze_step=9, compressor=SIGNS),
                   before=before)  # fmt: skip


def test_states_can_be_loaded_across_the_freeze():
    def program(comm):
        net, early, paths = net_of(), None, []
        optimizer = OneBitLamb(net.parameters(), comm, lr=1e-2, freeze_step=9, compressor=SIGNS)
        for first in (0, 6):
            if early:
                with torch.no_grad():
                    for p, value in zip(net.parameters(), early[0], strict=True):
                        p.copy_(torch.from_numpy(value))
                optimizer.load_state_dict(early[1])
                assert optimizer.frozen_step is None
            path = []
            for step in range(first, 14):
                if step == 6 and not first:
                    early = parameters_of(net), optimizer.state_dict()
                optimizer.zero_grad()
                loss_of(net, comm.Get_rank(), step).backward()
                optimizer.step()
                path.append(parameters_of(net))
            paths.append(path[-8:])
        assert same_bits(*paths)

    virtual.results(2, program)


def test_the_freeze_by_itself():
    def build(net, comm):
        return OneBitLamb(net.parameters(), comm, lr=1e-3, betas=(0.9, 0.9), compressor=SIGNS)

    frozen = [optimizer.frozen_step for _, _, optimizer in trained(2, 60, build)]
    assert frozen[0] == frozen[1]
    assert 11 <= frozen[0] < 60
    assert_resumes(2, build, before=frozen[0] - 2, after=5)


def test_broken_gradients_are_skipped_before_and_after_the_freeze():
    for freeze in (2, 50):
        assert_skips_broken_gradients(3, lambda net, comm, freeze=freeze: OneBitLamb(
            net.parameters(), comm, lr=1e-2, freeze_step=freeze, compressor=SIGNS))  # fmt: skip


def test_16_bit_parameters():
    rows = trained(2, 60, lambda net, comm: OneBitLamb(net.parameters(), comm, lr=2e-2, freeze_step=15, compressor=SIGNS),
                   dtype=torch.bfloat16)  # fmt: skip
    assert_replicas(rows)
    assert np.mean(rows[0][1][-5:]) < 0.8 * np.mean(rows[0][1][:5])


def test_clipping_is_global_after_the_freeze():
    seen = {}

    def program(comm):
        net = net_of()
        optimizer = OneBitLamb(net.parameters(), comm, freeze_step=2, clip=0.5, compressor=SIGNS)
        for step in range(4):
            optimizer.zero_grad()
            (100 * (comm.Get_rank() + 1) * loss_of(net, comm.Get_rank(), step)).backward()
            optimizer.step()
            seen[step, comm.Get_rank()] = float(np.linalg.norm(optimizer.flat.gradients)) ** 2

    virtual.results(2, program)
    for step in range(4):
        np.testing.assert_allclose((seen[step, 0] + seen[step, 1]) / 2, 0.25, rtol=1e-5)


def test_a_step_takes_three_collectives_and_a_thirtieth_of_the_bytes():
    calls = []

    def program(comm):
        net = torch.nn.Linear(200, 50)
        optimizer = OneBitLamb(net.parameters(), comm, lr=1e-3, freeze_step=2)
        for step in range(3):
            net.zero_grad()
            net(torch.full((1, 200), 1.0 + comm.Get_rank() + step)).square().sum().backward()
            if step == 2:
                before = optimizer.sent_nbytes
                for name in ("Allgather", "Alltoall", "Alltoallv", "allgather"):
                    call = getattr(comm, name)
                    setattr(comm, name, lambda *a, call=call, name=name: calls.append(name) or call(*a))
            optimizer.step()
        assert optimizer.dense_nbytes > 25 * (optimizer.sent_nbytes - before)

    virtual.results(2, program)
    assert sorted(calls) == ["Allgather"] * 4 + ["Alltoall"] * 2  # of two ranks


@pytest.mark.parametrize(("options", "text"), [
    ({"betas": (0.9, 1.0)}, "OneBitLamb: betas=(0.9, 1.0) are not in [0, 1)"),
    ({"freeze_step": 0}, "freeze_step=0; the variance"),
    ({"min_coeff": 11.0}, "min_coeff=11.0, max_coeff=10.0 are no bounds"),
    ({"factor_min": 1.5}, "factor_min=1.5, factor_max=4.0 are no bounds of 1"),
    ({"coeff_beta": 1.0}, "coeff_beta=1.0 is not in [0, 1)"),
    ({"factor_threshold": -0.1}, "factor_threshold=-0.1 is not in [0, 1)"),
    ({"variance_floor": 1.1}, "variance_floor=1.1 is not in [0, 1]"), ({"clip": -1.0}, "clip=-1.0 is negative"),
])  # fmt: skip
def test_bad_options(options, text):
    for outcome in virtual.run(2, lambda comm: OneBitLamb(net_of().parameters(), comm, **options)):
        assert isinstance(outcome, OptionError)
        assert text in str(outcome)
        assert "\n" not in str(outcome)


def test_ranks_with_other_options_all_learn_about_it():
    for outcome in virtual.run(2, lambda comm: OneBitLamb(net_of().parameters(), comm, coeff_beta=comm.Get_rank() / 2)):
        assert isinstance(outcome, DisagreementError)
        assert "coeff_beta: 0.0 on rank 0; 0.5 on rank 1" in str(outcome)
