"""Muon (Jordan et al. 2024) with an exponential average, which EF21-Muon is without compression."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .plain import Plain

__all__ = ["EF21Muon"]


class EF21Muon(Plain):
    """``v = (1 - beta) v + beta grad``, at first grad; a step of lr along U V^T of v, its signs where it is no matrix."""

    def __init__(self, params: Iterable[Any], *, lr: float, beta: float = 0.1, weight_decay: float = 0.0,
                 vector_radius: float = 0.1) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.beta, self.vector_radius = beta, vector_radius

    def update(self, p: Any, s: dict[str, Any], lr: float, decay: float) -> None:
        """Take a step. Local."""
        s["v"] = (1 - self.beta) * s.get("v", p.grad) + self.beta * p.grad
        if p.dim() < 2:
            direction = self.vector_radius * s["v"].sign()
        else:
            matrix = s["v"].reshape(p.shape[0], -1)
            radius = max(1.0, matrix.shape[0] / max(1, matrix.shape[1])) ** 0.5
            direction = radius * newton_schulz(matrix).reshape(p.shape)
        p.mul_(1 - lr * decay).sub_(lr * direction)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return about U V^T of the decomposition U S V^T: a quintic of the singular values, five times. Local."""
    x: Tensor = matrix / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x
