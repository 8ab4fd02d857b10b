"""What the groups of a torch optimizer say."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from mpi_ef.errors import OptionError

__all__ = ["check_listed", "group_sizes", "hyper_parameters", "listed", "names_of", "parameters_of"]


def group_sizes(optimizer: Optimizer) -> str:
    """Return how many parameters each group has, as text."""
    return ", ".join(str(len(group["params"])) for group in optimizer.param_groups)


def hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups without their parameters and the names of these."""
    unlike = ("params", "param_names")
    return [{k: v for k, v in group.items() if k not in unlike} for group in optimizer.param_groups]


def names_of(optimizer: Optimizer, model: object = None) -> dict[int, str]:
    """Return the names of parameters that were given with names, or have one in a module `model`, by their id."""
    given = {id(p): name for group in optimizer.param_groups
             for p, name in zip(group["params"], group.get("param_names", ()), strict=False)}  # fmt: skip
    in_model = {id(p): name for name, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
    return in_model | given


def parameters_of(params: Any) -> Any:
    """Return what torch optimizers take: of a module its parameters, with their names."""
    return params.named_parameters() if isinstance(params, nn.Module) else params


def listed(optimizer: Optimizer) -> list[int]:
    """Return the ids of all parameters, each once."""
    return list(dict.fromkeys(id(p) for group in optimizer.param_groups for p in group["params"]))


def check_listed(optimizer: Optimizer, before: list[int]) -> None:
    """Raise unless the groups have the parameters that :func:`listed` returned before."""
    if listed(optimizer) != before:
        raise OptionError(f"{type(optimizer).__name__}.step: the groups have other parameters than at construction, of "
                          "which this optimizer would exchange none; build it after all groups are known")  # fmt: skip
