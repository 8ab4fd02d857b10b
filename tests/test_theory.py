"""Constants and step sizes against the numbers that are known."""

import numpy as np
import pytest
import virtual

from mpi_ef.errors import OptionError
from mpi_ef.feedback.theory import Smoothness, beta, step_size, theta, three_point, xi
from mpi_ef.jobs.reproduce.problems import LogisticRegression, smoothness

SOME = Smoothness(1.0, (1.0, 2.0, 3.0, 6.0))


def test_constants():
    assert xi(0.1) == pytest.approx(18.4868, abs=1e-4)
    assert xi(1.0) == 0.0
    assert (theta(1.0), beta(1.0)) == (1.0, 0.0)
    for alpha in (1e-6, 0.01, 0.3, 0.999):
        assert xi(alpha) == pytest.approx(np.sqrt(beta(alpha) / theta(alpha)), rel=1e-9)
    assert SOME.arithmetic_mean == 3.0
    assert SOME.quadratic_mean == pytest.approx(np.sqrt(12.5))
    assert SOME.reach(1) == 3.0  # sqrt(1/4) * 6 < sqrt(12.5)
    assert SOME.reach(4) == SOME.quadratic_mean
    assert three_point(0.1, zeta=0.0) == (theta(0.1), beta(0.1))
    assert three_point(1.0, zeta=4.0) == (1.0, 4.0)


def test_step_sizes():
    """A lossless compressor leaves 1 / L; weights and rare features never make the step smaller; more silence does."""
    for rule in ("ef21", "ef21-plus", "ef21-w", "gd", "clag"):
        options = {"zeta": 0.0} if rule == "clag" else {}
        assert step_size(rule, SOME, 1.0, **options) == 1.0
    assert step_size("ef21", SOME, 0.1) == pytest.approx(1 / (1 + np.sqrt(12.5) * 18.4868), rel=1e-5)
    assert step_size("ef21-w", SOME, 0.1) == pytest.approx(1 / (1 + 3 * 18.4868), rel=1e-5)
    assert step_size("ef21-rare", SOME, 0.1, c=1) == pytest.approx(1 / (1 + 0.5 * 3 * 18.4868), rel=1e-5)
    assert step_size("ef21-rare", SOME, 0.1, c=4) == pytest.approx(step_size("ef21", SOME, 0.1))
    assert step_size("ef21-sgdm", SOME, 0.1, eta=0.1) == pytest.approx(min(0.1 / (20 * np.sqrt(12.5)), 0.1 / 7))
    assert step_size("ef21-sgd2m", SOME, 0.9, eta=0.01) == pytest.approx(0.01 / 16)
    assert step_size("ef21-pp", SOME, 0.5, participation=1.0) == step_size("ef21", SOME, 0.5)
    for rule, plain in (("ef21-pp", "ef21"), ("ef21-w-pp", "ef21-w")):
        sizes = [step_size(rule, SOME, 0.5, participation=p) for p in (0.1, 0.5, 0.9, 1.0)]
        assert sizes == sorted(sizes)
        assert sizes[-1] == step_size(plain, SOME, 0.5)
    for rule in ("ef21", "ef21-w"):
        assert step_size(f"{rule}-sgd", SOME, 0.1) == step_size(rule, SOME, 0.05)
        assert step_size(rule, SOME, 1.0, mu=0.5) == 1.0  # gradient descent, whatever mu is
        assert step_size(rule, SOME, 1e-4, mu=1.0) < step_size(rule, SOME, 1e-4)
    assert step_size("ef21", SOME, 0.1, mu=1e-3) == pytest.approx(1 / (1 + np.sqrt(25) * 18.4868), rel=1e-5)
    assert step_size("ef21", Smoothness(1.0, (1e-9,)), 0.1, mu=1.0) == pytest.approx(theta(0.1) / 2)
    assert step_size("marina", SOME, 1.0) == 1.0
    assert step_size("marina", SOME, 0.1) == pytest.approx(1 / (1 + np.sqrt(0.9 * 9 / (0.1 * 4))))
    sizes = [step_size("clag", SOME, 0.5, zeta=zeta) for zeta in (100.0, 10.0, 0.0)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("call", "text"), [
    (lambda: step_size("ef14", SOME, 0.1), "needs bounded gradients"),
    (lambda: step_size("nonsense", SOME, 0.1), "there are formulas for gd, ef21"),
    (lambda: step_size("ef21", SOME, 0.0), "alpha=0.0 is not in (0, 1]"),
    (lambda: step_size("ef21", SOME, 1.5), "alpha=1.5 is not in (0, 1]"),
    (lambda: step_size("ef21", SOME, 0.5, mu=2.0), "mu=2.0 is not in (0, 1]"),
    (lambda: step_size("d-ec-sgd", SOME, 0.5), "tune it near"),
    (lambda: step_size("ef21-sgdm", SOME, 0.1), "eta"),
    (lambda: step_size("ef21-sgdm", SOME, 0.1, eta=2.0), "eta=2.0 is not in (0, 1]"),
    (lambda: step_size("ef21-rare", SOME, 0.1, c=5), "c=5 is not in 1 ... n=4"),
    (lambda: step_size("ef21-pp", SOME, 1e-4, participation=0.01), "gives no step size"),
    (lambda: step_size("clag", SOME, 0.1, zeta=-1.0), "zeta=-1.0 is negative"),
    (lambda: Smoothness(1.0, ()), "one L_i a client"),
    (lambda: Smoothness(-1.0, (1.0,)), "pass positive numbers"),
])
def test_formulas_say_when_they_do_not_apply(call, text):
    with pytest.raises(OptionError) as caught:
        call()
    assert text in str(caught.value)


def test_smoothness_without_gathering_data():
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(9 + c, 6)), np.ones(9 + c)) for c in range(5)]
    whole = np.mean([a.T @ a / (4 * b.size) for a, b in parts], axis=0)

    def program(comm):
        bounds = [0, 5] if comm.Get_size() == 1 else [0, 3, 5]
        own = slice(bounds[comm.Get_rank()], bounds[comm.Get_rank() + 1])
        return smoothness(comm, LogisticRegression(parts[own]), 5)

    (one,), (first, second) = virtual.results(1, program), virtual.results(2, program)
    assert one == first == second
    assert one.whole == pytest.approx(np.linalg.eigvalsh(whole)[-1] + 0.2, rel=1e-12)
    assert one.clients == tuple(np.linalg.norm(a, 2) ** 2 / (4 * b.size) + 0.2 for a, b in parts)
