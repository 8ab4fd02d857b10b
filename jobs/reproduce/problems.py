"""Optimization problems of the papers, distributed over clients: gradients, and the constants of the theory.

A problem holds the parts of some consecutive clients, those of one rank; what a client computes is a function of its part
alone. ``f`` is the mean of all clients' ``f_i``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import ClientsMean
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Identity
from mpi_ef.feedback.theory import Smoothness

__all__ = ["LeastSquares", "LogisticRegression", "Problem", "Quadratics", "Vector", "rare_features", "smoothness",
           "zeta_quadratics"]

Vector = NDArray[np.float64]


class Problem(Protocol):
    """What the experiments need of a problem."""

    @property
    def d(self) -> int:
        """Number of unknowns."""

    def gradients(self, x: Vector) -> Vector:
        """Return the gradients of these clients at `x`, (m, d)."""

    def curvature(self, direction: Vector) -> Vector:
        """Return the bounds H_i on the Hessians of these clients times `direction`, (m, d)."""

    def client_smoothness(self) -> Vector:
        """Return the largest eigenvalues of the H_i in magnitude, (m,)."""


@dataclass(frozen=True)
class _Regression(ABC):
    """``f_i(x) = mean_j loss(a_j x, b_j) + weight * sum_l x_l^2 / (1 + x_l^2)``."""

    parts: Sequence[tuple[Vector, Vector]]  # (A_i, b_i), (m_i, d) and (m_i,), of these clients
    weight: float = 0.0  # of the nonconvex regulariser, whose second derivative is at most 2
    content: str = ""  # of the file from which the rows of all clients were read

    bend: ClassVar[float]  # the largest second derivative of the loss

    @staticmethod
    @abstractmethod
    def slope(product: Vector, b: Vector) -> Vector:
        """Return the derivatives of the losses of rows by their products with x."""

    @property
    def d(self) -> int:
        """Number of unknowns."""
        return int(self.parts[0][0].shape[1])

    def gradients(self, x: Vector) -> Vector:
        """Return the gradients of these clients at `x`, (m, d)."""
        regular = self.weight * 2.0 * x / (1.0 + x * x) ** 2
        return np.array([a.T @ self.slope(a @ x, b) / b.size + regular for a, b in self.parts])

    def curvature(self, direction: Vector) -> Vector:
        """Return ``(bend A_i^T A_i / m_i + 2 weight) direction`` of these clients, (m, d)."""
        products = np.array([a.T @ (a @ direction) / b.size for a, b in self.parts])
        return self.bend * products + 2 * self.weight * direction

    def client_smoothness(self) -> Vector:
        """Return ``L_i = bend lambda_max(A_i^T A_i) / m_i + 2 weight`` of these clients, (m,)."""
        return np.array([self.bend * np.linalg.norm(a, 2) ** 2 / b.size for a, b in self.parts]) + 2 * self.weight


@dataclass(frozen=True)
class LogisticRegression(_Regression):
    """The loss is ``log(1 + exp(-b_j a_j x))``, b_j in {-1, +1} (EF21, arXiv 2106.05203). See :class:`_Regression`."""

    weight: float = 0.1

    bend = 0.25

    @staticmethod
    def slope(product: Vector, b: Vector) -> Vector:
        """Return ``-b / (1 + exp(b product))``."""
        slopes: Vector = -b / (1.0 + np.exp(b * product))
        return slopes


@dataclass(frozen=True)
class LeastSquares(_Regression):
    """The loss is ``(a_j x - b_j)^2``. See :class:`_Regression`."""

    bend = 2.0

    @staticmethod
    def slope(product: Vector, b: Vector) -> Vector:
        """Return ``2 (product - b)``."""
        slopes: Vector = 2.0 * (product - b)
        return slopes


def rare_features(clients: range, n: int, d: int, owners: int, *, samples: int = 12, mu: float = 1.0,
                  largest: float = 20.0, seed: int = 0) -> LeastSquares:
    """Return least squares in which every feature is known to `owners` of the n clients only (arXiv 2305.15264).

    A client's rows are zero outside of its features; the eigenvalues of its Hessian lie evenly between `mu` and `largest`,
    shrunk by 0.81, those of client 0 higher. After the authors' generator, where the text of the paper leaves things open.
    """
    rng = np.random.default_rng(seed)
    owned = np.zeros((n, d), np.bool_)
    for feature in range(d):
        owned[rng.permutation(n)[:owners], feature] = True
    parts = []
    for client in clients:
        rng = np.random.default_rng((seed, client))
        features = np.flatnonzero(owned[client])
        rank = min(samples, features.size)
        values = 0.9 * np.sqrt((largest - mu) * np.linspace(0.0, 1.0, rank) + mu) + (1.0 if client == 0 else 0.0)
        left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (samples, features.size))
        a = np.zeros((samples, d))
        a[:, features] = left @ (values[:, None] * right.T)
        b = a @ np.full(d, 0.5) + rng.uniform(-2.0, 2.0, samples)
        parts.append((np.sqrt(samples / 2) * a, np.sqrt(samples / 2) * b))
    return LeastSquares(parts)


@dataclass(frozen=True)
class Quadratics:
    """``f_i(x) = scale_i / 2 ||x||^2 - <shift_i, x>``, with gradients that differ at the optimum."""

    scales: Vector  # (m,)
    shifts: Vector  # (m, d)

    @property
    def d(self) -> int:
        """Number of unknowns."""
        return int(self.shifts.shape[1])

    def gradients(self, x: Vector) -> Vector:
        """Return the gradients of these clients at `x`, (m, d)."""
        return self.scales[:, None] * x - self.shifts

    def curvature(self, direction: Vector) -> Vector:
        """Return ``scale_i * direction`` of these clients, (m, d)."""
        return self.scales[:, None] * direction

    def client_smoothness(self) -> Vector:
        """Return the scales, (m,)."""
        return self.scales


def zeta_quadratics(clients: range, n: int, d: int, zeta: float, seed: int, *, equal: bool = False) -> Quadratics:
    """Return least squares with controlled heterogeneity (Koloskova et al. 2020, used by EControl, arXiv 2311.05645).

    ``f_i(x) = 1/2 ||A_i x - b_i||^2`` up to a constant, with ``A_i = (i / sqrt(n)) I``, ``b_i ~ N(0, (zeta / i)^2 I)`` for
    i = 1 ... n: the gradients at the optimum have size zeta whatever n is. With `equal`, ``A_i = I`` and
    ``b_i ~ N(0, zeta^2 I)``, which leaves the number of clients as the only difference between problems.
    """
    scales, shifts = np.empty(len(clients)), np.empty((len(clients), d))
    for row, client in enumerate(clients):
        i, normal = client + 1, np.random.default_rng((seed, client)).normal(size=d)
        a = 1.0 if equal else i / np.sqrt(n)
        scales[row] = a * a
        shifts[row] = a * normal * (zeta if equal else zeta / i)
    return Quadratics(scales, shifts)


def smoothness(comm: Comm, problem: Problem, clients: int) -> Smoothness:
    """Return L and the n L_i without gathering data: d products with a vector are exchanged, and n numbers. Collective.

    `problem` is this rank's part, as :class:`ClientsMean` deals clients out.
    """
    d = problem.d
    plan = ClientsMean(comm, Identity(), d, np.float64, clients=clients)
    mean, unit = np.zeros((d, d)), np.eye(d)
    for row, direction in zip(mean, unit, strict=True):
        plan.exchange(problem.curvature(direction).reshape(-1)).set_mean(row)
    own = [float(value) for value in problem.client_smoothness()]
    every = tuple(value for values in comm.allgather(own) for value in values)
    return Smoothness(float(np.abs(np.linalg.eigvalsh((mean + mean.T) / 2)).max()), every)
