"""A compressor of two bits an entry: TwoBits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.kernels import BLOCK
from mpi_ef.ranges import whole

from .combination import Source, Vector, source, writable
from .compressor import Codec, Compressor, Wires, words

__all__ = ["TwoBits"]


@dataclass(frozen=True, repr=False)
class TwoBits(Compressor):
    """Keep the sign of every entry and one of two magnitudes, which a block shares: for the values of TopK.

    The magnitudes of a block are cut at their mean; what is sent of each half is its mean. Two bits an entry, and two
    numbers a block.

    Parameters
    ----------
    block : int
        Entries that share two magnitudes, up to 4096.

    Notes
    -----
    Of an entry ``m`` of a half with n entries and mean magnitude a, ``C(x) = a sign(x)``, and
    ``||x - C(x)||^2 = ||x||^2 - sum n a^2``. With one half that is :class:`Sign`, and two are never worse: alpha >= 1 / B
    for a block of B entries. Of values that TopK has kept about 0.9 of the squared norm is sent. sign(0) = +1. A mean below
    the smallest subnormal number is 0: what that loses of an entry is up to one such unit more.
    """

    block: int = 512

    def __post_init__(self) -> None:
        whole("TwoBits", 1, "512 is usual", most=BLOCK, block=self.block)

    def codec(self, d: int, dtype: DTypeLike = np.float32) -> Codec:
        """Return a codec for magnitudes and bits."""
        return _TwoBitsCodec(d, dtype, self.block)

    def alpha(self, d: int) -> float:
        """Return 1 / B."""
        return 1.0 / max(1, min(self.block, d))


class _TwoBitsCodec(Codec):
    """Wire: two magnitudes a block in the codec's dtype, signs, and which magnitude; each part padded to whole words."""

    def __init__(self, d: int, dtype: DTypeLike, block: int) -> None:
        super().__init__(d, dtype)
        self._block, bits = block, -(-self.d // 8)
        self._levels_nbytes = 2 * self.dtype.itemsize * -(-self.d // block)
        signs = words(self._levels_nbytes)
        highs = signs + words(bits)
        self._signs, self._highs = slice(signs, signs + bits), slice(highs, highs + bits)
        self.nbytes = highs + words(bits)

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:  # noqa: ARG002
        x = x if isinstance(x, Source) else source(x)
        wire[self._levels_nbytes :] = 0
        finite: bool = self._kernels.encode_levels(*x, self._block, *self._parts(wire))
        return finite

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        if overwrite:
            out.fill(0)
        for wire in wires:
            self._kernels.add_levels(*self._parts(wire), self._block, self.dtype.type(factor), writable(out))

    def _parts(self, wire: Wires) -> tuple[Vector, Wires, Wires]:
        return wire[: self._levels_nbytes].view(self.dtype), wire[self._signs], wire[self._highs]
