"""What the groups of a torch optimizer say."""

from typing import Any

from torch.optim import Optimizer

__all__ = ["group_sizes", "hyper_parameters", "names_of"]


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
