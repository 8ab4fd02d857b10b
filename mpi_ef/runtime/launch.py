"""Starting and ending MPI programs: in one world or with an error, and without ranks that wait for a dead one."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mpi_ef.comm.protocol import Comm
from mpi_ef.documents import shown_lines
from mpi_ef.errors import LaunchError, MpiEfError, say

from .ending import PATIENCE_SECONDS, abort, abort_on_exception, die, keep_status
from .timeouts import wait_until
from .world import check_world

__all__ = ["abort", "abort_on_exception", "check_world", "run", "threads_per_rank"]


def run(program: Callable[[Any], None]) -> None:
    """Call ``program(COMM_WORLD)``; whatever goes wrong on one rank ends all of them, with its message. Collective.

    An error that all ranks raise together is printed once, by rank 0, and exits with status 2. Any other error is
    printed by the rank that has it, which then aborts the world: status 2 for an `MpiEfError`, else 1; 1 also where one
    may pass, such as a disk that is full.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    leaving = comm.Dup()  # its barrier matches nothing that other ranks may be in the middle of
    try:
        check_world(comm.Get_size())
    except LaunchError as error:
        # All tasks can report it before the first one ends.
        die(comm, f"mpi-ef: {error}", 2, seconds=PATIENCE_SECONDS)
    try:
        program(comm)
    except MpiEfError as error:
        status = 1 if error.may_pass else 2
        if not error.everywhere:
            die(comm, f"mpi-ef: rank {comm.Get_rank()}: {shown_lines(error)}", status)
        if comm.Get_rank() == 0:
            say(sys.stderr, f"mpi-ef: {shown_lines(error)}\n")
        # A launcher may kill rank 0 before it has printed, once another rank has left with an error: leave together.
        if not wait_until(leaving.Ibarrier().Test, PATIENCE_SECONDS, rest=0.01):
            die(comm, f"mpi-ef: rank {comm.Get_rank()}: {shown_lines(error)}", status)  # some rank has not arrived
        keep_status(status)
        sys.exit(status)
    except Exception:
        die(comm, f"mpi-ef: rank {comm.Get_rank()} failed:\n{traceback.format_exc()}", 1)


def threads_per_rank(comm: Comm) -> int:
    """Return how many threads a rank may use without sharing a core with another rank. Collective.

    ``OMP_NUM_THREADS`` when it is set; else this rank's cores divided by the number of ranks that may run on them.
    """
    from mpi4py import MPI

    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    here = MPI.Get_processor_name()
    sharing = sum(node == here and bool(mine & theirs) for node, theirs in comm.allgather((here, mine)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else max(1, len(mine) // sharing)
