"""What the worker processes of a DataLoader import before anything else, see :func:`mpi_ef.data.loader_context`.

A worker is not a rank: if it started MPI, it would try to join the world in its parent's place. Scripts are imported
again in every worker, and ``from mpi4py.MPI import COMM_WORLD`` at their top starts MPI unless this has run before.
"""

import mpi4py

__all__: list[str] = []

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
