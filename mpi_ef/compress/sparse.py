"""Compressors that keep k coordinates: TopK and RandK, with any dense compressor for the kept values.

::

    TopK wire    | low bits of indices | upper bitmap of indices | values |
    RandK wire   | step (u64) | rank (u64) |                       values |

Each part fills whole 64-bit words. The indices are Elias-Fano coded (see ``kernels/coding.py``), the values are the wire
of the compressor `values` for a vector of length k.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from operator import index
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef import kernels
from mpi_ef.errors import OptionError, ShapeError, briefly
from mpi_ef.ranges import whole, within

from .combination import Source, Vector, source, writable
from .compressor import Codec, Compressor, Wires, check_compressor, flat
from .dense import Identity, form_of

__all__ = ["RandK", "TopK", "TopKCodec"]


@dataclass(frozen=True, repr=False)
class _KeptCoordinates(Compressor):
    """What TopK and RandK share: how many coordinates, and how their values travel."""

    ratio: float | None = None
    k: int | None = None
    values: Compressor = Identity()

    sparse = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.ratio is None) == (self.k is None):
            raise OptionError(f"{name}: pass either ratio, as in {name}(0.01), or a count, as in {name}(k=100)")
        if self.k is None:
            within(name, "(0, 1]", "0.01 keeps one coordinate in a hundred", ratio=self.ratio)
        else:
            whole(name, 1, "keep at least one coordinate", k=self.k)
        check_compressor(name, "Quantize('bf16')", values=self.values)
        if self.values.sparse:
            raise OptionError(f"{name}: values={briefly(self.values)} is sparse itself; take Identity, Quantize or Sign")

    def count(self, d: int) -> int:
        """Return how many coordinates of a vector of length `d` are kept: k, or max(1, floor(ratio * d))."""
        if self.k is None:
            # The factor undoes representation error: 0.29 * 100 is 28.999999999999996 in floating point.
            return min(d, max(1, int((self.ratio or 0.0) * d * (1.0 + 1e-12))))
        if self.k > d:
            raise OptionError(f"{type(self).__name__}: k={self.k} exceeds d={d}; take k <= d, or a ratio")
        return self.k

    def _share(self, d: int) -> float:
        return self.count(d) / max(1, d) if self.ratio is None else self.ratio

    def grown(self, times: int, d: int) -> Compressor:
        """Return TopK with so many times the share, see :meth:`Compressor.grown`."""
        return TopK(min(1.0, times * self._share(d)) or 1.0, values=self.values)

    def part(self, start: int, stop: int, d: int) -> Compressor:  # noqa: ARG002
        """Return the same ratio, also where a count was given, see :meth:`Compressor.part`."""
        return self if self.k is None else replace(self, k=None, ratio=self._share(d) or 1.0)

    def alpha(self, d: int) -> float:
        """Return k / d times the contraction constant of `values` at length k."""
        k = self.count(d)
        return k / d * self.values.alpha(k) if d else 1.0


@dataclass(frozen=True, repr=False)
class TopK(_KeptCoordinates):
    """Keep the k entries of largest magnitude. Exact; among equal magnitudes the lowest index comes first.

    Parameters
    ----------
    ratio : float, optional
        Share of the coordinates that is kept, in (0, 1]; k = max(1, floor(ratio * d)).
    k : int, optional
        Number of kept coordinates. Pass either `ratio` or `k`.
    values : Compressor
        How the kept values travel, for example ``Quantize("bf16")``.
    segments : tuple of int, int, or "parameters", optional
        Lengths of consecutive parts of the vector, from each of which `ratio` is kept (at least one entry), as papers do
        per tensor; one number is the length of all but the last. "parameters" stands for the lengths of the model's
        parameters; only optimizers know them.

    Notes
    -----
    alpha = k / d * alpha(values), with segments the least k_s / d_s in place of k / d. Wire: about ``log2(d / k) + 2``
    bits for an index, and the value.
    """

    segments: tuple[int, ...] | int | Literal["parameters"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments is None:
            return
        if self.ratio is None:
            raise OptionError("TopK: segments go with a ratio, which is kept of each; pass TopK(0.01, segments=...)")
        if isinstance(self.segments, int):
            whole("TopK", 1, "4096 is usual", segments=self.segments)
        elif not (isinstance(self.segments, str) and self.segments == "parameters"):
            try:
                segments = (-1,) if isinstance(self.segments, str) else tuple(map(index, self.segments))
            except TypeError:
                segments = (-1,)
            if min(segments, default=0) < 0:
                raise OptionError(f"TopK: segments={briefly(self.segments)}; pass the lengths of the parts, or 'parameters'")
            object.__setattr__(self, "segments", segments)

    def bound_to(self, shapes: Iterable[tuple[int, ...]]) -> "TopK":
        """Return the same with the lengths of parameters of these shapes in place of "parameters". Local."""
        return replace(self, segments=tuple(map(prod, shapes))) if self.segments == "parameters" else self

    def segment_bounds(self, d: int) -> NDArray[np.int64]:
        """Return where the segments of a vector of length `d` begin, and d."""
        if self.segments is None:
            return np.array([0, d], np.int64)
        if isinstance(self.segments, str):
            raise OptionError("TopK: segments='parameters' means something to optimizers only; pass lengths here")
        if isinstance(self.segments, int):
            return np.append(np.arange(0, d, self.segments), d).astype(np.int64)
        bounds = np.cumsum((0, *self.segments), dtype=np.int64)
        if bounds[-1] != d:
            raise ShapeError(f"TopK: the segments have {bounds[-1]} entries together, the vector has {d}; pass the "
                             "lengths of all its parts")
        return bounds

    def segment_counts(self, d: int) -> NDArray[np.int64]:
        """Return how many entries of each segment are kept."""
        if self.segments is None:
            return np.array([self.count(d)], np.int64)
        return np.array([super(TopK, self).count(int(n)) if n else 0 for n in np.diff(self.segment_bounds(d))],
                        np.int64)

    def grown(self, times: int, d: int) -> Compressor:
        """Return the same with so many times the share, of each segment, see :meth:`Compressor.grown`."""
        return replace(self, k=None, ratio=min(1.0, times * self._share(d)) or 1.0)

    def part(self, start: int, stop: int, d: int) -> Compressor:
        """Return the same ratio of each segment, as far as it lies in the part, see :meth:`Compressor.part`."""
        if self.segments is None:
            return super().part(start, stop, d)
        if isinstance(self.segments, int):
            return self
        sizes = np.diff(np.clip(self.segment_bounds(d), start, stop))
        return replace(self, segments=tuple(sizes[sizes > 0].tolist()))

    def count(self, d: int) -> int:
        """Return how many coordinates of a vector of length `d` are kept, over all segments."""
        return super().count(d) if self.segments is None else int(self.segment_counts(d).sum())

    def alpha(self, d: int) -> float:
        """Return the least share kept of a segment times the contraction constant of `values` at length k."""
        if self.segments is None:
            return super().alpha(d)
        sizes, counts = np.diff(self.segment_bounds(d)), self.segment_counts(d)
        return float((counts[sizes > 0] / sizes[sizes > 0]).min(initial=1.0)) * self.values.alpha(self.count(d))

    def codec(self, d: int, dtype: DTypeLike = np.float32, device: str = "cpu") -> Codec:
        """Return a codec for k coordinates of d."""
        return TopKCodec(d, dtype, self, device)


@dataclass(frozen=True, repr=False)
class RandK(_KeptCoordinates):
    """Keep k random entries, unscaled. The subset depends on (seed, step, rank) alone; only values travel.

    Parameters
    ----------
    ratio, k, values
        As of :class:`TopK`.
    seed : int
        Key of the draws, from 0 to 2^63 - 1. No global random generator is read or changed.

    Notes
    -----
    alpha = k / d * alpha(values), in expectation over the draws: a single draw may miss everything.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("RandK", 0, "pass another one", most=(1 << 63) - 1, seed=self.seed)

    def codec(self, d: int, dtype: DTypeLike = np.float32, device: str = "cpu") -> Codec:
        """Return a codec for k coordinates of d."""
        return _RandKCodec(d, dtype, self, device)


class _SparseCodec(Codec):
    def __init__(self, d: int, dtype: DTypeLike, what: _KeptCoordinates, device: str) -> None:
        super().__init__(d, dtype, device)
        self.k = k = what.count(self.d)
        self._values = what.values.codec_on(device, k, dtype)
        room = self._room(k, what)
        self._places, self._candidates = self._kernels.zeros(room, np.int64), self._kernels.zeros(room)
        self._indices, self._kept = self._places[:k], self._candidates[:k]
        self._head = self._head_nbytes(k)
        self.nbytes = self._head + self._values.nbytes
        self._decoded = self._kernels.zeros(k, np.int64)  # the indices of another message

    def _room(self, k: int, what: _KeptCoordinates) -> int:  # noqa: ARG002
        """Return the length of the memory behind the arrays for k indices and k values."""
        return k

    @abstractmethod
    def _head_nbytes(self, k: int) -> int:
        """Return the size of what comes before the values."""

    @abstractmethod
    def _choose(self, x: Source, head: Wires, step: int, rank: int) -> bool:
        """Fill indices and values for `x`, and write what the receiver needs to know of the indices into `head`."""

    @abstractmethod
    def _recall(self, head: Wires, indices: NDArray[np.int64]) -> None:
        """Fill `indices` from `head`."""

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:
        x = x if isinstance(x, Source) else source(x)
        finite: bool = self._kernels.checked(self._encode(x, wire, step, rank),
                                             lambda: self._encode_exactly(x, wire, step, rank))
        return finite

    def _encode_exactly(self, x: Source, wire: Wires, step: int, rank: int) -> bool:
        with self._kernels.exactly():
            return self._encode(x, wire, step, rank)

    def _encode(self, x: Source, wire: Wires, step: int, rank: int) -> bool:
        finite = self._choose(x, wire[: self._head], step, rank)
        body = wire[self._head :]
        values = self._values.plain_values(body)
        if values is None:
            finite &= self._values.encode(self._kept, body)
        else:
            values[:] = self._kept
            body[values.nbytes :] = 0
        if x.keep.size and x.less_message:
            self.add_encoded(wire, x.keep, -1.0)
        return finite

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        if overwrite:
            out.fill(0)
        for wire in wires:
            self._recall(wire[: self._head], self._decoded)
            self._add_at(self._decoded, wire, out, factor)

    def add_encoded(self, wire: Wires, out: Vector, factor: float = 1.0) -> None:
        self._add_at(self._indices, wire, out, factor)

    def _add_at(self, indices: NDArray[np.int64], wire: Wires, out: Vector, factor: float) -> None:
        values = self._values.plain_values(wire[self._head :])
        if values is None:
            values = self._kept
            self._values.add(wire[None, self._head :], values, overwrite=True)
        self._kernels.add_sparse(indices, values, factor, writable(out))

    def entries(self, wire: Wires, indices: NDArray[np.int64], values: Vector) -> None:
        self._fits(wire, indices, values)
        self._recall(wire[: self._head], indices)
        there = self._values.plain_values(wire[self._head :])
        if there is None:
            self._values.add(wire[None, self._head :], values, overwrite=True)
        else:
            values[:] = there

    def _fits(self, wire: Wires, indices: NDArray[np.int64], values: Vector) -> None:
        for name, array, shape, dtype in (("wire", wire, self.nbytes, np.uint8), ("indices", indices, self.k, np.int64),
                                          ("values", values, self.k, self.dtype)):
            if (array.shape, array.dtype) != ((shape,), dtype) or not array.flags.c_contiguous:
                how = "" if array.flags.c_contiguous else ", not contiguous"
                raise ShapeError(f"{type(self).__name__}.entries: {name} is {array.shape} of {array.dtype}{how}; pass "
                                 f"({shape},) of {np.dtype(dtype)}, contiguous")

    def clear(self, wires: Wires, out: Vector) -> None:
        for wire in wires:
            self._recall(wire[: self._head], self._decoded)
            self._kernels.clear_sparse(self._decoded, out)


class TopKCodec(_SparseCodec):
    """What :meth:`TopK.codec` returns, and :class:`Chunks` puts together.

    Attributes
    ----------
    bounds, counts : of the segments, see :meth:`TopK.segment_bounds`
    form : how values travel, as the kernels for many messages know it, else None: headroom and block
    layout : (1, 7) int64, of a message, see :mod:`mpi_ef.kernels.messages`
    """

    def __init__(self, d: int, dtype: DTypeLike, what: TopK, device: str) -> None:
        super().__init__(d, dtype, what, device)
        self.form = form_of(self._values) if device == "cpu" else None
        self.layout = np.array([[0, self._kept.size, self._low, self._lower, self._head, self.nbytes, self.d]])

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        """Add what all wires say in one call, see :meth:`Codec.add`."""
        if self.form is None:
            super().add(wires, out, factor, overwrite=overwrite)
            return
        if overwrite:
            out.fill(0)
        self._kernels.add_messages(self.layout, *self.form, *flat(wires), factor, writable(out), self._decoded,
                                   self._kept)

    def _room(self, k: int, what: _KeptCoordinates) -> int:
        assert isinstance(what, TopK)  # noqa: S101
        self.bounds, self.counts = what.segment_bounds(self.d), what.segment_counts(self.d)
        candidates: int = self._kernels.select_candidates(self.bounds, self.counts)
        return max(k, candidates)

    def _head_nbytes(self, k: int) -> int:
        self._low = kernels.low_bits(self.d, k)
        self._lower = kernels.lower_nbytes(k, self._low)
        return self._lower + kernels.upper_nbytes(self.d, k, self._low)

    def _choose(self, x: Source, head: Wires, step: int, rank: int) -> bool:  # noqa: ARG002
        finite: bool = self._kernels.select_largest(x.terms, x.factors, x.keep, x.keep_factors, self.bounds, self.counts,
                                                    self._places, self._candidates)
        self._kernels.encode_indices(self._indices, self._low, *self._halves(head))
        return finite

    def _recall(self, head: Wires, indices: NDArray[np.int64]) -> None:
        lower, upper = self._halves(head)
        self._kernels.decode_indices(lower, upper, self._low, self.d, indices)

    def _halves(self, head: Wires) -> tuple[np.ndarray, np.ndarray]:
        return head[: self._lower].view(np.uint64), head[self._lower :].view(np.uint64)


class _RandKCodec(_SparseCodec):
    def __init__(self, d: int, dtype: DTypeLike, what: RandK, device: str) -> None:
        super().__init__(d, dtype, what, device)
        self._seed = what.seed
        self._bitmap = np.empty((self.d + 63) // 64 if device == "cpu" else 0, np.uint64)

    def _head_nbytes(self, k: int) -> int:  # noqa: ARG002
        return 16

    def _choose(self, x: Source, head: Wires, step: int, rank: int) -> bool:
        head.view(np.uint64)[:] = step, rank
        self._recall(head, self._indices)
        self._kernels.gather(x.terms, x.factors, self._indices, self._kept)
        if x.keep.size:
            self._kernels.combine(x.terms, x.keep_factors, x.keep)
        finite: bool = self._kernels.combine(x.terms, x.factors, x.keep[:0])  # looks at it only
        return finite

    def _recall(self, head: Wires, indices: NDArray[np.int64]) -> None:
        self._kernels.sample_indices(self._seed, head.view(np.uint64), self.d, indices, self._bitmap)
