"""Laws of the plans, on virtual ranks."""

import warnings
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import virtual
from programs import PLANS, exchanges, laws_in
from vectors_for_tests import gaussian

from mpi_ef.collectives import (
    ClientsMean,
    Combine,
    DenseMean,
    GatherMean,
    TwoPhaseMean,
    allgather,
    allreduce,
    chunk_bounds,
    plan_for,
)
from mpi_ef.collectives import dense as dense_module
from mpi_ef.collectives import frames as frames_module
from mpi_ef.compress import Combination, Identity, Keep, Quantize, Sign, TopK, lazy, source
from mpi_ef.ddp import ProcessGroupComm
from mpi_ef.errors import DisagreementError, DtypeError, MpiEfError, NonFiniteError, OptionError, PeerError, ShapeError
from mpi_ef.testing import PlanLaws

RANKS = (1, 2, 3, 4)
each_plan = pytest.mark.parametrize("plan", PLANS)
each_world = pytest.mark.parametrize("n", RANKS)


@pytest.mark.parametrize("d", [0, 1, 2, 5, 64, 1001])
@each_world
def test_chunks_cover_everything_evenly(d, n):
    bounds = chunk_bounds(d, n)
    sizes = np.diff(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == d
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("law", laws_in(PlanLaws))
@each_plan
def test_plans_obey(plan, law):
    """The compressor is the plan's own."""
    said = {"plan": lambda comm, compressor, d, dtype: PLANS[plan](comm, d, dtype), "compressors": (Identity(),),
            "ranks": RANKS, "mean": "without" not in plan, "owed": "residual" if "two-phase" in plan else ""}
    getattr(type("Laws", (PlanLaws,), said)(), law)()


@pytest.mark.parametrize("law", laws_in(PlanLaws))
def test_a_mean_of_clients_obeys(law):
    """One more of them than ranks."""
    said = {
        "plan": lambda comm, compressor, d, dtype: ClientsMean(comm, compressor, d, dtype, clients=comm.Get_size() + 1)
    }
    getattr(type("Laws", (PlanLaws,), said)(), law)()


@pytest.mark.parametrize("law", laws_in(PlanLaws))
@pytest.mark.parametrize("said", [{"plan": "RobustMean(f=0, shards=True)"},
                                  {"plan": "RobustMean(Median(), f=0)", "mean": False}], ids=lambda said: said["plan"])
def test_robust_means_obey(said, law):
    """With f = 0, as NaN of f ranks is no error."""
    getattr(type("Laws", (PlanLaws,), said)(), law)()


@each_world
def test_dense_mean_is_the_mean_in_rank_order(n):
    d = 1001
    rows = virtual.results(n, exchanges("dense", d, np.float32, 1))
    expected = np.zeros(d, np.float32)
    for rank in range(n):
        expected += np.float32(1 / n) * gaussian(rank, d)
    assert rows[0][2].tobytes() == expected.tobytes()
    assert rows[0][2].tobytes() == virtual.results(n, exchanges("gather identity", d, np.float32, 1))[0][2].tobytes()


@each_world
@pytest.mark.parametrize("d", [0, 1, 63, 64, 1001])
def test_dense_mean_goes_block_by_block(n, d, monkeypatch):
    """Whole blocks, a shorter last one, one that does not divide: the result does not know."""
    monkeypatch.setattr(dense_module, "BLOCK_NBYTES", 256)

    def program(comm):
        plan = DenseMean(comm, d, np.float64)
        x = gaussian(comm.Get_rank(), d, np.float64)
        kept = np.ones(d)
        plan.exchange(2 * lazy(x), keep=Keep(lazy(x), into=kept, less_message=True))
        own, mean = np.zeros(d), np.ones(d)
        plan.add_own(own)
        plan.set_mean(mean)
        total, in_place = np.ones(d), x.copy()
        plan.allreduce(x, total, n)
        plan.allreduce(in_place, in_place)
        return own, kept, mean, plan.mean, total, in_place

    xs = [gaussian(rank, d, np.float64) for rank in range(n)]
    expected = sum((x * (1 / n) for x in xs[1:]), start=xs[0] * (1 / n))
    for rank, (own, kept, mean, last, total, in_place) in enumerate(virtual.results(n, program)):
        np.testing.assert_array_equal(own, 2 * xs[rank])
        np.testing.assert_array_equal(kept, -xs[rank])
        np.testing.assert_array_equal(mean, 2 * expected)
        np.testing.assert_array_equal(last, expected)
        np.testing.assert_array_equal(in_place, expected)
        np.testing.assert_array_equal(total, sum(xs[1:], start=xs[0]))


def test_combinations_that_do_not_fit_stop_all_ranks():
    d = 10

    def program(comm):
        plan = GatherMean(comm, TopK(0.5), d)
        x, y = gaussian(0, d), gaussian(1, d if comm.Get_rank() else d + 1)
        plan.exchange(lazy(x) - y)

    wrong, peer = virtual.run(2, program)
    assert isinstance(wrong, ShapeError)
    assert "(11,)" in str(wrong)
    assert isinstance(peer, PeerError)


@each_world
def test_dense_mean_of_its_own_result(n):
    """As in a power iteration: what goes in is what came out."""

    def program(comm):
        plan = DenseMean(comm, 64, np.float64)
        plan.exchange(gaussian(comm.Get_rank(), 64, np.float64))
        before = plan.mean.copy()
        return before, plan.exchange(plan.mean).mean.copy()

    for before, after in virtual.results(n, program):
        np.testing.assert_allclose(after, before, rtol=1e-15)


@pytest.mark.parametrize("wrong", ["read-only", "short", "float64", "strided"])
def test_dense_allreduce_into_an_array_that_does_not_fit_stops_all_ranks(wrong):
    def program(comm):
        out = np.zeros(10, np.float32)
        if comm.Get_rank() == 1:
            out = {"read-only": DenseMean(comm_of_one(), 10).mean, "short": out[:9], "float64": np.zeros(10),
                   "strided": np.zeros(20, np.float32)[::2]}[wrong]
        DenseMean(comm, 10).allreduce(gaussian(comm.Get_rank(), 10), out)

    def comm_of_one():
        return virtual.results(1, lambda comm: comm)[0]

    peer, error = virtual.run(2, program)
    assert isinstance(error, ShapeError | DtypeError)
    assert "out" in str(error)
    assert isinstance(peer, PeerError)


@pytest.mark.parametrize("wrong", ["read-only", "sent", "factor"])
def test_what_cannot_be_kept_or_formed_stops_all_ranks(wrong):
    def program(comm):
        x, into = gaussian(comm.Get_rank(), 10), np.zeros(10, np.float32)
        vector = lazy(x)
        if comm.Get_rank() == 1:
            into.flags.writeable = wrong != "read-only"
            into = x if wrong == "sent" else into
            vector = vector * np.ones(2) if wrong == "factor" else vector
        GatherMean(comm, TopK(0.5), 10).exchange(vector, keep=Keep(lazy(x), into=into))

    peer, error = virtual.run(2, program)
    assert isinstance(error, ShapeError | OptionError)
    assert isinstance(peer, PeerError)


@each_plan
def test_results_go_to_contiguous_arrays_only(plan):
    def program(comm):
        p = PLANS[plan](comm, 100, np.float32)
        p.exchange(gaussian(0, 100))
        matrix = np.zeros((100, 3), np.float32)
        for write in (p.add_own, p.add_mean, p.set_mean):
            with pytest.raises(ShapeError, match="not contiguous"):
                write(matrix[:, 0])
        assert not matrix[:, 1:].any()

    virtual.results(1, program)


def test_what_is_kept_is_made_of_what_is_sent():
    def program(comm):
        x, y = gaussian(0, 5), gaussian(1, 5)
        GatherMean(comm, TopK(0.5), 5).exchange(x, keep=Keep(lazy(y if comm.Get_rank() else x), into=np.zeros_like(x)))

    peer, wrong = virtual.run(2, program)
    assert isinstance(wrong, OptionError)
    assert "not in what is sent" in str(wrong)
    assert isinstance(peer, PeerError)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_factors_are_what_they_are_whatever_came_before(dtype):
    """Also the sign of a zero, which sums of zeros show."""
    a, b = np.ones(2, dtype), np.ones(2, dtype)
    for factors in ((0.0, -0.5), (-0.0, -0.5), (0.0, -0.5)):
        x = Combination((factors[0], a), (factors[1], b))
        formed = source(x, Keep(lazy(b), into=np.empty(2, dtype)))
        assert formed.factors.tobytes() == np.array([0.0, -0.5, 0.0], dtype).tobytes()
        assert formed.keep_factors.tobytes() == np.array([0.0, 1.0, 0.0], dtype).tobytes()


def test_arithmetic_with_combinations():
    a, b = np.ones(3), np.ones(3)
    with pytest.raises(OptionError, match="combination of 4 vectors"):
        lazy(a) + b + np.ones(3) + np.ones(3)
    c = 2 * (lazy(a) - b) + 3 * lazy(b)
    assert [(factor, vector is a) for factor, vector in c.terms] == [(2.0, True), (1.0, False)]
    with pytest.raises(TypeError):
        a - lazy(b)


@each_world
def test_traffic(n):
    def program(comm):
        d = 10_000
        dense, sparse, sign = (plan_for(comm, c, d) for c in (Identity(), TopK(0.01), Sign()))
        assert isinstance(dense, DenseMean)
        assert isinstance(sparse, GatherMean)
        assert isinstance(sign, TwoPhaseMean)
        return dense.traffic, sparse.traffic, sign.traffic

    dense, sparse, sign = virtual.results(n, program)[0]
    assert dense.dense_nbytes == 2 * 4 * 10_000 * (n - 1) // n
    # Nothing but headers, and rounding of chunks to whole words, is added to what theory says.
    assert 0 <= dense.sent_nbytes - dense.dense_nbytes <= 2 * (n - 1) * 24
    assert sparse.sent_nbytes == (n - 1) * (8 + TopK(0.01).wire_nbytes(10_000))
    assert sparse.received_nbytes == sparse.sent_nbytes
    assert sign.sent_nbytes * 28 < max(1, dense.sent_nbytes) or n == 1


def test_start_and_wait_alternate():
    def program(comm):
        plan = GatherMean(comm, Identity(), 3)
        with pytest.raises(OptionError, match="wait was called without start"):
            plan.wait()
        plan.start(np.ones(3, np.float32))
        with pytest.raises(OptionError, match="start was called twice"):
            plan.start(np.ones(3, np.float32))
        plan.wait()

    virtual.results(2, program)


@pytest.mark.parametrize("plan", ["gather topk", "two-phase sign", "dense"])
@pytest.mark.parametrize(
    ("broken", "error", "words"),
    [
        (lambda x: x[:-1], ShapeError, "x has shape (99,); this plan takes (100,)"),
        (lambda x: x.astype(np.float64), DtypeError, "x has dtype float64; this plan takes float32"),
        (lambda x: np.repeat(x, 2)[::2], ShapeError, "x is not contiguous"),
        (lambda x: x.tolist(), DtypeError, "x is a list"),
        (lambda x: np.ma.masked_less(x, 0.0), DtypeError, "x is a masked array, and masks are not sent"),
    ],
)
def test_an_array_that_does_not_fit_on_one_rank_stops_all_ranks(plan, broken, error, words):
    def program(comm):
        p = PLANS[plan](comm, 100, np.float32)
        rank = comm.Get_rank()
        x = gaussian(rank, 100)
        before = [array.copy() for array in p.state().values()]
        with pytest.raises(error if rank == 1 else PeerError) as caught:
            p.exchange(broken(x) if rank == 1 else x)
        out = np.zeros(100, np.float32)
        assert all((a == b).all() for a, b in zip(before, p.state().values(), strict=True))
        p.exchange(x).add_mean(out)  # the plan still works
        return str(caught.value), out

    texts, outs = zip(*virtual.results(3, program), strict=True)
    assert words in texts[1]
    assert f"rank 1 raised: {texts[1]}" in texts[0]
    assert (outs[0] == outs[2]).all()


def test_a_mean_that_overflows_stops_all_and_changes_nothing():
    def program(comm):
        p = TwoPhaseMean(comm, Quantize16, 10)
        p.exchange(gaussian(comm.Get_rank(), 10))
        before = p.state()["residual"].copy()
        p.state()["residual"][:] = np.float32(3e38)
        mine = p.state()["residual"].copy()
        with pytest.raises(NonFiniteError):
            p.exchange(np.full(10, 3e38, np.float32))
        assert (p.state()["residual"] == mine).all()
        return before

    from mpi_ef.compress import Quantize

    Quantize16 = Quantize("fp16")
    virtual.results(2, program)


def test_ranks_that_disagree_all_learn_about_it():
    def caught(build):
        def program(comm):
            with pytest.raises((DisagreementError, PeerError, OptionError, DtypeError, ShapeError)) as error:
                build(comm, comm.Get_rank())
            return type(error.value).__name__, str(error.value)

        return virtual.results(3, program)

    answers = caught(lambda comm, r: GatherMean(comm, TopK(0.1), 1024 if r == 2 else 1000))
    assert set(answers) == {("DisagreementError", "GatherMean: ranks disagree on d: 1000 on ranks 0,1; 1024 on rank 2; "
                             "build the plan from the same arguments everywhere")}
    for build, words in (
        (lambda comm, r: GatherMean(comm, TopK(0.1 + r / 100), 100), "disagree on compressor"),
        (
            lambda comm, r: GatherMean(comm, TopK(0.1), 100, (np.float32, np.float64, np.float32)[r]),
            "disagree on dtype",
        ),
        (lambda comm, r: (GatherMean if r else TwoPhaseMean)(comm, TopK(0.1), 100), "disagree on plan"),
        (lambda comm, r: TwoPhaseMean(comm, Sign(), 100, residual=r > 0), "disagree on residual"),
        (lambda comm, r: TwoPhaseMean(comm, Sign(), 100, reply=Sign(8) if r else None), "disagree on reply"),
    ):
        answers = caught(build)
        assert {kind for kind, _ in answers} == {"DisagreementError"}
        assert all(words in text for _, text in answers)
    answers = caught(lambda comm, r: GatherMean(comm, TopK(k=200 if r == 1 else 10), 100))
    assert [kind for kind, _ in answers] == ["PeerError", "OptionError", "PeerError"]
    assert answers[0][1] == "GatherMean: rank 1 raised: TopK: k=200 exceeds d=100; take k <= d, or a ratio"
    answers = caught(lambda comm, r: GatherMean(comm, Identity(), 100, np.int32))
    assert {kind for kind, _ in answers} == {"DtypeError"}
    for wrong in (("topk", 100), (TopK(0.1), 100.5), (TopK(0.1), None)):
        answers = caught(lambda comm, r, wrong=wrong: GatherMean(comm, *(wrong if r == 1 else (TopK(0.1), 100))))
        assert [kind for kind, _ in answers][::2] == ["PeerError"] * 2
    answers = caught(lambda comm, r: GatherMean(comm, TopK(0.1), 100, "float23" if r else np.float32))
    assert "'float23' is not known" in answers[0][1]


def test_ranks_out_of_step_are_told():
    def program(comm):
        plan = GatherMean(comm, Identity(), 3)
        plan.exchanges += comm.Get_rank()
        with pytest.raises(DisagreementError, match=r"out of step: exchange number \[0, 1\]"):
            plan.exchange(np.ones(3, np.float32))

    virtual.results(2, program)


def test_something_that_is_no_communicator_is_refused():
    for comm in (None, object()):
        with pytest.raises(OptionError, match="is not an intracommunicator"):
            GatherMean(comm, Identity(), 3)


def read_only(array, yes):
    array.flags.writeable = not yes
    return array


@each_world
def test_one_call_forms(n):
    """Shape, dtype and kind follow the input; plans are reused; out may be the input."""
    torch = pytest.importorskip("torch")

    def program(comm):
        rank = comm.Get_rank()
        x = gaussian(rank, 60, np.float64).reshape(3, 20)
        mean = allreduce(comm, x, Identity())
        assert mean.shape == x.shape
        total = allreduce(comm, x, Identity(), op="sum")
        np.testing.assert_allclose(total, n * mean)
        rows = allgather(comm, x, TopK(0.1))
        assert rows.shape == (n, 3, 20)
        np.testing.assert_allclose(rows.mean(axis=0), allreduce(comm, x, TopK(0.1)), atol=1e-12)
        signs = allreduce(comm, x, Sign())
        np.testing.assert_array_equal(signs, allreduce(comm, x, Sign()))  # no hidden state
        tensor = torch.from_numpy(x.copy()).requires_grad_()
        out = torch.empty_like(tensor)
        assert allreduce(comm, tensor, TopK(0.1), out=out) is out
        np.testing.assert_array_equal(out.detach().numpy(), allreduce(comm, x, TopK(0.1)))
        assert isinstance(allgather(comm, tensor, Identity()), torch.Tensor)
        inplace = x.copy()
        allreduce(comm, inplace, Identity(), out=inplace)
        np.testing.assert_array_equal(inplace, mean)
        return mean, rows, signs

    rows = virtual.results(n, program)
    assert all(a.tobytes() == b.tobytes() for row in rows for a, b in zip(row, rows[0], strict=True))
    np.testing.assert_allclose(rows[0][0].ravel(), np.mean([gaussian(r, 60, np.float64) for r in range(n)], axis=0))


@pytest.mark.parametrize("compressor", [Identity(), TopK(0.1), Sign()])
def test_one_call_forms_keep_no_array_of_the_caller(compressor):
    """The plan of a dense one held the last vector, as long as the communicator lived."""

    def program(comm):
        seen = []
        for give_out in (False, True):
            x, out = np.ones(100), np.zeros(100)
            seen += [weakref.ref(x), weakref.ref(out)]
            allreduce(comm, x, compressor, out=out if give_out else None)
            del x, out
        return [array() is None for array in seen]

    assert virtual.results(2, program) == [[True] * 4] * 2


def test_one_call_forms_keep_a_bounded_number_of_plans():
    from mpi_ef.collectives import onecall
    from mpi_ef.comm.attributes import kept_with

    def program(comm):
        for d in range(1, 40):
            allreduce(comm, np.ones(d, np.float32), Identity())
        return len(kept_with(comm, onecall._Plans))

    assert virtual.results(2, program) == [onecall.KEPT_PLANS] * 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda comm, r: allreduce(comm, np.ones(50 + r, np.float32), TopK(0.1)), "disagree on d: 50 on rank 0"),
        (lambda comm, r: allreduce(comm, np.ones(50, np.float32), TopK(0.1), op=("sum", "mean")[r]), "disagree"),
        (lambda comm, r: allreduce(comm, np.ones(50, np.float32)[:: 1 + r], TopK(0.1)), "not contiguous"),
        (lambda comm, r: allreduce(comm, np.ones(50, np.int32), TopK(0.1)), "int32"),
        (lambda comm, r: allreduce(comm, [1.0, 2.0], TopK(0.1)), "is a list"),
        (lambda comm, r: allreduce(comm, np.ma.masked_equal(np.ones(50), r), TopK(0.1)), "x is a masked array"),
        (lambda comm, r: allreduce(comm, torch.ones(50, dtype=torch.bfloat16), TopK(0.1)), "x has dtype torch.bfloat16"),
        (lambda comm, r: allreduce(comm, np.ones(50), TopK(0.1), op="max"), "op='max' is unknown"),
        (
            lambda comm, r: allreduce(comm, np.ones(50), TopK(0.1), out=np.ones(49)),
            "out has shape (49,) float64; it must be (50,) float64",
        ),
        (lambda comm, r: allgather(comm, np.ones(50), TopK(0.1), out=np.ones((3, 50))), "it must be (2, 50)"),
        (lambda comm, r: allgather(comm, np.ones(50), TopK(0.1), out=np.ones((50, 2))), "it must be (2, 50)"),
        (lambda comm, r: allreduce(comm, np.ones(50), TopK(0.1), out=read_only(np.ones(50), r)), "out is read-only"),
        (lambda comm, r: allreduce(comm, np.ones(50), "topk" if r else TopK(0.1)), "topk"),
        (lambda comm, r: (allreduce, allgather)[r](comm, np.ones(50), TopK(0.1)), "disagree on the call"),
        (lambda comm, r: allreduce(comm, np.ones(50), TopK(k=51)), "k=51 exceeds d=50"),
        (lambda comm, r: allreduce(comm, np.full(50, np.nan if r else 1.0), TopK(0.1)), "NaN or Inf on rank 1"),
    ],
)
def test_one_call_forms_raise_on_all_ranks(call, words):
    def program(comm):
        allreduce(comm, np.ones(50, np.float32), TopK(0.1))  # a plan that one of the ranks may find again
        with pytest.raises(MpiEfError) as caught:
            call(comm, comm.Get_rank())
        return str(caught.value)

    assert all(words in text for text in virtual.results(2, program))


def test_long_frames_are_counted_in_larger_units(monkeypatch):
    """What is too long for a C int is sent as whole units; here with a small limit, under MPI with the real one."""
    monkeypatch.setattr(frames_module, "LARGEST_COUNT", 100)
    monkeypatch.setattr(frames_module, "UNIT_NBYTES", 64)
    frames = frames_module.Frames(2, 200)
    assert frames.frame_nbytes == 256
    assert frames.wires.shape == (2, 200)
    buffer, count, unit = frames.message
    assert (buffer is frames._twin.host, count, unit.Get_size()) == (True, 4, 64)


def test_plans_are_kept_by_every_kind_of_communicator_under_its_own_key():
    """One key for all would be foreign to the others; it was that of the first kind."""
    kept = {}

    class Strict(virtual.VirtualComm):
        KEYS: ClassVar = set()

        @classmethod
        def Create_keyval(cls):
            cls.KEYS.add(keyval := super().Create_keyval())
            return keyval

        def Get_attr(self, keyval):
            assert keyval in self.KEYS
            return super().Get_attr(keyval)

    class Other(Strict):
        KEYS: ClassVar = set()

    for kind in (Strict, Other, Strict):
        comm = kind(virtual._World(1), 0)
        x = gaussian(0, 40)
        np.testing.assert_array_equal(allreduce(comm, x, Identity()), x)
        kept[kind] = comm


def test_two_things_are_kept_by_a_communicator_under_keys_of_their_own():
    """Virtual ranks had one key for all."""
    from mpi_ef.comm.attributes import kept_with

    def lists():
        return ["another"]

    comm = virtual.VirtualComm(virtual._World(1), 0)
    assert kept_with(comm, list) is kept_with(comm, list) == []
    assert kept_with(comm, lists) == ["another"]


def test_a_dense_sum_that_overflows_names_nobody():
    """Each of the vectors is finite."""

    def program(comm):
        plan, total = DenseMean(comm, 5), np.zeros(5, np.float32)
        with pytest.raises(NonFiniteError, match="the sum of the ranks' vectors overflows") as caught:
            plan.allreduce(np.full(5, (1 + comm.Get_rank()) * 1e38, np.float32), total, comm.Get_size())
        return caught.value.ranks, plan.allreduce(np.full(5, 1 + comm.Get_rank(), np.float32), total)

    for ranks, _ in virtual.results(3, program):
        assert ranks == ()


def test_a_tensor_that_numpy_does_not_know_is_refused():
    x = torch.ones(50, device="meta")
    for error in virtual.run(2, lambda comm: allreduce(comm, x, TopK(0.1))):
        assert isinstance(error, MpiEfError)
        assert "allreduce: x cannot be seen as a numpy array" in str(error)
        assert "pass a tensor in memory of the CPU or of a GPU" in str(error)


def test_process_groups_that_move_no_memory_of_cpus_are_refused(monkeypatch):
    with pytest.raises(OptionError, match=r"is not initialised; call torch.distributed.init_process_group\('gloo'\)"):
        ProcessGroupComm()
    told = {"is_initialized": True, "get_rank": 0, "get_backend_config": "cuda:nccl"}
    for name, value in told.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    with pytest.raises(OptionError, match="the group's backend is cuda:nccl, which moves no CPU memory"):
        ProcessGroupComm()


@dataclass(frozen=True)
class Middle(Combine):
    """The median of every entry, a way to combine rows that the package does not have."""

    def __call__(self, rows):
        return np.median(rows, axis=0)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("plan", [GatherMean, TwoPhaseMean])
def test_rows_are_combined_as_one_says(n, plan):
    """What a rank has made of one entry does not count where the median does."""

    def program(comm):
        rank, d, out = comm.Get_rank(), 100, np.ones(100)
        rows = [gaussian(r, d, np.float64) for r in range(n)]
        rows[0][5] = 1e9
        middle = plan(comm, TopK(0.3), d, np.float64, combine=Middle())
        whole = middle.dense().exchange(rows[rank])
        whole.set_mean(out)
        np.testing.assert_array_equal(out, np.median(rows, axis=0))
        whole.add_mean(out, -1.0)
        assert not out.any()
        if plan is GatherMean:
            sent = np.zeros((n, d))
            middle.exchange(rows[rank]).set_mean(out, 2.0)
            for r in range(n):
                middle.add_message(r, sent[r])
            np.testing.assert_array_equal(out, 2.0 * np.median(sent, axis=0))
        return out.tobytes()

    assert len(set(virtual.results(n, program))) == 1


def test_ranks_agree_on_how_rows_are_combined():
    def program(comm):
        combine = Middle() if comm.Get_rank() else None
        with pytest.raises(DisagreementError, match="combine"):
            GatherMean(comm, TopK(0.3), 10, combine=combine)

    virtual.results(2, program)


@pytest.mark.parametrize(("plan", "compressor", "says"), [
    (plan_for, TopK(0.01, values=Quantize("bf16")), "| 130x | 55x | 32x |"),
    (GatherMean, TopK(0.01, values=Quantize("bf16")), "(4.1x\non 64 ranks)"),
    (plan_for, Sign(block=1024), "| 31x | 31x | 31x |"),
])
def test_the_readme_says_what_many_ranks_send(plan, compressor, says):
    seen = []
    for n in (2, 16, 64):
        traffic = virtual.results(n, lambda comm: plan(comm, compressor, 812_000).traffic)[0]
        seen.append(traffic.dense_nbytes / traffic.sent_nbytes)
    text = "".join(f" {ratio:.0f}x |" if ratio > 9.95 else f" {ratio:.1f}x |" for ratio in seen)
    assert says == f"|{text}" or f"({seen[-1]:.1f}x" in says
    assert says in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_matrix_is_its_entries():
    def program(comm):
        x = gaussian(comm.Get_rank(), 40, np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy would have none of them made
            matrix = np.matrix(x.reshape(5, 8))
        return allreduce(comm, matrix, TopK(0.2)), allreduce(comm, x.reshape(5, 8), TopK(0.2))

    for of_matrix, wanted in virtual.results(2, program):
        assert type(of_matrix) is np.ndarray
        np.testing.assert_array_equal(of_matrix, wanted)


@pytest.mark.parametrize("plan", [GatherMean, partial(TwoPhaseMean, reply=TopK(0.01))])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_sparse_mean_replaces_the_one_before_entry_by_entry(plan, n):
    """What neither has is not written to, from the second exchange on; bits are those of a mean written whole."""
    def program(comm):
        one, other = (plan(comm, TopK(0.01), d) for _ in range(2))
        out, whole = np.zeros(d, np.float32), np.zeros(d, np.float32)
        for step in range(6):
            x, empty = gaussian(comm.Get_rank(), d, step=step), whole == 0
            if spoilt := step % 2:
                out[empty] = 7.0  # which the caller has promised not to do
            one.exchange(x)
            one.set_mean(out, 0.5, again=True)
            other.exchange(x)
            other.set_mean(whole, 0.5)
            if spoilt:
                untouched = empty & (whole == 0)
                assert untouched.sum() > d / 2
                assert (out[untouched] == 7.0).all()
                one.forget()
                one.set_mean(out, 0.5, again=True)
            assert out.tobytes() == whole.tobytes()

    d = 2000
    virtual.results(n, program)


@pytest.mark.parametrize("plan", [GatherMean, TwoPhaseMean])
def test_a_mean_that_was_rolled_back_is_not_replaced(plan):
    """Messages that nobody has taken are between what was written and the next."""
    d = 500

    def program(comm):
        one, out, whole = plan(comm, TopK(0.02), d), np.zeros(d, np.float32), np.zeros(d, np.float32)
        for step in range(8):
            one.exchange(gaussian(comm.Get_rank(), d, step=step))
            if step % 3 == 1:
                one.undo()
                continue
            one.set_mean(out, again=True)
            one.set_mean(whole)
            assert out.tobytes() == whole.tobytes()

    virtual.results(2, program)
