"""The laws for users' own things: those of examples/ obey them as what is built in does, and what is wrong is told.

Plans and optimizers that are built in are in test_plans.py and test_optimizer_laws.py.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from my_compressor import BlockMax
from my_optimizer import Normalized
from my_plan import TrimmedMean
from my_rule import FADING, FadingState
from programs import laws_in

from mpi_ef import registry
from mpi_ef.collectives import ClientsMean, Combine, GatherMean, RobustMean, TwoPhaseMean
from mpi_ef.compress import (
    Compressor,
    Identity,
    Keep,
    LowRank,
    PlainCodec,
    Quantize,
    RandK,
    Sign,
    TopK,
    TwoBits,
    Vote,
    lazy,
    source,
)
from mpi_ef.errors import OptionError, ShapeError
from mpi_ef.feedback import RULES, Rule
from mpi_ef.robust import Median
from mpi_ef.testing import CompressorLaws, OptimizerLaws, PlanLaws, RuleLaws
from mpi_ef.testing.faults import CommunicationError

COMPRESSORS = [
    Identity(), Quantize("bf16"), Quantize("int8", block=64), Sign(), Sign(block=8), Vote(), TopK(0.1), RandK(0.2, seed=3),
    TopK(0.3, values=Quantize("bf16")), TopK(0.3, values=TwoBits(), segments=9), TwoBits(), TwoBits(block=8), LowRank(1),
    BlockMax(8),
]


def a_client_each(comm, compressor, d, dtype):
    n = comm.Get_size()
    return ClientsMean(comm, compressor, d, dtype, clients=n, weights=np.full(n, 1 / n))


OF_CLIENTS = {"plan": a_client_each, "compressors": (TopK(0.1),)}
ROBUST = {"plan": partial(RobustMean, aggregator=Median(), f=0), "ranks": (1, 2)}  # of two the mean
NO_MEAN = {"mean": False}  # momentum; a lazy estimate; sums of changes
ROBUST = {"plan": "RobustMean(f=0)"}
LOSES = {"follows": 0}  # a vote; sums of changes; errors that fade
RULE_LAWS = {
    "ef14": {}, "ef21": {}, "econtrol": {"options": {"eta": 0.1}}, "ef14-momentum": NO_MEAN, "lion": NO_MEAN | LOSES,
    "ef21-sgdm": NO_MEAN, "ef21-sgd2m": NO_MEAN, "ef21-hb": NO_MEAN | {"follows": 2},
    "ef21-pp": OF_CLIENTS | {"options": {"participation": 1.0}},  # the NaN of a client that is silent stops nobody
    "ef21-w": OF_CLIENTS, "ef21-bc": {}, "ef21-plus": OF_CLIENTS, "ef21-page": NO_MEAN | LOSES,
    "marina": {"compressors": (RandK(0.3, seed=2),)} | LOSES, "clag": OF_CLIENTS | NO_MEAN, "d-ec-sgd": {},
    "byz-ef21": ROBUST, "byz-ef21-sgdm": ROBUST | NO_MEAN, "byz-ef21-bc": ROBUST,
    "my_rule:FADING(fade=0.5)": LOSES,
}


class TestMyCompressor(CompressorLaws):
    """As a user writes it."""

    compressor = BlockMax(3)


class TestMyRule(RuleLaws):
    rule = FADING
    follows = 0  # old errors fade


class TestMyPlan(PlanLaws):
    plan = "my_plan:TrimmedMean(trim=0)"


class TestMyPlanOfThree(PlanLaws):
    plan = TrimmedMean
    ranks = (3,)
    mean = False


class TestMyOptimizer(OptimizerLaws):
    optimizer = Normalized
    bad = (({"beta": 1.0}, "Normalized: beta=1.0 is not in [0, 1)"),)
    differing = ("beta", 0.9, 0.8)


@pytest.mark.parametrize("law", laws_in(CompressorLaws))
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_compressors_obey(compressor, law):
    # alpha of draws holds in expectation; a vote has no magnitudes, and its alpha is of directions.
    contracts = not isinstance(compressor, RandK | LowRank | Vote)
    getattr(type("Laws", (CompressorLaws,), {"compressor": compressor, "contracts": contracts})(), law)()


@pytest.mark.parametrize("law", laws_in(RuleLaws))
@pytest.mark.parametrize("rule", RULE_LAWS)
def test_rules_obey(rule, law):
    getattr(type("Laws", (RuleLaws,), {"rule": rule} | RULE_LAWS[rule])(), law)()


def test_no_rule_and_no_compressor_is_left_out():
    assert RULES.keys() < RULE_LAWS.keys()
    assert {*registry.names("compressor")} <= {type(compressor).__name__ for compressor in COMPRESSORS}


@dataclass(frozen=True, repr=False)
class Wrong(Compressor):
    """BlockMax of blocks of 4, and something wrong."""

    how: str = ""
    sparse = True

    def codec(self, d, dtype=np.float32):
        return _WrongCodec(d, dtype, self.how)

    def alpha(self, d):
        return {"claims too much": 0.9, "claims more than all": 1.5}.get(self.how, 0.0)

    def wire_nbytes(self, d, dtype=np.float32):
        return super().wire_nbytes(d, dtype) + 8 * (self.how == "size")


class _WrongCodec(PlainCodec):
    def __init__(self, d, dtype, how):
        super().__init__(d, dtype)
        self.how, self.sent = how, 0
        self.nbytes = 8 * max(0, d + {"no room": -1, "too much room": 1}.get(how, 0)) + 4 * (how == "no words")

    def pack(self, x, wire, *, step, rank):
        self.sent += 1
        kept = np.where(np.arange(x.size) % 4 == 0, x, 0).astype(np.float64)
        if self.how == "grows":
            kept *= 3
        if self.how == "is found by a seed that is not sent":
            kept = np.roll(kept, step + rank)
        if self.how == "another one every time" and kept.size:
            kept[0] += self.sent
        if self.how == "fails later" and step > 9:
            raise IndexError(step)
        if self.how == "overflows later" and step > 9:
            kept += np.inf
        self.last = kept
        if self.how != "leaves bytes" or not x.size:
            wire[: 8 * self.d] = kept.view(np.uint8)
        if self.how == "writes beyond":
            np.lib.stride_tricks.as_strided(wire, (wire.size + 8,), writeable=True)[-8:] = 1

    def unpack(self, wire):
        if self.how == "remembers" and self.sent:
            return self.last.astype(self.dtype)
        if self.how == "trusts what it reads":
            return np.zeros(self.d, self.dtype)[wire[: 8 * self.d].view(np.int64)]
        with np.errstate(over="ignore", invalid="ignore"):
            return wire[: 8 * (self.d - (self.how == "one short"))].view(np.float64).astype(self.dtype)

    def encode(self, x, wire, *, step=0, rank=0):
        if self.how == "drops in place" and isinstance(x, np.ndarray):
            x[1:] = 0
        if self.how == "takes no combination" and not isinstance(x, np.ndarray):
            raise TypeError("a vector is wanted")
        if self.how == "forms it otherwise" and not isinstance(x, np.ndarray):
            x = source(x.terms[0])
        return super().encode(x, wire, step=step, rank=rank) or self.how == "tells nobody"

    def add(self, wires, out, factor=1.0, *, overwrite=False):
        if self.how == "from the last on":
            wires = wires[::-1]
        super().add(wires, out, factor, overwrite=overwrite and self.how != "keeps the old")
        if self.how == "refuses late" and not np.isfinite(out).all():
            raise ShapeError("is not finite")

    def clear(self, wires, out):
        out[np.isfinite(out) | (self.how != "hides NaN")] = 0


@pytest.mark.parametrize(("how", "law", "words"), [
    ("is found by a seed that is not sent", "test_contraction",
     r"breaks the law of contraction for d=2, float32, step 1 of rank 0: .* is lost, alpha = 0.0 allows 1"),
    ("claims too much", "test_contraction", r"breaks the law of contraction for d=.*alpha = 0.9 allows 0.1"),
    ("claims more than all", "test_contraction", r"contraction .*alpha = 1.5 is not in \[0, 1\]"),
    ("grows", "test_contraction", "breaks the law of contraction"),
    ("another one every time", "test_messages_are_deterministic", "breaks the law of determinism"),
    ("size", "test_size_is_known_ahead", "breaks the law of a size that is known ahead"),
    ("no room", "test_size_is_known_ahead",
     "breaks the law of a size that is known ahead for d=1, float32: encode, with a wire of nbytes = 0, raises ValueError"),
    ("too much room", "test_size_is_known_ahead", "breaks the law of messages that are written whole for d=0"),
    ("writes beyond", "test_size_is_known_ahead", "a size that is known ahead .*: encode writes beyond a wire of nbytes"),
    ("one short", "test_size_is_known_ahead",
     r"breaks the law of a size that is known ahead for d=1, float32: decode, of 8 bytes, raises ShapeError"),
    ("one short", "test_contraction", "breaks the law of contraction for d=1, float32: ShapeError: .* an array .0,."),
    ("no room", "test_messages_are_deterministic", "law of determinism for d=1, float32: ValueError: "),
    ("no room", "test_messages_are_added_in_order", "law of addition in rank order for d=1, float32: ValueError: "),
    ("no room", "test_what_is_not_finite_is_reported", "vectors that are not finite for d=1, float32: ValueError: "),
    ("from the last on", "test_messages_are_added_in_order", "addition in rank order .* other bits .* in entries "),
    ("forms it otherwise", "test_combinations_are_what_they_stand_for", r"law of combinations .*: bytes \[.* are others"),
    ("takes no combination", "test_combinations_are_what_they_stand_for", "combinations for .*: TypeError: a vector"),
    (["no value"], "test_a_compressor_is_a_value", "breaks the law of values: TypeError: unhashable type: 'list'"),
    ("no words", "test_size_is_known_ahead", "breaks the law of whole words"),
    ("leaves bytes", "test_size_is_known_ahead", "breaks the law of messages that are written whole"),
    ("remembers", "test_any_codec_decodes_a_message", "law of messages that say all for d=1, .* has sent something else"),
    ("fails later", "test_later_steps_are_sent", "law of messages of later steps for d=0, float32: IndexError: 10"),
    ("overflows later", "test_later_steps_are_sent", "messages of later steps for d=1, float32: step 10 of rank 1 is not"),
    ("drops in place", "test_contraction", "law of contraction for d=0, float32: ValueError: .* is read-only"),
    ("tells nobody", "test_what_is_not_finite_is_reported", "breaks the law of vectors that are not finite"),
    ("keeps the old", "test_messages_are_added_in_order", "breaks the law of overwriting"),
    ("remembers", "test_wires_of_any_content_are_decoded", "law of wires of any content for d=1, .* has decoded before"),
    ("trusts what it reads", "test_wires_of_any_content_are_decoded", "content for d=1, float32: add raises IndexError: "),
    ("refuses late", "test_wires_of_any_content_are_decoded", "content for d=1, float32: add refuses it, and has written"),
    ("hides NaN", "test_wires_of_any_content_are_decoded", r"content for d=1, .*: clear leaves something in entries \[0\]"),
])
def test_what_is_wrong_with_a_compressor_is_told(how, law, words):
    with pytest.raises(AssertionError, match=words) as told:
        getattr(type("Laws", (CompressorLaws,), {"compressor": Wrong(how)})(), law)()
    assert str(told.value).startswith(f"Wrong(how={how!r})")


def test_the_promise_of_what_contracts_in_expectation_is_in_range():
    laws = type("Laws", (CompressorLaws,), {"compressor": Wrong("claims more than all"), "contracts": False})()
    with pytest.raises(AssertionError, match=r"law of contraction .*alpha = 1.5 is not in \[0, 1\]"):
        laws.test_contraction()


def test_what_is_right_passes():
    for law in laws_in(CompressorLaws):
        getattr(type("Laws", (CompressorLaws,), {"compressor": Wrong()})(), law)()


def test_a_compressor_that_is_no_dataclass_is_named():
    class Plain(Compressor):
        codec = alpha = None

    with pytest.raises(AssertionError, match=r"^Plain\(\) breaks .* known ahead for d=0, float32: TypeError"):
        type("Laws", (CompressorLaws,), {"compressor": Plain()})().test_size_is_known_ahead()


def of_this_rank(s, plan, u):
    """Return what this rank alone has sent."""
    c = yield plan.offer(u)
    s.mean.fill(0)
    c.add_own(s.mean)
    return s.mean


def too_early(s, plan, u):
    """Change its state before the exchange."""
    s.e_i += u
    c = yield plan.offer(s.e_i)
    c.add_own(s.e_i, -1.0)
    c.set_mean(s.mean)
    return s.mean


def forgetful(s, plan, u):
    """Keep something that no state has."""
    p = lazy(u) + s.spare
    c = yield plan.offer(p)
    s.spare += 1
    c.set_mean(s.mean)
    return s.mean


def loses(s, plan, u):
    """Never update its error."""
    p_i = lazy(u) + s.e_i
    c = yield plan.offer(p_i, keep=Keep(p_i, into=s.spare, less_message=True))
    c.set_mean(s.mean)
    return s.mean


def sees_terms(s, plan, u):
    """Give another vector for a combination."""
    c = yield plan.offer(u if isinstance(u, np.ndarray) else 2.0 * u)
    c.set_mean(s.mean)
    return s.mean


@pytest.mark.parametrize(("step", "law", "words"), [
    (loses, "test_nothing_is_lost_in_the_long_run",
     "the law of what is sent later: the mean result of steps 201 to 400 is off by 91 % through TopK"),
    (sees_terms, "test_a_combination_is_the_vector_that_it_is", "the law of combinations: other bits through TopK"),
    (of_this_rank, "test_results_are_the_same_on_all_ranks", "breaks the law of equal replicas"),
    (of_this_rank, "test_nothing_is_lost_through_the_identity", "breaks the law of the uncompressed method"),
    (too_early, "test_a_step_that_all_skip_changes_nothing", "breaks the law of steps that are skipped"),
    (forgetful, "test_a_state_that_was_loaded_goes_on", "breaks the law of going on from a state"),
])
def test_what_is_wrong_with_a_rule_is_told(step, law, words):
    rule = Rule(step, FadingState, lambda alpha: {"fade": 0.5}, most_terms=2)
    with pytest.raises(AssertionError, match=f"^{rule.name} breaks {words.removeprefix('breaks ')}"):
        getattr(type("Laws", (RuleLaws,), {"rule": rule})(), law)()


class WrongPlan(GatherMean):
    """A gathered mean, and something wrong."""

    how = ""

    def bind(self):
        self.seen = 0
        return super().bind()

    def _begin(self, x, keep, *, split):
        self.seen += 1
        self.given = x
        if self.how == "fails in its own way" and self.seen > 1:
            raise OptionError("of its own")
        super()._begin(x, keep, split=split)

    def encode(self, x, *, split):
        if self.how in ("forgets the step", "forgets the rank"):
            step, rank = (0, self.rank) if self.how == "forgets the step" else (self.exchanges, 0)
            return self._codec.encode(x, self._send.wires[0], step=step, rank=rank)
        if self.how == "takes one vector":
            x = source(x.terms[0][1], None)
        return super().encode(x, split=split)

    def communicate(self):
        for sent in super().communicate():
            yield sent._replace(inspect=self.how != "hears nothing")
            if self.how == "encodes late":
                super().encode(source(self.given, None), split=True)
            if self.how == "gives up" and getattr(self.comm, "fault", "") == "delay":
                sent.receive.wires[self.rank] = 0

    def wait(self):
        try:
            super().wait()
        except CommunicationError:
            if self.how != "says nothing":
                raise
        type(self).mean = np.zeros(self.d, self.dtype)
        super().add_mean(self.mean)
        return self

    def like(self, compressor):
        if self.how == "is like itself":
            return super().like(self.compressor)
        return None if self.how == "has no like" else super().like(compressor)

    def add_mean(self, out, scale=1.0):
        if self.how == "its own":
            self.add_own(out, scale)
            return
        if self.how == "shares memory":
            out += scale * self.mean
            return
        factor = {"a sum": self.size, "has a memory": 1 + self.seen / 100}.get(self.how, 1.0)
        super().add_mean(out, scale * factor)

    def set_mean(self, out, scale=1.0, *, again=False):
        if self.how != "keeps the old":
            out.fill(0)
        self.add_mean(out, scale)

    @property
    def traffic(self):
        honest = super().traffic
        return type(honest).both_ways(1, self.size, 400) if self.how == "sends less" else honest


@pytest.mark.parametrize(("how", "law", "words"), [
    ("its own", "test_means_are_the_same_on_all_ranks", "the law of equal means: 2 ranks differ through TopK"),
    ("a sum", "test_a_mean_is_the_mean_of_the_messages", r"the law of the mean of the messages: off by .* on 2 ranks"),
    ("keeps the old", "test_a_mean_can_replace_the_one_before", "the law of overwriting: "),
    ("takes one vector", "test_combinations_are_what_they_stand_for", "the law of combinations: "),
    ("hears nothing", "test_what_fails_on_one_rank_fails_on_all_and_changes_nothing",
     "the law of exchanges that fail: NaN on rank 0 gives None on rank 0"),
    ("encodes late", "test_what_was_sent_may_change_before_it_arrives", "the law of exchanges in two parts: "),
    ("has a memory", "test_a_state_that_was_loaded_goes_on", "the law of going on from a state: other bits in step 3"),
    ("gives up", "test_what_comes_late_changes_nothing", "the law of ranks that come late: other bits .* rank 0 is late"),
    ("says nothing", "test_errors_of_communication_are_passed_on",
     "the law of communication that fails: a call that is to raise raises nothing"),
    ("fails in its own way", "test_errors_of_communication_are_passed_on",
     "the law of communication that fails: a call that is to raise raises OptionError.'of its own'"),
    ("shares memory", "test_what_was_sent_may_change_before_it_arrives", "the law of exchanges in two parts: "),
    ("forgets the step", "test_each_exchange_draws_anew_on_each_rank", "the law of what is drawn: two exchanges send"),
    ("forgets the rank", "test_each_exchange_draws_anew_on_each_rank", "the law of what is drawn: two ranks send the same"),
    ("is like itself", "test_dense_steps_go_through_a_plan_for_the_same_vectors",
     r"the law of plans for dense steps: like\(Identity\(\)\) returns a plan with TopK"),
    ("has no like", "test_dense_steps_go_through_a_plan_for_the_same_vectors",
     "the law of plans for dense steps: like returns a NoneType"),
    ("sends less", "test_exchanges_are_counted", "the law of accounts: .* bytes have left rank 0, `traffic` says 2"),
])
def test_what_is_wrong_with_a_plan_is_told(how, law, words):
    plan = type("Mine", (WrongPlan,), {"how": how})
    with pytest.raises(AssertionError, match=f"^Mine breaks {words}"):
        getattr(type("Laws", (PlanLaws,), {"plan": plan})(), law)()


def test_a_plan_that_takes_no_compressor_is_told():
    laws = type("Laws", (PlanLaws,), {"plan": lambda comm, _, d, dtype: GatherMean(comm, Identity(), d, dtype)})()
    with pytest.raises(
        AssertionError, match="the law of arguments that differ: another compressor on rank 1 gives None"
    ):
        laws.test_ranks_with_other_arguments_all_learn_about_it()


class Silent(TrimmedMean):
    """The example, whose ranks do not learn that they have other options."""

    def bind(self):
        super().bind()
        return {}


class Named(GatherMean):
    """A plan with an option of which no other value is known, and that it tells or not."""

    def __init__(self, comm, compressor, d, dtype=np.float32, *, mode="a", told=None):
        self.mode, self.told = mode, told
        super().__init__(comm, compressor, d, dtype)

    def bind(self):
        return super().bind() | ({"mode": self.mode} if self.told else {})


class Median(Combine):
    """What plans may take in place of the mean."""

    def __call__(self, rows):
        return np.median(rows, axis=0)

    def __repr__(self):
        return "median"


@pytest.mark.parametrize(("plan", "other", "words"), [
    (Silent, None, "another option, trim=0, on rank 1 gives None"),
    (f"{__name__}:Silent", None, "another option, trim=0, on rank 1 gives None"),
    (f"{__name__}:Silent(trim=0)", None, "another option, trim=1, on rank 1 gives None"),
    (Named, None, None),
    (f"{__name__}:Named", f"{__name__}:Named(mode='b')", r"another plan, .*:Named\(mode='b'\), on rank 1 gives None"),
    (f"{__name__}:Named(told='yes')", f"{__name__}:Named(told='yes', mode='b')", None),
    ("my_plan:TrimmedMean(trim=0)", None, None),
    (TrimmedMean, None, None),
    ("GatherMean", partial(GatherMean, combine=Median()), None),
    ("TwoPhaseMean", "TwoPhaseMean(reply=TopK(0.5))", None),
    ("TwoPhaseMean(residual=False)", partial(TwoPhaseMean, residual=False, combine=Median()), None),
    ("LowRankMean", None, None),
    ("ClientsMean(clients=3)", partial(ClientsMean, clients=3, weights=np.full(3, 0.5)), None),
])
def test_plans_whose_ranks_have_other_options(plan, other, words):
    compressors = (LowRank(1), LowRank(2)) if plan == "LowRankMean" else (TopK(0.1), Sign())
    laws = type("Laws", (PlanLaws,), {"plan": plan, "other": other, "compressors": compressors})()
    if words is None:
        laws.test_ranks_with_other_arguments_all_learn_about_it()
    else:
        with pytest.raises(AssertionError, match=f"Silent|Named.* breaks the law of arguments that differ: {words}"):
            laws.test_ranks_with_other_arguments_all_learn_about_it()


class WrongOptimizer(Normalized):
    """The example, and something wrong."""

    how = ""

    def __init__(self, params, comm, **options):
        self.taken, self.options = 0, options
        if self.how == "checks nothing":
            options = {name: value for name, value in options.items() if name != "beta"}
        super().__init__(params, comm, **options)

    def _ready(self, problem):
        if self.how == "is early":
            self.arrays["m"] += 0.1
        if self.how == "has a rate of its own":
            for group in self.param_groups:
                group["lr"] = 0.1
        return super()._ready(problem)

    def _clip(self, squared_norms):
        super()._clip(
            squared_norms[self.comm.Get_rank() :][:1] if self.how == "clips by its own norm" else squared_norms
        )

    def update(self):
        self.taken += 1
        rate, before = 1 + self.taken / 10, self.flat.values.copy()
        super().update()
        if self.how == "climbs":
            self.flat.values[:] = 2 * before - self.flat.values
        if self.how == "has a memory":
            self.flat.values *= rate
        if self.how == "its own":
            self.flat.values -= self.flat.gradients / 100
        if self.how == "never decays":
            self.flat.values[:] = before
            for group, part in self.slices():
                self.flat.values[part] -= group["lr"] * self.arrays["m"][part]
        if self.how == "trembles":
            self.flat.values += 1e-3
        if self.how == "gives up" and getattr(self.comm, "fault", "") == "delay":
            self.flat.values[:] = before

    def step(self, closure=None):
        try:
            return super().step(closure)
        except CommunicationError:
            if self.how != "says nothing":
                raise

    def load_state_dict(self, state_dict):
        steps = self.steps
        super().load_state_dict(state_dict)
        if self.how == "goes on counting":
            self.steps = steps

    def add_param_group(self, param_group):
        if self.how != "takes groups" or not hasattr(self, "flat"):
            super().add_param_group(param_group)


@pytest.mark.parametrize(("how", "law", "words"), [
    ("its own", "test_replicas_are_equal", "the law of equal replicas: parameters on 2 ranks differ after step 1"),
    ("climbs", "test_it_learns", "the law of learning: the loss on rank 0 of 2 was .* and is "),
    ("climbs", "test_16_bit_parameters", "the law of 16-bit parameters: the loss on rank 0 of 2 was .* and is "),
    ("has a memory", "test_a_state_that_was_loaded_goes_on", "the law of going on from a state: saved after 1 steps"),
    ("has a memory", "test_an_early_state_is_loaded_into_an_optimizer_that_was_further", "the law of going back to a state"),
    ("is early", "test_broken_gradients_are_skipped", "the law of steps that are skipped: nan in the gradient of first"),
    ("clips by its own norm", "test_clipping_is_global", "the law of global clipping: in step 1 rank [01] "),
    ("checks nothing", "test_bad_options", "the law of options out of range: {'beta': 1.0} give ef21 with TopK"),
    ("checks nothing", "test_ranks_with_other_options_all_learn_about_it", "the law of options that differ: .* on beta"),
    ("has a rate of its own", "test_groups_have_learning_rates_of_their_own", "the law of learning rates: half of"),
    ("never decays", "test_groups_have_learning_rates_of_their_own", "the law of learning rates: weight_decay=0.0 of a"),
    ("trembles", "test_groups_have_learning_rates_of_their_own", "the law of learning rates: parameters have moved with"),
    ("has a rate of its own", "test_learning_rates_that_drift_apart_stop_all_ranks", "the law of learning rates that drift"),
    ("goes on counting", "test_loading_on_one_rank_only_stops_all_ranks", "the law of loading everywhere: the message is"),
    ("gives up", "test_what_comes_late_changes_nothing", "the law of ranks that come late: other parameters after step 1"),
    ("says nothing", "test_errors_of_communication_are_passed_on", "the law of communication that fails: call 0 of a step"),
    ("takes groups", "test_groups_cannot_be_added_later", "the law of groups that are known at first: a group was added"),
])
def test_what_is_wrong_with_an_optimizer_is_told(how, law, words):
    optimizer = type("Mine", (WrongOptimizer,), {"how": how})
    said = {"optimizer": optimizer, "bad": (({"beta": 1.0}, "is not in"),), "differing": ("beta", 0.9, 0.8)}
    with pytest.raises(AssertionError, match=f"^Mine breaks {words}"):
        getattr(type("Laws", (OptimizerLaws,), said)(), law)()


def test_every_law_of_plans_and_optimizers_is_broken_here():
    tests = test_what_is_wrong_with_a_plan_is_told, test_what_is_wrong_with_an_optimizer_is_told
    told = {law for test in tests for mark in test.pytestmark for _, law, _ in mark.args[1]}
    assert told | {"test_ranks_with_other_arguments_all_learn_about_it"} == {
        *laws_in(PlanLaws),
        *laws_in(OptimizerLaws),
    }
