"""Whole trainings on the device side end with the parameters of those on the host, to the last bit."""

import pytest
import torch
from device_side import BLOCK, DEVICE, HARDWARE, INTERPRETED, adamw, backward, device_side, moved, sgd, sized
from torch import nn

from mpi_ef import (
    EF21,
    DistributedOptimizer,
    EF21Muon,
    Lion,
    LocalSteps,
    LowRank,
    OneBitAdam,
    OneBitLamb,
    Quantize,
    Sign,
    Signum,
    TopK,
    TwoBits,
    ZeroOneAdam,
)
from mpi_ef.testing import results

STEPS = 5
WIDTH = sized(17, 61)  # interpreted are kernels that short vectors do not need


def model(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Tanh(),
                        nn.Linear(WIDTH, 3))
    return net.to(dtype)


def train(comm, build, dtype, side, steps=range(STEPS), saved=None):
    """Train a small model on data of this rank; return its parameters, the state of the optimizer, and what was sent."""
    net, shadow = model(dtype), model(dtype)
    if side == DEVICE:
        net = moved(net)
    optimizer = build(net, comm)
    assert optimizer.flat.device == side
    if saved is not None:
        net.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for step in steps:
        torch.manual_seed(100 * comm.Get_rank() + step)
        x, y = torch.randn(8, 12, dtype=dtype), torch.randint(3, (8,))
        optimizer.zero_grad()
        backward(net, shadow, lambda net: nn.functional.cross_entropy(net(x).float(), y))  # noqa: B023
        optimizer.step()
    optimizer.synchronize()
    copies = {name: p.detach().cpu().clone() for name, p in net.state_dict().items()}
    return copies, optimizer.state_dict(), optimizer.sent_nbytes


def on_ranks(n, side, program):
    """Return the results of a program on virtual ranks whose parameters are there."""
    if side == "cpu":
        return results(n, program)
    with device_side():
        return results(n, program)


OPTIMIZERS = {
    "AdamW, update": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.05)),
    "AdamW, update, bf16 values": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.05, values=Quantize())),
    "SGD, EF21": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.05), placement="gradient", rule="ef21",
                                                        dense_steps=1),
    "SGD, EControl, two phases": lambda net, comm: DistributedOptimizer(
        sgd(net), comm, Sign(block=BLOCK), placement="gradient", rule="econtrol", eta=0.3),
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
    "local steps": lambda net, comm: LocalSteps(adamw(net), comm, TopK(0.1, values=TwoBits()), every=2),
    "local steps, momentum": lambda net, comm: LocalSteps(adamw(net), comm, Sign(block=BLOCK), every=2, decay=1.0,
                                                          outer_lr=0.7, outer_momentum=0.9),
    "local steps, late": lambda net, comm: LocalSteps(adamw(net), comm, TopK(0.1), every=2, late=True, fragments=2),
    "segments": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.1, segments="parameters")),
}


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
INEXACT = {"Muon"} if HARDWARE else set()  # products of matrices are rounded as the library of the processor does it


def same(one, other, exact=True):
    return all(torch.equal(one[name], other[name]) if exact else torch.allclose(one[name], other[name], atol=0.01)
               for name in one)


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.exhaustive] * (INTERPRETED and (n + m) % 3 > 0))
    for n, name in enumerate(OPTIMIZERS) for m, dtype in enumerate(DTYPES)])
def test_a_training_ends_with_the_same_bits(name, dtype):
    ours, theirs = (on_ranks(2, side, lambda comm: train(comm, OPTIMIZERS[name], dtype, side))  # noqa: B023
                    for side in ("cpu", DEVICE))
    for (parameters, _, sent), (its, _, its_sent) in zip(ours, theirs, strict=True):
        assert sent == its_sent
        assert same(parameters, its, name not in INEXACT)
        assert same(parameters, ours[0][0])
        assert same(its, theirs[0][0])


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.exhaustive] * (INTERPRETED and n % 4 > 0)) for n, name in enumerate(OPTIMIZERS)])
def test_a_state_goes_on_on_the_other_side(name):
    def go(first, second):
        saved = on_ranks(2, first, lambda comm: train(comm, OPTIMIZERS[name], torch.float32, first, range(3)))

        def further(comm):
            return train(comm, OPTIMIZERS[name], torch.float32, second, range(3, STEPS), saved[comm.Get_rank()][:2])[0]

        return on_ranks(2, second, further)

    ends = [go(first, second) for first in ("cpu", DEVICE) for second in ("cpu", DEVICE)]
    for end in ends[1:]:
        for mine, its in zip(ends[0], end, strict=True):
            assert same(mine, its, name not in INEXACT)


@pytest.mark.parametrize("side", ["cpu", DEVICE])
def test_what_observers_get_of_arrays_that_stay_on_the_host(side):
    """The factor of a low-rank plan is one; others are where the parameters are."""

    def program(comm):
        torch_device = torch.device("cpu" if side.startswith("side") else side)
        net, seen = model(torch.float32).to(torch_device), []
        optimizer = DistributedOptimizer(sgd(net), comm, LowRank(2, shapes="parameters"), placement="gradient")
        optimizer.observer = seen.append
        net(torch.ones(2, 12, device=torch_device)).sum().backward()
        optimizer.step()
        (report,) = seen[0]
        return report.norms

    norms = on_ranks(2, side, program)[0]
    assert norms["e_i"] > 0
    assert norms["plan.Q"] == pytest.approx(6**0.5)  # two orthonormal columns for each of three matrices
