"""Vectors from each real rank to each: the rows of virtual ranks, messages that meet no others, and broken ones."""

import gc
from time import sleep

import numpy as np
import pytest
import virtual
from mpi4py import MPI
from patience import limit
from vectors_for_tests import gaussian

from mpi_ef.collectives import Peers
from mpi_ef.testing.law import same_bits

pytestmark = pytest.mark.mpi
PATIENCE = limit(100)  # which no rank here runs out of


@pytest.fixture
def comm():
    return MPI.COMM_WORLD


def some_rounds(comm, d, dtype, **options):
    """Return the rows of some rounds in which all are awaited."""
    with Peers(comm, d, dtype, wait_for=comm.Get_size(), patience_seconds=PATIENCE, **options) as peers:
        return [peers.exchange(gaussian(comm.Get_rank(), d, step=number).astype(dtype)).rows.copy() for number in range(5)]


@pytest.mark.parametrize("d", [1, 1001, 60_003])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_real_ranks_have_the_rows_of_virtual_ones(comm, d, dtype):
    theirs = virtual.results(comm.size, lambda comm: some_rounds(comm, d, dtype)) if comm.rank == 0 else None
    assert same_bits(some_rounds(comm, d, dtype), comm.bcast(theirs and theirs[0]))


def test_ranks_of_any_pace_come_to_the_end(comm):
    with Peers(comm, 50_000, wait_for=max(1, comm.size - 1), patience_seconds=PATIENCE, window=2) as peers:
        while peers.round < 30:
            number = peers.round
            heard = peers.exchange(np.full(50_000, number, np.float32))
            assert len(heard.ranks) >= max(1, comm.size - 1)
            assert heard.jumped or (heard.rows == number).all()
            if number % comm.size == comm.rank:
                sleep(0.003)
                peers.progress()
    assert peers.close() == ()
    assert peers.rounds == 30 or peers.jumps


def test_they_meet_no_messages_of_others(comm):
    """Of two that are used in turns, of one that was dropped, and of a program that waits for any message of any rank."""
    Peers(comm, 3, wait_for=1).exchange(np.zeros(3, np.float32))
    gc.collect()
    first, second = (Peers(comm, 3, wait_for=comm.size, patience_seconds=PATIENCE) for _ in range(2))
    right, received = (comm.rank + 1) % comm.size, np.zeros(3, np.float32)
    waits = comm.Irecv(received, MPI.ANY_SOURCE, MPI.ANY_TAG)
    for number in range(4):
        for factor, peers in enumerate((first, second)):
            rows = peers.exchange(np.full(3, 100 * factor + number, np.float32)).rows
            assert (rows == 100 * factor + number).all()
    assert not waits.Test() or comm.size == 1
    comm.Barrier()
    comm.Send(np.full(3, 7.0, np.float32), right)
    waits.Wait()
    assert received.tolist() == [7.0] * 3
    assert first.close() == second.close() == ()


def test_a_message_that_is_too_long_is_none(comm):
    peers = Peers(comm, 4, np.float64, wait_for=comm.size, patience_seconds=PATIENCE)
    requests = []
    if comm.rank == 0:
        too_long = np.zeros(100, np.uint8)
        requests = [peers._late._comm.Isend(too_long, rank, peers._late._tag) for rank in range(1, comm.size)]
    for number in range(3):
        assert (peers.exchange(np.full(4, float(number))).rows == number).all()
    assert peers._late.garbled == (comm.rank > 0)
    assert peers.close() == ()
    MPI.Request.Waitall(requests)
