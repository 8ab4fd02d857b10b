"""The kernels of optimizers in torch operations, see :mod:`mpi_ef.kernels.device.plain`."""

# ruff: noqa: D103

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from . import bus
from .plain import _part_totals, _quotient

__all__ = ["adam", "adam_step", "add_layers", "follow_momentum", "l1_norm", "layer_norms", "local_step",
           "momentum_step", "preconditioned_step", "scaled_momentum", "sign_step", "update_moments"]

Tensor = torch.Tensor
_LANES, _PART = 64, 4096


def update_moments(grad: Tensor, beta1: float, beta2: float, m: Tensor, v: Tensor) -> None:
    m.copy_(m * beta1 + grad * _rest(beta1, m))
    v.copy_(v * beta2 + (grad * grad) * _rest(beta2, v))


def _root(x: Tensor) -> Tensor:
    """Return the square root, rounded to nearest; that of torch is not on CPUs, where a library of vector math takes it."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else torch.sqrt(x)


def adam_step(m: Tensor, v: Tensor, step: float, root_factor: float, eps: float, decay: float, x: Tensor) -> None:
    x.copy_(x * decay - (m / (_root(v) * root_factor + eps)) * step)


def adam(grad: Tensor, beta1: float, beta2: float, step: float, root_factor: float, eps: float, decay: float, m: Tensor,
         v: Tensor, x: Tensor) -> None:
    update_moments(grad, beta1, beta2, m, v)
    adam_step(m, v, step, root_factor, eps, decay, x)


def preconditioned_step(m: Tensor, inverse: Tensor, step: float, decay: float, x: Tensor) -> None:
    x.copy_(x * decay - (m * inverse) * step)


def l1_norm(x: Tensor) -> float:
    totals: Any = bus.on_host(_part_totals(x[None])[0]) if x.numel() else []
    return float(np.cumsum([0.0, *totals])[-1])


def sign_step(direction: Tensor, step: float, decay: float, x: Tensor) -> None:
    signs = torch.where(direction.isnan(), direction, torch.sign(direction))  # torch takes that of NaN for zero
    x.copy_(x * decay - signs * step)


def _rest(beta: float, x: Tensor) -> float:
    """Return 1 - beta, rounded as entries of `x` are."""
    real = _real(x)
    return float(real(1) - real(beta))


def _real(x: Tensor) -> Any:
    return np.float32 if x.dtype == torch.float32 else np.float64


def momentum_step(grad: Tensor, inverse: Tensor, beta: float, step: float, decay: float, m: Tensor, x: Tensor) -> None:
    m.copy_(m * beta + grad * _rest(beta, m))
    x.copy_(x * decay - (m * inverse) * step)


def local_step(grad: Tensor, inverse: Tensor, start: Tensor, beta: float, weight: float, step: float, decay: float,
               m: Tensor, u: Tensor, x: Tensor) -> None:
    m.copy_(m * beta + grad * _rest(beta, m))
    u.copy_(u * _rest(weight, u) + m * weight)
    x.copy_(start * decay - (u * inverse) * step)


def layer_norms(x: Tensor, starts: Any, norms: Any) -> None:
    layers = [range(start, stop, _PART) for start, stop in pairwise(starts.tolist())]
    lows = [low for layer in layers for low in layer]
    sizes = [min(_PART, layer.stop - low) for layer in layers for low in layer]
    totals = _sums_of_squares(x, lows, sizes) if lows else np.empty(0)
    ends = np.cumsum([0, *map(len, layers)])
    norms[:] = [np.sqrt(np.cumsum([0.0, *totals[one:other]])[-1]) for one, other in pairwise(ends)]


def _sums_of_squares(x: Tensor, lows: list[int], sizes: list[int]) -> Any:
    """Return the sums of squares of parts of up to 4096 entries, in the order of the specification, on the host."""
    low, size = (bus.on_device(numbers, x.device)[:, None] for numbers in (lows, sizes))
    whole = size // _LANES * _LANES

    def squares(at: Tensor, there: Tensor) -> Tensor:
        value = torch.where(there, x[(low + at).clamp(max=x.numel() - 1)], 0).to(torch.float64)
        return value * value

    lane = torch.arange(_LANES, device=x.device)[None]
    sums = torch.zeros(len(lows), _LANES, dtype=torch.float64, device=x.device)
    for group in range(0, max(sizes) // _LANES * _LANES, _LANES):
        sums += squares(group + lane, group < whole)
    total = torch.zeros_like(sums[:, 0])
    for one in range(_LANES):
        total += sums[:, one]
    for one in range(_LANES - 1):
        total += squares(whole + one, whole + one < size)[:, 0]
    return bus.on_host(total)


def _by_entry(of_layers: Any, starts: Any, like: Tensor) -> Tensor:
    """Return numbers of layers, (layers,) on the host, for every entry."""
    numbers = bus.on_device(np.asarray(of_layers), like.device, like.dtype)
    sizes = bus.on_device(np.diff(starts), like.device)
    return numbers.repeat_interleave(sizes, output_size=like.numel())


def add_layers(values: Tensor, factors: Any, starts: Any, out: Tensor) -> None:
    out += values * _by_entry(factors, starts, out)


def scaled_momentum(grad: Tensor, m: Tensor, beta: float, scales: Any, starts: Any, out: Tensor) -> None:
    out.copy_(_by_entry(scales, starts, out) * (m * beta + grad * _rest(beta, out)))


def follow_momentum(sent: Tensor, inverse: Tensor, betas: Any, root_factor: float, eps: float, scales: Any, least: Any,
                    starts: Any, m: Tensor, fresh: Tensor, ratios: Any) -> None:
    beta1, beta2 = (float(beta) for beta in betas)
    new = _by_entry(_real(m)(1) / scales, starts, m) * sent
    grad = _quotient(new - m * beta1, _rest(beta1, m))
    m.copy_(new)
    fresh.copy_(fresh * beta2 + (grad * grad) * _rest(beta2, m))
    roots = torch.maximum(_root(fresh) * root_factor, _by_entry(least, starts, m)) + eps
    quotients = torch.where(inverse > 0, 1.0 / (roots * inverse), 0.0)
    largest = [quotients[start:stop].amax() if stop > start else quotients.new_zeros(()) for start, stop in pairwise(starts)]
    ratios[:] = bus.on_host(torch.stack(largest)) if largest else []

