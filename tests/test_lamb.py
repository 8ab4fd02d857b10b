"""1-bit LAMB: LAMB before the freeze, signs after it, and nothing that explodes."""

import numpy as np
import pytest
import torch
import virtual
from programs import loss_of
from training import alone, assert_close, assert_replicas, groups_of, seeded, trained

from mpi_ef import reference
from mpi_ef.compress import Identity, Sign
from mpi_ef.optim import OneBitLamb

each_world = pytest.mark.parametrize("n", [1, 2, 3])
SIGNS = Sign(block=16)


def schedule(optimizer, step):
    optimizer.param_groups[0]["lr"] = 2e-2 * 0.98**step


@each_world
@pytest.mark.parametrize("compressor", [SIGNS, Identity()], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_before_the_freeze_it_is_lamb(n, compressor, dtype, tolerance):
    rows = trained(n, 25, lambda net, comm: OneBitLamb(groups_of(net), comm, lr=1e-2, betas=(0.8, 0.99), freeze_step=99,
                                                       compressor=compressor), dtype=dtype, each=schedule)
    plain = alone(
        n, 25, lambda net: reference.OneBitLamb(groups_of(net), lr=1e-2, betas=(0.8, 0.99)), dtype=dtype, each=schedule
    )
    assert_close(rows[0].path, plain, rtol=tolerance, atol=10 * tolerance)
    assert_replicas(rows)


@each_world
@pytest.mark.parametrize(("options", "dtype", "tolerance"), [
    ({}, torch.float64, 1e-11), ({}, torch.float32, 1e-5), ({"bias_correction": False}, torch.float64, 1e-11),
    ({"factor_min": 0.9, "factor_max": 1.2, "factor_threshold": 0.02}, torch.float64, 1e-11),
    ({"variance_floor": 0.0, "coeff_beta": 0.5, "max_coeff": 0.2}, torch.float64, 1e-11),
], ids=str)
def test_with_the_identity_it_is_the_plain_algorithm(n, options, dtype, tolerance):
    """Step by step, with groups, decay and a schedule; scaling momenta changes nothing."""

    def lamb(net, comm):
        return OneBitLamb(groups_of(net), comm, betas=(0.9, 0.95), freeze_step=12, compressor=Identity(), **options)

    rows, built = trained(n, 50, lamb, dtype=dtype, each=schedule), []

    def build(net):
        built.append(reference.OneBitLamb(groups_of(net), betas=(0.9, 0.95), freeze_step=12, **options))
        return built[0]

    plain = alone(n, 50, build, dtype=dtype, each=schedule)
    assert rows[0].optimizer.frozen_step == 12
    for step, (mine, theirs) in enumerate(zip(rows[0].path, plain, strict=True)):
        distance, size = (np.sqrt(sum(float(np.sum(np.square(a))) for a in arrays)) for arrays in
                          ([a - b for a, b in zip(mine, theirs, strict=True)], theirs))
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
                 zip(scales, starts, starts[1:], strict=False)]
        np.testing.assert_allclose(sizes[:4], sizes[0], rtol=1e-5)
        assert (scales[2:4] > 1e3 * scales[:2]).all()
        assert scales[4] == 1
        assert sizes[4] == 0

    virtual.results(2, program)
