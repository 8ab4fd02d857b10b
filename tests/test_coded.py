"""Gradient codes, and coded gradients on virtual ranks of which some sleep, stop, or compute wrongly."""

from itertools import combinations, islice

import numpy as np
import pytest
import virtual
from hypothesis import given
from hypothesis import strategies as st

from mpi_ef.coded import Blocks, CodedGradients, Cyclic, FractionalRepetition, code_of, serve
from mpi_ef.coded.codes import mask_of, members
from mpi_ef.compress import Identity, RandK, Sign, TopK
from mpi_ef.errors import (
    DisagreementError,
    MpiEfError,
    NonFiniteError,
    OptionError,
    PeerError,
    ShapeError,
    SilenceError,
)
from mpi_ef.testing.law import same_bits

both = pytest.mark.parametrize("eager", [True, False], ids=["eager", "rendezvous"])  # what MPI libraries make of a send
CODES = [(FractionalRepetition(0), 3), (FractionalRepetition(1), 4), (FractionalRepetition(2), 6),
         (FractionalRepetition(2), 3), (Cyclic(0), 4), (Cyclic(1), 4), (Cyclic(2), 5), (Cyclic(3), 6),
         (Cyclic(4), 7), (Blocks(3), 10)]
codes = pytest.mark.parametrize(("code", "n"), CODES, ids=str)
D = 7


# ------------------------------------------------------------------ codes


def test_golden_values_of_cyclic_codes():
    near = {"rtol": 0, "atol": 1e-10}
    np.testing.assert_allclose(Cyclic(1).row(0, 6), [0.5, 0.5], **near)
    np.testing.assert_allclose(Cyclic(1).decode(0b111110, 6), [0, 2, 0, 2, 0, 2], **near)
    np.testing.assert_allclose(Cyclic(2).row(3, 5), [0.27639320225, 0.4472135955, 0.27639320225], **near)
    np.testing.assert_allclose(Cyclic(2).decode(0b11100, 5), [0, 0, 3.6180339887, -2.2360679775, 3.6180339887], **near)
    np.testing.assert_allclose(Cyclic(3).row(0, 6), np.array([1, 2, 2, 1]) / 6, **near)
    np.testing.assert_allclose(Cyclic(3).decode(0b111000, 6), [0, 0, 0, 6, -6, 6], **near)
    np.testing.assert_allclose(Cyclic(3).row(9, 10)[:2], [0.138196601125, 0.361803398875], **near)
    assert same_bits(Cyclic(3).row(9, 10), Cyclic(3).row(0, 10))
    np.testing.assert_allclose(Cyclic(3).decode(0b1111111000, 10), [
        0, 0, 0, 7.2360679775, -11.7082039325, 18.94427191, -18.94427191, 18.94427191, -11.7082039325, 7.2360679775], **near)


@pytest.mark.parametrize(("n", "s", "most"), [(6, 1, 2.01), (5, 2, 3.62), (6, 3, 6.01), (9, 2, 6.42), (10, 3, 18.95),
                                              (12, 3, 29.9), (16, 5, 414), (15, 4, 139.2)])
def test_every_set_of_workers_that_is_large_enough_decodes(n, s, most):
    code = Cyclic(s)
    b = code.matrix(n)
    for gone in islice(combinations(range(n), s), 4000):
        a = code.decode(mask_of(set(range(n)) - set(gone)), n)
        assert not a[list(gone)].any()
        assert np.abs(a @ b - 1).max() <= 1e-12
    assert code.amplification(n) <= most
    assert np.abs(b.sum(axis=1) - 1).max() <= 1e-12


@pytest.mark.parametrize(("n", "s"), [(4, 1), (6, 2), (12, 3), (3, 2), (8, 0), (64, 1)])
def test_repetition_needs_one_of_each_group(n, s):
    code = FractionalRepetition(s)
    b, q = code.matrix(n), n // (s + 1)
    assert (b.sum(axis=0) == s + 1).all()
    rng = np.random.default_rng(n)
    for _ in range(200):
        there = [i for i in range(n) if rng.random() < 0.8]
        enough = {i % q for i in there} == set(range(q))
        assert code.decodable(mask_of(there), n) == enough
        if enough:
            a = code.decode(mask_of(there), n)
            assert (a @ b == 1).all()
            assert set(np.flatnonzero(a)) <= set(there)
        else:
            with pytest.raises(OptionError, match=f"of {n} are not enough: {n - s} always are"):
                code.decode(mask_of(there), n)


def test_rounding_grows_less_than_with_random_coefficients():
    """Acceptance 4: at (10, 3) at most 1/20 of the median of random codes (Tandon et al.'s construction)."""
    def random_code(seed, n=10, s=3):
        h = np.random.default_rng(seed).standard_normal((s, n))
        h[:, -1] = -h[:, :-1].sum(axis=1)
        b = np.zeros((n, n))
        for i in range(n):
            columns = [(i + k) % n for k in range(s + 1)]
            b[i, i] = 1
            b[i, columns[1:]] = -np.linalg.solve(h[:, columns[1:]], h[:, columns[0]])
        return max(np.abs(np.linalg.lstsq(np.delete(b, gone, 0).T, np.ones(n), rcond=None)[0]).max()
                   for gone in combinations(range(n), s))

    assert 20 * Cyclic(3).amplification(10) <= np.median([random_code(seed) for seed in range(8)])


def test_members_are_what_a_mask_was_made_of():
    assert members(mask_of([0, 3, 70])) == [0, 3, 70]


@pytest.mark.parametrize(("text", "code"), [("fr:1", FractionalRepetition(1)), (" FR : 2 ", FractionalRepetition(2)),
                                            ("cyclic:3", Cyclic(3)), ("Cyclic(3)", Cyclic(3)), ("blocks:4", Blocks(4)),
                                            ("FractionalRepetition(2, votes=2)", FractionalRepetition(2, 2))])
def test_codes_are_texts(text, code):
    assert code_of(text) == code == code_of(code) == code_of(str(code))


@pytest.mark.parametrize(("what", "line"), [
    (lambda: FractionalRepetition(2).check(8), r"s=2 with 8 workers; 3 does not divide 8; take s=1, s=3, or Cyclic\(3\)"),
    (lambda: FractionalRepetition(8).check(8), "s=8 of 8 workers cannot all be missing; take s=7 or less"),
    (lambda: Cyclic(2).check(6), r"where n - s is even, n=6 workers and s=2; take s=1 or s=3, or FractionalRepetition\(2\)"),
    (lambda: Cyclic(1).check(1), "s=1 of 1 worker cannot all be missing; take s=0 or less"),
    (lambda: Cyclic(-1), "s=-1"), (lambda: FractionalRepetition(1.5), "s=1.5"),
    (lambda: FractionalRepetition(1, 3), "votes=3"), (lambda: code_of("mds:1"), "'mds:1' is not known; take fr:1"),
])
def test_a_code_that_there_is_not_is_refused(what, line):
    with pytest.raises(OptionError, match=line):
        what()


# ------------------------------------------------------------------ on ranks


def part_gradient(x, part, t, dtype):
    rng = np.random.default_rng((part, t))
    return (rng.standard_normal(D) + np.cos(x.astype(np.float64) * (part + 1))).astype(dtype)


def coded_sum(order, dtype=np.float64, gradient=part_gradient):
    total = np.zeros(D, dtype)
    for part, weight in zip(order.parts, order.weights, strict=True):
        total += dtype(weight) * gradient(order.x, part, order.step, dtype)
    return total


def train(code, steps, compressor=None, *, dtype=np.float64, pauses=lambda rank, t: 0.0, lr=0.05, finish=lambda coded: None,
          **options):
    """Return a program for virtual ranks; rank 0 returns x after each step."""
    def program(comm):
        rank = comm.Get_rank()
        coded = CodedGradients(comm, D, dtype, code, compressor, extras=1, order_extras=1, **options)
        xs = []
        with coded:
            if coded.is_server:
                x = np.zeros(D, dtype)
                for t in range(steps):
                    order = coded.begin(x, [t / 2])
                    if order is not None:
                        comm.pause(pauses(rank, t))
                        coded.answer(coded_sum(order, dtype), [order.weights.sum()])
                    decoded = coded.end()
                    assert decoded.step == t
                    np.testing.assert_allclose(decoded.extras, coded.n, rtol=1e-12)
                    x = x - dtype(lr) * decoded.vector
                    xs.append(x)
                assert coded.close(x) == ()
                return np.array(xs), coded.metrics, finish(coded)
            computed = []
            for order in coded.orders():
                assert order.extras[0] == order.step / 2
                computed.append(order.step)
                comm.pause(pauses(rank, order.step))
                coded.answer(coded_sum(order, dtype), [order.weights.sum()])
            return computed, coded.last, finish(coded)
    return program


def plain(code, n, steps, dtype=np.float64, lr=0.05):
    """The same by one process; sums in the order of a code with groups."""
    x, xs = np.zeros(D, dtype), []
    for t in range(steps):
        total = np.zeros(D, dtype)
        size = code.s + 1 if isinstance(code, FractionalRepetition) else 1
        for first in range(0, n, size):
            block = np.zeros(D, dtype)
            for part in range(first, first + size):
                block += part_gradient(x, part, t, dtype)
            total += block
        x = x - dtype(lr) * total
        xs.append(x)
    return np.array(xs)


def sleeper(seed, n, most, share=0.4):
    """Seconds that each rank sleeps in each step; workers sleep long, at most `most` at a time, the server never."""
    def pauses(rank, t):
        rng = np.random.default_rng((seed, t))
        asleep = rng.permutation(np.arange(1, n))[:most]
        return float(rng.choice([0.05, 0.4])) if rank in asleep and rng.random() < share else 0.001
    return pauses


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@codes
def test_steps_are_those_of_one_process_whoever_sleeps(code, n, dtype, eager):
    result, *workers = virtual.results(n, train(code, 12, dtype=dtype, pauses=sleeper(1, n, code.s)), eager=eager)
    expected = plain(code, n, 12, dtype)
    if isinstance(code, FractionalRepetition):
        assert same_bits(result[0], expected)
    else:
        np.testing.assert_allclose(result[0], expected, rtol=2e-4 if dtype == np.float32 else 1e-11)
    for computed, last, _ in workers:
        assert same_bits(last[0], result[0][-1])
        assert computed == sorted(set(computed))


@pytest.mark.parametrize("sleepers", [(1,), (1, 2), (1, 5), (2,), (4, 5)])
def test_three_groups_are_added_in_their_order_whichever_twin_answered(sleepers):
    """Answers were added by rank: of (a, c, b) where rank 1 slept, the sum was of other bits than of (a, b, c)."""
    pauses = lambda rank, t: 0.2 if rank in sleepers else 0.001  # noqa: E731
    result = virtual.results(6, train(FractionalRepetition(1), 9, pauses=pauses, lr=1.0), virtual=True)[0]
    assert result[1]["late"]
    assert same_bits(result[0], plain(FractionalRepetition(1), 6, 9, lr=1.0))


@given(st.integers(0, 2**32), st.sampled_from([0, 1, 3, 5]))
def test_law_any_pattern_of_sleepers_gives_the_same_bits(seed, which):
    """More than s may sleep: the server waits for as many as it needs."""
    code, n = CODES[which]
    result = virtual.results(n, train(code, 5, pauses=sleeper(seed, n, n - 1, 0.8)), virtual=True)[0]
    expected = plain(code, n, 5)
    np.testing.assert_allclose(result[0], expected, rtol=1e-11)
    assert not isinstance(code, FractionalRepetition) or same_bits(result[0], expected)


@both
def test_a_worker_that_wakes_gets_the_newest_order_and_no_old_ones(eager):
    """Rank 2 sleeps for 20 of 40 steps."""
    pauses = lambda rank, t: (0.2 if t == 5 else 0.01) if rank == 2 else 0.01  # noqa: E731
    result, *workers = virtual.results(4, train(FractionalRepetition(1), 40, pauses=pauses), eager=eager)
    computed = workers[1][0]
    assert computed[:6] == [0, 1, 2, 3, 4, 5]
    assert 20 <= computed[6] <= 26
    assert computed == sorted(set(computed))
    assert result[1]["late"] >= 1
    assert same_bits(result[0], plain(FractionalRepetition(1), 4, 40))


@both
@pytest.mark.parametrize("compressor", [TopK(k=2), RandK(k=3), Sign(), TopK(k=7)], ids=str)
@pytest.mark.parametrize(("code", "n"), [CODES[1], CODES[6], CODES[0]], ids=str)
def test_law_what_the_server_knows_of_a_worker_is_what_the_worker_has_told(code, n, compressor, eager):
    """Also after late answers, which are differences; and the sum is that of the rows of those heard."""
    finish = lambda coded: coded.rows.copy() if coded.is_server else coded.h.copy()  # noqa: E731
    program = train(code, 25, compressor, pauses=sleeper(3, n, code.s), finish=finish)
    result, *workers = virtual.results(n, program, eager=eager)
    assert result[1]["late"] > 0 or not code.s
    for i, (_, _, h) in enumerate(workers, 1):
        assert same_bits(result[2][i], h)


def test_without_stragglers_it_is_ef21_with_a_server():
    """s = 0, by hand: h_i += C(g_i - h_i), and the sum over rows."""
    n, compressor = 3, TopK(k=2)
    result = virtual.results(n, train(FractionalRepetition(0), 10, compressor), virtual=True)[0]
    codec, x = compressor.codec(D, np.float64), np.zeros(D)
    h, wire = [None] * n, np.zeros(codec.nbytes, np.uint8)
    for t in range(10):
        for i in range(n):
            g = part_gradient(x, i, t, np.float64)
            if h[i] is None:
                h[i] = g
            else:
                codec.encode(g - h[i], wire)
                codec.add(wire[None], h[i])
        total = np.zeros(D)
        for row in h:
            total += row
        x = x - 0.05 * total
        assert same_bits(result[0][t], x)


@codes
def test_law_the_identity_is_no_compressor(code, n):
    pauses = sleeper(5, n, code.s)
    first, second = (virtual.results(n, train(code, 8, c, pauses=pauses), virtual=True)[0] for c in (None, Identity()))
    assert same_bits(first[0], second[0])


def test_a_dedicated_server_computes_nothing():
    result, *workers = virtual.results(5, train(FractionalRepetition(1), 6, dedicated=True, pauses=sleeper(2, 5, 1)))
    assert same_bits(result[0], plain(FractionalRepetition(1), 4, 6))
    assert all(computed for computed, *_ in workers)


def test_the_server_may_be_any_rank():
    results = virtual.results(4, train(FractionalRepetition(1), 6, server=2))
    assert same_bits(results[2][0], plain(FractionalRepetition(1), 4, 6))


@both
@pytest.mark.parametrize("code", [kind(s) for s in (1, 0) for kind in (FractionalRepetition, Cyclic)], ids=str)
def test_too_many_silent_ranks_are_named(code, eager, capsys):
    def program(comm):
        coded = CodedGradients(comm, D, np.float64, code, patience_seconds=0.5)
        if comm.Get_rank() in (1, 3):
            return comm.pause(1000)
        if coded.is_server:
            coded.answer(coded_sum(coded.begin(np.zeros(D))))
            with pytest.raises(SilenceError, match="rank 1 on node 1, rank 3 on node 3 silent for 0.5 s, at") as caught:
                coded.end()
            assert caught.value.ranks == (1, 3)
            with pytest.raises(SilenceError):  # again, and no harm is done
                coded.end()
            coded.decider.server.patience_seconds = 0.1
            assert coded.close() == (1, 3)
            return str(caught.value)
        for order in coded.orders():
            coded.answer(coded_sum(order))
        return None

    said = virtual.results(4, program, eager=eager, virtual=True)[0]
    coded = "n - s = 3 answers needed" if isinstance(code, Cyclic) else "1 of each 2 twins needed"
    assert f"; {coded if code.s else 'all of 4 workers needed'}, " in said
    assert "2 of 4 are here" in said
    assert "rank 1 on node 1, rank 3 on node 3 did not come to the end" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "n"), [(FractionalRepetition(1), 4), (Cyclic(1), 4), (Cyclic(2), 5)], ids=str)
def test_an_approximate_sum_is_scaled_to_all_parts(code, n):
    """Gradients that are all ones: any part of them says what the sum is."""
    def program(comm):
        coded = CodedGradients(comm, D, np.float64, code, extras=1, patience_seconds=0.2, on_silence="approximate")
        if coded.is_server:
            order = coded.begin(np.zeros(D))
            coded.answer(np.full(D, order.weights.sum()), [order.weights.sum()])
            decoded = coded.end()
            assert decoded.approximate
            assert decoded.heard == (0,)
            np.testing.assert_allclose(decoded.vector, n)
            np.testing.assert_allclose(decoded.extras, n)
            coded.close()
        else:
            comm.pause(1000)

    virtual.results(n, program, virtual=True)


@both
def test_a_worker_that_has_ended_is_not_waited_for(eager):
    def program(comm):
        coded = CodedGradients(comm, D, np.float64, FractionalRepetition(1), patience_seconds=100)
        if comm.Get_rank() == 1:
            return None
        if coded.is_server:
            for t in range(3):
                coded.answer(coded_sum(coded.begin(np.zeros(D))))
                if t == 2:
                    with pytest.raises(SilenceError, match="rank 1 on node 1, rank 3 on node 3 ended before, at step 2"):
                        coded.end()
                else:
                    coded.end()
            assert comm.clock() < 1
            return coded.close()
        for order in coded.orders():
            coded.answer(coded_sum(order))
            if comm.Get_rank() == 3 and order.step == 1:
                break
        return None

    assert virtual.results(4, program, eager=eager, virtual=True)[0] == ()


@both
@pytest.mark.parametrize("fails", [False, True])
def test_workers_learn_that_the_server_has_gone(eager, fails):
    def program(comm):
        coded = CodedGradients(comm, D, np.float64, FractionalRepetition(1), patience_seconds=3)
        if coded.is_server:
            coded.begin(np.zeros(D))
            if fails:
                with pytest.raises(ZeroDivisionError), coded:
                    raise ZeroDivisionError
            return
        orders = coded.orders()
        coded.answer(coded_sum(next(orders)))
        with pytest.raises(PeerError, match="has failed; see what it has said" if fails else "has gone without"):
            next(orders)
        assert (comm.clock() > 3) == fails

    virtual.results(2, program, eager=eager, virtual=True)


@both
def test_answers_to_orders_before_a_restore_are_none_of_the_steps_after_it(eager):
    """Rank 1 answers step 1 of the first life when step 1 of the second one is open."""
    def program(comm):
        with CodedGradients(comm, D, np.float64, FractionalRepetition(1), TopK(k=2)) as coded:
            if not coded.is_server:
                for order in coded.orders():
                    if comm.Get_rank() == 1 and order.step == 1 and order.x[0] == 0:
                        comm.pause(0.5)
                    coded.answer(coded_sum(order))
                return coded.h
            rows, x = None, np.zeros(D)
            for t in range(3):
                coded.answer(coded_sum(coded.begin(x)))
                coded.end()
                if t == 0:
                    rows = coded.rows.copy()
            coded.restore(rows, 1)
            comm.pause(0.495)
            x = np.ones(D)
            for _ in range(4):
                coded.answer(coded_sum(coded.begin(x)))
                comm.pause(0.02)
                coded.end()
            coded.close(x)
            return coded.rows

    rows, *hs = virtual.results(4, program, eager=eager)
    assert all(same_bits(h, row) for h, row in zip(hs, rows[1:], strict=True))


def test_a_server_that_waits_says_for_whom(capsys):
    def program(comm):
        coded = CodedGradients(comm, D, np.float64, FractionalRepetition(0), patience_seconds=0.2, on_silence="wait")
        if coded.is_server:
            coded.answer(coded_sum(coded.begin(np.zeros(D))))
            coded.end()
            return coded.close()
        for order in coded.orders():
            comm.pause(1.0)
            coded.answer(coded_sum(order))
        return None

    assert virtual.results(2, program, virtual=True)[0] == ()
    assert "rank 1 on node 1 silent for 0.2 s, at step 0" in capsys.readouterr().err


# ------------------------------------------------------------------ wrong workers


def wrong_in(liars, t):
    def gradient(comm):
        def of(x, part, step, dtype):
            g = part_gradient(x, part, step, dtype)
            return g + (1 + comm.Get_rank()) if comm.Get_rank() in liars and step == t else g
        return of
    return gradient


def run_with(code, n, gradient, steps=4, lr=0.05, **options):
    def program(comm):
        of = gradient(comm)
        with CodedGradients(comm, D, np.float64, code, patience_seconds=0.5, **options) as coded:
            if not coded.is_server:
                for order in coded.orders():
                    coded.answer(coded_sum(order, gradient=of))
                return None
            x, xs = np.zeros(D), []
            for _ in range(steps):
                coded.answer(coded_sum(coded.begin(x), gradient=of))
                decoded = coded.end()
                x = x - lr * decoded.vector
                xs.append(x)
            coded.close(x)
            return np.array(xs), coded.decider.twins.wrong, coded.metrics
    return virtual.run(n, program, virtual=True)[0]


@pytest.mark.parametrize("compressor", [None, TopK(k=3)], ids=str)
def test_of_three_twins_the_wrong_one_is_named_and_not_used(compressor, capsys):
    code = FractionalRepetition(2, votes=2)
    xs, wrong, metrics = run_with(code, 6, wrong_in({4}, 2), compressor=compressor)
    right = run_with(code, 6, wrong_in(set(), 2), compressor=compressor)[0]
    assert wrong == {4: 1}
    assert metrics["wrong"] == 1
    assert compressor is not None or same_bits(xs, right)
    assert "rank 4 computed another sum than ranks 0,2 of the same parts in step 2" in capsys.readouterr().err


def test_of_two_twins_nobody_knows_which_is_wrong(capsys):
    error = run_with(FractionalRepetition(1), 4, wrong_in({3}, 0))
    assert isinstance(error, DisagreementError)
    assert "rank 3 and rank 1 computed different sums of the same parts in step 0" in str(error)
    xs, wrong, _ = run_with(FractionalRepetition(1), 4, wrong_in({3}, 0), twins="warn")
    assert wrong == {1: 1, 3: 1}
    assert len(xs) == 4
    assert capsys.readouterr().err.count("computed different sums") == 1


def test_votes_that_nobody_gets():
    """All three twins say something else."""
    error = run_with(FractionalRepetition(2, votes=2), 3, wrong_in({1, 2}, 1), twins="warn")
    assert isinstance(error, DisagreementError)
    assert "too few workers agree at step 1; 2 of each 3 twins needed, 0 of 3 are here" in str(error)


def test_a_cyclic_code_notices_a_wrong_answer_beyond_those_it_needs():
    for liars, wrong in ((set(), False), ({1}, True)):
        parity = run_with(Cyclic(1), 4, wrong_in(liars, 1))[2]["parity"]
        assert (parity > 1e-3) == wrong
        assert wrong or parity < 1e-14


@pytest.mark.parametrize("compressor", [None, TopK(k=3)], ids=str)
def test_an_answer_with_nan_counts_as_missing(compressor):
    def gradient(liars):
        return lambda comm: lambda x, part, t, dtype: (
            np.full(D, np.nan) if comm.Get_rank() in liars and t == 1 else part_gradient(x, part, t, dtype))

    xs, _, metrics = run_with(FractionalRepetition(1), 4, gradient({2}), compressor=compressor)
    assert metrics["not_finite"] == 1
    assert compressor is not None or same_bits(xs, plain(FractionalRepetition(1), 4, 4))
    error = run_with(FractionalRepetition(1), 4, gradient({0, 2}), compressor=compressor)
    assert isinstance(error, NonFiniteError)
    assert error.ranks == (0, 2)


# ------------------------------------------------------------------ going on, and misuse


@both
@pytest.mark.parametrize("compressor", [None, TopK(k=2)], ids=str)
def test_a_server_that_was_saved_goes_on_as_if_nothing_had_been(compressor, eager):
    """Each worker is told its row, once; later answers are differences again."""
    code, n, whole = FractionalRepetition(1), 4, train(FractionalRepetition(1), 12, compressor)

    def program(comm, steps, x, rows=None, step=0):
        with CodedGradients(comm, D, np.float64, code, compressor) as coded:
            if not coded.is_server:
                for order in coded.orders():
                    coded.answer(coded_sum(order))
                return coded.h
            if rows is not None:
                coded.restore(rows, step)
            for _ in range(steps):
                coded.answer(coded_sum(coded.begin(x)))
                x = x - 0.05 * coded.end().vector
            coded.close(x)
            return x, coded.rows.copy(), coded.step

    expected = virtual.results(n, whole, eager=eager)[0][0][-1]
    saved, *_ = virtual.results(n, lambda comm: program(comm, 7, np.zeros(D)), eager=eager)
    (x, rows, step), *hs = virtual.results(n, lambda comm: program(comm, 5, *saved), eager=eager)
    assert same_bits(x, expected)
    assert step == 12
    assert compressor is None or all(same_bits(h, row) for h, row in zip(hs, rows[1:], strict=True))


def test_serve_trains_numpy_vectors():
    def program(comm):
        x = np.zeros(D)
        counts = {0: 3, 1: 1, 2: 2, 3: 2}

        def gradient(x, part, t):
            assert not x.flags.writeable
            return sum(part_gradient(x, part, t + 10 * j, np.float64) for j in range(counts[part])), counts[part]

        served = serve(comm, gradient, x, FractionalRepetition(1), step=lambda x, g, t: x - 0.1 * g, steps=5)
        assert served.x is x
        assert served.missing == ()
        return x

    results = virtual.results(4, program)
    x = np.zeros(D)
    for t in range(5):
        parts = [sum(part_gradient(x, part, t + 10 * j, np.float64) for j in range(count))
                 for part, count in ((0, 3), (1, 1), (2, 2), (3, 2))]
        x = x - 0.1 * ((parts[0] + parts[1]) + (parts[2] + parts[3])) / 8
    assert all(same_bits(result, x) for result in results)


def served(n=2, gradient=lambda *_: (np.ones(D), 2), step=lambda x, g, _: x - g, code=None):
    code = FractionalRepetition(1) if code is None else code
    return virtual.results(n, lambda comm: serve(comm, gradient, np.zeros(D), code, step=step, steps=2).x)


@pytest.mark.parametrize(("answer", "line"), [
    (np.ones(D, complex), "has returned complex128; it was built for float64"), (["a"] * D, "has returned <U1; it was"),
    (None, r"has returned shape \(\), where \(7,\) was expected"), ([[1.0], [2.0, 3.0]], "of which no array can be made"),
    (np.ma.masked_less(np.ones(D), 2), "has returned a masked array, and masks are not kept"),
    ((np.ones(D), 1, 2), "has returned a tuple of 3; return the sum of gradients, or a tuple of that and the number"),
    *(((np.ones(D), count), "as the number of samples; return a whole") for count in (0.3, -2, "2", [2], np.nan)),
])
def test_a_gradient_that_serve_cannot_take_is_one_line(answer, line):
    """Counts that are no whole numbers were rounded, and masked entries counted, without a word."""
    with pytest.raises(MpiEfError, match=rf"^serve: part 0 of step 0: gradient\(\) .*{line}"):
        served(gradient=lambda *_: answer)


@pytest.mark.parametrize(("answer", "line"), [
    (1.0, r"has returned shape \(\), where \(7,\)"), (np.ones(1), r"has returned shape \(1,\)"),
    ("abc", "has returned shape"), (np.ones(D, complex), "has returned complex128")])
def test_a_step_that_returns_something_else_is_one_line(answer, line):
    """A number filled all of x, and imaginary parts were lost."""
    with pytest.raises(MpiEfError, match=rf"^serve: step\(\) {line}"):
        served(step=lambda *_: answer)


def test_counts_of_float_type_are_taken_and_all_parts_or_none_have_them():
    assert served(gradient=lambda *_: (np.ones(D), 2.0))[1][0] == -1.0
    with pytest.raises(OptionError, match="serve: of 3 parts 2 have returned the number of samples in step 0; let all or"):
        served(3, lambda x, part, t: (np.ones(D), 2) if part else np.ones(D), code=Cyclic(2))


def test_a_sum_that_overflows_is_told_before_the_step():
    def program(comm):
        x = np.zeros(D, np.float32)
        with pytest.raises(NonFiniteError, match="the sum of gradients has overflowed in step 0; take a smaller"):
            serve(comm, lambda *_: np.full(D, 3e38, np.float32), x, FractionalRepetition(0), step=lambda x, g, _: x - g,
                  steps=2)
        assert not x.any()

    (error,) = [value for value in virtual.run(2, program) if value is not None]
    assert isinstance(error, PeerError)  # of the worker


def test_what_serve_cannot_begin_with_on_one_rank_is_told_on_all():
    """The others waited for ever."""
    def program(comm):
        with pytest.raises((OptionError, PeerError), match="x=\\[0.0\\] is no contiguous vector"):
            serve(comm, lambda *_: 0, [0.0] if comm.Get_rank() == 1 else np.zeros(1), FractionalRepetition(1),
                  step=lambda *_: None, steps=2)

    virtual.results(2, program)
    for options, line in (({"gradient": 3}, "gradient=3 cannot be called"), ({"step": None}, "step=None cannot be called")):
        with pytest.raises(OptionError, match=line):
            served(**options)
    with pytest.raises(OptionError, match="comm=None is not an intracommunicator"):
        serve(None, lambda *_: 0, np.zeros(1), FractionalRepetition(1), step=lambda *_: None, steps=2)


@pytest.mark.parametrize(("change", "line"), [
    ({"code": FractionalRepetition(2)}, "3 does not divide 4"),
    ({"code": "fr:1"}, r"code='fr:1' is no code.* code_of\('fr:1'"),
    ({"dtype": np.float16}, "float16 is neither"), ({"d": -1}, "d=-1"), ({"compressor": TopK}, "is no compressor"),
    ({"server": 4}, "server=4"), ({"patience_seconds": 0}, "patience_seconds=0"),
    ({"on_silence": "stop"}, "on_silence='stop'"), ({"twins": "no"}, "twins='no'"), ({"extras": -1}, "extras=-1"),
])
def test_what_cannot_be_is_refused_on_all_ranks(change, line):
    def program(comm):
        options = {"d": D, "dtype": np.float64, "code": FractionalRepetition(1)} | change
        with pytest.raises(MpiEfError, match=line):
            CodedGradients(comm, **options)

    virtual.results(4, program)


def test_a_code_that_float32_cannot_stand_is_refused():
    def program(comm):
        with pytest.raises(OptionError, match=r"Cyclic\(7\) lets rounding grow \d+ times with n=24 workers, too much for "
                                              r"float32; take FractionalRepetition\(7\), a smaller s, or float64"):
            CodedGradients(comm, D, np.float32, Cyclic(7))

    virtual.results(24, program)


def test_ranks_agree_on_what_they_build():
    def program(comm):
        with pytest.raises((DisagreementError, PeerError)):
            CodedGradients(comm, D + comm.Get_rank(), np.float64, FractionalRepetition(1))

    virtual.results(2, program)


def test_misuse_is_one_line_each():
    def program(comm):
        coded = CodedGradients(comm, D, np.float64, FractionalRepetition(1), extras=1)
        if not coded.is_server:
            for call in (lambda: coded.begin(np.zeros(D)), coded.end, lambda: coded.rows, lambda: coded.metrics):
                with pytest.raises(OptionError, match="is the server's, rank 0"):
                    call()
            orders = coded.orders()
            order = next(orders)
            with pytest.raises(ShapeError):
                coded.answer(np.zeros(D + 1), [0])
            with pytest.raises(OptionError, match="0 extras; it was built for 1"):
                coded.answer(np.zeros(D))
            with pytest.raises(OptionError, match="the order of step 0 is not answered"):
                next(orders)
            coded.answer(coded_sum(order), [1])
            with pytest.raises(OptionError, match="no order to answer"):
                coded.answer(coded_sum(order), [1])
            for order in coded.orders():
                coded.answer(coded_sum(order), [1])
            return
        with pytest.raises(OptionError, match=r"call begin\(\) first"):
            coded.end()
        with pytest.raises(OptionError, match=r"orders\(\) is the workers'"):
            next(coded.orders())
        with pytest.raises(ShapeError):
            coded.begin(np.zeros(3))
        order = coded.begin(np.zeros(D))
        with pytest.raises(OptionError, match=r"step 0 has begun; call end\(\) first"):
            coded.begin(np.zeros(D))
        coded.answer(coded_sum(order), [1])
        coded.end()
        with pytest.raises(OptionError, match=r"rows have shape \(2, 3\); with n=2 workers it is \(2, 7\)"):
            coded.restore(np.zeros((2, 3)), 1)
        coded.close()
        assert coded.close() == ()
        with pytest.raises(OptionError, match="it is closed"):
            coded.begin(np.zeros(D))

    virtual.results(2, program)


@pytest.mark.parametrize("extras", [["a"], [1j], 3, None, np.ones((1, 2)), [[1], [2, 3]]])
def test_extras_and_steps_that_are_no_numbers_are_one_line(extras):
    def program(comm):
        coded = CodedGradients(comm, D, np.float64, FractionalRepetition(0), extras=1, order_extras=1)
        for step in ("a", -1):
            with pytest.raises(OptionError, match="CodedGradients: step="):
                coded.restore(None, step)
        with pytest.raises(OptionError, match="are no sequence of numbers; it was built for 1 of them"):
            coded.begin(np.zeros(D), extras)
        order = coded.begin(np.zeros(D), [0])
        with pytest.raises(OptionError, match="are no sequence of numbers; it was built for 1 of them"):
            coded.answer(coded_sum(order), extras)

    virtual.results(1, program)


def test_lateness_tells_who_is_slow():
    pauses = lambda rank, t: 0.3 if rank == 3 and t % 2 else 0.01  # noqa: E731
    finish = lambda coded: (coded.lateness.in_time, coded.lateness.late, coded.lateness.missing) if coded.is_server else 0  # noqa: E731
    program = train(FractionalRepetition(1), 20, pauses=pauses, finish=finish)
    (_, metrics, (in_time, late, missing)), *_ = virtual.results(4, program)
    assert in_time[0] == 20
    assert late[3] >= 1
    assert metrics["late"] == late.sum()
    assert (in_time + late + missing == 20).all()
