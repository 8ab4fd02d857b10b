"""Whether a sum over all ranks arrives, and is right."""

from typing import Any

from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context
from mpi_ef.runtime.timeouts import wait_until

__all__ = ["MESSAGE_SECONDS", "PENDING", "collect", "judge"]

MESSAGE_SECONDS = 10.0
PENDING: list[Any] = []  # requests that were not done in time, and their memory, to which MPI may still write


def collect(context: Context) -> Facts:
    """Sum numbers of all ranks. Collective, for `MESSAGE_SECONDS` at most."""
    import numpy as np

    n, rank = len(context.placements), context.placement.rank
    ramp = np.arange(100_000, dtype=np.float64)
    mine, total = ramp + rank, np.zeros_like(ramp)
    request = context.world.Iallreduce(mine, total)
    if not wait_until(request.Test, MESSAGE_SECONDS):
        PENDING.append((request, mine, total))
        return {"arrived": False}
    return {"arrived": True, "right": bool(np.array_equal(total, n * ramp + n * (n - 1) / 2))}


def judge(ranks: Ranks) -> Findings:
    """Yield whether the sum is right."""
    if late := ranks.which(lambda one: not one["arrived"]):
        yield finding("allreduce.late", late, seconds=MESSAGE_SECONDS)
    elif wrong := ranks.which(lambda one: not one["right"]):
        yield finding("allreduce", [one.rank for one in wrong])
    elif len(ranks) > 1:
        yield finding("allreduce.ok", ranks=len(ranks))
