"""What plans and optimizers ask of a communicator."""

from typing import Any

__all__ = ["Comm"]

# An mpi4py intracommunicator. Its type is not named here because importing mpi4py.MPI would start MPI.
Comm = Any
