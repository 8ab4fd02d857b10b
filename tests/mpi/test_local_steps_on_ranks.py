"""Local steps on real ranks: the bits of virtual ones, also while the program communicates between exchanges."""

import numpy as np
import pytest
import torch
import virtual
from training import net_of, parameters_of, steps_of

from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.compress import TopK, TwoBits
from mpi_ef.optim import LocalSteps
from mpi_ef.testing.law import same_bits

pytestmark = pytest.mark.mpi

VARIANTS = {
    "plain": {"every": 4}, "fragments": {"every": 4, "fragments": 3, "plan": TwoPhaseMean},
    "late": {"every": 3, "late": True}, "late fragments": {"every": 4, "fragments": 2, "late": True, "plan": TwoPhaseMean},
    "momentum": {"every": 3, "decay": 1.0, "outer_lr": 0.7, "outer_momentum": 0.9},
}


@pytest.fixture
def comm():
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_rounds_give_the_bits_of_virtual_ranks(comm, options):
    """And go on from a state saved in the middle, while messages travel."""

    def program(comm):
        rank, nets = comm.Get_rank(), (net_of(), net_of())
        optimizers = [LocalSteps(torch.optim.AdamW(net.parameters(), lr=1e-2), comm, TopK(0.2, values=TwoBits()), **options)
                      for net in nets]
        for step in range(10):
            steps_of(nets[0], optimizers[0], rank, [step])
            comm.allgather(step)
            comm.Allgather(np.ones(3), np.empty((comm.Get_size(), 3)))
        for new, old in ((nets[1], nets[0]), optimizers[::-1]):
            new.load_state_dict(old.state_dict())
        paths = [steps_of(*pair, rank, range(10, 20)) for pair in zip(nets, optimizers, strict=True)]
        assert same_bits(*paths)
        optimizers[0].synchronize()
        return parameters_of(nets[0]), optimizers[0].x.copy(), optimizers[0].sent_nbytes

    real = program(comm)
    assert same_bits(real, comm.scatter(virtual.results(comm.size, program) if comm.rank == 0 else None))
    everywhere = comm.allgather(real)
    assert all(same_bits(theirs, everywhere[0]) for theirs in everywhere)
