"""Wires that no encoder has written, and decoders in memory that shows whether they keep to their own."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from mpi_ef.compress import Codec
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import MpiEfError

from .law import must
from .vectors import gaussian

__all__ = ["Decoders", "garbage"]

Wire = np.ndarray[Any, np.dtype[np.uint8]]
Draw = np.random.Generator

# NaN, Inf, the largest and the least numbers of all formats, extreme exponents, bits that are all the same.
_WORDS = (0, 2**64 - 1, 1, 2**63, 2**63 - 1, 0x7FF0 << 48, 0xFFF8 << 48, 0x7F800000FF800000, 0x7FC000007FC00001,
          0x7F7FFFFF7F7FFFFF, 0x7C007E007F807FC0, 0x7FFF7FFF7FFF7FFF, 0x8000800080008000, 0x7FFE8001FFFF0000,
          0x1FFFFFFFF, 0x8080808080808080)


def garbage(messages: Sequence[Wire], seed: int) -> Iterator[Wire]:
    """Yield wires without end: of random bytes, and `messages`, all of one size, of which something was changed. Local.

    The same ones for the same arguments.
    """
    rng = np.random.default_rng(seed)
    for change in cycle((_random, _flipped, _overwritten, _swapped, _thinned, _filled, _mixed, _cut, _thickened, _rolled)):
        wire = messages[int(rng.integers(len(messages)))].copy()
        if wire.size:
            change(rng, wire, messages)
        yield wire


def _random(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    wire[:] = rng.integers(0, 256, wire.size, np.uint8)


def _flipped(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    for bit in rng.integers(0, 8 * wire.size, rng.integers(1, 9)).tolist():
        wire[bit // 8] ^= 1 << bit % 8


def _overwritten(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    start, stop = _run(rng, wire)
    wire[start:stop] = _word(rng, stop - start)


def _swapped(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    wire[:] = np.roll(wire, wire.size // 2)


def _rolled(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    wire[:] = np.roll(wire, rng.integers(wire.size))


def _thinned(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    """Clear bits: too few marks."""
    start, stop = _run(rng, wire)
    for _ in range(rng.integers(1, 5)):
        wire[start:stop] &= rng.integers(0, 256, stop - start, np.uint8)


def _thickened(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    """Set bits: too many marks."""
    start, stop = _run(rng, wire)
    for _ in range(rng.integers(1, 5)):
        wire[start:stop] |= rng.integers(0, 256, stop - start, np.uint8)


def _filled(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    wire[:] = _word(rng, wire.size)


def _mixed(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:
    at = int(rng.integers(wire.size))
    wire[at:] = messages[int(rng.integers(len(messages)))][at:] if rng.integers(2) else _word(rng, wire.size - at)


def _cut(rng: Draw, wire: Wire, messages: Sequence[Wire]) -> None:  # noqa: ARG001
    wire[rng.integers(wire.size) :] = 0


def _run(rng: Draw, wire: Wire) -> tuple[int, int]:
    """Return where a run of bytes begins and ends, whole words more often than not."""
    start, stop = sorted(rng.integers(0, wire.size + 1, 2).tolist())
    return (start // 8 * 8, min(wire.size, stop // 8 * 8 + 8)) if rng.integers(4) else (start, stop)


def _word(rng: Draw, size: int) -> Wire:
    """Return so many bytes of a word, which is repeated."""
    word = np.full(size // 8 + 1, _WORDS[rng.integers(len(_WORDS))], np.uint64)
    return word.view(np.uint8)[:size]


class _Guarded:
    """An array with memory on both sides that nobody may write to, full of one byte."""

    def __init__(self, size: int, dtype: Any, fill: int) -> None:
        nbytes = size * np.dtype(dtype).itemsize
        guard = 512 + -(-2 * nbytes // 64) * 64
        memory = np.full(2 * guard + nbytes + 64, fill, np.uint8)
        memory = memory[-memory.ctypes.data % 64 :]  # as aligned as that of plans
        self.array = memory[guard : guard + nbytes].view(dtype)
        self._sides = memory[:guard], memory[guard + nbytes : 2 * guard + nbytes]
        self._wanted = self._bytes()

    def _bytes(self) -> list[bytes]:
        return [side.tobytes() for side in self._sides]

    def intact(self) -> bool:
        return self._bytes() == self._wanted


class Decoders:
    """The methods that decode, of two codecs that have nothing in common but what they are made of. Local.

    Parameters
    ----------
    make : callable
        Returns a new codec of vectors on the host.

    Attributes
    ----------
    messages : list of (nbytes,) uint8
        What the codec has encoded, of several vectors.
    """

    def __init__(self, make: Callable[[], Codec]) -> None:
        self._codecs = make(), make()
        codec = self._codecs[0]
        d, dtype = codec.d, codec.dtype
        self.messages = [np.zeros(codec.nbytes, np.uint8) for _ in range(4)]
        for n, message in enumerate(self.messages):
            codec.encode(gaussian(n, d, dtype) * dtype.type(10.0 ** (9 * (n % 3 - 1))), message, step=n, rank=n)
        self._start = gaussian(9, d, dtype)
        self._wires = [_Guarded(2 * codec.nbytes, np.uint8, fill) for fill in (0, 0xFF)]
        self._outs = [_Guarded(d, dtype, fill) for fill in (0, 0xFF)]
        self._indices, self._values = _Guarded(codec.k or 0, np.int64, 0xA5), _Guarded(codec.k or 0, dtype, 0xA5)
        self._before = self.messages[0]

    def check(self, wire: Wire) -> Vector | None:
        """Raise `AssertionError` unless `wire`, (nbytes,) uint8 of any content, is decoded safely.

        All methods give the same numbers, which follow from the wire alone, NaN and Inf among them; or all refuse it with an
        error of mpi_ef and write nothing. Nothing is written, or read, beyond wire and vector. Returns what was decoded, in
        memory that is used again, or None.
        """
        with np.errstate(all="ignore"):
            decoded = [self._decoded(n, wire) for n in (0, 1)]
            must((decoded[0] is None) == (decoded[1] is None), "one codec refuses what another one decodes")
            if decoded[0] is None or decoded[1] is None:
                return None
            must(same_numbers(decoded[0], decoded[1]),
                 "what is decoded depends on what a codec has decoded before, or on memory beyond the wire")
            self._many(wire, decoded[0])
            if self._codecs[0].k is not None:
                self._entries(wire, decoded[0])
            self._clear(wire, decoded[0])
            self._before = wire
            return decoded[0]

    def _decoded(self, n: int, wire: Wire) -> Vector | None:
        """Return what a codec adds to zeros, None where it refuses it."""
        codec, rows, out = self._codecs[n], self._rows(n, wire), self._outs[n].array
        if n:
            self._done("add", n, codec.add, rows[1:], out)  # the codecs differ in what they have decoded before
        out.fill(0)
        return out if self._done("add", n, codec.add, rows[:1], out) else None

    def _rows(self, n: int, wire: Wire) -> Wire:
        rows: Wire = self._wires[n].array.reshape(2, -1)
        rows[0], rows[1] = wire, self._before
        return rows

    def _done(self, what: str, n: int, call: Callable[..., None], wires: Wire, *arguments: Any, **options: Any) -> bool:
        """Call it, and tell whether it has not refused the wires."""
        before, outs = wires.tobytes(), [a.tobytes() for a in arguments if isinstance(a, np.ndarray)]
        try:
            call(wires, *arguments, **options)
            done = True
        except MpiEfError:
            after = [a.tobytes() for a in arguments if isinstance(a, np.ndarray)]
            must(outs == after, f"{what} refuses it, and has written")
            done = False
        except Exception as error:
            raise AssertionError(f"{what} raises {type(error).__name__}: {error}") from error
        must(self._outs[n].intact(), f"{what} writes beyond the vector")
        must(self._wires[n].intact() and wires.tobytes() == before, f"{what} writes to wires, or beyond them")
        return done

    def _many(self, wire: Wire, decoded: Vector) -> None:
        """Add two wires to a vector at once, and one after the other."""
        codec, rows = self._codecs[1], self._rows(1, wire)
        apart, together = self._start.copy(), self._outs[1].array
        for row in rows:
            codec.add(row[None], apart)
        together[:] = self._start
        self._done("add", 1, codec.add, rows, together)
        must(same_numbers(apart, together), "two wires at once give other numbers than one after the other")
        together[:] = self._start
        self._done("add", 1, codec.add, rows[:1], together)
        hidden = np.flatnonzero(np.isfinite(together) != np.isfinite(decoded))[:5].tolist()
        must(not hidden, f"NaN and Inf of entries {hidden} are not in what it was added to")
        self._done("add", 1, codec.add, rows[:1], together, overwrite=True)
        must(same_numbers(together, decoded), "overwrite=True gives other numbers than adding to zeros")

    def _entries(self, wire: Wire, decoded: Vector) -> None:
        codec, indices, values, out = self._codecs[1], self._indices.array, self._values.array, self._outs[1].array
        indices.fill(-1)
        self._done("entries", 1, lambda rows: codec.entries(rows[0], indices, values), self._rows(1, wire))
        must(self._indices.intact() and self._values.intact(), "entries writes beyond indices, or values")
        ascend = (np.diff(indices) > 0).all() and (not codec.k or 0 <= indices[0] <= indices[-1] < codec.d)
        must(ascend, "indices of entries do not ascend, or are not in [0, d)")
        out.fill(0)
        out[indices] += values
        must(same_numbers(out, decoded), "entries are others than add adds")

    def _clear(self, wire: Wire, decoded: Vector) -> None:
        """Clear what was added: nothing is left of it."""
        out = self._outs[1].array
        out[:] = decoded
        self._done("clear", 1, self._codecs[1].clear, self._rows(1, wire)[:1], out)
        must(not out.any(), f"clear leaves something in entries {np.flatnonzero(out)[:5].tolist()}")


def same_numbers(x: Vector, y: Vector) -> bool:
    """Tell whether two vectors have the same bits, but for those of NaN, of which any is like any other."""
    bits = f"u{x.itemsize}"
    return bool(((x.view(bits) == y.view(bits)) | (np.isnan(x) & np.isnan(y))).all())
