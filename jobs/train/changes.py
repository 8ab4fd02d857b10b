"""What EF21-PAGE and MARINA send: how the gradient over a batch has changed, and now and then the whole gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.optim.flat import FlatOptimizer

__all__ = ["Changes"]

_COIN = 0xC01  # of the random numbers that decide which steps are whole


class Changes:
    """Gradients of one rank for the rules ef21-page and marina: ``grad_i(x) - grad_i(x_before)`` over one batch.

    The first step, the one after a step that was skipped, and others with probability `whole` take the gradient over all
    samples of the rank instead, the same steps on all ranks. The optimizer has the placement "gradient", without overlap.
    """

    def __init__(self, optimizer: FlatOptimizer, rule: str, *, whole: float, seed: int) -> None:
        self._optimizer, self._rule, self.whole, self._seed = optimizer, rule, whole, seed
        self._before: Vector = optimizer.flat.values.copy()
        self._skipped = -1  # how many steps had been skipped at the last one: the first is whole

    def gradient(self, step: int, batch: Callable[[], float], everything: Callable[[], float]) -> float:
        """Leave in ``p.grad`` the input of the rule in step 1, 2, ..., and return the loss. Local.

        `batch` and `everything` add the gradient of the mean loss over a batch, over all samples of this rank, to
        ``p.grad``, and return that loss.
        """
        optimizer, values = self._optimizer, self._optimizer.flat.values
        channels = [channel for channel in optimizer.channels() if isinstance(channel, ErrorFeedback)]
        dense = self._rule == "marina" and any(channel.steps < channel.dense_steps for channel in channels)
        draw = np.random.default_rng((self._seed, _COIN, step)).random()
        whole = dense or optimizer.skipped_steps != self._skipped or bool(draw < self.whole)
        self._skipped = optimizer.skipped_steps
        loss = everything() if whole else self._change(batch, values)
        self._before[:] = values
        for channel in channels:
            channel.tell(whole=whole) if self._rule == "marina" else channel.tell(full=whole)
        return loss

    def _change(self, batch: Callable[[], float], values: Vector) -> float:
        """Leave in ``p.grad`` what it is over a batch less what it was at the parameters before the last step. Local.

        What is asked of the parameters as they are comes last: MKOR learns from that.
        """
        now = values.copy()
        values[:] = self._before  # parameters are views of it
        try:
            batch()
        finally:
            values[:] = now
        earlier = [(p, p.grad) for p in self._optimizer.flat.parameters if p.grad is not None]
        self._optimizer.zero_grad()
        loss = batch()
        with torch.no_grad():
            for p, gradient in earlier:
                p.grad = -gradient if p.grad is None else p.grad - gradient
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on. Local."""
        before = self._optimizer.flat.kernels.fetch(self._before).copy()
        return {"before": torch.from_numpy(before), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Local."""
        self._before[:] = state["before"].numpy()
        self._skipped = state["skipped"]
