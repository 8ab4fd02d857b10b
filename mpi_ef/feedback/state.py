"""What the rules share: named state arrays, and the way back from a server that all ranks play."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, fields, replace
from inspect import get_annotations
from typing import Any, Self

import numpy as np

from mpi_ef.collectives import Offer, Plan, TwoPhaseMean
from mpi_ef.compress import Combination, Compressor, lazy, source
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, briefly
from mpi_ef.kernels.backend import backend_of
from mpi_ef.statetree import PER_RANK, REPLICATED, Leaf, Reshard

__all__ = ["Reply", "State", "Steps", "average", "double_buffer", "error", "estimate", "form", "momentum", "of_broken",
           "persistent", "replicated", "scratch"]

# What a rule is: it offers messages, is handed the plans that have exchanged them, and returns its result, (d,).
Steps = Generator[Offer, Plan, Vector]


def _array(size: str, leaf: Leaf | None = None) -> Any:
    """Mark an array as long as `size` says, see :meth:`State.zeros`, which is saved as `leaf`, or not at all."""
    return field(metadata={"size": size, "leaf": leaf})


# Arrays of the length of this rank's vectors, different on every rank. What a run that goes on with another number of ranks
# makes of them keeps the means over the ranks that the rules live on. Those that reset are set to zero, together, where a
# rule starts again.


def error() -> Any:
    """Mark what a rank has not sent yet: other ranks get the mean, so that nothing is lost and nothing sent twice."""
    return _array("own_d", Leaf(PER_RANK, reshard=Reshard("mean"), resets=True))


def estimate(of: str, owed: str = "residual", size: str = "own_d") -> Any:
    """Mark what all know of a rank's vector, and of which `of` is the mean: other ranks get that mean, to the last bit.

    A plan that keeps what it has not sent yet, as array `owed`, has sent so much less of the mean: g + residual is the
    mean of the g_i then, and what other ranks get.
    """
    return _array(size, Leaf(PER_RANK, reshard=Reshard("copy", of=of, owed=owed), resets=True))


def momentum() -> Any:
    """Mark an average of a rank's own gradients: other ranks get the mean. Not forgotten: nothing of it is owed."""
    return _array("own_d", Leaf(PER_RANK, reshard=Reshard("mean")))


def average() -> Any:
    """Mark a :func:`momentum` that begins with the first vector, see :meth:`State.averaged`; others begin with zero."""
    return field(metadata={**momentum().metadata, "begins": True})


def replicated(size: str = "d") -> Any:
    """Mark an array that is the same on all ranks and forgotten with the estimates of which it is the mean."""
    return _array(size, Leaf(REPLICATED, resets=True))


def persistent() -> Any:
    """Mark an array of length d, the same on all ranks, that is not forgotten: no estimate belongs to it."""
    return _array("d", Leaf(REPLICATED))


def scratch() -> Any:
    """Mark an array of length d whose content is not needed after a step."""
    return _array("d")


def double_buffer() -> Any:
    """Mark an array of the length of this rank's vectors whose content is not needed after a step."""
    return _array("own_d")


@dataclass(kw_only=True)
class State:
    """Named arrays of a rule, zero at the start, beginning where a cache line does; and what it is told of a step.

    Attributes
    ----------
    whole : bool
        Whether the step exchanges whole vectors, as the dense first ones do.
    draw : int
        The key of what the step draws: the number of steps before it, dense ones included. A restart does not set it back.
    begins : list of slice
        The entries of the vector that have their first value in this step, see :meth:`averaged`.
    late : str
        Runs of entries that have had none before, "0:3 7:9", in a rule with an :func:`average`.
    """

    whole: bool = False
    draw: int = 0
    begins: list[slice] = field(default_factory=list)
    late: str = ""

    @classmethod
    def zeros(cls, plan: Plan, **options: Any) -> Self:
        """Return the state before the first step. `server_d` is what every rank keeps where it plays the server."""
        sizes = {"d": plan.d, "own_d": plan.own_d, "clients_d": plan.clients * plan.d,
                 "server_d": 0 if isinstance(plan, TwoPhaseMean) else plan.d,  # there ranks share that
                 **plan.sizes}
        for f in fields(cls):
            if f.metadata.get("size", "d") not in sizes:
                size = f.metadata["size"]
                raise OptionError(f"{cls.__name__}: {f.name} has size {briefly(size)}; take one of {', '.join(sizes)}")
        arrays: dict[str, Any] = {f.name: plan.zeros(sizes[f.metadata["size"]])
                                  for f in fields(cls) if "size" in f.metadata}
        return cls(**(arrays | options), late=f"0:{plan.d}" if cls.averages() else "")

    @classmethod
    def check_marks(cls) -> None:
        """Raise `OptionError` where arrays are not made, or one is an estimate of what ranks do not share. Local."""
        if get_annotations(cls) and "__dataclass_fields__" not in vars(cls):
            raise OptionError(f"{cls.__name__}: it is no dataclass, so that nothing makes its arrays; put "
                              "@dataclass(kw_only=True) before it")
        marks = cls.marks()
        for name, mark in marks.items():
            of = mark.reshard.of if mark.reshard is not None and mark.reshard.how == "copy" else None
            if of is not None and (of not in marks or marks[of].kind != REPLICATED):
                raise OptionError(f"{cls.__name__}: {name} is an estimate of {briefly(of)}, and no array {briefly(of)} is "
                                  "replicated(), "
                                  "which another number of ranks is to get in its place")

    @classmethod
    def averages(cls) -> bool:
        """Tell whether the rule has an :func:`average`."""
        return any(f.metadata.get("begins") for f in fields(cls))

    def begin(self, plan: Plan, resting: Iterable[slice]) -> str:
        """Set `begins`: what is late, but for entries that rest in this step, in order. Return what is late after it."""
        begins, still = [], []
        for run in self.late.split():
            at, stop = map(int, run.split(":"))
            for rest in resting:
                if (start := max(at, rest.start)) < (end := min(stop, rest.stop)):
                    begins.append((at, start))
                    still.append(f"{start}:{end}")
                    at = end
            begins.append((at, stop))
        vectors = range(0, plan.own_d, plan.d or 1)
        self.begins = [slice(vector + start, vector + stop) for vector in vectors for start, stop in begins if start < stop]
        return " ".join(still)

    def averaged(self, x: Combination, first: Vector | Combination, into: Vector) -> Vector:
        """Write the average `x` to `into` and return that; `first` where entries begin, as the papers' averages do."""
        form(x, into=into)
        for part in self.begins:
            form(lazy(first)[part], into=into[part])
        return into

    @classmethod
    def marks(cls) -> dict[str, Leaf]:
        """Return what each array is that is saved, by name."""
        return {f.name: f.metadata["leaf"] for f in fields(cls) if f.metadata.get("leaf")}

    def leaves(self) -> dict[str, Leaf]:
        """Return the arrays that are saved, by name. Not copies."""
        return {name: replace(mark, array=getattr(self, name)) for name, mark in self.marks().items()}

    @classmethod
    def heir(cls) -> str:
        """Return the array that gets what a plan owed that keeps it no more: the aggregate of estimates, else errors."""
        marks = {name: mark.reshard for name, mark in cls.marks().items() if mark.reshard is not None and mark.resets}
        aggregates = [move.of for move in marks.values() if move.how == "copy" and move.owed]
        return next(iter([*aggregates, *(name for name, move in marks.items() if move.how == "mean")]), "")

    @classmethod
    def estimates(cls) -> bool:
        """Tell whether the rule follows gradients by estimates, which a restart has to begin with a whole vector."""
        return any(mark.kind == REPLICATED and mark.resets for mark in cls.marks().values())


class Reply:
    """The compressed way back from a server that every rank plays, so that nothing travels."""

    def __init__(self, compressor: Compressor, plan: Plan) -> None:
        self._codec = compressor.codec_on(plan.device, plan.d, plan.dtype)
        self._wire = plan.zeros(self._codec.nbytes, np.uint8)
        self._rank = plan.clients
        self.nbytes = self._codec.nbytes  # of the message that a server would send to every client

    def move(self, behind: Vector, out: Vector, step: int) -> None:
        """Take C'(behind) off `behind` and add it to `out`; `step` is the key of random compressors."""
        self._codec.encode(source(behind), self._wire, step=step, rank=self._rank)
        for factor, vector in ((-1.0, behind), (1.0, out)):
            self._codec.add_encoded(self._wire, vector, factor)


def of_broken(state: State, c: Plan) -> list[tuple[str, slice, Vector]]:
    """Return copies of errors and averages of this rank's clients of which nothing was sent: name, where, content. Local."""
    broken = () if c.broken is None else np.flatnonzero(c.broken[c.first : c.first + c.own]).tolist()
    names = [name for name, mark in state.marks().items()
             if broken and mark.reshard is not None and (mark.reshard.how == "mean" or not mark.resets)]
    places = [slice(j * c.d, (j + 1) * c.d) for j in broken]
    return [(name, place, getattr(state, name)[place].copy()) for name in names for place in places]


def form(x: Combination, into: Vector) -> Vector:
    """Write `x` to `into`, in a pass of its own, and return that."""
    terms, factors = source(x)[:2]
    backend_of(into).combine(terms, factors, into)
    return into
