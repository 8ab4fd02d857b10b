"""Torch optimizers over MPI."""

from .adam import OneBitAdam
from .byzantine import ByzEF21
from .coded import CodedOptimizer
from .descent import EF21, EControl, PowerSGD
from .lamb import OneBitLamb
from .local_steps import LocalSteps
from .mkor import MKOR
from .monna import MoNNA, PeerMixing
from .muon import EF21Muon
from .replicated import ReplicatedOptimizer
from .signs import Lion, Signum
from .wrapper import BucketReport, DistributedOptimizer
from .zero_one import ZeroOneAdam

__all__ = ["EF21", "MKOR", "BucketReport", "ByzEF21", "CodedOptimizer", "DistributedOptimizer", "EControl", "EF21Muon",
           "Lion", "LocalSteps", "MoNNA", "OneBitAdam", "OneBitLamb", "PeerMixing", "PowerSGD", "ReplicatedOptimizer",
           "Signum", "ZeroOneAdam"]
