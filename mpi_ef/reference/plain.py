"""The loop over parameters that all share."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["Plain"]


class Plain(Optimizer):
    """A torch optimizer whose step is one method of a parameter."""

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.t = 0  # the step: 1, 2, ...

    @abstractmethod
    def update(self, p: Any, s: dict[str, Any], lr: float, decay: float) -> None:
        """Change a parameter `p`, which has a gradient, and its state `s`, which is empty at first. Local."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Take one step on ``p.grad``, the mean gradient. Local."""
        self.t += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group["lr"], group["weight_decay"])
