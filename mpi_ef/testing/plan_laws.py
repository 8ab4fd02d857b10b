"""What every plan keeps to, one law a test, on virtual ranks."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice, product
from typing import Any, ClassVar

import numpy as np

from mpi_ef import registry
from mpi_ef.collectives import Plan, PlanBuilder, build_plan
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, Keep, Quantize, RandK, Sign, TopK, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DisagreementError, DtypeError, MpiEfError, NonFiniteError, PeerError, ShapeError, briefly
from mpi_ef.feedback import ErrorFeedback

from .faults import CommunicationError, Fault, FaultyComm
from .law import Laws, law, must, same_bits
from .vectors import gaussian
from .virtual import VirtualComm, run

__all__ = ["PlanLaws"]

D = 101


class PlanLaws(Laws):
    """Tests for a plan: a subclass, named ``Test...`` for pytest, says which.

    Attributes
    ----------
    plan : callable or str
        As :func:`mpi_ef.collectives.build_plan` takes it: ``plan(comm, compressor, d, dtype)``, or a specification.
    compressors : tuple of Compressor
        That it is tried with.
    ranks : tuple of int
    sizes : tuple of int
        Lengths of the vectors whose means are compared.
    mean : bool
        Whether :meth:`Plan.add_mean` adds the mean of the messages: not for plans that combine them in another way.
    owed : str
        The array of :meth:`Plan.state` of which the pieces of all ranks, one after the other, are what the means lack of
        those of the messages; "" where they lack nothing.
    other : callable or str, optional
        The plan with another option, on which ranks are to agree. Where `plan` is a class or a specification, options that
        are numbers, or True or False, are tried without it.
    """

    tested = "plan"
    plan: ClassVar[PlanBuilder]
    compressors: ClassVar[tuple[Compressor, ...]] = (TopK(0.1, values=Quantize("bf16")), Sign(block=16), RandK(0.3, seed=3))
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)
    sizes: ClassVar[tuple[int, ...]] = (0, 1, 3, 8, 65, 1001)
    dtypes: ClassVar[tuple[Any, ...]] = (np.float32, np.float64)
    mean: ClassVar[bool] = True
    owed: ClassVar[str] = ""
    other: ClassVar[PlanBuilder | None] = None

    def _built(self, comm: Comm, compressor: Compressor, d: int = D, dtype: Any = np.float32) -> Plan:
        return build_plan(type(self).plan, comm, compressor, d, dtype)

    @staticmethod
    def _mean_of(plan: Plan) -> Vector:
        out = np.zeros(plan.d, plan.dtype)
        plan.add_mean(out)
        return out

    @staticmethod
    def _raised(plan: Plan, x: Vector, *, split: bool) -> MpiEfError | None:
        try:
            if split:
                plan.start(x)
                plan.wait()
            else:
                plan.exchange(x)
        except MpiEfError as error:
            return error
        return None

    @staticmethod
    def _mine(plan: Plan, step: int = 0) -> Vector:
        return gaussian(plan.rank, plan.own_d, plan.dtype, step=step)

    def _owed(self, plan: Plan) -> Vector:
        """Return this rank's piece of what is owed, as a rule at work would save it."""
        if not self.owed:
            return np.zeros(0, plan.dtype)
        owed: Vector = ErrorFeedback("ef14", plan).per_rank()[f"plan.{self.owed}"].copy()
        return owed

    @law("equal means")
    def test_means_are_the_same_on_all_ranks(self) -> None:
        """:meth:`Plan.add_mean` adds the same bits everywhere, in exchanges at once and in two parts, of all lengths."""

        def program(comm: VirtualComm, compressor: Compressor) -> list[Vector]:
            means: list[Vector] = []
            for dtype, d in product(self.dtypes, self.sizes):
                plan = self._built(comm, compressor, d, dtype)
                means += [self._mean_of(plan.exchange(self._mine(plan, step))) for step in range(2)]
                plan.start(self._mine(plan, 2))
                means.append(self._mean_of(plan.wait()))
                must(np.isfinite(means[-1]).all(), f"a mean for d={d} is not finite")
            return means

        for size, compressor, rows in self._run(program):
            must(all(same_bits(row, rows[0]) for row in rows), f"{size} ranks differ through {compressor}")

    @law("the mean of the messages")
    def test_a_mean_is_the_mean_of_the_messages(self) -> None:
        """Also over several exchanges, with what is owed."""

        def program(comm: VirtualComm, compressor: Compressor, d: int, dtype: Any) -> tuple[Vector, Vector, Vector]:
            plan = self._built(comm, compressor, d, dtype)
            own, mean = np.zeros((plan.own, d), dtype), np.zeros(d, dtype)
            for step in range(3):
                plan.exchange(self._mine(plan, step)).add_own(own.reshape(-1))
                plan.add_mean(mean)
            return own.sum(axis=0) / plan.clients, mean, self._owed(plan)

        for dtype, d in product(self.dtypes, self.sizes) if self.mean else ():
            for size, compressor, rows in self._run(partial(program, d=d, dtype=dtype)):
                owns, means, owed = zip(*rows, strict=True)
                lacking = np.concatenate(owed) if self.owed else 0.0
                off = float(np.abs(sum(owns) - means[0] - lacking).max(initial=0.0))
                bound = 1e-5 if dtype == np.float32 else 1e-13
                must(off < bound, f"off by {off:.1e} for d={d} on {size} ranks through {compressor}")

    @law("overwriting")
    def test_a_mean_can_replace_the_one_before(self) -> None:
        """``set_mean`` gives the bits of a mean that is added to zeros, whatever was there; also with ``again=True``."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            plan = self._built(comm, compressor)
            out, other = (np.full(plan.d, 7, plan.dtype) for _ in range(2))
            for step in range(8):
                x = self._mine(plan, step)
                if step == 3:
                    try:
                        plan.exchange(np.full_like(x, np.nan))
                    except NonFiniteError:
                        continue
                plan.exchange(x)
                if step == 6:
                    out.fill(9)
                    plan.forget()
                target = other if step == 5 else out
                plan.set_mean(target, again=True)
                must(same_bits(target, self._mean_of(plan)), f"again=True, after {step + 1} exchanges through {compressor}")
                other.fill(np.nan)
                plan.set_mean(other, 0.5)
                half = np.zeros_like(other)
                plan.add_mean(half, 0.5)
                must(same_bits(other, half), f"something of what was there is left, through {compressor}")

        self._run(program)

    @law("combinations")
    def test_combinations_are_what_they_stand_for(self) -> None:
        """``0.5 lazy(a) + b - c`` is exchanged as the vector is, ``keep`` leaves a combination without the message."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            lazily, eagerly = (self._built(comm, compressor) for _ in range(2))
            for step in range(3):
                a, b, c, into = (self._mine(lazily, 10 * step + s) for s in range(4))
                half, x = a.dtype.type(0.5), a + b - c
                lazily.exchange(0.5 * lazy(a) + b - c, keep=Keep(lazy(a) + b - c, into=into, less_message=True))
                eagerly.exchange(half * a + b - c).add_own(x, -1.0)
                same = np.array_equal(self._mean_of(lazily), self._mean_of(eagerly))
                must(same, f"the mean is another one through {compressor}")
                must(np.array_equal(into, x), f"a + b - c - C(0.5 a + b - c) is not what was kept, through {compressor}")
                lazily.exchange(lazy(a) + b, keep=Keep(lazy(a) - b, into=into))
                eagerly.exchange(a + b)
                must(np.array_equal(into, a - b), f"a - b is not what was kept, through {compressor}")

        self._run(program)

    @law("exchanges that fail")
    def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(self) -> None:
        """A NaN, an Inf, an array that does not fit: all ranks raise, and the next means are as if it had not been."""
        wrong: dict[str, Callable[[Vector], Any]] = {
            "NaN": lambda x: np.where(np.arange(x.size) == x.size // 2, x.dtype.type(np.nan), x),
            "Inf": lambda x: np.where(np.arange(x.size) == 0, x.dtype.type(np.inf), x),
            "-Inf": lambda x: np.where(np.arange(x.size) == x.size - 1, x.dtype.type(-np.inf), x),
            "a short array": lambda x: x[:-1],
            "another dtype": lambda x: x.astype(np.float64),
        }

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            plan, twin = (self._built(comm, compressor) for _ in range(2))
            last, mine, finite = comm.Get_size() - 1, self._mine(plan, 99), True
            for step, (name, of) in enumerate(wrong.items()):
                finite = name not in ("NaN", "Inf", "-Inf")
                for split in (False, True):
                    x = of(mine) if plan.rank == last else mine
                    error = self._raised(plan, x, split=split)
                    kind = NonFiniteError if not finite else (ShapeError, DtypeError) if plan.rank == last else PeerError
                    must(isinstance(error, kind), f"{name} on rank {last} gives {briefly(error, 200)} on rank {plan.rank}")
                    named = getattr(error, "ranks", None)
                    must(finite or named == (last,), f"{name} on rank {last}: the error names ranks {named}")
                    twin.exchanges = plan.exchanges  # the key of random compressors
                    x = self._mine(plan, step)
                    means = [self._mean_of(p.exchange(x)) for p in (plan, twin)]
                    must(same_bits(*means), f"after {name} on a rank the next mean is another one, through {compressor}")

        self._run(program)

    @law("exchanges in two parts")
    def test_what_was_sent_may_change_before_it_arrives(self) -> None:
        """Between :meth:`Plan.start` and :meth:`Plan.wait` the vector is the caller's again; other plans may go between."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            split, twin, whole, other = (self._built(comm, compressor) for _ in range(4))
            for step in range(2):
                vectors = [self._mine(whole, step), self._mine(other, step + 7)]
                wanted = [self._mean_of(plan.exchange(x)) for plan, x in zip((whole, other), vectors, strict=True)]
                for plan, x in zip((split, twin), vectors, strict=True):
                    plan.start(x)
                    plan.progress()
                for x in vectors:
                    x.fill(7)
                for messages, mean in zip([split.wait(), twin.wait()], wanted, strict=True):
                    must(same_bits(self._mean_of(messages), mean), f"other bits than at once, through {compressor}")

        self._run(program)

    @law("plans for dense steps")
    def test_dense_steps_go_through_a_plan_for_the_same_vectors(self) -> None:
        """What :meth:`Plan.like` returns is one, with as many entries; its means are the same bits on all ranks."""

        def program(comm: VirtualComm, compressor: Compressor) -> tuple[Vector, Vector]:
            plan = self._built(comm, compressor)
            dense = plan.like(Identity())
            must(isinstance(dense, Plan), f"like returns a {type(dense).__name__}")
            sizes = (dense.d, dense.own_d, dense.dtype)
            must(sizes == (plan.d, plan.own_d, plan.dtype), f"like returns a plan for {sizes}")
            must(dense.compressor == Identity(), f"like(Identity()) returns a plan with {dense.compressor}")
            x = self._mine(plan)
            return self._mean_of(dense.exchange(x)), x.reshape(plan.own, plan.d).sum(axis=0) / plan.clients

        for _, _, rows in self._run(program):
            means, parts = zip(*rows, strict=True)
            must(all(same_bits(mean, means[0]) for mean in means), "means of dense steps differ between ranks")
            off = float(np.abs(sum(parts) - means[0]).max()) if self.mean else 0.0
            must(off < 1e-5, f"the mean of a dense step is off by {off:.1e}")

    @law("what is drawn")
    def test_each_exchange_draws_anew_on_each_rank(self) -> None:
        """Through RandK other entries are sent each time, and by each rank: `encode` gives codecs step and rank."""

        def program(comm: VirtualComm, compressor: Compressor) -> list[list[int]]:
            plan, sent = self._built(comm, compressor), []
            for _ in range(2):
                own = np.zeros(plan.own_d, plan.dtype)
                plan.exchange(np.ones_like(own)).add_own(own)
                sent.append(np.flatnonzero(own).tolist())
            return sent

        for _, compressor, rows in self._run(program):
            if isinstance(compressor, RandK):
                again = [rank for rank, (first, second) in enumerate(rows) if first == second]
                must(not again, f"two exchanges send the same entries on ranks {again}; encode with step=self.exchanges")
                same = len(rows) > 1 and rows[0][0] == rows[1][0]
                must(not same, "two ranks send the same entries; encode with rank=self.rank")

    @law("going on from a state")
    def test_a_state_that_was_loaded_goes_on(self) -> None:
        """A rule at work through the plan saves and loads what the next exchanges depend on; a step can be taken back."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            first, second = (ErrorFeedback("ef14", self._built(comm, compressor)) for _ in range(2))
            for step in range(3):
                first.step(self._mine(first.plan, step))
            second.load_state_dict(first.state_dict())
            for step in range(3, 6):
                x = self._mine(first.plan, step)
                if step == 4:
                    first.start(x)
                    first.wait()
                    first.rollback()
                    first.plan.exchanges = second.plan.exchanges
                must(same_bits(first.step(x), second.step(x)), f"other bits in step {step} through {compressor}")

        self._run(program)

    def _others(self) -> Iterator[tuple[str, PlanBuilder]]:
        """Yield the plan with another option, and its name, for all options that are known."""
        if (other := type(self).other) is not None:
            yield f"plan, {other}," if isinstance(other, str) else "plan", other
        how: Any = type(self).plan
        what = registry.specified("plan", how) if isinstance(how, str) else registry.Specification("", how, (), {})
        parameters = inspect.signature(what.thing).parameters if inspect.isclass(what.thing) else {}
        given = dict(zip(islice(parameters, 4, None), what.arguments, strict=False)) | what.options
        for name, parameter in islice(parameters.items(), 4, None):
            value = given.get(name, parameter.default)
            near = [not value] if isinstance(value, bool) else [value + 1, value - 1] if isinstance(value, int) else \
                [value / 2, value + 1] if isinstance(value, float) else []
            builders = (partial(what.thing, **given | {name: value}) for value in near)
            if (found := next(filter(self._works, builders), None)) is not None:
                yield f"option, {name}={found.keywords[name]},", found

    def _works(self, plan: PlanBuilder) -> bool:
        """Tell whether ranks that all want this plan get it."""

        def program(comm: VirtualComm) -> bool:
            with suppress(Exception):
                build_plan(plan, comm, self.compressors[0], D, np.float32)
                return True
            return False

        return all(run(max(2, *self.ranks), program))

    @law("arguments that differ")
    def test_ranks_with_other_arguments_all_learn_about_it(self) -> None:
        """Other lengths, dtypes, compressors and options on one rank raise on all, where the plan is built."""
        first, how = self.compressors[0], type(self).plan
        others: list[tuple[str, tuple[Any, ...]]]
        others = [("d", (how, first, D + 1, np.float32)), ("dtype", (how, first, D, np.float64))]
        others += [("compressor", (how, second, D, np.float32)) for second in self.compressors[1:2]]
        others += [(name, (other, first, D, np.float32)) for name, other in self._others()]
        for name, (builder, *arguments) in others:

            def differs(comm: VirtualComm, builder: Any = builder, arguments: Any = arguments) -> None:
                build_plan(*((builder, comm, *arguments) if comm.Get_rank() else (how, comm, first, D, np.float32)))

            for outcome in run(max(2, *self.ranks), differs):
                must(isinstance(outcome, DisagreementError), f"another {name} on rank 1 gives {briefly(outcome, 200)}")

    @law("accounts")
    def test_exchanges_are_counted(self) -> None:
        """`exchanges`, `sent_nbytes`, `seconds` and `traffic` are right, in every form of an exchange."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            counting = FaultyComm(comm)
            plan = self._built(counting, compressor)
            counting.sent_nbytes = 0
            plan.exchange(self._mine(plan))
            plan.start(self._mine(plan, 1))
            plan.wait()
            must(plan.exchanges == 2, f"{plan.exchanges} exchanges were counted of 2")
            sent, said = counting.sent_nbytes, 2 * plan.traffic.sent_nbytes
            text = f"{sent} bytes have left rank {plan.rank}, `traffic` says {said}, `sent_nbytes` {plan.sent_nbytes}"
            must(sent == said == plan.sent_nbytes, text)
            must(0 <= plan.alpha <= 1, f"alpha = {plan.alpha} is not in [0, 1]")
            must({"encode", "communicate", "decode"} <= {*plan.seconds}, f"seconds are {sorted(plan.seconds)}")

        self._run(program)

    @law("ranks that come late")
    def test_what_comes_late_changes_nothing(self) -> None:
        """A rank that is slow at every call in turn: the means are the same bits."""

        def program(comm: VirtualComm, compressor: Compressor) -> None:
            slow = FaultyComm(comm)
            plan, twin = self._built(slow, compressor), self._built(comm, compressor)
            for step in range(4):
                if plan.rank == step % plan.size:
                    slow.arm("delay", step // 2)
                means = [self._mean_of(p.exchange(self._mine(twin, step))) for p in (plan, twin)]
                must(same_bits(*means), f"other bits through {compressor} where rank {step % plan.size} is late")

        self._run(program)

    @law("communication that fails")
    def test_errors_of_communication_are_passed_on(self) -> None:
        """A call that raises, and frames with other headers than were sent, raise there: no error is hidden."""

        def program(comm: VirtualComm, fault: Fault, split: bool) -> None:
            faulty = FaultyComm(comm)
            plan = self._built(faulty, self.compressors[0])
            plan.exchange(self._mine(plan))
            if plan.rank == 0:
                faulty.arm(fault)
            error = self._raised(plan, self._mine(plan, 1), split=split)
            if plan.rank == 0:  # ends the others, which may be in a further call
                must(error is not None, f"a call that is to {fault} raises nothing on that rank")
                must(fault == "corrupt", f"a call that is to {fault} raises {briefly(error, 200)}")
                raise CommunicationError(fault) from error

        faults: tuple[Fault, ...] = ("raise", "corrupt")
        for fault, split in product(faults, (False, True)):
            outcome = run(max(2, *self.ranks), partial(program, fault=fault, split=split), virtual=True)[0]
            told = f"a call that is to {fault} raises {briefly(outcome, 200)}"
            told = str(outcome) if isinstance(outcome, AssertionError) else told
            must(isinstance(outcome, CommunicationError), told)
