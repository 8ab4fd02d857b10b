"""Virtual ranks, which wait longer where the machine is slow or busy."""

import patience

from mpi_ef.testing import virtual
from mpi_ef.testing.virtual import VirtualComm, _World, results, run

__all__ = ["VirtualComm", "_World", "results", "run"]

virtual.patience_seconds = patience.limit(240)  # less than a test has
