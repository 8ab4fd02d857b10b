"""Many trainings at once over virtual ranks: each model goes the way of its own training, whatever is late."""

import numpy as np
import pytest
import virtual
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_ef.coded import GC, MSGC, SRSGC, ManyTrainings, profile_of, serve_many
from mpi_ef.errors import (
    DisagreementError,
    DtypeError,
    MpiEfError,
    NonFiniteError,
    OptionError,
    ShapeError,
    SilenceError,
)

D, SAMPLES = 5, 24
SCHEMES = [(GC(0), 3), (GC(1), 4), (SRSGC(1, 2, 2), 4), (SRSGC(2, 3, 2), 4), (SRSGC(1, 2, 3), 5), (MSGC(1, 3, 4), 4),
           (MSGC(1, 2, 1), 4), (MSGC(2, 3, 1), 4), (MSGC(1, 3, 1), 5), (MSGC(2, 2, 3), 3)]
EXHAUSTIVE = pytest.mark.exhaustive
both = pytest.mark.parametrize("eager", [False, True], ids=["synchronous", "eager"])
schemes = pytest.mark.parametrize(("scheme", "n"), SCHEMES, ids=str)


def same_bits(one, other):
    return one.tobytes() == other.tobytes()


def sample_gradient(x, model, sample, t):
    return np.random.default_rng((model, sample, t)).standard_normal(D) + np.cos(x * (sample + 1 + model))


def gradient_of(comm, pauses=lambda rank, model, t: 0.01, seen=None):
    """Return the sum of gradients; the whole of a job takes `pauses`."""
    def gradient(x, model, samples, t):
        assert samples.step == 1
        assert 0 <= samples.start < samples.stop <= SAMPLES
        assert not x.flags.writeable
        comm.pause(pauses(comm.Get_rank(), model, t) * len(samples) / SAMPLES)
        if seen is not None:
            seen.append((model, t))
        total = np.zeros(D)
        for sample in samples:
            total += sample_gradient(x, model, sample, t)
        return total
    return gradient


def start(models):
    return np.arange(models * D, dtype=np.float64).reshape(models, D) / 10


def plain(models, steps):
    """Each training by itself."""
    xs = start(models)
    for model in range(models):
        for t in range(steps):
            whole = sum(sample_gradient(xs[model], model, sample, t) for sample in range(SAMPLES))
            xs[model] -= 0.05 / SAMPLES * whole
    return xs


def descend(x, g, model, t):
    x -= 0.05 * g


def trained(n, scheme, models, steps, pauses=lambda rank, model, t: 0.01, *, eager=False, **options):
    """Return xs of rank 0, and what each rank has computed and has got."""
    def program(comm):
        seen, xs = [], start(models) if comm.Get_rank() == 0 else np.zeros((models, D))
        served = serve_many(comm, gradient_of(comm, pauses, seen), xs, scheme, samples=SAMPLES, step=descend, steps=steps,
                            **options)
        assert served.missing == ()
        return served.xs, seen, served.metrics, comm.clock()

    return virtual.results(n, program, eager=eager)


def sleeper(seed, n, share=0.4):
    """All but rank 0 may sleep; a sleeping one takes up to fifty times as long."""
    def pauses(rank, model, t):
        rng = np.random.default_rng((seed, rank, model, t))
        return float(rng.choice([0.05, 0.5])) if rank and rng.random() < share else 0.01
    return pauses


@pytest.mark.parametrize(("rule", "eager"), [
    ("lazy", False), ("paper", True), pytest.param("lazy", True, marks=EXHAUSTIVE),
    pytest.param("paper", False, marks=EXHAUSTIVE)])
@schemes
def test_each_model_goes_the_way_of_its_own_training(scheme, n, rule, eager):
    models = scheme.delay + 2
    result, *workers = trained(n, scheme, models, 4, sleeper(0, n), rule=rule, eager=eager)
    np.testing.assert_allclose(result[0], plain(models, 4), rtol=1e-12)
    for xs, seen, _, _ in workers:
        assert same_bits(xs, result[0])
        assert all(0 <= t < 4 for _, t in seen)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(0, len(SCHEMES) - 1), st.booleans())
def test_law_any_pattern_of_sleepers(seed, which, dedicated):
    scheme, n = SCHEMES[which]
    models = scheme.delay + 1 + seed % 2
    result = trained(n + dedicated, scheme, models, 3, sleeper(seed, n + dedicated, 0.7), dedicated=dedicated,
                     grace=seed % 3 / 2)[0]
    np.testing.assert_allclose(result[0], plain(models, 3), rtol=1e-12)


@pytest.mark.parametrize(("scheme", "n"), [SCHEMES[1], SCHEMES[3], SCHEMES[7], (SRSGC(1, 2, 2), 6), (MSGC(1, 2, 1), 6)],
                         ids=str)
def test_with_codes_of_repetition_a_model_is_the_same_bits_whoever_is_late(scheme, n):
    models = scheme.delay + 1
    expected = trained(n, scheme, models, 4)[0][0]
    for seed in range(3):
        assert same_bits(trained(n, scheme, models, 4, sleeper(seed, n, 0.7))[0][0], expected)


@both
def test_late_answers_count_and_a_worker_that_wakes_gets_the_newest_tasks(eager):
    """Rank 2 sleeps in its third task for 20 rounds: its answer is late, it gets one order for that, and others go on."""
    slow = lambda rank, model, t: 0.1 if rank == 2 and (model, t) == (0, 1) else 0.01  # noqa: E731
    result, *workers = trained(4, SRSGC(1, 2, 2), 2, 20, slow, eager=eager)
    np.testing.assert_allclose(result[0], plain(2, 20), rtol=1e-12)
    assert result[2]["late"] >= 1
    assert result[3] < 40 * 0.006 + 0.1  # half of a job takes .005
    seen = workers[1][1]
    assert seen[:3] == [(0, 0), (1, 0), (0, 1)]
    assert 4 <= seen[3][1] <= 7
    assert len(seen) == len(set(seen))


def test_a_scheme_with_delay_does_not_wait_for_a_worker_that_uncoded_waits_for():
    """Rank 1 takes fifty times as long every eighth time; a round of the others takes twice as long."""
    def pauses(rank, model, t):
        return 2.0 if rank == 1 and (2 * t + model) % 8 == 0 else 0.04

    uncoded, coded = (trained(4, scheme, 2, 24, pauses)[0][3] for scheme in (GC(0), SRSGC(1, 2, 2)))
    assert uncoded > 6 * 0.5
    assert coded < 0.4 * uncoded


@both
def test_a_silent_worker_is_named(eager, capsys):
    """One more than the scheme can do without; the server does not wait for ever, and the others learn of it."""
    def program(comm):
        asleep = lambda rank, model, t: 1e4 if rank in {1, 3} and t == 1 else 0.01  # noqa: E731
        with pytest.raises(MpiEfError) as caught:
            serve_many(comm, gradient_of(comm, asleep), start(2), SRSGC(1, 2, 2), samples=SAMPLES, step=descend, steps=5,
                       patience_seconds=3.0)
        return str(caught.value), type(caught.value)

    (text, kind), (told, _), *_ = virtual.results(4, program, eager=eager)
    assert kind is SilenceError
    assert text.startswith("ManyTrainings: rank 1 on node 1, rank 3 on node 3 silent for 3 s in round 3; step 1 of model ")
    assert "cannot be decoded without" in text
    assert "the server, rank 0, has failed" in told


def test_a_worker_that_does_not_come_to_the_end_is_named(capsys):
    class Gone(Exception):
        pass

    def program(comm):
        def gradient(x, model, samples, t):
            if comm.Get_rank() == 1 and t == 2:
                comm.pause(100.0)
                raise Gone
            return gradient_of(comm)(x, model, samples, t)

        try:
            served = serve_many(comm, gradient, start(2), SRSGC(1, 2, 2), samples=SAMPLES, step=descend, steps=6,
                                patience_seconds=3.0)
        except Gone:
            return (), comm.clock()
        return served.missing, served.xs

    (missing, xs), (_, gone), *_ = virtual.results(4, program)
    assert missing == (1,)
    assert gone > 100
    np.testing.assert_allclose(xs, plain(2, 6), rtol=1e-12)
    assert capsys.readouterr().err.count("rank 1 on node 1 did not come to the end") == 1


def test_a_model_that_diverges_ends_alone(capsys):
    def program(comm):
        def gradient(x, model, samples, t):
            whole = gradient_of(comm)(x, model, samples, t)
            return whole * np.nan if model == 1 and t >= 2 else whole

        served = serve_many(comm, gradient, start(3), SRSGC(1, 2, 2), samples=SAMPLES, step=descend, steps=5)
        return served.xs, served.ended

    xs, ended = virtual.results(4, program)[0]
    assert ended == {1: 2}
    np.testing.assert_allclose(xs[[0, 2]], plain(3, 5)[[0, 2]], rtol=1e-12)
    np.testing.assert_allclose(xs[1], plain(3, 2)[1], rtol=1e-12)
    assert capsys.readouterr().err == ("mpi-ef: ManyTrainings: model 1 ends: its gradient of step 2 is not finite; take a "
                                       "smaller learning rate\n")


def test_where_all_models_diverge_it_raises():
    def program(comm):
        with pytest.raises(MpiEfError) as caught:
            serve_many(comm, lambda x, *_: np.full(D, np.inf), start(2), GC(1), samples=SAMPLES, step=descend, steps=5)
        return type(caught.value), str(caught.value)

    kind, text = virtual.results(2, program)[0]
    assert kind is NonFiniteError
    assert "all models have ended, the last one is model 1 ends: its gradient of step 0 is not finite" in text


@schemes
def test_runs_follow_each_other_and_extras_are_sums_over_samples(scheme, n):
    """What is late in one run is none of the next; models have jobs of different sizes."""
    models = scheme.delay + 1
    sizes = [SAMPLES - 5 * model for model in range(models)]

    def program(comm):
        plain_gradient = gradient_of(comm, sleeper(5, n, 0.6))

        def gradient(x, model, samples, t):
            assert samples.stop <= sizes[model]
            return plain_gradient(x, model, samples, t), (float(sum(samples)), t * len(samples))

        many = ManyTrainings(comm, gradient, models, D, np.float64, scheme, samples=sizes, extras=2)
        if not many.is_server:
            many.work()
            return None
        xs, told = start(models), []
        with many:
            for first in (0, 2):
                for model, t, g, extras in many.run(xs, 2, first):
                    np.testing.assert_allclose(extras, [sum(range(sizes[model])), t * sizes[model]], rtol=1e-12)
                    told.append((model, t))
                    xs[model] -= 0.05 * g
            assert many.close(xs) == ()
        assert sorted(told) == [(model, t) for model in range(models) for t in range(4)]
        rows = many.lateness.rows
        assert rows.shape[1] == n
        assert profile_of(rows).shape == rows.shape
        return xs

    xs = virtual.results(n, program)[0]
    expected = start(models)
    for model, size in enumerate(sizes):
        for t in range(4):
            whole = sum(sample_gradient(expected[model], model, sample, t) for sample in range(size))
            expected[model] -= 0.05 / size * whole
    np.testing.assert_allclose(xs, expected, rtol=1e-12)


@pytest.mark.parametrize(("change", "line"), [
    ({"scheme": SRSGC(2, 3, 2), "xs": start(2)}, "SRSGC(2, 3, 2) is for 3 models or more, and here are 2 models"),
    ({"scheme": "sgc:1"}, "scheme 'sgc:1' is not known"),
    ({"scheme": MSGC(1, 2, 9)}, "MSGC: lam=9 of 4 workers cannot be slow"),
    ({"samples": 0}, "ManyTrainings: samples=0"),
    ({"samples": [3]}, "ManyTrainings: samples=[3] are of 1 models; there are 2"),
    ({"rule": "lasy"}, "ManyTrainings: there is no rule 'lasy'; did you mean lazy?"),
    ({"grace": -1.0}, "ManyTrainings: grace=-1"),
    ({"patience_seconds": 0.0}, "ManyTrainings: patience_seconds=0"),
    ({"gradient": None}, "ManyTrainings: gradient=None cannot be called"),
    ({"xs": np.zeros(5)}, "serve_many: xs="),
    ({"xs": np.zeros((2, 5), np.float16)}, "ManyTrainings: dtype=float16 is neither"),
    ({"steps": -1}, "serve_many: steps=-1"),
])
def test_what_cannot_be_is_refused_on_all_ranks(change, line):
    def program(comm):
        options = {"gradient": gradient_of(comm), "xs": start(2), "scheme": SRSGC(1, 2, 2), "samples": SAMPLES,
                   "step": descend, "steps": 1} | change
        with pytest.raises(MpiEfError) as caught:
            serve_many(comm, **options)
        return str(caught.value)

    for told in virtual.results(4, program):
        assert line in told


def test_ranks_agree_on_what_they_build():
    def program(comm):
        with pytest.raises(DisagreementError, match="samples"):
            serve_many(comm, gradient_of(comm), start(2), GC(0), samples=5 + comm.Get_rank(), step=descend, steps=1)

    virtual.results(2, program)


@pytest.mark.parametrize(("answer", "kind", "line"), [
    (np.zeros(3), ShapeError, r"gradient\(\) has returned shape \(3,\), where \(5,\) was expected"),
    ((np.zeros(5), [1.0]), OptionError, r"gradient\(\) has returned 1 extras; it was built for 0"),
    ((np.zeros(5), 1.0), OptionError, r"gradient\(\) has returned 1 extras; it was built for 0, in a sequence"),
    (np.zeros(5, complex), DtypeError, r"gradient\(\) has returned complex128; it was built for float64"),
    ([[1.0], [2.0, 3.0]], DtypeError, "of which no array can be made"),
    (np.ma.masked_less(np.zeros(5), 2), DtypeError, "has returned a masked array"),
    ((np.zeros(5), [], 3), OptionError, "has returned a tuple of 3"),
])
def test_a_gradient_that_does_not_fit_is_one_line(answer, kind, line):
    def program(comm):
        if comm.Get_rank() == 0:
            with pytest.raises(kind, match=line):
                serve_many(comm, lambda *_: answer, start(2), GC(0), samples=4, step=descend, steps=1)
        else:
            with pytest.raises(MpiEfError, match=line):
                serve_many(comm, lambda *_: answer, start(2), GC(0), samples=4, step=descend, steps=1)

    virtual.results(2, program)


@pytest.mark.parametrize(("options", "line"), [
    ({"step": lambda *_: 1.0}, r"step\(\) has returned shape \(\), where \(5,\)"), ({"step": 3}, "step=3 cannot be called"),
    ({"step": lambda x, *_: x + 1j}, "has returned complex128"), ({"scheme": None}, "scheme None is not known"),
    ({"xs": np.ma.zeros((2, 5))}, "xs is a masked array")])
def test_steps_and_arguments_that_do_not_fit_are_one_line(options, line):
    given = {"xs": start(2), "scheme": "gc:0", "step": descend} | options
    with pytest.raises(MpiEfError, match=line):
        virtual.results(2, lambda comm: serve_many(comm, lambda x, *_: x, given["xs"].copy(), given["scheme"], samples=4,
                                                   step=given["step"], steps=1))


def test_misuse_is_one_line_each():
    def program(comm):
        many = ManyTrainings(comm, gradient_of(comm), 2, D, np.float64, GC(0), samples=4)
        if not many.is_server:
            with pytest.raises(OptionError, match="run is the server's"):
                next(many.run(start(2), 1))
            many.work()
            return
        with many:
            with pytest.raises(OptionError, match=r"work\(\) is the workers'"):
                many.work()
            with pytest.raises(OptionError, match=r"is no NumPy array of shape \(2, 5\)"):
                next(many.run(start(3), 1))
            going = many.run(start(2), 3)
            next(going)
            with pytest.raises(OptionError, match=r"another run\(\) has not come to its end"):
                next(many.run(start(2), 1))
            assert len(list(going)) == 5
            many.close(start(2))
            with pytest.raises(OptionError, match="it is closed"):
                next(many.run(start(2), 1))

    virtual.results(2, program)
