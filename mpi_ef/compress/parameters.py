"""Compressors that want to know a model's parameters."""

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from .compressor import Compressor
from .lowrank import LowRank
from .sparse import TopK

__all__ = ["for_parameters"]


def for_parameters(compressor: Compressor, shapes: Iterable[tuple[int, ...]]) -> Compressor:
    """Return the compressor for a vector of parameters of these shapes, with "parameters" replaced by what it stands for."""
    if isinstance(compressor, TopK) and compressor.segments == "parameters":
        return replace(compressor, segments=tuple(map(prod, shapes)))
    if isinstance(compressor, LowRank) and compressor.shapes == "parameters":
        return replace(compressor, shapes=tuple(shapes))
    return compressor
