"""1-bit LAMB (Li et al. 2021, arXiv 2104.06069) without compression."""

from collections.abc import Iterable
from typing import Any

import torch

from .plain import Plain

__all__ = ["OneBitLamb"]


class OneBitLamb(Plain):
    """LAMB whose variance and coefficients are frozen; options as of :class:`mpi_ef.optim.OneBitLamb`."""

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, freeze_step: int = 10**9, max_coeff: float = 10.0,
                 min_coeff: float = 0.01, coeff_beta: float = 0.9, factor_max: float = 4.0, factor_min: float = 0.5,
                 factor_threshold: float = 0.1, bias_correction: bool = True, variance_floor: float = 0.1) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.betas, self.eps, self.freeze_step = betas, eps, freeze_step
        self.max_coeff, self.min_coeff, self.coeff_beta = max_coeff, min_coeff, coeff_beta
        self.factor_max, self.factor_min, self.factor_threshold = factor_max, factor_min, factor_threshold
        self.bias_correction, self.variance_floor = bias_correction, variance_floor
        self.factors: list[float] = []  # by which frozen coefficients were multiplied, of every layer and step

    def _correction(self, beta: float, t: int) -> float:
        return 1 - beta**t if self.bias_correction else 1.0

    def update(self, p: Any, s: dict[str, Any], lr: float, decay: float) -> None:
        """Take a step of the warm-up, or one after it. Local."""
        if not s:
            s |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "average": 0.0, "counted": 0, "factor": 1.0}
        (self._warm_up if self.t <= self.freeze_step else self._follow)(p, s, lr, decay)

    def _warm_up(self, p: Any, s: dict[str, Any], lr: float, decay: float) -> None:
        (b1, b2), t = self.betas, self.t
        s["m"] = b1 * s["m"] + (1 - b1) * p.grad
        s["v"] = b2 * s["v"] + (1 - b2) * p.grad**2
        m, v = s["m"] / self._correction(b1, t), s["v"] / self._correction(b2, t)
        update = m / (v.sqrt() + self.eps) + decay * p
        coefficient, of_p, of_update = 1.0, float(p.norm()), float(update.norm())
        if of_p and of_update:
            coefficient = min(max(of_p / of_update, self.min_coeff), self.max_coeff)
            s["average"] = self.coeff_beta * s["average"] + (1 - self.coeff_beta) * coefficient
            s["counted"] += 1
        p.sub_(lr * coefficient * update)
        s["fresh"] = s["v"].clone()

    def _follow(self, p: Any, s: dict[str, Any], lr: float, decay: float) -> None:
        (b1, b2), t = self.betas, self.t
        v = s["v"] / self._correction(b2, self.freeze_step)
        least, alive = float(self.variance_floor * v.mean().sqrt()), bool(v.any())
        old, s["m"] = s["m"], b1 * s["m"] + (1 - b1) * p.grad
        rebuilt = (s["m"] - b1 * old) / (1 - b1)  # the gradient that must have led from one momentum to the next
        s["fresh"] = b2 * s["fresh"] + (1 - b2) * rebuilt**2
        root = v.sqrt().clamp(min=least) + self.eps
        fresh_root = (s["fresh"] / self._correction(b2, t)).sqrt().clamp(min=least) + self.eps
        direction = s["m"] / self._correction(b1, t) / root if alive else torch.zeros_like(p)
        update, factor = direction + decay * p, float((root / fresh_root).max()) if alive else 1.0
        if decay > 0:
            share = min(1.0, float(direction.norm() / update.norm())) if update.any() else 1.0
            factor = factor * share + 1 - share
        factor = min(max(factor, self.factor_min), self.factor_max)
        most = self.factor_threshold
        s["factor"] = factor = min(max(factor, s["factor"] * (1 - most)), s["factor"] * (1 + most))
        self.factors.append(factor)
        coefficient = s["average"] / self._correction(self.coeff_beta, s["counted"]) if s["counted"] else 1.0
        p.sub_(lr * coefficient * factor * update)
