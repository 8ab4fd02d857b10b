"""LIBSVM files, how rows are dealt out, and gradients against differences of values."""

import lzma

import numpy as np
import pytest
import virtual

from mpi_ef.collectives import ClientsMean
from mpi_ef.compress import TopK
from mpi_ef.errors import OptionError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.reproduce.libsvm import load_libsvm, split_rows
from mpi_ef.jobs.reproduce.problems import LeastSquares, LogisticRegression, rare_features, zeta_quadratics

SHAPES = {"phishing": (11055, 68), "mushrooms": (8124, 112), "a9a": (32561, 123), "w8a": (49749, 300)}


def file(tmp_path, text):
    path = tmp_path / "some"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("low", "high"), [("0", "1"), ("1", "2"), ("-1", "+1"), ("-1.0", "3")])
def test_two_labels_become_minus_and_plus_one(tmp_path, low, high):
    a, b = load_libsvm(
        file(tmp_path, f"{high} 1:0.5 4:-2\n# all of it is a comment\n\n{low}\n{low} 2:1e-3 # so is this\n")
    )
    assert b.tolist() == [1.0, -1.0, -1.0]
    assert a.tolist() == [[0.5, 0, 0, -2], [0, 0, 0, 0], [0, 0.001, 0, 0]]


@pytest.mark.parametrize(("text", "message"), [
    ("1 1:1\n-1 3:1 2:1\n", "is no LIBSVM file"),
    ("1 1:1\n-1 2:1 2:1\n", "is no LIBSVM file"),
    ("1 0:1\n-1 1:1\n", "indices begin with 1 and ascend"),
    ("1 1:1\n\n-1 1:x\n", "'x'"),
    ("one 1:1\n", "'one'"),
    ("1 1:1\n-1 17\n", "is no LIBSVM file"),
    ("1 1:inf\n-1 1:1\n", "has a NaN or Inf"),
    ("1 1:1\n1 1:2\n", "has 1 different labels"),
    ("1 1:1\n2 1:1\n3 1:1\n", "has 3 different labels"),
    ("", "has 0 different labels"),
])
def test_malformed_files(tmp_path, text, message):
    with pytest.raises(OptionError) as caught:
        load_libsvm(file(tmp_path, text))
    assert str(tmp_path / "some") in str(caught.value)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match=r"missing: cannot be read .*No such file"):
        load_libsvm(tmp_path / "missing")
    (tmp_path / "broken.xz").write_bytes(b"no archive")
    with pytest.raises(OptionError, match=r"broken\.xz: cannot be read"):
        load_libsvm(tmp_path / "broken.xz")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_real_sets(shared_data, name):
    from sklearn.datasets import load_svmlight_file

    a, b = load_libsvm(shared_data / f"{name}.libsvm.xz")
    assert a.shape == SHAPES[name]
    with lzma.open(shared_data / f"{name}.libsvm.xz") as stream:
        expected, labels = load_svmlight_file(stream)
    np.testing.assert_array_equal(a, expected.toarray())
    np.testing.assert_array_equal(b, np.where(labels == labels.max(), 1.0, -1.0))


def test_every_row_goes_to_one_client():
    """In order, equal numbers, and the last client has what remains."""
    parts = split_rows(103, 10)
    assert np.concatenate([np.arange(103)[part] for part in parts]).tolist() == list(range(103))
    assert [part.stop - part.start for part in parts] == [10] * 9 + [13]
    assert split_rows(4, 1) == [slice(0, 4)]
    with pytest.raises(OptionError, match="101 clients for 100 rows"):
        split_rows(100, 101)


def values(problem, x):
    """f_i(x) of all clients."""
    if not isinstance(problem, LogisticRegression | LeastSquares):
        return 0.5 * problem.scales * float(x @ x) - problem.shifts @ x
    regular = problem.weight * float((x * x / (1.0 + x * x)).sum())
    if isinstance(problem, LogisticRegression):
        return np.array([np.logaddexp(0.0, -b * (a @ x)).mean() + regular for a, b in problem.parts])
    return np.array([((a @ x - b) ** 2).mean() + regular for a, b in problem.parts])


def test_gradients_are_those_of_the_values():
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=(7, 5)), np.where(rng.random(7) < 0.5, 1.0, -1.0)) for _ in range(3)]
    for problem in (
        LogisticRegression(rows),
        LeastSquares(rows),
        LeastSquares(rows, weight=0.3),
        rare_features(range(3), 5, 5, 2, samples=4),
        zeta_quadratics(range(1, 4), 6, 5, 3.0, seed=0),
    ):
        x, h = rng.normal(size=5), 1e-6
        for j, unit in enumerate(np.eye(5)):
            slope = (values(problem, x + h * unit) - values(problem, x - h * unit)) / (2 * h)
            np.testing.assert_allclose(problem.gradients(x)[:, j], slope, atol=1e-7)
            # No direction is curved more than the bound.
            bend = np.abs(problem.gradients(x + h * unit) - problem.gradients(x)) @ np.ones(5) / h
            assert (bend <= np.sqrt(5) * problem.client_smoothness() + 1e-4).all()
        for client, largest in enumerate(problem.client_smoothness()):
            h_i = np.array([problem.curvature(unit)[client] for unit in np.eye(5)])
            np.testing.assert_allclose(np.abs(np.linalg.eigvalsh(h_i)).max(), largest, rtol=1e-12)


def test_rare_features_are_rare():
    """Every feature is known to as many clients as asked for; Hessians have the eigenvalues asked for on them."""
    n, d, owners = 20, 80, 6
    problem = rare_features(range(n), n, d, owners, samples=6, seed=1)
    known = np.array([(a != 0).any(axis=0) for a, _ in problem.parts])
    assert (known.sum(axis=0) == owners).all()
    halves = [rare_features(own, n, d, owners, samples=6, seed=1) for own in (range(7), range(7, n))]
    x = np.random.default_rng(0).normal(size=d)
    np.testing.assert_array_equal(np.concatenate([half.gradients(x) for half in halves]), problem.gradients(x))
    assert not problem.gradients(x)[~known].any()
    for client, (a, b) in enumerate(problem.parts):
        hessian = np.linalg.eigvalsh(2 / b.size * a.T @ a)[-6:]
        expected = (0.9 * np.sqrt(19 * np.linspace(0, 1, 6) + 1) + (client == 0)) ** 2
        np.testing.assert_allclose(hessian, expected, rtol=1e-9)


def test_clients_do_not_agree_by_zeta():
    for n in (4, 50):
        problem = zeta_quadratics(range(n), n, 400, 10.0, seed=0)
        optimum = problem.shifts.mean(axis=0) / problem.scales.mean()
        assert np.sqrt(np.mean((problem.shifts**2).sum(axis=1)) / 400 * n) == pytest.approx(10.0, rel=0.1)
        assert np.allclose(problem.gradients(optimum).mean(axis=0), 0, atol=1e-9)


def test_ef21_prox():
    """With the 1-norm the soft-thresholded mean, which is what quadratics ask for: docs/algorithms.md."""
    targets = np.random.default_rng(0).normal(size=(4, 12))

    def soft(x, threshold):
        return np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0)

    def program(comm):
        feedback = ErrorFeedback("ef21", ClientsMean(comm, TopK(k=3), 12, np.float64, clients=4), dense_steps=1)
        x = np.ones(12)
        for _ in range(1500):
            x = soft(x - 0.05 * feedback.step(x - targets), 0.05 * 0.4)
        return x

    (x,) = virtual.results(1, program)
    np.testing.assert_allclose(x, soft(targets.mean(axis=0), 0.4), atol=1e-8)
    assert (x == 0).sum() == (abs(targets.mean(axis=0)) < 0.4).sum() > 0
