"""Training over MPI with compressed communication and error feedback.

Importing this package loads neither MPI nor torch; the names below load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi_ef.collectives import DenseMean, GatherMean, TwoPhaseMean, allgather, allreduce, plan_for
    from mpi_ef.compress import Identity, Quantize, RandK, Sign, TopK
    from mpi_ef.errors import MpiEfError
    from mpi_ef.feedback import ErrorFeedback
    from mpi_ef.optim import EF21, DistributedOptimizer, EControl

__version__ = "0.1.0"

_HOME = {
    "DenseMean": "collectives",
    "DistributedOptimizer": "optim",
    "EControl": "optim",
    "EF21": "optim",
    "ErrorFeedback": "feedback",
    "GatherMean": "collectives",
    "Identity": "compress",
    "MpiEfError": "errors",
    "Quantize": "compress",
    "RandK": "compress",
    "Sign": "compress",
    "TopK": "compress",
    "TwoPhaseMean": "collectives",
    "allgather": "collectives",
    "allreduce": "collectives",
    "plan_for": "collectives",
}

__all__ = [
    "EF21",
    "DenseMean",
    "DistributedOptimizer",
    "EControl",
    "ErrorFeedback",
    "GatherMean",
    "Identity",
    "MpiEfError",
    "Quantize",
    "RandK",
    "Sign",
    "TopK",
    "TwoPhaseMean",
    "allgather",
    "allreduce",
    "plan_for",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mpi_ef' has no attribute {name!r}")
    return getattr(import_module(f"mpi_ef.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
