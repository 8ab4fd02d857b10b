"""Torch optimizers over MPI: any torch optimizer with a rule under it, and the papers' own EF21 and EControl."""

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, Literal, overload
from zlib import crc32

import numpy as np
import torch
from torch.optim import SGD, Optimizer

from mpi_ef import kernels
from mpi_ef.collectives import Plan, plan_for
from mpi_ef.collectives.agreement import agree, ranks_text
from mpi_ef.collectives.frames import NON_FINITE, OK, REJECTED
from mpi_ef.collectives.plan import Comm
from mpi_ef.compress import Compressor, TopK
from mpi_ef.errors import MpiEfError, OptionError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.vectors import FlatParameters

__all__ = ["EF21", "DistributedOptimizer", "EControl"]

PlanBuilder = Callable[[Comm, Compressor, int, Any], Plan]


class DistributedOptimizer(Optimizer):
    """Put an error-feedback rule under any torch optimizer. Construction and :meth:`step` are collective.

    Two placements are possible, and the difference matters:

    * ``"update"``: every rank lets the optimizer take its own step with its own gradient; the rule exchanges the
      updates (in parameter units, learning rate included) and all ranks apply the same mean. For Adam-like optimizers:
      their moments see real gradients. The moments are state of each rank.
    * ``"gradient"``: the rule exchanges the gradients and the optimizer sees the rule's estimate of their mean, the
      same on all ranks, so that its own state is replicated. For SGD-like optimizers, EF21 and EControl.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Already built on the model's parameters; any whose step needs no closure. Its groups, hyper-parameters and
        state are shared with this object, so learning-rate schedulers take either.
    comm : MPI.Comm
    compressor : Compressor
        ``TopK(0.01, segments="parameters")`` keeps 1 % of every parameter, at least one entry.
    placement : {"update", "gradient"}
    rule : {"ef14", "ef21", "econtrol"}
    plan : callable, optional
        ``plan(comm, compressor, d, dtype)`` builds the collective, for example the class `TwoPhaseMean`.
        :func:`mpi_ef.collectives.plan_for` by default.
    dense_steps : int
        The first steps exchange whole vectors.
    **options
        Options of the rule, for example ``eta`` of EControl.

    Attributes
    ----------
    feedback : ErrorFeedback
        The rule at work: state, traffic, timing.
    skipped_steps : int
        Steps that all ranks skipped together because some rank's gradient had a NaN or Inf.

    Raises
    ------
    DisagreementError
        On all ranks, when parameters, optimizers or options differ between them.
    DtypeError, OptionError
        When the parameters are not float32 or float64 on the CPU, or an option is out of range.

    Notes
    -----
    The parameters given to the optimizer are broadcast from rank 0 at construction, frozen ones too; what it was not
    given, and buffers, are not. A parameter without gradient takes part with zeros. Memory:
    one gradient vector, the rule's state, and for "update" one more copy of the parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        comm: Comm,
        compressor: Compressor,
        *,
        placement: Literal["update", "gradient"] = "update",
        rule: str = "ef14",
        plan: PlanBuilder = plan_for,
        dense_steps: int = 0,
        **options: float,
    ) -> None:
        self.optimizer, self.placement, self.skipped_steps = optimizer, placement, 0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def facts() -> dict[str, object]:
            if placement not in ("update", "gradient"):
                raise OptionError(
                    f"DistributedOptimizer: placement={placement!r} is unknown; take 'update' or 'gradient'"
                )
            closure = signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is Parameter.empty:
                raise OptionError(
                    f"DistributedOptimizer: {type(optimizer).__name__} evaluates the model several times in a step; "
                    "take an optimizer whose step needs no closure"
                )
            self.flat = FlatParameters(parameters)
            named = {f"parameter {number}": f"{tuple(p.shape)} {p.dtype} trained={p.requires_grad}"
                     for number, p in enumerate(parameters)}  # fmt: skip
            return {"the number of parameters": len(parameters), **named, "the optimizer": type(optimizer).__name__,
                    "hyper-parameters": _hyper_parameters(optimizer), "rule": rule, "options": options,
                    "placement": placement, "dense_steps": dense_steps}  # fmt: skip

        agree(comm, type(self).__name__, facts, "build the same model and optimizer on every rank")
        if isinstance(compressor, TopK) and compressor.segments == "parameters":
            compressor = replace(compressor, segments=tuple(p.numel() for p in self.flat.parameters))
        self.feedback = ErrorFeedback(rule, plan(comm, compressor, self.flat.d, self.flat.dtype),
                                      dense_steps=dense_steps, **options)  # fmt: skip
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()
        self.flat.broadcast(comm)
        self._before = self.flat.values.copy() if placement == "update" else None

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Exchange, and update the parameters; the same bits on all ranks afterwards. Collective.

        When any rank's gradient has a NaN or Inf, all ranks skip the step together, with a warning on rank 0: no
        parameter, moment or error changes.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model once and returns the loss.

        Raises
        ------
        DisagreementError
            On all ranks, when their hyper-parameters or numbers of steps have become different.
        NonFiniteError
            On all ranks, when an update overflowed although all gradients were finite. Parameters and errors are as
            before, the torch optimizer's moments are not.
        ShapeError, DtypeError, OptionError
            On a rank whose parameters or gradients are not usable any more; all other ranks raise `PeerError`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        problem: MpiEfError | None = None
        try:
            self.flat.collect_gradients()
        except MpiEfError as error:
            problem = error
        if broken := self._ready(problem):
            self.skipped_steps += 1
            if self.feedback.plan.rank == 0:
                text = f"step {self.feedback.steps} skipped on all ranks: NaN or Inf in the gradient on {ranks_text(broken)}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        elif self._before is None:
            gradients = self.flat.gradients
            np.copyto(gradients, self.feedback.step(gradients))
            self.optimizer.step()
        else:
            self._exchange_updates(self._before)
        return loss

    def _exchange_updates(self, before: np.ndarray) -> None:
        values = self.flat.values
        np.copyto(before, values)
        self.optimizer.step()
        np.subtract(before, values, out=values)  # for a moment the parameters are this rank's update
        try:
            mean = self.feedback.step(values)
        except BaseException:
            np.copyto(values, before)
            raise
        np.subtract(before, mean, out=values)

    def _ready(self, problem: MpiEfError | None) -> tuple[int, ...]:
        """Return the ranks with a NaN or Inf in their gradient, before any state has seen it; raise what else is wrong.

        Collective. Cost: one allgather of 12 bytes, which also tells whether the ranks still agree.
        """
        plan = self.feedback.plan
        status = REJECTED if problem else OK if kernels.all_finite(self.flat.gradients) else NON_FINITE
        groups = crc32(repr(_hyper_parameters(self.optimizer)).encode())
        answers = np.empty((plan.size, 3), np.uint32)
        plan.comm.Allgather(np.array([status, groups, self.feedback.steps], np.uint32), answers)
        if not answers[:, 0].any() and (answers == answers[0]).all():
            return ()

        def facts() -> dict[str, object]:
            if problem is not None:
                raise problem
            return {"completed steps": self.feedback.steps, "hyper-parameters": _hyper_parameters(self.optimizer)}

        agree(plan.comm, f"{type(self).__name__}.step", facts, "change and load them on all ranks alike")
        return tuple(np.flatnonzero(answers[:, 0]).tolist())

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Set all gradients to zero. They stay views of one vector, also with ``set_to_none=True``. Local."""
        self.flat.zero_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all state of this rank: the torch optimizer's, the rule's, counters. Local; save it per rank."""
        feedback = self.feedback.state_dict()
        # Tensors, because torch.load takes no numpy arrays by default.
        feedback["arrays"] = {name: torch.from_numpy(array) for name, array in feedback["arrays"].items()}
        return {"optimizer": deepcopy(self.optimizer.state_dict()), "feedback": feedback,
                "placement": self.placement, "skipped_steps": self.skipped_steps}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on the same rank of a world of the same size. Local; call on all ranks.

        Parameters are not part of it: load the model's state as well. The next :meth:`step` raises on all ranks when
        some have loaded and others have not.

        Raises
        ------
        OptionError, ShapeError
            When it belongs to another rule, placement, rank, world size or model.
        """
        if state_dict["placement"] != self.placement:
            raise OptionError(f"load_state_dict: the saved placement is {state_dict['placement']!r}, here it is "
                              f"{self.placement!r}; build the optimizer as it was")  # fmt: skip
        feedback = dict(state_dict["feedback"])
        feedback["arrays"] = {name: tensor.numpy() for name, tensor in feedback["arrays"].items()}
        self.feedback.check_state_dict(feedback)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.feedback.load_state_dict(feedback)
        self.skipped_steps = state_dict["skipped_steps"]
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the vector of parameters is laid out at construction."""
        if hasattr(self, "_before"):
            raise OptionError(
                "DistributedOptimizer: a group cannot be added later; build it after all groups are known"
            )
        super().add_param_group(param_group)


def _hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


class EF21(DistributedOptimizer):
    """EF21 (arXiv 2106.05203): SGD along an estimate of the gradient that compression cannot bias away.

    ``x = x - lr * g``, where g follows :func:`mpi_ef.feedback.ef21`. Made for large or full batches.

    Parameters
    ----------
    params : iterable of parameters or of groups, as for torch optimizers
    comm : MPI.Comm
    compressor : Compressor
    lr : float
        gamma. Theory: at most ``1 / (L + L_QM * sqrt(beta / theta))``; in practice larger by powers of two.
    momentum, weight_decay : float
        Of the SGD step that follows, on the aggregated estimate: equal on all ranks.
    dense_steps : int
        1 starts with g_i^0 = grad f_i(x^0), as the authors' code does; 0 with zero.
    plan : callable, optional
        See :class:`DistributedOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        comm: Comm,
        compressor: Compressor,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dense_steps: int = 1,
        plan: PlanBuilder = plan_for,
    ) -> None:
        sgd = SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(sgd, comm, compressor, placement="gradient", rule="ef21", plan=plan, dense_steps=dense_steps)


class EControl(DistributedOptimizer):
    """EControl (arXiv 2311.05645): error feedback whose strength is controlled, for noisy and different gradients.

    ``x = x - lr * h``, where h follows :func:`mpi_ef.feedback.econtrol`.

    Parameters
    ----------
    params : iterable of parameters or of groups, as for torch optimizers
    comm : MPI.Comm
    compressor : Compressor
    lr : float
        gamma.
    eta : float, optional
        Strength of the feedback; 0.3 times the contraction constant by default. Grid worth trying: 0.05, 0.1, 0.3, 1
        times that constant.
    momentum, weight_decay : float
        Of the SGD step that follows, on the aggregated estimate: equal on all ranks.
    dense_steps : int
        1 starts with h_i^0 = grad f_i(x^0), as in the paper; 0 with zero.
    plan : callable, optional
        See :class:`DistributedOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        comm: Comm,
        compressor: Compressor,
        *,
        lr: float,
        eta: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dense_steps: int = 1,
        plan: PlanBuilder = plan_for,
    ) -> None:
        sgd = SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        options = {} if eta is None else {"eta": eta}
        super().__init__(
            sgd, comm, compressor, placement="gradient", rule="econtrol", plan=plan, dense_steps=dense_steps, **options
        )
