"""Replicas that step alone between two synchronisations, and what follows from where they were the last time."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from mpi_ef import kernels
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError

from .variance import VarianceOptimizer

__all__ = ["Apart"]


class Run(NamedTuple):
    """Parameters one after the other, of one group, with one S, D and number of steps; see :class:`ZeroOneAdam`.

    `moves` tells whether they have a gradient in this step, `moved` whether one since the last synchronisation. `weight` is
    that of the newest momentum in u.
    """

    numbers: range
    part: slice
    group: dict[str, Any]
    covered: float
    left: float
    moves: bool
    moved: bool
    steps: int
    weight: float = 0.0


class Apart(VarianceOptimizer):
    """What of ZeroOneAdam has to do with x, where the replicas were the same the last time, and the way from there.

    `arrays` has m, u and x; S is in `covered`, D in `left`, for every parameter, see :class:`ZeroOneAdam`. While replicas
    are the same the parameters are what counts, and x becomes what they are when a step is taken: what is written to them
    stays, also when it is saved. Between two synchronisations they follow from x and u, and what is written to them raises.
    """

    local_steps: int
    covered: list[float]
    left: list[float]
    moved: list[bool]

    def _start_afresh(self) -> None:
        """Count from a synchronisation on: steps, and for every parameter S, D, and whether it has had a gradient."""
        self.local_steps, count = 0, len(self.flat.parameters)
        self.covered, self.left, self.moved = [0.0] * count, [1.0] * count, [False] * count

    def _runs(self, moves: Sequence[bool]) -> Iterator[Run]:
        """Yield the parameters in runs as long as they can be. Local."""
        keys = list(zip(self.covered, self.left, moves, self.moved, self.counted, strict=True))
        for numbers, part, group, key in self._stretches(keys):
            yield Run(numbers, part, group, *key)

    @property
    def synchronized(self) -> bool:
        """Whether the parameters are the same on all ranks now."""
        return self.local_steps == 0

    @property
    def shared_values(self) -> Vector:
        """The parameters, (d,), of now or, where ranks have gone on alone, of the last synchronisation. Not a copy."""
        return self.flat.values if self.synchronized else self.arrays["x"]

    def _collect(self) -> Exception | None:
        problem = super()._collect()
        if problem is None and self.frozen_step is not None:
            if self.synchronized:
                np.copyto(self.arrays["x"], self.flat.values)  # where something has been written to them
            else:
                return self._displaced("step", self.flat.values)
        return problem

    def before_save(self) -> None:
        """Raise where a save would not have the parameters of this moment: it has x and u. Local."""
        if not self.synchronized:
            values = self.flat.values.copy()
            for number, written in self.flat.written().items():
                values[self.flat.place(number)] = written.reshape(-1).numpy()
            if problem := self._displaced("state_dict", values):
                raise problem

    def _displaced(self, call: str, values: Vector) -> OptionError | None:
        """Return an error with the first parameter that is in `values`, (d,), not where x and u say. Local."""
        expected = np.empty_like(values)
        self._place(expected)
        different = expected.view(np.uint8) != values.view(np.uint8)
        if not different.any():
            return None
        wrong = bisect_right(self.flat.starts, int(different.argmax()) // values.itemsize) - 1
        return OptionError(
            f"{type(self).__name__}.{call}: {self._name(wrong)} was written to between two synchronisations, where each "
            "rank has its own values; call optimizer.synchronize() on all ranks first"
        )

    def _ways(self, moves: Sequence[bool]) -> list[Run]:
        return [self._advance(run) if run.moves else run for run in self._runs(moves)]

    def _advance(self, run: Run) -> Run:
        """Return the run with what the next step makes of its S and D."""
        decay = 1.0 - run.group["lr"] * run.group["weight_decay"]
        size = run.group["lr"] / self._correction(self.betas[0], run.steps + 1)
        total = decay * run.covered + size
        weight = size / total if total > 0.0 else 1.0
        return run._replace(weight=weight, covered=total, left=decay * run.left, moved=True)

    def _meet(self, ways: list[Run]) -> None:
        """Exchange the u_i that are in the place of the parameters, and take the way of their mean from x. Collective.

        What has not moved since the last time has no part in it.
        """
        still = [number for run in ways if not run.moved for number in run.numbers]
        try:
            with self._silent(still, self.flat.values) if still else nullcontext():
                mean = self._exchange(self.flat.values)
        except BaseException:
            self._place(self.flat.values)
            raise
        for run in ways:
            if run.moved:
                self._go(run, mean, self.arrays["x"])
                self.m[run.part] = mean[run.part]
        self._start_afresh()
        self._place(self.flat.values)

    def _place(self, values: Vector) -> None:
        """Write to `values`, (d,), where this rank's steps since the last synchronisation lead from x. Local."""
        np.copyto(values, self.arrays["x"])
        for run in self._runs(self.moved):
            if run.moved:
                self._go(run, self.arrays["u"], values)

    def _go(self, run: Run, u: Vector, x: Vector) -> None:
        """Let a run's x be D x - S u / sqrt(v). Local."""
        real, part = self.flat.dtype.type, run.part
        kernels.preconditioned_step(u[part], self._inverse[part], real(run.covered), real(run.left), x[part])

    def synchronize(self) -> None:
        """Synchronise now, between two steps, for example before the model is evaluated or saved. Collective.

        Does nothing when the replicas are the same. The steps that follow are not those without it.
        """
        if not self.synchronized:
            np.copyto(self.flat.values, self.arrays["u"])
            self._meet(self._ways([False] * len(self.moved)))
            self.flat.publish()

    def check_replicas(self) -> None:
        """Raise on all ranks unless all parameters, those of the last synchronisation, are the same bits. Collective.

        Raises
        ------
        DisagreementError
            With the first parameter that differs, and the ranks that hold what rank 0 does not.
        """
        if self.synchronized:
            super().check_replicas()
            return
        np.copyto(self.flat.values, self.arrays["x"])
        self.flat.publish()
        try:
            super().check_replicas()
        finally:
            self._place(self.flat.values)
            self.flat.publish()
