"""Going on with the surviving ranks when one has died, without a new start: user-level failure mitigation of Open MPI."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from uuid import uuid4

from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import LaunchError, MpiEfError, say

from .timeouts import wait_until

__all__ = ["OPTIONS", "Attempts", "all_are_here", "check", "outlive"]

# Without the second, sums at the moment of a death may come out wrong and unnoticed where nodes have several ranks; without
# the third, survivors may wait for ever for a connection to the dead rank.
OPTIONS = "--with-ft ulfm --mca coll ^han --mca mpi_preconnect_mpi 1"
_DETECTION_SECONDS = 2.0  # in which MPI learns of a death that has already spoiled a message


@dataclass
class Attempts:
    """What one attempt of a launch leaves to the next, after ranks have died."""

    failures: int = 0  # how often ranks have died
    launch: str = ""  # identity of this launch, the same on all ranks
    last: int | None = None  # the step after which this launch ends; None until it has taken the folder and resumed
    asked: int = 0  # the signal that has asked to stop; 0 for none

    def begin(self, comm: MpiComm, failures: int) -> None:
        """Agree on all of it: ranks may have come to different places. Collective."""
        self.failures = failures
        self.launch = comm.bcast(self.launch or uuid4().hex)
        self.last = next((last for last in comm.allgather(self.last) if last is not None), None)


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `LaunchError` unless this process was started so that ranks can outlive others, as far as it can see. Local."""
    without = environment.get("OMPI_MCA_coll", "")
    if not (
        "OMPI_COMM_WORLD_SIZE" in environment  # srun does not set it
        and environment.get("OMPI_MCA_mpi_ft_enable") == "1"
        and environment.get("OMPI_MCA_mpi_preconnect_mpi") == "1"
        and without.startswith("^")
        and "han" in without[1:].split(",")
    ):
        error = LaunchError(
            f"on_failure=shrink: ranks would not outlive others; start with Open MPI's mpirun {OPTIONS}"
        )
        error.everywhere = True  # all were started alike
        raise error


def outlive(comm: MpiComm, program: Callable[[Any, int], object]) -> NoReturn:
    """Call ``program(comm, 0)``; when ranks die, again on the others, with the number of failures. Collective.

    The program has to restore everything by itself, from a checkpoint: objects of the old communicator may be in the middle
    of a step. They are kept until the end, for MPI may still write to their memory.

    The process ends here, with status 0, or that of an error that all ranks have together (`launch.run`): MPI's own end
    may wait for the dead. An error that one rank has is raised, to end all.

    Parameters
    ----------
    comm : MPI.Comm
        All that the program may communicate over, so that a rank that waits in it learns of the failure: by calls for
        buffers, and by ``bcast``, ``gather`` and ``allgather``. In duplicates of it, and in mpi4py's ``reduce`` and
        ``allreduce`` of objects, which make some, ranks would wait for ever.
    program : callable
        Called with the communicator and how often ranks have died. Whatever it raises once a rank has died counts as a
        consequence: a collective may then return without an error, but with the wrong content.
    """
    from mpi4py import MPI

    comm.Set_errhandler(MPI.ERRORS_RETURN)
    everyone = comm.Get_group()
    failures: list[Exception] = []
    while True:
        try:
            program(comm, len(failures))
            all_are_here(comm)
        except Exception as error:
            if isinstance(error, MPI.Exception) or _some_are_dead(comm):
                failures.append(error)
                left = _without_the_dead(comm, everyone)
                if left.Get_size() == comm.Get_size():
                    raise  # no rank has died: it would happen again
                comm = left
                continue
            if isinstance(error, MpiEfError) and error.everywhere:
                _end(comm, f"mpi-ef: {error}", 1 if error.may_pass else 2)
            raise
        _end(comm, "", 0)


def all_are_here(comm: MpiComm) -> None:
    """Raise ``MPI.Exception`` on all ranks unless every one has come here alive. Collective.

    All messages received up to here were then sent by living ranks, and are right.
    """
    comm.Agree(1)


def _some_are_dead(comm: MpiComm) -> bool:
    """Return whether MPI or another rank has detected a dead one, after waiting a little for it. Local."""
    from mpi4py import MPI

    def known() -> bool:
        if comm.Is_revoked() or comm.Get_failed().Get_size():
            return True
        try:
            comm.Iprobe()  # lets MPI make progress
        except MPI.Exception:
            return True
        return False

    return wait_until(known, _DETECTION_SECONDS, rest=0.01)


def _without_the_dead(comm: MpiComm, everyone: Any) -> Any:
    """Return a communicator of the survivors, in their old order. Collective over these."""
    from mpi4py import MPI

    from mpi_ef.comm.consensus import ranks_text

    if not comm.Is_revoked():
        comm.Revoke()  # ranks that wait for one of the living learn of it
    left = comm.Shrink()
    left.Set_errhandler(MPI.ERRORS_RETURN)
    gone = MPI.Group.Difference(comm.Get_group(), left.Get_group())
    if left.Get_rank() == 0 and gone.Get_size():
        dead = sorted(MPI.Group.Translate_ranks(gone, list(range(gone.Get_size())), everyone))
        say(sys.stdout, f"{ranks_text(dead)} died; {left.Get_size()} of {everyone.Get_size()} go on from the newest "
                        "checkpoint\n")
    return left


def _end(comm: MpiComm, text: str, status: int) -> NoReturn:
    """End this process once all survivors are here, but without MPI_Finalize; rank 0 writes the text."""
    if text and comm.Get_rank() == 0:
        say(sys.stderr, text + "\n")
    say(sys.stdout)
    say(sys.stderr)
    try:
        comm.Barrier()  # a rank that ends before the others are here counts as dead
    finally:
        os._exit(status)
