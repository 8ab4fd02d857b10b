"""1-bit Adam: Adam before the freeze, signs after it, and nothing that explodes."""

import numpy as np
import pytest
import torch
import virtual
from training import alone, assert_close, assert_replicas, groups_of, trained

from mpi_ef import reference
from mpi_ef.compress import Identity, Sign
from mpi_ef.optim import OneBitAdam
from mpi_ef.optim.adam import VarianceWatch, inverse_roots

each_world = pytest.mark.parametrize("n", [1, 2, 3])


@each_world
@pytest.mark.parametrize("compressor", [Sign(block=64), Identity()], ids=str)
def test_before_the_freeze_it_is_adamw(n, compressor):
    """To rounding, step by step, with groups, decay and a schedule."""

    def schedule(optimizer, step):
        optimizer.param_groups[0]["lr"] = 2e-2 * 0.9**step

    def build(net, comm):
        return OneBitAdam(groups_of(net), comm, lr=1e-2, betas=(0.8, 0.99), freeze_step=99, compressor=compressor)

    rows = trained(n, 25, build, dtype=torch.float64, each=schedule)
    adamw = alone(n, 25, lambda net: torch.optim.AdamW(groups_of(net), lr=1e-2, betas=(0.8, 0.99), weight_decay=0.0),
                  dtype=torch.float64, each=schedule)
    assert_close(rows[0].path, adamw, rtol=1e-12, atol=1e-14)
    assert_replicas(rows)


@each_world
@pytest.mark.parametrize("bias_correction", [True, False])
def test_with_the_identity_it_is_adam_with_a_frozen_variance(n, bias_correction):
    rows = trained(n, 30, lambda net, comm: OneBitAdam(
        net.parameters(), comm, lr=1e-2, freeze_step=12, compressor=Identity(), bias_correction=bias_correction,
        variance_floor=0.5), dtype=torch.float64)
    plain = alone(n, 30, lambda net: reference.OneBitAdam(
        net.parameters(), lr=1e-2, freeze_step=12, bias_correction=bias_correction, variance_floor=0.5),
        dtype=torch.float64)
    assert rows[0].optimizer.frozen_step == 12
    assert_close(rows[0].path, plain, rtol=1e-11, atol=1e-13)


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
