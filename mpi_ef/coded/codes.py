"""Gradient codes: which parts of the data each worker adds up, and how their sum is found without the slowest. No MPI.

Tandon, Lei, Dimakis, Karampatziakis 2017. The data are in n parts, g_j is the sum of the gradients over part j. Worker i
sends ``m_i = sum_j B[i, j] g_j``. From the workers F that have answered ``g = sum_{i in F} a_i m_i``, where ``a' B_F = 1'``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import OptionError, counted
from mpi_ef.ranges import whole

__all__ = ["Cyclic", "FractionalRepetition", "GradientCode", "mask_of", "members"]

Coefficients = NDArray[np.float64]
_SETS = 4000  # that are looked at for the amplification; where there are more, one is
_CACHED = 4096


def mask_of(workers: Iterable[int]) -> int:
    """Return a set of workers as a number: bit i for worker i. Local."""
    mask = 0
    for worker in workers:
        mask |= 1 << worker
    return mask


def members(mask: int) -> list[int]:
    """Return the workers of such a number, in ascending order. Local."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


@dataclass(frozen=True)
class GradientCode(ABC):
    """A code, a frozen dataclass; the number of workers n comes with each call. All is local, nothing is random.

    Parameters
    ----------
    s : int
        How many workers may be missing. Each computes s + 1 parts of n.
    """

    s: int

    def __post_init__(self) -> None:
        whole(type(self).__name__, 0, "s workers may be missing; 1 is usual", s=self.s)

    @abstractmethod
    def parts(self, i: int, n: int) -> tuple[int, ...]:
        """Return the parts of worker i of n, s + 1 of them, in the order in which they are added."""

    @abstractmethod
    def row(self, i: int, n: int) -> Coefficients:
        """Return ``B[i, parts(i, n)]``, (s + 1,)."""

    @abstractmethod
    def decodable(self, mask: int, n: int) -> bool:
        """Tell whether the workers of `mask`, see :func:`mask_of`, are enough."""

    @abstractmethod
    def decode(self, mask: int, n: int) -> Coefficients:
        """Return a, (n,), zero for workers that are not in `mask`, or not needed. Read only: it is kept for the next time.

        Raises
        ------
        OptionError
            The workers of `mask` are not enough.
        """

    def approximate(self, mask: int, n: int) -> Coefficients:
        """Return a, (n,), with which the workers of `mask`, at least one, come nearest to the sum, scaled to n parts."""
        there = members(mask)
        rows = self.matrix(n)[there]
        a = np.zeros(n)
        a[there] = np.linalg.lstsq(rows.T, np.ones(n), rcond=None)[0]
        return a * (n / float((a[there] @ rows).sum()))

    def matrix(self, n: int) -> Coefficients:
        """Return B, (n, n)."""
        self.check(n)
        b = np.zeros((n, n))
        for i in range(n):
            b[i, list(self.parts(i, n))] = self.row(i, n)
        return b

    def place(self, i: int, n: int) -> int:  # noqa: ARG002
        """Return a number: answers are added in ascending order of it, so that the sum is of the same bits."""
        return i

    def load(self, n: int) -> float:
        """Return the share of the data that a worker computes."""
        return (self.s + 1) / n

    def check(self, n: int) -> None:
        """Raise `OptionError` where there is no such code for n workers."""
        if not self.s < n:
            raise OptionError(f"{self}: s={self.s} of {counted(n, 'worker')} cannot all be missing; take s={n - 1} or less")

    def amplification(self, n: int) -> float:
        """Return the largest |a_i| when s workers are missing: by how much the rounding of a message may grow.

        Over all sets of s workers; where there are more than 4000, when s neighbours are missing, which is the worst of
        them for all cyclic codes that were looked at whole.
        """
        self.check(n)
        return _amplification(self, n)

    def needed(self, n: int) -> str:
        """Return in words which answers a step needs."""
        return f"n - s = {n - self.s} answers needed" if self.s else f"all of {counted(n, 'worker')} needed"

    def _missing(self, mask: int, n: int) -> OptionError:
        there = members(mask)
        return OptionError(f"{self}: workers {there} of {n} are not enough: {n - self.s} always are")


@dataclass(frozen=True, repr=False)
class FractionalRepetition(GradientCode):
    """n / (s + 1) groups of s + 1 workers: all of a group add up the same s + 1 parts, and one answer of each is enough.

    The sum is the same bits whoever is missing: groups are added in their order, and *twins*, workers of a group, send the
    same. Worker i is of group ``i mod n / (s + 1)``. Many larger sets may be missing, as long as no group is.

    Parameters
    ----------
    s : int
    votes : int
        Of each group so many answers have to be the same bits, for workers that may compute wrongly: with ``s = 2 f`` and
        ``votes = f + 1`` any f of them, none of which may be missing then.
    """

    votes: int = 1

    def __repr__(self) -> str:
        return f"FractionalRepetition({self.s}{'' if self.votes == 1 else f', votes={self.votes}'})"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(str(self), 1, "1 is usual; a majority is s // 2 + 1", votes=self.votes, most=self.s + 1)

    def check(self, n: int) -> None:
        """Raise `OptionError` unless s + 1 divides n."""
        super().check(n)
        if n % (self.s + 1):
            near = [s for s in range(n) if n % (s + 1) == 0]
            below, above = max(s for s in near if s < self.s), min(s for s in near if s > self.s)
            cyclic = f", or Cyclic({self.s if (n - self.s) % 2 else self.s + 1})"
            raise OptionError(f"{self}: s={self.s} with {counted(n, 'worker')}; {self.s + 1} does not divide {n}; take "
                              f"s={below}, s={above}{cyclic}")

    def needed(self, n: int) -> str:
        """Return in words which answers a step needs."""
        return f"{self.votes} of each {self.s + 1} twins needed" if self.s else super().needed(n)

    def groups(self, n: int) -> int:
        """Return how many groups there are."""
        return n // (self.s + 1)

    def group(self, i: int, n: int) -> int:
        """Return of which group worker i is."""
        return i % self.groups(n)

    def place(self, i: int, n: int) -> int:
        """Return the group: a twin that is added in place of a missing one has its place."""
        return self.group(i, n)

    def parts(self, i: int, n: int) -> tuple[int, ...]:
        """Return those of its group: they lie one after the other."""
        first = self.group(i, n) * (self.s + 1)
        return tuple(range(first, first + self.s + 1))

    def row(self, i: int, n: int) -> Coefficients:  # noqa: ARG002
        """Return ones."""
        return np.ones(self.s + 1)

    def decodable(self, mask: int, n: int) -> bool:
        """Tell whether of each group `votes` workers are there."""
        q = self.groups(n)
        return all(sum(mask >> i & 1 for i in range(g, n, q)) >= self.votes for g in range(q))

    def approximate(self, mask: int, n: int) -> Coefficients:
        """Return as much for the first worker of each group that is there."""
        a, q = np.zeros(n), self.groups(n)
        firsts = {i % q: i for i in reversed(members(mask))}
        a[list(firsts.values())] = q / len(firsts)
        return a

    def decode(self, mask: int, n: int) -> Coefficients:
        """Return 1 for the first worker of each group."""
        if not self.decodable(mask, n):
            raise self._missing(mask, n)
        a, q = np.zeros(n), self.groups(n)
        for g in range(q):
            a[next(i for i in range(g, n, q) if mask >> i & 1)] = 1.0
        a.flags.writeable = False
        return a


@dataclass(frozen=True, repr=False)
class Cyclic(GradientCode):
    """Worker i adds parts i, i + 1, ..., i + s (mod n) with the coefficients of a real BCH code; any n - s are enough.

    For n - s odd, or s = 0. The generator is the polynomial whose roots are the s consecutive n-th roots of unity that are
    centred at -1, divided by the sum of its coefficients: real, symmetric, every row sums to 1. Rounding of messages grows
    with s (:meth:`amplification`: 2 for n = 6, s = 1; 30 for 12, 3; 2200 for 24, 5), far less than with random coefficients
    (Tandon et al.), and from some s on too much for float32. Where s + 1 divides n, `FractionalRepetition` has 1.
    """

    def __repr__(self) -> str:
        return f"Cyclic({self.s})"

    def check(self, n: int) -> None:
        """Raise `OptionError` unless n - s is odd, or s = 0."""
        super().check(n)
        if self.s and (n - self.s) % 2 == 0:
            near = [s for s in (self.s - 1, self.s + 1) if 0 < s < n]
            fr = f", or FractionalRepetition({self.s})" if n % (self.s + 1) == 0 else ""
            raise OptionError(f"{self}: there is no such code where n - s is even, n={n} workers and s={self.s}; take "
                              f"s={' or s='.join(map(str, near)) if near else 0}{fr}")

    def parts(self, i: int, n: int) -> tuple[int, ...]:
        """Return i, i + 1, ..., i + s (mod n)."""
        return tuple((i + k) % n for k in range(self.s + 1))

    def row(self, i: int, n: int) -> Coefficients:  # noqa: ARG002
        """Return the coefficients, the same for each worker."""
        return _generator(self.s, n)

    def decodable(self, mask: int, n: int) -> bool:
        """Tell whether n - s workers are there."""
        return mask.bit_count() >= n - self.s

    def decode(self, mask: int, n: int) -> Coefficients:
        """Return the least coefficients: all workers that are there take part."""
        if not self.decodable(mask, n):
            raise self._missing(mask, n)
        return _least_squares(self, mask, n)


@lru_cache(_CACHED)
def _generator(s: int, n: int) -> Coefficients:
    angles = 2 * np.pi * (n / 2 + np.arange(s) - (s - 1) / 2) / n
    coefficients: Coefficients = np.real(np.poly(np.exp(1j * angles))) if s else np.ones(1)
    coefficients /= coefficients.sum()
    coefficients.flags.writeable = False
    return coefficients


@lru_cache(64)
def _matrix(code: GradientCode, n: int) -> Coefficients:
    return code.matrix(n)


@lru_cache(_CACHED)
def _least_squares(code: GradientCode, mask: int, n: int) -> Coefficients:
    there = members(mask)
    a = np.zeros(n)
    a[there] = np.linalg.lstsq(_matrix(code, n)[there].T, np.ones(n), rcond=None)[0]
    a.flags.writeable = False
    return a


@lru_cache(256)
def _amplification(code: GradientCode, n: int) -> float:
    if isinstance(code, FractionalRepetition):
        return 1.0
    everyone = (1 << n) - 1
    few = comb(n, code.s) <= _SETS
    lost = combinations(range(n), code.s) if few else [tuple(range(code.s))]
    return max(float(np.abs(code.decode(everyone & ~mask_of(gone), n)).max()) for gone in lost)
