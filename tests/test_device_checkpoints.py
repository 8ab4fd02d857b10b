"""Checkpoints of vectors on a device: the bytes of the host's, on other sides and numbers of ranks."""

import warnings

import pytest
import torch
from device_side import adamw, backward, on_side, others, sgd
from torch import nn

from mpi_ef import DistributedOptimizer, OneBitAdam, Sign, Store, TopK, Training
from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.testing import results

BUILD = {
    "EF21": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.1), placement="gradient", rule="ef21"),
    "EControl": lambda net, comm: DistributedOptimizer(sgd(net), comm, Sign(), placement="gradient", plan=TwoPhaseMean,
                                                       rule="econtrol", eta=0.3),
    "AdamW, update": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.1)),
    "1-bit Adam": lambda net, comm: OneBitAdam(net.parameters(), comm, lr=0.01, freeze_step=2),
}


def trained(folder, name, ranks, side, steps, policy=""):
    """Train on virtual ranks, after resuming where there is a policy; return the parameters of all, and a checkpoint's."""
    def program(comm):
        torch.manual_seed(0)
        net, shadow = (nn.Sequential(nn.Linear(20, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 5)) for _ in range(2))
        net = moved(net)
        optimizer = BUILD[name](net, comm)
        training, files = Training(model=net, optimizer=optimizer, random=False), Store(folder)
        if policy:
            assert training.resume(files, comm, policy=policy) == steps[0]
        for number in steps:
            x = torch.randn(6, 20, generator=torch.Generator().manual_seed(100 * comm.Get_rank() + number))
            optimizer.zero_grad()
            backward(net, shadow, lambda net: net(x).square().mean())  # noqa: B023
            optimizer.step()
        if not policy:
            training.save(files, comm, len(steps))
        files.close()
        return torch.cat([p.detach().cpu().view(-1) for p in net.parameters()])

    with on_side(side) as moved, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return results(ranks, program)


@pytest.mark.parametrize("name", ["EF21", "AdamW, update", *others("EControl", "1-bit Adam")])
@pytest.mark.parametrize("goes_on", ["redistribute 1", *others("redistribute 3", "reset 1")])
def test_another_number_of_ranks_goes_on_on_either_side(tmp_path, name, goes_on):
    ends, (policy, ranks) = [], goes_on.split()
    for first in ("host", "device"):
        trained(tmp_path / first, name, 2, first, range(3))
        ends += [trained(tmp_path / first, name, int(ranks), second, range(3, 6), policy) for second in ("host", "device")]
    for end in ends:
        for parameters in end:
            assert torch.equal(parameters, ends[0][0])
