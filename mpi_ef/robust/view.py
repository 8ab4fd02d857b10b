"""What an aggregator sees: how far rows are from each other, not what they are; and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import index
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ef import kernels
from mpi_ef.errors import OptionError, briefly

__all__ = ["Answer", "View", "checked", "summed"]

Matrix = NDArray[np.float64]


def summed(x: Matrix) -> Matrix:
    """Return the sums over the last axis, in order: the same bits on every processor. Local."""
    return np.cumsum(x, axis=-1)[..., -1] if x.shape[-1] else np.zeros(x.shape[:-1])


@dataclass(frozen=True)
class View:
    """m mixtures of n clients' rows, and of anchors: further rows, the origin for example.

    Attributes
    ----------
    measure : callable
        ``measure(w)`` returns the squared distances, (n + a,), of all rows and anchors to the mixture w, (n + a,), of sum 1,
        from true differences. Collective where ranks share the columns.
    distances : callable
        Returns the squared distances of mixtures and anchors, (m + a, m + a).
    anchors : tuple of str
        Those that there are, in order.
    n : int
        Rows that are mixed.
    step : int
        The key of what is drawn.
    weights : (m + a, n + a) float64, optional
        The mixtures, of sum 1 a row, with the anchors as they are; None: the rows themselves.
    """

    measure: Callable[[Matrix], Matrix]
    distances: Callable[[], Matrix]
    anchors: tuple[str, ...]
    n: int
    step: int = 0
    weights: Matrix | None = None

    @property
    def m(self) -> int:
        """The number of mixtures."""
        return self.n if self.weights is None else len(self.weights) - len(self.anchors)

    def place(self, anchor: str) -> int:
        """Return which row of :attr:`distances` is that of an anchor. Local."""
        return self.m + self.anchors.index(anchor)

    def of_rows(self, mixtures: Matrix) -> Matrix:
        """Return what mixtures of these mixtures, (k, m + a), are of the rows, (k, n + a). Local."""
        if self.weights is None:
            return mixtures
        return summed((mixtures[:, :, None] * self.weights).swapaxes(1, 2))

    def mixed(self, mixtures: Matrix) -> "View":
        """Return the view of mixtures, (k, m + a), of these ones. Local."""
        a = len(self.anchors)
        anchors = np.zeros((a, self.m + a))
        anchors[:, self.m :] = np.eye(a)
        own = np.vstack([mixtures, anchors])
        known: list[Matrix] = []

        def distances() -> Matrix:
            if not known:
                known.append(np.zeros((len(own), len(own))))
                kernels.mixed_distances(self.distances(), own, known[0])
            return known[0]

        return replace(self, distances=distances, weights=self.of_rows(own))

    def distances_to(self, mixture: Matrix) -> Matrix:
        """Return the squared distances, (m,), of the mixtures to one of them and the anchors, (m + a,). Local.

        ``D(z)_i = sum_j w_j D_ij - 1/2 sum_jk w_j w_k D_jk``.
        """
        known = self.distances()
        near = summed(known * mixture)
        apart: Matrix = np.maximum(near - 0.5 * summed(mixture * near), 0.0)
        return apart[: self.m]


class Answer(NamedTuple):
    """How rows become one: the mean of the sorted ``low ... high - 1`` of the mixtures `weights`, entry by entry.

    `weights` is (m, n + a), m at most n, of sum 1 a row, or None: the rows themselves.
    """

    weights: Matrix | None
    low: int = 0
    high: int = 1


def checked(answer: object, n: int, a: int, subject: str) -> Answer:
    """Return an answer for n rows and `a` anchors with contiguous weights; raise `OptionError` where it is none. Local."""
    if not isinstance(answer, Answer):
        raise OptionError(f"{subject}: it answers {briefly(answer)}; return an Answer of weights, low and high")
    m, weights = n, None
    if answer.weights is not None:
        try:
            weights = np.ascontiguousarray(answer.weights, np.float64)
        except (TypeError, ValueError) as error:
            raise OptionError(f"{subject}: it answers with weights={briefly(answer.weights)}; return an array") from error
        m = len(weights)
        if weights.ndim != 2 or not 1 <= m <= n or weights.shape[1] != n + a:
            raise OptionError(f"{subject}: it answers with weights of shape {weights.shape}; return 1 to {n} rows of "
                              f"{n + a}, one of each client and anchor")
        if not (np.abs(summed(weights) - 1.0) <= 1e-6).all():
            raise OptionError(f"{subject}: it answers with weights of which the sums are {briefly(summed(weights).tolist())}"
                              "; return rows of sum 1, without NaN")
    try:
        low, high = index(answer.low), index(answer.high)
    except TypeError:
        low = high = -1
    if not 0 <= low < high <= m:
        raise OptionError(f"{subject}: it answers with low={briefly(answer.low)}, high={briefly(answer.high)}; return "
                          f"whole numbers, 0 <= low < high <= {m}")
    return Answer(weights, low, high)
