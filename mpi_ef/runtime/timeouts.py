"""Waiting for a limited time."""

import os
from collections.abc import Callable
from time import monotonic, sleep

__all__ = ["wait_until"]


def wait_until(done: Callable[[], bool], seconds: float, *, rest: float = 0.0) -> bool:
    """Call `done` until it returns True, for so many seconds at most, and return whether it has. Local.

    Parameters
    ----------
    done : callable
        For example ``request.Test`` of an MPI request.
    seconds : float
    rest : float
        Seconds between two calls; 0 calls again at once, but yields the core.
    """
    limit = monotonic() + seconds
    while not done():
        if monotonic() > limit:
            return False
        if rest:
            sleep(rest)
        else:
            os.sched_yield()
    return True
