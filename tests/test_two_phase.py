"""Sparse messages through owners of chunks: laws, what is sent, what a call costs."""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from vectors_for_tests import DTYPES, gaussian

from mpi_ef import DistributedOptimizer, ErrorFeedback, kernels
from mpi_ef.collectives import DenseMean, GatherMean, TwoPhaseMean, plan_for
from mpi_ef.compress import Chunks, Identity, Keep, Quantize, RandK, Sign, TopK, lazy, source
from mpi_ef.compress.compressor import flat
from mpi_ef.compress.sparse import TopKCodec
from mpi_ef.errors import OptionError
from mpi_ef.jobs.bench.methods import methods
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.optimizers import build_optimizer
from mpi_ef.kernels import reference

VALUES = (Identity(), Quantize("bf16", block=16), Quantize("fp16", block=7), Quantize("int8", block=64))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_dtype
@pytest.mark.parametrize("values", VALUES, ids=str)
def test_kernels_for_many_messages_have_the_bits_of_their_twins(values, dtype):
    @given(st.lists(st.integers(1, 150), min_size=1, max_size=6), st.floats(0.01, 1), st.integers(0, 2**32), st.booleans())
    def check(sizes, share, seed, ranks):
        """Of chunks, or of several ranks for one chunk."""
        rng = np.random.default_rng(seed)
        sizes = sizes[:1] * len(sizes) if ranks else sizes
        codecs = [TopK(share, values=values).codec(size, dtype) for size in sizes]
        starts = np.cumsum([0, *sizes[:-1]]) * (not ranks)
        layout = np.array([(start, *codec.layout[0, 1:]) for start, codec in zip(starts, codecs, strict=True)])
        counts = layout[:, 1]
        indices = np.concatenate([start + np.sort(rng.permutation(size)[:k])
                                  for start, size, k in zip(starts, sizes, counts, strict=True)])
        x = rng.normal(size=counts.sum()).astype(dtype)
        scratch, most = np.empty(kernels.QUANTIZE_SCRATCH, dtype), counts.max()
        seen = []
        for of in (kernels, reference):
            memory, places = flat(np.full((len(sizes), codecs[0].nbytes + 2000), 0xA5, np.uint8))
            form, table = codecs[0].form, layout[:1] if ranks else layout
            own, taken, out = indices.copy(), np.zeros_like(x), np.linspace(-1, 1, sum(sizes)).astype(dtype)
            finite = of.write_messages(table, *form, own, x.copy(), memory, places, scratch)
            of.read_values(table, *form, memory, places, taken, scratch)
            of.add_messages(table, *form, memory, places, dtype(0.3), out, np.zeros(most, np.int64), np.zeros(most, dtype),
                            scratch)
            cleared = out.copy()
            of.clear_messages(table, memory, places, cleared, np.zeros(most, np.int64))
            seen.append([bool(finite), *(a.tobytes() for a in (own, memory, taken, out, cleared))])
        assert seen[0] == seen[1]
        assert seen[0][0]

    check()


COMPRESSORS = (*(TopK(0.07, values=values) for values in VALUES), TopK(k=40), RandK(0.07), Sign(block=32),
               TopK(0.07, segments=(300, 1, 0, 500, 200)), TopK(0.07, segments=64), TopK(0.07, values=Sign(block=16)))


@each_dtype
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_chunks_write_and_read_what_their_codecs_do(compressor, dtype):
    d, n = 1001, 4
    bounds = [0, 250, 512, 700, d]
    together = Chunks(compressor, bounds, dtype)
    codecs = [compressor.part(start, stop, d).codec(stop - start, dtype) for start, stop in pairwise(bounds)]
    assert together.nbytes == max(codec.nbytes for codec in codecs)
    for step in range(3):
        u, e = gaussian(0, d, dtype, step=step), gaussian(1, d, dtype, step=step)
        kept, expected = np.empty((2, d), dtype), np.empty((2, d), dtype)
        wires, rows = (np.full((n, together.nbytes + 8), 7, np.uint8)[:, 8:] for _ in range(2))
        memory = together.rows(wires)
        x = lazy(u) + 0.5 * lazy(e)
        assert together.encode(source(x, Keep(x, kept[0], less_message=True)), memory, step=step, rank=1)
        together.add(memory, kept[1], 0.3, overwrite=True)
        for j, (codec, (start, stop)) in enumerate(zip(codecs, pairwise(bounds), strict=True)):
            part = slice(start, stop)
            wire = rows[j, : codec.nbytes]
            y = lazy(u[part]) + 0.5 * lazy(e[part])
            codec.encode(source(y, Keep(y, expected[0][part], less_message=True)), wire, step=step, rank=1)
            codec.add(wire[None], expected[1][part], 0.3, overwrite=True)
            assert wires[j, : codec.nbytes].tobytes() == wire.tobytes()
        assert kept.tobytes() == expected.tobytes()
        own = np.ones(d, dtype), np.ones(d, dtype)
        together.add_encoded(memory, own[0], 0.5)
        together.add(memory, own[1], 0.5)
        assert own[0].tobytes() == own[1].tobytes()
        together.clear(memory, kept[1])
        assert not kept[1].any()


def test_a_chunk_keeps_the_share_of_the_vector():
    """So does a count of a vector, and each segment as far as it lies in the chunk."""
    assert TopK(k=50).part(0, 100, 1000) == TopK(0.05)
    assert RandK(k=50, seed=3).part(0, 100, 1000) == RandK(0.05, seed=3)
    assert TopK(0.1, segments=(40, 0, 50, 10)).part(30, 95, 100) == TopK(0.1, segments=(10, 50, 5))
    assert TopK(0.1, segments=(40, 60)).grown(4, 100) == TopK(0.4, segments=(40, 60))
    assert RandK(0.3).grown(4, 100) == TopK(1.0)
    assert Sign().grown(4, 100) == Sign() == Sign().part(0, 10, 100)


@pytest.mark.parametrize(("n", "compressor", "d", "kind", "reply"), [
    (6, TopK(0.01), 60_000, GatherMean, None),
    (7, TopK(0.01), 60_000, TwoPhaseMean, TopK(0.04)),
    (16, RandK(0.01), 60_000, TwoPhaseMean, TopK(0.04)),
    (17, TopK(0.01), 60_000, TwoPhaseMean, TopK(0.08)),
    (64, TopK(k=600, values=Quantize("bf16")), 60_000, TwoPhaseMean, TopK(0.08, values=Quantize("bf16"))),
    (16, TopK(0.5), 60_000, TwoPhaseMean, TopK(1.0)),
    (16, TopK(1.0), 60_000, TwoPhaseMean, TopK(1.0)),
    (8, TopK(0.1), 100, GatherMean, None),  # headers of chunks are more than their entries
])
def test_sparse_messages_go_through_two_phases_where_that_is_less(n, compressor, d, kind, reply):
    """Not where a plan is asked for, nor where nothing may be kept, nor for second messages and dense steps."""
    def program(comm):
        plan = plan_for(comm, compressor, d)
        asked = [plan_for(comm, compressor, d, residual=False), plan_for(comm, compressor, d, gather=True),
                 plan.companion(TopK(0.01)), GatherMean(comm, compressor, d)]
        return type(plan), getattr(plan, "reply", None), {type(other) for other in asked}, plan.traffic.sent_nbytes

    for found, answer, asked, nbytes in virtual.results(n, program):
        assert found is kind
        assert answer == reply
        assert asked == {GatherMean}
        if kind is TwoPhaseMean:
            frame = 8 + compressor.wire_nbytes(d)
            assert nbytes < (n - 1) * frame


def shares(comm, rule, plan, steps, d, **options):
    """Return, after so many steps, the sum of results or the last one, what is owed, and what this rank has given."""
    feedback, total, given = ErrorFeedback(rule, plan, **options), np.zeros(d), np.zeros(d)
    for step in range(steps):
        u = gaussian(comm.Get_rank(), d, step=step)
        result = feedback.step(u)
        total = total + result if rule == "ef14" else result.copy()
        given += u
    owed = {name: array.astype(np.float64) for name, array in feedback.per_rank().items()}
    return total, owed, given


@pytest.mark.parametrize("n", [1, 3, 7, 8, 17])
def test_nothing_is_lost_of_what_is_sent(n):
    """L1: sum of means + E = sum of the means of what ranks gave, E = mean of e_i, and residuals of owners."""
    d = 19_200
    rows = virtual.results(n, lambda comm: shares(comm, "ef14", plan_for(comm, TopK(0.05), d), 12, d))
    owed = np.mean([row[1]["e_i"] for row in rows], axis=0)
    if n >= 7:
        owed = owed + np.concatenate([row[1]["plan.residual"] for row in rows])
    given = np.mean([row[2] for row in rows], axis=0)
    assert len({row[0].tobytes() for row in rows}) == 1
    np.testing.assert_array_less(np.linalg.norm(rows[0][0] + owed - given), 1e-6 * np.linalg.norm(given))
    assert np.linalg.norm(owed) > 0.1 * np.linalg.norm(given)


@pytest.mark.parametrize("n", [3, 8, 17])
def test_estimates_and_what_owners_keep_are_the_mean(n):
    """L2: g + E = the mean of the g_i."""
    d = 9600
    rows = virtual.results(n, lambda comm: shares(comm, "ef21", plan_for(comm, TopK(0.05), d), 8, d))
    estimates = np.mean([row[1]["g_i"] for row in rows], axis=0)
    owed = np.concatenate([row[1]["plan.residual"] for row in rows]) if n >= 7 else 0
    np.testing.assert_array_less(np.linalg.norm(rows[0][0] + owed - estimates), 1e-6 * np.linalg.norm(estimates))


class Senders:
    """The rule of gTopk and Ok-Topk, in NumPy: a rank keeps what is not in the final set; owners keep nothing."""

    def __init__(self, n, d, k):
        self.e, self.k, self.bounds = np.zeros((n, d)), k, [d * j // n for j in range(n + 1)]

    def step(self, u):
        n, d = u.shape
        self.e += u
        sent, mean = np.zeros((n, d)), np.zeros(d)
        for part in (slice(*cut) for cut in pairwise(self.bounds)):
            k = self.k // n
            for i in range(n):
                top = part.start + np.argsort(-abs(self.e[i, part]), kind="stable")[:k]
                sent[i, top] = self.e[i, top]
            total = sent[:, part].mean(axis=0)
            final = part.start + np.argsort(-abs(total), kind="stable")[:k]
            mean[final] = sent[:, final].mean(axis=0)
            for i in range(n):
                both = final[sent[i, final] != 0]
                self.e[i, both] = 0
        return mean


def test_an_owner_that_keeps_starves_nobody():
    """Two ranks disagree once by 100 on their largest entries; sums of the others are larger elsewhere, for ever."""
    n, d, k, steps = 4, 2000, 48, 200
    chunk, each = d // n, k // n
    starts = np.arange(n) * chunk
    disputed, agreed, others = (np.concatenate([starts[:, None] + np.arange(low, low + each)]).ravel()
                                for low in (0, 100, 200))

    def given(step):
        u = np.zeros((n, d))
        u[:2, agreed] = 0.05
        u[2:, others] = 1.0
        if step == 0:
            u[0, disputed], u[1, disputed] = 100.0, -100.0
        return u

    def program(comm):
        plan = TwoPhaseMean(comm, TopK(k / d), d, np.float64, reply=TopK(k / d))
        feedback, applied = ErrorFeedback("ef14", plan), np.zeros(d)
        for step in range(steps):
            applied += feedback.step(given(step)[comm.Get_rank()])
        return applied

    wanted = 0.05 * steps / 2
    applied = virtual.results(n, program)[0]
    senders = Senders(n, d, k)
    starved = sum(senders.step(given(step)) for step in range(steps))
    assert applied[agreed].mean() > 0.4 * wanted
    assert starved[agreed].mean() == 0
    assert starved[others].mean() > 0.4 * steps / 2


def test_a_whole_reply_is_the_gathered_mean():
    d = 4000

    def program(comm):
        out = np.empty((2, d), np.float32)
        for row, plan in zip(out, (GatherMean(comm, TopK(0.1), d), TwoPhaseMean(comm, TopK(0.1, segments=(500,) * 8), d,
                                                                             reply=Identity())), strict=True):
            x = gaussian(comm.Get_rank(), d)
            if isinstance(plan, GatherMean):
                plan = GatherMean(comm, TopK(0.1, segments=(500,) * 8), d)  # noqa: PLW2901
            plan.exchange(x)
            plan.set_mean(row)
        return out

    for gathered, whole in virtual.results(8, program):
        np.testing.assert_allclose(gathered, whole, rtol=1e-6, atol=1e-7)
        assert ((gathered == 0) == (whole == 0)).all()


def arrays_of(thing, seen=None):
    """Return the arrays that own memory, of a plan and what belongs to it."""
    seen = {} if seen is None else seen
    parts = vars(thing).values() if hasattr(thing, "__dict__") else thing.values() if isinstance(thing, dict) else thing
    for part in parts:
        if isinstance(part, np.ndarray):
            while isinstance(part.base, np.ndarray):
                part = part.base  # noqa: PLW2901
            seen[id(part)] = part
        elif id(part) not in seen and (type(part) in (list, tuple, dict) or type(part).__module__.startswith("mpi_ef.c")):
            seen[id(part)] = np.empty(0)
            arrays_of(part, seen)
    return seen


def test_memory_and_calls_do_not_grow_with_ranks():
    """What a rank holds, and what it calls in Python, with the same reply on 8 and on 64 ranks."""
    d = 400_000

    def program(comm):
        plan = TwoPhaseMean(comm, TopK(0.01, values=Quantize("bf16")), d, reply=TopK(0.04, values=Quantize("bf16")))
        feedback, calls = ErrorFeedback("ef14", plan), 0
        u = gaussian(comm.Get_rank(), d)

        def count(frame, event, _):
            nonlocal calls
            calls += event == "call" and any(room in frame.f_code.co_filename
                                             for room in ("/collectives/", "/compress/", "/kernels/", "/feedback/"))

        for step in range(3):
            if step == 2 and comm.Get_rank() == 1:
                sys.setprofile(count)
            feedback.step(u)
            sys.setprofile(None)
        return sum(array.nbytes for array in arrays_of(plan).values()), calls

    few, many = (virtual.results(n, program)[1] for n in (8, 64))
    assert many[1] == few[1] > 30
    assert many[0] < 1.05 * few[0]


def test_a_rule_with_a_way_back_of_its_own_gathers():
    def program(comm):
        net = torch.nn.Linear(300, 200)
        built = [DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.01), placement="gradient",
                                      rule=rule) for rule in ("ef21-bc(reply=TopK(0.1))", "ef21")]
        return [type(optimizer.feedback.plan) for optimizer in built]

    assert virtual.results(8, program)[0] == [GatherMean, TwoPhaseMean]


def test_marina_gathers_and_takes_no_biased_reply():
    """What owners owe from before a whole step would come on top of it, times d / k, and their TopK is biased."""
    d = 20_000

    def program(comm):
        net = torch.nn.Linear(300, 200)
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, RandK(0.05), placement="gradient",
                                         rule="marina")
        x, exact = gaussian(comm.Get_rank(), d), TwoPhaseMean(comm, RandK(0.05), d, reply=Identity())
        seen = []
        for plan in (GatherMean(comm, RandK(0.05), d), exact):
            feedback = ErrorFeedback("marina", plan, dense_steps=1)
            for _ in range(2):
                feedback.step(x)
            feedback.step(x, whole=True)
            seen.append(feedback.step(np.zeros(d, np.float32)).copy())
        with pytest.raises(OptionError, match="of the TwoPhaseMean is not unbiased; take GatherMean"):
            ErrorFeedback("marina", TwoPhaseMean(comm, RandK(0.05), d)).step(x)
        return type(optimizer.feedback.plan), x, seen

    rows = virtual.results(8, program)
    assert rows[0][0] is GatherMean
    for told in rows[0][2]:
        np.testing.assert_allclose(told, np.mean([row[1] for row in rows], axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rule", "plan", "kind"), [
    ("marina", None, GatherMean), ("ef21-bc", None, GatherMean), ("ef21", None, TwoPhaseMean), ("ef14", None, TwoPhaseMean),
    ("ef21", "GatherMean", GatherMean), ("ef14", "TwoPhaseMean", TwoPhaseMean),
])
def test_a_training_on_many_ranks_takes_the_plan_of_its_rule(rule, plan, kind):
    options = {"compressor": "randk"} if rule == "marina" else {}
    options |= {} if plan is None else {"plan": plan}
    config = TrainConfig(optimizer="sgd", placement="gradient", rule=rule, ratio=0.01, clip=0.0, **options)

    def program(comm):
        optimizer = build_optimizer(config, torch.nn.Linear(300, 200), comm)
        return type(optimizer.feedback.plan)

    assert virtual.results(8, program) == [kind] * 8


def test_bench_measures_the_plans_that_optimizers_take():
    """Gathered on few ranks, through owners on more; and rules that gather on any number."""
    d = 20_000

    def program(comm):
        asked = methods(comm, d, 0.01, [("ef21-bc(reply=TopK(0.1))", "TopK(0.01)")])
        kinds = [type(method.plan) for method in asked if method.kind == "compressed"]
        for method in methods(comm, d, 0.01):
            if method.kind == "compressed" and "K(0.01" in method.name:
                kinds.append(type(method.plan))
                expected = plan_for(comm, method.plan.compressor, d)
                assert method.sent_nbytes == expected.traffic.sent_nbytes
                assert type(method.plan) is type(expected)
        return kinds

    assert virtual.results(3, program)[0] == [GatherMean] * 6
    assert virtual.results(8, program)[0] == [GatherMean, *[TwoPhaseMean] * 5]


def test_the_guide_says_what_ranks_send():
    d, what = 10_000_000, TopK(0.01, values=Quantize("bf16"))
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    start = text.index(next(line for line in text if line.startswith("| ranks | 2 | 4 |")))
    ranks, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (text[start], *text[start + 2 :]))
    for plan, row in zip((GatherMean, TwoPhaseMean, lambda comm, _, d: DenseMean(comm, d)), rows[:3], strict=True):
        for n in (2, 7, 16):
            nbytes = virtual.results(n, lambda comm, plan=plan: plan(comm, what, d).traffic.sent_nbytes)[0]
            assert row[ranks.index(str(n))] == f"{nbytes / 1e6:.2f} MB"


class SignsOnly(TopKCodec):
    """Of the entries that TopK keeps, the signs alone."""

    def _choose(self, x, head, step, rank):
        finite = super()._choose(x, head, step, rank)
        np.sign(self._kept, out=self._kept)
        return finite


@dataclass(frozen=True, repr=False)
class TopSigns(TopK):
    def codec(self, d, dtype=np.float32, device="cpu"):
        return SignsOnly(d, dtype, self, device)


class FlippedCodec(type(Quantize().codec(1))):
    """Quantize with other wires: all bits are flipped."""

    def encode(self, x, wire, *, step=0, rank=0):
        finite = super().encode(x, wire, step=step, rank=rank)
        np.invert(wire, out=wire)
        return finite

    def add(self, wires, out, factor=1.0, *, overwrite=False):
        super().add(~wires, out, factor, overwrite=overwrite)


@dataclass(frozen=True, repr=False)
class Flipped(Quantize):
    def codec(self, d, dtype=np.float32, device="cpu"):
        return FlippedCodec(d, dtype, self, device)


@dataclass(frozen=True, repr=False)
class ShortAsTheyAre(Quantize):
    """Quantize, but for few values, which stay as they are."""

    def codec(self, d, dtype=np.float32, device="cpu"):
        return (Identity() if d < 20 else Quantize()).codec(d, dtype, device)


@pytest.mark.parametrize("compressor", [TopSigns(0.1), TopK(0.1, values=Flipped()), TopK(0.1, values=ShortAsTheyAre())],
                         ids=str)
def test_codecs_of_subclasses_write_and_read_their_own_messages(compressor):
    """In chunks, and of all ranks; where chunks have values in several forms as well."""
    d, bounds = 1000, [0, 100, 600, 1000]
    x, codec = gaussian(0, d), compressor.codec(d)
    wire, out = np.zeros((2, codec.nbytes), np.uint8), np.zeros((2, d), np.float32)
    assert codec.encode(x, wire[0])
    codec.add(wire[:1], out[0])
    codec.add_encoded(wire[0], out[1])
    assert out[0].tobytes() == out[1].tobytes()
    together, told, expected = Chunks(compressor, bounds, np.float32), np.zeros(d, np.float32), np.zeros(d, np.float32)
    rows = together.rows(np.zeros((3, together.nbytes), np.uint8))
    assert together.encode(source(x), rows, step=0, rank=0)
    together.add(rows, told, 1.0)
    for start, stop in pairwise(bounds):
        part = compressor.part(start, stop, d).codec(stop - start)
        own = np.zeros(part.nbytes, np.uint8)
        part.encode(x[start:stop].copy(), own)
        part.add(own[None], expected[start:stop])
    assert told.tobytes() == expected.tobytes()
    kept = told[told != 0]
    assert kept.size == 100
    if isinstance(compressor, TopSigns):
        assert set(kept.tolist()) == {-1, 1}
    else:
        np.testing.assert_allclose(kept, x[told != 0], rtol=0.01)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_messages_may_lie_anywhere_in_memory(values):
    codec, d = TopK(0.1, values=values).codec(500), 500
    wires = np.zeros((3, codec.nbytes), np.uint8)
    for r, wire in enumerate(wires):
        codec.encode(gaussian(r, d), wire)
    expected = np.zeros(d, np.float32)
    codec.add(wires, expected)
    apart, backwards = np.zeros((6, 2 * codec.nbytes), np.uint8), wires[::-1].copy()
    apart[::2, ::2] = wires
    unaligned, fixed = np.zeros((3, codec.nbytes + 3), np.uint8), np.frombuffer(wires.tobytes(), np.uint8)
    unaligned[:, 1:-2] = wires
    for placed in (np.asfortranarray(wires), apart[::2, ::2], backwards[::-1], unaligned[:, 1:-2],
                   fixed.reshape(wires.shape)):
        out = np.zeros(d, np.float32)
        codec.add(placed, out)
        assert out.tobytes() == expected.tobytes()
