"""Robust aggregation: what takes the place of a mean of n vectors of which up to f are wrong. It knows no MPI and no torch.

Aggregators are frozen dataclasses that can be put one after the other, ``NNM(TrimmedMean())``; :func:`aggregate` applies one
to rows that are all here, :func:`mpi_ef.collectives.robust_mean` to the vectors of all ranks.
"""

from .aggregation import Aggregation, aggregate, nearest_mean
from .aggregators import (
    NNM,
    Aggregator,
    Bucketing,
    CenteredClip,
    ClipLargest,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    TrimmedMean,
)
from .view import Answer, View

__all__ = ["NNM", "Aggregation", "Aggregator", "Answer", "Bucketing", "CenteredClip", "ClipLargest",
           "GeometricMedian", "Krum", "Mean", "Median", "MultiKrum", "TrimmedMean", "View", "aggregate",
           "nearest_mean"]
