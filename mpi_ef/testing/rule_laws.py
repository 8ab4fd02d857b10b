"""What every rule keeps to, one law a test, on virtual ranks."""

from functools import partial
from typing import Any, ClassVar

import numpy as np

from mpi_ef.collectives import PlanBuilder, build_plan, plan_for
from mpi_ef.compress import Compressor, Identity, Sign, TopK, lazy
from mpi_ef.errors import NonFiniteError
from mpi_ef.feedback import ErrorFeedback, Rule

from .vectors import gaussian
from .virtual import VirtualComm, results

__all__ = ["RuleLaws"]


class RuleLaws:
    """Tests for a rule: a subclass, named ``Test...`` for pytest, says which.

    Attributes
    ----------
    rule : Rule or str
        As :class:`ErrorFeedback` takes it.
    options : dict
    compressors : tuple of Compressor
        Through which it speaks.
    plan : callable or str
        Through which plan; what suits the compressor by default.
    ranks : tuple of int
    mean : bool
        Whether results through the identity are the mean of what the ranks have given: not for rules with momentum.
    """

    rule: ClassVar[Rule | str]
    options: ClassVar[dict[str, Any]] = {}
    compressors: ClassVar[tuple[Compressor, ...]] = (TopK(0.1), Sign(block=16))
    plan: ClassVar[PlanBuilder] = plan_for
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)
    mean: ClassVar[bool] = True
    d: ClassVar[int] = 101

    def _built(self, comm: VirtualComm, compressor: Compressor, dense_steps: int = 0) -> ErrorFeedback:
        plan = build_plan(type(self).plan, comm, compressor, self.d, np.float32)
        return ErrorFeedback(self.rule, plan, dense_steps=dense_steps, **self.options)

    def _law(self, holds: object, law: str, compressor: Compressor, more: str = "") -> None:
        if not holds:
            raise AssertionError(f"{self.rule} breaks the law of {law} through {compressor}: {more}")

    def test_results_are_the_same_on_all_ranks(self) -> None:
        """Results, and the state that is marked replicated, have the same bits everywhere."""

        def program(comm: VirtualComm, compressor: Compressor) -> list[bytes]:
            feedback = self._built(comm, compressor)
            seen = [feedback.step(gaussian(comm.Get_rank(), self.d, step=step)).tobytes() for step in range(5)]
            return seen + [array.tobytes() for array in feedback.replicated().values()]

        for compressor in self.compressors:
            for size in self.ranks:
                rows = results(size, partial(program, compressor=compressor))
                self._law(all(row == rows[0] for row in rows), "equal replicas", compressor, f"{size} ranks differ")

    def test_nothing_is_lost_through_the_identity(self) -> None:
        """What loses nothing gives the mean of the vectors in every step."""

        def program(comm: VirtualComm) -> float:
            feedback, size = self._built(comm, Identity()), comm.Get_size()
            worst = 0.0
            for step in range(4):
                result = feedback.step(gaussian(comm.Get_rank(), self.d, step=step))
                wanted = np.mean([gaussian(rank, self.d, step=step) for rank in range(size)], axis=0)
                worst = max(worst, float(np.abs(result - wanted).max()))
            return worst

        for size in self.ranks if self.mean else ():
            worst = max(results(size, program))
            self._law(worst < 1e-5, "the uncompressed method", Identity(), f"off by {worst:.1e} on {size} ranks")

    def test_a_state_that_was_loaded_goes_on(self) -> None:
        """A rule that has loaded a state makes the steps that the one makes which has saved it, also in dense steps."""

        def program(comm: VirtualComm, compressor: Compressor, saved_at: int) -> bool:
            first, second = (self._built(comm, compressor, dense_steps=2) for _ in range(2))
            vectors = [gaussian(comm.Get_rank(), self.d, step=step) for step in range(7)]
            for x in vectors[:saved_at]:
                first.step(x)
            second.load_state_dict(first.state_dict())
            return all(first.step(x).tobytes() == second.step(x).tobytes() for x in vectors[saved_at:])

        for compressor in self.compressors:
            for saved_at in (1, 2, 4):
                same = all(results(2, partial(program, compressor=compressor, saved_at=saved_at)))
                self._law(same, "going on from a state", compressor, f"saved after step {saved_at}")

    def test_a_step_that_all_skip_changes_nothing(self) -> None:
        """A NaN on one rank raises on all of them, and the next steps are as if it had not been."""

        def program(comm: VirtualComm, compressor: Compressor) -> bool:
            broken, whole = (self._built(comm, compressor) for _ in range(2))
            for step in range(5):
                x = gaussian(comm.Get_rank(), self.d, step=step)
                bad = np.where(np.arange(self.d) == 3, np.float32(np.nan), x) if comm.Get_rank() == 0 else x
                try:
                    broken.step(bad)
                except NonFiniteError:
                    pass
                else:
                    return False
                whole.plan.exchanges = broken.plan.exchanges  # the key of random compressors
                try:
                    if broken.step(x).tobytes() != whole.step(x).tobytes():
                        return False
                except NonFiniteError:  # what was broken is there still
                    return False
            return True

        for compressor in self.compressors:
            same = all(results(2, partial(program, compressor=compressor)))
            self._law(same, "steps that are skipped", compressor, "state has changed, or nothing was raised")

    def test_a_combination_is_the_vector_that_it_is(self) -> None:
        """``lazy(a) - b`` gives the bits that the difference gives."""

        def program(comm: VirtualComm, compressor: Compressor) -> bool:
            one, other = (self._built(comm, compressor) for _ in range(2))
            pairs = [(gaussian(comm.Get_rank(), self.d, step=s), gaussian(9, self.d, step=s)) for s in range(4)]
            return all(one.step(lazy(a) - b).tobytes() == other.step(a - b).tobytes() for a, b in pairs)

        for compressor in self.compressors:
            same = all(results(2, partial(program, compressor=compressor)))
            self._law(same, "combinations", compressor, "other bits than for the vector that was formed beforehand")
