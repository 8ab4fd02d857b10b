"""What the groups of a torch optimizer say."""

from typing import Any

from torch.optim import Optimizer

from mpi_ef.errors import OptionError

__all__ = ["check_listed", "group_sizes", "hyper_parameters", "listed", "names_of"]


def group_sizes(optimizer: Optimizer) -> str:
    """Return how many parameters each group has, as text."""
    return ", ".join(str(len(group["params"])) for group in optimizer.param_groups)


def hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups without their parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def names_of(optimizer: Optimizer) -> dict[int, str]:
    """Return the names of parameters that were given with names, by their id."""
    return {id(p): name for group in optimizer.param_groups
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False)}  # fmt: skip


def listed(optimizer: Optimizer) -> list[int]:
    """Return the ids of all parameters, each once."""
    return list(dict.fromkeys(id(p) for group in optimizer.param_groups for p in group["params"]))


def check_listed(optimizer: Optimizer, before: list[int]) -> None:
    """Raise unless the groups have the parameters that :func:`listed` returned before."""
    if listed(optimizer) != before:
        raise OptionError(f"{type(optimizer).__name__}.step: the groups have other parameters than at construction, of "
                          "which this optimizer would exchange none; build it after all groups are known")  # fmt: skip
