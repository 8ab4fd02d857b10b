"""Low-rank compression: a matrix travels as the product of two thin factors.

::

    wire   | left factors, and what travels whole, in the order of the parts | right factors |

The left factor of a (p, q) matrix is r rows of p entries, the right one r rows of q entries; see ``kernels/lowrank.py``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod
from operator import index
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.errors import OptionError, ShapeError, briefly
from mpi_ef.ranges import whole

from .combination import Source, Vector, source, writable
from .compressor import Codec, Compressor, Wires, words

__all__ = ["Factors", "LowRank"]

Shape = tuple[int, ...]


@dataclass(frozen=True, repr=False)
class LowRank(Compressor):
    """Keep a product of two thin factors of every matrix, of rank r. What is no matrix travels whole.

    Parameters
    ----------
    rank : int
        r, the number of rows of a factor. 1 to 4 are usual.
    shapes : tuple of tuples of int, or "parameters", optional
        Shapes of consecutive parts of the vector. A part with two or more dimensions is the matrix of ``shape[0]`` rows. It
        travels whole where factors would not be smaller, ``r (p + q) >= p q``. "parameters" stands for the shapes of
        the model's parameters; only optimizers know them. None sees the vector as one matrix, as square as may be, and
        a rest of fewer entries than it has rows.
    seed : int
        Key of the draws, from 0 to 2^63 - 1. No global random generator is read or changed.

    Notes
    -----
    PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727). :class:`mpi_ef.collectives.LowRankMean`, the plan made for
    this compressor, finds factors of the mean and begins every time with those of the last exchange. In other plans a
    rank is alone with its matrix M and draws a Gaussian Q: P = orthonormal basis of the columns of M Q, and
    ``C(M) = P P^T M``. Alone, alpha = r / min(p, q), in expectation over the draws (the least over the matrices; 1 when all
    travels whole): the space of M Q holds that of M V for an orthonormal basis V of Q in the row space of M, so that
    ``||P P^T M|| >= ||M V||``, and V is uniform. A single draw may miss everything.
    """

    plan = "low-rank"

    rank: int = 2
    shapes: tuple[Shape, ...] | Literal["parameters"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole("LowRank", 1, "2 is usual", rank=self.rank)
        whole("LowRank", 0, "pass another one", most=(1 << 63) - 1, seed=self.seed)
        if not (self.shapes is None or (isinstance(self.shapes, str) and self.shapes == "parameters")):
            object.__setattr__(self, "shapes", _checked(self.shapes))

    def bound_to(self, shapes: Iterable[Shape]) -> "LowRank":
        """Return the same with these shapes in place of "parameters". Local."""
        return replace(self, shapes=tuple(shapes)) if self.shapes == "parameters" else self

    def factors(self, d: int) -> "Factors":
        """Return where in a vector of length `d` the matrices lie, and where in messages their factors."""
        if isinstance(self.shapes, str):
            raise OptionError("LowRank: shapes='parameters' means something to optimizers only; pass shapes here")
        if self.shapes is None:
            rows = isqrt(d)
            columns = d // rows if rows else 0
            return Factors(((rows, columns), (d - rows * columns,)), self.rank)
        entries = sum(map(prod, self.shapes))
        if entries != d:
            raise ShapeError(f"LowRank: the shapes have {entries} entries together, the vector has {d}; pass the shapes of "
                             "all its parts, or none for a plan that cuts vectors into chunks")
        return Factors(self.shapes, self.rank)

    def alpha(self, d: int) -> float:
        """Return the least ``r / min(p, q)`` of a matrix, in expectation over the draws of a rank that is alone."""
        matrices = self.factors(d).parts
        return self.rank / float(matrices.min(axis=1).max(initial=self.rank))

    def codec(self, d: int, dtype: DTypeLike = np.float32, device: str = "cpu") -> Codec:
        """Return a codec that draws its columns for every message."""
        return _LowRankCodec(d, dtype, self, device)


def _checked(shapes: Sequence[Sequence[int]]) -> tuple[Shape, ...]:
    try:
        checked = tuple(tuple(map(index, shape)) for shape in shapes)
    except TypeError:
        checked = ((-1,),)
    if isinstance(shapes, str) or any(size < 0 for shape in checked for size in shape):
        raise OptionError(f"LowRank: shapes={briefly(shapes)}; pass the shapes of the parts, as in ((64, 32), (32,)), or "
                          "'parameters'")
    return checked


class Factors:
    """Where the matrices of a vector lie, and where their factors; products of the ones with the others."""

    def __init__(self, shapes: Sequence[Shape], rank: int) -> None:
        self.rank = int(rank)
        parts: list[tuple[int, int]] = []
        for shape in shapes:
            rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (prod(shape), 1)
            if rank * (rows + columns) < rows * columns:
                parts.append((rows, columns))
            elif rows * columns and parts and not parts[-1][1]:
                parts[-1] = (parts[-1][0] + rows * columns, 0)
            elif rows * columns:
                parts.append((rows * columns, 0))
        # (j, 2), rows and columns of consecutive parts; a part that travels whole has its length and 0.
        self.parts = np.array(parts, np.int64).reshape(-1, 2)
        self._place(parts)

    def _place(self, parts: list[tuple[int, int]]) -> None:
        self._matrices: list[tuple[slice, slice, slice, tuple[int, int]]] = []
        self._wholes: list[tuple[slice, slice]] = []
        at = left = right = 0
        for rows, columns in parts:
            if columns:
                ends = at + rows * columns, left + self.rank * rows, right + self.rank * columns
                places = slice(at, ends[0]), slice(left, ends[1]), slice(right, ends[2])
                self._matrices.append((*places, (rows, columns)))
            else:
                ends = at + rows, left + rows, right
                self._wholes.append((slice(at, ends[0]), slice(left, ends[1])))
            at, left, right = ends
        self.left_size, self.right_size = left, right  # entries: of left factors and what travels whole, of right ones
        # (matrices, 2): where the factor of a matrix begins and how long its rows are
        lefts = [(place.start, shape[0]) for _, place, _, shape in self._matrices]
        rights = [(place.start, shape[1]) for _, _, place, shape in self._matrices]
        self.left_spans, self.right_spans = (np.array(spans, np.int64).reshape(-1, 2) for spans in (lefts, rights))

    def draw(self, key: tuple[int, int], right: Vector) -> None:
        """Overwrite the right factors with Gaussian numbers, a function of `key` alone."""
        drawn = right if isinstance(right, np.ndarray) else np.empty(right.size, right.dtype)
        np.random.default_rng(key).standard_normal(out=drawn, dtype=right.dtype.type)
        if drawn is not right:
            right[:] = drawn

    def multiply(self, kernels: Any, x: Vector, right: Vector, left: Vector) -> None:
        """Write the products of the matrices in `x` (d,) with `right`, and what travels whole, to `left`."""
        for place, ours, theirs, shape in self._matrices:
            matrix, factor = x[place].reshape(shape), left[ours].reshape(self.rank, -1)
            kernels.multiply(right[theirs].reshape(self.rank, -1), matrix.T, factor)
        for place, ours in self._wholes:
            left[ours] = x[place]

    def multiply_back(self, kernels: Any, x: Vector, left: Vector, right: Vector) -> None:
        """Write the products of the transposed matrices in `x` (d,) with `left` to `right`."""
        for place, ours, theirs, shape in self._matrices:
            matrix, factor = x[place].reshape(shape), right[theirs].reshape(self.rank, -1)
            kernels.multiply(left[ours].reshape(self.rank, -1), matrix, factor)

    def copy_left(self, left: Vector, out: Vector) -> None:
        """Copy the left factors in `left` to `out`, which keeps what travels whole."""
        for _, ours, _, _ in self._matrices:
            out[ours] = left[ours]


class _LowRankCodec(Codec):
    def __init__(self, d: int, dtype: DTypeLike, what: LowRank, device: str) -> None:
        super().__init__(d, dtype, device)
        self._factors, self._seed = what.factors(self.d), int(what.seed)
        self._left = self._factors.left_size
        self._used = self.dtype.itemsize * (self._left + self._factors.right_size)
        self.nbytes = words(self._used)
        self._drawn, self._none = self._kernels.empty(self._factors.right_size), self._kernels.empty(0)
        self._formed: Vector | None = None

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:  # noqa: ARG002
        x = x if isinstance(x, Source) else source(x)
        if self._formed is None:
            self._formed = self._kernels.empty(self.d)
        wire[self._used :] = 0
        factors, (left, right) = self._factors, self._halves(wire)
        finite = bool(self._kernels.combine(x.terms, x.factors, self._formed))
        factors.draw((self._seed, step), self._drawn)
        factors.multiply(self._kernels, self._formed, self._drawn, left)
        if finite := finite and bool(self._kernels.all_finite(left)):
            self._kernels.orthonormalise(left, factors.left_spans, factors.rank, self._none)
        factors.multiply_back(self._kernels, self._formed, left, right)
        self._keep(x, wire)
        return finite and bool(self._kernels.all_finite(right))

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        what = self._factors
        for row, wire in enumerate(wires):
            first = overwrite and row == 0
            self._kernels.add_low_rank(*self._halves(wire), what.parts, what.rank, factor, first, writable(out))

    def _halves(self, wire: Wires) -> tuple[Vector, Vector]:
        values = wire[: self._used].view(self.dtype)
        return values[: self._left], values[self._left :]
