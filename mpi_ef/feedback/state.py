"""What the rules share: named state arrays, and the way back from a server that all ranks play."""

from collections.abc import Generator
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

from mpi_ef import kernels
from mpi_ef.collectives import Move, Offer, Plan
from mpi_ef.compress import Combination, Compressor, aligned_zeros, source
from mpi_ef.compress.combination import Vector

__all__ = ["Reply", "State", "Steps", "error", "estimate", "form", "kept", "momentum", "replicated", "scratch", "spare"]

# What a rule is: it offers messages, is handed the plans that have exchanged them, and returns its result, (d,).
Steps = Generator[Offer, Plan, Vector]


def _array(kind: str, size: str, **more: Any) -> Any:
    return field(metadata={"kind": kind, "size": size, **more})


# Arrays of the length of this rank's vectors, different on every rank. What a run that goes on with another number of ranks
# makes of them keeps the means over the ranks that the rules live on; :meth:`State.moves` has it from here. Those that are
# `forgotten` can be set to zero, together: a rule then begins anew.


def error() -> Any:
    """Mark what a rank has not sent yet: other ranks get the mean, so that nothing is lost and nothing sent twice."""
    return _array("per rank", "own_d", move=Move("mean"), forgotten=True)


def estimate(of: str, owed: str = "residual") -> Any:
    """Mark what all know of a rank's vector, and of which `of` is the mean: other ranks get that mean, to the last bit.

    A plan that remembers what it has not told yet, as array `owed`, has told so much less of the mean: g + residual is the
    mean of the g_i then, and what other ranks get.
    """
    return _array("per rank", "own_d", move=Move("copy", of=of, owed=owed), forgotten=True)


def momentum() -> Any:
    """Mark an average of a rank's own gradients: other ranks get the mean. Not forgotten: it owes nothing to anybody."""
    return _array("per rank", "own_d", move=Move("mean"), forgotten=False)


def replicated(size: str = "d") -> Any:
    """Mark an array that is the same on all ranks and forgotten with the estimates of which it is the mean."""
    return _array("replicated", size, forgotten=True)


def kept() -> Any:
    """Mark an array of length d, the same on all ranks, that is not forgotten: no estimate belongs to it."""
    return _array("replicated", "d", forgotten=False)


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

    @classmethod
    def moves(cls) -> dict[str, Move]:
        """Return for each array marked "per rank" how it gets to another number of ranks."""
        return {f.name: f.metadata["move"] for f in fields(cls) if "move" in f.metadata}

    @classmethod
    def estimates(cls) -> bool:
        """Tell whether the rule follows gradients by estimates, which a start anew has to begin with a whole vector."""
        return any(f.metadata.get("kind") == "replicated" and f.metadata["forgotten"] for f in fields(cls))

    @classmethod
    def forgotten(cls) -> set[str]:
        """Return the names of the arrays that a start anew sets to zero: errors and estimates, not momenta."""
        return {f.name for f in fields(cls) if f.metadata.get("forgotten")}

    def momenta(self) -> list[Vector]:
        """Return the arrays that are averages of this rank's own gradients. Not copies."""
        return [getattr(self, name) for name in self.moves() if name not in self.forgotten()]

    def forget(self) -> bool:
        """Set errors and estimates to zero, as they are before the first step; momenta stay. Tell whether there are any."""
        forgotten = self.forgotten()
        for name in forgotten:
            getattr(self, name).fill(0)
        return bool(forgotten)


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
