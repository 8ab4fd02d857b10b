"""Torch optimizers over MPI."""

from .wrapper import EF21, BucketReport, DistributedOptimizer, EControl

__all__ = ["EF21", "BucketReport", "DistributedOptimizer", "EControl"]
