"""Optimizers whose update is computed here, on the vector of all parameters, the same on all ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch
from torch.optim import Optimizer

from mpi_ef.collectives import DenseMean, Move
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import aligned_zeros
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, ShapeError
from mpi_ef.feedback import ErrorFeedback

from .accounts import Channel
from .asleep import Asleep
from .flat import FlatOptimizer
from .groups import group_sizes, hyper_parameters, parameters_of

__all__ = ["ReplicatedOptimizer", "checked"]

Value = TypeVar("Value")


def checked(subject: str, fits: bool, text: str) -> None:
    """Raise `OptionError` unless an option fits."""
    if not fits:
        raise OptionError(f"{subject}: {text}")


class NoState(dict[Any, Any]):
    """The `state` of an optimizer whose moments are vectors of all parameters: empty, and nothing can be written to it."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._owner = owner

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise OptionError(f"{self._owner}.state: nothing is there to write to: moments are vectors of all parameters; load "
                          "a state_dict() of the start, or build the optimizer anew, to reset them")  # fmt: skip

    __missing__ = __setitem__ = clear = update = setdefault = __ior__ = _refuse


class ReplicatedOptimizer(FlatOptimizer):
    """What OneBitAdam and its relatives share: groups, named arrays, rules at work, saving and loading.

    A subclass fills `arrays` with vectors that are equal on all ranks, `rules` with its rule, and names in `counters`
    the attributes that are saved as they are, in `later_counters` what those are that states of earlier versions lack.
    """

    counters: tuple[str, ...] = ()
    later_counters: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        params: Iterable[Any],
        comm: Comm,
        defaults: dict[str, Any],
        facts: Callable[[], Mapping[str, object]],
    ) -> None:
        Optimizer.__init__(self, parameters_of(params), defaults)
        self.arrays: dict[str, Vector] = {}
        self.rules: dict[str, ErrorFeedback] = {}
        self._dense: DenseMean | None = None
        self._lay_out(comm, facts, params)
        self._asleep = Asleep(comm)

    @property
    def state(self) -> Any:
        """Nothing, where torch optimizers have moments; writing to it raises `OptionError`."""
        return NoState(type(self).__name__)

    @state.setter
    def state(self, state: Any) -> None:
        if hasattr(self, "arrays"):  # torch's own construction is over
            self.state.update(state)

    def _zeros(self) -> Vector:
        return aligned_zeros(self.flat.d, self.flat.dtype)

    def channels(self) -> Sequence[Channel]:
        """Return what this optimizer speaks through now. Local."""
        return [*self.rules.values(), *([] if self._dense is None else [self._dense])]

    def per_rank(self) -> dict[str, Vector]:
        """Return the arrays of the rules that differ between ranks. Not copies. Local."""
        return self._of_rules(ErrorFeedback.per_rank)

    def replicated(self) -> dict[str, Vector]:
        """Return the arrays, besides the parameters, that are equal on all ranks. Not copies. Local."""
        return self.arrays | self._of_rules(ErrorFeedback.replicated)

    def moves(self) -> dict[str, Move]:
        """Return how each array that may be in :meth:`per_rank` gets to another number of ranks. Local."""
        return self._of_rules(ErrorFeedback.moves)

    def identity(self) -> dict[str, str]:
        """Return what must be the same where a saved state is loaded: optimizer and rules. Local."""
        named = {"optimizer": type(self).__name__, "parameters by group": group_sizes(self)}
        return named | self._of_rules(ErrorFeedback.identity)

    def settings(self) -> dict[str, Any]:
        """Return groups and counters. Not copies. Local."""
        return {"groups": hyper_parameters(self), "counters": self._counters(),
                "rules": {name: feedback.settings() for name, feedback in self.rules.items()}}  # fmt: skip

    def account(self) -> dict[str, Any]:
        """Return the bytes that each rule, and what is there no more, has sent from this rank. Local."""
        others = self.sent_nbytes - sum(feedback.sent_nbytes for feedback in self.rules.values())
        return {"other_nbytes": others, "rules": {name: feedback.account() for name, feedback in self.rules.items()}}

    def load_settings(self, settings: Mapping[str, Any], account: Mapping[str, Any]) -> None:
        """Restore what :meth:`settings` and :meth:`account` returned. Local."""
        for group, values in zip(self.param_groups, settings["groups"], strict=True):
            group.update(values)
        for name, feedback in self.rules.items():
            feedback.load_settings(settings["rules"][name], account.get("rules", {}).get(name, {}))
        self._dense, self._retired_nbytes = None, account.get("other_nbytes", 0)  # it is built again when it is needed
        self._set_counters(settings["counters"])

    def loaded(self) -> None:
        """Derive again what follows from parameters, arrays and settings that were written. Local."""
        super().loaded()
        self._loaded()

    def _counters(self) -> dict[str, Any]:
        return {name: deepcopy(getattr(self, name)) for name in ("steps", "skipped_steps", *self.counters)}

    def _set_counters(self, counters: Mapping[str, Any]) -> None:
        for name, value in {**self.later_counters, **counters}.items():
            setattr(self, name, deepcopy(value))

    def _of_rules(self, kind: Callable[[ErrorFeedback], dict[str, Value]]) -> dict[str, Value]:
        (feedback,) = self.rules.values()
        return kind(feedback)

    def _state_dict(self) -> dict[str, Any]:
        rules = {name: feedback.state_dict() for name, feedback in self.rules.items()}
        for saved in rules.values():  # tensors, because torch.load takes no numpy arrays by default
            saved["arrays"] = {name: torch.from_numpy(array) for name, array in saved["arrays"].items()}
        return {"optimizer": type(self).__name__, "groups": deepcopy(hyper_parameters(self)),
                "arrays": {name: torch.from_numpy(array.copy()) for name, array in self.arrays.items()}, "rules": rules,
                "counters": self._counters(), **self._saved_masters()}  # fmt: skip

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        subject, saved = "load_state_dict", state_dict
        theirs = saved.get("optimizer")
        theirs = f"of {theirs}" if isinstance(theirs, str) else "not of an optimizer of its kind"
        checked(subject, theirs == f"of {type(self).__name__}",
                f"the state is {theirs}, this is {type(self).__name__}; build it as it was")  # fmt: skip
        checked(subject, len(saved["groups"]) == len(self.param_groups),
                f"the saved state has {len(saved['groups'])} groups, here there are {len(self.param_groups)}; build the "
                "optimizer as it was")  # fmt: skip
        for name, array in saved["arrays"].items():
            if name not in self.arrays or tuple(array.shape) != self.arrays[name].shape:
                raise ShapeError(f"{subject}: {name} is {tuple(array.shape)}, here there is no such array; load into the "
                                 "model it was saved from")  # fmt: skip
        rules = {}
        for name, feedback in self.rules.items():
            rules[name] = dict(saved["rules"][name])
            rules[name]["arrays"] = {key: tensor.numpy() for key, tensor in rules[name]["arrays"].items()}
            feedback.check_state_dict(rules[name])
        self._check_masters(saved)
        for group, values in zip(self.param_groups, deepcopy(saved["groups"]), strict=True):
            group.update(values)
        for name, array in saved["arrays"].items():
            np.copyto(self.arrays[name], array.numpy())
        for name, feedback in self.rules.items():
            feedback.load_state_dict(rules[name])
        self._set_counters(saved["counters"])
        self._load_masters(saved)
        self._loaded()

    def _kept(self) -> Sequence[Vector]:
        """Return what a step changes besides the parameters. Local."""
        return list(self.arrays.values())

    def _sent(self) -> Sequence[Vector]:
        return [self.flat.gradients, *self._momenta()]

    def _momenta(self) -> Sequence[Vector]:
        """Return the arrays, (d,), that go into a message besides gradients and errors. Local."""
        return []

    def _mean(self, x: Vector) -> Vector:
        """Return the mean of `x`, of any length that is the same on all ranks, until the next one is taken. Collective."""
        if self._dense is None or self._dense.d != x.size:
            self._retire_dense()
            self._dense = DenseMean(self.comm, x.size, self.flat.dtype)
        return self._dense.exchange(x).mean

    def _retire_dense(self) -> None:
        if self._dense is not None:
            self._retire(self._dense)
            self._dense = None

    def _loaded(self) -> None:
        """Derive again what follows from what was loaded."""
