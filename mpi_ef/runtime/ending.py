"""How one rank ends all of them, with its message."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from threading import current_thread, main_thread
from time import sleep
from typing import Any, NoReturn

from mpi_ef.errors import say

__all__ = ["CATCHES", "abort", "abort_on_exception", "die", "end_together", "end_without_all", "keep_status", "outliving"]

PATIENCE_SECONDS = 5.0
FORWARDING_SECONDS = 0.3
_OUTLIVING = "OMPI_MCA_mpi_ft_enable"  # of Open MPI
CATCHES = "MPI_EF_ABORT"  # 0 leaves uncaught exceptions to Python: the rank ends, and others may wait for it for ever


def end_together(comm: Any) -> None:
    """Make an uncaught exception end all ranks, from the first plan on several of them on. Local.

    Does nothing in an interactive session, for other communicators than MPI's, with ``MPI_EF_ABORT=0``, and where
    ``sys.excepthook`` was replaced under ``python -m mpi4py``, which ends all ranks afterwards itself.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Comm) or comm.Get_size() == 1 or isinstance(sys.excepthook, _Hook):
        return
    interactive = hasattr(sys, "ps1") or sys.flags.interactive
    seen_to = sys.excepthook is not sys.__excepthook__ and "mpi4py.run" in (*sys.modules, *sys.orig_argv)
    if not interactive and not seen_to and os.environ.get(CATCHES) != "0":
        abort_on_exception(mpi.COMM_WORLD)


def abort_on_exception(comm: Any) -> None:
    """Make any uncaught exception of this process end all ranks of `comm`, after its traceback is printed. Local.

    For your own scripts; ``python -m mpi4py script.py`` does the same from outside. An earlier
    ``sys.excepthook`` is called first, for its own output.
    """
    sys.excepthook = _Hook(comm, sys.excepthook.earlier if isinstance(sys.excepthook, _Hook) else sys.excepthook)


class _Hook:
    """Ends all ranks, after the hook that was there earlier."""

    def __init__(self, comm: Any, earlier: Callable[..., Any]) -> None:
        self._comm, self.earlier = comm, earlier

    def __call__(self, kind: Any, value: Any, trace: Any) -> None:
        failed = f"rank {self._comm.Get_rank()} failed:"
        if self.earlier is sys.__excepthook__:
            die(self._comm, f"{failed}\n{''.join(traceback.format_exception(kind, value, trace))}", 1)
        try:
            self.earlier(kind, value, trace)
        finally:
            first = f"{kind.__name__}: {value}".splitlines()[0].rstrip(": ")
            die(self._comm, f"{failed} {first}", 1)


def abort(comm: Any, status: int, *, seconds: float = FORWARDING_SECONDS) -> NoReturn:
    """End all ranks of `comm`, `seconds` later, and never return. Local; what this rank has printed comes through.

    A launcher may end before it has forwarded what was printed. And MPICH's ``MPI_Abort`` may return before the launcher's
    signal arrives: the program would go on.
    """
    say(sys.stdout)
    keep_status(status)
    sleep(seconds)
    comm.Abort(status)
    sleep(PATIENCE_SECONDS)
    os._exit(status)


def outliving() -> bool:
    """Tell whether ranks were started so that they may go on without others that have died. Local."""
    return os.environ.get(_OUTLIVING) == "1"


def end_without_all(comm: Any, status: int) -> NoReturn:
    """End this process, and all of `comm`, where MPI_Finalize would wait for ranks that do not come. Local.

    Where ranks may outlive others an abort ends this one alone, and the others would wait for it in MPI_Finalize: each ends
    by itself then, without that.
    """
    if not outliving():
        abort(comm, status)
    say(sys.stdout)
    say(sys.stderr)
    os._exit(status)


def keep_status(status: int) -> None:
    """Exit with this status on SIGTERM too, with which srun ends the other tasks once one has failed.

    A step whose tasks all report an error would end with the status of a signal otherwise.
    """
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))


def die(comm: Any, text: str, status: int, *, seconds: float = FORWARDING_SECONDS) -> NoReturn:
    """Print `text` and end all ranks of `comm`. Local."""
    say(sys.stderr, text + "\n")  # under PYTHONUNBUFFERED print() writes the end apart, and lines mix
    abort(comm, status, seconds=seconds)
