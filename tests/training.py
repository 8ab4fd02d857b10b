"""Training on virtual ranks, and the same by torch alone on the mean gradient of all ranks."""

import numpy as np
import torch
import virtual  # noqa: F401  # for its patience

from mpi_ef.testing.law import same_bits
from mpi_ef.testing.regression import everything, groups_of, have_met, net_of, parameters_of, steps_of, trained
from mpi_ef.testing.regression import loss_of as loss_in
from mpi_ef.testing.regression import resumes as assert_resumes
from mpi_ef.testing.regression import skips_broken_gradients as assert_skips_broken_gradients

__all__ = ["alone", "assert_close", "assert_replicas", "assert_resumes", "assert_skips_broken_gradients", "dying_network",
           "everything", "groups_of", "have_met", "loss_in", "net_of", "net_with_more", "parameters_of", "seeded",
           "steps_of", "train", "trained"]


def seeded(net):
    """Draw the parameters without torch's global generator, which virtual ranks, being threads, share."""
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.copy_(torch.from_numpy(np.random.default_rng(number).normal(size=p.shape) / 3))
    return net


def dying_network():
    """Half of the hidden units are dead: their inputs are below zero for all data, so their gradients are exactly zero."""
    net = seeded(torch.nn.Sequential(torch.nn.Linear(7, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)))
    with torch.no_grad():
        net[0].bias[:16] = -100.0
    return net


def alone(n, steps, build, *, dtype=torch.float32, each=None):
    """Return the parameters after every step of a torch optimizer that sees the mean gradient of n ranks."""
    net = net_of(dtype)
    optimizer, path = build(net), []
    for step in range(steps):
        if each is not None:
            each(optimizer, step)
        net.zero_grad()
        for rank in range(n):
            (loss_in(net, rank, step) / n).backward()
        optimizer.step()
        path.append(parameters_of(net))
    return path


def assert_close(path, expected, **tolerance):
    for step, (mine, theirs) in enumerate(zip(path, expected, strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, err_msg=f"after step {step}", **tolerance)


def assert_replicas(runs):
    for run in runs[1:]:
        assert run.met == runs[0].met
        assert same_bits(run.shared, runs[0].shared)
        for step, met in enumerate(run.met):
            assert same_bits(run.path[step], runs[0].path[step]) == met, f"after step {step}"


# ---- what comes late: a layer and words of which there is no gradient at first

# Words that occur from the first step on, on all ranks or on the last one; from a later step on; never.
USED, ALONE, LATE, NEVER = [0, 1, 2, 3], [4], [5, 6], [7, 8, 9]


def net_with_more(dtype=torch.float32):
    """The network of the other tests, and a layer and an embedding whose gradients do not depend on the rest."""
    net = net_of()
    net.late, net.words = torch.nn.Linear(4, 2, bias=False), torch.nn.Embedding(10, 3)
    seeded(net.late)
    seeded(net.words)
    return net.to(dtype)


def of_late(net, rank, step):
    """The loss of the layer that comes late."""
    dtype, rng = net.late.weight.dtype, np.random.default_rng((rank, step, 7))
    x = torch.from_numpy(rng.normal(size=(16, 4))).to(dtype)
    y = x @ torch.linspace(-1, 1, 8, dtype=dtype).reshape(4, 2) + 0.2 * rank
    return torch.nn.functional.mse_loss(net.late(x), y)


def of_words(net, comm, step, *, late):
    """The loss of the words that occur in this step on this rank; of the late ones on one rank at a time."""
    rank, n = comm.Get_rank(), comm.Get_size()
    words = [USED[(step + rank) % 4], USED[(step + 2 * rank + 1) % 4]]
    words += (ALONE if rank == n - 1 else []) + (LATE if late and rank == step % n else [])
    return (net.words(torch.tensor(words)) - 2.0 - 0.1 * rank).square().sum() / 8


def train(net, optimizer, steps, *, layer=None, words=None):
    """Take steps; the layer has a gradient from step `layer` on, the late words from step `words` on."""
    path, comm = [], optimizer.comm
    for step in steps:
        optimizer.zero_grad()
        loss = loss_in(net, comm.Get_rank(), step) + of_words(net, comm, step, late=words is not None and step >= words)
        if layer is not None and step >= layer:
            loss = loss + of_late(net, comm.Get_rank(), step)
        loss.backward()
        optimizer.step()
        path.append(parameters_of(net))
    return path
