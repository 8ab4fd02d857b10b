"""What another library sees of the launcher: nothing, so that each rank is a program of one process to it."""

import os
import sys
from collections.abc import MutableMapping
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mpi_ef.comm.consensus import check_not_freed, gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError
from mpi_ef.runtime.world import check_alone

__all__ = ["HIDDEN", "one_process"]

# What accelerate and Lightning take for the number of processes, or the number of this one. MPI has read them already; what
# batch scripts and this package read (SLURM_JOB_ID, SLURM_JOB_END_TIME, PMIX_*) stays.
HIDDEN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NTASKS_PER_NODE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "LSB_DJOB_RANKFILE",
)


def one_process(comm: Comm, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let libraries that look at the launcher's variables see one process, and number 0 on rank 0 alone. Local.

    Call it on all ranks, once, before a ``TrainingArguments``, an ``Accelerator`` or a Lightning ``Trainer`` is built, and
    after MPI has started. It removes :data:`HIDDEN` from the environment. Where `accelerate` is installed, it is told that
    there is one process, on the CPU, that has the number of this rank: what it does on the main process alone (printing,
    logging, saving) is done on rank 0, its barriers are those of `comm`, ``split_between_processes`` splits between the
    ranks, and each rank reads its own loaders, those of iterables as well.

    Parameters
    ----------
    comm : MPI.Comm
    environment : mapping
        The environment variables of this process.

    Raises
    ------
    LaunchError
        The launcher started several tasks, but the MPI world has one rank.
    OptionError
        `accelerate` or ``torch.distributed`` has several processes already.
    """
    check_not_freed(comm, "one_process")
    check_alone(comm)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        raise OptionError("one_process: torch.distributed has been started already; call one_process before Trainer and "
                          "Accelerator are built, or take mpi_ef.FeedbackHook, which goes with torch.distributed")
    for name in HIDDEN:
        environment.pop(name, None)
    environment["ACCELERATE_USE_CPU"] = "true"  # where these loops keep parameters
    if "accelerate" in sys.modules or find_spec("accelerate") is not None:
        _number_process(comm)


def _number_process(comm: Comm) -> None:
    from accelerate.state import PartialState

    rank, state = int(comm.Get_rank()), PartialState(cpu=True)
    if state.num_processes != 1:
        raise OptionError(f"one_process: accelerate has {state.num_processes} processes already; call one_process before "
                          "TrainingArguments and Accelerator are built")
    # Every PartialState has this dictionary as its attributes. It is pickled with TrainingArguments: no functions go there.
    shared: dict[str, Any] = state.__dict__
    shared["process_index"] = shared["local_process_index"] = rank

    def wait_for_everyone(_: Any) -> None:
        gather_values(comm, "wait_for_everyone", None)

    def on_main_process(_: Any, function: Any = None) -> Any:
        return function if rank == 0 else _nothing

    PartialState.wait_for_everyone = wait_for_everyone
    PartialState.on_main_process = PartialState.on_local_main_process = on_main_process
    _split_between_ranks(PartialState, rank, int(comm.Get_size()))
    _read_on_each_rank(import_module("accelerate.accelerator"))


def _split_between_ranks(states: Any, rank: int, ranks: int) -> None:
    split = getattr(states.split_between_processes, "_of_one", states.split_between_processes)

    class OfRank:  # what the call asks of the state
        process_index, num_processes, device = rank, ranks, "cpu"

    def split_between_processes(_: Any, inputs: Any, apply_padding: bool = False) -> Any:
        if apply_padding and hasattr(inputs, "dim"):
            raise OptionError("split_between_processes: apply_padding=True with a tensor; pass apply_padding=False, gather "
                              "takes parts of any length")
        return split(OfRank, inputs, apply_padding)

    split_between_processes._of_one = split  # type: ignore[attr-defined]  # noqa: SLF001
    states.split_between_processes = split_between_processes


def _read_on_each_rank(module: Any) -> None:
    """Let no loader be read by process 0 for the others, as those of iterables are by default."""
    prepare = module.prepare_data_loader

    @wraps(prepare)
    def prepare_data_loader(dataloader: Any, *rest: Any, **options: Any) -> Any:
        return prepare(dataloader, *rest, **options | {"dispatch_batches": False})

    module.prepare_data_loader = prepare_data_loader


def _nothing(*_: Any, **__: Any) -> None:
    """Stand for a function that only the main process calls."""
