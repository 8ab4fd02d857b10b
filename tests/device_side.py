"""What tests of devices share: the device, its kernels, sizes of what they look at, and vectors.

The device is tensors of the CPU that are taken for those of one, or what MPI_EF_TEST_DEVICE names (`make test-gpu`). Its
kernels are in torch operations, and in Triton where that has a GPU or, slow, its interpreter (`make test-device`).
"""

from contextlib import contextmanager, nullcontext
from os import environ

import numpy as np
import pytest
import torch

from mpi_ef.kernels.backend import on_device_side
from mpi_ef.kernels.device.array import DeviceArray, torch_dtype
from mpi_ef.kernels.device.backend import DeviceBackend
from mpi_ef.kernels.device.chosen import why_not_triton

DEVICE = environ.get("MPI_EF_TEST_DEVICE", "side:cpu")
TORCH_DEVICE = torch.device(DEVICE.removeprefix("side:"))
HARDWARE = not DEVICE.startswith("side:")
INTERPRETED = not HARDWARE and environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [DeviceBackend]
if not why_not_triton(TORCH_DEVICE):
    from mpi_ef.kernels.device.triton_backend import TritonBackend

    BACKENDS.append(TritonBackend)

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])


def sized(usual, interpreted):
    """Return what is looked at: less of it where every operation of a kernel is one of an interpreter."""
    return interpreted if INTERPRETED else usual


BLOCK = sized(64, 1024)  # of signs: a program of the interpreter for each, which takes milliseconds


def others(*values):
    """Return parameters that are left to runs of everything."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in sorted(values)]


def device_side():
    """Return a context in which what a test builds with :func:`moved` parameters is on the device."""
    return nullcontext() if HARDWARE else on_device_side()


def moved(module):
    """Return a module whose parameters are where those of a device are in this test."""
    return module.to(TORCH_DEVICE)


@contextmanager
def on_side(side):
    """Return a context of the "host" or the "device", with what moves a module there."""
    if side == "host":
        yield lambda module: module
    else:
        with device_side():
            yield moved


def there(array):
    """A copy of an array on the device."""
    copy = array.copy().view(np.int64) if array.dtype == np.uint64 else array.copy()
    return DeviceArray(torch.from_numpy(copy).to(TORCH_DEVICE, torch_dtype(array.dtype)))


def on(device, array):
    return array if device == "cpu" else there(array)


def host(array):
    return array if isinstance(array, np.ndarray) else array.numpy()


def bits(array):
    return np.ascontiguousarray(array).tobytes()


def vector(d, dtype, seed=0, kind="normal"):
    rng = np.random.default_rng([seed, d])
    x = rng.standard_normal(d)
    if kind == "ties":
        x = np.round(x)
    elif kind == "zeros":
        x = np.where(rng.random(d) < 0.5, 0.0, -0.0)
    elif kind == "subnormal":
        x *= np.finfo(dtype).smallest_subnormal * 7
    elif kind == "large":
        x = rng.choice([-1.0, 1.0], d) * float(np.finfo(dtype).max) * rng.uniform(0.5, 1.0, d)
    elif kind == "wide":
        x *= 10.0 ** rng.uniform(-30, 30, d)
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if kind == "broken" and d:
        x[d // 2], x[-1] = np.nan, -np.inf
    return x


KINDS = ("normal", "ties", "zeros", "subnormal", "large", "wide", "broken")


class Momentum(torch.optim.Optimizer):
    """Momentum in operations that round once, so that all processors make the same bits; torch's own fuse some on GPUs."""

    def __init__(self, parameters, lr, momentum=0.9, decay=0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                moment.mul_(group["momentum"])
                moment.add_(p.grad)
                p.mul_(1 - group["lr"] * group["decay"])
                p.sub_(moment * group["lr"])


def sgd(net):
    return Momentum(net.parameters(), 0.1) if HARDWARE else torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def adamw(net):
    return Momentum(net.parameters(), 0.02, decay=0.1) if HARDWARE else torch.optim.AdamW(net.parameters(), lr=0.01)


def backward(net, shadow, loss_of):
    """Let a backward pass of `net` bring the gradients of its `shadow` on the host: forward passes are rounded elsewhere."""
    shadow.load_state_dict(net.state_dict())
    shadow.zero_grad()
    loss_of(shadow).backward()
    sum((p * copy.grad.to(p.device)).sum() for p, copy in zip(net.parameters(), shadow.parameters(), strict=True)).backward()
