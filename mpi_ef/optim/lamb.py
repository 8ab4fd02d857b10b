"""1-bit LAMB: LAMB whose momentum travels as signs once its variance and its trust ratios have settled."""

from collections.abc import Iterable
from itertools import pairwise
from math import fsum, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef import kernels
from mpi_ef.collectives import DenseMean, plan_for
from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import Compressor, Sign
from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback

from .adam import VarianceWatch, inverse_roots
from .replicated import ReplicatedOptimizer, checked
from .wrapper import PlanBuilder

__all__ = ["OneBitLamb"]

SIGNS = Sign(block=1024)
Layers = NDArray[np.float64]


class OneBitLamb(ReplicatedOptimizer):
    """1-bit LAMB (Li et al. 2021, arXiv 2104.06069): dense LAMB at first, then compressed momentum and frozen variance.

    A layer is a parameter. The warm-up is LAMB (You et al. 2020, arXiv 1904.00962) on the mean gradient::

        direction = m / (sqrt(v) + eps) + weight_decay x
        coefficient = ||x|| / ||direction||, within [min_coeff, max_coeff]; 1 where a norm is zero
        x = x - lr coefficient direction

    After the freeze all momenta travel in one exchange, every layer scaled to a common size first, with error feedback
    (:func:`mpi_ef.feedback.rules.ef14`). The coefficient of a layer is then its moving average of the warm-up times a
    factor: the largest quotient of the roots of the frozen variance and of a fresh one. That is made of the gradients that
    must have led from one momentum to the next, the same on all ranks.

    Parameters
    ----------
    params : iterable of parameters or of groups, as for torch optimizers
    comm : MPI.Comm
    lr, betas, eps, weight_decay : as usual for LAMB. Of groups, but betas and eps of all
    compressor : Compressor
    plan : callable, optional
        See :class:`DistributedOptimizer`.
    freeze_step, clip : as OneBitAdam's
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

    Attributes
    ----------
    frozen_step : int or None
        After how many steps variance and coefficients were frozen.
    """

    counters = ("frozen_step", "looks")

    def __init__(
        self,
        params: Iterable[Any],
        comm: Comm,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        compressor: Compressor = SIGNS,
        plan: PlanBuilder = plan_for,
        freeze_step: int | None = None,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        bias_correction: bool = True,
        variance_floor: float = 0.1,
        clip: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.freeze_step, self.bias_correction = betas, eps, freeze_step, bias_correction
        self.max_coeff, self.min_coeff, self.coeff_beta = max_coeff, min_coeff, coeff_beta
        self.factor_max, self.factor_min, self.factor_threshold = factor_max, factor_min, factor_threshold
        self.variance_floor, self.clip = variance_floor, clip
        super().__init__(params, comm, {"lr": lr, "weight_decay": weight_decay}, self._checked_options)
        self.rules["momentum"] = ErrorFeedback("ef14", plan(comm, compressor, self.flat.d, self.flat.dtype))
        self.arrays |= {name: self._zeros() for name in ("m", "v", "fresh")}
        self._starts = np.array(self.flat.starts, np.int64)
        layers = self._starts.size - 1
        self.arrays |= {"scales": np.ones(layers), "averages": np.zeros(layers), "averaged": np.zeros(layers),
                        "factors": np.ones(layers)}  # fmt: skip
        self._dense: DenseMean | None = None
        self._watch, self._direction = VarianceWatch(betas[1]), self._zeros()
        self._inverse: Vector = self._zeros()
        self._least, self._frozen_coefficients = np.zeros(layers), np.ones(layers)
        owners = {id(p): n for n, group in reversed([*enumerate(self.param_groups)]) for p in group["params"]}
        self._owners = np.array([owners[id(p)] for p in self.flat.parameters])
        self.frozen_step: int | None = None

    def _checked_options(self) -> dict[str, object]:
        name, low, high = type(self).__name__, self.factor_min, self.factor_max
        checked(name, all(0.0 <= beta < 1.0 for beta in self.betas),
                f"betas={self.betas} are not in [0, 1); try (0.9, 0.999)")  # fmt: skip
        checked(name, self.freeze_step is None or self.freeze_step >= 1,
                f"freeze_step={self.freeze_step}; the variance needs a step")  # fmt: skip
        checked(name, 0.0 < self.min_coeff <= self.max_coeff,
                f"min_coeff={self.min_coeff}, max_coeff={self.max_coeff} are no bounds; try 0.01 and 10")  # fmt: skip
        checked(name, 0.0 < low <= 1.0 <= high,
                f"factor_min={low}, factor_max={high} are no bounds of 1; try 0.5 and 4")  # fmt: skip
        for option, hint in (("coeff_beta", 0.9), ("factor_threshold", 0.1)):
            value = getattr(self, option)
            checked(name, 0.0 <= value < 1.0, f"{option}={value} is not in [0, 1); try {hint}")
        checked(name, 0.0 <= self.variance_floor <= 1.0,
                f"variance_floor={self.variance_floor} is not in [0, 1]; try 0.1")  # fmt: skip
        checked(name, self.clip >= 0.0, f"clip={self.clip} is negative; 0 does not clip")
        options = ("betas", "eps", "freeze_step", "max_coeff", "min_coeff", "coeff_beta", "factor_max", "factor_min",
                   "factor_threshold", "bias_correction", "variance_floor", "clip")  # fmt: skip
        return {option: getattr(self, option) for option in options}

    @property
    def looks(self) -> list[tuple[float, float]]:
        """What the watch over the variance has seen: norms and learning rates."""
        return self._watch.looks

    @looks.setter
    def looks(self, looks: list[tuple[float, float]]) -> None:
        self._watch.looks = [(norm, lr) for norm, lr in looks]

    def _update(self) -> None:
        if self.frozen_step is None:
            self._warm_up(self.steps + 1)
        else:
            self._follow(self.steps + 1)

    def _correction(self, beta: float, step: int) -> float:
        return 1.0 - beta**step if self.bias_correction else 1.0

    def _of_layers(self, name: str) -> Layers:
        """Return a hyper-parameter of the groups for every layer."""
        values: Layers = np.array([float(group[name]) for group in self.param_groups])[self._owners]
        return values

    def _norms(self, x: Vector) -> Layers:
        norms = np.empty(self._starts.size - 1)
        kernels.layer_norms(x, self._starts, norms)
        return norms

    def _add(self, values: Vector, factors: Layers, out: Vector) -> None:
        kernels.add_layers(values, factors.astype(self.flat.dtype), self._starts, out)

    def _warm_up(self, step: int) -> None:
        """Take a step of LAMB on the mean gradient."""
        if self._dense is None:
            self._dense = DenseMean(self.comm, self.flat.d, self.flat.dtype)
        mean, real, (beta1, beta2) = self._dense.exchange(self.flat.gradients).mean, self.flat.dtype.type, self.betas
        m, v, x, direction = self.arrays["m"], self.arrays["v"], self.flat.values, self._direction
        kernels.update_moments(mean, real(beta1), real(beta2), m, v)
        root_factor = 1.0 / sqrt(self._correction(beta2, step))
        direction.fill(0)
        kernels.adam_step(m, v, real(-1.0 / self._correction(beta1, step)), real(root_factor), real(self.eps), real(0.0),
                          direction)  # fmt: skip
        decays = self._of_layers("weight_decay")
        if decays.any():
            self._add(x, decays, direction)
        self._add(direction, -self._of_layers("lr") * self._coefficients(self._norms(x), self._norms(direction)), x)

    def _updated(self) -> None:
        """Freeze variance and coefficients if it is time."""
        if self.frozen_step is None:
            step, lr = self.steps + 1, max(group["lr"] for group in self.param_groups)
            settled = self._watch.settled(step, self.arrays["v"], lr)
            if settled if self.freeze_step is None else step >= self.freeze_step:
                self._freeze(step)

    def _coefficients(self, of_x: Layers, of_direction: Layers) -> Layers:
        """Return the trust ratios, and take those of layers that have one into their moving averages."""
        seen = (of_x > 0) & (of_direction > 0)
        ratios = np.divide(of_x, of_direction, out=np.ones_like(of_x), where=seen)
        ratios[seen] = ratios[seen].clip(self.min_coeff, self.max_coeff)
        averages = self.arrays["averages"]
        averages[seen] = self.coeff_beta * averages[seen] + (1.0 - self.coeff_beta) * ratios[seen]
        self.arrays["averaged"][seen] += 1
        return ratios

    def _average_coefficients(self) -> Layers:
        """Return what the coefficients were on average at the end of the warm-up; 1 for layers that never had one."""
        averages, averaged, beta3 = self.arrays["averages"], self.arrays["averaged"], self.coeff_beta
        weights = np.array([1.0 - beta3**count if self.bias_correction else 1.0 for count in averaged.tolist()])
        means: Layers = np.divide(averages, weights, out=np.ones_like(weights), where=averaged > 0)
        return means

    def _freeze(self, step: int) -> None:
        """Let variance and coefficients of now hold for good, choose the scales of the layers, and go over to signs."""
        self._settle(step)
        np.copyto(self.arrays["fresh"], self.arrays["v"])
        sizes = np.maximum(np.diff(self._starts), 1)
        mean_squares = np.maximum(self._norms(self.arrays["m"]) / np.sqrt(sizes), self._least)
        alive = mean_squares[mean_squares > 0]
        scales = self.arrays["scales"]
        if alive.size:
            np.divide(fsum(alive) / alive.size, mean_squares, out=scales, where=mean_squares > 0)

    def _settle(self, step: int) -> None:
        """Derive what follows from the step of the freeze."""
        self.frozen_step, v = step, self.arrays["v"]
        if self._dense is not None:
            self._retire(self._dense)
        self._dense = None
        factor = 1.0 / self._correction(self.betas[1], step)
        self._inverse = inverse_roots(v, factor, self.flat.starts, self.eps, self.variance_floor)
        means = [kernels.l1_norm(v[start:stop]) / max(1, stop - start) for start, stop in pairwise(self.flat.starts)]
        self._least = self.variance_floor * np.sqrt(factor * np.array(means))
        self._frozen_coefficients = self._average_coefficients()

    def _follow(self, step: int) -> None:
        """Exchange the new momentum, and step along what all know of it over the frozen variance."""
        real, m, direction, beta1 = self.flat.dtype.type, self.arrays["m"], self._direction, self.betas[0]
        scales = self.arrays["scales"].astype(self.flat.dtype)
        kernels.scaled_momentum(self.flat.gradients, m, real(beta1), scales, self._starts, direction)
        sent = self.rules["momentum"].step(direction)
        ratios = self._refresh(sent, scales, step)
        np.multiply(m, self._inverse, out=direction)
        direction *= real(1.0 / self._correction(beta1, step))
        decays = self._of_layers("weight_decay")
        if decays.any():
            of_momentum = self._norms(direction)
            self._add(self.flat.values, decays, direction)
            whole = self._norms(direction)
            share = np.divide(of_momentum, whole, out=np.ones_like(whole), where=whole > 0).clip(max=1.0)
            ratios = np.where(decays > 0, ratios * share + (1.0 - share), ratios)
        steps = self._of_layers("lr") * self._frozen_coefficients * self._factors(ratios)
        self._add(direction, -steps, self.flat.values)

    def _refresh(self, sent: Vector, scales: Vector, step: int) -> Layers:
        """Take the new momentum over and update the fresh variance; return its ratios to the frozen one."""
        dtype, ratios = self.flat.dtype, np.empty_like(scales)
        root_factor = 1.0 / sqrt(self._correction(self.betas[1], step))
        kernels.follow_momentum(sent, self._inverse, np.array(self.betas, dtype), dtype.type(root_factor),
                                dtype.type(self.eps), scales, self._least.astype(dtype), self._starts, self.arrays["m"],
                                self.arrays["fresh"], ratios)  # fmt: skip
        ratios[ratios == 0] = 1
        return ratios.astype(np.float64)

    def _factors(self, ratios: Layers) -> Layers:
        """Bound the ratios, in themselves and in their change, and remember them."""
        factors, change = self.arrays["factors"], self.factor_threshold
        bounded: Layers = ratios.clip(self.factor_min, self.factor_max)
        bounded = np.clip(bounded, factors * (1.0 - change), factors * (1.0 + change))
        np.copyto(factors, bounded)
        return bounded

    def _loaded(self) -> None:
        if self.frozen_step is not None:
            self._settle(self.frozen_step)
