"""Training on virtual ranks, and the same by torch alone on the mean gradient of all ranks."""

import copy
import io

import numpy as np
import torch
import virtual
from programs import loss_of, model, same_bits


def net_of(dtype=torch.float32):
    return model().to(dtype)


def seeded(net):
    """Draw the parameters without torch's global generator, which virtual ranks, being threads, share."""
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.copy_(torch.from_numpy(np.random.default_rng(number).normal(size=p.shape) / 3))
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


def trained(n, steps, build, *, dtype=torch.float32, each=None):
    """Return per rank: parameters after every step, losses, the optimizer."""

    def program(comm):
        net = net_of(dtype)
        optimizer, path, losses = build(net, comm), [], []
        for step in range(steps):
            if each is not None:
                each(optimizer, step)
            optimizer.zero_grad()
            loss = loss_in(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            path.append(parameters_of(net))
        return path, losses, optimizer

    return virtual.results(n, program)


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
        for p in net.parameters():
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        path.append(parameters_of(net))
    return path


def assert_close(path, expected, **tolerance):
    for step, (mine, theirs) in enumerate(zip(path, expected, strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, err_msg=f"after step {step}", **tolerance)


def assert_replicas(rows):
    for path, _, _ in rows[1:]:
        assert same_bits(path, rows[0][0])


def assert_resumes(n, build, *, before, after=4):
    """Law 7: through torch.save and torch.load with their defaults, into new objects."""

    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = build(net, comm)

        def run(net, optimizer, steps):
            for step in steps:
                optimizer.zero_grad()
                loss_of(net, rank, step).backward()
                optimizer.step()

        run(net, optimizer, range(before))
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file)
        other = net_of()
        resumed = build(other, comm)
        other.load_state_dict(saved["net"])
        resumed.load_state_dict(saved["optimizer"])
        assert resumed.sent_nbytes <= optimizer.sent_nbytes
        run(net, optimizer, range(before, before + after))
        run(other, resumed, range(before, before + after))
        assert same_bits(parameters_of(net), parameters_of(other))
        assert same_bits(optimizer.replicated() | optimizer.per_rank(), resumed.replicated() | resumed.per_rank())
        assert resumed.steps == optimizer.steps == before + after

    virtual.results(n, program)


def assert_skips_broken_gradients(n, build, *, warm=3):
    """A NaN on one rank: all skip, nothing changes, and the next step is as if it had not been."""
    import pytest

    def program(comm):
        rank, nets = comm.Get_rank(), [net_of(), net_of()]
        optimizers = [build(net, comm) for net in nets]
        for step in range(warm + 2):
            for number, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                if step == warm and number == 0:
                    optimizer.zero_grad()
                    loss_of(net, rank, step).backward()
                    if rank == n - 1:
                        net.first.weight.grad[0, 0] = float("nan")
                    before = parameters_of(net), copy.deepcopy(optimizer.per_rank() | optimizer.replicated())
                    optimizer.step()
                    assert same_bits((parameters_of(net), optimizer.per_rank() | optimizer.replicated()), before)
                    assert optimizer.skipped_steps == 1
                optimizer.zero_grad()
                loss_of(net, rank, step).backward()
                optimizer.step()
            assert same_bits(*map(parameters_of, nets))

    with pytest.warns(RuntimeWarning, match=f"skipped on all ranks: NaN or Inf in the gradient on rank {n - 1}"):
        virtual.results(n, program)
