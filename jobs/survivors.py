"""Going on with the ranks that are left when one has died, without a new start. Open MPI alone can do it (ULFM)."""

import os
import sys
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any, NoReturn, TypeVar

from mpi_ef.errors import LaunchError, MpiEfError

__all__ = ["OPTIONS", "all_are_here", "check", "outlive"]

# Without the second, sums at the moment of a death may come out wrong and unnoticed where nodes have several ranks; without
# the third, survivors may wait for ever for a connection to the dead rank.
OPTIONS = "--with-ft ulfm --mca coll ^han --mca mpi_preconnect_mpi 1"
_WANTED = {"OMPI_MCA_mpi_ft_enable": "1", "OMPI_MCA_coll": "^han", "OMPI_MCA_mpi_preconnect_mpi": "1"}

_DETECTION_SECONDS = 2.0  # in which MPI learns of a death that has already spoiled a message

T = TypeVar("T")


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `LaunchError` unless this process was started so that ranks can outlive others. Local."""
    missing = [f"{name}={value}" for name, value in _WANTED.items() if environment.get(name) != value]
    if missing:
        raise LaunchError(
            f"on_failure=shrink: {', '.join(missing)} not set; start it with Open MPI's mpirun {OPTIONS} (srun cannot)"
        )


def outlive(comm: Any, program: Callable[[Any, int], T]) -> T:
    """Return ``program(comm, 0)``; when ranks die, call it again on the others, with the number of failures. Collective.

    The program has to bring everything back by itself, from a checkpoint: whatever it had of the old communicator may be in
    the middle of a step. That is kept until the end, for MPI may still write to it.

    After a failure this does not return: the process ends here, as MPI's own end waits for the dead in one of ten runs.

    Parameters
    ----------
    comm : MPI.Comm
        All the program may communicate over, so that a rank that waits in it learns of the failure.
    program : callable
        Called with the communicator and how often ranks have died. Whatever it raises once a rank has died counts as a
        consequence: a collective may then return without an error, but with the wrong content.
    """
    from mpi4py import MPI

    comm.Set_errhandler(MPI.ERRORS_RETURN)
    failures: list[Exception] = []
    while True:
        try:
            result = program(comm, len(failures))
            all_are_here(comm)
        except Exception as error:
            if isinstance(error, MPI.Exception) or _some_are_dead(comm):
                failures.append(error)
                left = _without_the_dead(comm)
                if left.Get_size() == comm.Get_size():
                    raise  # nobody died: it would happen again
                comm = left
                continue
            if failures and isinstance(error, MpiEfError) and error.everywhere:
                _end(comm, f"mpi-ef: {error}", 2)
            raise
        if failures:
            _end(comm, "", 0)
        return result


def all_are_here(comm: Any) -> None:
    """Raise ``MPI.Exception`` on all ranks unless every one has come here alive. Collective.

    What they have received up to here was then sent by the living, and is right.
    """
    comm.Agree(1)


def _some_are_dead(comm: Any) -> bool:
    """Tell whether MPI knows of a dead rank, or another rank has told of one. Waits for that news a little. Local."""
    from mpi4py import MPI

    until = monotonic() + _DETECTION_SECONDS
    while not (comm.Is_revoked() or comm.Get_failed().Get_size()):
        if monotonic() > until:
            return False
        try:
            comm.Iprobe()  # lets MPI look
        except MPI.Exception:
            return True
        sleep(0.01)
    return True


def _without_the_dead(comm: Any) -> Any:
    """Return a communicator of the survivors, in their old order. Collective over these."""
    from mpi4py import MPI

    from mpi_ef.collectives.agreement import ranks_text

    if not comm.Is_revoked():
        comm.Revoke()  # ranks that wait for one of the living learn of it
    left = comm.Shrink()
    left.Set_errhandler(MPI.ERRORS_RETURN)
    gone = MPI.Group.Difference(comm.Get_group(), left.Get_group())
    if left.Get_rank() == 0 and gone.Get_size():
        dead = MPI.Group.Translate_ranks(gone, list(range(gone.Get_size())), comm.Get_group())
        sys.stdout.write(
            f"{ranks_text(sorted(dead))} of {comm.Get_size()} died; {left.Get_size()} go on from the newest checkpoint\n"
        )
        sys.stdout.flush()
    return left


def _end(comm: Any, text: str, status: int) -> NoReturn:
    """End this process once all survivors are here, but without MPI_Finalize; rank 0 says what there is to say."""
    if text and comm.Get_rank() == 0:
        sys.stderr.write(text + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        comm.Barrier()  # who leaves before the others are here counts as dead
    finally:
        os._exit(status)
