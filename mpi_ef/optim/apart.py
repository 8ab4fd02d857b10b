"""Replicas that step alone between two synchronisations, and what follows from where they were the last time."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np

from mpi_ef import kernels
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError

from .runs import Advance, Run
from .variance import VarianceOptimizer

__all__ = ["Apart"]


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
    _inverse: Vector

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
        real = self.flat.dtype.type
        for run in self._runs(self.moved):
            expected = self.arrays["x"][run.part].copy()
            if run.moved:
                kernels.preconditioned_step(self.arrays["u"][run.part], self._inverse[run.part], real(run.covered),
                                            real(run.left), expected)  # fmt: skip
            if expected.tobytes() != values[run.part].tobytes():
                wrong = int((expected != values[run.part]).argmax()) + run.part.start
                return OptionError(f"{type(self).__name__}.{call}: {self._name(bisect_right(self.flat.starts, wrong) - 1)} "
                                   "was written to between two synchronisations, where each rank has its own values; call "
                                   "optimizer.synchronize() on all ranks first")  # fmt: skip
        return None

    def _ways(self, moves: Sequence[bool]) -> list[tuple[Run, Advance]]:
        return [(run, self._advance(run)) for run in self._runs(moves)]

    def _advance(self, run: Run) -> Advance:
        """Return what the next step makes of a run's S and D."""
        if not run.moves:
            return Advance(0.0, run.covered, run.left, run.moved)
        decay = 1.0 - run.group["lr"] * run.group["weight_decay"]
        size = run.group["lr"] / self._correction(self.betas[0], run.steps + 1)
        total = decay * run.covered + size
        return Advance(size / total if total > 0.0 else 1.0, total, decay * run.left, True)

    def _meet(self, ways: list[tuple[Run, Advance]]) -> None:
        """Exchange the u_i that are in the place of the parameters, and take the way of their mean from x. Collective.

        What has not moved since the last time has no part in it.
        """
        real, x, m = self.flat.dtype.type, self.arrays["x"], self.arrays["m"]
        still = [number for run, a in ways if not a.moved for number in run.numbers]
        try:
            with self._silent(still, self.flat.values) if still else nullcontext():
                mean = self._exchange(self.flat.values)
        except BaseException:
            self._place()
            raise
        for (_, part, *_), (_, covered, left, moved) in ways:
            if moved:
                kernels.preconditioned_step(mean[part], self._inverse[part], real(covered), real(left), x[part])
                m[part] = mean[part]
        self._start_afresh()
        self._place()

    def _place(self) -> None:
        """Put the parameters where this rank's steps since the last synchronisation lead from x."""
        values, real = self.flat.values, self.flat.dtype.type
        np.copyto(values, self.arrays["x"])
        if self.local_steps:
            for run in self._runs(self.moved):
                if run.moved:
                    kernels.preconditioned_step(self.arrays["u"][run.part], self._inverse[run.part], real(run.covered),
                                                real(run.left), values[run.part])  # fmt: skip

    def synchronize(self) -> None:
        """Synchronise now, between two steps, for example before the model is evaluated or saved. Collective.

        Does nothing when the replicas are the same. The steps that follow are not those without it.
        """
        if not self.synchronized:
            np.copyto(self.flat.values, self.arrays["u"])
            self._meet(self._ways([False] * len(self.moved)))
            self.flat.write_back()

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
        self.flat.write_back()
        try:
            super().check_replicas()
        finally:
            self._place()
            self.flat.write_back()
