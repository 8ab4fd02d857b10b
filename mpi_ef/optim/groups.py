"""What the groups of a torch optimizer say."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from inspect import signature
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpi_ef.errors import OptionError, briefly
from mpi_ef.ranges import within

__all__ = ["Listed", "check_options", "described", "group_sizes", "hyper_parameters", "names_of", "parameters_of"]


def group_sizes(optimizer: Optimizer) -> str:
    """Return how many parameters each group has, as text."""
    return ", ".join(str(len(group["params"])) for group in optimizer.param_groups)


def described(parameters: Sequence[Tensor], names: Mapping[int, str]) -> dict[str, object]:
    """Return what ranks must agree on of all parameters; `names` are by `id`. Local."""
    every = {f"parameter {number}": f"{names.get(id(p), '')} {tuple(p.shape)} {p.dtype} trained={p.requires_grad}".lstrip()
             for number, p in enumerate(parameters)}
    return {"the number of parameters": len(parameters), **every}


def hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups without their parameters, the names of these, and what ranks cannot compare: see `_is_data`."""
    unlike = ("params", "param_names")
    return [{k: v for k, v in group.items() if k not in unlike and _is_data(v)} for group in optimizer.param_groups]


def _is_data(value: object) -> bool:
    """Tell whether a value is the same text on all ranks if it is the same: not objects, functions, or sets."""
    if isinstance(value, dict):
        return all(map(_is_data, (*value, *value.values())))
    if isinstance(value, tuple | list):
        return all(map(_is_data, value))
    return value is None or isinstance(value, Number | str | bytes | Tensor | np.ndarray | np.generic)


def names_of(optimizer: Optimizer, model: object = None) -> dict[int, str]:
    """Return the names of parameters that were given with names, or have one in a module `model`, by their id."""
    given = {id(p): name for group in optimizer.param_groups
             for p, name in zip(group["params"], group.get("param_names", ()), strict=False)}
    in_model = {id(p): name for name, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
    return in_model | given


def parameters_of(params: Any) -> Any:
    """Return what torch optimizers take: of a module its parameters, with their names."""
    return params.named_parameters() if isinstance(params, nn.Module) else params


@cache
def _options(kind: Any) -> frozenset[str]:
    """Return the options of an optimizer's own constructors and, unless it is given one of torch's, of all of those."""
    own = _constructors(kind.__mro__[: kind.__mro__.index(Optimizer)])
    torch_has = [k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, Optimizer)]
    of_torch = _constructors(torch_has) if any("params" in taken for taken in own) else []
    return frozenset().union(*own, *of_torch) - {"self", "params", "optimizer", "defaults", "comm", "facts", "model"}


def _constructors(kinds: Iterable[type]) -> list[Iterable[str]]:
    """Return the names of what the constructors of classes take."""
    return [signature(vars(k)["__init__"]).parameters.keys() for k in kinds if "__init__" in vars(k)]


def check_options(optimizer: Optimizer) -> None:
    """Raise where a group has an option that is one for all parameters here, or that only other optimizers have.

    And where a learning rate or a weight decay is no number from 0 on. Keys that are options of no optimizer, such as those
    that schedulers and users keep there, may be anything.
    """
    kind: Any = type(optimizer)
    refused = _options(kind)
    for name, value in ((name, group.get(name)) for group in optimizer.param_groups for name in ("lr", "weight_decay")):
        if isinstance(value, str):
            raise OptionError(f"{kind.__name__}: {name}={briefly(value)} is a text; pass a number")
    for key in (key for group in optimizer.param_groups for key in group if key in refused):
        if key not in optimizer.defaults:
            raise OptionError(f"{kind.__name__}: {briefly(key)} in a group of parameters has no effect, groups have "
                              f"{', '.join(optimizer.defaults)}; leave it out, or pass it to the constructor, for all "
                              "parameters, where that has it")
    for group in optimizer.param_groups:
        sizes = {key: group[key] for key in ("lr", "weight_decay") if group.get(key) is not None}
        within(kind.__name__, "[0, inf)", "0 does nothing", **sizes)


class Listed:
    """The parameters that an optimizer was built with; it has no others later, and options by group that have an effect."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._known = self._ids(optimizer)
        self._right: list[list[Any]] = []  # groups that have been looked at

    @staticmethod
    def _ids(optimizer: Optimizer) -> list[int]:
        return list(dict.fromkeys(id(p) for group in optimizer.param_groups for p in group["params"]))

    def check(self, optimizer: Optimizer) -> None:
        """Raise unless it is so; groups may be cut again."""
        now = [[*group, *map(id, group["params"])] for group in optimizer.param_groups]
        if now == self._right:
            return
        check_options(optimizer)
        ids = self._ids(optimizer)
        if ids != self._known:
            if sorted(ids) == sorted(self._known):
                raise OptionError(f"{type(optimizer).__name__}.step: the groups list their parameters in another order than "
                                  "at construction; groups may be cut again, in the same order")
            raise OptionError(f"{type(optimizer).__name__}.step: the groups have other parameters than at construction, of "
                              "which this optimizer would exchange none; build it after all groups are known")
        self._right = now
