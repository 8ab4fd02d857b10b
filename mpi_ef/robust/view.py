"""What an aggregator sees: how far rows are from each other, not what they are; and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ef import kernels

__all__ = ["Answer", "View", "summed"]

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

    `weights` is (m, n + a) of sum 1 a row, or None: the rows themselves.
    """

    weights: Matrix | None
    low: int = 0
    high: int = 1
