"""MKOR on the device side: what layers see, learn and make of gradients is that of the host."""

import pytest
import torch
from device_side import DEVICE, HARDWARE, TORCH_DEVICE, adamw, device_side, moved
from torch import nn

from mpi_ef import MKOR, Quantize, TopK
from mpi_ef.precondition.forms import FORMS
from mpi_ef.testing import results


def train(comm, side, form, steps=range(6), saved=None, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4),
                        nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3, bias=False))
    there = torch.device("cpu") if side == "cpu" else TORCH_DEVICE
    net = moved(net) if side == DEVICE else net
    optimizer = MKOR(adamw(net), comm, TopK(0.1), model=net, form=form, every=2, **options)
    assert optimizer.flat.device == optimizer.preconditioner.plan.device == side
    if saved is not None:
        net.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for step in steps:
        torch.manual_seed(100 * comm.Get_rank() + step)
        x, y = torch.randn(8, 12).to(there), torch.randint(3, (8,)).to(there)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return {name: p.detach().cpu().clone() for name, p in net.state_dict().items()}, optimizer.state_dict()


def on_ranks(side, program):
    if side == "cpu":
        return results(2, program)
    with device_side():
        return results(2, program)


def same(one, other):
    return all(torch.allclose(one[name], other[name], atol=0.01) if HARDWARE else torch.equal(one[name], other[name])
               for name in one)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"statistics": Quantize("bf16"), "placement": "gradient", "sides": "inputs"}],
                         ids=str)
def test_a_training_ends_as_on_the_host(form, options):
    ours, theirs = (on_ranks(side, lambda comm: train(comm, side, form, **options)) for side in ("cpu", DEVICE))  # noqa: B023
    for (mine, state), (its, of_device) in zip(ours, theirs, strict=True):
        assert same(mine, its)
        arrays = (each["preconditioner"]["arrays"] for each in (state, of_device))
        assert same(*arrays)
        assert all(torch.equal(its[name], theirs[0][0][name]) for name in its)


@pytest.mark.parametrize("form", ["window", "exact", "kfac"])
def test_a_state_goes_on_on_the_other_side(form):
    ends = []
    for first in ("cpu", DEVICE):
        saved = on_ranks(first, lambda comm: train(comm, first, form, range(3)))  # noqa: B023
        for second in ("cpu", DEVICE):
            ends.append(on_ranks(second, lambda comm: train(comm, second, form, range(3, 6), saved[comm.Get_rank()])))  # noqa: B023
    for end in ends[1:]:
        assert same(ends[0][0][0], end[0][0])
