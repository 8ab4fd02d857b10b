"""Triton kernels: what :mod:`mpi_ef.kernels.device.plain` does in many passes, in one or two, with the same bits.

Factors are passed as the bits of the number: what Triton makes of a Python float is a float32. Products and sums stay apart,
so kernels are compiled with ``enable_fp_fusion=False``. Magnitudes are compared as integers, without the sign bit. Nothing
is compiled anew for special values of such bits.
"""

# ruff: noqa: N803, SIM108 (constants of compilation are written large, as in Triton's own code, and decide by `if`)
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import triton
import triton.language as tl

__all__ = ["BLOCK", "clear_at", "collect", "combine", "emit_indices", "gather_at", "make_room", "mark_chosen",
           "mark_indices", "sample_magnitudes", "scatter_add", "write_chosen", "write_keys"]

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


@triton.jit
def _segment_of(bounds, segments, at):
    """Return in which part of a vector places are; parts, some of them empty, begin at ``bounds[0]``, ``bounds[1]``, ..."""
    low = at * 0
    high = low + segments
    left = segments
    while left > 1:
        middle = (low + high) // 2
        above = tl.load(bounds + middle) <= at
        low = tl.where(above, middle, low)
        high = tl.where(above, high, middle)
        left = left - left // 2
    return low


@triton.jit
def _mixed(word):
    """Return the last step of SplitMix64."""
    word = (word ^ ((word >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    word = (word ^ ((word >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return word ^ ((word >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["f0", "f1", "f2"])
def sample_magnitudes(a, b, c, starts, sizes, sample, entries, magnitudes, f0, f1, f2, NT: tl.constexpr, F64: tl.constexpr,
                      BLOCK: tl.constexpr):
    """Write magnitudes at pseudo-random places, `sample` of every part of the vector, in all so many `entries`."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = j < entries
    part = j // sample
    number = j - part * sample + 1
    drawn = _mixed(number * -7046029254386353131) & 0x7FFFFFFFFFFFFFFF
    at = tl.load(starts + part, mask=there, other=0) + drawn % tl.load(sizes + part, mask=there, other=1)
    tl.store(magnitudes + j, _magnitude(_form(a, b, c, at, there, f0, f1, f2, NT, F64), F64), mask=there)


@triton.jit
def make_room(bounds, segments, rooms, room, places, values, BLOCK: tl.constexpr):
    """Write, where candidates will be, a place behind all of the segment, and zero."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < room
    of = _segment_of(rooms, segments, i)
    tl.store(places + i, tl.load(bounds + of + 1, mask=there, other=0) + of, mask=there)
    tl.store(values + i, tl.zeros((BLOCK,), values.dtype.element_ty), mask=there)


@triton.jit
def write_keys(values, by_place, rooms, segments, room, keys, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Write what sorts candidates, which are read by place, from the largest on, and, but for float64, by segment before."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < room
    magnitude = _magnitude(tl.load(values + tl.load(by_place + i, mask=there, other=0), mask=there, other=0.0), F64)
    if F64:
        key = 0x7FFFFFFFFFFFFFFF - magnitude
    else:
        key = (_segment_of(rooms, segments, i) << 31) | (0x7FFFFFFF - magnitude).to(tl.int64)
    tl.store(keys + i, key, mask=there)


@triton.jit
def mark_chosen(order, starts, rooms, segments, k, chosen, BLOCK: tl.constexpr):
    """Mark the first candidates of every segment by their `order`, from ``starts[s]`` to ``starts[s + 1]`` of `k` in all."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = j < k
    of = _segment_of(starts, segments, j)
    i = tl.load(rooms + of, mask=there, other=0) + j - tl.load(starts + of, mask=there, other=0)
    tl.store(chosen + tl.load(order + i, mask=there, other=0), 1, mask=there)


@triton.jit
def write_chosen(chosen, before, places, values, by_place, rooms, segments, room, d, indices, selected,
                 BLOCK: tl.constexpr):
    """Write place and value of candidates that are chosen; ``before[i]`` says how many there are up to and with i."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < room
    marked = tl.load(chosen + i, mask=there, other=0) > 0
    j = tl.load(before + i, mask=marked, other=1) - 1
    place = tl.load(places + i, mask=marked, other=0) - _segment_of(rooms, segments, i)
    tl.store(indices + j, tl.minimum(place, d - 1), mask=marked)
    value = tl.load(values + tl.load(by_place + i, mask=marked, other=0), mask=marked, other=0.0)
    tl.store(selected + j, value, mask=marked)


@triton.jit
def _put(places, values, to, at, s, x, magnitude, mask, PACKED: tl.constexpr):
    """Write a candidate: its place and value, or one number that is the larger, the more it is to be selected."""
    if PACKED:
        tl.store(places + to, (magnitude.to(tl.int64) << 32) | (0x7FFFFFFF - at), mask=mask)
    else:
        tl.store(places + to, at + s, mask=mask)
        tl.store(values + to, x, mask=mask)


@triton.jit(do_not_specialize=["f0", "f1", "f2", "k0", "k1", "k2"])
def collect(a, b, c, keep, d, bounds, segments, tops, ranks, starts, rooms, status, places, values, f0, f1, f2, k0, k1,
            k2, NT: tl.constexpr, KEEPS: tl.constexpr, PACKED: tl.constexpr, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Write place and value of every entry of a magnitude of at least the threshold of its segment, ``tops[ranks[s]]``.

    Where the rank is -1, that is zero, and where it is -2, there is nothing to select. Those of segment s are in any order
    from ``rooms[s]`` to ``rooms[s + 1]``, and `s` is added to their places; they are counted in ``status[s + 1]``, also
    where there is no room. Zeros behind as many entries as are selected, ``starts[s + 1] - starts[s]``, are none: there are
    enough before. ``status[0]`` says whether an entry is broken. What is kept is written in the same pass.
    `PACKED` are float32 of a vector of less than 2^31 entries and one segment: there are no values, see :func:`_put`.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    there = at < d
    x = _form(a, b, c, at, there, f0, f1, f2, NT, F64)
    if KEEPS:
        tl.store(keep + at, _form(a, b, c, at, there, k0, k1, k2, NT, F64), mask=there)
    magnitude = _magnitude(x, F64)
    _note_broken(status, magnitude, there, F64)
    s = _segment_of(bounds, segments, first)
    if tl.load(bounds + s + 1) >= tl.minimum(first + BLOCK, d):
        rank = tl.load(ranks + s)
        if rank > -2:
            threshold = tl.where(rank < 0, 0, tl.load(tops + tl.maximum(rank, 0)))
            zeros_to = tl.where(rank < 0, d, tl.load(bounds + s) + tl.load(starts + s + 1) - tl.load(starts + s))
            chosen = there & (magnitude >= threshold) & ((magnitude > 0) | (at < zeros_to))
            count = tl.sum(chosen.to(tl.int32), 0)
            if count > 0:
                begins = tl.load(rooms + s)
                number = tl.atomic_add(status + 1 + s, count) + tl.cumsum(chosen.to(tl.int32), 0) - 1
                fits = chosen & (begins + number < tl.load(rooms + s + 1))
                _put(places, values, begins + number, at, s, x, magnitude, fits, PACKED)
    else:
        of = _segment_of(bounds, segments, at)
        theirs = tl.load(ranks + of, mask=there, other=-2)
        some = (theirs >= -1) & (magnitude >= tl.load(tops + theirs, mask=theirs >= 0, other=0))
        zeros_to = tl.where(theirs < 0, d, tl.load(bounds + of) + tl.load(starts + of + 1) - tl.load(starts + of))
        some = some & ((magnitude > 0) | (at < zeros_to))
        one = tl.atomic_add(status + 1 + of, 1, mask=some)
        place = tl.load(rooms + of, mask=some, other=0) + one
        has_room = some & (place < tl.load(rooms + of + 1, mask=some, other=0))
        _put(places, values, place, at, of, x, magnitude, has_room, PACKED)


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
