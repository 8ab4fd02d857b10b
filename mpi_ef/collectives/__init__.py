"""Compressed collectives over any MPI communicator, with numpy buffers and without torch.

A *plan* is built once (collective: all ranks together, same arguments) and exchanges vectors afterwards. The calls
:func:`allreduce` and :func:`allgather` build and keep plans for you.
"""

from mpi_ef.comm.protocol import Comm

from .advice import Advice, advise
from .chosen import PlanBuilder, build_plan, plan_for
from .clients import ClientsMean
from .combine import Combine
from .dense import DenseMean
from .direct import use_gpu_aware_mpi
from .exchange import Round
from .frames import Frames
from .gather import GatherMean
from .lateness import Lateness
from .lowrank import LowRankMean
from .node import NodeMean
from .onecall import allgather, allreduce
from .peers import Heard, Peers
from .plan import LinkTraffic, Offer, Plan, Traffic
from .robust import RobustMean, robust_mean
from .two_phase import TwoPhaseMean, chunk_bounds

__all__ = ["Advice", "ClientsMean", "Combine", "Comm", "DenseMean", "Frames", "GatherMean", "Heard", "Lateness",
           "LinkTraffic", "LowRankMean", "NodeMean", "Offer", "Peers", "Plan", "PlanBuilder", "RobustMean", "Round",
           "Traffic", "TwoPhaseMean", "advise", "allgather", "allreduce", "build_plan", "chunk_bounds", "plan_for",
           "robust_mean", "use_gpu_aware_mpi"]
