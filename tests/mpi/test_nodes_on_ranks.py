"""NodeMean on real ranks: memory that ranks share, and messages where they cannot."""

import gc
import os
import tracemalloc
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import virtual
from mpi4py import MPI
from vectors_for_tests import gaussian

from mpi_ef.collectives import DenseMean, NodeMean, TwoPhaseMean, pairwise
from mpi_ef.comm.nodes import RANKS_PER_NODE
from mpi_ef.compress import Quantize, TopK, lazy
from mpi_ef.errors import NonFiniteError, OptionError, ShapeError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.optim import DistributedOptimizer
from mpi_ef.testing.law import same_bits
from mpi_ef.testing.regression import loss_of, net_of

pytestmark = pytest.mark.mpi
TOP = TopK(0.05, values=Quantize("bf16"))
NODES = {"pairs": 2, "in turns": lambda rank: rank % 2, "ones": 1, "threes": 3, "all": 4}
each_node = pytest.mark.parametrize("node", [
    pytest.param(node, id=name, marks=[pytest.mark.exhaustive] * (n > 1)) for n, (name, node) in enumerate(NODES.items())])


@pytest.fixture
def comm():
    return MPI.COMM_WORLD


def steps(comm, node, inner="TwoPhaseMean", d=20_011, count=6):
    """Return results and state of some steps of EF14, with combinations and in parts among them."""
    feedback, results = ErrorFeedback("ef14", NodeMean(comm, TOP, d, inner=inner, node=node)), []
    for step in range(count):
        x, y = (gaussian(comm.Get_rank(), d, step=step + more) for more in (0, 50))
        if step % 3 == 0:
            results.append(feedback.step(lazy(x) - y).copy())
        elif step % 3 == 1:
            feedback.start(x)
            x.fill(7)
            feedback.progress()
            feedback.wait()
            results.append(feedback.commit().copy())
        else:
            results.append(feedback.step(x).copy())
    return results, feedback.per_rank(), feedback


@each_node
@pytest.mark.parametrize("inner", [pytest.param("GatherMean", marks=pytest.mark.exhaustive), "TwoPhaseMean"])
def test_shared_memory_gives_the_bits_of_messages(comm, node, inner):
    """Which virtual ranks use, and real ones that are refused the memory; the same bits on all ranks."""
    results, arrays, feedback = steps(comm, node, inner)
    assert feedback.node.inside.shares == (feedback.node.placement.node.Get_size() > 1)
    theirs = virtual.results(comm.size, lambda comm: steps(comm, node, inner)[:2]) if comm.rank == 0 else None
    expected = comm.scatter(theirs)
    assert same_bits(results, expected[0])
    assert all(same_bits(arrays[name], array) for name, array in expected[1].items())
    assert same_bits(results, comm.bcast(results))


def test_without_shared_memory_vectors_go_through_messages(comm, monkeypatch):
    """One rank of all cannot have it: one line of warning on the first rank, and the same bits."""
    expected, _, _ = steps(comm, 2)
    last = comm.rank == comm.size - 1

    def refused(*_):
        raise OSError(28, "No space left on device")

    if last:
        monkeypatch.setattr(os, "posix_fallocate", refused)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        results, _, feedback = steps(comm, 2)
    assert same_bits(results, expected)
    beside = feedback.node.placement.node.allgather(comm.rank)
    assert feedback.node.inside.shares == (len(beside) > 1 and comm.size - 1 not in beside)
    texts = [str(one.message) for one in said if one.category is RuntimeWarning]
    first = len(beside) > 1 and comm.size - 1 in beside and comm.rank == beside[0]
    assert len(texts) == first
    assert not first or ("share no memory" in texts[0] and "No space left" in texts[0] and "\n" not in texts[0])


def test_those_that_share_memory_are_one_node_by_default(comm, monkeypatch):
    monkeypatch.delenv(RANKS_PER_NODE, raising=False)
    plan, dense = NodeMean(comm, TOP, 10_000), DenseMean(comm, 10_000)
    assert plan.placement.nodes == 1
    x, out = gaussian(comm.rank, 10_000), np.zeros(10_000, np.float32)
    plan.exchange(x).set_mean(out)
    assert same_bits(out, dense.exchange(x).mean)
    by_hand = NodeMean(comm, TOP, 10_000, node=comm.Split(comm.rank // 2))
    assert by_hand.placement.nodes == -(-comm.size // 2)
    if comm.size > 1:
        assert plan.placement.node is NodeMean(comm, TOP, 100).placement.node  # made once


def test_a_vector_in_its_row_is_not_copied(comm):
    """The row is what others read; results are the same bits."""
    d = 50_000
    one, two = (ErrorFeedback("ef21", NodeMean(comm, TOP, d, node=2)) for _ in range(2))
    for step in range(4):
        x = gaussian(comm.rank, d, step=step)
        result = two.step(x)
        if one.row is not None:
            one.row[:] = x
            before = one.node.inside._landing.ctypes.data
            assert same_bits(one.step(one.row), result)
            assert one.node.inside._last.ctypes.data == before == one.row.ctypes.data
        else:
            assert same_bits(one.step(x), result)


@pytest.mark.parametrize("options", [{"placement": "gradient"}, pytest.param({}, marks=pytest.mark.exhaustive),
                                     {"placement": "gradient", "overlap": True, "bucket_nbytes": 100}],
                         ids=["gradient", "update", "overlap"])
def test_training_has_the_bits_of_virtual_ranks(comm, options):
    """With one bucket the vector of gradients is where the node reads it; with overlap one rank does not use a layer."""

    def program(comm):
        net = net_of()
        inner = torch.optim.SGD(net.parameters(), lr=0.02)
        optimizer = DistributedOptimizer(inner, comm, TopK(0.3), plan=partial(NodeMean, node=2), **options)
        optimizer.check_replicas_every = 1
        for step in range(5):
            optimizer.zero_grad()
            net.second.weight.requires_grad_(requires_grad=comm.Get_rank() != step % 3)
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
        row = optimizer.feedback.row
        assert (optimizer.flat.gradients is row) == (row is not None and options == {"placement": "gradient"})
        return [p.detach().numpy().copy() for p in net.parameters()]

    mine = program(comm)
    assert same_bits(mine, comm.scatter(virtual.results(comm.size, program) if comm.rank == 0 else None))


@each_node
def test_what_one_rank_cannot_do_no_rank_does(comm, node):
    d = 20_000
    one, twin = (ErrorFeedback("ef14", NodeMean(comm, TOP, d, inner=TwoPhaseMean, node=node)) for _ in range(2))
    for bad in range(comm.size):
        x = gaussian(comm.rank, d, step=bad)
        x[-1] = np.nan if comm.rank == bad else 1.0
        with pytest.raises(NonFiniteError) as told:
            one.step(x)
        assert told.value.ranks == (bad,)
        with pytest.raises(Exception, match=f"rank {bad} raised|shape") as told:
            one.step(x[:5] if comm.rank == bad else gaussian(comm.rank, d))
        assert isinstance(told.value, ShapeError) == (comm.rank == bad)
        x = gaussian(comm.rank, d, step=bad + 9)
        assert same_bits(one.step(x), twin.step(x))


def test_nothing_of_the_size_of_a_slice_is_allocated_after_the_first_steps(comm):
    d = 400_000
    feedback = ErrorFeedback("ef14", NodeMean(comm, TopK(0.001), d, node=2))
    vectors = [gaussian(comm.rank, d, step=t) for t in range(4)]
    for x in vectors:
        feedback.step(x)
    tracemalloc.start()
    try:
        for x in vectors * 3:
            feedback.step(x)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for x in vectors * 3:
            feedback.step(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 30_000  # a slice has 800 kB


def test_memory_goes_back_with_the_plan(comm):
    """Nothing collective gives it back, and no file is left."""

    def mapped():
        return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:mpi_ef")

    gc.collect()  # what earlier tests have left in circles
    before = mapped()
    plan = NodeMean(comm, TOP, 100_000, node=2)
    assert mapped() == before + plan.inside.shares
    del plan
    assert mapped() == before


def test_what_is_not_the_nodes_memory_is_not_taken(comm, monkeypatch):
    """A path that leads to the memory of another process, as in another container."""
    monkeypatch.setattr("mpi_ef.collectives.shared.os.pread", lambda *_: b"something else")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert not NodeMean(comm, TOP, 1000, node=2).inside.shares


def test_communicators_of_nodes_are_freed_with_the_one_they_are_kept_with(comm):
    """There are 2000 or so in all: those of nodes and rails, and of dense means between hosts."""
    d = 100
    for turn in range(3):
        one = comm.Dup()
        plan = NodeMean(one, TOP, d, node=2 + turn % 2)
        parts = [plan.placement.node, plan.placement.rail]
        pairs = pairwise.apart(one)
        assert all(parts)
        one.Free()
        assert not any([*parts, pairs])
    with pytest.raises(OptionError, match="NodeMean: its communicator was freed"):
        plan.exchange(gaussian(0, d))
