"""Whole trainings on the device side end with the parameters of those on the host, to the last bit."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mpi_ef import (
    EF21,
    DistributedOptimizer,
    EF21Muon,
    Lion,
    LowRank,
    OneBitAdam,
    OneBitLamb,
    Quantize,
    Sign,
    Signum,
    TopK,
    ZeroOneAdam,
)
from mpi_ef.kernels.backend import on_device_side, side_of
from mpi_ef.testing import results

STEPS = 5


def model(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 17), nn.LayerNorm(17), nn.ReLU(), nn.Linear(17, 17), nn.Tanh(), nn.Linear(17, 3))
    return net.to(dtype)


def train(comm, build, dtype, steps=range(STEPS), saved=None):
    """Train a small model on data of this rank; return its parameters, and the state of the optimizer."""
    net = model(dtype)
    optimizer = build(net, comm)
    assert optimizer.flat.device == side_of("cpu")
    if saved is not None:
        net.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for step in steps:
        torch.manual_seed(100 * comm.Get_rank() + step)
        x, y = torch.randn(8, 12, dtype=dtype), torch.randint(3, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x).float(), y).backward()
        optimizer.step()
    optimizer.synchronize()
    copies = {name: p.detach().clone() for name, p in net.state_dict().items()}
    return copies, optimizer.state_dict(), optimizer.sent_nbytes


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, **options)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01)


OPTIMIZERS = {
    "AdamW, update": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.05)),
    "AdamW, update, bf16 values": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.05, values=Quantize())),
    "SGD, EF21": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.05), placement="gradient", rule="ef21",
                                                        dense_steps=1),
    "SGD, EControl, two phases": lambda net, comm: DistributedOptimizer(
        sgd(net), comm, Sign(block=64), placement="gradient", rule="econtrol", eta=0.3),
    "SGD, overlap": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.1), placement="gradient", rule="ef14",
                                                           bucket_nbytes=1000, overlap=True),
    "1-bit Adam": lambda net, comm: OneBitAdam(net.parameters(), comm, lr=0.01, freeze_step=2, weight_decay=0.1),
    "1-bit Adam, clipped": lambda net, comm: OneBitAdam(net.parameters(), comm, lr=0.01, freeze_step=2, clip=0.1),
    "1-bit LAMB": lambda net, comm: OneBitLamb(net.parameters(), comm, lr=0.01, freeze_step=2, weight_decay=0.1),
    "0/1 Adam": lambda net, comm: ZeroOneAdam(net.parameters(), comm, lr=0.01, var_freeze_step=3, var_update_scaler=1,
                                              local_step_scaler=1, local_step_clipper=2),
    "Lion": lambda net, comm: Lion(net.parameters(), comm, lr=0.01, weight_decay=0.1),
    "Signum": lambda net, comm: Signum(net.parameters(), comm, lr=0.01),
    "Muon": lambda net, comm: EF21Muon(net.parameters(), comm, TopK(0.1)),
    "EF21": lambda net, comm: EF21(net.parameters(), comm, TopK(0.1), lr=0.1),
    "segments": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.1, segments="parameters")),
}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_ends_with_the_same_bits(name, dtype):
    def program(comm):
        return train(comm, OPTIMIZERS[name], dtype)

    ours = results(2, program)
    with on_device_side():
        theirs = results(2, program)
    for (parameters, _, sent), (its, _, its_sent) in zip(ours, theirs, strict=True):
        assert sent == its_sent
        assert same(parameters, its)
        assert same(parameters, ours[0][0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_on_the_other_side(name):
    def go(first, second):
        def program(comm):
            with first():
                *saved, _ = train(comm, OPTIMIZERS[name], torch.float32, range(3))
            return saved

        saved = results(2, program)

        def further(comm):
            return train(comm, OPTIMIZERS[name], torch.float32, range(3, STEPS), saved[comm.Get_rank()])[0]

        with second():
            return results(2, further)

    ends = [go(first, second) for first in (nullcontext, on_device_side) for second in (nullcontext, on_device_side)]
    for end in ends[1:]:
        for mine, its in zip(ends[0], end, strict=True):
            assert same(mine, its)


@pytest.mark.parametrize("side", [nullcontext, on_device_side])
def test_what_observers_get_of_arrays_that_stay_on_the_host(side):
    """The factor of a low-rank plan is one; others are where the parameters are."""

    def program(comm):
        net, seen = model(torch.float32), []
        optimizer = DistributedOptimizer(sgd(net), comm, LowRank(2, shapes="parameters"), placement="gradient")
        optimizer.observer = seen.append
        net(torch.ones(2, 12)).sum().backward()
        optimizer.step()
        (report,) = seen[0]
        return report.norms

    with side():
        norms = results(2, program)[0]
    assert norms["e_i"] > 0
    assert norms["plan.Q"] == pytest.approx(6**0.5)  # two orthonormal columns for each of three matrices
