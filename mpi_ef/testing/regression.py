"""A small training on virtual ranks, for the laws of optimizers."""

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpi_ef.optim.flat import FlatOptimizer

from .law import must, same_bits
from .vectors import gaussian
from .virtual import results

__all__ = ["Build", "Net", "Run", "everything", "groups_of", "have_met", "loss_of", "net_of", "parameters_of", "resumes",
           "skips_broken_gradients", "steps_of", "trained"]

Build = Callable[[nn.Module, Any], FlatOptimizer]  # (model, comm)


class Net(nn.Module):
    """A model with a tied weight, a frozen one, an unused one and odd sizes, the same on every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.third = nn.Linear(5, 5)
        self.third.weight = self.second.weight
        self.last = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        with torch.no_grad():
            for number, p in enumerate(self.parameters()):
                p.copy_(torch.from_numpy(gaussian(number, p.numel()) / 2).view(p.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 3) for (batch, 7)."""
        x = torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))
        y: Tensor = self.last(x) + self.frozen
        return y


def net_of(dtype: torch.dtype = torch.float32) -> Net:
    """Return the model in a dtype."""
    return Net().to(dtype)


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    """Return two groups with options of their own."""
    parameters = list(net.parameters())
    return [{"params": parameters[:3], "lr": 2e-2}, {"params": parameters[3:], "weight_decay": 0.3}]


def loss_of(net: nn.Module, rank: int, step: int) -> Tensor:
    """Return that of a regression on a linear teacher: inputs differ per rank and step, targets are shifted per rank."""
    dtype = next(net.parameters()).dtype
    if dtype == torch.float32:
        x = torch.from_numpy(gaussian(rank, 32 * 7, step=step).reshape(32, 7))
        teacher = torch.from_numpy(gaussian(100, 7 * 3).reshape(7, 3))
    else:
        x = torch.from_numpy(np.random.default_rng((rank, step)).normal(size=(32, 7))).to(dtype)
        teacher = torch.from_numpy(np.random.default_rng(100).normal(size=(7, 3))).to(dtype)
    return nn.functional.mse_loss(net(x).to(dtype), x @ teacher + 0.3 * rank)


def parameters_of(net: nn.Module) -> list[Any]:
    """Return copies of the parameters, as arrays."""
    return [(p.detach().float() if p.dtype == torch.bfloat16 else p.detach()).numpy().copy() for p in net.parameters()]


def have_met(optimizer: FlatOptimizer) -> bool:
    """Return whether replicas are to be the same now: `synchronized`, of optimizers that let them differ for a while."""
    return bool(getattr(optimizer, "synchronized", True))


def everything(net: nn.Module, optimizer: FlatOptimizer, *but: str) -> tuple[Any, Any, Any]:
    """Return parameters and all state, in arrays that can be compared; without what is named so in the state."""

    def arrays(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().numpy().copy()
        if isinstance(value, dict):
            return {name: arrays(part) for name, part in value.items() if name not in but}
        return [arrays(part) for part in value] if isinstance(value, list | tuple) else value

    named = copy.deepcopy(optimizer.per_rank() | optimizer.replicated())
    return parameters_of(net), named, arrays(optimizer.state_dict())


def step_of(net: nn.Module, optimizer: FlatOptimizer, rank: int, step: int) -> float:
    """Take a step, and return the loss before it. Collective."""
    optimizer.zero_grad()
    loss = loss_of(net, rank, step)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def steps_of(net: nn.Module, optimizer: FlatOptimizer, rank: int, steps: Iterable[int]) -> list[list[Any]]:
    """Take steps, and return the parameters after each. Collective."""
    path = []
    for step in steps:
        step_of(net, optimizer, rank, step)
        path.append(parameters_of(net))
    return path


@dataclass
class Run:
    """What a rank has seen: parameters, whether replicas had met, and what is equal on all ranks, after every step."""

    path: list[list[Any]]
    met: list[bool]
    shared: list[dict[str, Any]]
    losses: list[float]
    optimizer: Any

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"optimizer": None}  # which stays where it is


def trained(n: int, steps: int, build: Build, *, dtype: torch.dtype = torch.float32, each: Any = None, sees: Any = None,
            compare_every: int = 5) -> list[Run]:
    """Train on n ranks, which start with other parameters: those of rank 0 must win. Return a run for every rank.

    ``each(optimizer, step)`` is called before a step, ``sees(optimizer, step)`` after it.
    """

    def program(comm: Any) -> Run:
        rank, net = comm.Get_rank(), net_of(dtype)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(rank)
        run = Run([], [], [], [], build(net, comm))
        run.optimizer.check_replicas_every = compare_every
        must(same_bits(parameters_of(net), parameters_of(net_of(dtype))), "ranks do not start with rank 0's parameters")
        for step in range(steps):
            if each is not None:
                each(run.optimizer, step)
            run.losses.append(step_of(net, run.optimizer, rank, step))
            run.path.append(parameters_of(net))
            run.met.append(have_met(run.optimizer))
            run.shared.append(copy.deepcopy(run.optimizer.replicated()))
            if sees is not None:
                sees(run.optimizer, step)
        return run

    return results(n, program)


def resumes(n: int, build: Build, *, before: int, after: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """Save after some steps through torch.save and torch.load, load into new objects: both go on with the same steps."""

    def program(comm: Any) -> None:
        rank, net, other = comm.Get_rank(), net_of(dtype), net_of(dtype)
        optimizer = build(net, comm)
        steps_of(net, optimizer, rank, range(before))
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = build(other, comm)
        other.load_state_dict(saved["net"])
        resumed.load_state_dict(saved["optimizer"])
        must(resumed.sent_nbytes <= optimizer.sent_nbytes, "what was loaded has sent more bytes than what was saved")
        steps = range(before, before + after)
        same = same_bits(steps_of(net, optimizer, rank, steps), steps_of(other, resumed, rank, steps))
        must(same, f"saved after {before} steps, the next ones give other parameters")
        same = same_bits(everything(net, optimizer), everything(other, resumed))
        must(same, f"saved after {before} steps, other state")
        must(resumed.steps == optimizer.steps == before + after, f"{resumed.steps} steps are counted of {before + after}")

    results(n, program)


def skips_broken_gradients(n: int, build: Build, *, warm: int = 3) -> None:
    """Break a gradient on one rank: all skip, nothing changes, rank 0 warns, and the next step is as if it had not been."""
    broken = [(n - 1, "first", float("nan")), (n // 2, "last", float("nan")), (n // 2, "last", float("inf"))]
    messages = ("skipped_steps", "exchanges", "sent_nbytes")  # buckets that overlap have travelled already

    def program(comm: Any) -> Any:
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        optimizer, undisturbed = build(net, comm), build(twin, comm)
        twins = [steps_of(*pair, rank, range(warm)) for pair in ((net, optimizer), (twin, undisturbed))]
        must(same_bits(*twins), "two of the same make other steps")
        before = everything(net, optimizer, *messages)
        for skipped, (whose, layer, value) in enumerate(broken, 1):
            optimizer.zero_grad()
            hooks = []
            if rank == whose:  # as autograd would have made it: with overlap it is on its way after the backward pass
                weight = getattr(net, layer).weight
                spot = torch.zeros(weight.shape, dtype=torch.bool)
                spot[-1, -1] = True
                hooks.append(weight.register_hook(lambda grad, spot=spot, value=value: grad.masked_fill(spot, value)))
            loss_of(net, rank, warm).backward()  # type: ignore[no-untyped-call]
            for hook in hooks:
                hook.remove()
            optimizer.step()
            what = f"{value} in the gradient of {layer}.weight on rank {whose} of {n}, after {warm} steps"
            must(same_bits(everything(net, optimizer, *messages), before), f"{what}, changes something")
            must(optimizer.skipped_steps == skipped, f"{what}, is not skipped on all ranks")
        after = range(warm, warm + 2)
        path = steps_of(net, optimizer, rank, after)
        must(same_bits(path, steps_of(twin, undisturbed, rank, after)), "the step after a skipped one is another")
        must(not same_bits(path[0], before[0]), "a step changes nothing")
        return path[-1] if have_met(optimizer) else None

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = results(n, program)
    must(all(same_bits(row, rows[0]) for row in rows), "replicas differ after skipped steps")
    texts = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    wanted = [f"step {warm} skipped on all ranks: NaN or Inf in the gradient on rank {whose}" for whose, *_ in broken]
    must(texts == wanted, f"rank 0 warns of {texts} and not {wanted}")
