"""The table of checks: a module each, with ``collect`` for every rank and ``judge`` for the facts of all of them."""

from mpi_ef.jobs.doctor.registry import Check

from . import allreduce, cores, files, kernels, launcher, link, mpi, shared, space, torch, versions, warm_up, workers
from .allreduce import MESSAGE_SECONDS

__all__ = ["CHECKS", "FOLDERS", "LINKS", "SUM", "WARM_UP"]

CHECKS = [
    Check("MPI", "MPI", mpi),
    Check("launcher", "MPI", launcher),
    Check("cores", "Ranks", cores),
    Check("GPU", "GPU", torch),
    Check("workers", "Data", workers, per_node=True),
    Check("kernels", "Kernels", kernels),
    Check("folder", "Files", files, per_node=True),
    Check("space", "Files", space, per_node=True),
    Check("versions", "Versions", versions),
]
# What ranks do together, after all others.
FOLDERS = Check("folders of other nodes", "Files", shared, per_node=True)
WARM_UP = Check("warm-up", "Kernels", warm_up, seconds=900.0, turns=2)
SUM = Check("sum", "Network", allreduce, seconds=MESSAGE_SECONDS, uses_mpi=True)
LINKS = Check("links", "Network", link, seconds=4 * MESSAGE_SECONDS, uses_mpi=True)
