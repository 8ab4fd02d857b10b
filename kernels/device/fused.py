"""Triton kernels: what :mod:`mpi_ef.kernels.device.plain` does in many passes, in one or two, with the same bits.

Factors are passed as the bits of the number: what Triton makes of a Python float is a float32. Products and sums stay apart,
so kernels are compiled with ``enable_fp_fusion=False``. Magnitudes are compared as integers, without the sign bit. Nothing
is compiled anew for special values of such bits.
"""

# ruff: noqa: N803, SIM108 (constants of compilation are written large, as in Triton's own code, and decide by `if`)
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import triton
import triton.language as tl

__all__ = ["BLOCK", "clear_at", "collect", "combine", "emit_indices", "gather_at", "mark_indices", "scatter_add"]

BLOCK = 1024


@triton.jit
def _number(bits, F64: tl.constexpr):
    """Return the number with these bits."""
    if F64:
        number = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        number = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _form(a, b, c, at, there, f0, f1, f2, NT: tl.constexpr, F64: tl.constexpr):
    """Return ``f0 a + f1 b + f2 c`` at these places, of as many terms as there are."""
    x = tl.load(a + at, mask=there, other=0.0) * _number(f0, F64)
    if NT > 1:
        x = x + tl.load(b + at, mask=there, other=0.0) * _number(f1, F64)
    if NT > 2:
        x = x + tl.load(c + at, mask=there, other=0.0) * _number(f2, F64)
    return x


@triton.jit
def _magnitude(x, F64: tl.constexpr):
    if F64:
        magnitude = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return magnitude


@triton.jit
def _note_broken(status, magnitude, there, F64: tl.constexpr):
    """Write 1 to `status` where a magnitude is that of a NaN or Inf."""
    if F64:
        broken = magnitude >= 0x7FF0000000000000
    else:
        broken = magnitude >= 0x7F800000
    if tl.max((broken & there).to(tl.int32), 0) > 0:
        tl.store(status, 1)


@triton.jit(do_not_specialize=["f0", "f1", "f2"])
def combine(a, b, c, out, status, d, f0, f1, f2, NT: tl.constexpr, WRITES: tl.constexpr, F64: tl.constexpr,
            BLOCK: tl.constexpr):
    """Write what is formed of the terms to `out`, (d,), if it `WRITES`, and note whether it is broken."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < d
    x = _form(a, b, c, at, there, f0, f1, f2, NT, F64)
    if WRITES:
        tl.store(out + at, x, mask=there)
    _note_broken(status, _magnitude(x, F64), there, F64)


@triton.jit(do_not_specialize=["f0", "f1", "f2", "k0", "k1", "k2"])
def collect(a, b, c, keep, threshold, found, status, places, values, start, d, room, f0, f1, f2, k0, k1, k2,
            NT: tl.constexpr, KEEPS: tl.constexpr, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Write place and value of every entry from `start` on, `d` of them, of a magnitude of at least ``threshold[0]``.

    In any order, after ``found[0]`` earlier ones, which it counts on; those beyond `room` are counted alone. What is kept is
    written in the same pass.
    """
    within = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = within < d
    at = within + start
    x = _form(a, b, c, at, there, f0, f1, f2, NT, F64)
    if KEEPS:
        tl.store(keep + at, _form(a, b, c, at, there, k0, k1, k2, NT, F64), mask=there)
    magnitude = _magnitude(x, F64)
    _note_broken(status, magnitude, there, F64)
    chosen = there & (magnitude >= tl.load(threshold))
    count = tl.sum(chosen.to(tl.int32), 0)
    if count > 0:
        first = tl.atomic_add(found, count)
        place = first + tl.cumsum(chosen.to(tl.int32), 0) - 1
        fits = chosen & (place < room)
        tl.store(places + place, at, mask=fits)
        tl.store(values + place, x, mask=fits)


@triton.jit
def mark_indices(indices, k, low, lower, upper, BLOCK: tl.constexpr):
    """Set, in words of 32 bits that are zero, the bits of the code of indices; `lower` and `upper` are its two parts."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = j < k
    index = tl.load(indices + j, mask=there, other=0)
    mark = j + (index >> low)
    one = tl.full((BLOCK,), 1, tl.int64)
    tl.atomic_or(upper + (mark >> 5), (one << (mark & 31)).to(tl.int32), mask=there)
    part = index & ((one << low) - 1)
    bit = j * low
    shifted = part << (bit & 31)  # up to 31 + 40 bits: what does not fit in 64 is in the third word
    word = lower + (bit >> 5)
    written = there & (one * low > 0)
    tl.atomic_or(word, (shifted & 0xFFFFFFFF).to(tl.int32), mask=written)
    second = (shifted >> 32) & 0xFFFFFFFF
    tl.atomic_or(word + 1, second.to(tl.int32), mask=written & (second != 0))
    third = tl.where((bit & 31) > 0, part >> (64 - (bit & 31)), 0)
    tl.atomic_or(word + 2, third.to(tl.int32), mask=written & (third != 0))


@triton.jit
def emit_indices(upper, before, lower, words, k, low, indices, BLOCK: tl.constexpr):
    """Write the indices whose marks are in words of 32 bits; ``before[w]`` says how many marks are in earlier words."""
    w = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = w < words
    word = tl.load(upper + w, mask=there, other=0).to(tl.int64) & 0xFFFFFFFF
    j = tl.load(before + w, mask=there, other=0).to(tl.int64)
    one = tl.full((BLOCK,), 1, tl.int64)
    for bit in range(32):
        marked = there & (((word >> bit) & 1) == 1) & (j < k)
        high = w * 32 + bit - j
        at = j * low
        begins = lower + (at >> 5)
        shift = at & 31
        needs = marked & (one * low > 0)
        part = (tl.load(begins, mask=needs, other=0).to(tl.int64) & 0xFFFFFFFF) >> shift
        more = needs & (shift + low > 32)
        part |= (tl.load(begins + 1, mask=more, other=0).to(tl.int64) & 0xFFFFFFFF) << (32 - shift)
        most = needs & (shift + low > 64)
        third = tl.load(begins + 2, mask=most, other=0).to(tl.int64) & 0xFFFFFFFF
        part |= tl.where(shift > 0, third << ((64 - shift) & 63), 0)
        tl.store(indices + j, (high << low) | (part & ((one << low) - 1)), mask=marked)
        j += marked.to(tl.int64)


@triton.jit(do_not_specialize=["factor"])
def scatter_add(indices, values, k, factor, out, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Add ``factor * values[j]`` to ``out[indices[j]]``; no index comes twice."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = j < k
    index = tl.load(indices + j, mask=there, other=0)
    value = tl.load(values + j, mask=there, other=0.0) * _number(factor, F64)
    tl.store(out + index, tl.load(out + index, mask=there, other=0.0) + value, mask=there)


@triton.jit
def clear_at(indices, k, out, BLOCK: tl.constexpr):
    """Write zero to ``out[indices[j]]``."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = j < k
    index = tl.load(indices + j, mask=there, other=0)
    tl.store(out + index, 0.0, mask=there)


@triton.jit(do_not_specialize=["f0", "f1", "f2"])
def gather_at(a, b, c, indices, values, k, f0, f1, f2, NT: tl.constexpr, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Write what is formed of the terms at these places to `values`, (k,)."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = j < k
    index = tl.load(indices + j, mask=there, other=0)
    tl.store(values + j, _form(a, b, c, index, there, f0, f1, f2, NT, F64), mask=there)
