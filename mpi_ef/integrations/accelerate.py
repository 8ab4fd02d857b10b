"""`accelerate`: what an ``Accelerator`` gathers, reduces and saves is that of all ranks."""

from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from mpi_ef.comm.consensus import check_not_freed, gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError, briefly

from .collect import first_that_is_no_tensor, gathered, padded, reduced
from .first_batch import compare_first_batch
from .saving import FOLDER, flat_optimizer, not_loading, resume_ranks, save_ranks

__all__ = ["collect_over_ranks", "prepare_accelerator"]


def prepare_accelerator(accelerator: Any, comm: Comm, *, model: nn.Module, optimizer: Any, policy: str = "exact") -> None:
    """Let an ``Accelerator`` speak with all ranks. Call it on all ranks after its ``prepare``; local.

    ``gather``, ``gather_for_metrics``, ``reduce`` (and so ``check_trigger``) and ``pad_across_processes`` are over all ranks
    then. ``save_state`` and ``load_state`` do what they do, and write and read, in a folder ``mpi_ef`` there, what each rank
    has: optimizer, errors, random numbers. All of these are collective. A warning says where all ranks begin with the same
    batch.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
        Built after :func:`one_process`.
    comm : MPI.Comm
        That of the optimizer.
    model : torch.nn.Module
    optimizer : Optimizer
        One of this package, also as ``prepare`` has returned it.
    policy : {"exact", "redistribute", "reset"}
        What to do with the state of another number of ranks, see :class:`mpi_ef.Training`.

    Raises
    ------
    OptionError
        The accelerator has several processes; the optimizer is none of this package.
    """
    inner = flat_optimizer(optimizer, "prepare_accelerator")
    compare_first_batch(model, inner, comm, "accelerate")
    collect_over_ranks(accelerator, comm, "prepare_accelerator")
    save, load = accelerator.save_state, accelerator.load_state

    @wraps(save)
    def save_state(output_dir: str | None = None, *rest: Any, **options: Any) -> Any:
        gather_values(comm, "save_state", None)  # else one that is in another call would be waited for
        where = save(output_dir, *rest, **options)
        save_ranks(Path(where or output_dir or "") / FOLDER, comm, model, [inner])
        return where

    @wraps(load)
    def load_state(input_dir: str | None = None, *rest: Any, **options: Any) -> None:
        if input_dir is None:
            raise OptionError("load_state: input_dir=None; name the folder, all ranks take the same then")
        gather_values(comm, "load_state", None)
        with not_loading(inner):
            load(input_dir, *rest, **options)
        resume_ranks(Path(input_dir) / FOLDER, comm, model, [inner], policy)

    accelerator.save_state, accelerator.load_state = save_state, load_state


def collect_over_ranks(accelerator: Any, comm: Comm, subject: str) -> None:
    """Let what an ``Accelerator`` gathers and reduces be that of all ranks. Local.

    Raises
    ------
    OptionError
        It was built without :func:`one_process`.
    """
    check_not_freed(comm, subject)
    count, number = accelerator.num_processes, accelerator.process_index
    if (count, number) != (1, comm.Get_rank()):
        raise OptionError(f"{subject}: the accelerator is process {number} of {count}, and this is rank {comm.Get_rank()}; "
                          "call one_process(comm) first, and give TrainingArguments "
                          'accelerator_config={"use_configured_state": True}')

    def check(call: str, value: Any) -> None:
        for leaf in first_that_is_no_tensor(value):
            raise OptionError(f"{call}: {briefly(leaf)} is no tensor; gather_for_metrics takes lists of any objects")

    def gather(tensor: Any) -> Any:
        check("gather", tensor)
        return gathered(tensor, comm)

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        del use_gather_object  # objects are known by themselves
        nothing = isinstance(input_data, list) and not input_data  # on this rank; others may have objects
        if not (nothing or first_that_is_no_tensor(input_data)):
            return gathered(input_data, comm)
        parts = gather_values(comm, "gather_for_metrics", input_data)
        return [entry for part in parts for entry in part] if all(isinstance(part, list) for part in parts) else parts

    def reduce(tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        check("reduce", tensor)
        return reduced(tensor, comm, reduction, scale)

    def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        return padded(tensor, comm, dim, pad_index, pad_first=pad_first)

    for call in (gather, gather_for_metrics, reduce, pad_across_processes):
        setattr(accelerator, call.__name__, call)
