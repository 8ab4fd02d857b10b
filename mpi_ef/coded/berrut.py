"""Berrut's rational interpolation as a code for any function of blocks: BACC and SBACC. Pure: no MPI, no torch.

K blocks X_j stand at the points alpha_j = cos((2j + 1) pi / 2K) of a line. Evaluation i of N is asked for at beta_i: it is
given u(beta_i), where u is Berrut's interpolant through the blocks, and answers f(u(beta_i)). From any answers f(X_j) =
f(u(alpha_j)) is interpolated again: an approximation, as good as f(u(.)) is smooth (Jahani-Nezhad and Maddah-Ali; SBACC:
Borah and Harshan, arXiv 2507.01330).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import DtypeError, NonFiniteError, OptionError, ShapeError, briefly, nearest
from mpi_ef.ranges import whole

__all__ = ["BerrutCode", "Decoded", "Decoding", "chunks", "indices_in", "not_finite", "rows_of"]

Array = NDArray[Any]
Floats = NDArray[np.float64]
HOW = ("auto", "berrut", "least-squares")
_SHARE = 0.6  # of N: no more polynomials than that, and no least squares from fewer answers
_CONDITION = 30.0  # of the matrix of least squares, at most
_CHECKS = 5
_LEVERAGE = 1e-6  # of an answer that decides its own fit nearly alone
_CHUNK = 1 << 20  # numbers in float64 at a time


@dataclass(frozen=True)
class Decoding:
    """How the blocks are made of the answers that were heard: ``f(X_j) = sum_i weights[j, i] V_i``.

    Attributes
    ----------
    heard : tuple of int
        The evaluations, ascending.
    weights : ndarray, (K, len(heard)), float64
    taken : tuple of int
        For each block the place within `heard` of the answer that is f(X_j) itself, or -1.
    terms : int
        Of the Chebyshev polynomials of least squares; 0 where Berrut's formula was taken, or nothing is missing.
    checks : ndarray, (K, 5, len(heard)), float64
        What of the answers is the size of a block's error, the largest of five: what another way of decoding makes of the
        block less what this one does, and by how much the four answers next to it are off what all others make of them. Zero
        where the block is taken.
    """

    heard: tuple[int, ...]
    weights: Floats
    taken: tuple[int, ...]
    terms: int
    checks: Floats


@dataclass(frozen=True)
class Decoded:
    """What came out.

    Attributes
    ----------
    values : ndarray, (K, ...), of the dtype of the answers
        f of every block.
    error_estimate : ndarray, (K,), float64
        Of every block the norm of its error, estimated, divided by the norm of what was decoded; 0 where the block is an
        answer itself. It is no bound: of 8 blocks with 40 evaluations of smooth functions, up to 16 lost, one in twenty
        errors was larger than it, and half of them smaller than a fifth of it.
    decoding : Decoding
    """

    values: Array
    error_estimate: Floats
    decoding: Decoding


@dataclass(frozen=True)
class BerrutCode:
    """A code of N evaluations for K blocks.

    Parameters
    ----------
    blocks, evaluations : int
        K and N, K <= N. :meth:`at_least` chooses N.
    kind : {"sbacc", "bacc"}
        Where evaluations lie: at Chebyshev points of the first kind, where wrong answers can be located, or of the second.
    """

    blocks: int
    evaluations: int
    kind: str = "sbacc"
    KINDS: ClassVar[tuple[str, ...]] = ("sbacc", "bacc")

    def __post_init__(self) -> None:
        k = whole("BerrutCode", 1, "8 is usual", blocks=self.blocks)
        n = whole("BerrutCode", 1, "3 to 5 for each block is usual", evaluations=self.evaluations)
        if self.kind not in self.KINDS:
            hint = nearest(str(self.kind), self.KINDS, "take sbacc")
            raise OptionError(f"BerrutCode: there is no kind {briefly(self.kind)}; {hint}")
        if k > n or (n == 1 and self.kind == "bacc"):
            raise OptionError(f"BerrutCode: blocks={k} is more than evaluations={n} can give; take at least "
                              f"{BerrutCode.at_least(k, k, self.kind).evaluations} evaluations")

    @classmethod
    def at_least(cls, blocks: int, evaluations: int, kind: str = "sbacc") -> "BerrutCode":
        """Return the systematic code of the fewest evaluations, not fewer than `evaluations`.

        The blocks themselves are among what is evaluated then, and nothing lost is no error at all: N is an odd multiple
        of K for SBACC, a multiple of 2K and one more for BACC. Local.
        """
        k = whole("BerrutCode", 1, "8 is usual", blocks=blocks)
        n = whole("BerrutCode", 1, "3 to 5 for each block is usual", evaluations=evaluations)
        if kind == "bacc":
            return cls(k, 2 * k * max(1, -(-(n - 1) // (2 * k))) + 1, kind)
        return cls(k, k * ((-(-n // k)) | 1), kind)

    @cached_property
    def points(self) -> Floats:
        """alpha, where the blocks are, (K,)."""
        return np.asarray(np.cos((2 * np.arange(self.blocks) + 1) * np.pi / (2 * self.blocks)))

    @cached_property
    def nodes(self) -> Floats:
        """beta, where f is evaluated, (N,)."""
        i, n = np.arange(self.evaluations), self.evaluations
        return np.asarray(np.cos(i * np.pi / (n - 1)) if self.kind == "bacc" else np.cos((2 * i + 1) * np.pi / (2 * n)))

    @cached_property
    def systematic(self) -> tuple[int, ...]:
        """For each block the evaluation that is of this block itself, or -1; whole numbers decide, not rounding."""
        k, n = self.blocks, self.evaluations
        top, bottom = (n - 1, 2 * k) if self.kind == "bacc" else (n, k)  # (2j + 1) top / bottom is i, or 2i + 1
        found = []
        for odd in range(1, 2 * k, 2):
            place, rest = divmod(odd * top, bottom)
            right = rest == 0 and (self.kind == "bacc" or place % 2 == 1)
            found.append((place if self.kind == "bacc" else place // 2) if right else -1)
        return tuple(found)

    @cached_property
    def encoding(self) -> Floats:
        """What is mixed for every evaluation, (N, K): ``U_i = sum_j encoding[i, j] X_j``, rows of sum 1."""
        there = {i: j for j, i in enumerate(self.systematic) if i >= 0}
        signs = (-1.0) ** np.arange(self.blocks)
        rows = np.zeros((self.evaluations, self.blocks))
        for i, z in enumerate(self.nodes):
            if i in there:
                rows[i, there[i]] = 1.0
            else:
                rows[i] = signs / (z - self.points)
                rows[i] /= rows[i].sum()
        return rows

    def input(self, blocks: Array | Sequence[Array], i: int, out: Array | None = None) -> Array:
        """Return what evaluation i is given, of the shape and dtype of a block; X_j itself, copied, where it is one.

        Local; K multiplications for each number, no more memory than the result.

        Parameters
        ----------
        blocks : ndarray, (K, ...), or sequence of K ndarrays of one shape; float32 or float64
        i : int
        out : ndarray, optional
            Where it is written, contiguous.
        """
        rows = rows_of(blocks, self.blocks, "BerrutCode: blocks")
        if not 0 <= i < self.evaluations:
            raise OptionError(f"BerrutCode: there is no evaluation {i}; they are 0 to {self.evaluations - 1}")
        made = np.empty(rows[0].shape, rows[0].dtype) if out is None else out
        if made.shape != rows[0].shape or made.dtype != rows[0].dtype or not made.flags.c_contiguous:
            raise ShapeError(f"BerrutCode: out is {made.dtype} of shape {made.shape}, the blocks are {rows[0].dtype} of "
                             f"shape {rows[0].shape}; give a contiguous array like them")
        if i in self.systematic:
            made[...] = rows[self.systematic.index(i)]
        else:
            _mix(self.encoding[i : i + 1], rows, [made])
        return made

    def encode(self, blocks: Array | Sequence[Array]) -> Array:
        """Return what all evaluations are given, (N, ...): see :meth:`input`. Local."""
        rows = rows_of(blocks, self.blocks, "BerrutCode: blocks")
        made = np.empty((self.evaluations, *rows[0].shape), rows[0].dtype)
        for i, row in enumerate(made):
            self.input(rows, i, row if row.ndim else made[i : i + 1].reshape(()))
        return made

    def decoding(self, heard: Sequence[int] | NDArray[np.int64], how: str = "auto") -> Decoding:
        """Return how the blocks are made of the answers of the evaluations `heard`. Local; |F| N^2 operations, no data.

        ``"auto"``: an answer that is of a block itself is taken as it is. Missing blocks are interpolated by least squares
        in Chebyshev polynomials, with the largest even number of them up to 0.6 N for which the problem is well-conditioned
        (30); by Berrut's formula where fewer than 0.6 N have answered, or no more polynomials than blocks are left.
        ``"berrut"`` and ``"least-squares"`` force one; the latter takes no answer as it is.
        """
        if how not in HOW:
            raise OptionError(f"BerrutCode: there is no decoding {briefly(how)}; {nearest(str(how), HOW, f'take {HOW[0]}')}")
        f = indices_in(heard, self.evaluations, "BerrutCode")
        place = {i: at for at, i in enumerate(f.tolist())}
        taken = tuple(place.get(i, -1) for i in self.systematic)
        berrut = self._berrut(f, taken)
        few = f.size < _SHARE * self.evaluations
        terms = 0 if how == "berrut" or (how == "auto" and (few or min(taken) >= 0)) else self._terms(f)
        if how == "auto" and terms <= self.blocks:  # as where many neighbours are lost: Berrut's formula is nearer then
            terms = 0
        fitted = self._fitted(f, terms) if terms else berrut
        weights = fitted.copy()
        if how != "least-squares":
            for j, at in enumerate(taken):
                if at >= 0:
                    weights[j] = berrut[j]
        else:
            taken = (-1,) * self.blocks
        return Decoding(tuple(f.tolist()), weights, taken, terms, self._checks(f, taken, terms, weights, berrut))

    def decode(self, answers: Array | Sequence[Array], heard: Sequence[int] | NDArray[np.int64],
               how: str = "auto") -> Decoded:
        """Return f of all blocks from the answers that were heard. Local; K |F| operations for each number.

        Parameters
        ----------
        answers : ndarray, (len(heard), ...), or sequence of ndarrays of one shape; float32 or float64
            In the order of `heard`.
        heard : sequence of int
            Distinct evaluations, in any order.
        how : {"auto", "berrut", "least-squares"}
            See :meth:`decoding`.

        Raises
        ------
        NonFiniteError
            Where an answer has NaN or Inf: count it as missing.
        """
        rows = rows_of(answers, len(heard), "BerrutCode: answers")
        decoding = self.decoding(heard, how)
        rows = [rows[at] for at in np.argsort(np.asarray(heard, np.int64), kind="stable").tolist()]
        missing = [j for j, at in enumerate(decoding.taken) if at < 0]
        made = np.empty((self.blocks, *rows[0].shape), rows[0].dtype)
        flat, m = made.reshape(self.blocks, -1), len(missing)
        matrix = np.concatenate([decoding.weights[missing], *decoding.checks[missing]])
        squares = np.zeros(len(matrix))
        for part, block in chunks(rows):
            if (bad := ~np.isfinite(block).all(axis=1)).any():
                raise not_finite("BerrutCode", [decoding.heard[at] for at in np.flatnonzero(bad)])
            if missing:
                mixed = matrix @ block
                flat[missing, part] = mixed[:m]
                squares += np.square(mixed).sum(axis=1)
        for j, at in enumerate(decoding.taken):
            if at >= 0:
                made[j] = rows[at]
        estimate = np.zeros(self.blocks)
        largest, size = squares[m:].reshape(m, _CHECKS).max(axis=1), squares[:m]
        estimate[missing] = np.sqrt(largest / np.where(size > 0, size, 1.0))
        return Decoded(made, estimate, decoding)

    def _berrut(self, f: NDArray[np.int64], taken: Sequence[int]) -> Floats:
        """Return the weights of Berrut's formula over the nodes heard; signs alternate by rank within these."""
        return _berrut_at(self.points, self.nodes[f], taken)

    def _cosines(self, z: Floats, terms: int) -> Floats:
        return np.asarray(np.cos(np.outer(np.arccos(z), np.arange(terms))))

    def _terms(self, f: NDArray[np.int64]) -> int:
        """Return how many polynomials are fitted: even, up to .6 N and |F|, condition below 30; 1 where there are none."""
        most = min(int(_SHARE * self.evaluations), f.size) // 2 * 2
        every = self._cosines(self.nodes[f], max(most, 1))
        for terms in range(most, 0, -2):
            if np.linalg.cond(every[:, :terms]) < _CONDITION:
                return terms
        return 1

    def _fitted(self, f: NDArray[np.int64], terms: int) -> Floats:
        fit = np.linalg.pinv(self._cosines(self.nodes[f], terms))
        return np.asarray(self._cosines(self.points, terms) @ fit)

    def _checks(self, f: NDArray[np.int64], taken: Sequence[int], terms: int, weights: Floats, berrut: Floats) -> Floats:
        """Return what the error is estimated by, see :class:`Decoding`."""
        checks = np.zeros((self.blocks, _CHECKS, f.size))
        missing = [j for j, at in enumerate(taken) if at < 0]
        if not missing or f.size < 2:
            checks[missing, 0] = weights[missing]  # of one answer: nothing is known but its size
            return checks
        other = berrut if terms else self._fitted(f, self._terms(f))
        checks[:, 0] = other - weights
        checks[np.array(taken) >= 0, 0] = 0.0
        angles, left_out = np.arccos(self.nodes[f]), dict[int, Floats]()
        hat = np.linalg.multi_dot([fit := self._cosines(self.nodes[f], terms), np.linalg.pinv(fit)]) if terms else None
        for j in missing:
            near = np.argsort(np.abs(angles - np.arccos(self.points[j])), kind="stable")[: _CHECKS - 1].tolist()
            for row, at in enumerate(near, 1):
                if at not in left_out:
                    left_out[at] = self._left_out(f, at, hat)
                checks[j, row] = left_out[at]
        return checks

    def _left_out(self, f: NDArray[np.int64], at: int, hat: Floats | None) -> Floats:
        """Return what of the answers is how far one of them is off what the others make of it."""
        row = -hat[at] if hat is not None else np.zeros(f.size)
        if hat is None:
            row[np.arange(f.size) != at] = -_berrut_at(self.nodes[f[at : at + 1]], self.nodes[np.delete(f, at)], (-1,))[0]
            row[at] = 1.0
            return row
        row[at] += 1.0
        return np.asarray(row / max(row[at], _LEVERAGE))

def _berrut_at(at: Floats, nodes: Floats, taken: Sequence[int]) -> Floats:
    signs = (-1.0) ** np.arange(nodes.size)
    rows = np.zeros((at.size, nodes.size))
    for j, (z, there) in enumerate(zip(at, taken, strict=True)):
        if there >= 0:
            rows[j, there] = 1.0
        else:
            rows[j] = signs / (z - nodes)
            rows[j] /= rows[j].sum()
    return rows


def indices_in(heard: Sequence[int] | NDArray[np.int64], n: int, subject: str) -> NDArray[np.int64]:
    """Return distinct evaluations, ascending; raise `OptionError` unless they are such, of n, and at least one. Local."""
    given = [int(i) for i in heard]
    if not given or len(set(given)) < len(given) or min(given) < 0 or max(given) >= n:
        raise OptionError(f"{subject}: heard={briefly(sorted(given))} are not distinct evaluations of 0 to {n - 1}, at "
                          "least one; name each that has answered once")
    return np.array(sorted(given), np.int64)


def not_finite(subject: str, named: Sequence[int]) -> NonFiniteError:
    """Return the error that says whose answers are not finite. Local."""
    return NonFiniteError(f"{subject}: answers of evaluations {', '.join(map(str, named))} are not finite; leave them out "
                          "as missing", tuple(map(int, named)))


def rows_of(arrays: Array | Sequence[Array], count: int, subject: str) -> list[Array]:
    """Return `count` arrays of one shape and dtype, float32 or float64. Local, nothing is copied.

    Raises
    ------
    ShapeError, DtypeError
    """
    given = list(arrays)
    if masks := [i for i, row in enumerate(given) if isinstance(row, np.ma.MaskedArray)]:
        raise DtypeError(f"{subject}: number {masks[0]} is a masked array, and masks are not kept; pass it filled(0)")
    rows = [np.asarray(row) for row in given]
    if len(rows) != count:
        raise ShapeError(f"{subject}: there are {len(rows)} in place of {count}; give one array for each")
    for i, row in enumerate(rows):
        if row.dtype not in (np.float32, np.float64):
            raise DtypeError(f"{subject}: the dtype of number {i} is {row.dtype}; give all in float32, or all in float64")
        if row.dtype != rows[0].dtype:
            raise DtypeError(f"{subject}: the dtype of number {i} is {row.dtype}, of number 0 {rows[0].dtype}; give all in "
                             "float32, or all in float64")
        if row.shape != rows[0].shape:
            raise ShapeError(f"{subject}: the shape of number {i} is {row.shape}, of number 0 {rows[0].shape}; cut blocks "
                             "of one shape, and let f answer with one")
    return rows


def chunks(rows: Sequence[Array]) -> Iterator[tuple[slice, Floats]]:
    """Yield columns and a part of the rows, (len(rows), about 1e6 / len(rows)), float64, in memory that is used again."""
    flat = [row.reshape(-1) for row in rows]
    width = flat[0].size
    step = max(1, min(width, _CHUNK // len(rows)))
    scratch = np.empty((len(rows), step))
    for start in range(0, width, step):
        part = slice(start, min(width, start + step))
        block = scratch[:, : part.stop - start]
        for row, whole_row in zip(block, flat, strict=True):
            row[...] = whole_row[part]
        yield part, block


def _mix(weights: Floats, rows: Sequence[Array], out: Sequence[Array]) -> None:
    flat = [made.reshape(-1) for made in out]
    for part, block in chunks(rows):
        for made, mixed in zip(flat, weights @ block, strict=True):
            made[part] = mixed
