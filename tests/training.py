"""Training on virtual ranks, and the same by torch alone on the mean gradient of all ranks."""

import copy
import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import virtual
from programs import loss_of, model, same_bits

from mpi_ef.optim.flat import FlatOptimizer


def net_of(dtype=torch.float32):
    return model().to(dtype)


def seeded(net):
    """Draw the parameters without torch's global generator, which virtual ranks, being threads, share."""
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.copy_(torch.from_numpy(np.random.default_rng(number).normal(size=p.shape) / 3))
    return net


def groups_of(net):
    named = list(net.parameters())
    return [{"params": named[:3], "lr": 2e-2}, {"params": named[3:], "weight_decay": 0.3}]


def dying_network():
    """Half of the hidden units are dead: their inputs are below zero for all data, so their gradients are exactly zero."""
    net = seeded(torch.nn.Sequential(torch.nn.Linear(7, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)))
    with torch.no_grad():
        net[0].bias[:16] = -100.0
    return net


def loss_in(net, rank, step):
    """The programs' regression, in the dtype of the model."""
    dtype = next(net.parameters()).dtype
    if dtype == torch.float32:
        return loss_of(net, rank, step)
    x = torch.from_numpy(np.random.default_rng((rank, step)).normal(size=(32, 7))).to(dtype)
    y = x @ torch.from_numpy(np.random.default_rng(100).normal(size=(7, 3))).to(dtype) + 0.3 * rank
    return torch.nn.functional.mse_loss(net(x).to(dtype), y)


def parameters_of(net):
    return [p.detach().clone().float().numpy() if p.dtype == torch.bfloat16 else p.detach().numpy().copy()
            for p in net.parameters()]  # fmt: skip


@dataclass
class Run:
    """What a rank has seen: parameters, whether replicas had met, and what is equal on all ranks, after every step."""

    path: list
    met: list
    shared: list
    losses: list
    optimizer: FlatOptimizer


def trained(n, steps, build, *, dtype=torch.float32, each=None, sees=None):
    """Train on n ranks, which start with other parameters: those of rank 0 must win. Return a run for every rank."""

    def program(comm):
        rank, net = comm.Get_rank(), net_of(dtype)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(rank)
        run = Run([], [], [], [], build(net, comm))
        run.optimizer.check_replicas_every = 5
        assert same_bits(parameters_of(net), parameters_of(net_of(dtype)))
        for step in range(steps):
            if each is not None:
                each(run.optimizer, step)
            run.optimizer.zero_grad()
            loss = loss_in(net, rank, step)
            loss.backward()
            run.optimizer.step()
            run.losses.append(loss.item())
            run.path.append(parameters_of(net))
            run.met.append(have_met(run.optimizer))
            run.shared.append(copy.deepcopy(run.optimizer.replicated()))
            if sees is not None:
                sees(run.optimizer, step)
        return run

    return virtual.results(n, program)


def have_met(optimizer):
    """Whether replicas are to be the same now."""
    return getattr(optimizer, "synchronized", True)


def everything(net, optimizer, *but):
    """Parameters and all state, in arrays that can be compared; without what is named so in the state."""

    def arrays(value):
        if isinstance(value, torch.Tensor):
            return value.detach().numpy().copy()
        if isinstance(value, dict):
            return {name: arrays(part) for name, part in value.items() if name not in but}
        return [arrays(part) for part in value] if isinstance(value, list | tuple) else value

    named = copy.deepcopy(optimizer.per_rank() | optimizer.replicated())
    return parameters_of(net), named, arrays(optimizer.state_dict())


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


def steps_of(net, optimizer, rank, steps):
    """Take steps, and return the parameters after each."""
    path = []
    for step in steps:
        optimizer.zero_grad()
        loss_in(net, rank, step).backward()
        optimizer.step()
        path.append(parameters_of(net))
    return path


def assert_resumes(n, build, *, before, after=4, dtype=torch.float32):
    """Law 7: through torch.save and torch.load with their defaults, into new objects."""

    def program(comm):
        rank, net = comm.Get_rank(), net_of(dtype)
        optimizer = build(net, comm)
        steps_of(net, optimizer, rank, range(before))
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = net_of(dtype)
        resumed = build(other, comm)
        other.load_state_dict(saved["net"])
        resumed.load_state_dict(saved["optimizer"])
        assert resumed.sent_nbytes <= optimizer.sent_nbytes
        steps = range(before, before + after)
        assert same_bits(steps_of(net, optimizer, rank, steps), steps_of(other, resumed, rank, steps))
        assert same_bits(everything(net, optimizer), everything(other, resumed))
        assert resumed.steps == optimizer.steps == before + after

    virtual.results(n, program)


def assert_skips_broken_gradients(n, build, *, warm=3):
    """A NaN or Inf on one rank: all skip, nothing changes, and the next step is as if it had not been."""
    broken = [(n - 1, "first", float("nan")), (n // 2, "last", float("nan")), (n // 2, "last", float("inf"))]
    messages = ("skipped_steps", "exchanges", "sent_nbytes")  # buckets that overlap have travelled already

    def program(comm):
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        optimizer, undisturbed = build(net, comm), build(twin, comm)
        assert same_bits(*(steps_of(*pair, rank, range(warm)) for pair in ((net, optimizer), (twin, undisturbed))))
        before = everything(net, optimizer, *messages)
        for skipped, (whose, layer, value) in enumerate(broken, 1):
            optimizer.zero_grad()
            hooks = []
            if rank == whose:  # as autograd would have made it: with overlap it is on its way after the backward pass
                weight = getattr(net, layer).weight
                spot = torch.zeros(weight.shape, dtype=torch.bool)
                spot[-1, -1] = True
                hooks.append(weight.register_hook(lambda grad, spot=spot, value=value: grad.masked_fill(spot, value)))
            loss_of(net, rank, warm).backward()
            for hook in hooks:
                hook.remove()
            optimizer.step()
            assert same_bits(everything(net, optimizer, *messages), before)
            assert optimizer.skipped_steps == skipped
        after = range(warm, warm + 2)
        path = steps_of(net, optimizer, rank, after)
        assert same_bits(path, steps_of(twin, undisturbed, rank, after))
        assert not same_bits(path[0], before[0])
        return path[-1] if have_met(optimizer) else None

    with pytest.warns(RuntimeWarning) as caught:
        rows = virtual.results(n, program)
    assert all(same_bits(row, rows[0]) for row in rows)
    told = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert told == [  # rank 0 speaks for all
        f"step {warm} skipped on all ranks: NaN or Inf in the gradient on rank {whose}" for whose, *_ in broken
    ]


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
