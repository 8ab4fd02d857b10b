"""Torch optimizers that others are built around: which can be, and how their state is loaded."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch.optim import Optimizer

from mpi_ef.errors import OptionError, briefly, told
from mpi_ef.ranges import whole

from .flat import FlatOptimizer
from .groups import check_options

__all__ = ["check_inner", "check_saved", "load_inner"]


def check_inner(subject: str, optimizer: object) -> None:
    """Raise `OptionError` unless this is an optimizer of torch whose step needs no closure. Local."""
    if isinstance(optimizer, FlatOptimizer) or not isinstance(optimizer, Optimizer):
        what = type(optimizer).__name__ if isinstance(optimizer, FlatOptimizer) else briefly(optimizer)
        raise OptionError(f"{subject}: optimizer is {what}; pass one of torch's, such as SGD(model.parameters(), lr=0.1)")
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise OptionError(f"{subject}: {type(optimizer).__name__} evaluates the model several times in a step; take an "
                          "optimizer whose step needs no closure")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise OptionError(f"{subject}: SparseAdam takes sparse gradients, which are not exchanged; take Adam, and "
                          "sparse=False in embeddings")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise OptionError(f"{subject}: differentiable=True, for gradients of steps themselves, which are not exchanged; "
                          "leave it out")
    check_options(optimizer)


def check_saved(subject: str, state: object, kind: str, *names: str) -> None:
    """Raise unless a state is of this kind, and has all that it is to have. Local."""
    if not isinstance(state, Mapping) or state.get("kind") != kind:
        raise OptionError(f"{subject}: the state is of something else; load what state_dict() of a {kind} has returned")
    if lost := [name for name in ("optimizer", "done", *names) if name not in state]:
        raise OptionError(f"{subject}: the state has no {briefly(lost[0])}; load all that state_dict() has returned")
    whole(subject, 0, "how many steps were made", done=state["done"])


def load_inner(subject: str, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of a torch optimizer, which is left as it is where torch refuses it. Local."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"{subject}: {type(optimizer).__name__} cannot be loaded ({told(error)}); build it with the "
                          "groups that it was saved with") from error
