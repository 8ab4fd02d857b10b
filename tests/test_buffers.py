"""Buffers of all ranks become one: BatchNorm's are the statistics of all samples together."""

from collections import Counter

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from vectors_for_tests import gaussian

import mpi_ef.buffers
from mpi_ef import synchronize_buffers
from mpi_ef.errors import DisagreementError, DtypeError, OptionError, PeerError

RANKS = [1, 2, 3, 4]
BATCH = 64


def samples(rank, step=0, dtype=torch.float32):
    """(64, 3) numbers whose mean and spread differ from rank to rank."""
    return torch.from_numpy(gaussian(rank, BATCH * 3, step=step).reshape(BATCH, 3)).to(dtype) * (1 + rank) + 10 * rank


class Holder(nn.Module):
    """A module that has nothing but buffers."""

    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


def bits(model):
    copies = {name: b.detach().resolve_conj().contiguous().clone() for name, b in model.named_buffers()}
    return {name: b.view(-1).numpy(force=True).tobytes() if b.dtype != torch.bfloat16 else b.tolist()
            for name, b in copies.items()}


def synchronized(n, build, **options):
    """Build a model on each of n ranks, synchronise, and return them; their buffers are equal bit for bit."""

    def program(comm):
        model = build(comm.Get_rank())
        pointers = [b.data_ptr() for b in model.buffers()]
        synchronize_buffers(model, comm, **options)
        assert pointers == [b.data_ptr() for b in model.buffers()]
        return model

    models = virtual.results(n, program)
    assert all(bits(model) == bits(models[0]) for model in models)
    return models


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batchnorm_has_the_statistics_of_all_samples(n, dtype):
    """One batch with momentum 1, so that the running statistics are those of the batch."""

    def build(rank):
        norm = nn.BatchNorm1d(3, momentum=1.0, dtype=dtype)
        norm(samples(rank, dtype=dtype))
        return nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"norm": norm}))

    norm = synchronized(n, build)[0][1]["norm"]
    pooled = torch.cat([samples(rank, dtype=dtype) for rank in range(n)]).double()
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-13, "atol": 1e-6 if dtype == torch.float32 else 1e-13}
    torch.testing.assert_close(norm.running_mean.double(), pooled.mean(0), **tolerance)
    within = sum(samples(rank, dtype=dtype).double().var(0) for rank in range(n)) / n
    exact = pooled.var(0, correction=0) + within / BATCH  # torch divides each rank's by 63, not by 64
    torch.testing.assert_close(norm.running_var.double(), exact, **tolerance)
    torch.testing.assert_close(norm.running_var.double(), pooled.var(0), rtol=1 / BATCH, atol=0.0)
    if n > 1:  # the mean of the variances would be far off
        assert (within < 0.5 * norm.running_var).any()


@pytest.mark.parametrize("n", RANKS)
def test_running_means_are_those_of_batchnorm_that_sees_all_samples(n):
    """Several batches: the mean is exactly that of one BatchNorm over the batches of all ranks."""

    def build(rank):
        norm = nn.BatchNorm1d(3)
        for step in range(5):
            norm(samples(rank, step))
        return norm

    norm = synchronized(n, build)[0]
    alone = nn.BatchNorm1d(3)
    for step in range(5):
        alone(torch.cat([samples(rank, step) for rank in range(n)]))
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    assert norm.num_batches_tracked == 5


@pytest.mark.parametrize("batches", [1, 30])
def test_calls_in_a_row_need_batches_between_them(batches):
    """What the docstring says: the spread of the means counts in full after 30 batches, one tenth after single ones."""
    batch = torch.tensor([[-1.0], [1.0]]) * np.sqrt(0.5)  # its variance is 1

    def program(comm):
        norm = nn.BatchNorm1d(1)
        for _ in range(300 // batches):
            for _ in range(batches):
                norm(batch + 20 * comm.Get_rank())  # 100 between the means
            synchronize_buffers(norm, comm)
        return norm.running_var.item()

    variance, again = virtual.results(2, program)
    assert variance == again == pytest.approx(101 if batches == 30 else 11, rel=0.06)


@pytest.mark.parametrize("build", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_every_batchnorm_is_known_others_are_averaged(build):
    def fill(rank):
        model = nn.Sequential(build(2), nn.InstanceNorm2d(2, track_running_stats=True), nn.BatchNorm2d(2))
        model[2].register_buffer("running_mean", None)
        for norm in model[:2]:
            norm.running_mean.fill_(2.0 * rank)
            norm.running_var.fill_(1.0 + rank)
        model[2].running_var.fill_(1.0 + rank)  # without a mean nothing is known about it
        return model

    first, instance, without = synchronized(2, fill)[0]
    assert first.running_mean.tolist() == [1.0, 1.0]
    assert first.running_var.tolist() == [2.5, 2.5]  # 1.5, and 1 between the means
    assert instance.running_var.tolist() == without.running_var.tolist() == [1.5, 1.5]


def test_variances_of_large_means_are_not_lost():
    """Means of 10^4 and variances of 10^-4: a mean of squares less the square of the mean would have no digit left."""

    def fill(rank):
        norm = nn.BatchNorm1d(1)
        norm.running_mean.fill_(1e4 + rank / 512)
        norm.running_var.fill_(1e-4)
        return norm

    norm = synchronized(2, fill)[0]
    np.testing.assert_allclose(norm.running_var.item(), 1e-4 + (1 / 1024) ** 2, rtol=1e-6)


@pytest.mark.parametrize("n", RANKS)
@given(data=st.data())
def test_means_are_those_of_float64_in_rank_order(n, data):
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    rows = data.draw(hnp.arrays(dtype, (n, *shape), elements=st.floats(-1e4, 1e4, width=16)))
    model = synchronized(n, lambda rank: Holder(running_a=torch.tensor(rows[rank]), b=torch.tensor(7)))[0]
    total = np.zeros(shape)
    for row in rows:
        total += row
    expected = np.where((rows == rows[0]).all(axis=0), rows[0], (total / n).astype(dtype))
    assert model.running_a.numpy().tobytes() == np.asarray(expected, dtype).tobytes()


@pytest.mark.parametrize("n", RANKS)
def test_equal_buffers_are_not_touched(n):
    """Neither their bits, nor their version, nor those that overlap themselves and could not be written."""
    values = [0.1, -0.0, 5e-324, np.inf, -np.inf]

    def program(comm):
        model = Holder(
            running_a=torch.tensor(values, dtype=torch.float64),
            running_b=torch.tensor(values[:2]).expand(4, 2),
            running_c=torch.tensor([1.0, np.inf], dtype=torch.bfloat16),
            table=torch.tensor(values[:2]).expand(4, 2),
            running_empty=torch.empty(0),
        )
        before, versions = bits(model), [b._version for b in model.buffers()]
        for _ in range(2):
            synchronize_buffers(model, comm)
        assert bits(model) == before
        assert [b._version for b in model.buffers()] == versions

    virtual.results(n, program)


def test_what_is_not_finite_stays_so():
    def build(rank):
        values = [np.nan if rank == 1 else 1.0, np.inf * (1 - 2 * rank), np.inf if rank else 0.0]
        return Holder(running_a=torch.tensor(values))

    assert str(synchronized(2, build)[0].running_a.tolist()) == "[nan, nan, inf]"


@pytest.mark.parametrize("policy", ["mean", "root"])
@pytest.mark.parametrize("n", RANKS)
def test_whatever_is_no_number_to_average_is_that_of_rank_0(n, policy):
    def build(rank):
        model = Holder(
            byte=torch.tensor([rank, 200], dtype=torch.uint8),
            whole=torch.tensor(2**60 + 1 + rank),
            flag=torch.tensor([rank == 0, rank == 1]),
            wave=torch.tensor([1 + 2j * rank]).conj(),
            features=torch.from_numpy(gaussian(rank, 12)),
            running_small=torch.full((2, 3), float(rank), dtype=torch.bfloat16).T,
        )
        model.part = nn.Module()
        model.part.register_buffer("shared", model.whole)
        model.register_buffer("scratch", torch.zeros(rank + 1), persistent=False)
        return model

    def program(comm):
        model = build(comm.Get_rank())
        synchronize_buffers(model, comm, policy=policy)
        assert model.scratch.shape == (comm.Get_rank() + 1,)
        assert model.part.shared is model.whole
        return {name: value for name, value in bits(model).items() if name != "scratch"}, model.running_small

    for theirs, small in virtual.results(n, program):
        mean = torch.full((3, 2), (n - 1) / 2 if policy == "mean" else 0.0, dtype=torch.bfloat16)
        assert torch.equal(small, mean)
        root = bits(build(0))
        assert all(theirs[name] == root[name] for name in theirs if name != "running_small")


class Counting:
    """A communicator that counts what is called."""

    def __init__(self, comm):
        self._comm, self.calls = comm, Counter()

    def __getattr__(self, name):
        if name == "allgather" or (name[0].isupper() and not name.startswith("Get_")):
            self.calls[name] += 1
        return getattr(self._comm, name)


def test_the_number_of_messages_does_not_grow_with_that_of_buffers():
    def program(comm):
        seen = []
        for layers in (1, 30):
            counting = Counting(comm)
            synchronize_buffers(nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(layers))), counting)
            seen.append(counting.calls)
        for model in (nn.Linear(2, 2), nn.InstanceNorm1d(3, affine=True)):
            counting = Counting(comm)
            synchronize_buffers(model, counting)
            seen.append(counting.calls)
        assert seen == [{"allgather": 1, "Bcast": 1, "Allgather": 2}] * 2 + [{"allgather": 1}] * 2

    virtual.results(2, program)


def test_long_buffers_go_in_pieces(monkeypatch):
    def build(rank):
        return Holder(
            running_a=torch.from_numpy(gaussian(rank, 1000)), b=torch.arange(500) + rank, running_c=torch.zeros(0)
        )

    expected = bits(synchronized(3, build)[0])
    monkeypatch.setattr(mpi_ef.buffers, "_GATHERED", 100)
    monkeypatch.setattr(mpi_ef.vectors.flat, "_BROADCAST_NBYTES", 99)
    assert bits(synchronized(3, build)[0]) == expected


def test_frozen_statistics_and_models_without_buffers():
    """What tracks no statistics has none; a model in evaluation mode, or without gradients, is no different."""

    def build(rank):
        model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3), nn.Linear(3, 1))
        model[1].running_mean.fill_(rank)
        return model.eval().requires_grad_(False)

    assert synchronized(3, build)[0][1].running_mean.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda rank: nn.BatchNorm1d(3 + (rank == 1)), r"on buffer 0: running_mean \(3,\) torch.float32 on ranks 0,2"),
        (lambda rank: nn.BatchNorm1d(3, dtype=torch.float64 if rank else None), "running_mean .*float64 on ranks 1,2"),
        (lambda rank: Holder(**{"ab"[rank % 2]: torch.zeros(1)}), r"b \(1,\) torch.float32 on rank 1"),
        (lambda rank: nn.BatchNorm1d(3, track_running_stats=rank > 0), "on the number of buffers: 0 on rank 0; 3 on"),
    ],
)
def test_models_that_differ_are_told_on_all_ranks(build, words):
    def program(comm):
        model = build(comm.Get_rank())
        before = bits(model)
        with pytest.raises(DisagreementError, match=words):
            synchronize_buffers(model, comm)
        assert bits(model) == before

    virtual.results(3, program)


@pytest.mark.parametrize(
    ("build", "options", "error", "words"),
    [
        (
            lambda: nn.BatchNorm1d(3),
            {"policy": "median"},
            OptionError,
            """policy='median' is unknown; pass "mean" or""",
        ),
        (nn.LazyBatchNorm1d, {}, OptionError, "running_mean has no values yet; run a batch through the model first"),
        (lambda: nn.BatchNorm1d(3, device="meta"), {}, OptionError, "running_mean has no values yet"),
        (lambda: Holder(a=torch.eye(2).to_sparse()), {}, DtypeError, "a has layout torch.sparse_coo"),
    ],
)
def test_what_cannot_be_synchronised_on_one_rank_is_told_on_all(build, options, error, words):
    def program(comm):
        if comm.Get_rank() == 1:
            synchronize_buffers(build(), comm, **options)
        synchronize_buffers(nn.BatchNorm1d(3), comm)

    first, second = virtual.run(2, program)
    assert type(first) is PeerError
    assert str(second) in str(first)
    with pytest.raises(error, match=words):
        raise second
