"""Lion (Chen et al. 2023, arXiv 2302.06675) and Signum (Bernstein et al. 2018, arXiv 1802.04434)."""

from collections.abc import Iterable
from typing import Any

import torch

from .plain import Plain

__all__ = ["Lion", "Signum"]


class Lion(Plain):
    """``x = (1 - lr weight_decay) x - lr sign(beta1 m + (1 - beta1) grad)``, then m moves with beta2."""

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.betas = betas

    def update(self, p: Any, s: dict[str, Any], lr: float, decay: float) -> None:
        """Take a step. Local."""
        b1, b2 = self.betas
        m = s.setdefault("m", torch.zeros_like(p))
        vote = (b1 * m + (1 - b1) * p.grad).sign()
        p.mul_(1 - lr * decay).sub_(lr * vote)
        m.mul_(b2).add_((1 - b2) * p.grad)


class Signum(Lion):
    """``m = momentum m + (1 - momentum) grad``, ``x = (1 - lr weight_decay) x - lr sign(m)``."""

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-4, momentum: float = 0.9,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, betas=(momentum, momentum), weight_decay=weight_decay)
