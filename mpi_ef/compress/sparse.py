"""Compressors that keep k coordinates: TopK and RandK, with any dense compressor for the kept values.

::

    TopK wire    | low bits of indices | upper bitmap of indices | values |
    RandK wire   | step (u64) | rank (u64) |                       values |

Each part fills whole 64-bit words. The indices are Elias-Fano coded (see ``kernels/coding.py``), the values are the wire
of the compressor `values` for a vector of length k.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef import kernels
from mpi_ef.errors import OptionError

from .compressor import Codec, Compressor, Vector, Wires
from .dense import Identity

__all__ = ["RandK", "TopK"]


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
        if self.ratio is not None and not 0.0 < self.ratio <= 1.0:
            raise OptionError(f"{name}: ratio={self.ratio} is not in (0, 1]; 0.01 keeps one coordinate in a hundred")
        if self.k is not None and (not isinstance(self.k, int | np.integer) or self.k < 1):
            raise OptionError(f"{name}: k={self.k!r} is not a positive integer; keep at least one coordinate")
        if self.values.sparse:
            raise OptionError(f"{name}: values={self.values} is sparse itself; take Identity, Quantize or Sign")

    def count(self, d: int) -> int:
        """Return how many coordinates of a vector of length `d` are kept: k, or max(1, floor(ratio * d))."""
        if self.k is None:
            # The factor undoes representation error: 0.29 * 100 is 28.999999999999996 in floating point.
            return min(d, max(1, int((self.ratio or 0.0) * d * (1.0 + 1e-12))))
        if self.k > d:
            raise OptionError(f"{type(self).__name__}: k={self.k} exceeds d={d}; take k <= d, or a ratio")
        return self.k

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

    Notes
    -----
    alpha = k / d * alpha(values). Wire: about ``log2(d / k) + 2`` bits for an index, and the value.
    """

    def codec(self, d: int, dtype: DTypeLike = np.float32) -> Codec:
        """Return a codec for k coordinates of d."""
        return _TopKCodec(d, dtype, self)


@dataclass(frozen=True, repr=False)
class RandK(_KeptCoordinates):
    """Keep k random entries, unscaled. The subset depends on (seed, step, rank) alone; only values travel.

    Parameters
    ----------
    ratio : float, optional
        Share of the coordinates that is kept, in (0, 1]; k = max(1, floor(ratio * d)).
    k : int, optional
        Number of kept coordinates. Pass either `ratio` or `k`.
    values : Compressor
        How the kept values travel.
    seed : int
        Key of the draws, from 0 to 2^63 - 1. No global random generator is read or changed.

    Notes
    -----
    alpha = k / d * alpha(values), in expectation over the draws: a single draw may miss everything.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 1 << 63:
            raise OptionError(f"RandK: seed={self.seed} is not in [0, 2^63); pass a non-negative integer")

    def codec(self, d: int, dtype: DTypeLike = np.float32) -> Codec:
        """Return a codec for k coordinates of d."""
        return _RandKCodec(d, dtype, self)


class _SparseCodec(Codec):
    def __init__(self, d: int, dtype: DTypeLike, what: _KeptCoordinates) -> None:
        super().__init__(d, dtype)
        k = what.count(self.d)
        self._values = what.values.codec(k, dtype)
        self._indices = np.empty(k, np.int64)
        self._kept = np.empty(k, dtype)
        self._head = self._head_nbytes(k)
        self.nbytes = self._head + self._values.nbytes

    @abstractmethod
    def _head_nbytes(self, k: int) -> int:
        """Return the size of what comes before the values."""

    @abstractmethod
    def _choose(self, x: Vector, head: Wires, step: int, rank: int) -> None:
        """Fill the indices for `x` and write what the receiver needs to know of them into `head`."""

    @abstractmethod
    def _recall(self, head: Wires) -> None:
        """Fill the indices from `head`."""

    def encode(self, x: Vector, wire: Wires, *, step: int = 0, rank: int = 0) -> None:
        self._choose(x, wire[: self._head], step, rank)
        np.take(x, self._indices, out=self._kept, mode="clip")  # indices are in range; "raise" would buffer a copy
        self._values.encode(self._kept, wire[self._head :])

    def add(self, wires: Wires, out: Vector, factor: float = 1.0) -> None:
        for wire in wires:
            self._recall(wire[: self._head])
            self._kept.fill(0)
            self._values.add(wire[None, self._head :], self._kept)
            kernels.add_sparse(self._indices, self._kept, self.dtype.type(factor), out)


class _TopKCodec(_SparseCodec):
    def _head_nbytes(self, k: int) -> int:
        self._low = kernels.low_bits(self.d, k)
        self._lower = kernels.lower_nbytes(k, self._low)
        return self._lower + kernels.upper_nbytes(self.d, k, self._low)

    def _choose(self, x: Vector, head: Wires, step: int, rank: int) -> None:  # noqa: ARG002
        kernels.select_largest(x, self._indices)
        kernels.encode_indices(self._indices, self._low, *self._halves(head))

    def _recall(self, head: Wires) -> None:
        lower, upper = self._halves(head)
        kernels.decode_indices(lower, upper, self._low, self._indices)

    def _halves(self, head: Wires) -> tuple[np.ndarray, np.ndarray]:
        return head[: self._lower].view(np.uint64), head[self._lower :].view(np.uint64)


class _RandKCodec(_SparseCodec):
    def __init__(self, d: int, dtype: DTypeLike, what: RandK) -> None:
        super().__init__(d, dtype, what)
        self._seed = what.seed

    def _head_nbytes(self, k: int) -> int:  # noqa: ARG002
        return 16

    def _choose(self, x: Vector, head: Wires, step: int, rank: int) -> None:  # noqa: ARG002
        head.view(np.uint64)[:] = step, rank
        self._recall(head)

    def _recall(self, head: Wires) -> None:
        step, rank = head.view(np.uint64).tolist()
        kernels.sample_indices(self._seed, step, rank, self.d, self._indices)
