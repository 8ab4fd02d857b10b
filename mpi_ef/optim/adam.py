"""1-bit Adam: Adam whose momentum travels as signs once its variance has settled."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np

from mpi_ef import kernels
from mpi_ef.collectives import DenseMean, plan_for
from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import Compressor, Sign
from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback

from .replicated import ReplicatedOptimizer, checked
from .wrapper import PlanBuilder

__all__ = ["OneBitAdam", "VarianceWatch", "inverse_roots"]

SIGNS = Sign(block=1024)


class OneBitAdam(ReplicatedOptimizer):
    """1-bit Adam (Tang et al. 2021, arXiv 2102.02888): dense Adam at first, then compressed momentum, frozen variance.

    The warm-up is Adam on the mean gradient. When the variance has settled it is frozen, and from then on every rank sends
    ``C(beta1 m + (1 - beta1) grad_i + e_i)`` and all take the mean as the new momentum (:func:`mpi_ef.feedback.momentum
    .ef14_momentum`), all parameters in one exchange: three collectives a step, one of them 40 bytes long.

    Parameters
    ----------
    params : iterable of parameters or of groups, as for torch optimizers
    comm : MPI.Comm
    lr, betas, eps, weight_decay : as torch.optim.AdamW; the decay is decoupled. Of groups, but betas and eps of all
    compressor : Compressor
    plan : callable, optional
        See :class:`DistributedOptimizer`.
    freeze_step : int, optional
        Freeze after so many steps. By default when the variance has settled, see :class:`VarianceWatch`.
    bias_correction : bool
        As in Adam; False is what the original implementation does.
    variance_floor : float
        After the freeze no entry's root mean square counts as less than this share of that of its parameter: signs move
        all entries alike, and one whose gradients were (near) zero would fly away. Where a whole parameter's are zero, it
        stays where it is, but for weight decay.
    clip : float
        Scale all ranks' gradients alike, before and after the freeze, so that the mean over ranks of their squared norms is
        at most ``clip^2``; 0 does not.

    Attributes
    ----------
    frozen_step : int or None
        After how many steps the variance was frozen.
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
        bias_correction: bool = True,
        variance_floor: float = 0.1,
        clip: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.freeze_step, self.bias_correction = betas, eps, freeze_step, bias_correction
        self.variance_floor, self.clip = variance_floor, clip
        self.frozen_step: int | None = None

        def facts() -> dict[str, object]:
            name = type(self).__name__
            checked(
                name, all(0.0 <= beta < 1.0 for beta in betas), f"betas={betas} are not in [0, 1); try (0.9, 0.999)"
            )
            checked(
                name, freeze_step is None or freeze_step >= 1, f"freeze_step={freeze_step}; the variance needs a step"
            )
            checked(name, 0.0 <= variance_floor <= 1.0, f"variance_floor={variance_floor} is not in [0, 1]; try 0.1")
            checked(name, clip >= 0.0, f"clip={clip} is negative; 0 does not clip")
            return {"betas": betas, "eps": eps, "freeze_step": freeze_step, "bias_correction": bias_correction,
                    "variance_floor": variance_floor, "clip": clip}  # fmt: skip

        super().__init__(params, comm, {"lr": lr, "weight_decay": weight_decay}, facts)
        momentum = plan(comm, compressor, self.flat.d, self.flat.dtype)
        self.rules["momentum"] = ErrorFeedback("ef14-momentum", momentum, beta=betas[0])
        self.arrays["v"] = self._zeros()
        self._dense: DenseMean | None = DenseMean(comm, self.flat.d, self.flat.dtype)
        self._watch = VarianceWatch(betas[1])
        self._inverse: Vector | None = None

    @property
    def looks(self) -> list[tuple[float, float]]:
        """What the watch over the variance has seen: norms and learning rates."""
        return self._watch.looks

    @looks.setter
    def looks(self, looks: list[tuple[float, float]]) -> None:
        self._watch.looks = [(norm, lr) for norm, lr in looks]

    @property
    def m(self) -> Vector:
        """The momentum, (d,), the same on all ranks."""
        momentum: Vector = self.rules["momentum"].state.m  # type: ignore[attr-defined]
        return momentum

    def _update(self) -> None:
        if self.frozen_step is None:
            if self._dense is None:  # loaded into an optimizer that was further
                self._dense = DenseMean(self.comm, self.flat.d, self.flat.dtype)
            self._adam(self._dense)
        else:
            m = self.rules["momentum"].step(self.flat.gradients)
            self._descend(m)

    def _adam(self, dense: DenseMean) -> None:
        """Take a step of Adam on the mean gradient."""
        mean, real, step = dense.exchange(self.flat.gradients).mean, self.flat.dtype.type, self.steps + 1
        m, v, (beta1, beta2) = self.m, self.arrays["v"], self.betas
        root_factor = 1.0 / sqrt(self._correction(beta2, step))
        for group, part in self._slices():
            lr = group["lr"]
            kernels.adam(mean[part], real(beta1), real(beta2), real(lr / self._correction(beta1, step)), real(root_factor),
                         real(self.eps), real(1.0 - lr * group["weight_decay"]), m[part], v[part],
                         self.flat.values[part])  # fmt: skip

    def _updated(self) -> None:
        """Freeze the variance if it is time."""
        if self.frozen_step is None:
            step, lr = self.steps + 1, max(group["lr"] for group in self.param_groups)
            settled = self._watch.settled(step, self.arrays["v"], lr)
            if settled if self.freeze_step is None else step >= self.freeze_step:
                self._freeze(step)

    def _correction(self, beta: float, step: int) -> float:
        return 1.0 - beta**step if self.bias_correction else 1.0

    def _freeze(self, step: int) -> None:
        """Let the variance of now hold for good, and go over to signs."""
        self.frozen_step = step
        if self._dense is not None:
            self._retire(self._dense)
        self._dense = None
        factor = 1.0 / self._correction(self.betas[1], step)
        self._inverse = inverse_roots(self.arrays["v"], factor, self.flat.starts, self.eps, self.variance_floor)

    def _descend(self, m: Vector) -> None:
        """Step along the momentum, over the frozen variance."""
        assert self._inverse is not None  # noqa: S101
        real, correction = self.flat.dtype.type, self._correction(self.betas[0], self.steps + 1)
        for group, part in self._slices():
            kernels.preconditioned_step(m[part], self._inverse[part], real(group["lr"] / correction),
                                        real(1.0 - group["lr"] * group["weight_decay"]), self.flat.values[part])  # fmt: skip

    def _kept(self) -> Sequence[Vector]:
        return [*super()._kept(), self.m]

    def _loaded(self) -> None:
        if self.frozen_step is not None:
            self._freeze(self.frozen_step)


class VarianceWatch:
    """Tells when Adam's variance has settled (arXiv 2102.02888, section on when to stop the warm-up).

    That is when the 1-norm of the bias-corrected v is within 4 % of what it was ``1 / (1 - beta2)`` steps ago, and the
    learning rate has not grown since. It is looked at ten times in that period.

    Parameters
    ----------
    beta2 : float
    """

    TOLERANCE = 0.96

    def __init__(self, beta2: float) -> None:
        self._beta2, self._period = beta2, max(1, round(0.1 / (1.0 - beta2)))
        self.looks: list[tuple[float, float]] = []

    def settled(self, step: int, v: Vector, lr: float, *, updates: int | None = None) -> bool:
        """Look at v (d,) after step number `step` and so many updates of v; the same answer on all ranks. Local."""
        if step % self._period:
            return False
        norm = kernels.l1_norm(v) / (1.0 - self._beta2 ** (step if updates is None else updates))
        self.looks = [*self.looks[-10:], (norm, lr)]
        if len(self.looks) < 11:
            return False
        old, old_lr = self.looks[0]
        return lr <= old_lr and min(norm, old) >= self.TOLERANCE * max(norm, old) > 0.0


def inverse_roots(v: Vector, factor: float, starts: list[int], eps: float, floor: float) -> Vector:
    """Return ``1 / (sqrt(factor v) + eps)``, with roots of at least `floor` times the root mean square of their parameter.

    Parameters
    ----------
    v : (d,)
    factor : float
    starts : list of int
        Where parameters begin, and d.
    eps, floor : float

    Returns
    -------
    (d,) of the dtype of v; zero where all of a parameter's v is zero
    """
    inverse = np.sqrt(v * v.dtype.type(factor))
    for start, stop in pairwise(starts):
        part = inverse[start:stop]
        least = floor * sqrt(factor * kernels.l1_norm(v[start:stop]) / max(1, stop - start))
        np.maximum(part, part.dtype.type(least), out=part)
        if least == 0.0 and not part.any():
            continue
        part += part.dtype.type(eps)
        np.divide(1.0, part, out=part, where=part > 0)
    return inverse
