"""What every rule keeps to, one law a test, on virtual ranks."""

from functools import partial
from typing import Any, ClassVar

import numpy as np

from mpi_ef.collectives import PlanBuilder, build_plan, plan_for
from mpi_ef.compress import Compressor, Identity, Sign, TopK, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import NonFiniteError
from mpi_ef.feedback import ErrorFeedback, Rule

from .law import Laws, law, must, same_bits
from .vectors import gaussian
from .virtual import VirtualComm, results

__all__ = ["RuleLaws"]


class RuleLaws(Laws):
    """Tests for a rule: a subclass, named ``Test...`` for pytest, says which.

    Attributes
    ----------
    rule : Rule or str
        As :class:`ErrorFeedback` takes it.
    options : dict
    compressors : tuple of Compressor
    plan : callable or str
        What suits the compressor by default.
    ranks : tuple of int
    mean : bool
        Whether results through the identity are the mean of the ranks' vectors: not for rules with momentum.
    follows : float
        Results, averaged over steps with the same vectors, come to so many times the mean of these, as what a message lacks
        is sent later. 0 for rules that lose something, as votes do, or that take no gradients.
    """

    tested = "rule"
    rule: ClassVar[Rule | str]
    options: ClassVar[dict[str, Any]] = {}
    compressors: ClassVar[tuple[Compressor, ...]] = (TopK(0.1), Sign(block=16))
    plan: ClassVar[PlanBuilder] = plan_for
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)
    mean: ClassVar[bool] = True
    follows: ClassVar[float] = 1.0
    d: ClassVar[int] = 101

    def subject(self) -> str:
        """Return what is tested, for messages."""
        return self.rule.name if isinstance(self.rule, Rule) else super().subject()

    def _built(self, comm: VirtualComm, compressor: Compressor, dense_steps: int = 0) -> ErrorFeedback:
        plan = build_plan(type(self).plan, comm, compressor, self.d, np.float32)
        return ErrorFeedback(self.rule, plan, dense_steps=dense_steps, **self.options)

    def _steps(self, feedback: ErrorFeedback, *steps: int) -> list[Vector]:
        """Take steps with vectors of this rank, and return copies of the results. Collective."""
        return [feedback.step(gaussian(feedback.plan.rank, self.d, step=step)).copy() for step in steps]

    @law("equal replicas")
    def test_results_are_the_same_on_all_ranks(self) -> None:
        """Results, and the state that is marked replicated, have the same bits everywhere."""

        def program(comm: VirtualComm, compressor: Compressor) -> list[Vector]:
            feedback = self._built(comm, compressor)
            return [*self._steps(feedback, *range(5)), *feedback.replicated().values()]

        for size, compressor, rows in self._run(program):
            must(all(same_bits(row, rows[0]) for row in rows), f"{size} ranks differ through {compressor}")

    @law("the uncompressed method")
    def test_nothing_is_lost_through_the_identity(self) -> None:
        """A compressor without loss gives the mean of the vectors in every step."""
        for size in self.ranks if self.mean else ():
            got = results(size, lambda comm: self._steps(self._built(comm, Identity()), *range(4)))
            wanted = [np.mean([gaussian(rank, self.d, step=step) for rank in range(size)], axis=0) for step in range(4)]
            off = float(np.abs(np.subtract(got, wanted)).max())
            must(off < 1e-5, f"off by {off:.1e} on {size} ranks")

    @law("what is sent later")
    def test_nothing_is_lost_in_the_long_run(self) -> None:
        """Results for vectors that stay the same come to their mean, on an average and within a tenth."""
        steps = 400

        def vector(rank: int) -> Vector:
            """Return entries of which none is small, so that all have their turn in few steps."""
            x: Vector = np.sign(gaussian(rank, self.d)) + np.float32(0.25) * gaussian(rank, self.d, step=1)
            return x

        def program(comm: VirtualComm, compressor: Compressor) -> Vector:
            feedback, x, total = self._built(comm, compressor), vector(comm.Get_rank()), np.zeros(self.d)
            for step in range(steps):
                result = feedback.step(x)
                if step >= steps // 2:
                    total += result
            return total / (steps - steps // 2)

        wanted = self.follows * (vector(0) + vector(1)) / 2
        for _, compressor, (got, _) in self._run(program, 2) if self.follows else ():
            off = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
            text = f"the mean result of steps {steps // 2 + 1} to {steps} is off by {100 * off:.0f} % through {compressor}"
            must(off < 0.1, text)

    @law("going on from a state")
    def test_a_state_that_was_loaded_goes_on(self) -> None:
        """After loading, the steps are those of the rule that was saved, also in dense steps."""

        def program(comm: VirtualComm, compressor: Compressor, saved_at: int) -> None:
            first, second = (self._built(comm, compressor, dense_steps=2) for _ in range(2))
            self._steps(first, *range(saved_at))
            second.load_state_dict(first.state_dict())
            same = same_bits(*(self._steps(feedback, *range(saved_at, 7)) for feedback in (first, second)))
            must(same, f"saved after step {saved_at}, through {compressor}")

        for saved_at in (1, 2, 4):
            self._run(partial(program, saved_at=saved_at), 2)

    @law("steps that are skipped")
    def test_a_step_that_all_skip_changes_nothing(self) -> None:
        """A NaN on one rank raises on all of them, and the next steps are as if it had not been."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            broken, whole = (self._built(comm, compressor) for _ in range(2))
            for step in range(5):
                x = gaussian(comm.Get_rank(), self.d, step=step)
                bad = np.where(np.arange(self.d) == 3, np.float32(np.nan), x) if comm.Get_rank() == 0 else x
                try:
                    broken.step(bad)
                except NonFiniteError:
                    whole.plan.exchanges = broken.plan.exchanges  # the key of random compressors
                else:
                    raise AssertionError(f"a NaN raises nothing through {compressor}")
                must(same_bits(broken.step(x), whole.step(x)), f"state has changed through {compressor}")

        self._run(program, 2)

    @law("combinations")
    def test_a_combination_is_the_vector_that_it_is(self) -> None:
        """``lazy(a) - b`` gives the bits of the difference."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            one, other = (self._built(comm, compressor) for _ in range(2))
            for step in range(4):
                a, b = gaussian(comm.Get_rank(), self.d, step=step), gaussian(9, self.d, step=step)
                must(same_bits(one.step(lazy(a) - b), other.step(a - b)), f"other bits through {compressor}")

        self._run(program, 2)
