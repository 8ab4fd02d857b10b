"""Compressors that say something about every coordinate: Identity, Quantize, Sign."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef import kernels
from mpi_ef.errors import OptionError, briefly
from mpi_ef.ranges import whole

from .combination import Source, Vector, source, writable
from .compressor import Codec, Compressor, Wires, words

__all__ = ["Identity", "Quantize", "Sign", "Vote", "form_of"]


@dataclass(frozen=True, repr=False)
class Identity(Compressor):
    """Keep everything. Wire: the values, 4 or 8 bytes each. alpha = 1."""

    plan = "dense"

    def codec(self, d: int, dtype: DTypeLike = np.float32, device: str = "cpu") -> Codec:
        """Return a codec that copies."""
        return _IdentityCodec(d, dtype, device)

    def alpha(self, d: int) -> float:  # noqa: ARG002
        """Return 1: nothing is lost."""
        return 1.0


class _IdentityCodec(Codec):
    form = -1, 1

    def __init__(self, d: int, dtype: DTypeLike, device: str) -> None:
        super().__init__(d, dtype, device)
        self._used = self.d * self.dtype.itemsize
        self.nbytes = words(self._used)

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:  # noqa: ARG002
        x = x if isinstance(x, Source) else source(x)
        wire[self._used :] = 0
        finite: bool = self._kernels.combine(x.terms, x.factors, wire[: self._used].view(self.dtype))
        self._keep(x, wire)
        return finite

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        if overwrite:
            out.fill(0)
        for wire in wires:
            self._kernels.add_dense(self.plain_values(wire), factor, writable(out))

    def plain_values(self, wire: Wires) -> Vector:
        return wire[: self._used].view(self.dtype)


_BITS = {"bf16": 16, "fp16": 16, "int8": 8}


@dataclass(frozen=True, repr=False)
class Quantize(Compressor):
    """Round every value to 16 or 8 bits, with one power of two per block.

    Parameters
    ----------
    format : {"bf16", "fp16", "int8"}
        8, 11 or 7 significant bits.
    block : int
        Entries that share an exponent. Wire: ``16 / block`` bits per entry more than the format says.

    Notes
    -----
    The shared exponent (as in the OCP microscaling formats) keeps fp16 from overflowing and subnormal inputs from
    vanishing, and makes decoding exact. alpha = 1 - 2^-15 (bf16), 1 - 2^-21 (fp16), 1 - B / (16128 + B) (int8,
    B = min(block, d)): an int8 step is at most 1/63.5 of the block's largest magnitude, half of it may be lost per entry.
    """

    format: Literal["bf16", "fp16", "int8"] = "bf16"
    block: int = 256

    def __post_init__(self) -> None:
        if not (isinstance(self.format, str) and self.format in _BITS):
            raise OptionError(f"Quantize: format={briefly(self.format)} is unknown; take one of {', '.join(_BITS)}")
        whole("Quantize", 1, "take for example 256", block=self.block)

    def codec(self, d: int, dtype: DTypeLike = np.float32, device: str = "cpu") -> Codec:
        """Return a codec for exponents and codes."""
        return _QuantizeCodec(d, dtype, self, device)

    def alpha(self, d: int) -> float:
        """Return the contraction constant, see the class."""
        block = min(self.block, max(d, 1))
        return 1.0 - {"bf16": 2.0**-15, "fp16": 2.0**-21, "int8": block / (16128.0 + block)}[self.format]


class _QuantizeCodec(Codec):
    """Wire: the exponents (int16 each), then the codes, each part padded to whole words."""

    def __init__(self, d: int, dtype: DTypeLike, what: Quantize, device: str) -> None:
        super().__init__(d, dtype, device)
        self._format, self._block = what.format, what.block
        self.form = kernels.FORMATS[what.format], what.block
        self._code = np.dtype(np.int8 if what.format == "int8" else np.int16)
        self._exponents_nbytes = 2 * -(-self.d // what.block)
        self._start = words(self._exponents_nbytes)
        self._stop = self._start + self.d * self._code.itemsize
        self.nbytes = words(self._stop)

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:  # noqa: ARG002
        x = x if isinstance(x, Source) else source(x)
        wire[self._exponents_nbytes : self._start] = 0
        wire[self._stop :] = 0
        finite: bool = self._kernels.quantize(*x, self._format, self._block, *self._parts(wire))
        return finite

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        for row, wire in enumerate(wires):
            first = overwrite and row == 0
            self._kernels.add_quantized(*self._parts(wire), self._format, self._block, factor, first, writable(out))

    def _parts(self, wire: Wires) -> tuple[np.ndarray, np.ndarray]:
        return wire[: self._exponents_nbytes].view(np.int16), wire[self._start : self._stop].view(self._code)


def form_of(codec: Codec) -> tuple[int, int] | None:
    """Return the form of a codec's wires; None of subclasses, which may write others. Local."""
    return codec.form if type(codec) in (_IdentityCodec, _QuantizeCodec) else None


@dataclass(frozen=True, repr=False)
class Sign(Compressor):
    """Keep one bit per entry and the mean magnitude of each block: ``C(x) = ||x||_1 / B * sign(x)``.

    Parameters
    ----------
    block : int or None
        Entries that share a scale; None takes one scale for the whole vector.

    Notes
    -----
    Karimireddy et al. 2019 (arXiv 1901.09847), the contractive scaling: alpha = ||x||_1^2 / (B ||x||_2^2) >= 1 / B for a
    block of B entries. sign(0) = +1. Where B times the mean magnitude is below the smallest subnormal number the scale
    rounds to zero and nothing is sent: the bound then holds up to one subnormal unit per entry.
    """

    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            whole("Sign", 1, "take for example 1024, or None", block=self.block)

    def codec(self, d: int, dtype: DTypeLike = np.float32, device: str = "cpu") -> Codec:
        """Return a codec for scales and bits."""
        return _SignCodec(d, dtype, self.block, device)

    def alpha(self, d: int) -> float:
        """Return 1 / B, reached by a vector with one non-zero entry per block."""
        return 1.0 / max(1, d if self.block is None else min(self.block, d))


class _SignCodec(Codec):
    """Wire: the scales in the codec's dtype, then the bits, most significant first, each part padded to whole words."""

    def __init__(self, d: int, dtype: DTypeLike, block: int | None, device: str) -> None:
        super().__init__(d, dtype, device)
        self._block = max(1, self.d if block is None else min(block, self.d))
        self._scales_nbytes = self.dtype.itemsize * -(-self.d // self._block)
        self._start = words(self._scales_nbytes)
        self._stop = self._start + -(-self.d // 8)
        self.nbytes = words(self._stop)
        gaps = (slice(self._scales_nbytes, self._start), slice(self._stop, self.nbytes))
        self._padding = [gap for gap in gaps if gap.start < gap.stop]
        self._no_rows = self.rows(self._kernels.empty((0, self.nbytes), np.uint8), 0.0)

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:  # noqa: ARG002
        x = x if isinstance(x, Source) else source(x)
        return self._encode(x, self._no_rows, wire)

    def encode_sum(self, codec: Codec, wires: Wires, factor: float, x: Source, wire: Wires) -> bool:
        """Write the message for x plus ``factor`` times the decoded `wires` of another codec for signs, in one pass."""
        assert isinstance(codec, _SignCodec)  # noqa: S101
        return self._encode(x, codec.rows(wires, factor), wire)

    def can_encode_sum(self, codec: Codec) -> bool:
        return isinstance(codec, _SignCodec)

    def rows(self, wires: Wires, factor: float) -> tuple[Wires, Vector, int, Any]:
        """Return `wires` as the kernels take them: bits, scales, block, factor."""
        scales = wires[:, : self._scales_nbytes].view(self.dtype)
        return wires[:, self._start : self._stop], scales, self._block, self.dtype.type(factor)

    def _encode(self, x: Source, rows: tuple[Wires, Vector, int, Any], wire: Wires) -> bool:
        for gap in self._padding:
            wire[gap] = 0
        bits, scales = wire[self._start : self._stop], wire[: self._scales_nbytes].view(self.dtype)
        finite: bool = self._kernels.encode_signs(*x, *rows, self._block, bits, scales)
        return finite

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        self._kernels.add_signs(*self.rows(wires, factor), overwrite, writable(out))


@dataclass(frozen=True, repr=False)
class Vote(Compressor):
    """Keep one bit per entry and nothing else: ``C(x) = sign(x)``. For majority votes.

    On a :class:`TwoPhaseMean` without residual every entry of the mean is the sign that most ranks have sent (Bernstein et
    al. 2018, signSGD, arXiv 1802.04434). sign(0), and a tie, is +1 in one exchange and -1 in the next, so that what nobody
    votes on stays where it is. Not contractive: no error feedback for it, alpha = 0.
    """

    def codec(self, d: int, dtype: DTypeLike = np.float32, device: str = "cpu") -> Codec:
        """Return a codec for bits."""
        return _VoteCodec(d, dtype, device)

    def alpha(self, d: int) -> float:  # noqa: ARG002
        """Return 0: the message says nothing about magnitudes."""
        return 0.0


class _VoteCodec(Codec):
    """Wire: the bits, most significant first, padded to whole words."""

    def __init__(self, d: int, dtype: DTypeLike, device: str) -> None:
        super().__init__(d, dtype, device)
        self._used = -(-self.d // 8)
        self.nbytes = words(self._used)
        blocks = -(-self.d // kernels.BLOCK)
        self._magnitudes = self._kernels.zeros(blocks)  # the kernel writes them, they are not read
        self._nobody = self._kernels.empty((0, self._used), np.uint8), self._kernels.empty((0, blocks))

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:  # noqa: ARG002
        x = x if isinstance(x, Source) else source(x)
        bits, odd = wire[: self._used], step >> 1 & 1  # a two-phase plan counts two steps an exchange
        turned = x._replace(less_message=False, factors=-x.factors if odd else x.factors)
        rows = (*self._nobody, kernels.BLOCK, self.dtype.type(0))
        finite: bool = self._kernels.encode_signs(*turned, *rows, kernels.BLOCK, bits, self._magnitudes)
        wire[self._used :] = 0
        if odd:  # signs of -x, turned around, are those of x but for zeros
            bits ^= 0xFF
            bits[self.d // 8 :] &= 0xFF00 >> self.d % 8 & 0xFF  # none beyond d
        if x.keep.size and x.less_message:
            self.add(wire[None], x.keep, -1.0)
        return finite

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        ones = self._kernels.empty((len(wires), self._magnitudes.size))
        ones.fill(1)
        self._kernels.add_signs(wires[:, : self._used], ones, kernels.BLOCK, factor, overwrite, writable(out))
