"""1-bit Adam: Adam whose momentum travels as signs once its variance has settled."""

from collections.abc import Sequence
from math import sqrt
from typing import Any, ClassVar

from mpi_ef.collectives import Plan
from mpi_ef.compress.combination import Vector
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.ranges import option, with_options

from .variance import VarianceOptimizer, VarianceWatch, inverse_roots

__all__ = ["OneBitAdam", "VarianceWatch", "inverse_roots"]


@with_options
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

    vectors: ClassVar = ("v",)
    result: ClassVar = "m"

    freeze_step: int | None = option(None, 1, "the variance needs a step")

    def _rule(self, plan: Plan) -> ErrorFeedback:
        return ErrorFeedback("ef14-momentum", plan, beta=self.betas[0])

    @property
    def m(self) -> Vector:
        """The momentum, (d,), the same on all ranks."""
        return self.rules["momentum"].state.m  # type: ignore[attr-defined, no-any-return]

    def update(self) -> None:
        """Take the step, see :meth:`FlatOptimizer.update`. Collective."""
        if self.frozen_step is None:
            mean = self.mean(self.flat.gradients)
            for _, part, group, count in self._stretches(self.counted):
                self._adam(part, group, count + 1, mean[part])
        else:
            m = self._exchange(self.flat.gradients)
            for _, part, group, count in self._stretches(self.counted):
                self.flat.kernels.preconditioned_step(m[part], self._inverse[part], *self._scalars(group, count + 1),
                                                      self.flat.values[part])

    def _adam(self, part: slice, group: dict[str, Any], step: int, mean: Vector) -> None:
        """Take a step of Adam on the mean gradient with a part of the vector, the step-th one of its parameters."""
        real, m, v, x, (beta1, beta2) = self.flat.dtype.type, self.m, self.arrays["v"], self.flat.values, self.betas
        (size, decay), root_factor = self._scalars(group, step), 1.0 / sqrt(self._correction(beta2, step))
        self.flat.kernels.adam(mean, real(beta1), real(beta2), size, real(root_factor), real(self.eps), decay, m[part],
                               v[part], x[part])

    def _step_late(self, number: int, group: dict[str, Any], mean: Vector) -> None:
        self._adam(self.flat.place(number), group, self.counted[number], mean)

    def _kept(self) -> Sequence[Vector]:
        return [*super()._kept(), self.m]
