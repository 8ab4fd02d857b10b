"""What the rules share: named state arrays, and the way back from a server that all ranks play."""

from collections.abc import Generator
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

from mpi_ef import kernels
from mpi_ef.collectives import Offer, Plan
from mpi_ef.compress import Combination, Compressor, aligned_zeros, source
from mpi_ef.compress.combination import Vector

__all__ = ["Reply", "State", "Steps", "form", "per_rank", "replicated", "scratch", "spare"]

# What a rule is: it offers messages, is handed the plans that have exchanged them, and returns its result, (d,).
Steps = Generator[Offer, Plan, Vector]


def _array(kind: str, size: str) -> Any:
    return field(metadata={"kind": kind, "size": size})


def per_rank() -> Any:
    """Mark an array of the length of this rank's vectors, different on every rank."""
    return _array("per rank", "own_d")


def replicated() -> Any:
    """Mark an array of length d, the same on all ranks."""
    return _array("replicated", "d")


def scratch() -> Any:
    """Mark an array of length d whose content nobody needs after a step."""
    return _array("scratch", "d")


def spare() -> Any:
    """Mark an array of the length of this rank's vectors whose content nobody needs after a step."""
    return _array("scratch", "own_d")


@dataclass(kw_only=True)
class State:
    """Named arrays of a rule, zero at the start, beginning where a cache line does."""

    @classmethod
    def zeros(cls, plan: Plan, **options: Any) -> Self:
        """Return the state before the first step."""
        arrays: dict[str, Any] = {
            f.name: aligned_zeros(getattr(plan, f.metadata["size"]), plan.dtype)
            for f in fields(cls)
            if "kind" in f.metadata
        }
        return cls(**(arrays | options))

    def arrays(self, kind: str) -> dict[str, Vector]:
        """Return the arrays marked "per rank" or "replicated", by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("kind") == kind}


class Reply:
    """The compressed way back from a server that every rank plays, so that nothing travels.

    Attributes
    ----------
    nbytes : int
        Size of the message that a server would send to every client.
    """

    def __init__(self, compressor: Compressor, plan: Plan) -> None:
        self._codec = compressor.codec(plan.d, plan.dtype)
        self._wire = np.zeros(self._codec.nbytes, np.uint8)
        self._rank = plan.clients
        self.nbytes = self._codec.nbytes

    def move(self, behind: Vector, out: Vector, step: int) -> None:
        """Take C'(behind) off `behind` and add it to `out`; `step` is the key of random compressors."""
        self._codec.encode(source(behind), self._wire, step=step, rank=self._rank)
        for factor, vector in ((-1.0, behind), (1.0, out)):
            self._codec.add_encoded(self._wire, vector, factor)


def form(x: Combination, into: Vector) -> Vector:
    """Write `x` to `into`, in a pass of its own, and return that."""
    terms, factors = source(x)[:2]
    kernels.combine(terms, factors, into, np.empty(kernels.COMBINE_SCRATCH, into.dtype))
    return into
