"""The check for a launcher that started several tasks which MPI sees as worlds of one rank."""

import os
import sys
from collections.abc import Mapping

from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import LaunchError

__all__ = ["ALONE", "check_alone", "check_world", "first_task"]

ALONE = "MPI_EF_ALONE"  # 1, or anything but 0, where several tasks are meant to have nothing to do with each other

# Variables with the number of tasks. srun sets the first for every step, and under --mpi=pmi2 also PMI_SIZE: the message is
# about Slurm then.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")
_NUMBERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
_REMEDIES = {
    "SLURM_STEP_NUM_TASKS": "try srun --mpi=pmix, --mpi=pmi2 or --mpi=cray_shasta (srun --mpi=list shows what there is)",
    "WORLD_SIZE": "torchrun starts no MPI: take mpiexec or srun, or mpi_ef.ddp, which speaks through torch.distributed",
}
_MPIEXEC = ("start it with the mpiexec that belongs to the MPI library mpi4py uses "
            "(python -c 'from mpi4py import MPI; print(MPI.Get_library_version())')")


def first_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process is the first of those that its launcher has started, before MPI is. Local."""
    numbers = (environment.get(name, "") for name in _NUMBERS)
    return next((int(text) for text in numbers if text.isdigit()), 0) == 0


def check_world(size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `LaunchError` when a launcher started several tasks but the MPI world has one rank. Local.

    Parameters
    ----------
    size : int
        Size of COMM_WORLD.
    environment : mapping
        The environment variables of this process. Where ``MPI_EF_ALONE`` is set, but not to 0, nothing is wrong.
    """
    if size != 1 or environment.get(ALONE, "") not in ("", "0"):
        return
    names = (*_TASKS, "WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else _TASKS  # which torchrun sets
    for name in names:
        text = environment.get(name, "")
        if text.isdigit() and int(text) > 1:
            raise LaunchError(
                f"launch: {name}={text}, but the MPI world has 1 rank, so every task would train alone; "
                f"{_REMEDIES.get(name, _MPIEXEC)}; {ALONE}=1 if that is meant"
            )


def check_alone(comm: Comm) -> None:
    """Do the same for a communicator of one rank where it is the whole world, not for COMM_SELF in a larger one. Local."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and isinstance(comm, mpi.Comm) and comm.Get_size() == 1:
        check_world(mpi.COMM_WORLD.Get_size())
