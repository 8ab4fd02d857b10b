"""The laws that users' own compressors and rules are tested with: what is built in obeys them, and what is wrong is told."""

from dataclasses import dataclass

import numpy as np
import pytest
from my_compressor import BlockMax
from my_rule import FADING, FadingState

from mpi_ef.compress import Compressor, Identity, LowRank, PlainCodec, Quantize, RandK, Sign, TopK, Vote, lazy
from mpi_ef.feedback import Rule
from mpi_ef.testing import CompressorLaws, RuleLaws

COMPRESSORS = [
    Identity(), Quantize("bf16"), Quantize("int8", block=64), Sign(), Sign(block=8), Vote(), TopK(0.1), RandK(0.2, seed=3),
    TopK(0.3, values=Quantize("bf16")), LowRank(1), BlockMax(8),
]  # fmt: skip
SIMPLE = ["ef14", "ef21", "econtrol(eta=0.1)", "my_rule:FADING(fade=0.5)"]
WITH_MOMENTUM = ["ef14-momentum", "ef21-sgdm", "ef21-sgd2m", "ef21-hb"]


def laws_in(laws):
    return [name for name in dir(laws) if name.startswith("test_")]


class TestMyCompressor(CompressorLaws):
    """As a user writes it."""

    compressor = BlockMax(3)


class TestMyRule(RuleLaws):
    rule = FADING


@pytest.mark.parametrize("law", laws_in(CompressorLaws))
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_compressors_obey(compressor, law):
    # alpha of draws holds in expectation; a vote has no magnitudes, and its alpha is of directions.
    contracts = not isinstance(compressor, RandK | LowRank | Vote)
    getattr(type("Laws", (CompressorLaws,), {"compressor": compressor, "contracts": contracts})(), law)()


@pytest.mark.parametrize("law", laws_in(RuleLaws))
@pytest.mark.parametrize("rule", [*SIMPLE, *WITH_MOMENTUM])
def test_rules_obey(rule, law):
    getattr(type("Laws", (RuleLaws,), {"rule": rule, "mean": rule not in WITH_MOMENTUM})(), law)()


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
        self.nbytes = 8 * d + 4 * (how == "no words")

    def pack(self, x, wire, *, step, rank):
        self.sent += 1
        kept = np.where(np.arange(x.size) % 4 == 0, x, 0).astype(np.float64)
        if self.how == "grows":
            kept *= 3
        if self.how == "another one every time" and kept.size:
            kept[0] += self.sent
        if self.how != "leaves bytes" or not x.size:
            wire[: 8 * self.d] = kept.view(np.uint8)

    def unpack(self, wire):
        with np.errstate(over="ignore", invalid="ignore"):
            return wire[: 8 * self.d].view(np.float64).astype(self.dtype)

    def encode(self, x, wire, *, step=0, rank=0):
        return super().encode(x, wire, step=step, rank=rank) or self.how == "tells nobody"

    def add(self, wires, out, factor=1.0, *, overwrite=False):
        super().add(wires, out, factor, overwrite=overwrite and self.how != "keeps the old")


@pytest.mark.parametrize(("how", "law", "words"), [
    ("claims too much", "test_contraction", r"breaks the law of contraction for d=.*alpha = 0.9 allows 0.1"),
    ("claims more than all", "test_contraction", r"contraction .*alpha = 1.5 is not in \[0, 1\]"),
    ("grows", "test_contraction", "breaks the law of contraction"),
    ("another one every time", "test_messages_are_deterministic", "breaks the law of determinism"),
    ("size", "test_size_is_known_ahead", "breaks the law of a size that is known ahead"),
    ("no words", "test_size_is_known_ahead", "breaks the law of whole words"),
    ("leaves bytes", "test_size_is_known_ahead", "breaks the law of messages that are written whole"),
    ("tells nobody", "test_what_is_not_finite_is_told", "breaks the law of vectors that are not finite"),
    ("keeps the old", "test_messages_are_added_in_order", "breaks the law of overwriting"),
])  # fmt: skip
def test_what_is_wrong_with_a_compressor_is_told(how, law, words):
    with pytest.raises(AssertionError, match=words) as told:
        getattr(type("Laws", (CompressorLaws,), {"compressor": Wrong(how)})(), law)()
    assert str(told.value).startswith(f"Wrong(how={how!r})")


def test_what_is_right_passes():
    for law in laws_in(CompressorLaws):
        getattr(type("Laws", (CompressorLaws,), {"compressor": Wrong()})(), law)()


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


@pytest.mark.parametrize(("step", "law", "words"), [
    (of_this_rank, "test_results_are_the_same_on_all_ranks", "breaks the law of equal replicas"),
    (of_this_rank, "test_nothing_is_lost_through_the_identity", "breaks the law of the uncompressed method"),
    (too_early, "test_a_step_that_all_skip_changes_nothing", "breaks the law of steps that are skipped"),
    (forgetful, "test_a_state_that_was_loaded_goes_on", "breaks the law of going on from a state"),
])  # fmt: skip
def test_what_is_wrong_with_a_rule_is_told(step, law, words):
    rule = Rule(step, FadingState, lambda alpha: {"fade": 0.5})
    with pytest.raises(AssertionError, match=words):
        getattr(type("Laws", (RuleLaws,), {"rule": rule})(), law)()
