"""Vectors that are formed on the fly: what is sent, and what is kept of it, without a pass over memory of their own."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import OptionError, ShapeError
from mpi_ef.kernels.backend import aligned_zeros

__all__ = ["Combination", "Keep", "Source", "Vector", "aligned_zeros", "lazy", "source", "writable"]

Vector = NDArray[np.floating]

MOST_TERMS = 3


class Combination:
    """A linear combination of up to three vectors that is not computed yet: ``lazy(grad) - g_i``.

    Built by :func:`lazy` and arithmetic with arrays, numbers and other combinations. The kernels form it block by block
    while they select, sign or round, in the order of its terms; a vector that comes twice keeps its first place.
    """

    __slots__ = ("terms",)
    __array_ufunc__ = None  # arrays leave arithmetic with a combination to this class

    def __init__(self, *terms: tuple[float, Vector]) -> None:
        self.terms = terms

    def __add__(self, other: "Combination | Vector") -> "Combination":
        return self._plus(other, 1.0)

    def __sub__(self, other: "Combination | Vector") -> "Combination":
        return self._plus(other, -1.0)

    def __mul__(self, factor: float) -> "Combination":
        return Combination(*((factor * old, vector) for old, vector in self.terms))

    __rmul__ = __mul__

    def __getitem__(self, part: slice) -> "Combination":
        """Return the same of these entries of all vectors."""
        return Combination(*((factor, vector[part]) for factor, vector in self.terms))

    def _plus(self, other: "Combination | Vector", sign: float) -> "Combination":
        terms = list(self.terms)
        for factor, vector in other.terms if isinstance(other, Combination) else ((1.0, other),):
            for n, (old, known) in enumerate(terms):
                if known is vector:
                    terms[n] = (old + sign * factor, vector)
                    break
            else:
                terms.append((sign * factor, vector))
        if len(terms) > MOST_TERMS:
            raise OptionError(f"lazy: a combination of {len(terms)} vectors; the kernels take {MOST_TERMS}, so add some "
                              "of them up beforehand")
        return Combination(*terms)


def lazy(vector: Vector | Combination) -> Combination:
    """Return `vector` as a combination, to be added to and subtracted from without computing anything."""
    return vector if isinstance(vector, Combination) else Combination((1.0, vector))


@dataclass(frozen=True)
class Keep:
    """What an encoder leaves behind in the same pass: ``into = of``, or with ``less_message`` ``into = of - C(x)``.

    `of` combines the vectors of the encoded one, or some of them; `into`, (d,), is none of those and is overwritten, past
    the caches where it is long and aligned to 64 bytes.
    """

    of: Combination
    into: Vector
    less_message: bool = False


class Source(NamedTuple):
    """What is encoded and what is kept of it, as the kernels take them; see :func:`source`."""

    terms: tuple[Vector, Vector, Vector]
    factors: Vector
    keep: Vector
    keep_factors: Vector
    less_message: bool

    def part(self, start: int, stop: int) -> "Source":
        """Return the entries from `start` to `stop`."""
        (a, b, c), factors, keep, keep_factors, less_message = self
        terms = a[start:stop], b[start:stop], c[start:stop]
        return Source(terms, factors, keep[start:stop], keep_factors, less_message)


def _read_only(array: Vector) -> Vector:
    if not isinstance(array, np.ndarray):
        return array  # on a device, where it is a matter of agreement
    view = array.view()
    view.flags.writeable = False
    return view


_NOTHING: dict[Any, Vector] = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}
_ABSENT = {dtype: _read_only(array) for dtype, array in _NOTHING.items()}


def source(x: Vector | Combination, keep: Keep | None = None) -> Source:
    """Return `x` and `keep` as the kernels take them. Terms become read-only views: one machine code for all.

    Raises `OptionError` when `keep` wants a vector that is not in `x`, `ShapeError` when a vector is not contiguous.
    """
    terms = x.terms if isinstance(x, Combination) else ((1.0, x),)
    vectors = [vector for _, vector in terms]
    dtype = vectors[0].dtype
    on_host = isinstance(vectors[0], np.ndarray)
    nothing = _NOTHING[dtype] if on_host else vectors[0][:0]
    views = [_ABSENT[dtype] if on_host else nothing] * MOST_TERMS
    for n, vector in enumerate(vectors):
        if not vector.flags.c_contiguous:
            raise ShapeError("a vector is not contiguous; pass numpy.ascontiguousarray of it")
        views[n] = _read_only(vector)
    three, factors = (views[0], views[1], views[2]), _factors(dtype, *[factor for factor, _ in terms])
    if keep is None:
        return Source(three, factors, nothing, factors, False)
    if keep.of is x:
        return Source(three, factors, keep.into, factors, keep.less_message)
    kept = [0.0] * len(vectors)
    for factor, vector in keep.of.terms:
        place = next((n for n, known in enumerate(vectors) if known is vector), None)
        if place is None:
            raise OptionError("Keep: `of` has a vector that is not in what is sent; combine the same arrays in both")
        kept[place] = factor
    return Source(three, factors, keep.into, _factors(dtype, *kept), keep.less_message)


@lru_cache(maxsize=128)
def _factors(dtype: "np.dtype[Any]", *factors: float) -> Vector:
    three: Vector = np.array([*factors, 0.0, 0.0][:MOST_TERMS], dtype)
    three += 0  # no -0.0, which the cache would take for 0.0
    return three


def writable(out: Vector) -> Vector:
    """Return `out`, which kernels are about to write to without a look at strides. `ShapeError` if it is not contiguous."""
    if not out.flags.c_contiguous:
        raise ShapeError("out is not contiguous; pass an array that is, and copy it to where it belongs")
    return out
