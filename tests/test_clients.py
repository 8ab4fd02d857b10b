"""Many clients on few ranks: nobody can tell how many."""

from functools import partial

import numpy as np
import pytest
import virtual
from programs import (
    CLIENT_D,
    CLIENT_RULES,
    CLIENT_WEIGHTS,
    CLIENTS_IN_ALL,
    client_steps,
    clients_feedback,
    own_vectors,
    same_bits,
)
from vectors_for_tests import gaussian

from mpi_ef.collectives import ClientsMean, GatherMean, RobustMean
from mpi_ef.compress import Identity, Keep, Quantize, RandK, Sign, TopK, lazy
from mpi_ef.errors import DisagreementError, NonFiniteError, OptionError, PeerError, ShapeError
from mpi_ef.feedback import ErrorFeedback

D, CLIENTS = CLIENT_D, CLIENTS_IN_ALL
COMPRESSORS = (TopK(0.1), TopK(0.2, values=Quantize("bf16")), RandK(0.2, seed=3), Sign(block=16), Identity())
TOP = TopK(0.1)


def gathered(rows):
    """Put together what the ranks say, so that it does not tell how many they were."""
    local = {name: np.concatenate([row["local"][name] for row in rows]) for name in rows[0]["local"]}
    return {**rows[0], "local": local}


@pytest.mark.parametrize("rule", CLIENT_RULES)
def test_any_number_of_ranks_gives_the_same_bits(rule):
    """Law 3, and law 1 on the way."""
    alone = gathered(virtual.results(1, client_steps(rule)))
    for n in (2, 3, CLIENTS):
        rows = virtual.results(n, client_steps(rule))
        for row in rows:
            assert same_bits(row["results"], alone["results"])
            assert same_bits(row["replicated"], alone["replicated"])
        assert same_bits(gathered(rows), alone)


@pytest.mark.parametrize("rule", CLIENT_RULES)
def test_saved_and_loaded_a_step_is_the_same(rule):
    """Law 7."""

    def program(comm):
        first, second = (clients_feedback(comm, rule) for _ in range(2))
        plan = first.plan
        for step in range(3):
            first.step(own_vectors(plan, step))
        second.load_state_dict(first.state_dict())
        for step in range(3, 6):
            x = own_vectors(plan, step)
            assert same_bits(first.step(x), second.step(x))
        assert first.sent_nbytes == second.sent_nbytes

    virtual.results(2, program)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_client_on_every_rank_is_a_gathered_mean(compressor):
    def program(comm):
        one = GatherMean(comm, compressor, D)
        many = ClientsMean(comm, compressor, D, clients=3)
        out = []
        for plan in (one, many):
            for step in range(2):
                own, mean = np.zeros(D, np.float32), np.zeros(D, np.float32)
                messages = plan.exchange(gaussian(comm.Get_rank(), D, step=step))
                messages.add_own(own)
                messages.add_mean(mean)
                out.append((own, mean))
        return out

    for out in virtual.results(3, program):
        assert same_bits(out[:2], out[2:])


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_who_is_silent_adds_nothing_and_costs_nothing(compressor):
    chosen = np.array([True, False, False, True, True, False, True])

    def program(comm):
        plan = ClientsMean(comm, compressor, D, np.float64, clients=CLIENTS)
        mine = slice(plan.first, plan.first + plan.own)
        x = own_vectors(plan, 0)
        mean, own, by_client = np.zeros(D), np.zeros(plan.own * D), np.zeros((CLIENTS, D))
        plan.exchange(x.reshape(-1), participates=chosen[mine], tags=np.arange(CLIENTS, dtype=np.uint8)[mine])
        plan.add_mean(mean)
        plan.add_own(own)
        for client, row in enumerate(by_client):
            plan.add_message(client, row)
        assert plan.tags.tolist() == list(range(CLIENTS))
        assert plan.message_nbytes == chosen.sum() * compressor.wire_nbytes(D, np.float64)
        np.testing.assert_array_equal(own.reshape(plan.own, D), by_client[mine])
        assert not by_client[~chosen].any()
        assert by_client[chosen].any(axis=1).all()
        np.testing.assert_allclose(mean, by_client.sum(axis=0) / CLIENTS, atol=1e-14)
        return mean

    assert same_bits(virtual.results(3, program)[2], virtual.results(1, program)[0])


def test_a_split_exchange_lets_all_clients_speak():
    """Also after one in which some were silent."""

    def program(comm):
        plan = ClientsMean(comm, TOP, D, np.float64, clients=CLIENTS)
        x, out = own_vectors(plan, 0).reshape(-1), [np.zeros(D) for _ in range(2)]
        plan.exchange(x).add_mean(out[0])
        plan.exchange(x, participates=np.zeros(plan.own, np.bool_), tags=np.ones(plan.own, np.uint8))
        plan.start(x)
        plan.wait().add_mean(out[1])
        assert not plan.tags.any()
        return out

    for first, second in virtual.results(2, program):
        assert same_bits(first, second)
        assert first.any()


@pytest.mark.parametrize(("said", "error"), [
    ({"participates": np.ones(9, np.bool_)}, ShapeError), ({"tags": np.ones(9, np.uint8)}, ShapeError),
    ({"tags": np.full(3, 128, np.uint8)}, OptionError),
])
def test_wrong_words_of_one_rank_are_told_on_all(said, error):
    def program(comm):
        plan = ClientsMean(comm, TOP, D, np.float64, clients=6)
        with pytest.raises(error if comm.Get_rank() == 1 else PeerError):
            plan.exchange(own_vectors(plan, 0).reshape(-1), **(said if comm.Get_rank() == 1 else {}))
        plan.exchange(own_vectors(plan, 1).reshape(-1))

    virtual.results(2, program)


def test_weights_weigh():
    def program(comm):
        plan = ClientsMean(comm, Identity(), D, np.float64, clients=CLIENTS, weights=CLIENT_WEIGHTS)
        mean = np.zeros(D)
        plan.exchange(own_vectors(plan, 0).reshape(-1)).add_mean(mean)
        return mean

    expected = sum(w * gaussian(client, D, np.float64) for client, w in enumerate(CLIENT_WEIGHTS))
    np.testing.assert_allclose(virtual.results(2, program)[1], expected, atol=1e-14)


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"clients": 2}, OptionError, "clients=2 on 3 ranks; every rank carries at least one client"),
    ({"clients": 0}, OptionError, "clients=0 on 3 ranks"),
    ({"clients": 2.5}, OptionError, "clients=2.5 on 3 ranks"),
    ({"clients": 5, "weights": np.ones(4)}, OptionError, "weights of shape (4,); pass one finite number a client"),
    ({"clients": 5, "weights": np.full(5, np.nan)}, OptionError, "one finite number a client"),
])
def test_bad_arguments(options, error, text):
    for outcome in virtual.run(3, lambda comm: ClientsMean(comm, TopK(0.1), D, **options)):
        assert isinstance(outcome, error)
        assert text in str(outcome)


def test_ranks_that_disagree_on_clients():
    for outcome in virtual.run(2, lambda comm: ClientsMean(comm, TopK(0.1), D, clients=4 + comm.Get_rank())):
        assert isinstance(outcome, DisagreementError)
        assert "clients: 4 on rank 0; 5 on rank 1" in str(outcome)


def test_one_bad_client_is_told_on_all_ranks_and_changes_nothing():
    def program(comm):
        plan = ClientsMean(comm, TopK(0.1), D, np.float64, clients=CLIENTS)
        feedback = ErrorFeedback("ef21-sgdm", plan)
        feedback.step(own_vectors(plan, 0))
        before = feedback.state_dict()["arrays"]
        bad = own_vectors(plan, 1)
        if comm.Get_rank() == 1:
            bad[-1, 5] = np.nan
        with pytest.raises(NonFiniteError) as caught:
            feedback.step(bad)
        assert caught.value.ranks == (1,)
        assert same_bits(feedback.state_dict()["arrays"], before)
        feedback.step(own_vectors(plan, 1))
        wrong = own_vectors(plan, 2)[:, : D - (comm.Get_rank() == 0)]
        with pytest.raises(ShapeError if comm.Get_rank() == 0 else PeerError):
            feedback.step(np.ascontiguousarray(wrong))

    virtual.results(3, program)


@pytest.mark.parametrize("rule", [
    rule for rule in CLIENT_RULES if rule not in ("marina", "ef14", "lion", "ef21-w", "ef21-bc") and rule[:3] != "byz"
])
def test_aggregate_is_the_mean_of_the_local_estimates(rule):
    """Law 5."""
    world = gathered(virtual.results(2, client_steps(rule)))
    name = "h" if rule in ("econtrol", "d-ec-sgd") else "g"
    local = world["local"].get(f"{name}_i", world["replicated"].get("all_i", np.zeros(0)).reshape(-1, D))
    np.testing.assert_allclose(world["replicated"][name], local.mean(axis=0), atol=1e-12)


def test_what_the_server_has_not_told_yet_is_behind():
    """Law 5 of EF21-BC, gathered."""
    world = gathered(virtual.results(2, client_steps("ef21-bc")))
    told = world["replicated"]["g"] + world["replicated"]["behind"]
    assert world["replicated"]["behind"].any()
    np.testing.assert_allclose(told, world["local"]["g_i"].mean(axis=0), atol=1e-12)


def test_weighted_aggregate_is_the_weighted_mean():
    world = gathered(virtual.results(2, client_steps("ef21-w")))
    np.testing.assert_allclose(world["replicated"]["g"], CLIENT_WEIGHTS @ world["local"]["g_i"], atol=1e-12)


def descent(rule, *, dense_steps=1, count=40, compressor=TOP, options=None, weights=None, gamma=0.1, inputs=None):
    """Return x after some steps on quadratics that differ from client to client, float64."""

    def program(comm):
        kind = partial(RobustMean, f=0) if rule.startswith("byz-") else partial(ClientsMean, weights=weights)
        plan = kind(comm, compressor, D, np.float64, clients=CLIENTS)
        feedback = ErrorFeedback(rule, plan, dense_steps=dense_steps, **(options or {}))
        clients = range(plan.first, plan.first + plan.own)
        targets = np.array([gaussian(client, D, np.float64, step=99) for client in clients])
        scales = 0.5 + np.array([c / CLIENTS for c in clients])[:, None]
        x = np.ones(D)
        for step in range(count):
            x = x - gamma * feedback.step(scales * (x - targets), **(inputs(step) if inputs else {}))
        return x

    return virtual.results(2, program)[0]


def test_identities_between_rules():
    """algorithms: what each rule becomes at the ends of its options."""
    ef21 = descent("ef21")
    for rule, options in (("ef21-sgdm", {"eta": 1.0}), ("ef21-sgd2m", {"eta": 1.0}), ("ef21-hb", {"eta": 0.0}),
                          ("ef21-pp", {"participation": 1.0}), ("ef21-bc", {"reply": Identity()}),
                          ("econtrol", {"eta": 0.0}), ("clag", {"zeta": 0.0})):
        np.testing.assert_allclose(descent(rule, options=options), ef21, rtol=1e-12, atol=1e-13, err_msg=rule)


@pytest.mark.parametrize(("plain", "options"), [("ef21", {}), ("ef21-pp", {"participation": 0.4})])
def test_ef21_w_moves_like_ef21_for_a_homogeneous_compressor(plain, options):
    weighted = descent("ef21-w", weights=CLIENT_WEIGHTS, options=options)
    np.testing.assert_allclose(weighted, descent(plain, options=options), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "rule", [rule for rule in CLIENT_RULES if rule not in ("ef21-hb", "ef21-pp", "marina", "ef21-page")]
)
def test_identity_compressor_gives_gradient_descent(rule):
    """Law 4; momentum is switched off, and clients of CLAG always speak."""
    one = {"eta": 1.0}
    options = {"ef21-sgdm": one, "byz-ef21-sgdm": one, "ef21-sgd2m": one, "clag": {"zeta": 0.0}, "econtrol": {"eta": 0.7},
               "lion": {"beta1": 0.0, "beta2": 0.0}}
    weights = CLIENT_WEIGHTS if rule == "ef21-w" else None
    x = descent(rule, compressor=Identity(), options=options.get(rule), weights=weights)
    expected = np.ones(D)
    targets = np.array([gaussian(client, D, np.float64, step=99) for client in range(CLIENTS)])
    scales = 0.5 + np.arange(CLIENTS)[:, None] / CLIENTS
    for _ in range(40):
        expected = expected - 0.1 * (scales * (expected - targets)).mean(axis=0)
    np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-13)


def test_page_of_full_gradients_is_ef21():
    np.testing.assert_array_equal(descent("ef21-page", inputs=lambda _: {"full": True}), descent("ef21"))


def test_page_adds_changes_to_the_last_whole_gradient():
    def program(comm):
        plan = ClientsMean(comm, TopK(0.1), D, np.float64, clients=CLIENTS)
        feedback = ErrorFeedback("ef21-page", plan)
        feedback.step(own_vectors(plan, 0), full=True)
        feedback.step(own_vectors(plan, 1))
        np.testing.assert_array_equal(feedback.state.v_i, (own_vectors(plan, 1) + own_vectors(plan, 0)).reshape(-1))

    virtual.results(2, program)


def test_marina_with_whole_gradients_is_gradient_descent_and_its_changes_are_unbiased():
    def program(comm):
        plan = ClientsMean(comm, RandK(0.25, seed=1), D, np.float64, clients=CLIENTS)
        feedback = ErrorFeedback("marina", plan)
        x = own_vectors(plan, 0)
        whole = feedback.step(x, whole=True).copy()
        total, draws = np.zeros(D), 600
        for _ in range(draws):
            before = feedback.state.g.copy()
            total += feedback.step(x) - before
        return whole, total / draws, x

    rows = virtual.results(2, program)
    mean = np.concatenate([row[2] for row in rows]).mean(axis=0)
    np.testing.assert_allclose(rows[0][0], mean, atol=1e-14)
    # Entry by entry a mean of 600 * 7 values x d/k or 0: standard deviation about |x| sqrt(3 / 4200); five of them.
    assert abs(rows[0][1] - mean).max() < 5 * 2.5 * np.sqrt(3 / 4200)


def test_lag_is_silent_where_little_changes():
    def program(comm):
        plan = ClientsMean(comm, Identity(), D, np.float64, clients=CLIENTS)
        feedback = ErrorFeedback("clag", plan, dense_steps=1, zeta=1.0)
        x = own_vectors(plan, 0)
        feedback.step(x)
        before = plan.message_nbytes
        feedback.step(x)  # nothing has changed: the estimate is exact
        return plan.message_nbytes - before

    assert virtual.results(2, program) == [0, 0]


@pytest.mark.parametrize(("rule", "plan", "text"), [
    ("ef21-pp", lambda comm: GatherMean(comm, TopK(0.1), D), "the plan is a GatherMean; this rule needs ClientsMean"),
    ("ef21-w", lambda comm: ClientsMean(comm, TopK(0.1), D, clients=4), "the plan has no weights"),
    ("ef14-momentum", lambda comm: ClientsMean(comm, TopK(0.1), D, clients=4), "2 vectors on a rank share one momentum"),
    ("marina", lambda comm: ClientsMean(comm, TopK(0.1), D, clients=4), "values=Identity()) is not unbiased; take RandK"),
])
def test_rules_say_what_they_need(rule, plan, text):
    def program(comm):
        p = plan(comm)
        ErrorFeedback(rule, p).step(np.ones(p.own_d, np.float32))

    for outcome in virtual.run(2, program):
        assert isinstance(outcome, OptionError)
        assert text in str(outcome)


@pytest.mark.parametrize(("rule", "options", "text"), [
    ("ef12", {}, "did you mean ef"), ("ef21-sgdm", {"eta": 1.5}, "eta=1.5 is not in [0, 1]"),
    ("ef21-pp", {"participation": 0.0}, "participation=0.0 is not in (0, 1]"), ("clag", {"zeta": -1}, "zeta=-1"),
    ("ef21-bc", {"reply": 3}, "reply=3 is not a compressor"), ("ef21", {"eta": 0.1}, "ef21 has no option eta"),
])
def test_bad_options(rule, options, text):
    def program(comm):
        ErrorFeedback(rule, ClientsMean(comm, TopK(0.1), D, clients=4), **options)

    for outcome in virtual.run(2, program):
        assert isinstance(outcome, OptionError)
        assert text in str(outcome)


def test_lazy_vectors_of_several_clients_are_cut_between_them():
    def program(comm):
        plan = ClientsMean(comm, TopK(0.1), D, np.float64, clients=4)
        a, b = own_vectors(plan, 0).reshape(-1), own_vectors(plan, 1).reshape(-1)
        out, expected = np.zeros(plan.own_d), np.zeros(plan.own_d)
        plan.exchange(lazy(a) - b).add_own(out)
        plan.exchange(a - b).add_own(expected)
        np.testing.assert_array_equal(out, expected)

    virtual.results(2, program)


@pytest.mark.parametrize("rule", ["ef14", "econtrol", "d-ec-sgd"])
def test_what_is_not_sent_is_in_the_errors(rule):
    """Law 5, the virtual iterate: sum of the results + mean e_i = sum of the mean gradients."""
    world = gathered(virtual.results(2, client_steps(rule, count=8, dense_steps=0)))
    wanted = sum(gaussian(client, D, np.float64, step=step) for client in range(CLIENTS) for step in range(8)) / CLIENTS
    np.testing.assert_allclose(sum(world["results"]) + world["local"]["e_i"].mean(axis=0), wanted, atol=1e-12)


def test_both_messages_are_counted():
    def program(comm):
        feedback = clients_feedback(comm, "d-ec-sgd", dense_steps=0)
        feedback.step(own_vectors(feedback.plan, 0))
        return feedback.plan.all_message_nbytes, feedback.sent_nbytes > feedback.plan.sent_nbytes > 0

    expected = sum(c.wire_nbytes(D, np.float64) for c in (TOP, RandK(0.3, seed=5))) * CLIENTS
    assert virtual.results(2, program) == [(expected, True)] * 2


def test_nothing_is_kept_of_silent_clients():
    def program(comm):
        plan = ClientsMean(comm, TOP, D, np.float64, clients=6)
        x = own_vectors(plan, 0).reshape(-1)
        participates = np.arange(plan.own) != 1
        plan.exchange(x, keep=Keep(lazy(x), into=np.zeros_like(x)), participates=participates if comm.Get_rank() else None)

    errors = virtual.run(2, program)
    assert all("keep= with clients that do not participate; nothing is kept for those" in str(error) for error in errors)
    assert [type(error) for error in errors] == [PeerError, OptionError]


def test_who_speaks_cannot_be_said_in_two_parts():
    """The rule chooses the clients of every step."""

    def program(comm):
        feedback = clients_feedback(comm, "ef21-pp")
        with pytest.raises(OptionError, match="ClientsMean: an exchange with participates cannot be split"):
            feedback.start(own_vectors(feedback.plan, 0))

    virtual.results(2, program)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_traffic_is_that_of_an_exchange_in_which_all_speak(n):
    def program(comm):
        plan = ClientsMean(comm, TOP, D, np.float64, clients=CLIENTS)
        plan.exchange(own_vectors(plan, 0).reshape(-1))
        assert plan.traffic.sent_nbytes == plan.sent_nbytes
        assert plan.traffic.dense_nbytes == GatherMean(comm, TOP, D, np.float64).traffic.dense_nbytes
        return plan.traffic

    rows = virtual.results(n, program)
    assert sum(row.sent_nbytes for row in rows) == sum(row.received_nbytes for row in rows)
