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
        NodeMean,
        RobustMean,
        TwoPhaseMean,
        advise,
        allgather,
        allreduce,
        plan_for,
        robust_mean,
        use_gpu_aware_mpi,
    )
    from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK, TwoBits, Vote
    from mpi_ef.data import ShardedSampler, generator_for, loader_context, random_state, seed_rank, set_random_state
    from mpi_ef.ddp import FeedbackHook
    from mpi_ef.devices import local_device
    from mpi_ef.errors import MpiEfError
    from mpi_ef.feedback import ErrorFeedback
    from mpi_ef.metrics import mean_metrics, print_metrics
    from mpi_ef.optim import (
        EF21,
        MKOR,
        ByzEF21,
        CodedOptimizer,
        DistributedOptimizer,
        EControl,
        EF21Muon,
        Lion,
        LocalSteps,
        MoNNA,
        OneBitAdam,
        OneBitLamb,
        PeerMixing,
        PowerSGD,
        Signum,
        ZeroOneAdam,
    )
    from mpi_ef.precondition import Preconditioner
    from mpi_ef.runtime.stopper import Stopper
    from mpi_ef.shares import shard
    from mpi_ef.state.training import Training

__version__ = "0.1.0"

find_moved()

_HOME = {name: module for module, names in {
    "collectives": "advise allgather allreduce ClientsMean DenseMean GatherMean LowRankMean NodeMean plan_for RobustMean "
                   "robust_mean TwoPhaseMean use_gpu_aware_mpi",
    "optim": "ByzEF21 CodedOptimizer DistributedOptimizer EControl EF21 EF21Muon Lion LocalSteps MKOR MoNNA OneBitAdam "
             "OneBitLamb PeerMixing PowerSGD Signum ZeroOneAdam",
    "precondition": "Preconditioner",
    "feedback": "ErrorFeedback",
    "ddp": "FeedbackHook",
    "devices": "local_device",
    "data": "generator_for loader_context random_state seed_rank set_random_state ShardedSampler",
    "compress": "Identity LowRank Quantize RandK Sign TopK TwoBits Vote",
    "errors": "MpiEfError",
    "checkpoint": "open_checkpoint Store",
    "runtime.stopper": "Stopper",
    "buffers": "synchronize_buffers",
    "shares": "shard",
    "metrics": "mean_metrics print_metrics",
    "state.training": "Training",
}.items() for name in names.split()}

__all__ = ["EF21", "MKOR", "ByzEF21", "ClientsMean", "CodedOptimizer", "DenseMean", "DistributedOptimizer", "EControl",
           "EF21Muon", "ErrorFeedback", "FeedbackHook", "GatherMean", "Identity", "Lion", "LocalSteps", "LowRank",
           "LowRankMean", "MoNNA", "MpiEfError", "NodeMean", "OneBitAdam", "OneBitLamb", "PeerMixing", "PowerSGD",
           "Preconditioner", "Quantize", "RandK", "RobustMean", "ShardedSampler", "Sign", "Signum", "Stopper",
           "Store", "TopK", "Training", "TwoBits", "TwoPhaseMean", "Vote", "ZeroOneAdam", "advise", "allgather",
           "allreduce", "generator_for", "loader_context", "local_device", "mean_metrics", "open_checkpoint",
           "plan_for", "print_metrics", "random_state", "robust_mean", "seed_rank", "set_random_state", "shard",
           "synchronize_buffers", "use_gpu_aware_mpi"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mpi_ef' has no attribute {name!r}")
    return getattr(import_module(f"mpi_ef.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
