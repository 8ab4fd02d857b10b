"""Virtual ranks, which wait longer where the machine is slow or busy."""

from functools import partial

import patience

from mpi_ef.testing import virtual
from mpi_ef.testing.virtual import VirtualComm, _World

__all__ = ["VirtualComm", "_World", "results", "run"]

results, run = (partial(call, virtual=True) for call in (virtual.results, virtual.run))  # under MPI too
virtual.patience_seconds = patience.limit(240)  # less than a test has
