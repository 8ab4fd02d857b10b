"""Law 7 through files, on real ranks. Run as ``mpiexec -n N python -m pytest --with-mpi tests/mpi``."""

import random
import shutil
import tempfile

import numpy as np
import pytest
import torch
from programs import OPTIMIZERS, build_optimizer, loss_of, model, same_bits

from mpi_ef.checkpoint import Store
from mpi_ef.data import seed_rank
from mpi_ef.state.training import Training

pytestmark = pytest.mark.mpi


@pytest.fixture
def comm():
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def folder(comm):
    path = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


def run(net, optimizer, comm, steps):
    """Train with noise from all three global generators; they differ between ranks."""
    noise = []
    for step in steps:
        optimizer.zero_grad()
        noise.append(float(torch.rand(())) + np.random.rand() + random.random())  # noqa: NPY002
        (loss_of(net, comm.rank, step) * (1.0 + noise[-1])).backward()
        optimizer.step()
    return [p.detach().numpy().copy() for p in net.parameters()], noise


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_to_the_last_bit_with_its_random_numbers(comm, folder, name):
    store, net = Store(folder), model()
    seed_rank(comm, 5)
    optimizer = build_optimizer(name, net, comm)
    run(net, optimizer, comm, range(4))
    Training(model=net, optimizer=optimizer).save(store, comm, 4)
    expected = run(net, optimizer, comm, range(4, 8))
    assert len(set(comm.allgather(expected[1][0]))) == comm.size
    seed_rank(comm, 6)
    other = model()
    resumed = build_optimizer(name, other, comm)
    assert Training(model=other, optimizer=resumed).resume(store, comm) == 4
    assert same_bits(run(other, resumed, comm, range(4, 8)), expected)
    assert same_bits(optimizer.per_rank() | optimizer.replicated(), resumed.per_rank() | resumed.replicated())
    store.close()
