"""Any torch optimizer with a rule under it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any, Literal
from weakref import finalize

import numpy as np
import torch
from torch.optim import Optimizer

from mpi_ef.collectives import Plan, PlanBuilder, build_plan, plan_for
from mpi_ef.comm.consensus import agree, shared_errors
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Combination, Compressor, Identity, for_parameters, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import MpiEfError, NonFiniteError, OptionError, briefly, shortage, told
from mpi_ef.feedback import ErrorFeedback, Rule
from mpi_ef.feedback.state import form
from mpi_ef.feedback.table import rule_of
from mpi_ef.kernels.backend import backend_of
from mpi_ef.statetree import PER_RANK, REPLICATED, Leaf, StateTree, attribute
from mpi_ef.vectors import Mask

from .accounts import BucketReport
from .buckets import Bucket, Buckets, bucket_slices
from .flat import FlatOptimizer
from .groups import group_sizes
from .hindsight import Hindsight
from .line import Lane
from .saved import WRAPPED

__all__ = ["BucketReport", "DistributedOptimizer"]

OVERLAPPED_NBYTES = 25_000_000


def _of_inner(name: str) -> Any:
    return property(lambda self: getattr(self.optimizer, name), lambda self, value: setattr(self.optimizer, name, value))


class DistributedOptimizer(FlatOptimizer):
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
        state are those of this object, so learning-rate schedulers take either. It updates float32 masters of parameters in
        16 bits.
    comm : MPI.Comm
    compressor : Compressor
        ``TopK(0.01, segments="parameters")`` keeps 1 % of every parameter, at least one entry.
    placement : {"update", "gradient"}
    rule : str
        A name in :data:`mpi_ef.feedback.RULES`.
    plan : callable or str, optional
        ``plan(comm, compressor, d, dtype)`` builds the collective, for example the class `TwoPhaseMean`, on the
        communicator that it is given; or a specification, ``"my_plan:TrimmedMean(trim=1)"``.
        :func:`mpi_ef.collectives.plan_for` by default.
    dense_steps : int
        The first steps exchange whole vectors.
    bucket_nbytes : int, optional
        Cut the vector into runs of parameters of about so many bytes, each with a rule of its own; by default there is one.
    overlap : bool
        Send a bucket as soon as autograd has made its gradients. Placement "gradient" only; buckets of 25 MB by default.
        They travel on a communicator of their own. The results are the same bits as without. Gradients cannot be clipped or
        unscaled after the backward pass then, and no backward pass can be repeated.
    model : torch.nn.Module, optional
        Whose parameters these are: its buffers are broadcast from rank 0 as well, and errors name its parameters.
    **options
        Options of the rule, for example ``eta`` of EControl.

    Attributes
    ----------
    feedback : ErrorFeedback
        The rule at work: state, traffic, timing. Of the first bucket where there are several.

    Raises
    ------
    DisagreementError
        On all ranks, when parameters, optimizers or options differ between them.
    DtypeError, OptionError
        When the parameters are of a dtype that is not supported or on several devices, or an option is out of range.

    Notes
    -----
    The parameters given to the optimizer are broadcast from rank 0 at construction, frozen ones too, and buffers where
    `model` is given; what it was not given is not. A parameter without gradient on this rank takes part with zeros; one
    without gradient on any rank rests: it stays, with its moments, errors and estimates. Memory: one gradient vector, the
    rule's state, and for "update" one more copy of the parameters.
    """

    _kind = WRAPPED
    _observer: Callable[[list[BucketReport]], None] | None = None

    def __init__(self, optimizer: Optimizer, comm: Comm, compressor: Compressor, *,
                 placement: Literal["update", "gradient"] = "update", rule: str | Rule = "ef14",
                 plan: PlanBuilder = plan_for, dense_steps: int = 0, bucket_nbytes: int | None = None,
                 overlap: bool = False, model: object = None, **options: Any) -> None:
        if isinstance(optimizer, FlatOptimizer):
            raise OptionError(f"{type(self).__name__}: optimizer is {type(optimizer).__name__}, which exchanges already; "
                              "use it as it is, or pass a torch optimizer")
        if not isinstance(optimizer, Optimizer):
            raise OptionError(f"{type(self).__name__}: optimizer={briefly(optimizer)} is no torch optimizer; pass an "
                              "object, for example SGD(model.parameters(), lr=0.1)")
        self.optimizer, self.placement, self.overlaps = optimizer, placement, overlap
        self.__setstate__({})  # torch's own construction, but for groups and state, which the torch optimizer has
        if overlap and bucket_nbytes is None:
            bucket_nbytes = OVERLAPPED_NBYTES

        def facts() -> dict[str, object]:
            self._check_arguments()
            rule_of(rule)[0].check_names(options, type(self).__name__, type(self))
            named = rule if isinstance(rule, str) else rule.name
            return {"the optimizer": type(optimizer).__name__, "rule": named, "options": options, "placement": placement,
                    "dense_steps": dense_steps, "bucket_nbytes": bucket_nbytes, "overlap": overlap,
                    **self._facts()}

        self._exact, self._first = isinstance(compressor, Identity), 0  # the step in which torch makes its memory
        self._lay_out(comm, facts, model)
        buckets, lane, of_buckets = [], None, comm
        if overlap:
            lane = Lane(comm)
            of_buckets = lane.comm
            finalize(self, lane.close)
        for numbers, part in self._slices(bucket_nbytes):
            shapes = tuple(tuple(self.flat.parameters[number].shape) for number in numbers)
            with shared_errors(of_buckets, type(self).__name__, Plan.built):
                bound, d = for_parameters(compressor, shapes), part.stop - part.start
                parted = build_plan(plan, of_buckets, bound, d, self.flat.dtype, self.flat.device,
                                    gather=rule_of(rule)[0].gathers)
            buckets.append(Bucket(numbers, part, ErrorFeedback(rule, parted, dense_steps=dense_steps, **options)))
        self.buckets = Buckets(self.flat, buckets, lane)
        self.feedback, self._quiet = buckets[0].feedback, ExitStack()
        self._hindsight = Hindsight(self.channels())
        self._places = None if self._after is None else self.flat.views(self._after)
        self._lends = placement == "update"
        self._bears = placement == "gradient" and all(bucket.feedback.plan.broken is not None for bucket in buckets)
        if placement == "gradient" and self.feedback.row is not None and len(buckets) == 1 and not overlap:
            self.flat.gather_gradients_in(self.feedback.row)

    def _facts(self) -> dict[str, object]:
        """Return on what else ranks must agree. Local."""
        return {}

    def _slices(self, nbytes: int | None) -> list[tuple[range, slice]]:
        """Return the parameters and the parts of the buckets, see :func:`bucket_slices`. Local."""
        return bucket_slices(self.flat, nbytes)

    def _allocate(self) -> None:
        # One rank that loses nothing need not take its update apart and put it together again, which rounds.
        whole = self.placement == "gradient" or (self.comm.Get_size() == 1 and self._exact)
        # What the torch optimizer makes of the parameters.
        self._after: Vector | None = None if whole else self.flat.kernels.zeros(self.flat.d)

    def _check_arguments(self) -> None:
        optimizer = self.optimizer
        if not (isinstance(self.placement, str) and self.placement in ("update", "gradient")):
            raise OptionError(f"DistributedOptimizer: placement={briefly(self.placement)} is unknown; take 'update' or "
                              "'gradient'")
        if self.overlaps and self.placement == "update":
            raise OptionError("DistributedOptimizer: overlap=True with placement='update', whose updates exist only after "
                              "the backward pass; take placement='gradient', or overlap=False")
        closure = signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            raise OptionError(f"DistributedOptimizer: {type(optimizer).__name__} evaluates the model several times in a "
                              "step; take an optimizer whose step needs no closure")

    # Of the torch optimizer, whoever writes to them: it when it loads its own state, or a user, to either.
    param_groups, state, defaults = _of_inner("param_groups"), _of_inner("state"), _of_inner("defaults")

    def channels(self) -> Sequence[ErrorFeedback]:
        """Return the rules of all buckets. Local."""
        return [bucket.feedback for bucket in self.buckets]

    def state_tree(self) -> StateTree:
        """Describe counters, groups, rules and the torch optimizer's state. Local.

        With placement "update" that has seen this rank's gradients, and differs between ranks.
        """
        inner = self.optimizer
        kind = REPLICATED if self.placement == "gradient" else PER_RANK
        leaves = {
            "steps": attribute(self, "steps"), "skipped_steps": attribute(self, "skipped_steps"),
            "groups": Leaf(REPLICATED, read=lambda: inner.state_dict()["param_groups"],
                           write=lambda groups: self._load_inner(inner.state_dict()["state"], groups)),
            "state": Leaf(kind, read=lambda: inner.state_dict()["state"], default={},
                          write=lambda state: self._load_inner(state, inner.state_dict()["param_groups"])),
        }
        identity = {"optimizer": f"{type(self).__name__} of {type(inner).__name__}", "placement": self.placement,
                    "parameters by group": group_sizes(self), "number of buckets": str(len(self.channels()))}
        return StateTree(leaves, {"rules": self.buckets.state_trees()}, identity)

    def _packed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups, state = state_dict.pop("groups"), state_dict.pop("state")
        return state_dict | {"optimizer": {"state": state, "param_groups": groups}, "feedback": state_dict.pop("rules"),
                             "wrapped optimizer": type(self.optimizer).__name__, "wrapper": type(self).__name__}

    def _unpacked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        inner, wrapped = state_dict["optimizer"], state_dict.get("wrapped optimizer", type(self.optimizer).__name__)
        return state_dict | {"state": inner["state"], "groups": inner["param_groups"], "rules": state_dict["feedback"],
                             "optimizer": f"{state_dict.get('wrapper', type(self).__name__)} of {wrapped}"}

    def _load_inner(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        with self.flat.lent():  # torch rounds moments to the precision of their parameter
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _step_inside(self) -> None:
        """Let the torch optimizer move the parameters that move in this step, in the precision of the vectors. Local."""
        if self.done and self.placement == "update":
            return  # nothing is this rank's part
        with self.flat.lent(self._stepping(), self._places):
            for state in self.optimizer.state.values() if self.flat.mixed else ():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                        state[name] = value.float()  # which was made or loaded in 16 bits, before wrapping for example
            self._shape_gradients()
            self.optimizer.step()

    def _shape_gradients(self) -> None:
        """Change what the torch optimizer sees, in the parameters' ``grad``. Local."""

    def _stepping(self) -> Mask:
        """Return which parameters the torch optimizer moves in this step. Local."""
        return self.moving

    def _now(self) -> Iterable[Bucket]:
        """Return the buckets that are exchanged in this step. Local."""
        return self.buckets

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up without travelling: around all backward passes of a step but the last. Local."""
        self.buckets.paused = True
        try:
            yield
        finally:
            self.buckets.paused = False

    def _ready(self, prepare: Callable[[], None]) -> tuple[int, ...]:
        self._broken: tuple[int, ...] | None = None  # until buckets that are under way have arrived
        try:
            broken = tuple(sorted({*super()._ready(prepare), *(self._broken or ())}))
        except BaseException:
            self._rollback()
            raise
        if broken:
            self._rollback()
        return broken

    def _wait(self) -> None:
        # Buckets are under way already, and all ranks have to take part in all of them before any can raise.
        # Those of parameters at rest, of which no gradient was made, have not left yet. Where ranks are in steps of
        # different optimizers, none comes for what this one has not sent: its next backward pass tells.
        if self.overlaps and self._handshake.same("number"):
            if resting := np.flatnonzero(~self.moving).tolist():
                self._quiet.enter_context(self._silent(resting, *self._sent()))
            self._broken = self.buckets.wait(self.flat.gradients)

    def _rollback(self) -> None:
        if self._broken is not None:
            self.buckets.rollback()
        self._quiet.close()

    @contextmanager
    def _staying(self) -> Iterator[None]:
        with self._quiet, super()._staying():
            yield

    def _rules(self) -> Sequence[tuple[ErrorFeedback, int]]:
        return [(bucket.feedback, bucket.part.start) for bucket in self.buckets]

    def _step(self, broken: tuple[int, ...]) -> None:
        try:
            super()._step(broken)
        except NonFiniteError as error:
            if not self._bears:
                raise
            broken = error.ranks
            super()._step(broken)
        if not broken:
            self._hindsight.look(self.channels(), self.comm.Get_rank())
            self._report()

    def _weigh(self) -> None:
        if self.placement == "gradient":
            super()._weigh()

    def _collect(self) -> None:
        if self.overlaps and hasattr(self, "found_inf"):  # set by GradScaler while it calls step
            raise OptionError("DistributedOptimizer: GradScaler with overlap=True: scaled gradients have left already; "
                              "take overlap=False")
        if self.buckets.problem is not None:  # raised in the backward pass already, by this rank alone
            raise self.buckets.problem
        if self.overlaps and (number := self.buckets.changed()) is not None:
            raise OptionError(f"DistributedOptimizer: the gradient of {self._name(number)} was changed after it had been "
                              "sent, in the backward pass; take overlap=False to clip or clear gradients")
        super()._collect()
        if self._bears and getattr(self, "found_inf", None):  # whatever it was clipped to since
            self.flat.gradients.fill(np.nan)

    def update(self) -> None:
        """Take the step, see :meth:`FlatOptimizer.update`. Collective."""
        if self._after is not None:
            self._exchange_updates(self._after)
        else:
            if self.overlaps:
                self.buckets.commit(self._take_mean)
            else:
                self.buckets.step(self.flat.gradients, self._take_mean)
            if self.steps == self._first:
                agree(self.comm, type(self).__name__, self._step_first, "call the same")
            else:
                self._step_inside()

    def _step_first(self) -> dict[str, object]:
        """Do :meth:`_step_inside` where the torch optimizer makes its memory: where there is none on a rank, all raise."""
        self._step_inside()
        return {}

    def loaded(self) -> None:
        """Derive again what follows from what was written, see :meth:`FlatOptimizer.loaded`. Local."""
        super().loaded()
        self._first = self.steps

    def _take_mean(self, part: slice, mean: Vector) -> None:
        self.flat.gradients[part] = mean

    def _try_inside(self) -> Exception | None:
        """Do :meth:`_step_inside`; what it raises on this rank alone goes into the exchange, where the others are."""
        try:
            self._step_inside()
        except Exception as error:
            short = shortage(type(self).__name__, error)
            said = short or OptionError(f"{type(self.optimizer).__name__}.step: {told(error)}")
            for bucket in self._now():
                bucket.feedback.refuse(said)
            if short is not None:
                short.__cause__ = error
            return short or error
        return None

    def _exchange_updates(self, after: Vector) -> None:
        """Let the torch optimizer step in `after`, (d,), and take the mean of what that is less than before."""
        values = self.flat.values
        after[:] = values
        problem = self._try_inside()
        update: Vector | Combination = lazy(values) - after
        if self.weight != 1.0 or self.feedback.rule.most_terms == 1:
            update = form(lazy(values) - after, into=after)
            if self.weight != 1.0:
                after *= self.flat.dtype.type(self.weight)

        def take(part: slice, mean: Vector) -> None:
            self.flat.kernels.subtract(mean, values[part])

        try:
            self.buckets.step(update, take)
        except MpiEfError:
            if problem is not None:
                raise problem from problem.__cause__
            raise

    @property
    def observer(self) -> Callable[[list[BucketReport]], None] | None:
        """Called after every whole step with a list of :class:`BucketReport`; None, as at first, costs nothing.

        Measuring takes passes over memory of its own.
        """
        return self._observer

    @observer.setter
    def observer(self, observer: Callable[[list[BucketReport]], None] | None) -> None:
        self._observer = observer
        self._accounts = self._account()
        self.watch(observer is not None)

    def _account(self) -> list[tuple[int, dict[str, float]]]:
        """Return what every bucket has sent so far, and how long that took. Local."""
        return [(channel.sent_nbytes, channel.seconds) for channel in self.channels()]

    def _report(self) -> None:
        if self._observer is None:
            return
        reports, accounts = [], self._accounts
        self._accounts = self._account()
        for n, (channel, old, new) in enumerate(zip(self.channels(), accounts, self._accounts, strict=True)):
            norms = {name: backend_of(a).norm(a) for name, a in (channel.per_rank() | channel.replicated()).items()}
            seconds = {name: spent - old[1][name] for name, spent in new[1].items()}
            traffic = channel.plan.traffic
            reports.append(BucketReport(self.steps, n, new[0] - old[0], traffic.dense_nbytes, channel.plan.lost, norms,
                                        seconds))
            channel.plan.lost = None
        self._observer(reports)
