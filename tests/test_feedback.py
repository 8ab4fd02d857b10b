"""Laws of the error-feedback rules, on virtual ranks."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import virtual
from programs import PLANS, RULES, feedback_through, rule_steps, same_bits
from vectors_for_tests import gaussian

from mpi_ef.collectives import DenseMean, GatherMean, TwoPhaseMean, chunk_bounds
from mpi_ef.compress import Identity, RandK, Sign, TopK, lazy
from mpi_ef.errors import DisagreementError, DtypeError, NonFiniteError, OptionError, PeerError, ShapeError
from mpi_ef.feedback import ErrorFeedback

WORLDS = (1, 2, 3, 4)
D = 101
each_rule = pytest.mark.parametrize("rule", [*RULES, "my_rule:FADING"])  # the last from outside of the package
each_world = pytest.mark.parametrize("n", WORLDS)
each_plan = pytest.mark.parametrize("plan", PLANS)
# Plans that lose nothing: what they have not sent is in somebody's errors or residual.
each_keeping_plan = pytest.mark.parametrize("plan", [plan for plan in PLANS if "without" not in plan])
each_gathering_plan = pytest.mark.parametrize("plan", [plan for plan in PLANS if "two-phase" not in plan])


def mean_over_ranks(rows, kind, name):
    return np.mean([row[kind][name] for row in rows], axis=0)


def residual(rows):
    """What the second phases of a plan have not sent yet; zero for other plans."""
    parts = [row["per rank"].get("plan.residual") for row in rows]
    return np.zeros(D) if parts[0] is None else np.concatenate(parts)


@each_rule
@each_plan
@each_world
def test_results_and_replicated_state_are_equal_on_all_ranks(rule, plan, n):
    """Law 1."""
    rows = virtual.results(n, rule_steps(rule, plan, D, np.float32))
    for row in rows[1:]:
        assert same_bits(row["results"], rows[0]["results"])
        assert same_bits(row["replicated"], rows[0]["replicated"])


@each_rule
@each_world
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_identity_compressor_gives_the_uncompressed_method(rule, n, dense_steps):
    """Law 4: equal to the dense mean in the same order, exactly for EF14, up to rounding of g_i + (g - g_i) else."""
    rows = virtual.results(n, rule_steps(rule, "gather identity", D, np.float64, dense_steps=dense_steps))
    for step, result in enumerate(rows[0]["results"]):
        expected = np.zeros(D)
        for rank in range(n):
            expected += np.float64(1 / n) * gaussian(rank, D, np.float64, step=step)
        if rule == "ef14":
            assert result.tobytes() == expected.tobytes()
        np.testing.assert_allclose(result, expected, atol=1e-14)
    if rule != "ef21":
        np.testing.assert_allclose(rows[0]["per rank"]["e_i"], 0, atol=1e-14)


@each_keeping_plan
@each_world
def test_ef14_sends_everything_sooner_or_later(plan, n):
    """Law 5: sum of results + mean e_i (+ residuals) = sum of mean vectors; so x_T = x_0 - sum u + what is in errors."""
    steps = 6
    rows = virtual.results(n, rule_steps("ef14", plan, D, np.float64, steps=steps))
    sent = sum(rows[0]["results"])
    wanted = sum(gaussian(r, D, np.float64, step=t) for r in range(n) for t in range(steps)) / n
    errors = mean_over_ranks(rows, "per rank", "e_i") + residual(rows)
    np.testing.assert_allclose(sent + errors, wanted, atol=1e-12)


@each_keeping_plan
@each_world
@pytest.mark.parametrize("dense_steps", [0, 1])
@pytest.mark.parametrize(("rule", "local", "aggregate"), [("ef21", "g_i", "g"), ("econtrol", "h_i", "h")])
def test_aggregate_is_the_mean_of_the_local_estimates(rule, local, aggregate, plan, n, dense_steps):
    """Law 5; a two-phase plan owes its residual."""
    rows = virtual.results(n, rule_steps(rule, plan, D, np.float64, dense_steps=dense_steps))
    whole = rows[0]["replicated"][aggregate] + residual(rows)
    np.testing.assert_allclose(whole, mean_over_ranks(rows, "per rank", local), atol=1e-12)
    assert rows[0]["results"][-1].tobytes() == rows[0]["replicated"][aggregate].tobytes()


@each_gathering_plan
@each_world
def test_econtrol_virtual_iterate(plan, n):
    """x_t - gamma mean e_i = x_0 - gamma sum of mean gradients: sum h = sum mean g - mean e."""
    steps = 6
    rows = virtual.results(n, rule_steps("econtrol", plan, D, np.float64, steps=steps))
    wanted = sum(gaussian(r, D, np.float64, step=t) for r in range(n) for t in range(steps)) / n
    moved = sum(rows[0]["results"])
    np.testing.assert_allclose(moved + mean_over_ranks(rows, "per rank", "e_i"), wanted, atol=1e-12)


@pytest.mark.parametrize("compressor", [TopK(0.1), RandK(0.2)])
def test_state_is_updated_with_what_was_sent(compressor):
    """Law 2: in every step e_i + decoded message is the vector that was compressed, exactly for plain values."""

    def program(comm):
        feedback = ErrorFeedback("ef14", GatherMean(comm, compressor, D, np.float32))
        for step in range(4):
            u = gaussian(comm.Get_rank(), D, step=step)
            p = feedback.state.e_i + u
            feedback.step(u)
            own = np.zeros(D, np.float32)
            feedback.plan.add_own(own)
            assert (feedback.state.e_i + own).tobytes() == p.tobytes()

    virtual.results(3, program)


def test_econtrol_without_feedback_is_ef21():
    """algorithms: eta = 0 and h_i^0 = first gradient give EF21, bit for bit."""

    def program(rule, **options):
        def inner(comm):
            feedback = ErrorFeedback(rule, GatherMean(comm, TopK(0.1), D, np.float32), dense_steps=1, **options)
            return [feedback.step(gaussian(comm.Get_rank(), D, step=t)).copy() for t in range(8)]

        return inner

    # eta * e_i is 0, but e_i is not: 0 + g - h_i rounds as g - h_i does.
    assert same_bits(virtual.results(3, program("econtrol", eta=0.0)), virtual.results(3, program("ef21")))


def test_the_two_scalings_of_ef14_agree_for_a_constant_step_size():
    """(A) error in parameter units, (B) error in gradient units; a power of two scales without rounding."""
    gamma = 0.25

    def program(comm):
        a, b = (ErrorFeedback("ef14", GatherMean(comm, TopK(0.1), D, np.float64)) for _ in range(2))
        x_a = x_b = np.ones(D)
        for step in range(10):
            g = gaussian(comm.Get_rank(), D, np.float64, step=step)
            x_a = x_a - a.step(gamma * g)
            x_b = x_b - gamma * b.step(g)
            np.testing.assert_array_equal(x_a, x_b)
            np.testing.assert_array_equal(a.state.e_i, gamma * b.state.e_i)

    virtual.results(3, program)


def test_parameter_units_telescope_under_any_schedule():
    """x_T = x_0 - sum gamma_t mean g_t + mean e_T with a step size that changes, scaling (A)."""

    def program(comm):
        feedback = ErrorFeedback("ef14", GatherMean(comm, TopK(0.1), D, np.float64))
        x, wanted = np.zeros(D), np.zeros(D)
        for step in range(20):
            gamma = 1 / (1 + step) ** 0.7
            x -= feedback.step(gamma * gaussian(comm.Get_rank(), D, np.float64, step=step))
            wanted -= gamma * np.mean([gaussian(r, D, np.float64, step=step) for r in range(3)], axis=0)
        return x - wanted, feedback.state.e_i.copy()

    rows = virtual.results(3, program)
    np.testing.assert_allclose(rows[0][0], np.mean([e for _, e in rows], axis=0), atol=1e-12)


def test_ef21_contracts_the_estimation_error_in_every_step():
    """||g_i' - grad'||^2 <= (1 - theta) ||g_i - grad||^2 + beta ||grad' - grad||^2 for TopK."""
    alpha = TopK(0.1).alpha(D)
    theta, beta = 1 - np.sqrt(1 - alpha), (1 - alpha) / (1 - np.sqrt(1 - alpha))

    def program(comm):
        feedback = ErrorFeedback("ef21", GatherMean(comm, TopK(0.1), D, np.float64), dense_steps=1)
        before, error = gaussian(comm.Get_rank(), D, np.float64), 0.0
        feedback.step(before)
        for step in range(1, 200):
            grad = gaussian(comm.Get_rank(), D, np.float64, step=step) * 0.99**step
            feedback.step(grad)
            now = float(((feedback.state.g_i - grad) ** 2).sum())
            bound = (1 - theta) * error + beta * float(((grad - before) ** 2).sum())
            assert now <= bound * (1 + 1e-12)
            before, error = grad, now

    virtual.results(2, program)


def test_sign_feedback_converges_where_sign_descent_does_not():
    """Karimireddy et al. 2019: f(x) = eps |x1 + x2| + |x1 - x2|; sign descent keeps x1 + x2, with feedback f -> 0."""
    from mpi_ef.collectives import TwoPhaseMean

    def subgradient(x):
        direction = 1.0 if x[0] - x[1] >= 0 else -1.0
        return 0.5 * np.sign(x[0] + x[1]) * np.ones(2) + direction * np.array([1.0, -1.0])

    def value(x):
        return 0.5 * abs(x[0] + x[1]) + abs(x[0] - x[1])

    def program(comm):
        feedback = ErrorFeedback("ef14", TwoPhaseMean(comm, Sign(), 2, np.float64))
        x, plain = np.ones(2), np.ones(2)
        for step in range(5000):
            gamma = 0.1 / np.sqrt(step + 1)
            plain -= gamma * np.sign(subgradient(plain))
            x -= feedback.step(gamma * subgradient(x))
        return value(x), value(plain)

    ((with_feedback, without),) = virtual.results(1, program)
    assert without >= 1.0
    assert with_feedback < 0.05


@each_rule
@each_plan
def test_save_load_step_is_step(rule, plan):
    """Law 7 at the same world size."""

    def program(comm):
        rank = comm.Get_rank()
        one = feedback_through(plan, rule, comm, D, np.float32, dense_steps=1)
        for step in range(4):
            one.step(gaussian(rank, D, step=step))
        saved = one.state_dict()
        two = feedback_through(plan, rule, comm, D, np.float32, dense_steps=1)
        two.load_state_dict(saved)
        for step in range(4, 7):
            u = gaussian(rank, D, step=step)
            assert one.step(u).tobytes() == two.step(u).tobytes()
        assert same_bits(one.state_dict(), two.state_dict())

    virtual.results(3, program)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"compressor": "TopK(0.2)"}, OptionError, "saved compressor is TopK"),
        ({"plan": "DenseMean"}, OptionError, "saved plan is DenseMean, here it is GatherMean"),
        ({"rank": 7}, OptionError, "saved rank is 7, here it is 0"),
        ({"size": 3}, OptionError, "saved size is 3, here it is 1"),
        ({"rule": "ef14"}, OptionError, "saved rule is ef14, here it is ef21"),
        ({"arrays": {}}, ShapeError, "g_i is missing"),
        ({"arrays": {"g_i": np.zeros(3, np.float32), "g": np.zeros(D, np.float32)}}, ShapeError, r"g_i is \(3,\)"),
    ],
)
def test_load_refuses_what_does_not_belong_here(change, error, words):
    def program(comm):
        feedback = ErrorFeedback("ef21", GatherMean(comm, TopK(0.1), D))
        feedback.step(gaussian(0, D))
        before = feedback.state_dict()
        with pytest.raises(error, match=words):
            feedback.load_state_dict(before | change)
        assert same_bits(before, feedback.state_dict())

    virtual.results(1, program)


@each_rule
@each_plan
def test_a_broken_gradient_on_one_rank_leaves_every_state_as_it_was(rule, plan):
    def program(comm):
        rank = comm.Get_rank()
        feedback = feedback_through(plan, rule, comm, D, np.float32)
        feedback.step(gaussian(rank, D))
        before = feedback.state_dict()
        broken = gaussian(rank, D, step=1)
        if rank == 1:
            broken[5] = np.nan
        with pytest.raises(NonFiniteError):
            feedback.step(broken)
        with pytest.raises(ShapeError if rank == 2 else PeerError):
            feedback.step(gaussian(rank, D + (rank == 2)))
        after = feedback.state_dict()
        assert after.pop("exchanges") == before.pop("exchanges") + 2
        assert same_bits(before, after)
        return feedback.step(gaussian(rank, D, step=2)).copy()

    assert len({row.tobytes() for row in virtual.results(3, program)}) == 1


def test_start_with_the_first_gradient():
    """dense_steps=1 gives g_i^0 = grad f_i(x^0), and h_i^0 likewise with e_i = 0."""

    def program(comm):
        g = gaussian(comm.Get_rank(), D, np.float64)
        for rule, name in (("ef21", "g_i"), ("econtrol", "h_i")):
            feedback = ErrorFeedback(rule, GatherMean(comm, TopK(0.1), D, np.float64), dense_steps=1)
            mean = feedback.step(g)
            np.testing.assert_array_equal(feedback.per_rank()[name], g)
            np.testing.assert_allclose(mean, (gaussian(0, D, np.float64) + gaussian(1, D, np.float64)) / 2, atol=1e-15)
            assert feedback.plan.exchanges == 0
        np.testing.assert_array_equal(feedback.per_rank()["e_i"], 0)

    virtual.results(2, program)


def test_dense_steps_are_counted_and_their_buffers_let_go():
    def program(comm):
        plan = GatherMean(comm, TopK(0.1), D)
        feedback = ErrorFeedback("ef21", plan, dense_steps=2)
        dense = DenseMean(comm, D).traffic.sent_nbytes
        sent = []
        for step in range(4):
            feedback.step(gaussian(comm.Get_rank(), D, step=step))
            sent.append(feedback.sent_nbytes)
        assert sent == [
            dense,
            2 * dense,
            2 * dense + plan.traffic.sent_nbytes,
            2 * dense + 2 * plan.traffic.sent_nbytes,
        ]
        assert feedback._dense is None
        assert all(spent > 0 for spent in feedback.seconds.values())
        other = ErrorFeedback("ef21", GatherMean(comm, TopK(0.1), D), dense_steps=2)
        other.load_state_dict(feedback.state_dict())
        assert other.sent_nbytes == sent[-1]

    virtual.results(3, program)


def test_default_strength_of_econtrol():
    def program(comm):
        plan = GatherMean(comm, TopK(0.1), 100)
        assert ErrorFeedback("econtrol", plan).state.eta == pytest.approx(0.03)
        assert ErrorFeedback("econtrol", plan, eta=0.5).state.eta == 0.5
        assert ErrorFeedback("econtrol", GatherMean(comm, Identity(), 100)).state.eta == pytest.approx(0.3)

    virtual.results(1, program)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("ef22",), {}, "there is no rule 'ef22'; did you mean ef21"),
        (("ef21",), {"eta": 0.1}, "ef21 has no option eta"),
        (("econtrol",), {"eta": 1.5}, "eta=1.5 is not in"),
        (("ef14",), {"dense_steps": -1}, "dense_steps=-1"),
    ],
)
def test_wrong_options(arguments, options, words):
    def program(comm):
        with pytest.raises(OptionError, match=words):
            ErrorFeedback(*arguments, GatherMean(comm, TopK(0.1), D), **options)

    virtual.results(1, program)


def test_results_are_read_only():
    """They are the rule's own state: writing into them would break it on this rank only."""

    def program(comm):
        for rule in RULES:
            result = ErrorFeedback(rule, GatherMean(comm, TopK(0.1), D)).step(gaussian(0, D))
            with pytest.raises(ValueError, match="read-only"):
                result /= 2

    virtual.results(1, program)


def test_econtrol_wants_an_eta_where_the_worst_case_says_nothing():
    def program(comm):
        plan = GatherMean(comm, Sign(), 100_000)
        with pytest.raises(OptionError, match=r"constant 1.0e-05 .* pass one, for example eta=0.1"):
            ErrorFeedback("econtrol", plan)
        assert ErrorFeedback("econtrol", plan, eta=0.1).options == {"eta": 0.1}

    virtual.results(1, program)


def test_ranks_that_disagree_all_learn_about_it():
    def program(rule, dense_steps):
        def inner(comm):
            rank = comm.Get_rank()
            plan = GatherMean(comm, TopK(0.1), D)
            with pytest.raises((DisagreementError, PeerError, OptionError)) as caught:
                ErrorFeedback(rule[rank], plan, dense_steps=dense_steps[rank])
            return str(caught.value)

        return virtual.results(2, inner)

    assert all("disagree on rule: ef14 on rank 0; ef21 on rank 1" in text for text in program(["ef14", "ef21"], [0, 0]))
    assert all("disagree on dense_steps" in text for text in program(["ef21", "ef21"], [0, 1]))
    assert all("there is no rule 'ef22'" in text for text in program(["ef21", "ef22"], [0, 0]))


@pytest.mark.parametrize(("vector", "words"), [
    (np.ones(D), "float64; this plan takes float32"), (np.ma.masked_all(D, np.float32), "is a masked array"),
    (np.ones(2 * D, np.float32)[::2], "is not contiguous"), (np.ones(D - 1, np.float32), "this plan takes"),
])
def test_a_wrong_vector_on_one_rank_stops_all(vector, words):
    def program(comm):
        feedback = ErrorFeedback("ef21", GatherMean(comm, TopK(0.1), D))
        with pytest.raises((DtypeError, ShapeError, PeerError), match=words):
            feedback.step(vector if comm.Get_rank() else gaussian(0, D))

    virtual.results(2, program)


def test_dense_steps_between_compressed_ones_leave_nothing_behind():
    """A state saved before the end of the dense steps, loaded later: EF14's mean has no entries of dense ones."""
    d = 200

    def program(comm):
        feedback = ErrorFeedback("ef14", GatherMean(comm, TopK(0.05), d), dense_steps=1)
        early = feedback.state_dict()
        for step in range(3):
            feedback.step(gaussian(comm.Get_rank(), d, step=step))
        feedback.load_state_dict(early)
        return [np.count_nonzero(feedback.step(gaussian(comm.Get_rank(), d, step=step))) for step in range(3)]

    for first, *later in virtual.results(2, program):
        assert first == d
        assert max(later) <= 2 * TopK(0.05).count(d)


@each_rule
@each_plan
@pytest.mark.parametrize("dense_steps", [pytest.param(0, marks=pytest.mark.exhaustive), 2])
def test_a_rule_takes_a_combination_as_the_vector_that_it_is(rule, plan, dense_steps):
    """Whether it is formed beforehand or while it is encoded: the same bits, in results and state."""

    def program(comm):
        rank = comm.Get_rank()
        rules = [feedback_through(plan, rule, comm, D, np.float32, dense_steps=dense_steps) for _ in range(2)]
        for step in range(5):
            a, b = gaussian(rank, D, step=step), gaussian(rank + 7, D, step=step)
            assert same_bits(rules[0].step(lazy(a) - b), rules[1].step(a - b))
        assert same_bits(*((feedback.per_rank(), feedback.replicated()) for feedback in rules))

    virtual.results(3, program)


@pytest.mark.parametrize("rule", ["ef14", "econtrol"])
def test_a_combination_that_does_not_fit_raises_on_all_ranks(rule):
    def program(comm):
        x, y = gaussian(comm.Get_rank(), 10), gaussian(comm.Get_rank(), 10 - comm.Get_rank())
        ErrorFeedback(rule, GatherMean(comm, TopK(0.5), 10)).step(lazy(x) - y)

    peer, error = virtual.run(2, program)
    assert isinstance(error, ShapeError)
    assert isinstance(peer, PeerError)


def top(v, k):
    """Top-k as anybody would write it; among equal magnitudes the lowest index first."""
    chosen = np.argsort(-np.abs(v), kind="stable")[:k]
    out = np.zeros_like(v)
    out[chosen] = v[chosen]
    return out


@each_world
def test_ef21_bc_in_two_phases_is_the_pseudocode(n):
    """Every rank is the server of a chunk: clients and servers select from chunks. Against a plain loop, and law 5."""
    steps, up, down = 12, 0.1, 0.03
    vectors = [[gaussian(rank, D, np.float64, step=step) for rank in range(n)] for step in range(steps)]
    bounds = chunk_bounds(D, n)
    chunks = [slice(low, high) for low, high in pairwise(bounds)]

    def kept(v, ratio):
        return top(v, max(1, int(ratio * v.size)))

    def program(comm):
        plan = TwoPhaseMean(comm, TopK(up), D, np.float64, reply=TopK(down))
        feedback = ErrorFeedback("ef21-bc", plan, dense_steps=1)
        results = [feedback.step(rows[comm.Get_rank()]).copy() for rows in vectors]
        return {"results": results, "per rank": feedback.per_rank(), "replicated": feedback.replicated()}

    rows = virtual.results(n, program)
    g_i = np.array(vectors[0])
    g = g_i.mean(axis=0)
    for step in range(1, steps):
        for i, grad in enumerate(vectors[step]):
            for chunk in chunks:
                g_i[i, chunk] += kept(grad[chunk] - g_i[i, chunk], up)
        for chunk in chunks:
            g[chunk] += kept(g_i.mean(axis=0)[chunk] - g[chunk], down)
        for row in rows:
            np.testing.assert_allclose(row["results"][step], g, atol=1e-13)
    assert abs(residual(rows)).max() > 0.1  # the way back really was narrow
    np.testing.assert_allclose(g + residual(rows), mean_over_ranks(rows, "per rank", "g_i"), atol=1e-13)
    assert not rows[0]["replicated"]["behind"].size


def test_ef21_bc_refuses_a_second_reply():
    def program(comm):
        plan = TwoPhaseMean(comm, TopK(0.1), D, reply=TopK(0.5))
        ErrorFeedback("ef21-bc", plan, reply=TopK(0.2)).step(gaussian(comm.Get_rank(), D))

    for outcome in virtual.run(2, program):
        assert isinstance(outcome, OptionError)
        assert "which has a reply of its own; pass it there" in str(outcome)


@pytest.mark.parametrize("call", ["wait", "commit"])
def test_a_step_that_was_not_started_is_told(call):
    def program(comm):
        feedback = ErrorFeedback("ef21", GatherMean(comm, TopK(0.1), D))
        with pytest.raises(OptionError, match=r"no step is under way; call start\(vector\)"):
            getattr(feedback, call)()

    virtual.results(2, program)


@each_rule
def test_forgetting_is_starting_anew(rule):
    """Also for what the second phase of the plan owes; the rule makes the steps that a new one makes."""

    def program(comm):
        rank = comm.Get_rank()
        new, used = (feedback_through("two-phase sign", rule, comm, D, np.float32) for _ in range(2))
        for step in range(3):
            used.step(gaussian(rank, D, step=step))
        assert used.per_rank()["plan.residual"].any()
        used.forget()
        assert not any(array.any() for array in used.per_rank().values())
        for step in range(3):
            assert same_bits(*(feedback.step(gaussian(rank, D, step=step)).copy() for feedback in (new, used)))

    virtual.results(3, program)


@pytest.mark.parametrize(
    ("rule", "options", "same"), [("ef21", {}, "ef21-sgdm"), ("ef21-sgdm", {"eta": 0.25}, "ef21-sgd2m")]
)
def test_momentum_goes_with_any_rule(rule, options, same):
    """EF21 with momentum is EF21-SGDM, and that with momentum EF21-SGD2M, to the last bit; states go on exactly."""

    def program(comm):
        plans = [GatherMean(comm, TopK(0.1), D) for _ in range(3)]
        mine, theirs = ErrorFeedback(rule, plans[0], momentum=0.75, **options), ErrorFeedback(same, plans[1], eta=0.25)
        for step in range(6):
            grads = [gaussian(comm.Get_rank(), D, step=step) for _ in range(2)]
            assert same_bits(mine.step(lazy(grads[0])), theirs.step(grads[1]))
            if step == 2:
                saved = copy.deepcopy(mine.state_dict())
        again = ErrorFeedback(f"{rule}(momentum=0.75)", plans[2], **options)
        again.load_state_dict(saved)
        for step in range(3, 6):
            result = again.step(gaussian(comm.Get_rank(), D, step=step))
        assert same_bits(result, mine.state.g)
        with pytest.raises(OptionError, match=r"momentum=1.0 is not in \[0, 1\)"):
            ErrorFeedback("econtrol", plans[0], eta=0.1, momentum=1.0)

    virtual.results(2, program)
