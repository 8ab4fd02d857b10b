"""Which of the workers of an SBACC code have answered wrongly. Pure: no MPI, no torch.

Evaluations lie at Chebyshev points, so the DCT of the answers over the workers holds the Chebyshev coefficients of f(u(.)).
Where f is smooth the high ones are small: they are parity, and what wrong answers make of them are the columns of the wrong
workers. A set of workers *explains* the answers when nothing above the floor is left of the parity without their columns.
The smallest set that does is named only when no other set of about its size does as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import OptionError, WrongAnswersError
from mpi_ef.ranges import whole, within

from .berrut import chunks, indices_in, not_finite, rows_of

__all__ = ["Parity", "locate"]

Array = NDArray[Any]
Floats = NDArray[np.float64]
_LOW = 0.6  # of N: from where on coefficients are parity, where only a number is known of them
_MARGIN = 2.0
_ROUNDING = 8.0  # units in the last place of the answers that the floor has at least
_RANGE = 1e-5  # what is less than that of the largest error is looked at when this one has been named and left out
_SEARCHED = 3  # workers whose errors may be proportional to each other
_COMPARED = 3  # workers of a set that a smaller one is compared with
_SEEN = 0.3  # of the floor: smaller singular values do not choose sets, they are looked at when one is accepted
_DEPENDENT = 1e-9  # the square of what is left of a column, at most, where others are as good as it
_BATCH = 4096
_MANY = 2000  # sets that are looked at closely


@dataclass(frozen=True, eq=False)
class Parity:
    """What right answers may have of parity.

    Make one with :meth:`of`, where a number is known, or :meth:`learned`, from answers that can be trusted.

    Attributes
    ----------
    evaluations : int
        N.
    matrix : ndarray, (N - low, N), float64
        What is made of the answers: rows of the DCT, scaled.
    floor : float
        The largest singular value that ``matrix @ answers`` of right answers has, at most.
    entries : int
        Of the answers that the floor is for; for others it goes with the square root of their number. 0: it is for all.
    """

    evaluations: int
    matrix: Floats
    floor: float
    entries: int = 0

    @classmethod
    def of(cls, evaluations: int, floor: float, low: int | None = None) -> "Parity":
        """Return the parity of N answers whose DCT coefficients from `low` on, .6 N, have singular values up to `floor`.

        Local.
        """
        n, low = _sizes(evaluations, low, _LOW)
        within("Parity", "(0, inf)", "take twice Parity.largest of answers that can be trusted", floor=floor)
        return cls(n, _dct(n, low), float(floor))

    @classmethod
    def learned(cls, answers: Array | Sequence[Array], blocks: int, *, margin: float = _MARGIN,
                together: float = 0.0) -> "Parity":
        """Return the parity that answers have which can be trusted, of all N evaluations. Local, N^2 operations a number.

        Every coefficient from K on is measured by how large it, or one above it, is here, so that high ones show small
        errors and low ones still count for large errors: of errors a tenth of the signal, where one number names none, most
        are located. The floor is `margin` times the largest singular value of that.

        Parameters
        ----------
        answers : ndarray, (N, ...), or sequence of N ndarrays
            f of all evaluations: of the blocks at hand, of some of their entries, or of others that are like them. Entries
            should be typical, and as many as answers have, or hundreds.
        blocks : int
            K.
        margin : float
            The right answers may have so many times what these have. Too little: workers are refused, or named, for nothing.
        together : float
            From 0 to less than 1, how much of how coefficients go with each other is believed too: .9 locates errors ten
            times smaller, and belongs to true answers to the very same blocks; with others nearly everything is refused.
        """
        n, low = _sizes(len(answers), blocks, 0.0)
        within("Parity", "[1, inf)", "2 is usual", margin=margin)
        within("Parity", "[0, 1)", "0 is usual, 0.9 for answers to the very same blocks", together=together)
        if low > n - 2:
            raise OptionError(f"Parity: blocks={blocks} leave no parity of {n} evaluations; ask for more of them")
        dct = _dct(n, low)
        gram, scale = _gram(rows_of(answers, n, "Parity"), range(n), dct)
        least = _ROUNDING * _unit(answers) * np.sqrt(n) + np.finfo(float).tiny
        sizes = np.sqrt(np.maximum.accumulate(np.diag(gram)[::-1])[::-1]) + least  # gram is of answers divided by scale
        scaled = gram / np.outer(sizes, sizes)
        lower = np.linalg.cholesky(together * scaled + (1 - together) * np.eye(n - low))
        matrix = np.linalg.solve(lower, dct / sizes[:, None])
        seen = np.linalg.solve(lower, np.linalg.solve(lower, scaled).T)
        return cls(n, matrix, margin * scale * float(np.sqrt(max(np.linalg.eigvalsh(seen)[-1], least**2))),
                   np.asarray(answers[0]).size)

    def largest(self, answers: Array | Sequence[Array]) -> float:
        """Return the largest singular value that answers of all N evaluations have. Local."""
        gram, scale = _gram(rows_of(answers, self.evaluations, "Parity"), range(self.evaluations), self.matrix)
        return scale * float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0)))


def locate(answers: Array | Sequence[Array], heard: Sequence[int] | NDArray[np.int64], parity: Parity,
           wrong: int = 2) -> tuple[int, ...]:
    """Return the evaluations whose answers are wrong, ascending; none where all are right as far as can be seen. Local.

    What makes less of the parity than the floor is not seen. A set is named when it is the smallest that explains the
    answers, and no other set of up to three workers does, nor one that is one larger, up to `wrong`. So a worker whose
    answer is right is not named as long as right answers stay below the floor, and errors of more than three workers are not
    proportional to each other.

    N (N - low) operations for each number of the answers, which are read in parts and copied once, and seconds at most
    for the search, which depends on N and `wrong` only.

    Parameters
    ----------
    answers : ndarray, (len(heard), ...), or sequence of ndarrays of one shape; float32 or float64
        In the order of `heard`.
    heard : sequence of int
        Distinct evaluations, in any order.
    parity : Parity
    wrong : int
        So many may be wrong, at most.

    Raises
    ------
    WrongAnswersError
        Some are wrong, and cannot be named: they are too many, too alike, or too near what f itself has.
    NonFiniteError
        Where an answer has NaN or Inf: count it as missing.
    """
    wrong = whole("locate", 1, "2 is usual", wrong=wrong)
    f = indices_in(heard, parity.evaluations, "locate")
    rows = rows_of(answers, len(heard), "locate: answers")
    rows = [rows[at] for at in np.argsort(np.asarray(heard, np.int64), kind="stable").tolist()]
    named: list[int] = []
    while True:
        left = [at for at, i in enumerate(f.tolist()) if i not in named]
        absent = np.setdiff1d(np.arange(parity.evaluations), f[left])
        outside = _complement(parity.matrix[:, absent])
        if outside.shape[1] < 1:
            raise WrongAnswersError(f"locate: {absent.size} of {parity.evaluations} answers are missing, or wrong, and "
                                    f"nothing is left to check the others by; {_MORE}", tuple(sorted(named)))
        columns = outside.T @ parity.matrix[:, f[left]]
        gram, scale = _gram([rows[at] for at in left], f[left], columns)
        values, vectors = np.linalg.eigh(gram)
        signal = (vectors * np.sqrt(np.maximum(values, 0.0)))[:, ::-1]  # (P, P): the parity, turned so that it is no wider
        wider = np.sqrt(rows[0].size / parity.entries) if parity.entries else 1.0
        rounding = _ROUNDING * _unit(rows) * np.sqrt(len(left)) * float(np.linalg.norm(columns, 2))
        floor = parity.floor * wider / scale + rounding
        size = float(np.linalg.norm(signal, 2))
        if size <= floor:
            return tuple(sorted(named))
        found = _Search(columns, signal, max(floor, _RANGE * size)).named(wrong - len(named))
        if not found:
            raise WrongAnswersError(
                f"locate: wrong workers are there and cannot be named: of the answers of {f.size} of {parity.evaluations} "
                f"evaluations {size / floor:.1f} times the floor is left, which no set of up to wrong={wrong} workers alone "
                f"explains; {_MORE}", tuple(sorted(named)))
        named += [int(f[left[at]]) for at in found]


_MORE = "ask for more evaluations on more ranks, wait for more answers, or compute again on other nodes"


class _Search:
    """Sets of columns, (P, n), that leave no more than `floor` of a signal, (P, r), with columns by decreasing size."""

    def __init__(self, columns: Floats, signal: Floats, floor: float) -> None:
        self.columns, self.floor = columns, floor
        self.signal = signal[:, np.linalg.norm(signal, axis=0) > 1e-3 * floor / np.sqrt(signal.shape[1])]
        self.rows = len(columns)
        sizes = np.linalg.norm(self.signal, axis=0)
        self.rank = int((sizes > floor).sum())
        self.most = max(1, int((sizes > _SEEN * floor).sum()))  # columns that sets are searched by

    def named(self, wrong: int) -> tuple[int, ...]:
        """Return the smallest set of up to `wrong` columns, if no other does as well; else ()."""
        for size in range(max(1, self.rank), min(wrong, self.rows - 3) + 1):  # fewer columns leave what is of a higher rank
            found = self._nearest(size)
            if found is not None:
                return found if self._alone(found, wrong) else ()
        return ()

    def _nearest(self, size: int) -> tuple[int, ...] | None:
        """Return the set of a size that leaves least, if that is not more than the floor."""
        if size <= _SEARCHED:
            ((_, best),) = _best(self.columns, self.signal[:, : self.most], size)
            return best if self.leaves(best) <= self.floor else None
        basis = np.linalg.svd(self.signal, full_matrices=False)[0]
        norms = np.linalg.norm(self.columns, axis=0)
        for rank in range(self.rank, max(0, size - _SEARCHED), -1):
            within_space = np.linalg.norm(basis[:, :rank].T @ self.columns, axis=0) / norms
            sure = np.argsort(-within_space, kind="stable")[: rank if rank == size else max(0, size - _SEARCHED)].tolist()
            found = self._descend(sure if rank == size else [*sure, *self._added(sure, size - len(sure))])
            if self.leaves(found) <= self.floor:
                return tuple(sorted(found))
        return None

    def _added(self, base: Sequence[int], size: int) -> tuple[int, ...]:
        columns, signal = self._without(base)
        ((_, best),) = _best(columns, signal[:, : self.most], size, base)
        return best

    def _descend(self, found: Sequence[int]) -> tuple[int, ...]:
        """Exchange one column at a time for a better one, as long as there is one."""
        current, least = tuple(found), self._squares(found)
        while True:
            others = [(rest, self._added(rest, 1)) for rest in combinations(current, len(current) - 1)]
            left, best = min((self._squares([*rest, *new]), (*rest, *new)) for rest, new in others)
            if left >= 0.999 * least:
                return current
            current, least = best, left

    def _alone(self, found: tuple[int, ...], wrong: int) -> bool:
        """Return whether no other set explains as much, of up to three columns, or of one more than the found are.

        Of more than three found, sets without one of them, and with up to two others, and sets without two and with two
        others. Sets of more than `wrong` columns do not count.
        """
        few = len(found) <= _SEARCHED
        most = min(wrong, max(len(found) + 1, _COMPARED if few else 0))
        for out in range(1, min(len(found), _SEARCHED if few else 2) + 1):
            size = most - len(found) + out if few or out == 1 else out
            for kept in combinations(found, len(found) - out):
                if len(kept) + size > self.rows - 2:
                    return False
                columns, signal = self._without(kept)
                signal = signal[:, : self.most]
                sets = _best(columns, signal, size, found, self.floor**2 * min(signal.shape))
                if len(sets) > _MANY or any(self.leaves([*kept, *other]) <= self.floor for _, other in sets):
                    return False
        return True

    def leaves(self, chosen: Sequence[int]) -> float:
        """Return the largest singular value of the signal without some columns."""
        return float(np.linalg.norm(self._without(chosen)[1], 2))

    def _squares(self, chosen: Sequence[int]) -> float:
        return float(np.square(self._without(chosen)[1]).sum())

    def _without(self, chosen: Sequence[int]) -> tuple[Floats, Floats]:
        if not chosen:
            return self.columns, self.signal
        q = np.linalg.qr(self.columns[:, list(chosen)])[0]
        return self.columns - q @ (q.T @ self.columns), self.signal - q @ (q.T @ self.signal)


def _best(columns: Floats, signal: Floats, size: int, banned: Sequence[int] = (),
          bound: float | None = None) -> list[tuple[float, tuple[int, ...]]]:
    """Return the set of `size` columns that leaves least of a signal, by squares, or all that leave `bound`, at most.

    All sets are looked at, in one batch for all that begin alike: each has all but one column, for which all are tried at
    once.
    """
    allowed = np.setdiff1d(np.arange(columns.shape[1]), np.array(banned, np.int64))
    a = columns[:, allowed]
    gram, against, total = a.T @ a, a.T @ signal, float(np.square(signal).sum())
    norms = np.diag(gram)
    begun = np.array([*combinations(range(allowed.size), size - 1)], np.int64).reshape(-1 if size > 1 else 1, size - 1)
    least, found = np.inf, list[tuple[float, tuple[int, ...]]]()
    for start in range(0, len(begun), _BATCH):
        first = begun[start : start + _BATCH]
        rest, overlap = norms[None], np.square(against).sum(axis=1)[None]
        explained = np.zeros(len(first))
        if size > 1:
            inner, sides, cross = gram[first[:, :, None], first[:, None, :]], against[first], gram[first]
            inner = inner + np.eye(size - 1) * (1e-14 * norms.max())
            solved = np.linalg.solve(inner, np.concatenate([sides, cross], axis=2))
            own, others = solved[:, :, : sides.shape[2]], solved[:, :, sides.shape[2] :]
            explained = np.einsum("ckr,ckr->c", sides, own)
            rest = norms - np.einsum("ckm,ckm->cm", cross, others)
            overlap = np.square(against.T - own.transpose(0, 2, 1) @ cross).sum(axis=1)
        gain = np.where(rest > _DEPENDENT * norms, overlap / np.maximum(rest, _DEPENDENT * norms), 0.0)
        left = total - explained[:, None] - gain
        places = [np.unravel_index(int(np.argmin(left)), left.shape)] if bound is None else np.argwhere(left <= bound)
        for row, last in places:
            chosen = tuple(sorted({*allowed[first[row]].tolist(), int(allowed[last])}))
            if bound is not None and len(chosen) == size:
                found.append((float(left[row, last]), chosen))
            elif bound is None and left[row, last] < least:
                least, found = float(left[row, last]), [(float(left[row, last]), chosen)]
        if len(found) > size * _MANY:
            break
    return list(dict.fromkeys(found)) if bound is None else list({chosen: (left, chosen) for left, chosen in found}.values())


def _sizes(evaluations: int, low: int | None, share: float) -> tuple[int, int]:
    n = whole("Parity", 1, "40 for 8 blocks is usual", evaluations=evaluations)
    return n, whole("Parity", 1, "leave at least one coefficient for parity", most=max(1, n - 1),
                    low=int(np.ceil(share * n)) if low is None else low)


def _dct(n: int, low: int) -> Floats:
    """Return rows `low` to n - 1 of the orthonormal DCT of n points."""
    odd = 2 * np.arange(n) + 1
    return np.asarray(np.sqrt(2 / n) * np.cos(np.outer(np.arange(low, n), odd) * (np.pi / (2 * n))))


def _complement(columns: Floats) -> Floats:
    """Return an orthonormal basis, (P, P - r), of what is orthogonal to columns, (P, r)."""
    rows, count = columns.shape
    return np.linalg.qr(columns, mode="complete")[0][:, count:] if count < rows else np.zeros((rows, 0))


def _unit(rows: Array | Sequence[Array]) -> float:
    return float(np.finfo(np.asarray(rows[0]).dtype).eps)


def _gram(rows: Sequence[Array], names: Sequence[int] | NDArray[np.int64], matrix: Floats) -> tuple[Floats, float]:
    """Return S S' of S = matrix @ rows / scale, (P, P), and the scale, the norm of all rows."""
    largest = np.array([max(row.max(initial=0.0), -row.min(initial=0.0)) for row in rows], np.float64)
    if not np.isfinite(largest).all():
        raise not_finite("locate", [int(i) for i, size in zip(names, largest, strict=True) if not np.isfinite(size)])
    scale = float(largest.max()) or 1.0
    gram = np.zeros((len(matrix), len(matrix)))
    squares = 0.0
    for _, block in chunks(rows):
        parity = matrix @ np.divide(block, scale, out=block)
        gram += parity @ parity.T
        squares += float(np.square(block).sum())
    norm = np.sqrt(squares) or 1.0
    return gram / norm**2, scale * norm
