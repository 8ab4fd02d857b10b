"""Law 3 for shares of the data and for buffers. Run as ``mpiexec -n N python -m pytest --with-mpi tests/mpi``."""

import pytest
import torch
import virtual
from programs import same_bits
from torch import nn
from vectors_for_tests import gaussian

import mpi_ef.buffers
from mpi_ef import ShardedSampler, synchronize_buffers
from mpi_ef.errors import DataError, DisagreementError

pytestmark = pytest.mark.mpi


@pytest.fixture
def comm():
    from mpi4py import MPI

    return MPI.COMM_WORLD


def same_as_virtual(comm, program):
    real = program(comm)
    assert same_bits(real, comm.scatter(virtual.results(comm.size, program) if comm.rank == 0 else None))
    return real


def epochs(comm):
    """Two epochs, the first one stopped in its middle and taken up again by another sampler."""
    sampler, goes_on = (ShardedSampler(23, comm, batch=2, seed=1) for _ in range(2))
    used = []
    for batch in sampler:
        used.append(batch)
        sampler.advance()
        if len(used) == 2:
            break
    goes_on.load_state_dict(sampler.state_dict())
    return [*used, *goes_on, *goes_on]


def test_samplers_deal_out_what_virtual_ranks_see(comm):
    used = comm.allgather(same_as_virtual(comm, epochs))
    assert {sample for batches in used for batch in batches for sample in batch} == set(range(23))
    with pytest.raises(DataError, match=f"{comm.size - 1} samples for {comm.size} ranks"):
        ShardedSampler(comm.size - 1, comm, batch=1)
    if comm.size > 1:
        with pytest.raises(DisagreementError, match="disagree on seed"):
            ShardedSampler(23, comm, batch=1, seed=comm.rank)


def build(rank):
    norm = nn.BatchNorm1d(4)
    for step in range(3):
        norm(torch.from_numpy(gaussian(rank, 32 * 4, step=step).reshape(32, 4)) * (1 + rank) + rank)
    norm.register_buffer("running_table", torch.from_numpy(gaussian(rank, 1000)))
    norm.register_buffer("name", torch.tensor([rank, 255 - rank], dtype=torch.uint8))
    return norm


@pytest.mark.parametrize("policy", ["mean", "root"])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_buffers_get_the_bits_of_virtual_ranks(comm, policy, in_pieces, monkeypatch):
    if in_pieces:
        monkeypatch.setattr(mpi_ef.buffers, "_GATHERED", 100)
        monkeypatch.setattr(mpi_ef.vectors.flat, "_BROADCAST_NBYTES", 99)

    def program(comm):
        model = build(comm.Get_rank())
        synchronize_buffers(model, comm, policy=policy)
        return [b.numpy() for b in model.buffers()]

    everywhere = comm.allgather([b.tobytes() for b in same_as_virtual(comm, program)])
    assert all(theirs == everywhere[0] for theirs in everywhere)
