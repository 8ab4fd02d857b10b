"""The kernels of optimizers in Triton, see :mod:`mpi_ef.kernels.device.triton_backend`."""

# ruff: noqa: D102 (the methods are described by the functions of the same names)

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from . import bus, fused_optim
from .backend import DeviceBackend

__all__ = ["TritonOptimizers"]

_PART = 4096  # entries whose squares are added up for themselves
_LANES = 128


class TritonOptimizers(DeviceBackend):
    """Kernels of :mod:`mpi_ef.kernels.device.fused_optim`; who has this class says how they are launched."""

    _launch: Any
    _run: Any
    _word: Any

    def _pass(self, kernel: Any, vectors: Any, *reals: float, **constants: Any) -> None:
        """Launch a kernel that goes once over vectors, with these numbers as bits."""
        size = vectors[-1].size
        self._launch(kernel, size, *(x.tensor for x in vectors), size, *map(self._word, reals), F64=self.dtype.itemsize == 8,
                     **constants)

    def _with_rest(self, beta: float) -> tuple[Any, Any]:
        """Return a number and one less it, rounded as entries of vectors are."""
        real = self.dtype.type
        return real(beta), real(1) - real(beta)

    def update_moments(self, grad: Any, beta1: float, beta2: float, m: Any, v: Any) -> None:
        self._pass(fused_optim.update_moments, (grad, m, v), *self._with_rest(beta1), *self._with_rest(beta2))

    def adam_step(self, m: Any, v: Any, step: float, root_factor: float, eps: float, decay: float, x: Any) -> None:
        self._pass(fused_optim.adam_step, (m, v, x), step, root_factor, eps, decay)

    def adam(self, grad: Any, beta1: float, beta2: float, step: float, root_factor: float, eps: float, decay: float, m: Any,
             v: Any, x: Any) -> None:
        self._pass(fused_optim.adam, (grad, m, v, x), *self._with_rest(beta1), *self._with_rest(beta2), step, root_factor,
                   eps, decay)

    def preconditioned_step(self, m: Any, inverse: Any, step: float, decay: float, x: Any) -> None:
        self._pass(fused_optim.preconditioned_step, (m, inverse, x), step, decay)

    def sign_step(self, direction: Any, step: float, decay: float, x: Any) -> None:
        self._pass(fused_optim.sign_step, (direction, x), step, decay)

    def momentum_step(self, grad: Any, inverse: Any, beta: float, step: float, decay: float, m: Any, x: Any) -> None:
        self._pass(fused_optim.momentum_step, (grad, inverse, m, x), *self._with_rest(beta), step, decay)

    def local_step(self, grad: Any, inverse: Any, start: Any, beta: float, weight: float, step: float, decay: float, m: Any,
                   u: Any, x: Any) -> None:
        self._pass(fused_optim.local_step, (grad, inverse, start, m, u, x), *self._with_rest(beta), *self._with_rest(weight),
                   step, decay)

    def add_layers(self, values: Any, factors: Any, starts: Any, out: Any) -> None:
        begins, layers = self._layers(starts)
        self._launch(fused_optim.add_layers, out.size, values.tensor, self._numbers(factors), begins, layers, out.tensor,
                     out.size)

    def scaled_momentum(self, grad: Any, m: Any, beta: float, scales: Any, starts: Any, out: Any) -> None:
        begins, layers = self._layers(starts)
        self._launch(fused_optim.scaled_momentum, out.size, grad.tensor, m.tensor, self._numbers(scales), begins, layers,
                     out.tensor, out.size, *map(self._word, self._with_rest(beta)), F64=self.dtype.itemsize == 8)

    def follow_momentum(self, sent: Any, inverse: Any, betas: Any, root_factor: float, eps: float, scales: Any, least: Any,
                        starts: Any, m: Any, fresh: Any, ratios: Any) -> None:
        (begins, layers), (beta1, beta2) = self._layers(starts), map(self._with_rest, np.asarray(betas))
        backs, floors = self._numbers(self.dtype.type(1) / scales), self._numbers(least)
        largest = self.zeros(layers, np.int64 if self.dtype.itemsize == 8 else np.int32).tensor  # bits of numbers
        self._launch(fused_optim.follow_momentum, m.size, sent.tensor, inverse.tensor, backs, floors, begins, layers,
                     m.tensor, fresh.tensor, largest, m.size, *map(self._word, (*beta1, *beta2, root_factor, eps)),
                     F64=self.dtype.itemsize == 8)
        ratios[:] = bus.on_host(largest).view(self.dtype)

    def layer_norms(self, x: Any, starts: Any, norms: Any) -> None:
        lows, sizes, ends = _parts(np.asarray(starts, np.int64).tobytes(), str(self.torch_device))
        parts = lows.numel()
        sums, totals = self.empty((parts, 64), np.float64).tensor, self.empty(parts, np.float64).tensor
        self._run(fused_optim.part_squares, -(-parts // 16), x.tensor, lows, sizes, parts, sums)
        self._run(fused_optim.square_totals, -(-parts // _LANES), x.tensor, lows, sizes, parts, sums, totals, BLOCK=_LANES)
        of_parts = bus.on_host(totals)
        norms[:] = [np.sqrt(np.cumsum([0.0, *of_parts[one:other]])[-1]) for one, other in pairwise(ends)]

    def norm(self, x: Any) -> float:
        norms = np.empty(1)
        self.layer_norms(x, np.array([0, x.size]), norms)
        return float(norms[0])

    def fingerprints(self, x: Any, starts: Any, out: Any) -> None:
        words = x.itemsize // 4
        begins, layers = self._layers(words * np.asarray(starts))
        sums = self.zeros(layers, np.int64).tensor
        self._launch(fused_optim.add_fingerprints, words * x.size, x.view(np.int32).tensor, begins, layers,
                     words * x.size, sums)
        out[:] = bus.on_host(sums).view(np.uint64)

    def _layers(self, starts: Any) -> tuple[torch.Tensor, int]:
        begins = np.asarray(starts, np.int64)
        return _placed(begins.tobytes(), str(self.torch_device)), begins.size - 1

    def _numbers(self, of_layers: Any) -> torch.Tensor:
        return bus.on_device(np.asarray(of_layers, self.dtype), self.torch_device)


@lru_cache(maxsize=256)  # a number for each layer
def _placed(starts: bytes, device: str) -> torch.Tensor:
    return bus.on_device(np.frombuffer(starts, np.int64), torch.device(device))


@lru_cache(maxsize=64)  # two numbers for 4096 entries and for each layer
def _parts(starts: bytes, device: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return where parts of up to 4096 entries of layers begin, their sizes, and which are the first ones of layers."""
    layers = list(pairwise(np.frombuffer(starts, np.int64).tolist()))
    lows = [low for start, stop in layers for low in range(start, stop, _PART)]
    sizes = [min(_PART, stop - low) for start, stop in layers for low in range(start, stop, _PART)]
    ends: list[int] = np.cumsum([0, *(len(range(start, stop, _PART)) for start, stop in layers)]).tolist()
    where = torch.device(device)
    return bus.on_device(np.array(lows, np.int64), where), bus.on_device(np.array(sizes, np.int64), where), ends
