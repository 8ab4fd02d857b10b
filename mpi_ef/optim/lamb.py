"""1-bit LAMB: LAMB whose momentum travels as signs once its variance and its trust ratios have settled."""

from collections.abc import Iterator
from itertools import pairwise
from math import fsum, sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import Plan
from mpi_ef.compress.combination import Vector
from mpi_ef.ranges import option, with_options

from .variance import VarianceOptimizer, mean_root

__all__ = ["OneBitLamb"]

Layers = NDArray[np.float64]
LayerRun = tuple[slice, slice, dict[str, Any], int]


@with_options
class OneBitLamb(VarianceOptimizer):
    """1-bit LAMB (Li et al. 2021, arXiv 2104.06069): dense LAMB at first, then compressed momentum and frozen variance.

    A layer is a parameter. The warm-up is LAMB (You et al. 2020, arXiv 1904.00962) on the mean gradient::

        direction = m / (sqrt(v) + eps) + weight_decay x
        coefficient = ||x|| / ||direction||, within [min_coeff, max_coeff]; 1 where a norm is zero
        x = x - lr coefficient direction

    After the freeze all momenta travel in one exchange, every layer scaled to a common size first, with error feedback
    (:func:`mpi_ef.feedback.rules.ef14`). The coefficient of a layer is then its moving average of the warm-up times a
    factor: the largest quotient of the roots of the frozen variance and of a fresh one. That is made of the gradients that
    must have led from one momentum to the next, the same on all ranks.

    Layers that had no gradient in steps of the warm-up have one of their own, and entries without a gradient sleep, as with
    :class:`OneBitAdam`; such a layer is scaled to the size that the others have when it joins them.

    Parameters
    ----------
    params, comm, lr, betas, eps, weight_decay, compressor, plan, freeze_step, clip : as :class:`OneBitAdam`'s
    max_coeff, min_coeff : float
        Bounds of the coefficients of the warm-up.
    coeff_beta : float
        Weight of the past in their moving average, beta3.
    factor_max, factor_min, factor_threshold : float
        Bounds of the factor, and by which share it may change in a step.
    bias_correction : bool
        Of momentum, variance and average coefficient; False is what the original implementation does.
    variance_floor : float
        As OneBitAdam's, for the frozen variance and the fresh one. A layer's momentum does not count as smaller than this
        share of the root of its mean variance when its scale is chosen.
    """

    vectors: ClassVar = ("m", "v", "fresh")
    hushed: ClassVar = ("fresh",)

    freeze_step: int | None = option(None, 1, "the variance needs a step")
    max_coeff: float = option(10.0, "(0, inf)", "10 is usual")
    min_coeff: float = option(0.01, "(0, {max_coeff}]", "0.01 and 10 are usual")
    coeff_beta: float = option(0.9, "[0, 1)", "0.9 is usual")
    factor_max: float = option(4.0, "[1, inf)", "4 is usual")
    factor_min: float = option(0.5, "(0, 1]", "0.5 is usual")
    factor_threshold: float = option(0.1, "[0, 1)", "0.1 is usual")

    def build(self, plan: Plan) -> None:
        """Make rules and arrays, see :meth:`ReplicatedOptimizer.build`. Local."""
        super().build(plan)
        self._starts = np.array(self.flat.starts, np.int64)
        layers = self._starts.size - 1
        self.arrays |= {"scales": np.ones(layers), "averages": np.zeros(layers), "averaged": np.zeros(layers),
                        "factors": np.ones(layers)}
        self._direction, self._least, self._frozen_coefficients = self.zeros(), np.zeros(layers), np.ones(layers)

    def update(self) -> None:
        """Take the step, see :meth:`FlatOptimizer.update`. Collective."""
        if self.frozen_step is None:
            mean = self.mean(self.flat.gradients)
            for layers, part, group, count in self._runs():
                self._lamb(layers, part, group, count + 1, mean[part])
        else:
            self._follow()

    def _runs(self) -> Iterator[LayerRun]:
        """Yield layers of a group that have had a gradient in equally many steps: which, where, the group, that number."""
        for numbers, part, group, count in self._stretches(self.counted):
            yield slice(numbers.start, numbers.stop), part, group, count

    def _of_layers(self, name: str) -> Layers:
        """Return a hyper-parameter of the groups for every layer."""
        return np.array([float(group[name]) for group in self._groups])

    def _starts_in(self, layers: slice) -> NDArray[np.int64]:
        """Return where these layers begin, and end, in their own part of the vectors."""
        starts: NDArray[np.int64] = self._starts[layers.start : layers.stop + 1] - self._starts[layers.start]
        return starts

    def _norms(self, x: Vector, starts: NDArray[np.int64]) -> Layers:
        norms = np.empty(starts.size - 1)
        self.flat.kernels.layer_norms(x, starts, norms)
        return norms

    def _add(self, values: Vector, factors: Layers, starts: NDArray[np.int64], out: Vector) -> None:
        self.flat.kernels.add_layers(values, factors.astype(self.flat.dtype), starts, out)

    def _lamb(self, layers: slice, part: slice, group: dict[str, Any], step: int, mean: Vector) -> None:
        """Take a step of LAMB on the mean gradient with some layers, the step-th one of theirs."""
        real, starts, (beta1, beta2) = self.flat.dtype.type, self._starts_in(layers), self.betas
        m, v, x, direction = (a[part] for a in (self.m, self.arrays["v"], self.flat.values, self._direction))
        self.flat.kernels.update_moments(mean, real(beta1), real(beta2), m, v)
        root_factor = 1.0 / sqrt(self._correction(beta2, step))
        direction.fill(0)
        self.flat.kernels.adam_step(m, v, real(-1.0 / self._correction(beta1, step)), real(root_factor), real(self.eps),
                                    real(0.0), direction)
        if decay := float(group["weight_decay"]):
            self._add(x, np.full(starts.size - 1, decay), starts, direction)
        coefficients = self._coefficients(layers, self._norms(x, starts), self._norms(direction, starts))
        self._add(direction, -float(group["lr"]) * coefficients, starts, x)

    def _coefficients(self, layers: slice, of_x: Layers, of_direction: Layers) -> Layers:
        """Return the trust ratios, and take those of layers that have one into their moving averages."""
        seen = (of_x > 0) & (of_direction > 0)
        ratios = np.divide(of_x, of_direction, out=np.ones_like(of_x), where=seen)
        ratios[seen] = ratios[seen].clip(self.min_coeff, self.max_coeff)
        averages = self.arrays["averages"][layers]
        averages[seen] = self.coeff_beta * averages[seen] + (1.0 - self.coeff_beta) * ratios[seen]
        self.arrays["averaged"][layers][seen] += 1
        return ratios

    def _freeze(self, step: int) -> None:
        """Let variance and coefficients of now hold for good, choose the scales of the layers, and go over to signs."""
        super()._freeze(step)
        self.arrays["fresh"][:] = self.arrays["v"]
        sizes = self._sizes()
        alive = (sizes > 0) & ~self._behind()
        np.divide(fsum(sizes[alive]) / max(1, alive.sum()), sizes, out=self.arrays["scales"], where=alive)

    def _sizes(self) -> Layers:
        """Return the root mean squares of the layers' momenta, as far as they count for a scale."""
        entries = np.maximum(np.diff(self._starts), 1)
        sizes: Layers = np.maximum(self._norms(self.m, self._starts) / np.sqrt(entries), self._least)
        return sizes

    def _derive(self) -> None:
        super()._derive()
        factor, v = self._factor(self.frozen_step or 0), self.arrays["v"]
        roots = [mean_root(v[start:stop], factor) for start, stop in pairwise(self.flat.starts)]
        self._least = self.variance_floor * np.array(roots)
        # What the coefficients were on average at the end of the warm-up; 1 for layers that never had one.
        averages, averaged, beta3 = self.arrays["averages"], self.arrays["averaged"], self.coeff_beta
        weights = np.array([1.0 - beta3**count if self.bias_correction else 1.0 for count in averaged.tolist()])
        self._frozen_coefficients = np.divide(averages, weights, out=np.ones_like(weights), where=averaged > 0)

    def _step_late(self, number: int, group: dict[str, Any], mean: Vector) -> None:
        self._lamb(slice(number, number + 1), self.flat.place(number), group, self.counted[number], mean)

    def _join(self, numbers: list[int]) -> None:
        """Scale the momenta of the new layers to the size that those of the others have now."""
        others, scales = ~self._behind(), self.arrays["scales"]
        others[numbers] = False
        super()._join(numbers)
        sizes = self._sizes()
        others &= sizes > 0
        common = fsum((scales * sizes)[others]) / max(1, others.sum())
        for number in numbers:
            place = self.flat.place(number)
            self.arrays["fresh"][place] = self.arrays["v"][place]
            scales[number] = common / sizes[number] if common > 0 and sizes[number] > 0 else 1.0

    def _follow(self) -> None:
        """Exchange the new momentum, and step along what all know of it over the frozen variance."""
        real, m, direction, beta1 = self.flat.dtype.type, self.m, self._direction, self.betas[0]
        scales, starts = self.arrays["scales"].astype(self.flat.dtype), self._starts
        self.flat.kernels.scaled_momentum(self.flat.gradients, m, real(beta1), scales, starts, direction)
        sent = self._exchange(direction)
        runs = list(self._runs())
        ratios = self._refresh(sent, scales, runs)
        direction[:] = m
        direction *= self._inverse
        for _, part, _, count in runs:
            direction[part] *= real(1.0 / self._correction(beta1, count + 1))
        decays = self._of_layers("weight_decay")
        if decays.any():
            of_momentum = self._norms(direction, starts)
            self._add(self.flat.values, decays, starts, direction)
            whole = self._norms(direction, starts)
            share = np.divide(of_momentum, whole, out=np.ones_like(whole), where=whole > 0).clip(max=1.0)
            ratios = np.where(decays > 0, ratios * share + (1.0 - share), ratios)
        factors, change = self.arrays["factors"], self.factor_threshold  # bounded, in themselves and in their change
        bounded = ratios.clip(self.factor_min, self.factor_max)
        np.clip(bounded, factors * (1.0 - change), factors * (1.0 + change), out=factors)
        steps = self._of_layers("lr") * self._frozen_coefficients * factors
        self._add(direction, -steps, starts, self.flat.values)

    def _refresh(self, sent: Vector, scales: Vector, runs: list[LayerRun]) -> Layers:
        """Take the new momentum over and update the fresh variance; return its ratios to the frozen one."""
        real, ratios, m, fresh = self.flat.dtype.type, np.zeros_like(scales), self.m, self.arrays["fresh"]
        asleep, inverse = self._asleep.mask, self._inverse
        if asleep is not None:  # they have no part in the ratio of their layer
            inverse = inverse.copy()
            self._asleep.hush(inverse)
        betas, least = np.array(self.betas, self.flat.dtype), self._least.astype(self.flat.dtype)
        for layers, part, _, count in runs:
            root_factor = 1.0 / sqrt(self._correction(self.betas[1], count + 1))
            self.flat.kernels.follow_momentum(sent[part], inverse[part], betas, real(root_factor), real(self.eps),
                                              scales[layers], least[layers], self._starts_in(layers), m[part],
                                              fresh[part], ratios[layers])
        ratios[ratios == 0] = 1
        return ratios.astype(np.float64)
