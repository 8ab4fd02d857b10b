"""Optimizers whose update is computed here, on the vector of all parameters, the same on all ranks."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, field
from typing import Any, ClassVar

from torch.optim import Optimizer

from mpi_ef.collectives import DenseMean, NodeMean, Plan, PlanBuilder, build_plan, plan_for
from mpi_ef.comm.consensus import all_built, shared_errors
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, everywhere
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.ranges import checked, option, with_options
from mpi_ef.statetree import LOCAL, REPLICATED, Leaf, StateTree, attribute

from .accounts import Channel
from .flat import FlatOptimizer
from .groups import group_sizes, hyper_parameters, parameters_of
from .resting import Asleep

__all__ = ["ReplicatedOptimizer"]


class NoState(dict[Any, Any]):
    """The `state` of an optimizer whose moments are vectors of all parameters: empty, and nothing can be written to it."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._owner = owner

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise OptionError(f"{self._owner}.state: nothing is there to write to: moments are vectors of all parameters; load "
                          "a state_dict() of the start, or build the optimizer again, to reset them")

    __missing__ = __setitem__ = clear = update = setdefault = __ior__ = _refuse


@with_options
class ReplicatedOptimizer(FlatOptimizer):
    """What OneBitAdam and its relatives share: groups, named arrays, rules at work, saving and loading.

    Fields are what the constructor takes; ranks agree on those that are kept. :meth:`build` fills `arrays` with vectors
    that are equal on all ranks, and `rules`. `counters` names attributes that are saved as they are, `later_counters`
    those that states of earlier versions lack, with what they are then.
    """

    counters: ClassVar[tuple[str, ...]] = ()
    later_counters: ClassVar[dict[str, Any]] = {}

    params: InitVar[Iterable[Any]] = field(kw_only=False)
    comm: InitVar[Comm] = field(kw_only=False)
    lr: InitVar[float]
    weight_decay: InitVar[float] = 0.0
    compressor: InitVar[Compressor]
    clip: float = option(0.0, "[0, inf)", "0 does not clip")

    def __post_init__(self, params: Iterable[Any], comm: Comm, lr: float, weight_decay: float, compressor: Compressor,
                      plan: PlanBuilder = plan_for) -> None:
        Optimizer.__init__(self, parameters_of(params), {"lr": lr, "weight_decay": weight_decay})
        self.arrays: dict[str, Vector] = {}
        self.rules: dict[str, ErrorFeedback] = {}
        self._dense: DenseMean | None = None
        self._kind = type(self).__name__
        self._lay_out(comm, lambda: checked(self), params)
        self._asleep = Asleep(comm)
        with shared_errors(comm, self._kind, Plan.built):
            built = build_plan(plan, comm, compressor, self.flat.d, self.flat.dtype, self.flat.device)
        if isinstance(built, NodeMean):
            raise everywhere(OptionError(f"{self._kind}: plan=NodeMean keeps parts of vectors of a node, and this optimizer "
                                         "whole ones of a rank; take DistributedOptimizer, or another plan"))
        all_built(comm, self._kind, lambda: self.build(built), "ErrorFeedback")
        if not self.rules:
            raise OptionError(f"{self._kind}.build made no rule; set self.rules[...] = ErrorFeedback(..., plan)")

    @abstractmethod
    def build(self, plan: Plan) -> None:
        """Make the rule, which exchanges through `plan`, and the arrays. Local."""

    @property
    def state(self) -> Any:
        """Nothing, where torch optimizers have moments; writing to it raises `OptionError`."""
        return NoState(type(self).__name__)

    @state.setter
    def state(self, state: Any) -> None:
        if hasattr(self, "arrays"):  # torch's own construction is over
            self.state.update(state)

    def zeros(self) -> Vector:
        """Return a vector for `arrays`, (d,). Local."""
        zeros: Vector = self.flat.kernels.zeros(self.flat.d)
        return zeros

    def channels(self) -> Sequence[Channel]:
        """Return the rules and plans through which this optimizer exchanges now. Local."""
        return [*self.rules.values(), *([] if self._dense is None else [self._dense])]

    def state_tree(self) -> StateTree:
        """Describe arrays, groups, counters and the rules at work. Local."""
        counters = {name: attribute(self, name) for name in ("steps", "skipped_steps", *self.counters)}
        counters |= {name: attribute(self, name, default=default) for name, default in self.later_counters.items()}
        leaves = {
            **{name: Leaf(REPLICATED, array) for name, array in self.arrays.items()},
            "groups": Leaf(REPLICATED, read=lambda: hyper_parameters(self), write=self._set_groups),
            "other_nbytes": Leaf(LOCAL, read=self._other_nbytes, write=self._set_other_nbytes, default=0),
        }
        rules = StateTree(parts={name: feedback.state_tree() for name, feedback in self.rules.items()})
        return StateTree(leaves, {"rules": rules, "counters": StateTree(counters)},
                         {"optimizer": self._kind, "parameters by group": group_sizes(self)})

    def _set_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for group, values in zip(self.param_groups, groups, strict=True):
            group.update(values)

    def _other_nbytes(self) -> int:
        """Return what left this rank besides what its rules have sent."""
        return self.sent_nbytes - sum(feedback.sent_nbytes for feedback in self.rules.values())

    def _set_other_nbytes(self, nbytes: int) -> None:
        self._dense, self._retired_nbytes = None, nbytes  # it is built again when it is needed

    def _kept(self) -> Sequence[Vector]:
        """Return what a step changes besides the parameters. Local."""
        return list(self.arrays.values())

    def mean(self, x: Vector) -> Vector:
        """Return the mean of `x`, of any length that is the same on all ranks, until the next one is taken. Collective."""
        if self._dense is None or self._dense.d != x.size:
            self._retire_dense()
            self._dense = DenseMean(self.comm, x.size, self.flat.dtype, device=self.flat.device)
        return self._dense.exchange(x).mean

    def _retire_dense(self) -> None:
        """Let go of the plan of dense exchanges, but not of its account."""
        if self._dense is not None:
            self._retired_nbytes += self._dense.sent_nbytes
            for name, seconds in self._dense.seconds.items():
                self._retired_seconds[name] += seconds
            self._dense = None
