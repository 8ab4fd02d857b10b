"""0/1 Adam: variance from fewer and fewer steps, then steps that need no communication at all."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any

import numpy as np

from mpi_ef import kernels
from mpi_ef.collectives import DenseMean, Move, plan_for
from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import Compressor, Sign, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.feedback.state import form

from .adam import VarianceWatch, inverse_roots
from .replicated import ReplicatedOptimizer, checked
from .runs import Advance, Run, runs
from .wrapper import PlanBuilder

__all__ = ["ZeroOneAdam"]

SIGNS = Sign(block=1024)


class ZeroOneAdam(ReplicatedOptimizer):
    """0/1 Adam (Lu et al. 2022, arXiv 2202.06009): seldom a new variance, signs in between; later steps without exchange.

    *Before the freeze* the exact mean gradient travels only in the steps that update the variance, in which it also goes
    into the momentum; the k-th of them is followed by another one after ``2^((k - 1) // var_update_scaler)`` steps. In all
    other steps gradients travel compressed, with error feedback (:func:`mpi_ef.feedback.rules.ef14`).

    *After the freeze* every rank steps along its own momentum m_i. At a synchronisation the means of these momenta since the
    last one, weighted by learning rates, travel compressed; all ranks go back to where they were the last time, x, and take
    the way of the mean together. With S the sum of learning rates since then and D what weight decay has left of x::

        m_i = beta1 m_i + (1 - beta1) grad_i
        u_i = mean of the m_i since the last synchronisation
        parameters = D x - S u_i / sqrt(v)
        at a synchronisation: m = u = mean_i C(u_i + e_i), x = D x - S u / sqrt(v) on all ranks

    One comes every step at first; every `local_step_scaler` steps the interval doubles, up to `local_step_clipper`.

    Parameters
    ----------
    params : iterable of parameters or of groups, as for torch optimizers
    comm : MPI.Comm
    lr, betas, eps, weight_decay : as torch.optim.AdamW; the decay is decoupled. Of groups, but betas and eps of all
    compressor : Compressor
    plan : callable, optional
        See :class:`DistributedOptimizer`.
    var_freeze_step : int, optional
        Freeze the variance after so many steps. By default when it has settled, see :class:`VarianceWatch`.
    var_update_scaler : int
        kappa: after so many updates of the variance the interval between them doubles.
    local_step_scaler, local_step_clipper : int
        After so many steps the interval between synchronisations doubles; H, the longest one.
    bias_correction, variance_floor, clip : as OneBitAdam's
        The floor holds as soon as something compressed is in the momentum, also before the freeze.

    Attributes
    ----------
    frozen_step : int or None
        After how many steps the variance was frozen.
    variance_updates : int

    Notes
    -----
    Between synchronisations the replicas differ on purpose: see :attr:`synchronized`, and call :meth:`synchronize` before
    parameters of one rank are taken for all, or written to: in between the next step would raise. Parameters follow from the
    optimizer's arrays then, and :meth:`load_state_dict` restores those of every rank.

    The paper exchanges S u_i; divided by S, errors keep the size of the momentum when learning rates fall, and nothing is
    divided by a learning rate of zero. With constant rates and intervals it is the same. Errors are never thrown away: at
    the freeze they change from gradients to momenta, as which ``1 - beta1`` of them counts.
    """

    counters = ("frozen_step", "looks", "variance_updates", "variance_step", "local_steps", "covered", "left", "moved")

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
        var_freeze_step: int | None = None,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        bias_correction: bool = True,
        variance_floor: float = 0.1,
        clip: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.bias_correction = betas, eps, bias_correction
        self.variance_floor, self.clip = variance_floor, clip
        self.var_freeze_step, self.var_update_scaler = var_freeze_step, var_update_scaler
        self.local_step_scaler, self.local_step_clipper = local_step_scaler, local_step_clipper
        counts = {"var_update_scaler": var_update_scaler, "local_step_scaler": local_step_scaler,
                  "local_step_clipper": local_step_clipper}  # fmt: skip

        def facts() -> dict[str, object]:
            name, freeze = type(self).__name__, var_freeze_step
            checked(
                name, all(0.0 <= beta < 1.0 for beta in betas), f"betas={betas} are not in [0, 1); try (0.9, 0.999)"
            )
            checked(name, freeze is None or freeze >= 1, f"var_freeze_step={freeze}; the variance needs a step")
            for option, count in counts.items():
                fits = isinstance(count, int) and count >= 1
                checked(name, fits, f"{option}={count} is not a positive integer; 16 is usual")
            checked(name, 0.0 <= variance_floor <= 1.0, f"variance_floor={variance_floor} is not in [0, 1]; try 0.1")
            checked(name, clip >= 0.0, f"clip={clip} is negative; 0 does not clip")
            return {"betas": betas, "eps": eps, "var_freeze_step": freeze, **counts, "clip": clip,
                    "bias_correction": bias_correction, "variance_floor": variance_floor}  # fmt: skip

        super().__init__(params, comm, {"lr": lr, "weight_decay": weight_decay}, facts)
        self.rules["momentum"] = ErrorFeedback("ef14", plan(comm, compressor, self.flat.d, self.flat.dtype))
        self.arrays.update({name: self._zeros() for name in ("m", "v", "u", "x")})
        self._dense: DenseMean | None = None
        self._watch, self._inverse = VarianceWatch(betas[1]), self._zeros()
        self.frozen_step: int | None = None
        self.variance_updates = self.variance_step = 0
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Count from a synchronisation on: steps, and for every parameter S, D, and whether it has had a gradient."""
        self.local_steps, count = 0, len(self.flat.parameters)
        self.covered, self.left, self.moved = [0.0] * count, [1.0] * count, [False] * count

    def _runs(self, moves: Sequence[bool]) -> Iterator[Run]:
        """Yield the parameters in runs as long as they can be. Local."""
        keys = list(zip(self.covered, self.left, moves, self.moved, strict=True))
        return runs(self.flat.starts, self._slices(), keys)

    @property
    def looks(self) -> list[tuple[float, float]]:
        """What the watch over the variance has seen: norms and learning rates."""
        return self._watch.looks

    @looks.setter
    def looks(self, looks: list[tuple[float, float]]) -> None:
        self._watch.looks = [(norm, lr) for norm, lr in looks]

    @property
    def variance_interval(self) -> int:
        """Steps from the last update of the variance to the next one."""
        return 1 << max(0, self.variance_updates - 1) // self.var_update_scaler

    @property
    def local_step_interval(self) -> int:
        """Steps from one synchronisation to the next, for the next step."""
        if self.frozen_step is None:
            return 1
        doublings = (self.steps - self.frozen_step) // self.local_step_scaler
        return min(self.local_step_clipper, 1 << min(doublings, self.local_step_clipper.bit_length()))

    @property
    def synchronized(self) -> bool:
        """Whether the parameters are the same on all ranks now."""
        return self.local_steps == 0

    def per_rank(self) -> dict[str, Vector]:
        """Return the named arrays that differ between ranks: momenta too, once the variance is frozen. Not copies. Local."""
        own = {} if self.frozen_step is None else {name: self.arrays[name] for name in ("m", "u")}
        return own | super().per_rank()

    def moves(self) -> dict[str, Move]:
        """Return how each array that may be in :meth:`per_rank` gets to another number of ranks: m and u as the mean.

        Between synchronisations replicas are then the same: where the mean of all ranks' steps leads from x. Local.
        """
        return {name: Move("mean") for name in ("m", "u")} | super().moves()

    @property
    def shared_values(self) -> Vector:
        """The parameters, (d,), of now or, where ranks have gone on alone, of the last synchronisation. Not a copy."""
        return self.flat.values if self.synchronized else self.arrays["x"]

    def replicated(self) -> dict[str, Vector]:
        """Return the named arrays that are equal on all ranks: also x, where they were synchronised. Not copies. Local."""
        own = self.per_rank()
        return {name: array for name, array in super().replicated().items() if name not in own}

    def _collect(self) -> Exception | None:
        problem = super()._collect()
        if problem is None and self.frozen_step is not None:
            if self.synchronized:
                np.copyto(self.arrays["x"], self.flat.values)  # where something has been written to them
            elif written := self._written():
                return OptionError(f"ZeroOneAdam.step: {written} was written to between two synchronisations, where each "
                                   "rank has its own values; call optimizer.synchronize() on all ranks first")  # fmt: skip
        return problem

    def _written(self) -> str | None:
        """Return the first parameter that is not where x and u say. Local."""
        real = self.flat.dtype.type
        for run in self._runs(self.moved):
            expected = self.arrays["x"][run.part].copy()
            if run.moved:
                kernels.preconditioned_step(self.arrays["u"][run.part], self._inverse[run.part], real(run.covered),
                                            real(run.left), expected)  # fmt: skip
            if expected.tobytes() != self.flat.values[run.part].tobytes():
                wrong = int((expected != self.flat.values[run.part]).argmax()) + run.part.start
                return self._name(bisect_right(self.flat.starts, wrong) - 1)
        return None

    def _update(self) -> None:
        step = self.steps + 1
        if self.frozen_step is not None:
            self._step_alone()
            return
        if self.variance_updates == 0 or step >= self.variance_step + self.variance_interval:
            self._step_exactly(step)
        else:
            self._step_compressed(step)

    def _updated(self) -> None:
        """Freeze the variance if it is time."""
        if self.frozen_step is not None:
            return
        step, lr = self.steps + 1, max(group["lr"] for group in self.param_groups)
        settled = self._watch.settled(step, self.arrays["v"], lr, updates=self.variance_updates)
        if settled if self.var_freeze_step is None else step >= self.var_freeze_step:
            self._freeze(step)

    def _correction(self, beta: float, step: int) -> float:
        return 1.0 - beta**step if self.bias_correction else 1.0

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Any, Any]:
        """Return the corrected step size and what weight decay leaves, in the dtype of the vectors."""
        real, lr = self.flat.dtype.type, group["lr"]
        return real(lr / self._correction(self.betas[0], step)), real(1.0 - lr * group["weight_decay"])

    def _step_exactly(self, step: int) -> None:
        """Update both moments with the mean gradient, and step: as in Adam while nothing compressed is in the momentum."""
        if self._dense is None:
            self._dense = DenseMean(self.comm, self.flat.d, self.flat.dtype)
        mean, real, (beta1, beta2) = self._dense.exchange(self.flat.gradients).mean, self.flat.dtype.type, self.betas
        m, v, x = self.arrays["m"], self.arrays["v"], self.flat.values
        kernels.update_moments(mean, real(beta1), real(beta2), m, v)
        self.variance_updates, self.variance_step = self.variance_updates + 1, step
        if self.variance_updates < step or self.variance_interval > 1:
            self._divide()
        root_factor = 1.0 / sqrt(self._correction(beta2, self.variance_updates))
        for group, part in self._slices():
            size, decay = self._scalars(group, step)
            if self.variance_updates < step:
                kernels.preconditioned_step(m[part], self._inverse[part], size, decay, x[part])
            else:
                kernels.adam_step(m[part], v[part], size, real(root_factor), real(self.eps), decay, x[part])

    def _step_compressed(self, step: int) -> None:
        """Update the momentum with what all have sent of their gradients, and step over the variance of the last update."""
        beta1, mean = self.flat.dtype.type(self.betas[0]), self.rules["momentum"].step(self.flat.gradients)
        for group, part in self._slices():
            kernels.momentum_step(mean[part], self._inverse[part], beta1, *self._scalars(group, step),
                                  self.arrays["m"][part], self.flat.values[part])  # fmt: skip

    def _divide(self) -> None:
        """Form one over the roots of the variance, whose bias is corrected by the number of its updates."""
        factor = 1.0 / self._correction(self.betas[1], self.variance_updates)
        self._inverse = inverse_roots(self.arrays["v"], factor, self.flat.starts, self.eps, self.variance_floor)

    def _freeze(self, step: int) -> None:
        """Let the variance of now hold for good; what was not sent of gradients becomes what was not sent of momenta."""
        self._settle(step)
        np.copyto(self.arrays["x"], self.flat.values)
        unsent = self.rules["momentum"].per_rank()
        for name in unsent.keys() & {"e_i", "plan.residual"}:
            unsent[name] *= self.flat.dtype.type(1.0 - self.betas[0])

    def _settle(self, step: int) -> None:
        self.frozen_step = step
        if self._dense is not None:
            self._retire(self._dense)
        self._dense = None
        self._divide()

    def _advance(self, run: Run) -> Advance:
        """Return what the next step makes of a run's S and D."""
        if not run.moves:
            return Advance(run.part, 0.0, run.covered, run.left, run.moved)
        decay = 1.0 - run.group["lr"] * run.group["weight_decay"]
        size = run.group["lr"] / self._correction(self.betas[0], self.steps + 1)
        total = decay * run.covered + size
        return Advance(run.part, size / total if total > 0.0 else 1.0, total, decay * run.left, True)

    def _step_alone(self) -> None:
        """Step along this rank's momentum; synchronise if it is time."""
        grad, m, u, x = self.flat.gradients, self.arrays["m"], self.arrays["u"], self.arrays["x"]
        real, beta1, parts = self.flat.dtype.type, self.betas[0], list(self._runs(self.moving.tolist()))
        advances = [self._advance(run) for run in parts]
        if self.local_steps + 1 < self.local_step_interval:
            for run, (part, weight, covered, left, moved) in zip(parts, advances, strict=True):
                if run.moves:
                    kernels.local_step(grad[part], self._inverse[part], x[part], real(beta1), real(weight), real(covered),
                                       real(left), m[part], u[part], self.flat.values[part])  # fmt: skip
                for number in run.numbers:
                    self.covered[number], self.left[number], self.moved[number] = covered, left, moved
            self.local_steps += 1
            return
        # The new u takes the place of the parameters, which follow from x and the old u.
        for run, a in zip(parts, advances, strict=True):
            newest = a.weight * beta1 * lazy(m[a.part]) + a.weight * (1.0 - beta1) * lazy(grad[a.part])
            sent = (1.0 - a.weight) * lazy(u[a.part]) + newest if run.moves else lazy(u[a.part])
            form(sent, into=self.flat.values[a.part])
        self._meet(advances)

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """Let parameters without a gradient stay; with a frozen variance the step itself goes around them."""
        if self.frozen_step is None:
            with super()._resting():
                yield
        else:
            yield

    def _meet(self, advances: list[Advance]) -> None:
        """Exchange the u_i that are in the place of the parameters, and take the way of their mean from x. Collective.

        What has not moved since the last time stays, whatever of its errors has arrived.
        """
        real, x, m = self.flat.dtype.type, self.arrays["x"], self.arrays["m"]
        try:
            mean = self.rules["momentum"].step(self.flat.values)
        except BaseException:
            self._place()
            raise
        for part, _, covered, left, moved in advances:
            if moved:
                kernels.preconditioned_step(mean[part], self._inverse[part], real(covered), real(left), x[part])
                m[part] = mean[part]
        self._start_afresh()
        self._place()

    def _place(self) -> None:
        """Put the parameters where this rank's steps since the last synchronisation lead from x."""
        values, real = self.flat.values, self.flat.dtype.type
        np.copyto(values, self.arrays["x"])
        if self.local_steps:
            for run in self._runs(self.moved):
                if run.moved:
                    kernels.preconditioned_step(self.arrays["u"][run.part], self._inverse[run.part], real(run.covered),
                                                real(run.left), values[run.part])  # fmt: skip

    def synchronize(self) -> None:
        """Synchronise now, between two steps, for example before the model is evaluated or saved. Collective.

        Does nothing when the replicas are the same. The steps that follow are not those without it.
        """
        if not self.synchronized:
            np.copyto(self.flat.values, self.arrays["u"])
            self._meet([self._advance(run) for run in self._runs([False] * len(self.moved))])
            self.flat.publish()

    def check_replicas(self) -> None:
        """Raise on all ranks unless all parameters, those of the last synchronisation, are the same bits. Collective.

        Raises
        ------
        DisagreementError
            With the first parameter that differs, and the ranks that hold what rank 0 does not.
        """
        if self.synchronized:
            super().check_replicas()
            return
        np.copyto(self.flat.values, self.arrays["x"])
        self.flat.publish()
        try:
            super().check_replicas()
        finally:
            self._place()
            self.flat.publish()

    def _kept(self) -> list[Vector]:
        return [self.arrays["m"], self.arrays["v"]]

    def _loaded(self) -> None:
        if self.frozen_step is not None:
            if len(self.covered) != len(self.moved):  # saved by group, in earlier versions
                owners = [n for n, (_, part) in enumerate(self._slices()) for start in self.flat.starts[:-1]
                          if part.start <= start < part.stop]  # fmt: skip
                self.covered, self.left = ([values[n] for n in owners] for values in (self.covered, self.left))
                self.moved = [True] * len(owners)
            self._settle(self.frozen_step)
            self._place()
            self.flat.publish()
        elif self.variance_updates:
            self._divide()
