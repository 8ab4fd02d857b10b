"""MKOR: second order from mean vectors, under which updates or gradients travel compressed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal
from weakref import finalize, ref

from torch import Tensor
from torch.optim import Optimizer

from mpi_ef.collectives import PlanBuilder, plan_for
from mpi_ef.collectives.frames import NON_FINITE
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.errors import NonFiniteError
from mpi_ef.feedback import Rule
from mpi_ef.precondition import LayerReport, Preconditioner
from mpi_ef.statetree import StateTree

from .wrapper import DistributedOptimizer

__all__ = ["MKOR"]


class MKOR(DistributedOptimizer):
    """Any torch optimizer with a preconditioner over it and a rule under it. Construction and `step` are collective.

    MKOR (Mozaffari et al. 2023, arXiv 2306.01685): the gradient G of a layer becomes ``P_g G P_a`` before the torch
    optimizer sees it, see :class:`Preconditioner`, whose statistics are vectors, exchanged in every tenth step. Then

    * placement "update", the default: each rank preconditions its own gradient, lets the torch optimizer step, and the rule
      exchanges the updates. Parameters are the same bits on all machines;
    * placement "gradient": the rule exchanges gradients as they are, and all ranks precondition its estimate of their mean:
      the same bits on equal machines.

    A group of the torch optimizer with ``precondition=False`` keeps its gradients. Weight decay, momentum and moments are
    the torch optimizer's, after this; decay that is added to gradients is not preconditioned.

    Parameters
    ----------
    optimizer, comm, compressor, placement, rule, plan, dense_steps, bucket_nbytes, overlap
        As :class:`DistributedOptimizer`'s; further options are those of the rule.
    model, form, sides, every, gamma, window, damping, rescale, stabilizer, exclude, statistics, fallback, fallback_every
        As :class:`Preconditioner`'s.

    Attributes
    ----------
    preconditioner : Preconditioner
    layers : list of LayerReport
        What is done with every layer, see :class:`Preconditioner`; as are `updates`, `restarts`, `fallen_back_at`.
    statistics_nbytes : int
        Of `sent_nbytes`, what the preconditioner has sent.

    Notes
    -----
    What layers saw counts as the gradient does: with GradScaler it is divided by the scale, and clipped with what is clipped
    after ``unscale_``; accumulation adds up; NaN or Inf there on any rank skips the step on all ranks; :meth:`zero_grad`
    forgets it. When an update overflows (`NonFiniteError`), what was learned in that step stays. Saved states and
    checkpoints have what was learned, for any number of ranks. Memory: that of both. In placement "update" gradients are
    copied, as the program's own stay as they are.
    """

    def __init__(self, optimizer: Optimizer, comm: Comm, compressor: Compressor, *, model: object,
                 form: Literal["window", "exact", "blended", "eva", "kfac"] = "window",
                 sides: Literal["both", "inputs", "outputs"] = "both", every: int = 10, gamma: float = 0.95,
                 window: int = 16, damping: float = 0.03, rescale: bool = True, stabilizer: tuple[float, float] = (2.0, 0.9),
                 exclude: Sequence[Any] = (), statistics: Compressor | None = None, fallback: float | None = None,
                 fallback_every: int = 20, placement: Literal["update", "gradient"] = "update", rule: str | Rule = "ef14",
                 plan: PlanBuilder = plan_for, dense_steps: int = 0, bucket_nbytes: int | None = None,
                 overlap: bool = False, **options: Any) -> None:
        super().__init__(optimizer, comm, compressor, placement=placement, rule=rule, plan=plan, dense_steps=dense_steps,
                         bucket_nbytes=bucket_nbytes, overlap=overlap, model=model, **options)
        self._lends = False  # else gradients that are preconditioned would be the program's own
        trained = [p for group in self.param_groups if group.get("precondition", True) for p in group["params"]]
        self.preconditioner = Preconditioner(
            model, comm, form=form, sides=sides, every=every, gamma=gamma, window=window, damping=damping, rescale=rescale,
            stabilizer=stabilizer, exclude=exclude, statistics=statistics, fallback=fallback,
            fallback_every=fallback_every, parameters=trained)
        finalize(self, self.preconditioner.remove_hooks)
        self._gauge = _Gauge(self.preconditioner)

    layers: list[LayerReport] = property(lambda self: self.preconditioner.layers)  # type: ignore[assignment]
    updates: int = property(lambda self: self.preconditioner.updates)  # type: ignore[assignment]
    restarts: int = property(lambda self: self.preconditioner.restarts)  # type: ignore[assignment]
    fallen_back_at: int | None = property(lambda self: self.preconditioner.fallen_back_at)  # type: ignore[assignment]
    statistics_nbytes: int = property(lambda self: self.preconditioner.sent_nbytes)  # type: ignore[assignment]

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank in all exchanges so far, those of the preconditioner too."""
        return super().sent_nbytes + self.statistics_nbytes

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of this rank in "encode", "communicate" and "decode", over all steps so far."""
        return {name: spent + self.preconditioner.plan.seconds[name] for name, spent in super().seconds.items()}

    def note_loss(self, loss: Any) -> None:
        """Take note of this rank's loss in this step, which `fallback` wants; ``step(closure)`` does it by itself. Local.

        Call it after :meth:`zero_grad`, which forgets it.
        """
        self.preconditioner.note_loss(loss)

    def remove_hooks(self) -> None:
        """Take the hooks off the model: nothing is learned from then on. Local, on all ranks."""
        self.preconditioner.remove_hooks()
        self._gauge.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Take all gradients away, as in torch, and forget what layers saw of them. Local."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        self.preconditioner.forget()
        self._gauge.forget()

    def state_tree(self) -> StateTree:
        """Describe the state: that of :class:`DistributedOptimizer`, and what the preconditioner has learned. Local."""
        tree = super().state_tree()
        tree.parts["preconditioner"] = self.preconditioner.state_tree()
        return tree

    def loaded(self) -> None:
        """Derive again what follows from what was written, see :meth:`FlatOptimizer.loaded`. Local."""
        super().loaded()
        self.preconditioner.loaded()
        self._gauge.forget()

    def _ready(self, prepare: Callable[[], None]) -> tuple[int, ...]:
        try:
            return super()._ready(prepare)
        except BaseException:
            self._forget()
            raise

    def _looked(self) -> dict[str, float]:
        words = super()._looked()
        if self.done:
            self.preconditioner.forget()  # as the gradient of a backward pass without step
        if self.preconditioner.due and not self.done:
            scale = getattr(self, "grad_scale", None)  # set by GradScaler while it calls step
            taken_off = 1.0 if scale is None else 1 / float(scale)
            if scale is None and hasattr(self, "found_inf"):  # the program has called unscale_
                taken_off = self._gauge.ratio()
            if not self.preconditioner.close(taken_off):
                words["status"] = NON_FINITE
        return words

    def _step(self, broken: tuple[int, ...]) -> None:
        try:
            if not broken and self.preconditioner.due:
                try:
                    self.preconditioner.exchange(self._handshake.at_work.size / self.comm.Get_size())
                except NonFiniteError as error:  # finite on each rank, not together
                    broken = error.ranks or tuple(range(self.comm.Get_size()))
                    self._rollback()
            super()._step(broken)
        finally:
            self.preconditioner.steps = self.steps
            self._forget()

    def _shape_gradients(self) -> None:
        self.preconditioner.precondition()


class _Gauge:
    """Tells what gradients have been multiplied by since the backward pass, as GradScaler's ``unscale_`` does. Local.

    By the largest of some entries of the first gradient in a backward pass that has one that is not zero.
    """

    def __init__(self, preconditioner: Preconditioner) -> None:
        self._due = preconditioner
        self._p: Tensor | None = None  # which has a gradient in this step
        self._place, self._before = 0, 0.0
        me, handles = ref(self), []
        for p in preconditioner.parameters():
            watch: Any = p.register_post_accumulate_grad_hook
            handles.append(watch(partial(_look, me)))
        self._handles = handles

    def look(self, p: Tensor) -> None:
        """Take note of the largest of the first entries of a gradient, where none that is large enough is known."""
        if not self._due.due or p.grad is None or not p.numel():
            return
        if self._p is None or self._p is p or self._p.grad is None:
            flat = p.grad.detach().reshape(-1)[:_LOOKED_AT]
            self._place = int(flat.abs().argmax())
            self._before = float(flat[self._place])
            self._p = p if abs(self._before) > _LARGE_ENOUGH else None

    def ratio(self) -> float:
        """Return that factor; 1 where there are no gradients."""
        if self._p is None or self._p.grad is None:
            return 1.0
        return float(self._p.grad.detach().reshape(-1)[self._place]) / self._before

    def forget(self) -> None:
        """Begin anew, as in the next step."""
        self._p = None

    def remove(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()


_LOOKED_AT = 4096
_LARGE_ENOUGH = 1e-20  # divided by any scale that is usual it is no subnormal number


def _look(gauge: Any, p: Tensor) -> None:
    found = gauge()
    if found is not None:
        found.look(p)
