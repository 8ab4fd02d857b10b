"""Parts of the data of a step of coded training: their gradients, random numbers and running statistics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, briefly, told
from mpi_ef.ranges import whole
from mpi_ef.vectors import FlatParameters
from mpi_ef.vectors.places import on_host, overwrite

__all__ = ["Part", "Reached", "Statistics", "alone_at_random", "is_statistic", "seed_of", "take_mean", "widen_moments"]

Numbers = NDArray[np.float64]


def seed_of(seed: int, step: int, part: int) -> int:
    """Return a number below 2**63 that is made of these three. Local."""
    return int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def take_mean(flat: FlatParameters, total: Vector, samples: int, clip: float) -> bool:
    """Let gradients be the mean, of norm `clip` at most, of a sum, which is overwritten; tell whether finite. Local."""
    total /= total.dtype.type(samples)
    flat.gradients[:] = total
    if clip and (norm := float(flat.kernels.norm(flat.gradients))) > clip:
        flat.gradients *= flat.dtype.type(clip / norm)
    return bool(flat.kernels.finite([flat.gradients]))


def widen_moments(optimizer: Optimizer) -> None:
    """Let moments in 16 bits be in float32, as masters of parameters are. Local."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                state[name] = value.float()


@contextmanager
def alone_at_random(device: torch.device) -> Iterator[None]:
    """Put torch's generators, of the CPU and of a device, back to where they were. Local."""
    there = device.type != "cpu"
    with torch.random.fork_rng([device] if there else [], device_type=device.type if there else "cuda"):
        yield


class Reached:
    """Which parameters backward passes reach, and whether something else changes gradients between them. Local."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.begin()

    def begin(self) -> None:
        """Take note of a step whose gradients are empty."""
        self._marks, self._empty = self._now(), True
        self.clear()

    def clear(self) -> None:
        """Forget who was reached."""
        self.which = [False] * len(self._parameters)

    def check(self, where: str) -> None:
        """Raise where gradients are not what backward passes have added up: parts would be lost, or count otherwise."""
        now = self._now()
        if now != self._marks and not (self._empty and all(p.grad is None or not p.grad.any() for p in self._parameters)):
            raise OptionError(f"{where}: something else than part.backward() has changed gradients since; leave out "
                              "zero_grad() and other calls of backward(), and pass clip=... for a limit of the norm")
        self._marks = now

    def added(self) -> None:
        """Take note of a backward pass."""
        before, self._marks, self._empty = self._marks, self._now(), False
        self.which = [was or mark != old for was, mark, old in zip(self.which, self._marks, before, strict=True)]

    def _now(self) -> list[tuple[int, int] | None]:
        """Return for each parameter what is another one after a backward pass that has reached it."""
        grads = [p.grad for p in self._parameters]
        return [None if grad is None else (id(grad), grad._version) for grad in grads]  # noqa: SLF001


class Part:
    """One part of the data of a step, see :meth:`CodedOptimizer.parts`.

    Attributes
    ----------
    number : int
        Below the number of parts, which is that of workers.
    step : int
    seed : int
        A number made of (seed, step, number), with which torch's generators have been seeded.
    weight : float
        With which its gradient is added.
    samples : float
        So far.
    loss : float
        The sum over these samples.
    """

    def __init__(self, subject: str, number: int, step: int, seed: int, weight: float, reached: Reached) -> None:
        self._reached, self._subject, self.number, self.step, self.seed, self.weight = (
            reached, subject, number, step, seed, weight)
        self.samples, self.loss, self._called, self._over = 0, 0.0, False, False

    def backward(self, loss: Tensor, *, samples: int) -> None:
        """Add the gradient over some samples of this part. Local; once or more often, for all samples of the part together.

        Parameters
        ----------
        loss : tensor of one entry
            The mean over these samples; the sum is differentiated.
        samples : int
            How many they are. Without any, loss is not looked at.

        Raises
        ------
        OptionError
        """
        where = f"{self._subject}: part {self.number} of step {self.step}"
        whole(where, 0, "pass how many samples loss is the mean of", samples=samples)
        if self._over:
            raise OptionError(f"{where} is over; call backward() before the next part is asked for")
        self._called = True
        if not samples:
            return
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is {briefly(loss)}"
            raise OptionError(f"{where}: loss {shape}; pass the mean over the samples, a tensor of one entry")
        if not loss.requires_grad:
            raise OptionError(f"{where}: loss does not depend on parameters; compute it from the model, with gradients on")
        self._reached.check(where)
        try:
            (loss * (self.weight * samples)).sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise OptionError(f"{where}: backward: {told(error)}") from error
        self._reached.added()
        self.samples += samples
        self.loss += float(loss.detach()) * samples

    def end(self) -> None:
        """Take note that the part is over; raise where :meth:`backward` was not called. Local."""
        self._over = True
        if not self._called:
            raise OptionError(f"{self._subject}: backward() of part {self.number} of step {self.step} was not called; call "
                              "part.backward(loss, samples=...) in each turn of the loop, also for no samples")
        self._reached.check(f"{self._subject}: part {self.number} of step {self.step}")


class Statistics:
    """Running statistics of a model as numbers: floating-point buffers named running_*, and num_batches_tracked. Local.

    Parameters
    ----------
    model : torch.nn.Module or None
    """

    def __init__(self, subject: str, model: object) -> None:
        self._subject, self._model = subject, model if isinstance(model, nn.Module) else None
        self._taken: dict[str, Tensor] = {}
        self._others: dict[str, tuple[Tensor, int]] = {}  # with their versions
        self._look()
        self.count = sum(b.numel() for b in self._taken.values())
        self.described = ", ".join(f"{name} {tuple(b.shape)}" for name, b in self._taken.items())

    def _buffers(self) -> dict[str, Tensor]:
        return {} if self._model is None else dict(self._model.named_buffers())

    def values(self) -> Numbers:
        """Return all of them, (count,) float64."""
        if not self._taken:
            return np.empty(0)
        packed: Numbers = on_host(torch.cat([b.detach().double().reshape(-1) for b in self._taken.values()])).numpy()
        return packed

    @torch.no_grad()
    def write(self, values: Sequence[float] | Numbers) -> None:
        """Overwrite all of them, rounded to their dtypes."""
        start = 0
        for b in self._taken.values():
            part = torch.from_numpy(np.array(values[start : start + b.numel()], np.float64)).view(b.shape)
            overwrite(b, (part if b.is_floating_point() else part.round()).to(b.dtype))
            start += b.numel()

    def settle(self, *, again: bool = False) -> None:
        """Take all other buffers as they are now; with `again` look which there are, at the cost of all modules."""
        if again:
            self._look()
        else:
            self._others = {name: (b, b._version) for name, (b, _) in self._others.items()}  # noqa: SLF001

    def _look(self) -> None:
        named = self._buffers()
        self._taken = {name: b for name, b in named.items() if is_statistic(name, b)}
        self._others = {name: (b, b._version) for name, b in named.items() if name not in self._taken}  # noqa: SLF001

    def check(self) -> None:
        """Raise where something else than statistics has changed: other ranks would not get it."""
        for name, (b, version) in self._others.items():
            if b._version != version:  # noqa: SLF001
                self._refuse(name)

    def check_all(self) -> None:
        """Do :meth:`check`, and raise where a buffer was replaced by another one. Cost: all modules are looked at."""
        self.check()
        now = self._buffers()
        for name, b in {**self._taken, **{name: kept for name, (kept, _) in self._others.items()}}.items():
            if now.get(name) is not b:
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        raise OptionError(f"{self._subject}: a forward pass has changed buffer {name}, which is no running statistic: other "
                          "ranks would go on with another one; leave out the module that does it, or make it a parameter")


def is_statistic(name: str, buffer: Tensor) -> bool:
    """Tell whether this is a running statistic. Local."""
    last = name.rpartition(".")[2]
    return (last.startswith("running_") and buffer.is_floating_point()) or last == "num_batches_tracked"

