"""Words with which a server and its workers come to an end, and what is done at the end of Python, or of a communicator."""

import atexit
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from socket import gethostname

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.protocol import Comm

from .late import Late
from .pairwise import before_free

__all__ = ["AT_EXIT", "DROPPED", "FAILED", "LAST", "host_of", "later", "send_all"]

LAST = -(2**62)  # the step of the last order is this one and the number of steps
AT_EXIT = LAST + 2**61  # in place of LAST, where the server waits for last answers at the end of Python
FAILED, DROPPED = LAST - 1, LAST - 2  # those of orders after which there are no more: an error, or the server was dropped


def host_of(comm: Comm) -> str:
    """Return the name of this rank's node."""
    return str(getattr(comm, "node_name", None) or gethostname())


def later(comm: Comm, settle: Callable[[], None]) -> Callable[[], None]:
    """Have `settle` called at the end of Python, or when MPI's `comm` is freed before; return what takes that back."""
    back = ExitStack()
    if mpi_of(comm) is not None:
        back.callback(before_free(comm, settle))
        atexit.register(settle)
        back.callback(atexit.unregister, settle)
    return back.close


def send_all(late: Late, ranks: Iterable[int], step: int) -> None:
    """Send an empty message with such a step."""
    with suppress(Exception):  # of MPI, at its end
        frame = late.frame()
        frame.wire[:] = 0
        frame.step = step
        for rank in ranks:
            late.send(rank, frame)
        late.drop(frame)
