"""1-bit Adam: Adam whose momentum travels as signs once its variance has settled."""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Any

from mpi_ef import kernels
from mpi_ef.collectives import Plan, PlanBuilder, build_plan, plan_for
from mpi_ef.comm.consensus import telling
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Sign
from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.ranges import whole

from .variance import VarianceOptimizer, VarianceWatch, inverse_roots

__all__ = ["OneBitAdam", "VarianceWatch", "inverse_roots"]

SIGNS = Sign(block=1024)


class OneBitAdam(VarianceOptimizer):
    """1-bit Adam (Tang et al. 2021, arXiv 2102.02888): dense Adam at first, then compressed momentum, frozen variance.

    The warm-up is Adam on the mean gradient. When the variance has settled it is frozen, and from then on every rank sends
    ``C(beta1 m + (1 - beta1) grad_i + e_i)`` and all take the mean as the new momentum (:func:`mpi_ef.feedback.momentum
    .ef14_momentum`), all parameters in one exchange: three collectives a step, one of them 40 bytes long.

    A parameter that had no gradient in some steps of the warm-up, or in all of them, gets the rest of it when it has one:
    it takes dense steps, in an exchange of their own, until it has had as many as the others, and counts its own steps, as
    in torch. An entry of which no rank had a gradient in the warm-up (a word that did not occur, a dead unit) sleeps: it
    stays where it is, but for weight decay, until any rank has one. In that step ranks exchange a bit for every entry that
    sleeps, and those that wake take part in the signs. Nothing travels for those that sleep on.

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
        all entries alike, and one whose gradients were near zero, or zero until it woke, would fly away.
    clip : float
        Scale all ranks' gradients alike, before and after the freeze, so that the mean over ranks of their squared norms is
        at most ``clip^2``; 0 does not.

    Attributes
    ----------
    frozen_step : int or None
        After how many steps the variance was frozen.
    counted : list of int
        In how many steps each parameter had a gradient: its own warm-up lasts until that is `frozen_step`. 0 where all of
        its entries sleep.
    """

    result = "m"

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

        def facts() -> dict[str, object]:
            least = 1 if freeze_step is None else freeze_step
            whole(type(self).__name__, 1, "the variance needs a step", freeze_step=least)
            return self._shared_facts() | {"freeze_step": freeze_step}

        super().__init__(params, comm, {"lr": lr, "weight_decay": weight_decay}, facts)
        with telling(comm, type(self).__name__, Plan.built):
            momentum = build_plan(plan, comm, compressor, self.flat.d, self.flat.dtype)
        self.rules["momentum"] = ErrorFeedback("ef14-momentum", momentum, beta=betas[0])
        self.arrays["v"] = self._zeros()
        self._inverse: Vector | None = None

    @property
    def m(self) -> Vector:
        """The momentum, (d,), the same on all ranks."""
        momentum: Vector = self.rules["momentum"].state.m  # type: ignore[attr-defined]
        return momentum

    def _update(self) -> None:
        if self.frozen_step is None:
            mean = self._mean(self.flat.gradients)
            for _, part, group, count in self._stretches(self.counted):
                self._adam(part, group, count + 1, mean[part])
        else:
            self._descend(self._exchange(self.flat.gradients))

    def _adam(self, part: slice, group: dict[str, Any], step: int, mean: Vector) -> None:
        """Take a step of Adam on the mean gradient with a part of the vector, the step-th one of its parameters."""
        real, m, v, x, (beta1, beta2) = self.flat.dtype.type, self.m, self.arrays["v"], self.flat.values, self.betas
        (size, decay), root_factor = self._scalars(group, step), 1.0 / sqrt(self._correction(beta2, step))
        kernels.adam(mean, real(beta1), real(beta2), size, real(root_factor), real(self.eps), decay, m[part], v[part],
                     x[part])  # fmt: skip

    def _updated(self) -> None:
        """Freeze the variance if it is time."""
        super()._updated()
        if self.frozen_step is None and self._is_time(self.freeze_step, self.steps + 1):
            self._settle(self.steps + 1)

    def _derive(self) -> None:
        factor = 1.0 / self._correction(self.betas[1], self.frozen_step or 0)
        self._inverse = inverse_roots(self.arrays["v"], factor, self.flat.starts, self.eps, self.variance_floor)

    def _step_late(self, number: int, mean: Vector) -> None:
        self._adam(self.flat.place(number), self._group_of(number), self.counted[number], mean)

    def _descend(self, m: Vector) -> None:
        """Step along the momentum, over the frozen variance."""
        assert self._inverse is not None  # noqa: S101
        for _, part, group, count in self._stretches(self.counted):
            kernels.preconditioned_step(m[part], self._inverse[part], *self._scalars(group, count + 1),
                                        self.flat.values[part])  # fmt: skip

    def _kept(self) -> Sequence[Vector]:
        return [*super()._kept(), self.m]

    def _momenta(self) -> Sequence[Vector]:
        return [self.m]

    def loaded(self) -> None:
        """Derive again what follows from what was written, see :meth:`FlatOptimizer.loaded`. Local."""
        super().loaded()
        if self.frozen_step is not None:
            self._settle(self.frozen_step)
