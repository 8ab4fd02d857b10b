"""Robust rules and MoNNA on real ranks: the bits of virtual ones, and of any other number of them."""

import numpy as np
import pytest
import torch
import virtual
from mpi4py import MPI
from patience import limit
from vectors_for_tests import gaussian

from mpi_ef.collectives import RobustMean, robust_mean
from mpi_ef.compress import TopK
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.optim import MoNNA
from mpi_ef.robust import NNM, GeometricMedian, Median, TrimmedMean
from mpi_ef.testing.law import same_bits

pytestmark = [pytest.mark.mpi, pytest.mark.filterwarnings("ignore:MoNNA. n=")]
N, D = 9, 2000


@pytest.fixture
def comm():
    return MPI.COMM_WORLD


def trajectory(rule, aggregator, shards):
    """Nine clients, two of them wrong: one lies, one has a NaN now and then."""

    def program(comm):
        plan = RobustMean(comm, TopK(0.01), D, np.float32, aggregator, f=2, clients=N, shards=shards)
        feedback, out = ErrorFeedback(rule, plan, dense_steps=1), []
        for step in range(6):
            rows = np.array([gaussian(c, D, step=step) + 1 for c in range(plan.first, plan.first + plan.own)], np.float32)
            for client, what in ((3, -100.0), (7, np.nan if step % 2 else 1.0)):
                if plan.first <= client < plan.first + plan.own:
                    rows[client - plan.first] *= np.float32(what)
            out.append(feedback.step(rows).copy())
        return out, feedback.state.suspicion

    return program


@pytest.mark.parametrize("aggregator", [NNM(TrimmedMean()), TrimmedMean(), GeometricMedian()], ids=str)
def test_any_number_of_real_ranks_gives_the_bits_of_one(comm, aggregator):
    alone = virtual.results(1, trajectory("byz-ef21-sgdm", aggregator, False))[0]
    for shards in (False, True):
        assert same_bits(trajectory("byz-ef21-sgdm", aggregator, shards)(comm), alone)


def test_robust_mean_of_real_ranks(comm):
    """One rank in four may be wrong."""
    f = (comm.size - 1) // 3

    def program(comm):
        x = gaussian(comm.Get_rank(), 1001, step=3)
        return [robust_mean(comm, x * (1e9 if comm.Get_rank() == 0 and f else 1.0), rule, f=f) for rule in (None, Median())]

    mine = program(comm)
    assert same_bits(mine, comm.bcast(virtual.results(comm.size, program)[0] if comm.rank == 0 else None))
    assert np.abs(mine[0]).max() < 10


def trained(comm, rounds=20, **options):
    torch.manual_seed(0)
    net, rng = torch.nn.Linear(40, 3), np.random.default_rng(comm.Get_rank())
    optimizer = MoNNA(net.parameters(), comm, lr=0.5, f=(comm.Get_size() - 1) // 3, beta=0.8, **options)
    while (optimizer.steps if optimizer.peers is None else optimizer.peers.round) < rounds:  # a jump leaves some out
        x = torch.tensor(rng.normal(size=(16, 40)), dtype=torch.float32)
        optimizer.zero_grad()
        (net(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
    optimizer.close()
    return net.weight.detach().numpy().copy(), optimizer


def test_monna_of_real_ranks_is_that_of_virtual_ones(comm):
    mine, optimizer = trained(comm)
    theirs = virtual.results(comm.size, lambda comm: trained(comm)[0]) if comm.rank == 0 else None
    assert same_bits(mine, comm.scatter(theirs))
    medians = comm.allgather(optimizer.x.tobytes())
    assert len(set(medians)) == 1


def test_monna_from_rank_to_rank(comm):
    """Nobody is waited for beyond n - f; all are near each other in the end."""
    f = (comm.size - 1) // 3
    mine, optimizer = trained(comm, wait_for=comm.size - f, patience_seconds=limit(100))
    everybodys = np.array(comm.allgather(mine))
    assert np.abs(everybodys - everybodys[0]).max() < 0.3
    assert optimizer.peers.rounds == 20 or optimizer.jumps
    with pytest.raises(ValueError, match="no rank has the vectors of all"):
        _ = optimizer.x
