"""1-bit Adam (Tang et al. 2021, arXiv 2102.02888) without compression."""

from collections.abc import Iterable
from typing import Any

import torch

from .plain import Plain

__all__ = ["OneBitAdam"]


class OneBitAdam(Plain):
    """Adam whose variance is frozen after `freeze_step` steps; options as of :class:`mpi_ef.optim.OneBitAdam`."""

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, freeze_step: int = 10**9, bias_correction: bool = True,
                 variance_floor: float = 0.1) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.betas, self.eps, self.freeze_step = betas, eps, freeze_step
        self.bias_correction, self.variance_floor = bias_correction, variance_floor

    def update(self, p: Any, s: dict[str, Any], lr: float, decay: float) -> None:
        """Take a step; v stays, and has a floor, after the freeze. Entries without variance stay where they are. Local."""
        (b1, b2), frozen = self.betas, self.t > self.freeze_step
        s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * p.grad
        if not frozen:
            s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * p.grad**2
        c1 = 1 - b1**self.t if self.bias_correction else 1
        c2 = 1 - b2 ** min(self.t, self.freeze_step) if self.bias_correction else 1
        root = (s["v"] / c2).sqrt()
        if frozen:
            root = root.clamp(min=float(self.variance_floor * (s["v"] / c2).mean().sqrt()))
        direction = s["m"] / c1 / (root + self.eps)
        if frozen:
            direction = torch.where(root > 0, direction, torch.zeros_like(direction))
        p.mul_(1 - lr * decay).sub_(lr * direction)
