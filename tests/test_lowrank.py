"""Laws of low-rank compression and of PowerSGD's exchange, on virtual ranks."""

from math import prod

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from programs import loss_of, model, same_bits
from vectors_for_tests import DTYPES, gaussian

from mpi_ef import kernels
from mpi_ef.collectives import (
    ClientsMean,
    DenseMean,
    GatherMean,
    LowRankMean,
    TwoPhaseMean,
    allgather,
    allreduce,
    plan_for,
)
from mpi_ef.compress import Identity, Keep, LowRank, Quantize, TopK, lazy
from mpi_ef.errors import DisagreementError, MpiEfError, NonFiniteError, OptionError, PeerError, ShapeError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.bench.traffic import counted
from mpi_ef.kernels import reference
from mpi_ef.optim import DistributedOptimizer

# A convolution, biases, something empty, a number, a matrix that is not worth it, and one of each orientation.
SHAPES = ((8, 3, 3, 3), (8,), (0, 5), (1, 1), (), (2, 2), (0,), (40, 12), (5, 30), (7,))
D = sum(map(prod, SHAPES))
MATRICES = (0, 7, 8)  # of those shapes, for ranks 1 to 3

each_world = pytest.mark.parametrize("n", [1, 2, 3, 4])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def matrices_of(x, shapes=SHAPES):
    """Return the parts of a vector as matrices, vectors as matrices of one row."""
    bounds = np.cumsum([0, *map(prod, shapes)])
    return [part.reshape((shape[0], prod(shape[1:])) if len(shape) > 1 else (1, -1))
            for part, shape in zip(np.split(x, bounds[1:-1]), shapes, strict=True)]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@st.composite
def factors(draw, dtype):
    """Factors of two matrices, with rows that are zero, equal, tiny, huge or nearly dependent."""
    rank, sizes = draw(st.integers(1, 5)), [draw(st.integers(1, 40)) for _ in range(2)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [rng.normal(size=(rank, size)).astype(dtype) for size in sizes]
    info = np.finfo(dtype)
    for factor in rows:
        for k in range(rank):
            kind = draw(st.sampled_from(["", "", "zero", "tiny", "huge", "same", "near", "whole"]))
            factor[k] *= {"zero": -0.0, "tiny": info.tiny, "huge": info.max / 8}.get(kind, 1)
            if kind in ("same", "near"):
                factor[k] = factor[0] / dtype(3)
                factor[k, 0] += 8 * info.eps * abs(factor[k, 0]) * (kind == "near")
            if kind == "whole":
                factor[k] = np.round(factor[k])
    spans = np.array([[0, sizes[0]], [rank * sizes[0], sizes[1]]])
    return np.concatenate([factor.ravel() for factor in rows]), spans, rank


@each_dtype
def test_orthonormalise(dtype):
    """The bits of the twin; rows orthonormal or zero; the space they span holds what was given."""

    @given(factors(dtype), st.booleans(), st.integers(0, 2**32))
    def check(given, spared, seed):
        rows, spans, rank = given
        spare = np.random.default_rng(seed).normal(size=rows.size * spared).astype(dtype)
        mine, twin = rows.copy(), rows.copy()
        with np.errstate(over="ignore", under="ignore"):
            kernels.orthonormalise(mine, spans, rank, spare)
            reference.orthonormalise(twin, spans, rank, spare)
        assert same(mine, twin)
        eps = float(np.finfo(dtype).eps)
        for start, size in spans:
            result = mine[start : start + rank * size].reshape(rank, size).astype(np.float64)
            lengths = (result**2).sum(axis=1)
            np.testing.assert_allclose(lengths[lengths > 0], 1, atol=8 * eps)
            np.testing.assert_allclose(result @ result.T, np.diag(lengths > 0), atol=32 * eps)
            assert not spared or (lengths > 0).sum() == min(rank, size)
            for row in rows[start : start + rank * size].reshape(rank, size).astype(np.float64):
                direction = row / (np.abs(row).max() or 1)
                lost = direction - result.T @ (result @ direction)
                assert spared or np.abs(lost).max() <= 64 * eps

    check()


def test_dependent_rows_become_zero_or_spare():
    rows = np.array([[3, 4, 0, 0], [6, 8, 0, 0], [0, 0, 0, 0], [3, 4, 0, -2]], np.float32)
    spans = np.array([[0, 4]])
    mine = rows.copy()
    kernels.orthonormalise(mine.reshape(-1), spans, 4, np.empty(0, np.float32))
    np.testing.assert_allclose(mine, [[0.6, 0.8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, -1]], atol=1e-7)
    mine = rows.copy()
    spare = np.array([9, 9, 9, 9, 0, 0, 5, 0, 0, 0, 5, 0, 9, 9, 9, 9], np.float32)
    kernels.orthonormalise(mine.reshape(-1), spans, 4, spare)
    np.testing.assert_allclose(mine, [[0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, -1]], atol=1e-7)


@each_dtype
def test_adding_products(dtype):
    @given(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5), st.integers(1, 6), st.booleans(),
        st.integers(0, 2**32),
    )
    def check(parts, rank, overwrite, seed):
        assert_adds_like_the_twin(np.array(parts, np.int64).reshape(-1, 2), rank, overwrite, seed, dtype)

    check()
    for rank in (1, 2, 3):
        assert_adds_like_the_twin(np.array([[2, 10_000], [3, 0], [700, 3]]), rank, False, rank, dtype)


def assert_adds_like_the_twin(parts, rank, overwrite, seed, dtype):
    rng = np.random.default_rng(seed)
    left = sum(rank * p if q else p for p, q in parts)
    right = sum(rank * q for p, q in parts)
    d = sum(p * (q or 1) for p, q in parts)
    factors = [rng.normal(size=size).astype(dtype) for size in (left, right)]
    mine, twin = (np.linspace(-1, 1, d).astype(dtype) for _ in range(2))
    scratch = np.empty(kernels.COMBINE_SCRATCH, dtype)
    for room, out in ((kernels, mine), (reference, twin)):
        room.add_low_rank(*factors, parts, rank, dtype(1 / 3), overwrite, out, scratch)
    np.testing.assert_array_equal(mine, twin)


def exchange(comm, compressor, vectors, dtype, warm_start=True):
    """Return for every exchange the own message, the mean, what was kept, and P P^T of its matrices, and the state."""
    plan = LowRankMean(comm, compressor, vectors(0, 0).size, dtype, warm_start=warm_start)
    rows = []
    for step in range(4):
        x = vectors(plan.rank, step).astype(dtype)
        own, mean, kept = np.zeros(plan.d, dtype), np.zeros(plan.d, dtype), np.empty(plan.d, dtype)
        p = lazy(x)
        if step % 2:
            plan.exchange(p, keep=Keep(p, into=kept, less_message=True))
        else:
            plan.start(p, keep=Keep(p, into=kept, less_message=True))
            x = x.copy()
            p.terms[0][1].fill(np.nan)
            plan.wait()
        plan.add_own(own)
        plan.add_mean(mean)
        spaces = []
        for start, size in plan._factors.left_spans:
            basis = plan._left.host[start : start + size * compressor.rank].reshape(compressor.rank, size)
            spaces.append(basis.T.astype(np.float64) @ basis)
        rows.append((x, own, mean, kept, spaces))
    return rows, {name: array.copy() for name, array in plan.state().items()}


@each_world
@each_dtype
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("warm_start", [True, False])
def test_the_mean_is_projected_and_replicas_are_equal(n, dtype, rank, warm_start):
    """out = P P^T mean_i M_i and own = P P^T M_i against NumPy; what is no matrix arrives whole; mean of own = mean."""

    def program(comm):
        return exchange(
            comm, LowRank(rank, shapes=SHAPES), lambda r, step: gaussian(r, D, step=step), dtype, warm_start
        )

    results = virtual.results(n, program)
    exact = 2e-5 if dtype == np.float32 else 1e-13
    for step in range(4):
        rows = [rows[step] for rows, _ in results]
        assert all(same(row[2], rows[0][2]) for row in rows)
        xs, owns, means, kept, spaces = zip(*rows, strict=True)
        np.testing.assert_allclose(means[0], np.mean(owns, axis=0), atol=exact)
        mean = np.mean(np.array(xs, np.float64), axis=0)
        for vector, message in ((mean, means[0]), *zip(xs, owns, strict=True)):
            unseen = iter(spaces[0])
            for j, (a, b) in enumerate(zip(matrices_of(vector), matrices_of(message), strict=True)):
                expected = next(unseen) @ a if j in MATRICES else a
                np.testing.assert_allclose(b, expected, atol=exact, err_msg=str(SHAPES[j]))
        for x, own, rest in zip(xs, owns, kept, strict=True):
            np.testing.assert_array_equal(rest, x - own)
    assert all(same_bits(state, results[0][1]) for _, state in results)
    assert len(results[0][1]) == warm_start


@each_world
def test_a_rank_as_large_as_the_matrix_loses_nothing(n):
    """Nothing would be gained by factors there: those travel whole, and the mean is the dense one, bit for bit."""
    shapes = ((4, 9), (9, 4), (5,), (3, 3))

    def program(comm):
        plan, dense = LowRankMean(comm, LowRank(4, shapes=shapes), 86), DenseMean(comm, 86)
        x = gaussian(comm.Get_rank(), 86)
        mean, own = np.zeros(86, np.float32), np.zeros(86, np.float32)
        plan.exchange(x).add_mean(mean)
        plan.add_own(own)
        np.testing.assert_array_equal(own, x)
        np.testing.assert_array_equal(mean, dense.exchange(x).mean)
        assert plan.alpha == 1
        assert not plan.state()["Q"].size

    virtual.results(n, program)


@each_world
def test_what_has_a_low_rank_is_sent_exactly(n):
    """A sum of r products, the same or not on the ranks; also of less than that."""

    def vectors(rank, step):
        u, v = (
            gaussian(7, 2 * 30, np.float64).reshape(30, 2),
            gaussian(rank, 2 * 20, np.float64, step=step).reshape(2, 20),
        )
        if step == 2:
            v[1] = v[0]
        return (u @ v).ravel()

    def program(comm):
        return exchange(comm, LowRank(2, shapes=((30, 20),)), vectors, np.float64)[0]

    for step in range(4):
        mean = np.mean([vectors(rank, step) for rank in range(n)], axis=0)
        for rank, rows in enumerate(virtual.results(n, program)):
            np.testing.assert_allclose(rows[step][2], mean, atol=1e-12)
            np.testing.assert_allclose(rows[step][1], vectors(rank, step), atol=1e-12)


@each_world
@each_dtype
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_repeated_exchanges_of_a_matrix_find_its_best_approximation(n, dtype, scale):
    """Subspace iteration, whatever the scale: a Q that keeps its length would over- or underflow in single precision."""
    shape, rank = (40, 30), 2
    u, v = (np.linalg.qr(gaussian(k, size * size, np.float64).reshape(size, size))[0] for k, size in enumerate(shape))
    values = 0.5 ** np.arange(30)
    whole = scale * (u[:, :30] * values) @ v.T
    best = scale * (u[:, :rank] * values[:rank]) @ v[:, :rank].T
    noise = scale * gaussian(9, n * 1200, np.float64).reshape(n, *shape)
    parts = whole + noise - noise.mean(axis=0)

    def program(comm):
        plan = LowRankMean(comm, LowRank(rank, shapes=(shape,)), 1200, dtype)
        errors = []
        for _ in range(30):
            out = np.zeros(1200, dtype)
            plan.exchange(parts[plan.rank].astype(dtype).ravel()).set_mean(out)
            errors.append(float(np.linalg.norm(out.astype(np.float64) / scale - best.ravel() / scale)))
        return errors

    errors = virtual.results(n, program)[0]
    assert errors[0] > 0.03
    assert errors[-1] < (1e-5 if dtype == np.float32 else 1e-12)


@each_world
def test_zero_matrices_send_zero_and_are_seen_when_they_change(n):
    """No NaN from nothing; and a parameter that was unused at first must not stay silent for ever."""
    shapes = ((6, 9), (9, 7), (3,))
    d = 54 + 63 + 3

    def program(comm):
        plan, out = LowRankMean(comm, LowRank(2, shapes=shapes), d, np.float64), np.ones(d)
        for _ in range(3):
            plan.exchange(np.zeros(d)).set_mean(out)
            assert not out.any()
        x = np.outer(gaussian(comm.Get_rank(), 6, np.float64), gaussian(8, 9, np.float64)).ravel()
        plan.exchange(np.concatenate([x, np.zeros(66)])).set_mean(out)
        expected = np.mean([gaussian(rank, 6, np.float64) for rank in range(n)], axis=0)
        np.testing.assert_allclose(out[:54].reshape(6, 9), np.outer(expected, gaussian(8, 9, np.float64)), atol=1e-13)
        assert not out[54:].any()
        fresh = gaussian(comm.Get_rank(), d, np.float64)
        plan.exchange(fresh).set_mean(out)
        assert all(np.linalg.matrix_rank(part) == 2 for part in matrices_of(out, shapes)[:2])

    virtual.results(n, program)


def test_a_matrix_that_cancels_on_average():
    """M and -M: the mean is zero, nobody's message is of use, nothing breaks, and error feedback keeps it all."""

    def program(comm):
        feedback = ErrorFeedback("ef14", LowRankMean(comm, LowRank(2, shapes=((8, 8),)), 64, np.float64))
        x = gaussian(3, 64, np.float64) * (1 - 2 * comm.Get_rank())
        assert not feedback.step(x).any()
        np.testing.assert_array_equal(feedback.state.e_i, x)

    virtual.results(2, program)


@each_world
def test_ef14_sends_everything_sooner_or_later(n):
    """Law 5 for convolutions, matrices and biases; errors of what travels whole are zero."""
    steps = 6

    def program(comm):
        feedback = ErrorFeedback("ef14", LowRankMean(comm, LowRank(2, shapes=SHAPES), D, np.float64))
        rank = comm.Get_rank()
        return [feedback.step(gaussian(rank, D, np.float64, step=t)).copy() for t in range(steps)], feedback.state.e_i

    rows = virtual.results(n, program)
    wanted = sum(gaussian(r, D, np.float64, step=t) for r in range(n) for t in range(steps)) / n
    np.testing.assert_allclose(sum(rows[0][0]) + np.mean([e for _, e in rows], axis=0), wanted, atol=1e-12)
    for j, part in enumerate(matrices_of(rows[-1][1])):
        assert (np.abs(part).max(initial=0) > 0.1) == (j in MATRICES)


def test_a_constant_gradient_is_delivered_in_full():
    """What EF14 with warm start sends of a constant matrix of full rank is, on average over time, all of it."""

    def program(comm):
        feedback = ErrorFeedback("ef14", LowRankMean(comm, LowRank(1, shapes=((12, 10),)), 120, np.float64))
        x = gaussian(comm.Get_rank(), 120, np.float64)
        total = sum(feedback.step(x) for _ in range(2000)) / 2000
        return np.linalg.norm(total - np.mean([gaussian(r, 120, np.float64) for r in range(3)], axis=0))

    assert max(virtual.results(3, program)) < 0.05


@pytest.mark.parametrize("split", [False, True])
def test_a_nan_on_one_rank_stops_all_and_changes_nothing(split):
    def program(comm):
        plan = LowRankMean(comm, LowRank(2, shapes=SHAPES), D)
        rank = comm.Get_rank()
        plan.exchange(gaussian(rank, D))
        before = plan.state()["Q"].copy()
        x = gaussian(rank, D, step=1)
        if rank == 2:
            x[D - 100] = np.nan
        if split:
            plan.start(x)
        with pytest.raises(NonFiniteError) as caught:
            plan.wait() if split else plan.exchange(x)
        assert caught.value.ranks == (2,)
        np.testing.assert_array_equal(plan.state()["Q"], before)
        out = np.zeros(D, np.float32)
        plan.exchange(gaussian(rank, D, step=1)).set_mean(out)
        return str(caught.value), out.tobytes()

    assert len(set(virtual.results(3, program))) == 1


@pytest.mark.parametrize("which", ["P", "Q"])
def test_products_that_overflow_stop_all_and_change_nothing(which):
    """Finite numbers on all ranks, whose sums are not."""

    def program(comm):
        plan = LowRankMean(comm, LowRank(1, shapes=((40, 40),)), 1600)
        largest = np.finfo(np.float32).max
        plan.exchange(np.outer(gaussian(1, 40), np.ones(40)).astype(np.float32).ravel())
        before = plan.state()["Q"].copy()  # 40 equal numbers
        x = np.zeros((40, 40), np.float32)
        if which == "P":
            x[:] = largest / 4
        else:
            x[:, ::2], x[:, 1::2] = largest / 2, -largest / 2
            x[:, 0] *= 1.01
        if comm.Get_rank() == 0:
            with pytest.raises(NonFiniteError, match="overflows"):
                plan.exchange(x.ravel())
        else:
            with pytest.raises(NonFiniteError):
                plan.exchange(np.zeros(1600, np.float32) if which == "P" else x.ravel())
        np.testing.assert_array_equal(plan.state()["Q"], before)

    virtual.results(2, program)


def test_save_load_step_is_step():
    def program(comm):
        rank, build = comm.Get_rank(), lambda: LowRankMean(comm, LowRank(2, shapes=SHAPES), D)
        one, two, other = (ErrorFeedback("ef14", build(), dense_steps=1) for _ in range(3))
        for step in range(4):
            one.step(gaussian(rank, D, step=step))
        saved = one.state_dict()
        two.load_state_dict(saved)
        del saved["arrays"]["plan.Q"]
        with pytest.raises(ShapeError, match=r"plan\.Q is missing"):
            other.load_state_dict(saved)
        for step in range(4, 7):
            assert same(one.step(gaussian(rank, D, step=step)), two.step(gaussian(rank, D, step=step)))
        assert same_bits(one.state_dict(), two.state_dict())

    virtual.results(3, program)


def test_without_a_warm_start_exchanges_depend_on_their_number_alone():
    def program(comm):
        a, b = (LowRankMean(comm, LowRank(2), 900, warm_start=False) for _ in range(2))
        x, outs = gaussian(comm.Get_rank(), 900), np.zeros((3, 900), np.float32)
        a.exchange(gaussian(8, 900)).exchange(x).set_mean(outs[0])
        b.exchange(x).set_mean(outs[1])
        b.exchange(x).set_mean(outs[2])
        return outs

    for first, second, third in virtual.results(2, program):
        assert same(first, third)
        assert (second != third).any()


@each_world
def test_plan_for_takes_it_and_relatives_are_of_the_right_kind(n):
    def program(comm):
        compressor = LowRank(2, shapes=((100, 80), (100,)))
        plan = plan_for(comm, compressor, 8100)
        assert isinstance(plan, LowRankMean)
        assert isinstance(plan.dense(), DenseMean)
        assert isinstance(plan.companion(TopK(0.1)), GatherMean)
        assert isinstance(plan.companion(LowRank(1)), LowRankMean)
        assert not plan_for(comm, compressor, 8100, residual=False).state()
        chunks = -(-(2 * 100 + 100) // n), -(-(2 * 80) // n)
        assert plan.traffic.sent_nbytes == (n - 1) * (8 + 2 * 4 * sum(chunks))
        assert plan.traffic.dense_nbytes == 2 * 4 * 8100 * (n - 1) // n
        plan.exchange(gaussian(comm.Get_rank(), 8100))
        assert plan.sent_nbytes == plan.traffic.sent_nbytes
        assert compressor.wire_nbytes(8100) == 4 * (2 * 180 + 100)
        assert all(spent > 0 for spent in plan.seconds.values())

    virtual.results(n, program, ranks_per_node=n)


def test_one_call_forms():
    """A stateless mean, and everybody's own approximation."""
    x = [np.outer(gaussian(r, 9, np.float64), gaussian(5, 8, np.float64)) for r in range(3)]

    def program(comm):
        mine, compressor = x[comm.Get_rank()], LowRank(2, shapes=((9, 8),))
        np.testing.assert_allclose(allreduce(comm, mine, compressor, op="sum"), sum(x), atol=1e-13)
        np.testing.assert_allclose(allgather(comm, mine, compressor), x, atol=1e-13)

    virtual.results(3, program)


@each_dtype
@pytest.mark.parametrize("compressor", [LowRank(1), LowRank(3), LowRank(2, shapes=SHAPES, seed=4)], ids=str)
def test_a_rank_that_is_alone(compressor, dtype):
    """The codec: never increases the error, repeats itself, is exact where factors are, and adds in row order."""
    for d in (D,) if compressor.shapes else (0, 1, 2, 3, 8, 101, 900):
        codec = compressor.codec(d, dtype)
        wires = np.full((3, codec.nbytes), 0xA5, np.uint8)
        for step, wire in enumerate(wires):
            x = gaussian(1, d, dtype, step=step) * dtype(10.0) ** (20 * (step - 1))
            assert codec.encode(x, wire, step=step)
            error = codec.decode(wire) - x
            norm = np.abs(x).max(initial=1e-30)
            assert ((error / norm) ** 2).sum() <= (1 + 1e-5) * ((x / norm) ** 2).sum()
            again = np.full(codec.nbytes, 0x5A, np.uint8)
            codec.encode(x, again, step=step)
            assert same(again, wire)
        assert codec.nbytes == compressor.wire_nbytes(d, dtype)
        together, one_by_one = gaussian(9, d, dtype), gaussian(9, d, dtype)
        codec.add(wires, together, 0.3)
        for row in wires:
            codec.add(row[None], one_by_one, 0.3)
        assert same(together, one_by_one)


def test_the_wire_is_the_documented_one():
    """Law 9, from the receiving side: what is sent comes out of matrix products, whose last bits are the processor's."""
    codec = LowRank(1, shapes=((2,), (3, 4), (), (4, 3))).codec(27)
    left = [7, 8, *(1, 2, 3), 9, *(1, 0, 0, -1)]
    right = [*(1, 10, 100, 1000), *(4, 5, 6)]
    wire = np.array([*left, *right, 0], np.float32).view(np.uint8)
    assert codec.nbytes == wire.size == 72
    assert codec.decode(wire).tolist() == [
        *(7, 8), *(1, 10, 100, 1000, 2, 20, 200, 2000, 3, 30, 300, 3000), 9, *(4, 5, 6, 0, 0, 0, 0, 0, 0, -4, -5, -6),
    ]
    assert codec.encode(codec.decode(wire), wire)
    assert wire[:8].view(np.float32).tolist() == [7, 8]
    assert wire[20:24].view(np.float32) == 9
    assert not wire[-4:].any()


def test_memory_is_counted():
    """By the names of the kernels' arguments: two passes over the vector for adding, one for overwriting."""

    def program(comm):
        plan, out = LowRankMean(comm, LowRank(2), 10_000), np.zeros(10_000, np.float32)
        plan.exchange(gaussian(0, 10_000))
        factors = 2 * 4 * (100 + 100) + 16
        with counted() as touched:
            plan.add_mean(out)
        assert touched == {"add_low_rank": 8 * 10_000 + factors}
        with counted() as touched:
            plan.set_mean(out)
        assert touched == {"add_low_rank": 4 * 10_000 + factors}

    virtual.results(1, program)


def test_alone_it_contracts_in_expectation():
    compressor, x = LowRank(2, shapes=((20, 10),)), gaussian(0, 200, np.float64)
    assert compressor.alpha(200) == 0.2
    codec = compressor.codec(200, np.float64)
    wire, errors = np.empty(codec.nbytes, np.uint8), []
    for step in range(400):
        codec.encode(x, wire, step=step)
        errors.append(((codec.decode(wire) - x) ** 2).sum() / (x**2).sum())
    assert np.mean(errors) < 0.8
    assert LowRank(2, shapes=((3, 2), (5,))).alpha(11) == 1
    assert LowRank(1, shapes=((3, 4), (50, 60))).alpha(3012) == pytest.approx(0.02)


def test_other_plans_take_it_where_that_makes_sense():
    def program(comm):
        d, rank = 900, comm.Get_rank()
        for plan in (GatherMean(comm, LowRank(2, shapes=((30, 30),)), d), TwoPhaseMean(comm, LowRank(2), d),
                     ClientsMean(comm, LowRank(2), d, clients=4)):
            feedback = ErrorFeedback("ef21", plan)
            x = np.concatenate([gaussian(rank + k, d) for k in range(plan.own)])
            for _ in range(150):
                feedback.step(x)
            assert np.linalg.norm(feedback.state.g_i - x) < 0.01 * np.linalg.norm(x)
        with pytest.raises(ShapeError, match="the shapes have 900 entries together, the vector has 450") as caught:
            TwoPhaseMean(comm, LowRank(2, shapes=((30, 30),)), d)
        assert "\n" not in str(caught.value)

    virtual.results(2, program)


def test_econtrol_wants_its_eta():
    """One exchange promises a rank nothing for its own matrix."""

    def program(comm):
        plan = LowRankMean(comm, LowRank(2), 900, np.float64)
        assert plan.alpha == 0
        with pytest.raises(OptionError, match=r"constant 0\.0e\+00 .* pass one, for example eta=0\.1"):
            ErrorFeedback("econtrol", plan)
        feedback = ErrorFeedback("econtrol", plan, eta=0.1)
        for step in range(5):
            feedback.step(gaussian(comm.Get_rank(), 900, np.float64, step=step))

    virtual.results(2, program)


def test_steps_allocate_nothing_of_the_size_of_the_vector():
    import tracemalloc

    from test_costs import OwnComm

    d = 100_000
    feedback = {rule: ErrorFeedback(rule, LowRankMean(OwnComm(), LowRank(2), d), **options)
                for rule, options in (("ef14", {}), ("ef21", {}), ("econtrol", {"eta": 0.1}))}
    vectors = [gaussian(0, d, step=t) for t in range(4)]

    def steps():
        for x in vectors * 3:
            for one in feedback.values():
                one.step(x)

    steps()
    tracemalloc.start()
    try:
        steps()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        steps()
        assert tracemalloc.get_traced_memory()[1] - before < 20_000  # a vector has 400 kB
    finally:
        tracemalloc.stop()


def test_powersgd_trains():
    """The optimizer of the paper; replicas equal, and as good as uncompressed momentum SGD on this problem."""

    def program(comm):
        rank, net = comm.Get_rank(), model()
        shapes = tuple(tuple(p.shape) for p in net.parameters() if p.requires_grad)
        sgd = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        compressor = LowRank(1, shapes=shapes)
        optimizer = DistributedOptimizer(sgd, comm, compressor, placement="gradient", rule="ef14")
        losses = []
        for step in range(150):
            optimizer.zero_grad()
            loss = loss_of(net, rank, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [p.detach().numpy().copy() for p in net.parameters()], losses

    rows = virtual.results(2, program)
    assert same_bits(rows[0][0], rows[1][0])
    assert all(np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3]) for _, losses in rows)


def test_ranks_that_disagree_all_learn_about_it():
    def caught(build):
        def program(comm):
            with pytest.raises(MpiEfError) as error:
                build(comm, comm.Get_rank())
            assert "\n" not in str(error.value)
            return type(error.value), str(error.value)

        return virtual.results(3, program)

    for build, words in (
        (lambda comm, r: LowRankMean(comm, LowRank(1 + r // 2), 900), "disagree on compressor"),
        (lambda comm, r: LowRankMean(comm, LowRank(seed=r // 2), 900), "seed=1) on rank 2"),
        (lambda comm, r: LowRankMean(comm, LowRank(), 900, warm_start=r < 2), "disagree on warm_start"),
        (lambda comm, r: LowRankMean(comm, LowRank(), 900 + r), "disagree on d"),
    ):
        assert all(kind is DisagreementError and words in text for kind, text in caught(build))
    errors = caught(lambda comm, r: LowRankMean(comm, LowRank(shapes=((30, 30),)), 900 + r // 2))
    assert [kind for kind, _ in errors] == [PeerError, PeerError, ShapeError]
    for compressor in (TopK(0.1), Identity(), Quantize()):
        errors = caught(lambda comm, r, compressor=compressor: LowRankMean(comm, compressor, 900))
        assert all("has no factors; take LowRank" in text for _, text in errors)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: LowRank(0), OptionError, "rank=0 is not a positive integer"),
        (lambda: LowRank(1.5), OptionError, "rank=1.5 is not a positive integer"),
        (lambda: LowRank(seed=-1), OptionError, "seed=-1 is negative"),
        (lambda: LowRank(seed=None), OptionError, "seed=None is not a non-negative integer"),
        (lambda: LowRank(shapes="tensors"), OptionError, "shapes='tensors'; pass the shapes of the parts"),
        (lambda: LowRank(shapes=(3, 4)), OptionError, "shapes=(3, 4); pass the shapes of the parts"),
        (lambda: LowRank(shapes=((3, -4),)), OptionError, "shapes=((3, -4),)"),
        (lambda: LowRank(shapes=((3, 4.5),)), OptionError, "shapes=((3, 4.5),)"),
        (lambda: LowRank(shapes=7), OptionError, "shapes=7"),
        (lambda: LowRank(shapes=((3, 4), (5,))).codec(18), ShapeError, "17 entries together, the vector has 18"),
        (lambda: LowRank(shapes="parameters").codec(8), OptionError, "means something to optimizers only"),
    ],
)
def test_wrong_options_are_refused_with_their_value(build, error, words):
    with pytest.raises(error) as caught:
        build()
    assert words in str(caught.value)
    assert str(caught.value).startswith("LowRank: ")
    assert "\n" not in str(caught.value)


def test_shapes_may_be_lists_and_come_from_torch():
    wanted = LowRank(2, shapes=((4, 5), (5,)))
    assert LowRank(2, shapes=[[4, 5], [np.int64(5)]]) == wanted
    assert LowRank(2, shapes=[p.shape for p in (torch.ones(4, 5), torch.ones(5))]) == wanted
    assert hash(LowRank(2, shapes=[[4, 5], [5]])) == hash(wanted)
    assert str(wanted) == "LowRank(rank=2, shapes=((4, 5), (5,)), seed=0)"
    assert str(LowRank()) == "LowRank(rank=2, seed=0)"
