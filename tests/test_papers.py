"""Published experiments that must come out: EF21 on LIBSVM data (arXiv 2106.05203, section 5)."""

import lzma

import numpy as np
import pytest
import virtual

from mpi_ef.collectives import GatherMean
from mpi_ef.compress import TopK
from mpi_ef.feedback import ErrorFeedback

CLIENTS = 20
LAMBDA = 0.1


def load(path):
    """Return A and b in {-1, +1} of a compressed LIBSVM file."""
    from sklearn.datasets import load_svmlight_file

    with lzma.open(path) as file:
        a, labels = load_svmlight_file(file)
    return a.toarray(), np.where(labels == labels.max(), 1.0, -1.0)


def gradient(a, b, x):
    """Gradient of mean log(1 + exp(-b a x)) + lambda sum x^2 / (1 + x^2), the paper's nonconvex logistic regression."""
    weight = -b / (1.0 + np.exp(b * (a @ x)))
    return a.T @ weight / b.size + LAMBDA * 2.0 * x / (1.0 + x * x) ** 2


def smoothness(a):
    return np.linalg.norm(a, 2) ** 2 / (4.0 * a.shape[0]) + 2.0 * LAMBDA


def shards(a, b):
    """Contiguous equal parts, the remainder on the last client, as in the authors' code."""
    size = b.size // CLIENTS
    stops = [size * (i + 1) for i in range(CLIENTS - 1)] + [b.size]
    return [(a[i * size : stop], b[i * size : stop]) for i, stop in enumerate(stops)]


def squared_gradient_norm(a, b, rule, *, k, factor, steps):
    parts = shards(a, b)
    alpha = k / a.shape[1]
    theta, beta = 1 - np.sqrt(1 - alpha), (1 - alpha) / (1 - np.sqrt(1 - alpha))
    l_qm = np.sqrt(np.mean([smoothness(part) ** 2 for part, _ in parts]))
    gamma = factor / (smoothness(a) + l_qm * np.sqrt(beta / theta))

    def program(comm):
        part, labels = parts[comm.Get_rank()]
        x = np.random.RandomState(0).normal(size=a.shape[1])
        plan = GatherMean(comm, TopK(k=k), x.size, np.float64)
        feedback = ErrorFeedback(rule, plan, dense_steps=int(rule == "ef21"))
        for _ in range(steps):
            g = gradient(part, labels, x)
            x -= gamma * feedback.step(g) if rule == "ef21" else feedback.step(gamma * g)
        return x

    x = virtual.results(CLIENTS, program)[0]
    # f is the mean of the clients' f_i, which are means over parts that are not all of the same size.
    whole = np.mean([gradient(part, labels, x) for part, labels in parts], axis=0)
    return float((whole**2).sum()), gamma / factor, l_qm


def test_ef21_on_phishing_reaches_the_published_accuracy(shared_data):
    """n = 20, Top-1, 16 times the theory step size, 650 steps: ||grad f||^2 = 3.2e-11 for EF21, 3.3e-5 for EF14."""
    a, b = load(shared_data / "phishing.libsvm.xz")
    assert a.shape == (11055, 68)
    reached, gamma, l_qm = squared_gradient_norm(a, b, "ef21", k=1, factor=16, steps=650)
    assert smoothness(a) == pytest.approx(0.362551, abs=1e-6)
    assert l_qm == pytest.approx(0.366085, abs=1e-6)
    assert gamma == pytest.approx(2.016e-2, abs=1e-5)
    print(f"||grad f||^2 after 650 steps: {reached:.3g}")
    assert reached < 3.2e-10
    stalled, _, _ = squared_gradient_norm(a, b, "ef14", k=1, factor=16, steps=650)
    assert 3.3e-6 < stalled < 3.3e-4
