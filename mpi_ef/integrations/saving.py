"""The state of all ranks beside what another library saves of rank 0."""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mpi_ef.checkpoint import Store
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import CheckpointError, OptionError, everywhere
from mpi_ef.optim.flat import FlatOptimizer
from mpi_ef.state.training import Training

from .collect import first_of

__all__ = ["FOLDER", "flat_optimizer", "not_loading", "remove_ranks", "resume_ranks", "save_ranks"]

FOLDER = "mpi_ef"


def flat_optimizer(optimizer: Any, subject: str) -> FlatOptimizer:
    """Return the optimizer of this package inside of what another library has put around it. Local."""
    inner = optimizer
    while isinstance(inner, Optimizer) and not isinstance(inner, FlatOptimizer):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "_optimizer", None)
    if not isinstance(inner, FlatOptimizer):
        raise OptionError(f"{subject}: its optimizer is {type(optimizer).__name__}, so that every rank would train alone; "
                          "pass one of mpi_ef, for example DistributedOptimizer(optimizer, comm, TopK(0.01))")
    return inner


def _training(model: nn.Module, optimizers: list[FlatOptimizer]) -> Training:
    parts: dict[str, Any] = {f"optimizer_{number}": part for number, part in enumerate(optimizers)}
    return Training(model=model, **parts)


def save_ranks(folder: str | Path, comm: Comm, model: nn.Module, optimizers: list[FlatOptimizer]) -> None:
    """Write what the ranks have into a folder: model, optimizers, random numbers. Collective; raises as `Training.save`."""
    with closing(Store(Path(folder), keep_last=1)) as store:
        _training(model, optimizers).save(store, comm, optimizers[0].steps)


def resume_ranks(folder: str | Path, comm: Comm, model: nn.Module, optimizers: list[FlatOptimizer], policy: str) -> None:
    """Put it back. Collective; raises as `Training.resume`, and `CheckpointError` on all ranks where there is none."""
    if not first_of(Path(folder).is_dir(), comm):
        raise everywhere(CheckpointError(f"{folder}: there is no state of the ranks; resume from a checkpoint that was "
                                         "saved with mpi_ef.integrations, or start from its weights alone"))
    with closing(Store(Path(folder), keep_last=1)) as store:
        _training(model, optimizers).resume(store, comm, policy=policy)


@contextmanager
def not_loading(optimizer: FlatOptimizer) -> Iterator[None]:
    """Return a context in which the optimizer keeps its state: what another library loads is that of rank 0. Local."""
    optimizer.load_state_dict = _keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer.load_state_dict


def _keep(state_dict: Any) -> None:
    """Load nothing."""


def remove_ranks(folder: str | Path, comm: Comm) -> None:
    """Remove it, on rank 0. Local."""
    if comm.Get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
