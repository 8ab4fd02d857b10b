"""The plan that ``plan="auto"`` takes: a run is recorded with it, and goes on with it."""

import tomllib
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ef.comm.consensus import gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.optimizers import build_optimizer
from mpi_ef.optim.flat import FlatOptimizer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["built"]


def built(comm: Comm, config: TrainConfig, model: "nn.Module") -> tuple[FlatOptimizer, TrainConfig]:
    """Return the optimizer, see :func:`build_optimizer`, and the options with the name of what "auto" has taken. Collective.

    A run that is to go on exactly takes the plan that is in its folder: another one may be the fastest by now, and the state
    would not fit. Where buckets have different plans "auto" stays.
    """
    if config.plan != "auto":
        return build_optimizer(config, model, comm), config
    if config.resume == "exact":
        config = replace(config, plan=gather_values(comm, "train", _before(config) if comm.Get_rank() == 0 else None)[0])
    optimizer = build_optimizer(config, model, comm)
    taken = {plan.advice.specification if plan.advice else type(plan).__name__ for plan in optimizer.means()}
    return optimizer, replace(config, plan=taken.pop()) if config.plan == "auto" and len(taken) == 1 else config


def _before(config: TrainConfig) -> str:
    """Return what the run in the folder has for a plan; "auto" where there is none, or nothing legible. Local."""
    plan = None
    with suppress(OSError, ValueError):
        plan = tomllib.loads((config.out / "config.toml").read_text(encoding="utf-8")).get("plan")
    return plan if isinstance(plan, str) else "auto"
