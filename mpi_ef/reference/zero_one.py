"""0/1 Adam (Lu et al. 2022, arXiv 2202.06009) without compression: all its workers in one process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ZeroOneAdam"]

Vector = NDArray[np.float64]


class ZeroOneAdam:
    """Workers whose parameters part and meet again, decay decoupled, in float64: u is a sum, x is undone and redone.

    Parameters
    ----------
    start : (d,) array
        The parameters of all workers at first.
    workers : int
    sizes : sequence of int
        Entries of the layers, of which the variance has a floor each.
    weight_decay : float or (d,) array
    betas, eps, var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper, bias_correction, variance_floor
        As :class:`mpi_ef.optim.ZeroOneAdam`'s.
    """

    def __init__(self, start: ArrayLike, workers: int, *, sizes: Sequence[int], weight_decay: ArrayLike = 0.0,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, var_freeze_step: int = 10**9,
                 var_update_scaler: int = 16, local_step_scaler: int = 32678, local_step_clipper: int = 16,
                 bias_correction: bool = True, variance_floor: float = 0.1) -> None:
        self.sizes, self.weight_decay, self.betas, self.eps = list(sizes), np.asarray(weight_decay), betas, eps
        self.var_freeze_step, self.var_update_scaler = var_freeze_step, var_update_scaler
        self.local_step_scaler, self.local_step_clipper = local_step_scaler, local_step_clipper
        self.bias_correction, self.variance_floor, self.workers = bias_correction, variance_floor, workers
        x = np.array(start, np.float64)
        zero = np.zeros_like(x)
        self.x, self.v, self.m, self.u = [x] * workers, zero, [zero] * workers, [zero] * workers  # x, m, u of every worker
        self.updates = self.last = self.t = 0
        self.interval, self.age = 1, 0  # steps between two meetings, and since the variance was frozen
        self.total, self.left = zero, zero + 1  # what u weighs, and what decay has left, since the last meeting
        self._part()

    def _inverse(self, floor: float) -> Vector:
        """Return 1 / (sqrt(v) + eps) with a floor by layer; 0 in layers without variance."""
        c2 = 1 - self.betas[1] ** self.updates if self.bias_correction else 1.0
        parts: list[Any] = []
        for v in np.split(self.v / c2, np.cumsum(self.sizes)[:-1]):
            root = np.maximum(np.sqrt(v), floor * np.sqrt(v.mean()))
            parts.append(1 / (root + self.eps) if root.any() else 0 * root)
        return np.concatenate(parts)

    def step(self, gradients: Sequence[Vector], lr: ArrayLike, moving: ArrayLike = True) -> bool:
        """Take a step of all workers; tell whether their parameters are the same afterwards. Local.

        Parameters
        ----------
        gradients : sequence of (d,) arrays
            Of every worker, at its own parameters.
        lr : float or (d,) array
        moving : bool or (d,) array of bool
            Which entries have a gradient: the others do not decay.
        """
        self.t += 1
        t, b1, lr = self.t, self.betas[0], np.asarray(lr, np.float64)
        gamma = lr / (1 - b1**t if self.bias_correction else 1.0)
        keep = np.where(moving, 1 - lr * self.weight_decay, 1.0)
        if t <= self.var_freeze_step:
            self._exact(np.mean(gradients, axis=0), gamma, keep)
            return True
        inverse = self._inverse(self.variance_floor)
        self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, gradients, strict=True)]
        self.x = [keep * x - gamma * m * inverse for x, m in zip(self.x, self.m, strict=True)]
        self.u = [keep * u + gamma * m for u, m in zip(self.u, self.m, strict=True)]
        self.total, self.left = keep * self.total + gamma, keep * self.left
        self.since += 1
        meet = bool(self.since >= self.interval)
        if meet:
            mean = np.mean(self.u, axis=0)
            self.x = [self.left * self.start - mean * inverse] * self.workers
            momentum = np.divide(mean, self.total, out=np.mean(self.m, axis=0), where=self.total > 0)
            self.m, self.u = [momentum] * self.workers, [0 * mean] * self.workers
            self._part()
        self.age += 1
        if self.age % self.local_step_scaler == 0:
            self.interval = min(self.local_step_clipper, 2 * self.interval)
        return meet

    def _exact(self, mean: Vector, gamma: Vector, keep: Vector) -> None:
        """Take a step of all workers together; the variance is updated after 1, 1, 2, 2, 4, 4 ... steps."""
        b1, b2 = self.betas
        if not self.updates or self.t - self.last == 2 ** ((self.updates - 1) // self.var_update_scaler):
            self.v = b2 * self.v + (1 - b2) * mean**2
            self.updates, self.last = self.updates + 1, self.t
        m = b1 * self.m[0] + (1 - b1) * mean
        inverse = self._inverse(0.0 if self.updates == self.t else self.variance_floor)
        self.m, self.x = [m] * self.workers, [keep * self.x[0] - gamma * m * inverse] * self.workers
        self._part()

    def _part(self) -> None:
        """Let the workers go ways of their own from here."""
        self.start, self.since = self.x[0], 0
        self.total, self.left = np.zeros_like(self.start), np.ones_like(self.start)
