"""Training over MPI with compressed communication and error feedback.

Importing this package loads neither MPI nor torch; the names below load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpi_ef.moved import find_moved

if TYPE_CHECKING:
    from mpi_ef.buffers import synchronize_buffers
    from mpi_ef.checkpoint import Store, open_checkpoint
    from mpi_ef.collectives import (
        ClientsMean,
        DenseMean,
        GatherMean,
        LowRankMean,
        TwoPhaseMean,
        allgather,
        allreduce,
        plan_for,
    )
    from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK, Vote
    from mpi_ef.data import ShardedSampler, generator_for, loader_context, random_state, seed_rank, set_random_state
    from mpi_ef.ddp import FeedbackHook
    from mpi_ef.errors import MpiEfError
    from mpi_ef.feedback import ErrorFeedback
    from mpi_ef.optim import (
        EF21,
        DistributedOptimizer,
        EControl,
        EF21Muon,
        Lion,
        OneBitAdam,
        OneBitLamb,
        PowerSGD,
        Signum,
        ZeroOneAdam,
    )
    from mpi_ef.runtime.stopper import Stopper
    from mpi_ef.state.training import Training

__version__ = "0.1.0"

find_moved()

_HOME = {
    "allgather": "collectives",
    "allreduce": "collectives",
    "ClientsMean": "collectives",
    "DenseMean": "collectives",
    "DistributedOptimizer": "optim",
    "EControl": "optim",
    "EF21": "optim",
    "EF21Muon": "optim",
    "ErrorFeedback": "feedback",
    "FeedbackHook": "ddp",
    "GatherMean": "collectives",
    "generator_for": "data",
    "Identity": "compress",
    "Lion": "optim",
    "loader_context": "data",
    "LowRank": "compress",
    "LowRankMean": "collectives",
    "MpiEfError": "errors",
    "OneBitAdam": "optim",
    "OneBitLamb": "optim",
    "open_checkpoint": "checkpoint",
    "plan_for": "collectives",
    "PowerSGD": "optim",
    "Quantize": "compress",
    "RandK": "compress",
    "random_state": "data",
    "seed_rank": "data",
    "set_random_state": "data",
    "ShardedSampler": "data",
    "Sign": "compress",
    "Signum": "optim",
    "Stopper": "runtime.stopper",
    "Store": "checkpoint",
    "synchronize_buffers": "buffers",
    "TopK": "compress",
    "Training": "state.training",
    "TwoPhaseMean": "collectives",
    "Vote": "compress",
    "ZeroOneAdam": "optim",
}

__all__ = [
    "EF21",
    "ClientsMean",
    "DenseMean",
    "DistributedOptimizer",
    "EControl",
    "EF21Muon",
    "ErrorFeedback",
    "FeedbackHook",
    "GatherMean",
    "Identity",
    "Lion",
    "LowRank",
    "LowRankMean",
    "MpiEfError",
    "OneBitAdam",
    "OneBitLamb",
    "PowerSGD",
    "Quantize",
    "RandK",
    "ShardedSampler",
    "Sign",
    "Signum",
    "Stopper",
    "Store",
    "TopK",
    "Training",
    "TwoPhaseMean",
    "Vote",
    "ZeroOneAdam",
    "allgather",
    "allreduce",
    "generator_for",
    "loader_context",
    "open_checkpoint",
    "plan_for",
    "random_state",
    "seed_rank",
    "set_random_state",
    "synchronize_buffers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mpi_ef' has no attribute {name!r}")
    return getattr(import_module(f"mpi_ef.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
