"""Optimizers that only know directions: Signum and Lion by majority vote, one bit per entry both ways."""

from collections.abc import Callable, Iterable
from dataclasses import InitVar
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpi_ef.collectives import Plan, TwoPhaseMean, plan_for
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Vote
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.ranges import option, with_options
from mpi_ef.vectors import Mask

from .replicated import ReplicatedOptimizer
from .resting import ASKS, AWAKE, QUIET, STIRS

__all__ = ["Lion", "Signum"]

VOTE = Vote()


def _voting(comm: Comm, compressor: Compressor, d: int, dtype: Any, device: str = "cpu") -> Plan:
    """Return the plan that keeps no residual of a vote; see :func:`plan_for`. Collective."""
    if isinstance(compressor, Vote):
        return TwoPhaseMean(comm, compressor, d, dtype, residual=False, device=device)
    return plan_for(comm, compressor, d, dtype, device=device)


@with_options
class Lion(ReplicatedOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675) whose update is what most ranks vote for (arXiv 2404.00438).

    ``x = (1 - lr weight_decay) x - lr sign(mean_i C(beta1 m_i + (1 - beta1) grad_i))``; momenta are state of each rank, see
    :func:`mpi_ef.feedback.momentum.lion`. Cost per step: 40 bytes, and 2 (n - 1) / n bits for every entry.

    sign(0) is 0, as in torch: an entry without momentum and gradient on all ranks stays where it is, but for weight decay.
    Ranks find out which these are in the first step, and when one of these has a gradient, at the cost of the vote; with a
    beta of 0 in every step, unless a rank has none. Where some ranks have one, those that have none vote up in one step and
    down in the next, as for a tie.

    Parameters
    ----------
    params, comm, weight_decay, clip : as :class:`OneBitAdam`'s
    lr : float
        The step of every entry: a third to a tenth of what Adam takes.
    betas : (float, float)
        Weights of the momentum in the vote, and in itself.
    compressor : Compressor
        ``Identity()`` gives Lion on the mean gradient.
    """

    later_counters: ClassVar = {"asleep": None}

    lr: InitVar[float] = 1e-4
    betas: tuple[float, float] = option((0.9, 0.99), "[0, 1)", "try (0.9, 0.99)")
    compressor: InitVar[Compressor] = VOTE

    def __post_init__(self, *arguments: Any) -> None:
        super().__post_init__(*arguments, plan=_voting)  # type: ignore[misc]

    def build(self, plan: Plan) -> None:
        """Make rules and arrays, see :meth:`ReplicatedOptimizer.build`. Local."""
        self.rules["lion"] = ErrorFeedback("lion", plan, beta1=self.betas[0], beta2=self.betas[1])
        self._knows = False  # which entries sleep

    @property
    def asleep(self) -> Tensor | None:
        """The entries that sleep, in bits, of bytes; no byte where none does, and None where that is not known."""
        if not self._knows:
            return None
        mask = self._asleep.mask
        return torch.from_numpy(np.packbits(np.empty(0, bool) if mask is None else mask))

    @asleep.setter
    def asleep(self, bits: Tensor | None) -> None:
        self._knows, mask = bits is not None, None
        if bits is not None and bits.numel():
            mask = np.unpackbits(bits.cpu().numpy(), count=self.flat.d).astype(bool)
        self._asleep.fall(mask)

    def _collect(self) -> None:
        self._handshake.note(sleepers=QUIET)
        super()._collect()
        if not self._knows:
            self._handshake.note(sleepers=AWAKE if self._stirring().all() else ASKS)
        elif self._asleep.stir(self.flat.gradients):
            self._handshake.note(sleepers=STIRS)

    def _ready(self, prepare: Callable[[], None]) -> tuple[int, ...]:
        broken, answers = super()._ready(prepare), self._handshake.answers("sleepers")
        if not broken and (answers == AWAKE).any():
            self._asleep.fall(None)
        elif not broken and answers.any():  # a rank does not know which entries sleep, or has a gradient of one that does
            if (answers == ASKS).any():
                self._asleep.fall(np.ones(self.flat.d, bool))
            self._asleep.wake(self._stirring())
            self._retired_nbytes += self._asleep.sent_nbytes
        return broken

    def _stirring(self) -> Mask:
        """Return which entries have a momentum or a gradient on this rank. Local."""
        stirring: Mask = self.flat.kernels.nonzero(self.flat.gradients)
        if self.betas[0] > 0:
            stirring |= self.flat.kernels.nonzero(self.rules["lion"].per_rank()["m_i"])
        return stirring

    def update(self) -> None:
        """Take the step, see :meth:`FlatOptimizer.update`. Collective."""
        self._knows = False  # until the vote has come to its end
        rule, real = self.rules["lion"], self.flat.dtype.type
        vote = rule.step(self.flat.gradients)
        self._asleep.hush(rule.state.vote)  # type: ignore[attr-defined]
        self._knows = all(self.betas)
        for group, part in self.slices():
            self.flat.kernels.sign_step(vote[part], real(group["lr"]), real(1.0 - group["lr"] * group["weight_decay"]),
                                        self.flat.values[part])


class Signum(Lion):
    """signSGD with momentum and majority vote (Bernstein et al. 2018, arXiv 1802.04434, 1810.05291).

    ``x = (1 - lr weight_decay) x - lr sign(sum_i sign(m_i))``, ``m_i = momentum m_i + (1 - momentum) grad_i``; momentum 0 is
    signSGD. Parameters, and what has no gradient, as :class:`Lion`.
    """

    def __init__(self, params: Iterable[Any], comm: Comm, *, lr: float = 1e-4, momentum: float = 0.9,
                 weight_decay: float = 0.0, compressor: Compressor = VOTE, clip: float = 0.0) -> None:
        super().__init__(params, comm, lr=lr, betas=(momentum, momentum), weight_decay=weight_decay, compressor=compressor,
                         clip=clip)
