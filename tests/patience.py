"""How long tests wait for programs: limits find hangs, and are longer where the machine is slow or busy at the start."""

import os
from time import perf_counter

_VARIABLE = "MPI_EF_TEST_PATIENCE"  # workers and suites under mpiexec take over what the first process has measured
_LOOP_SECONDS = 0.1  # of a quiet machine of 2025


def _measured() -> float:
    began = perf_counter()
    for _ in range(2_500_000):
        pass
    slow = (perf_counter() - began) / _LOOP_SECONDS
    busy = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return round(min(10.0, max(1.0, slow, busy)), 2)


def factor() -> float:
    """Return how much longer than on a quiet machine to wait, from 1 to 10."""
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = str(_measured())
    return float(os.environ[_VARIABLE])


def limit(seconds: float) -> float:
    """Return a time limit for what takes far less than so many seconds on a quiet machine."""
    return seconds * factor()


def explained(seconds: float) -> str:
    """Return a limit in words, for the message when it strikes."""
    return f"{limit(seconds):.0f} s ({seconds:.0f} s times {factor()}, the load when the tests began)"
