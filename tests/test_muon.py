"""EF21-Muon: orthogonalised steps along an EF21 estimate of the momentum."""

import numpy as np
import pytest
import torch
import virtual
from training import alone, assert_close, trained

from mpi_ef import reference
from mpi_ef.compress import Identity, TopK
from mpi_ef.optim import EF21Muon
from mpi_ef.optim.muon import LinearMinimization, orthogonalized


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 40), (40, 3), (64, 32)])
def test_singular_values_become_about_one(shape):
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=shape))
    result = orthogonalized(matrix)
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    assert result.shape == matrix.shape
    large = s > 1e-2 * np.linalg.norm(s)
    values = np.einsum("pk,pq,kq->k", u, result.numpy(), vt)
    assert (abs(values[large] - 1) < 0.4).all()
    rotated = u.T @ result.numpy() @ vt.T
    np.testing.assert_allclose(rotated - np.diag(np.diag(rotated)), 0, atol=1e-9)  # the same singular vectors


def test_zero_stays_zero():
    assert not orthogonalized(torch.zeros(3, 4)).any()


def test_it_agrees_with_torchs_muon():
    """Torch works in bfloat16: singular values to two digits."""
    torch.manual_seed(0)
    start, target = torch.randn(24, 16), torch.randn(24, 16)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours = LinearMinimization([mine], lr=0.05, weight_decay=0.1, vector_radius=0.1)
    muon = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.0, nesterov=False)
    for _ in range(10):
        for p, optimizer in ((mine, ours), (theirs, muon)):
            p.grad = p.detach() - target
            optimizer.step()
    assert (mine - theirs).norm() < 0.02 * (mine - start).norm()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_with_the_identity_it_is_muon(n):
    rows = trained(n, 20, lambda net, comm: EF21Muon(net.parameters(), comm, Identity(), lr=0.02, beta=0.2,
                                                     weight_decay=0.1), dtype=torch.float64)
    plain = alone(n, 20, lambda net: reference.EF21Muon([p for p in net.parameters() if p.requires_grad], lr=0.02,
                                                        beta=0.2, weight_decay=0.1), dtype=torch.float64)
    assert_close(rows[0].path, plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 2)])
def test_matrices_without_entries(shape):
    def program(comm):
        empty, net = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.eye(4, 3))
        optimizer = EF21Muon([empty, net], comm, TopK(0.5), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (empty.sum() + (net * (comm.Get_rank() + 1)).sum()).backward()
            optimizer.step()
        return net.detach().clone()

    first, second = virtual.results(2, program)
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.eye(4, 3))
