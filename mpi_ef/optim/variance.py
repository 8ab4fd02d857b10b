"""What 1-bit Adam and its relatives share: a variance that is frozen, of every parameter after a warm-up of its own."""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import InitVar
from itertools import accumulate, groupby, pairwise
from math import sqrt
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import Plan, PlanBuilder, plan_for
from mpi_ef.compress import Compressor, Sign
from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.kernels.backend import backend_of
from mpi_ef.ranges import option, with_options
from mpi_ef.vectors import Mask

from .replicated import ReplicatedOptimizer
from .resting import QUIET, STIRS, memories

__all__ = ["VarianceOptimizer", "VarianceWatch", "inverse_roots"]

SIGNS = Sign(block=1024)
_NOTHING = np.empty(0, np.intp)
Key = TypeVar("Key", bound=Hashable)


@with_options
class VarianceOptimizer(ReplicatedOptimizer):
    """What OneBitAdam, OneBitLamb and ZeroOneAdam share, besides what ReplicatedOptimizer is.

    Signs say nothing of how large an entry's gradients are: that is what the variance v is for.

    * *A parameter that has had fewer updates of its variance than the others*, because it had no gradient in some steps, is
      late. It has a warm-up of its own before it joins the compressed exchange: in the steps in which it has a gradient that
      travels whole, with those of others that are late, for a dense step that counts its own steps, as torch does.
    * *An entry without variance* sleeps: no rank has had a gradient of it, and it does not move. When any rank has one, all
      learn about it before the step, and it takes part in it. A parameter whose entries all sleep starts again then.

    Which these are follows from v and the counters. `arrays` has "v"; `rules` one rule, "momentum".
    """

    counters: ClassVar[tuple[str, ...]] = ("frozen_step", "looks")
    later_counters: ClassVar = {"counted": []}
    vectors: ClassVar[tuple[str, ...]] = ("m", "v")  # of `arrays`
    hushed: ClassVar[tuple[str, ...]] = ()  # which of them are, besides m, zero where entries sleep
    result: ClassVar = "mean"  # of the rule's state: what it returns
    freezes_at: ClassVar = "freeze_step"  # the option that says after how many steps the variance is frozen

    lr: InitVar[float] = 1e-3
    betas: tuple[float, float] = option((0.9, 0.999), "[0, 1)", "try (0.9, 0.999)")
    eps: float = option(1e-8, "[0, inf)", "1e-8 is usual")
    compressor: InitVar[Compressor] = SIGNS
    plan: InitVar[PlanBuilder] = plan_for
    bias_correction: bool = True
    variance_floor: float = option(0.1, "[0, 1]", "try 0.1")

    def build(self, plan: Plan) -> None:
        """Make rules and arrays, see :meth:`ReplicatedOptimizer.build`. Local."""
        self.rules["momentum"] = self._rule(plan)
        self.arrays |= {name: self.zeros() for name in self.vectors}
        self.frozen_step: int | None = None
        self._watch, self._inverse = VarianceWatch(self.betas[1]), self.zeros()
        self.counted, self._whole = [0] * len(self.flat.parameters), True

    def _rule(self, plan: Plan) -> ErrorFeedback:
        return ErrorFeedback("ef14", plan)

    @property
    def m(self) -> Vector:
        """The momentum, (d,); the same on all ranks but where an optimizer says otherwise."""
        return self.arrays["m"]

    # What the watch over the variance has seen: norms and learning rates.
    looks = property(lambda self: self._watch.looks, lambda self, looks: setattr(self._watch, "looks", [*map(tuple, looks)]))

    def _correction(self, beta: float, step: int) -> float:
        return 1.0 - beta**step if self.bias_correction else 1.0

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The group of each parameter. Groups may be cut again, not parameters change places."""
        groups = {id(p): group for group in reversed(self.param_groups) for p in group["params"]}
        return [groups[id(p)] for p in self.flat.parameters]

    def _stretches(self, keys: Sequence[Key]) -> Iterator[tuple[range, slice, dict[str, Any], Key]]:
        """Yield the parameters in runs of one group and one of `keys`, as long as they can be: which, where, both."""
        starts, number, alike = self.flat.starts, 0, keys.count(keys[0]) == len(keys)
        for group, part in self.slices():
            first, number = number, bisect_left(starts, part.stop, number)
            if alike:
                yield range(first, number), part, group, keys[0]
                continue
            for key, of_it in groupby(range(first, number), keys.__getitem__):
                numbers = list(of_it)
                whole = slice(starts[numbers[0]], starts[numbers[-1] + 1])
                yield range(numbers[0], numbers[-1] + 1), whole, group, key

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Any, Any]:
        """Return the corrected step size and what weight decay leaves, in the dtype of the vectors."""
        real, lr = self.flat.dtype.type, group["lr"]
        return real(lr / self._correction(self.betas[0], step)), real(1.0 - lr * group["weight_decay"])

    def _is_whole(self) -> bool:
        """Return whether the next step exchanges everything whole. Local, alike on all ranks."""
        return self.frozen_step is None

    def _updates(self) -> tuple[list[int], int]:
        """Return how often the variance of each parameter was updated, and of those that are not late. Local."""
        return self.counted, self.frozen_step or self.steps + 1

    def _behind(self) -> Mask:
        """Return which parameters have had fewer updates of their variance than the others. Local."""
        updates, of_others = self._updates()
        return np.array(updates) < of_others

    @abstractmethod
    def _step_late(self, number: int, group: dict[str, Any], mean: Vector) -> None:
        """Take a dense step with a parameter of a group, which has had ``counted`` of them with this one. Local."""

    def _factor(self, updates: int) -> float:
        """Return what corrects the bias of a variance that was updated so often."""
        return 1.0 / self._correction(self.betas[1], max(1, updates))

    def _derive(self) -> None:
        """Form what follows from the variance: one over its roots. Local."""
        updates, of_others = self._updates()
        factors = [self._factor(min(count, of_others)) for count in updates]
        self._inverse = inverse_roots(self.arrays["v"], factors, self.flat.starts, self.eps, self.variance_floor)

    def _join(self, numbers: list[int]) -> None:
        """Let parameters whose own warm-up has come to its end take part in the compressed exchange. Local."""
        del numbers
        self._derive()

    def _collect(self) -> None:
        self._handshake.note(sleepers=QUIET)
        super()._collect()
        if self._asleep.mask is not None and self._asleep.stir(self.flat.gradients):
            self._handshake.note(sleepers=STIRS)

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """Let parameters without gradient stay, and those that are late go their own way."""
        self._whole, asleep, woken, late = self._is_whole(), self._asleep.mask, _NOTHING, list[int]()
        if not self._whole:
            if asleep is not None and self._handshake.answers("sleepers").any():
                woken = self._asleep.wake(self.flat.kernels.nonzero(self.flat.gradients))
                self._retired_nbytes += self._asleep.sent_nbytes
            late = self._late(woken)
        if not late and self.moving.all() and not woken.size:
            yield
            return
        try:
            means = self._means(late)
            self.moving[late] = False
            with super()._resting():
                yield
        except BaseException:
            self._asleep.mask = asleep
            raise
        self.arrays["v"][woken] = np.finfo(self.flat.dtype).tiny
        if late:
            self._go_on(late, means)

    def _late(self, woken: NDArray[np.intp]) -> list[int]:
        """Return the parameters that are late, are awake and have a gradient. Local, alike on all ranks."""
        updates, of_others = self._updates()
        if min(updates) >= of_others:
            return []
        numbers: list[int] = np.flatnonzero(self.moving & self._behind()).tolist()
        ends = np.searchsorted(woken, self.flat.starts)
        return [number for number in numbers if self.counted[number] or ends[number] < ends[number + 1]]

    def _means(self, late: list[int]) -> list[Vector]:
        """Return the mean gradients of these parameters. Collective."""
        if not late:
            return []
        parts = [self.flat.gradients[self.flat.place(number)] for number in late]
        mean, ends = self.mean(self.flat.kernels.concatenate(parts)), [*accumulate(part.size for part in parts)]
        return [mean[end - part.size : end] for part, end in zip(parts, ends, strict=True)]

    def _go_on(self, late: list[int], means: list[Vector]) -> None:
        """Take the steps of those that are late. Local."""
        restarted, groups = [number for number in late if self.counted[number] == 0], self._groups
        for number, mean in zip(late, means, strict=True):
            if number in restarted:
                self.arrays["v"][self.flat.place(number)] = 0
            self.counted[number] += 1
            self._step_late(number, groups[number], mean)
        behind = self._behind()
        if joined := [number for number in late if not behind[number]]:
            self._join(joined)
        if restarted or joined:
            self._fall_asleep()
        if joined and not any(map(self.counted.__getitem__, np.flatnonzero(behind))):
            self._retire_dense()

    def _updated(self) -> None:
        """Count the steps of every parameter, and freeze the variance if it is time."""
        self.counted = [count + bool(moves and (self._whole or count))
                        for count, moves in zip(self.counted, self.moving.tolist(), strict=True)]
        if self.frozen_step is None:
            step, at = self.steps + 1, getattr(self, self.freezes_at)
            lr = max(group["lr"] for group in self.param_groups)
            settled = self._watch.settled(step, self.arrays["v"], lr, updates=self._updates()[1])
            if settled if at is None else step >= at:
                self._freeze(step)

    def _freeze(self, step: int) -> None:
        """Freeze the variance after this step, and choose what holds from then on. Local."""
        self._settle(step)

    def _settle(self, step: int) -> None:
        """Let the variance of now hold for good, and go over to the compressed exchange. Local."""
        self.frozen_step = step
        self._retire_dense()
        self._derive()
        self._fall_asleep()

    def _fall_asleep(self) -> None:
        """Let the entries without variance sleep, but for those of parameters in a warm-up of their own. Local."""
        mask, behind = ~self.flat.kernels.nonzero(self.arrays["v"]), self._behind()
        for number in range(len(self.counted)):
            part = mask[self.flat.place(number)]
            if part.all():
                self.counted[number] = 0
            elif behind[number]:
                part[:] = False
        self._asleep.fall(mask)
        self._hush(self.m, *(self.arrays[name] for name in self.hushed))

    def _hush(self, *vectors: Vector) -> None:
        """Set what these, (d,), and rules keep of entries that sleep to zero. Local."""
        for array, start in (*((vector, 0) for vector in vectors), *memories(self._rules())):
            self._asleep.hush(array, start)

    def _sent(self) -> Sequence[Vector]:
        return [self.flat.gradients, self.m]

    def _exchange(self, vector: Vector) -> Vector:
        """Return what the rule makes of this rank's vector, nothing for entries that sleep. Collective."""
        rule = self.rules["momentum"]
        result = rule.step(vector)
        if self._asleep.mask is not None:
            self._hush(getattr(rule.state, self.result))
        return result

    def loaded(self) -> None:
        """Derive again what follows from what was written, see :meth:`FlatOptimizer.loaded`. Local."""
        super().loaded()
        if not self.counted:  # in earlier versions no parameter was late
            self.counted = self._where_known(self.steps)
        self._asleep.fall(None)
        if self.frozen_step is not None:
            self._settle(self.frozen_step)

    def _where_known(self, count: int) -> list[int]:
        """Return `count` for every parameter that has a variance, else 0."""
        v = self.arrays["v"]
        return [count if self.flat.kernels.any(v[start:stop]) else 0 for start, stop in pairwise(self.flat.starts)]


class VarianceWatch:
    """Tells when Adam's variance has settled (arXiv 2102.02888, section on when to stop the warm-up).

    That is when the 1-norm of the bias-corrected v is within 4 % of what it was ``1 / (1 - beta2)`` steps ago, and the
    learning rate has not grown since. It is looked at ten times in that period.
    """

    TOLERANCE = 0.96

    def __init__(self, beta2: float) -> None:
        self._beta2, self._period = beta2, max(1, round(0.1 / (1.0 - beta2)))
        self.looks: list[tuple[float, float]] = []

    def settled(self, step: int, v: Vector, lr: float, *, updates: int | None = None) -> bool:
        """Look at v (d,) after step number `step` and so many updates of v; the same answer on all ranks. Local."""
        if step % self._period:
            return False
        norm = backend_of(v).l1_norm(v) / (1.0 - self._beta2 ** (step if updates is None else updates))
        self.looks = [*self.looks[-10:], (norm, lr)]
        if len(self.looks) < 11:
            return False
        old, old_lr = self.looks[0]
        return lr <= old_lr and min(norm, old) >= self.TOLERANCE * max(norm, old) > 0.0


def inverse_roots(v: Vector, factor: float | Sequence[float], starts: Sequence[int], eps: float, floor: float) -> Vector:
    """Return ``1 / (sqrt(factor v) + eps)``, with roots of at least `floor` times the root mean square of their parameter.

    (d,) of the dtype of `v`, (d,); zero where all of a parameter's v is zero. The smallest normal number counts as zero: it
    marks entries that are awake without a variance. `factor` is a number, or one for each parameter; `starts` is where these
    begin, and d.
    """
    at_home = backend_of(v)
    v = at_home.fetch(v)  # seldom: when a variance is frozen
    inverse = np.where(v > np.finfo(v.dtype).tiny, v, v.dtype.type(0))
    for (start, stop), by in zip(pairwise(starts), np.broadcast_to(factor, len(starts) - 1).tolist(), strict=True):
        part = inverse[start:stop]
        least = floor * mean_root(part, by)
        np.sqrt(part * part.dtype.type(by), out=part)
        np.maximum(part, part.dtype.type(least), out=part)
        if least == 0.0 and not part.any():
            continue
        part += part.dtype.type(eps)
        np.divide(1.0, part, out=part, where=part > 0)
    placed: Vector = at_home.place(inverse)
    return placed


def mean_root(v: Vector, factor: float) -> float:
    """Return the root of the mean of ``factor v``."""
    return sqrt(factor * float(backend_of(v).l1_norm(v)) / max(1, v.size))
