"""What takes the place of the mean of n vectors of which up to f are wrong. Knows no MPI."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isinf, sqrt
from typing import ClassVar

import numpy as np

from mpi_ef.errors import OptionError, briefly, counted
from mpi_ef.ranges import whole, within

from .view import Answer, Matrix, View, summed

__all__ = ["NNM", "Aggregator", "Bucketing", "CenteredClip", "ClipLargest", "GeometricMedian", "Krum", "Mean", "Median",
           "MultiKrum", "TrimmedMean"]

ROUNDING = 1e-15  # of a squared distance that is a difference of others


@dataclass(frozen=True)
class Aggregator(ABC):
    """A robust rule, a frozen dataclass: it is compared, printed and parsed as a compressor is.

    It sees squared distances of rows and answers with a few mixtures of them, of which order statistics are taken entry by
    entry: ``NNM(TrimmedMean())`` is the trimmed mean of mixtures of nearest neighbours. To write one: :meth:`least` and
    :meth:`answer`.

    Attributes
    ----------
    anchors : tuple of str
        Further rows that it wants to see: "origin", and "center", the result of the last step.
    """

    anchors: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def least(self, f: int) -> int:
        """Return the least number of clients with which it stands f wrong ones. Local."""

    @abstractmethod
    def answer(self, view: View, f: int) -> Answer:
        """Return how the rows become one. Local; a pure function, of distances where it needs them."""

    def is_mean(self, n: int, f: int) -> bool:  # noqa: ARG002
        """Tell whether it is the mean of n rows, whatever they are. Local."""
        return False

    def check(self, n: int, f: object, subject: str = "") -> int:
        """Return f; raise unless it stands f wrong ones of n clients. Local.

        Raises
        ------
        OptionError
            ``"TrimmedMean: f=3 of n=6 clients; it needs 7 or more; take f=2 or fewer"``
        """
        begin = f"{subject}: {self}" if subject else f"{self}"
        if f is None:
            raise OptionError(f"{begin}: f is missing, the number of clients that may be wrong; of {counted(n, 'client')} "
                              f"take for example f={max(n - 1, 0) // 4}")
        number = int(whole(begin, 0, "f clients may be wrong", f=f))  # of True 1, which saved states name
        if n < self.least(number):
            most = max((g for g in range(number) if self.least(g) <= n), default=None)
            hint = f"take f={most} or fewer" if most is not None else f"take {self.least(0)} clients or more"
            raise OptionError(f"{begin}: f={number} of n={counted(n, 'client')}; it needs {self.least(number)} or more; "
                              f"{hint}")
        return number


@dataclass(frozen=True)
class Mean(Aggregator):
    """The mean, which one wrong client decides: for comparison. f is ignored."""

    def least(self, f: int) -> int:  # noqa: ARG002
        """Return 1: it stands none, and says nothing."""
        return 1

    def answer(self, view: View, f: int) -> Answer:  # noqa: ARG002
        """Return 1 / n each, see :meth:`Aggregator.answer`."""
        return _one(view, np.full(view.m, 1.0 / view.m))

    def is_mean(self, n: int, f: int) -> bool:  # noqa: ARG002
        """Return True."""
        return True


@dataclass(frozen=True)
class Median(Aggregator):
    """The median of each entry, of an even number the mean of the two in the middle (Yin et al. 2018, arXiv 1803.01498)."""

    def least(self, f: int) -> int:
        """Return 2 f + 1."""
        return 2 * f + 1

    def answer(self, view: View, f: int) -> Answer:  # noqa: ARG002
        """Keep the middle of every column, see :meth:`Aggregator.answer`."""
        return Answer(_rows(view), (view.m - 1) // 2, view.m // 2 + 1)


@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """The mean of each entry without its f least and f greatest values (Yin et al. 2018, arXiv 1803.01498)."""

    def least(self, f: int) -> int:
        """Return 2 f + 1."""
        return 2 * f + 1

    def answer(self, view: View, f: int) -> Answer:
        """Keep all but 2 f of every column, see :meth:`Aggregator.answer`."""
        return Answer(_rows(view), f, view.m - f)

    def is_mean(self, n: int, f: int) -> bool:  # noqa: ARG002
        """Tell whether nothing is trimmed."""
        return f == 0


def krum_scores(view: View, f: int) -> Matrix:
    """Return the sum of the squared distances of each row to the n - f - 2 nearest others, (m,). Local."""
    apart = np.sort(view.distances()[: view.m, : view.m], axis=1)  # the first is that of the row itself
    return summed(apart[:, 1 : max(view.m - f - 1, 2)])


@dataclass(frozen=True)
class Krum(Aggregator):
    """The row with the least sum of squared distances to its n - f - 2 nearest others (Blanchard et al. 2017)."""

    def least(self, f: int) -> int:
        """Return 2 f + 3."""
        return 2 * f + 3

    def answer(self, view: View, f: int) -> Answer:
        """Choose one, the first of equal ones, see :meth:`Aggregator.answer`."""
        chosen = np.zeros(view.m)
        chosen[int(krum_scores(view, f).argmin())] = 1.0
        return _one(view, chosen)


@dataclass(frozen=True)
class MultiKrum(Aggregator):
    """The mean of the n - f rows with the best scores of :class:`Krum` (Blanchard et al. 2017, section 5)."""

    def least(self, f: int) -> int:
        """Return 2 f + 3, without wrong ones 1."""
        return 2 * f + 3 if f else 1

    def answer(self, view: View, f: int) -> Answer:
        """Choose n - f, see :meth:`Aggregator.answer`."""
        chosen = np.zeros(view.m)
        chosen[np.argsort(krum_scores(view, f), kind="stable")[: view.m - f]] = 1.0 / (view.m - f)
        return _one(view, chosen)

    def is_mean(self, n: int, f: int) -> bool:  # noqa: ARG002
        """Tell whether all are chosen."""
        return f == 0


@dataclass(frozen=True)
class GeometricMedian(Aggregator):
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration (RFA, Pillutla et al. 2022).

    ``w_i = 1 / max(smoothing * s, ||x_i - z||)``, of sum 1, ``z = sum_i w_i x_i``, until no weight changes by over 1e-12.
    s is the median of how far each row has to look to see more than half of all, which no minority decides; first,
    ``w_i = 1 / max(s, ||x_i - x_j||)``, with x_j the row that has to look least far. Squared distances near z are
    differences of large numbers where a row is far away: the last iteration takes true ones, and where a row is so far,
    about 1e10 s, that nothing is left of the others, ten iterations do, and no others.

    Parameters
    ----------
    iterations : int
        At most.
    smoothing : float
        Relative; keeps weights finite where z is a row.
    """

    iterations: int = 1000
    smoothing: float = 1e-9

    def __post_init__(self) -> None:
        whole("GeometricMedian", 1, "1000 is enough", iterations=self.iterations)
        within("GeometricMedian", "(0, 1)", "1e-9 is small enough", smoothing=self.smoothing)

    def least(self, f: int) -> int:
        """Return 2 f + 1."""
        return 2 * f + 1

    def answer(self, view: View, f: int) -> Answer:  # noqa: ARG002
        """Return the weights of the last iteration, see :meth:`Aggregator.answer`."""
        m = view.m
        apart = view.distances()[:m, :m]
        half = np.sort(apart, axis=1)[:, m // 2]  # within it, of each, are more than half of all rows
        central, scale = int(half.argmin()), float(np.sqrt(np.sort(half)[m // 2]))
        if scale == 0.0:  # more than half of all rows are one, which is the median
            same = apart[central] == 0.0
            return _one(view, same / float(same.sum()))
        least, last = self.smoothing * scale, 1
        weights = _inverse(np.sqrt(apart[central]), scale)
        for _ in range(self.iterations):
            before, lost = weights, ROUNDING * float(summed(apart[central] * weights))
            if lost > 1e-4 * scale * scale:
                weights, last = _inverse(np.sqrt(apart[central]), scale), 10
                break
            weights = _inverse(np.sqrt(view.distances_to(_extended(view, weights))), max(least, sqrt(lost)))
            if np.abs(weights - before).max() <= 1e-12:
                break
        for _ in range(last if view.weights is None else 0):
            weights = _inverse(np.sqrt(view.measure(_extended(view, weights))[:m]), least)
        return _one(view, weights)


def _inverse(distances: Matrix, least: float) -> Matrix:
    weights = 1.0 / np.maximum(distances, least)
    result: Matrix = weights / summed(weights)
    return result


@dataclass(frozen=True)
class CenteredClip(Aggregator):
    """A center, moved towards every row by a limited distance (Karimireddy et al. 2021, arXiv 2012.10333).

    ``v = v + 1/n sum_i (x_i - v) min(1, tau / ||x_i - v||)``, `iterations` times, from the result of the last step on.

    Parameters
    ----------
    tau : float
        In the units of the vectors; inf is the mean.
    """

    tau: float
    iterations: int = 1
    anchors: ClassVar[tuple[str, ...]] = ("center",)

    def __post_init__(self) -> None:
        if self.tau != inf:
            within("CenteredClip", "(0, inf)", "take about the norm of what honest clients differ by", tau=self.tau)
        whole("CenteredClip", 1, "1 to 3 are usual", iterations=self.iterations)

    def least(self, f: int) -> int:
        """Return 2 f + 1."""
        return 2 * f + 1

    def answer(self, view: View, f: int) -> Answer:  # noqa: ARG002
        """Return the weights of rows and center after the last iteration, see :meth:`Aggregator.answer`."""
        m, mixture = view.m, np.zeros(view.m + len(view.anchors))
        mixture[view.place("center")] = 1.0
        for _ in range(self.iterations):
            apart = np.sqrt(view.distances_to(mixture))
            with np.errstate(divide="ignore"):
                shares = np.minimum(1.0, self.tau / apart) if not isinf(self.tau) else np.ones(m)
            shares = np.where(apart == 0.0, 1.0, shares) / m
            mixture = mixture * (1.0 - summed(shares))
            mixture[:m] += shares
        return Answer(view.of_rows(mixture[None]))

    def is_mean(self, n: int, f: int) -> bool:  # noqa: ARG002
        """Tell whether nothing is clipped."""
        return isinf(self.tau)


@dataclass(frozen=True)
class _Before(Aggregator):
    """What makes other rows of the rows, for an aggregator that follows."""

    then: Aggregator = field(default_factory=TrimmedMean)

    def __post_init__(self) -> None:
        if not isinstance(self.then, Aggregator):
            raise OptionError(f"{type(self).__name__}: then={briefly(self.then)} is no aggregator; take for example "
                              "TrimmedMean()")

    @cached_property
    def anchors(self) -> tuple[str, ...]:  # type: ignore[override]
        """Its own and those of what follows."""
        return tuple(dict.fromkeys((*self._own_anchors, *self.then.anchors)))

    _own_anchors: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class NNM(_Before):
    """Nearest-neighbour mixing: each row becomes the mean of the n - f rows nearest to it (Allouah et al. 2023).

    Itself included, of equally near ones the first. Fixing by Mixing, arXiv 2302.01772, algorithm 2.
    """

    def least(self, f: int) -> int:
        """Return the greater of 2 f + 1 and what follows."""
        return max(2 * f + 1, self.then.least(f))

    def answer(self, view: View, f: int) -> Answer:
        """Mix, and let what follows see the mixtures, see :meth:`Aggregator.answer`."""
        m, keep = view.m, view.m - f
        nearest = np.argsort(view.distances()[:m, :m], axis=1, kind="stable")[:, :keep]
        mixtures = np.zeros((m, m + len(view.anchors)))
        np.put_along_axis(mixtures, nearest, 1.0 / keep, axis=1)
        return self.then.answer(view.mixed(mixtures), f)

    def is_mean(self, n: int, f: int) -> bool:
        """Tell whether all rows become the mean, and what follows gives back what all rows are."""
        return f == 0 and (not self.then.anchors or self.then.is_mean(n, f))


@dataclass(frozen=True)
class Bucketing(_Before):
    """Means of s rows at a time, in an order drawn anew in every step, on which f may be wrong as before.

    Karimireddy, He, Jaggi 2022 (arXiv 2006.09365), algorithm 1; all ranks draw the same from (seed, step).
    """

    s: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("Bucketing", 1, "2 is usual", s=self.s)
        whole("Bucketing", 0, "0 is one", seed=self.seed)

    def least(self, f: int) -> int:
        """Return how many clients make as many buckets as what follows needs."""
        return (self.then.least(f) - 1) * self.s + 1

    def answer(self, view: View, f: int) -> Answer:
        """Mix, and let what follows see the mixtures, see :meth:`Aggregator.answer`."""
        m = view.m
        order = np.random.Generator(np.random.Philox(key=[self.seed, view.step])).permutation(m)
        buckets = [order[start : start + self.s] for start in range(0, m, self.s)]
        mixtures = np.zeros((len(buckets), m + len(view.anchors)))
        for mixture, bucket in zip(mixtures, buckets, strict=True):
            mixture[bucket] = 1.0 / len(bucket)
        return self.then.answer(view.mixed(mixtures), f)

    def is_mean(self, n: int, f: int) -> bool:
        """Tell whether it is the mean of means of as many rows."""
        return n % self.s == 0 and self.then.is_mean(n // self.s, f)


@dataclass(frozen=True)
class ClipLargest(_Before):
    """The floor(2 f / n (n - f)) rows of the largest norms get the next largest norm (ARC, Allouah et al. 2024).

    Adaptive Robust Clipping, arXiv 2405.14432.
    """

    _own_anchors: ClassVar[tuple[str, ...]] = ("origin",)

    def least(self, f: int) -> int:
        """Return the greater of 2 f + 1 and what follows."""
        return max(2 * f + 1, self.then.least(f))

    def answer(self, view: View, f: int) -> Answer:
        """Clip, and let what follows see the clipped ones, see :meth:`Aggregator.answer`."""
        m, origin = view.m, view.place("origin")
        cut = 2 * f * (m - f) // m
        norms = np.sqrt(view.distances()[origin, :m])
        order = np.argsort(-norms, kind="stable")
        most = norms[order[cut]]
        mixtures = np.zeros((m, m + len(view.anchors)))
        mixtures[np.arange(m), np.arange(m)] = 1.0
        for i in order[:cut].tolist():
            share = most / norms[i] if norms[i] > most else 1.0
            mixtures[i, i], mixtures[i, origin] = share, 1.0 - share
        return self.then.answer(view.mixed(mixtures), f)

    def is_mean(self, n: int, f: int) -> bool:
        """Tell whether nothing is clipped, and what follows is the mean."""
        return f == 0 and self.then.is_mean(n, f)


def _rows(view: View) -> Matrix | None:
    """Return the mixtures of a view without anchors, (m, n + a), or None."""
    return None if view.weights is None else view.weights[: view.m]


def _extended(view: View, weights: Matrix) -> Matrix:
    """Return the mixture of m rows, with nothing of the anchors, (m + a,)."""
    return np.concatenate([weights, np.zeros(len(view.anchors))])


def _one(view: View, weights: Matrix) -> Answer:
    """Return the answer of one mixture of the m rows."""
    return Answer(view.of_rows(_extended(view, weights)[None]))


