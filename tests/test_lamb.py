"""1-bit LAMB: LAMB before the freeze, signs after it, and nothing that explodes."""

import numpy as np
import pytest
import torch
import virtual
from programs import loss_of
from training import alone, assert_close, assert_replicas, groups_of, seeded, trained

from mpi_ef.compress import Identity, Sign
from mpi_ef.optim import OneBitLamb

each_world = pytest.mark.parametrize("n", [1, 2, 3])
SIGNS = Sign(block=16)


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
                if p.grad is not None:
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


def schedule(optimizer, step):
    optimizer.param_groups[0]["lr"] = 2e-2 * 0.98**step


@each_world
@pytest.mark.parametrize("compressor", [SIGNS, Identity()], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_before_the_freeze_it_is_lamb(n, compressor, dtype, tolerance):
    rows = trained(n, 25, lambda net, comm: OneBitLamb(groups_of(net), comm, lr=1e-2, betas=(0.8, 0.99), freeze_step=99,
                                                       compressor=compressor), dtype=dtype, each=schedule)  # fmt: skip
    plain = alone(n, 25, lambda net: PlainLamb(groups_of(net), betas=(0.8, 0.99)), dtype=dtype, each=schedule)
    assert_close(rows[0].path, plain, rtol=tolerance, atol=10 * tolerance)
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
    assert rows[0].optimizer.frozen_step == 12
    for step, (mine, theirs) in enumerate(zip(rows[0].path, plain, strict=True)):
        distance, size = (np.sqrt(sum(float(np.sum(np.square(a))) for a in arrays)) for arrays in
                          ([a - b for a, b in zip(mine, theirs, strict=True)], theirs))  # fmt: skip
        assert distance <= tolerance * size, f"step {step}"
    assert len(set(built[0].factors)) > 20


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
