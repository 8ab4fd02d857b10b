"""Mistakes in compressors, plans, rules and optimizers from outside: one line that says what, on all ranks at once."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import virtual
from my_compressor import BlockMax
from my_optimizer import Normalized
from my_plan import TrimmedMean
from my_rule import FadingState

from mpi_ef.collectives import GatherMean, TwoPhaseMean
from mpi_ef.compress import Compressor, PlainCodec
from mpi_ef.errors import DisagreementError, MpiEfError, OptionError, ShapeError
from mpi_ef.feedback import ErrorFeedback, Rule, State, error, estimate, persistent, replicated

D = 40


class Half(PlainCodec):
    """The first half of a vector."""

    def __init__(self, d, dtype=np.float32, *, more=0):
        super().__init__(d, dtype)
        self.nbytes = d // 2 * self.dtype.itemsize + more

    def pack(self, x, wire, *, step, rank):
        wire.view(self.dtype)[: self.d // 2] = x[: self.d // 2]

    def unpack(self, wire):
        return np.concatenate([wire.view(self.dtype)[: self.d // 2], np.zeros(self.d // 2, self.dtype)])


@dataclass(frozen=True, repr=False)
class Mine(Compressor):
    """Is made of a kind of codec."""

    made: object

    def codec(self, d, dtype=np.float32):
        return self.made(d, dtype)

    def alpha(self, d):
        return 0.0

    def __repr__(self):
        return "Mine()"


def codec(**methods):
    return type("Codec", (Half,), methods)


def raised(program, n=2):
    """The errors of all ranks: each in one line, and none waits."""
    errors = virtual.run(n, program)
    for outcome in errors:
        assert isinstance(outcome, MpiEfError), outcome
        assert "\n" not in str(outcome)
    return errors


def exchanged(comm, plan, x=None):
    x = np.arange(D, dtype=np.float32) + comm.Get_rank() if x is None else x
    out = np.zeros(D, np.float32)
    plan.exchange(x).add_mean(out)
    return out


def test_the_compressor_of_these_tests_is_right():
    for out in virtual.results(2, lambda comm: exchanged(comm, GatherMean(comm, Mine(Half), D))):
        assert out.tolist() == [i + 0.5 for i in range(20)] + [0] * 20


@pytest.mark.parametrize(("made", "kind", "words"), [
    (lambda d, dtype: None, OptionError, "GatherMean: Mine().codec returned None, which is no Codec"),
    (codec(encode=lambda *_, **__: None), OptionError, "Codec.encode returned None; return True where the vector is finite"),
    (codec(unpack=lambda self, wire: [0.0] * self.d), ShapeError, "Codec.unpack returned [0.0, 0.0"),
    (codec(unpack=lambda self, wire: np.zeros(3, np.float32)), ShapeError,
     "Codec.unpack returned an array (3,) of float32; return (40,) of float32"),
    (codec(unpack=lambda self, wire: np.zeros(self.d)), ShapeError, "returned an array (40,) of float64; return (40,) of"),
])
@pytest.mark.parametrize("plan", [GatherMean, TwoPhaseMean])
def test_a_codec_that_forgets_something(plan, made, kind, words):
    for outcome in raised(lambda comm: exchanged(comm, plan(comm, Mine(made), D))):
        assert isinstance(outcome, kind)
        assert words.replace("GatherMean", plan.__name__).replace("(40,)", "(20,)" if plan is TwoPhaseMean else "(40,)") \
            in str(outcome)


@pytest.mark.parametrize("plan", [GatherMean, TwoPhaseMean, TrimmedMean])
def test_messages_that_are_longer_on_one_rank(plan):
    """MPI would cut them off, or end the program."""

    def program(comm):
        rank = comm.Get_rank()

        class Longer(Mine):
            def codec(self, d, dtype=np.float32):
                return Half(d, dtype, more=8 * rank)

        return plan(comm, Longer(None), D, **({"trim": 0} if plan is TrimmedMean else {}))

    for outcome in raised(program):
        assert isinstance(outcome, DisagreementError)
        assert "ranks disagree on bytes of a message: 80 on rank 0; 88 on rank 1" in str(outcome)


@pytest.mark.parametrize(("methods", "words"), [
    ({"bind": lambda self: TrimmedMean.bind(self) and None}, "Mine.bind returned None; return a dict of what"),
    ({"encode": lambda self, x, split: TrimmedMean.encode(self, x, split=split) and None},
     "Mine.encode returned None; return True where the vector is finite, else False"),
    ({"communicate": lambda self: None}, "Mine.communicate returned None; yield Rounds"),
    ({"communicate": lambda self: iter(())}, "Mine.communicate yields no Round"),
    ({"communicate": lambda self: iter([(self.mine, self.all)])}, "Mine.communicate yields (<"),
])
@pytest.mark.parametrize("split", [False, True])
def test_a_plan_that_forgets_something(methods, words, split):
    def program(comm):
        plan = type("Mine", (TrimmedMean,), methods)(comm, BlockMax(2), D, trim=0)
        x = np.ones(D, np.float32)
        if not split:
            return plan.exchange(x)
        plan.start(x)
        return plan.wait()

    for outcome in raised(program):
        assert isinstance(outcome, OptionError)
        assert words in str(outcome)


def gone(result, *, messages=1):
    """A rule with this result, after so many messages."""

    def rule(state, plan, vector):
        for _ in range(messages):
            yield plan.offer(vector)
        return result

    return rule


def without_yield(state, plan, vector):
    plan.exchange(vector)
    return state.mean


def of_something_else(state, plan, vector):
    yield vector


@pytest.mark.parametrize(("step", "kind", "words"), [
    (gone(None), MpiEfError, "rule rule: its result is a NoneType; pass a numpy array"),
    (gone(np.zeros(1, np.float32)), ShapeError, "rule rule: its result has shape (1,); this plan takes (40,)"),
    (gone(np.float32(1)), MpiEfError, "rule rule: its result is a float32"),
    (gone(np.zeros(D)), MpiEfError, "rule rule: its result has dtype float64"),
    (gone(None, messages=0), OptionError, "rule rule: a step has ended without a message; yield plan.offer(vector)"),
    (of_something_else, OptionError, "rule of-something-else: it yields array(["),
    (without_yield, OptionError, "rule without-yield: it returned array(["),
])
@pytest.mark.parametrize("split", [False, True])
def test_a_rule_that_forgets_something(step, kind, words, split):
    def program(comm):
        feedback = ErrorFeedback(Rule(step, FadingState, lambda _: {"fade": 0.9}), GatherMean(comm, BlockMax(2), D))
        x = np.ones(D, np.float32)
        if not split:
            return feedback.step(x)
        feedback.start(x)
        feedback.wait()
        return feedback.commit()

    for outcome in raised(program):
        assert isinstance(outcome, kind)
        assert words in str(outcome)


def test_a_state_whose_marks_do_not_fit():
    @dataclass(kw_only=True)
    class OfNothing(State):
        h_i: np.ndarray = estimate(of="h")

    @dataclass(kw_only=True)
    class OfAnError(State):
        h_i: np.ndarray = estimate(of="e_i")
        e_i: np.ndarray = error()

    @dataclass(kw_only=True)
    class Kept(State):
        h_i: np.ndarray = estimate(of="h")
        h: np.ndarray = persistent()

    class NoDataclass(State):
        h: np.ndarray = replicated()

    @dataclass(kw_only=True)
    class Long(State):
        h: np.ndarray = replicated("D")

    Rule(gone(None), Kept)
    for how, words in (({"options": {"fade": 0.9}}, "options={'fade': 0.9} is no function"),
                       ({"options": lambda _: {"fad": 0.9}}, "FadingState has no field fad, which is an option"),
                       ({"options": lambda _: {"fade": 0.9}, "ranges": {"fad": ("[0, 1)", "", "")}},
                        "ranges has fad, which is no option; did you mean fade?")):
        with pytest.raises(OptionError) as caught:
            Rule(gone(None), FadingState, **how)
        assert f"Rule rule: {words}" in str(caught.value)
    for state, words in ((OfNothing, "OfNothing: h_i is an estimate of 'h', and no array 'h' is replicated()"),
                         (OfAnError, "OfAnError: h_i is an estimate of 'e_i', and no array 'e_i' is replicated()"),
                         (NoDataclass, "NoDataclass: it is no dataclass")):
        with pytest.raises(OptionError) as caught:
            Rule(gone(None), state)
        assert words in str(caught.value)
    for outcome in raised(lambda comm: ErrorFeedback(Rule(gone(None), Long), GatherMean(comm, BlockMax(2), D))):
        assert "Long: h has size 'D'; take one of d, own_d, clients_d, server_d" in str(outcome)


def test_a_compressor_that_is_no_dataclass_and_an_optimizer_without_a_rule():
    class Plain(Mine.__base__):
        codec, alpha = Mine.codec, Mine.alpha

    class NoRule(Normalized):
        def build(self, plan):
            self.arrays["m"] = self.zeros()

    for outcome in raised(lambda comm: GatherMean(comm, Plain(), D)):
        assert "GatherMean: compressor=Plain() is no dataclass; put @dataclass(frozen=True" in str(outcome)
    for outcome in raised(lambda comm: NoRule([torch.nn.Parameter(torch.ones(3))], comm)):
        assert "NoRule.build made no rule; set self.rules" in str(outcome)
