"""Parameters and entries whose first gradient comes late, or never, under the optimizers that send signs."""

import copy
import io

import numpy as np
import pytest
import torch
import virtual
from optimizer_table import ROWS, cases, rows
from programs import same_bits
from test_lamb import PlainLamb
from training import everything, loss_in, net_of, parameters_of, seeded

from mpi_ef.compress import Identity, Sign, TopK
from mpi_ef.errors import NonFiniteError
from mpi_ef.optim import Lion, OneBitAdam, OneBitLamb, Signum, ZeroOneAdam
from mpi_ef.optim.handshake import _WORDS

each_world = pytest.mark.parametrize("n", [1, 2, 3])
VARIANCE = ("OneBitAdam", "OneBitAdam TopK", "OneBitLamb", "OneBitLamb TopK", "ZeroOneAdam", "ZeroOneAdam TopK")
with_variance = pytest.mark.parametrize("row", [pytest.param(ROWS[name], id=name) for name in VARIANCE])
WORDS, ROW, USED, ALONE, LATE, NEVER = 12, 3, range(4), 4, (5, 6), range(7, 12)


def net_with_more(dtype=torch.float32):
    """The network of the other tests; a layer and an embedding whose gradients do not depend on the rest."""
    net = net_of(torch.float32)
    net.late = torch.nn.Linear(4, 2, bias=False)
    net.words = torch.nn.Embedding(WORDS, ROW)
    seeded(net.late)
    seeded(net.words)
    return net.to(dtype)


def of_late(net, rank, step):
    """The loss of the layer that comes late."""
    dtype, rng = net.late.weight.dtype, np.random.default_rng((rank, step, 7))
    x = torch.from_numpy(rng.normal(size=(16, 4))).to(dtype)
    y = x @ torch.linspace(-1, 1, 8, dtype=dtype).reshape(4, 2) + 0.2 * rank
    return torch.nn.functional.mse_loss(net.late(x).to(dtype), y)


def of_words(net, rank, step, late):
    """The loss of the words that occur in this step on this rank: some all the time, one on the last rank, some late."""
    words = [USED[(step + rank) % 4], USED[(step + 2 * rank + 1) % 4]]
    if rank == RANKS[0] - 1:
        words += [ALONE]
    if late and rank == step % RANKS[0]:
        words += LATE
    return (net.words(torch.tensor(words)) - 2.0 - 0.1 * rank).square().sum()


RANKS = [1]  # of the world of the running test


def take_steps(net, optimizer, rank, steps, *, layer=None, words=None, path=None):
    """Train; the layer has a gradient from step `layer` on, the late words from step `words` on."""
    for step in steps:
        optimizer.zero_grad()
        loss = loss_in(net, rank, step) + of_words(net, rank, step, words is not None and step >= words)
        if layer is not None and step >= layer:
            loss = loss + of_late(net, rank, step)
        loss.backward()
        optimizer.step()
        if path is not None:
            path.append((net.late.weight.detach().double().numpy().copy(), net.words.weight.detach().numpy().copy()))


# ---- a parameter whose first gradient comes late


class PlainAdam:
    """Adam of one parameter whose variance is frozen after so many steps, in float64."""

    def __init__(self, x, lr, freeze, decay=0.0, betas=(0.9, 0.999), floor=0.1, eps=1e-8):
        self.x, self.m, self.v, self.t = x.copy(), np.zeros_like(x), np.zeros_like(x), 0
        self.lr, self.freeze, self.decay, self.betas, self.floor, self.eps = lr, freeze, decay, betas, floor, eps

    def step(self, grad):
        (b1, b2), self.t = self.betas, self.t + 1
        self.m = b1 * self.m + (1 - b1) * grad
        if self.t <= self.freeze:
            self.v = b2 * self.v + (1 - b2) * grad**2
        v = self.v / (1 - b2 ** min(self.t, self.freeze))
        root = np.sqrt(v) if self.t <= self.freeze else np.maximum(np.sqrt(v), self.floor * np.sqrt(v.mean()))
        self.x = (1 - self.lr * self.decay) * self.x - self.lr * self.m / (1 - b1**self.t) / (root + self.eps)
        return self.x


def lamb_alone(x, lr, freeze):
    """The same by LAMB."""
    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    lamb = PlainLamb([p], lr=lr, freeze=freeze)

    def step(grad):
        p.grad = torch.from_numpy(grad)
        lamb.step()
        return p.detach().numpy()

    return step


KINDS = {
    "OneBitAdam": (OneBitAdam, {"freeze_step": 9}),
    "OneBitLamb": (OneBitLamb, {"freeze_step": 9}),
    "ZeroOneAdam": (ZeroOneAdam, {"var_freeze_step": 12, "var_update_scaler": 2, "local_step_clipper": 1}),
    "ZeroOneAdam, seldom": (ZeroOneAdam, {"var_freeze_step": 12, "var_update_scaler": 2, "local_step_scaler": 6,
                                          "local_step_clipper": 4}),
}  # fmt: skip


@each_world
@pytest.mark.parametrize("compressor", [Identity(), Sign(block=16), TopK(0.1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["unused", "frozen", "zero"])
@pytest.mark.parametrize("first", [4, 10, 15, 26])
def test_a_late_parameter_has_a_warm_up_of_its_own_as_in_torch(kind, compressor, way, first, n):
    """With any compressor it takes the steps of dense Adam or LAMB then, and with the identity also those after it."""
    if way == "zero" and first < 12:
        pytest.skip("steps with zero gradients count before the freeze, as in torch")
    make, options = KINDS[kind]
    own = 6 if "ZeroOne" in kind else 9

    def program(comm):
        rank, net, path = comm.Get_rank(), net_with_more(torch.float64), []
        start = net.late.weight.detach().numpy().copy()
        optimizer = make(net.parameters(), comm, lr=1e-2, compressor=compressor, **options)
        for step in range(first + 40):
            optimizer.zero_grad()
            net.late.weight.requires_grad_(way != "frozen" or step >= first)
            loss = loss_in(net, rank, step)
            if step >= first or way == "zero":
                loss = loss + of_late(net, rank, step) * float(step >= first)
            loss.backward()
            optimizer.step()
            path.append(net.late.weight.detach().numpy().copy())
            if step + 1 == first:
                assert same_bits(path[-1], start)
        optimizer.synchronize()
        gradients = []
        with torch.no_grad():  # of the path that was taken
            pass
        for x, step in zip([start, *path[first:]], range(first, first + 40), strict=False):
            net.late.weight.data.copy_(torch.from_numpy(x))
            net.late.weight.grad = None
            of_late(net, rank, step).backward()
            gradients.append(net.late.weight.grad.numpy().copy())
        return start, path[first:], gradients, of_late(net, 0, 10**6).item()

    runs = virtual.results(n, program)
    start, path = runs[0][:2]
    if "Lamb" in kind:
        follow = lamb_alone(start, 1e-2, 9)
    else:
        plain = PlainAdam(start, 1e-2, own)
        follow = plain.step
    exact = kind != "ZeroOneAdam, seldom" and compressor == Identity()
    for t in range(40 if exact else own):
        expected = follow(np.mean([run[2][t] for run in runs], axis=0))
        np.testing.assert_allclose(path[t], expected, rtol=1e-10, atol=1e-12, err_msg=f"step {t}")
    if "seldom" not in kind:
        assert all(same_bits(run[1], path) for run in runs)
