"""An aggregator at work on rows of one shape: memory, blocks of columns, what has changed since the last step, suspects."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef import kernels
from mpi_ef.errors import DtypeError, NonFiniteError, OptionError, ShapeError, briefly

from .aggregators import Aggregator
from .columns import network
from .view import Answer, Matrix, View, checked

__all__ = ["PARTS", "Aggregation", "aggregate", "nearest_mean"]

PARTS = 64  # into which columns are cut, whoever holds them, so that sums over them are the same on any number of ranks
FARTHEST = 1e290  # squared; nothing is farther, and sums of distances are finite
Shared = tuple[Callable[[Matrix], Matrix], Callable[[NDArray[np.int64]], NDArray[np.int64]]]
_NONE = np.zeros((0, 2), np.int64)


class Aggregation:
    """``A(rows, f)`` for n rows of d entries, or for the part of their columns that this rank holds.

    Parameters
    ----------
    aggregator : Aggregator
    f, n, d : int
    dtype : numpy dtype
        float32 or float64.
    parts : (2,) int, optional
        This rank holds these of the 64 parts of the columns, ``first ... last - 1``; all by default.
    shared : two callables, optional
        Where ranks share the columns: ``total(x)`` makes of (parts of this rank, ...) float64 that of all parts, (64, ...);
        ``added(x)`` is the sum over the ranks of (k,) int64. Collective.

    Attributes
    ----------
    columns : slice
        Those that this rank holds.
    suspicion : (n,) float64
        After a call, from 0, no more than the others on average, to 1, always: the share of the other rows' mixtures that a
        row is missing from; where each is of one row, that of entries in which it was outside of what was kept, of those
        that have changed, or what it was clipped by; of a single mixture, what its weight lacks of 1 / n.
    """

    def __init__(self, aggregator: Aggregator, f: int, n: int, d: int, dtype: DTypeLike = np.float32, *,
                 parts: tuple[int, int] = (0, PARTS), shared: Shared | None = None) -> None:
        if not isinstance(aggregator, Aggregator):
            raise OptionError(f"aggregator={briefly(aggregator)} is none; take for example NNM(TrimmedMean())")
        self.aggregator, self.f, self.n, self.d = aggregator, aggregator.check(n, f), n, d
        self._bounds = [d * p // PARTS for p in range(PARTS + 1)]
        self.parts, self._shared = parts, shared
        self.columns = slice(self._bounds[parts[0]], self._bounds[parts[1]])
        self.width = self.columns.stop - self.columns.start
        a = len(aggregator.anchors)
        self._scratch = np.empty((3 * (n + a) + 1, kernels.ROBUST_BLOCK))
        self._anchors = np.zeros((a, self.width), dtype)
        self._outside = np.zeros(n, np.int64)
        self._every = np.zeros(0, np.int64)
        self._before: Answer | None = None  # of the last call; what it was for is still in `out`
        self.suspicion = np.zeros(n)

    def __call__(self, rows: NDArray[np.floating], out: NDArray[np.floating], *, step: int = 0,
                 changed: NDArray[np.int64] | None = None) -> NDArray[np.floating]:
        """Overwrite `out`, (width,), which has the last result, with that of `rows`, (n, width), and return it.

        Local, or collective where ranks share the columns.

        Parameters
        ----------
        step : int
            The key of what is drawn.
        changed : (c,) int64, ascending, optional
            The columns in which rows may differ from those of the last call, where there was one: only these are computed,
            as long as the mixtures are the same. The bits are those of a whole pass.
        """
        if rows.shape != (self.n, self.width) or out.shape != (self.width,):
            raise ShapeError(f"{self.aggregator}: rows of shape {rows.shape}, out of shape {out.shape}; pass "
                             f"({self.n}, {self.width}) and ({self.width},)")
        for anchor, name in zip(self._anchors, self.aggregator.anchors, strict=True):
            if name == "center":
                anchor[:] = out
        known: list[Matrix] = []

        def distances() -> Matrix:
            if not known:
                known.append(self._distances(rows))
            return known[0]

        view = View(lambda mixture: self._measured(rows, mixture), distances, self.aggregator.anchors, self.n, step)
        answer = checked(self.aggregator.answer(view, self.f), self.n, len(self._anchors), f"{self.aggregator}.answer")
        weights = answer.weights
        few = changed is not None and self._same(answer) and "center" not in self.aggregator.anchors
        m, owners = self.n if weights is None else len(weights), self._owners(weights)

        def combine(columns: NDArray[np.int64], *, every: bool) -> None:
            self._outside[:] = 0
            kernels.combine_columns(
                rows, self._anchors, np.zeros((0, 0)) if weights is None else weights, network(m) if m > 1 else _NONE,
                answer.low, answer.high, columns, every, self._scratch, self._outside, out)

        if not few:
            combine(self._every, every=True)
        if changed is not None and (few or owners is not None):  # who is outside is counted where something has changed
            combine(changed, every=False)
        self._before = answer
        self._suspect(weights, owners, answer.high - answer.low, self.width if changed is None else changed.size)
        return out

    def forget(self) -> None:
        """Compute all columns in the next call: `out` or the rows are others. Local."""
        self._before = None

    def _same(self, answer: Answer) -> bool:
        before = self._before
        if before is None or before[1:] != answer[1:] or (before.weights is None) != (answer.weights is None):
            return False
        return before.weights is None or answer.weights is None or np.array_equal(before.weights, answer.weights)

    def _distances(self, rows: Any) -> Matrix:
        n = self.n + len(self._anchors)
        mine = np.zeros((self.parts[1] - self.parts[0], n, n))
        for one, p in zip(mine, range(*self.parts), strict=True):
            start, stop = (bound - self.columns.start for bound in self._bounds[p : p + 2])
            kernels.add_distances(rows, self._anchors, start, stop, self._scratch, one)
        return self._summed(mine)

    def _measured(self, rows: Any, mixture: Matrix) -> Matrix:
        mine = np.zeros((self.parts[1] - self.parts[0], mixture.size))
        for one, p in zip(mine, range(*self.parts), strict=True):
            start, stop = (bound - self.columns.start for bound in self._bounds[p : p + 2])
            kernels.distances_to_mixture(rows, self._anchors, mixture, start, stop, self._scratch, one)
        return self._summed(mine)

    def _summed(self, mine: Matrix) -> Matrix:
        parts = mine if self._shared is None else self._shared[0](mine)
        total = parts[0].copy()
        with np.errstate(over="ignore", invalid="ignore"):
            for one in parts[1:]:
                total += one
        finite: Matrix = np.nan_to_num(np.minimum(total, FARTHEST), nan=FARTHEST)
        return finite

    def _owners(self, weights: Matrix | None) -> NDArray[np.intp] | None:
        """Return of which row each mixture is, where each is of one and no two of the same one, else None."""
        if weights is None:
            return np.arange(self.n)
        named = weights[:, : self.n] != 0
        owners = named.argmax(axis=1)
        alone = len(weights) == self.n and (named.sum(axis=1) == 1).all() and np.unique(owners).size == self.n
        return owners if alone else None

    def _suspect(self, weights: Matrix | None, owners: NDArray[np.intp] | None, kept: int, count: int) -> None:
        """Set :attr:`suspicion`, of what an aggregator has answered with."""
        shares = np.eye(self.n) if weights is None else weights[:, : self.n]
        m = len(shares)
        if owners is not None:
            counts = np.append(self._outside, count)
            counts = counts if self._shared is None else self._shared[1](counts)
            outside = _more_than(1.0 - kept / self.n, counts[:-1] / max(int(counts[-1]), 1))
            most = np.abs(shares).max(axis=1)
            self.suspicion[owners] = np.maximum(outside, 1.0 - most / most.max())
            return
        if m == self.n > 1:
            missing = (shares == 0).sum(axis=0) - (np.diagonal(shares) == 0)
            self.suspicion[:] = _more_than(missing.sum() / (m * (m - 1)), missing / (m - 1))
        else:
            mean = np.cumsum(shares, axis=0)[-1] / m
            self.suspicion[:] = 1.0 - np.clip(mean * self.n, 0.0, 1.0)


def _more_than(usual: float, shares: Matrix) -> Matrix:
    """Return how far shares are from the usual one to 1, from 0 to 1."""
    return np.maximum(0.0, (shares - usual) / (1.0 - usual)) if usual < 1.0 else np.zeros(len(shares))


def aggregate(rows: NDArray[np.floating], aggregator: Aggregator, *, f: int, step: int = 0,
              center: NDArray[np.floating] | None = None) -> NDArray[np.floating]:
    """Return ``A(rows, f)``, (d,), of rows that are all here, (n, d), float32 or float64. Local.

    A row with a NaN or Inf is left out, as one of the f.

    Parameters
    ----------
    center : (d,) optional
        Where :class:`CenteredClip` begins; zero by default.

    Raises
    ------
    NonFiniteError
        More than f rows have a NaN or Inf.
    ShapeError, DtypeError, OptionError
    """
    rows = np.ascontiguousarray(rows)
    if rows.ndim != 2:
        raise ShapeError(f"aggregate: rows of shape {rows.shape}; pass (n, d), a row of each client")
    if rows.dtype not in (np.float32, np.float64):
        raise DtypeError(f"aggregate: rows have dtype {rows.dtype}; pass float32 or float64")
    (n, d), alive = rows.shape, np.isfinite(rows).all(axis=1)
    out = np.zeros(d, rows.dtype) if center is None else np.array(center, rows.dtype)
    if (gone := n - int(alive.sum())) == 0:
        return Aggregation(aggregator, f, n, d, rows.dtype)(rows, out, step=step)
    if gone > Aggregation(aggregator, f, n, d, rows.dtype).f:
        raise NonFiniteError(f"aggregate: {gone} of {n} rows have a NaN or Inf, and f={f}")
    return Aggregation(aggregator, f - gone, n - gone, d, rows.dtype)(rows[alive], out, step=step)


def nearest_mean(rows: NDArray[np.floating], own: int, keep: int, out: NDArray[np.floating],
                 among: NDArray[np.bool_] | None = None) -> NDArray[np.intp]:
    """Overwrite `out`, (d,), with the mean of the `keep` rows nearest to row `own`, itself first; return which. Local.

    MoNNA's aggregation, Farhadkhani et al. 2023 (arXiv 2209.10931), algorithm 1; of equally near rows the first ones. Work:
    O(m d) for m rows. Sums in the order of the rows.

    Parameters
    ----------
    among : (m,) bool, optional
        Which rows there are; row `own` is one of them, and the others are finite numbers.
    """
    m, d = rows.shape
    if out.shape != (d,):
        raise ShapeError(f"nearest_mean: out of shape {out.shape}; pass ({d},)")
    scratch, none = np.empty((2 * m + 1, kernels.ROBUST_BLOCK)), np.zeros((0, d), rows.dtype)
    mine = np.zeros(m)
    mine[own] = 1.0
    apart = np.zeros(m)
    kernels.distances_to_mixture(rows, none, mine, 0, d, scratch, apart)
    apart = np.nan_to_num(apart, nan=np.inf)
    apart[own] = -1.0
    order = np.argsort(apart, kind="stable")
    chosen = np.sort((order if among is None else order[among[order]])[:keep])
    weights = np.zeros((1, m))
    weights[0, chosen] = 1.0 / chosen.size
    outside, every = np.zeros(1, np.int64), np.zeros(0, np.int64)
    kernels.combine_columns(rows, none, weights, _NONE, 0, 1, every, True, scratch, outside, out)
    return chosen
