"""Triton kernels of messages that say something about every entry: signs, and codes of 16 or 8 bits; see `fused`."""

# ruff: noqa: N803, SIM108 (constants of compilation are written large, as in Triton's own code, and decide by `if`)
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import triton
import triton.language as tl

from .fused import _form, _magnitude, _note_broken, _number

__all__ = ["GROUP", "PART", "add_codes", "add_signs", "block_maxima", "part_sums", "part_totals", "scales_of_blocks",
           "write_codes", "write_signs"]

PART, GROUP = 4096, 64  # entries of a program, or of blocks in one, and of those whose magnitudes are added by halves


@triton.jit
def _blocks_of(first, lanes, block):
    """Return in which blocks entries ``first + lanes`` are, 4096 lanes at most: only `first` is divided in 64 bits."""
    number = first // block
    within = first - number * block + lanes
    if block >= 4096:
        further = (within >= block).to(tl.int32)
    else:
        further = within.to(tl.int32) // (number * 0 + block).to(tl.int32)
    return number + further


@triton.jit
def _with_rows(x, at, of, there, row_bits, bits_stride, row_scales, scales_stride, rows, row_factor, F64: tl.constexpr):
    """Add to `x` what is decoded of some rows of signs, in their order; `of` says in which of their blocks entries are."""
    factor = _number(row_factor, F64)
    for _ in range(rows):
        octet = tl.load(row_bits + (at >> 3), mask=there, other=0).to(tl.int32)
        step = tl.load(row_scales + of, mask=there, other=0.0) * factor
        up = ((octet >> (7 - (at & 7)).to(tl.int32)) & 1) == 1
        x = x + tl.where(up, step, -step)
        row_bits += bits_stride  # number times stride, of 32 bits both, may be too large for 32
        row_scales += scales_stride
    return x


@triton.jit
def _halved(x, WIDTH: tl.constexpr):
    """Return the sums of the first and the second half of the rows, (64, WIDTH)."""
    low, high = tl.split(tl.permute(tl.reshape(x, (64, 2, WIDTH // 2)), (0, 2, 1)))
    return low + high


@triton.jit(do_not_specialize=["row_factor", "f0", "f1", "f2"])
def part_sums(a, b, c, row_bits, bits_stride, row_scales, scales_stride, rows, row_block, row_factor, block, parts, d,
              sums, status, f0, f1, f2, NT: tl.constexpr, F64: tl.constexpr, WIDTH: tl.constexpr):
    """Write the sums of magnitudes of the whole groups of parts of blocks, `WIDTH` / 64 for a part, zeros beyond.

    A part is `WIDTH` entries long, or a block where that is shorter; a block has so many `parts`, a program 4096 / `WIDTH`.
    """
    program = tl.program_id(0).to(tl.int64)
    part = program * (4096 // WIDTH) + tl.arange(0, 4096 // WIDTH)
    start = part // parts * block + part % parts * WIDTH
    size = tl.minimum(tl.minimum(start + WIDTH, (part // parts + 1) * block), d) - start
    within = tl.arange(0, WIDTH)
    at = tl.reshape(start[:, None] + within[None, :], (4096,))
    there = tl.reshape(within[None, :] < size[:, None], (4096,))
    of = at
    if rows > 0:
        of = tl.reshape(_blocks_of(start[:, None], within[None, :], row_block), (4096,))
    x = _form(a, b, c, at, there, f0, f1, f2, NT, F64)
    x = _with_rows(x, at, of, there, row_bits, bits_stride, row_scales, scales_stride, rows, row_factor, F64)
    _note_broken(status, _magnitude(x, F64), there, F64)
    whole = tl.reshape(within[None, :] < (size // 64 * 64)[:, None], (4096,))
    groups = tl.reshape(tl.where(there & whole, tl.abs(x), 0.0), (64, 64))
    groups = _halved(_halved(_halved(groups, 64), 32), 16)
    groups = _halved(_halved(_halved(groups, 8), 4), 2)
    tl.store(sums + program * 64 + tl.arange(0, 64), tl.reshape(groups, (64,)))


@triton.jit(do_not_specialize=["row_factor", "f0", "f1", "f2"])
def part_totals(a, b, c, row_bits, bits_stride, row_scales, scales_stride, rows, row_block, row_factor, block, parts, d,
                sums, number, most, totals, f0, f1, f2, NT: tl.constexpr, F64: tl.constexpr, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr):
    """Add up in float64, for every part, the sums of its groups, then the magnitudes of what follows, `most` at most."""
    part = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = part < number
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, WIDTH // 64, min(WIDTH // 64, 16)):
        for q in tl.static_range(min(WIDTH // 64, 16)):
            total += tl.load(sums + part * (WIDTH // 64) + first + q, mask=there, other=0.0).to(tl.float64)
    start = part // parts * block + part % parts * WIDTH
    stop = tl.minimum(tl.minimum(start + WIDTH, (part // parts + 1) * block), d)
    follows = start + tl.maximum(stop - start, 0) // 64 * 64
    for _ in range(most):
        some = there & (follows < stop)
        x = _form(a, b, c, follows, some, f0, f1, f2, NT, F64)
        x = _with_rows(x, follows, follows // row_block, some, row_bits, bits_stride, row_scales, scales_stride, rows,
                       row_factor, F64)
        total += tl.where(some, tl.abs(x), 0.0).to(tl.float64)
        follows += 1
    tl.store(totals + part, total, mask=there)


@triton.jit
def scales_of_blocks(totals, parts, blocks, block, d, scales, status, F64: tl.constexpr, RUN: tl.constexpr,
                     BLOCK: tl.constexpr):
    """Write the mean magnitude of every block of so many `parts`; where a sum overflows, 1 to ``status[1]``.

    Totals are added one after the other; `RUN` of them are loaded at once.
    """
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = j < blocks
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts, RUN):
        for q in tl.static_range(RUN):
            mine = there & (j * 0 + first + q < parts)
            total += tl.load(totals + j * parts + first + q, mask=mine, other=0.0)
    size = tl.minimum(d - j * block, block).to(tl.float64)
    mean = total / tl.where(there, size, 1.0)
    if tl.max((there & (total == float("inf"))).to(tl.int32), 0) > 0:
        tl.store(status + 1, 1)
    if F64:
        tl.store(scales + j, mean, mask=there)
    else:
        tl.store(scales + j, mean.to(tl.float32), mask=there)


@triton.jit(do_not_specialize=["row_factor", "f0", "f1", "f2", "k0", "k1", "k2"])
def write_signs(a, b, c, keep, row_bits, bits_stride, row_scales, scales_stride, rows, row_block, row_factor, block, d,
                bits, scales, f0, f1, f2, k0, k1, k2, NT: tl.constexpr, KEEPS: tl.constexpr, LESS: tl.constexpr,
                F64: tl.constexpr):
    """Write the signs of what is formed of the terms and rows, eight to a byte, and what is kept."""
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, 4096)
    at = program * 4096 + lanes
    there, of = at < d, at
    if rows > 0:
        of = _blocks_of(program * 4096, lanes, row_block)
    x = _form(a, b, c, at, there, f0, f1, f2, NT, F64)
    x = _with_rows(x, at, of, there, row_bits, bits_stride, row_scales, scales_stride, rows, row_factor, F64)
    up = there & (x >= 0)
    weights = 1 << (7 - tl.arange(0, 8))
    octets = tl.sum(tl.reshape(up.to(tl.int32), (512, 8)) * weights[None, :], 1)
    place = program * 512 + tl.arange(0, 512)
    tl.store(bits + place, octets.to(tl.uint8), mask=place * 8 < d)
    if KEEPS:
        kept = _form(a, b, c, at, there, k0, k1, k2, NT, F64)
        kept = _with_rows(kept, at, of, there, row_bits, bits_stride, row_scales, scales_stride, rows, row_factor, F64)
        if LESS:
            scale = tl.load(scales + _blocks_of(program * 4096, lanes, block), mask=there, other=0.0)
            kept = kept + tl.where(up, -scale, scale)
        tl.store(keep + at, kept, mask=there)


@triton.jit(do_not_specialize=["factor"])
def add_signs(bits, bits_stride, scales, scales_stride, rows, block, factor, out, d, STARTS: tl.constexpr,
              F64: tl.constexpr, BLOCK: tl.constexpr):
    """Add what is decoded of all rows, times a factor, to `out`, or to zero where it `STARTS`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    there = at < d
    if STARTS:
        x = tl.zeros((BLOCK,), out.dtype.element_ty)
    else:
        x = tl.load(out + at, mask=there, other=0.0)
    of = _blocks_of(first, tl.arange(0, BLOCK), block)
    x = _with_rows(x, at, of, there, bits, bits_stride, scales, scales_stride, rows, factor, F64)
    tl.store(out + at, x, mask=there)


@triton.jit(do_not_specialize=["f0", "f1", "f2"])
def block_maxima(a, b, c, maxima, d, block, f0, f1, f2, NT: tl.constexpr, F64: tl.constexpr, RUN: tl.constexpr,
                 BLOCK: tl.constexpr):
    """Raise, for every block, its entry of `maxima`, zeros at first, to its largest magnitude; `RUN` divides `block`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < d
    magnitude = tl.where(there, _magnitude(_form(a, b, c, at, there, f0, f1, f2, NT, F64), F64), 0)
    largest = tl.max(tl.reshape(magnitude, (BLOCK // RUN, RUN)), 1)
    first = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK // RUN) * RUN
    tl.atomic_max(maxima + first // block, largest, mask=first < d)


@triton.jit
def _power(exponent):
    """Return two to that power, -1022 to 1023, in float64."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _scaled(x, exponent):
    half = exponent >> 1
    return (x * _power(half)) * _power(exponent - half)


@triton.jit
def _decoded(code, exponent, FORMAT: tl.constexpr, F64: tl.constexpr):
    """Return what a code stands for, in the dtype of the vectors: formats 0 is bf16, 1 fp16, 2 int8."""
    most = 1024 if F64 else 128
    if FORMAT == 2:
        value, broken = code.to(tl.float64), exponent > most - 6
    elif FORMAT == 1:
        large = (code & 0x7C00) == 0x7C00  # no Inf and NaN: twice the numbers with one less in the exponent
        half = tl.where(large, code ^ 0x400, code).to(tl.int16).to(tl.float16, bitcast=True)
        value = half.to(tl.float32).to(tl.float64) * tl.where(large, 2.0, 1.0)
        broken = exponent > most - 15
    else:
        value = (code.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
        broken = (exponent > most) | ((code & 0x7F80) == 0x7F80)
    value = _scaled(value, tl.where(broken, 0, tl.maximum(exponent, -1300)))
    if F64:
        limit = 1.7976931348623157e308
        number = tl.minimum(tl.maximum(value, -limit), limit)
    else:
        limit = 3.4028234663852886e38
        number = tl.minimum(tl.maximum(value, -limit), limit).to(tl.float32)
    return tl.where(broken, float("nan"), number)


@triton.jit(do_not_specialize=["f0", "f1", "f2", "k0", "k1", "k2"])
def write_codes(a, b, c, keep, maxima, d, block, exponents, codes, status, f0, f1, f2, k0, k1, k2, NT: tl.constexpr,
                KEEPS: tl.constexpr, LESS: tl.constexpr, FORMAT: tl.constexpr, HEADROOM: tl.constexpr, F64: tl.constexpr,
                BLOCK: tl.constexpr):
    """Write exponents of blocks and codes of entries, and what is kept."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    there = at < d
    number = _blocks_of(first, tl.arange(0, BLOCK), block)
    largest = tl.load(maxima + number, mask=there, other=0)
    if F64:
        broken = largest >= 0x7FF0000000000000
        largest = tl.where(broken, 0, largest).to(tl.float64, bitcast=True)
    else:
        broken = largest >= 0x7F800000
        largest = tl.where(broken, 0, largest).to(tl.float32, bitcast=True).to(tl.float64)
    small = largest < 2.2250738585072014e-308  # of such numbers float64 has no leading one
    word = tl.where(small, largest * 18014398509481984.0, largest).to(tl.int64, bitcast=True)
    exponent = ((word >> 52) & 0x7FF).to(tl.int32) - 1022 - tl.where(small, 54, 0)
    fraction = ((word & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    exponent = exponent - HEADROOM
    if FORMAT == 2:
        exponent = exponent + (fraction * 128.0 > 127.0).to(tl.int32)
    exponent = tl.where(largest == 0.0, 0, exponent)
    x = _form(a, b, c, at, there, f0, f1, f2, NT, F64)
    _note_broken(status, _magnitude(x, F64), there, F64)
    scaled = _scaled(tl.where(broken, 0.0, x).to(tl.float64), -exponent)
    if FORMAT == 2:
        code = ((scaled + 6755399441055744.0) - 6755399441055744.0).to(tl.int8)  # to the nearest, ties to even
    elif FORMAT == 1:
        code = scaled.to(tl.float32).to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = scaled.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        code = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    tl.store(codes + at, code, mask=there)
    exponent = tl.where(broken, 32767, exponent)
    tl.store(exponents + number, exponent.to(tl.int16), mask=there & (at == number * block))
    if KEEPS:
        kept = _form(a, b, c, at, there, k0, k1, k2, NT, F64)
        if LESS:
            kept = kept + -_decoded(code, exponent, FORMAT, F64)
        tl.store(keep + at, kept, mask=there)


@triton.jit(do_not_specialize=["factor"])
def add_codes(exponents, codes, block, factor, out, d, FORMAT: tl.constexpr, STARTS: tl.constexpr, F64: tl.constexpr,
              BLOCK: tl.constexpr):
    """Add what codes stand for, times a factor, to `out`, or to zero where it `STARTS`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    there = at < d
    if STARTS:
        x = tl.zeros((BLOCK,), out.dtype.element_ty)
    else:
        x = tl.load(out + at, mask=there, other=0.0)
    code = tl.load(codes + at, mask=there, other=0)
    exponent = tl.load(exponents + _blocks_of(first, tl.arange(0, BLOCK), block), mask=there, other=0).to(tl.int32)
    x = x + _decoded(code, exponent, FORMAT, F64) * _number(factor, F64)
    tl.store(out + at, x, mask=there)
