"""A rule at work on one bucket of gradients, whose state is read and written by parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpi_ef.collectives import GatherMean, TwoPhaseMean, chunk_bounds
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.feedback.table import Rule, rule_of
from mpi_ef.kernels.backend import backend, backend_of
from mpi_ef.vectors import mean_over_ranks
from mpi_ef.vectors.places import on_host, overwrite

__all__ = ["FeedbackBucket", "Place", "Saved", "reset", "resharded"]

Saved = dict[str, Any]  # of one parameter: arrays of its shape by name, and counters

_RESIDUAL = "plan.residual"


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the vector of its bucket, and in which order of its entries."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @classmethod
    def of_parameter(cls, name: str, p: Tensor, start: int) -> "Place":
        """Return the place of a parameter that begins there; DDP keeps its strides, for example of channels_last."""
        return cls(name, tuple(p.shape), torch.empty_like(p, device="meta").stride(), start)

    def view(self, vector: Vector) -> Tensor:
        """Return the parameter's entries of `vector` in the parameter's shape. Not a copy."""
        return _tensor(vector).as_strided(self.shape, self.stride, self.start)


def _tensor(vector: Any) -> Tensor:
    return torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector.tensor


class FeedbackBucket:
    """The rule at work on the vector of one bucket, and which entries of it belong to which parameter.

    State is read and written by parameter. The residual of `TwoPhaseMean` is divided into chunks, one for each rank: a rank
    returns its chunk with zeros around it, and :meth:`fill` adds up those of all ranks. What other plans keep from one
    exchange to the next belongs to the bucket as a whole.
    """

    def __init__(self, feedback: ErrorFeedback, places: Sequence[Place]) -> None:
        self.feedback, self.places = feedback, tuple(places)
        plan = feedback.plan
        bounds = plan.bounds if isinstance(plan, TwoPhaseMean) and plan.state() else []
        self._bounds: NDArray[np.int64] = np.array(bounds, np.int64)  # of the chunks of the residual
        for name, array in self._arrays().items():
            if array.size != plan.d and name != _RESIDUAL:
                raise OptionError(f"FeedbackHook: {name} of {feedback.rule.name} on {type(plan).__name__} is not as long as "
                                  "the gradient and cannot follow parameters; take another rule or plan")

    def vector(self, buffer: Tensor) -> Vector:
        """Return the buffer of a bucket as a vector of its plan. Not a copy."""
        vector: Vector = backend(self.feedback.plan.dtype, self.feedback.plan.device).vector(buffer)
        return vector

    def _arrays(self) -> dict[str, Vector]:
        """Return the arrays with an entry for every one of the gradient, or of this rank's chunk of it. Not copies."""
        arrays = {name: leaf.array for name, leaf in self.feedback.state.leaves().items() if leaf.array.size}
        return arrays | ({_RESIDUAL: self.feedback.plan.state()["residual"]} if self._bounds.size else {})

    def state(self) -> dict[str, Saved]:
        """Return a copy of the state on this rank by parameter. Local."""
        whole = {name: self._spread(name, array) for name, array in self._arrays().items()}
        counters = {"steps": self.feedback.steps, "exchanges": self.feedback.plan.exchanges}
        if self.feedback.state.averages():
            counters["late"] = int(bool(self.feedback.state.late))
        form = torch.contiguous_format
        return {place.name: counters | {"arrays": {name: on_host(place.view(vector)).clone(memory_format=form)
                                                   for name, vector in whole.items()}}
                for place in self.places}

    def plan_state(self) -> dict[str, Tensor]:
        """Return a copy of what belongs to no parameter. Local."""
        kept = {} if self._bounds.size else self.feedback.plan.state()
        return {name: on_host(_tensor(array)).clone() for name, array in kept.items()}

    def fill(self, saved: Mapping[str, Saved], plan: Mapping[str, Tensor]) -> None:
        """Overwrite the state with what :meth:`state` of other buckets has returned for these parameters. Collective.

        `plan` is what :meth:`plan_state` of a bucket of the same parameters has returned, or empty.
        """
        arrays, plan_here = self._arrays(), self.feedback.plan
        either = {_RESIDUAL} if isinstance(plan_here, GatherMean | TwoPhaseMean) else set()
        kept = {place.name: saved[place.name]["arrays"] for place in self.places}
        for name, of_place in kept.items():
            if not (of_place.keys() ^ arrays.keys()) <= either:
                raise OptionError(f"FeedbackHook: the saved state of {name} is {', '.join(of_place)}, here it is "
                                  f"{', '.join(arrays)}; build the hook as it was when saved")
        for name, array in arrays.items():
            whole = self._spread(name, array)
            self._write(whole, name, kept)
            if name == _RESIDUAL:
                self._sum_chunk(whole, array, self._bounds)
        if _RESIDUAL not in arrays and any(_RESIDUAL in of_place for of_place in kept.values()):
            self._inherit(kept)
        for name, tensor in plan.items():
            overwrite(_tensor(self.feedback.plan.state()[name]), tensor)
        counters = {key: max(saved[place.name][key] for place in self.places) for key in ("steps", "exchanges")}
        late = f"0:{self.feedback.plan.d}" if any(saved[place.name].get("late", 0) for place in self.places) else ""
        self.feedback.load_state_dict(self.feedback.state_dict() | counters | {"late": late})

    def _write(self, whole: Vector, name: str, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Overwrite `whole`, (d,), with an array by parameter; with zeros where it is missing."""
        for place in self.places:
            view, tensor = place.view(whole), kept[place.name].get(name)
            if tensor is None:
                view.zero_()
            else:
                overwrite(view, tensor)

    def _inherit(self, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add what other plans have not sent yet to what a plan without a residual will send. Collective."""
        plan = self.feedback.plan
        if not (heir := self.feedback.state.heir()):
            return
        whole, bounds = plan.zeros(plan.d), np.array(chunk_bounds(plan.d, plan.size))
        self._write(whole, _RESIDUAL, kept)
        chunk, owed = np.empty(np.diff(bounds)[plan.rank], plan.dtype), np.empty(plan.d, plan.dtype)
        self._sum_chunk(whole, chunk, bounds)
        plan.comm.Allgatherv(chunk, [owed, (np.diff(bounds), bounds[:-1])])
        array = self._arrays()[heir]
        array += backend_of(array).place(owed)

    def _spread(self, name: str, array: Vector) -> Vector:
        """Return an array of length d: this one, or a new one with this rank's chunk in its place."""
        if name != _RESIDUAL:
            return array
        whole: Vector = self.feedback.plan.zeros(self._bounds[-1])
        whole[self._bounds[self.feedback.plan.rank] :][: array.size] = array
        return whole

    def _sum_chunk(self, whole: Vector, chunk: Vector, bounds: NDArray[np.int64]) -> None:
        """Overwrite `chunk` with the sum over the ranks of this rank's chunk of `whole`. Collective."""
        n, size = self.feedback.plan.size, chunk.size
        whole, arrived = backend_of(whole).fetch(whole), np.empty((n, size), chunk.dtype)
        outward, inward = (np.diff(bounds), bounds[:-1]), (np.full(n, size), np.arange(n) * size)
        self.feedback.plan.comm.Alltoallv([whole, outward], [arrived, inward])
        chunk[:] = arrived.sum(axis=0)


def resharded(of_ranks: Sequence[Mapping[str, Tensor]], rule: str | Rule, rank: int) -> dict[str, Tensor]:
    """Return the arrays of a parameter on rank `rank` of another number of ranks, from those of all old ranks. Local.

    By the rule's marks, see :mod:`mpi_ef.feedback.table`; but the new chunks are unknown yet, so rank 0 gets the residual.
    """
    first, marks = of_ranks[0], rule_of(rule)[0].state.marks()

    def residual() -> Tensor:
        return reduce(torch.add, (arrays[_RESIDUAL] for arrays in of_ranks))  # exact: each entry has been on one rank

    def array(name: str) -> Tensor:
        if name == _RESIDUAL:
            return residual() if rank == 0 else torch.zeros_like(first[name])
        if name not in marks or (move := marks[name].reshard) is None:
            return first[name]
        if move.how == "copy":
            return first[move.of] + residual() if f"plan.{move.owed}" in first else first[move.of]
        return mean_over_ranks((arrays[name] for arrays in of_ranks), name)

    return {name: array(name) for name in first}


def reset(saved: Saved, rule: str | Rule) -> Saved:
    """Return the state of a parameter with errors, residuals and estimates as at the start, see `ErrorFeedback.forget`."""
    state = rule_of(rule)[0].state
    zero = {name for name, mark in state.marks().items() if mark.resets}
    zero |= {_RESIDUAL} if zero else zero
    arrays = {name: torch.zeros_like(array) if name in zero else array for name, array in saved["arrays"].items()}
    return saved | {"arrays": arrays} | ({"steps": 0} if state.estimates() else {})
