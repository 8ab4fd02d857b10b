"""Values in 16 or 8 bits with a power of two per block, so that every input keeps its relative precision."""

import math

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._stream import BLOCK, form, put
from ._vector import Terms, Vector, fence, magnitude

__all__ = ["FORMATS", "QUANTIZE_SCRATCH", "add_quantized", "quantize"]


QUANTIZE_SCRATCH = 2 * BLOCK

# name: (exponent headroom, largest code as a number). The largest magnitude of a block is scaled into [2**(h-1), 2**h].
FORMATS = {"bf16": 0, "fp16": 15, "int8": 7}

_NOT_FINITE = 32767  # exponent of a block that holds NaN or Inf; the whole block decodes to NaN
_LEAST = -1300  # with lower exponents all codes stand for zero


def quantize(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, less_decoded: bool, format: str,
             block: int, exponents: NDArray[np.int16], codes: NDArray[np.int16 | np.int8], scratch: Vector) -> bool:
    """Write ``x = sum_t factors[t] * terms[t]`` as ``codes * 2**exponents``, rounded to nearest, ties to even.

    Parameters
    ----------
    format : {"bf16", "fp16", "int8"}
    exponents : (ceil(d / block),) int16, overwritten: the power of two that brings the block's largest magnitude into
        [0.5, 1) for bf16, [2**14, 2**15) for fp16 and (63.5, 127] for int8; 0 for a block of zeros
    codes : (d,) overwritten; the bit patterns of bf16 or fp16 numbers in int16, or int8 integers

    Returns
    -------
    bool
        Whether x is finite. A block with a NaN or Inf decodes to NaN.

    Notes
    -----
    The power of two makes small blocks as precise as large ones: no overflow in fp16, no underflow of subnormal
    inputs, and decoding is exact, except that what rounding has lifted beyond the largest number decodes to that
    number. float64 is rounded to float32 first for the 16-bit formats.
    Memory touched: every term once and `keep`; the terms twice when a block has more than 4096 entries.
    """
    return bool(_quantize(terms, factors, keep, keep_factors, less_decoded, FORMATS[format], block,
                          exponents, codes, scratch))


def add_quantized(exponents: NDArray[np.int16], codes: NDArray[np.int16 | np.int8], format: str, block: int,
                  factor: np.floating, overwrite: bool, out: Vector, scratch: Vector) -> None:
    """Add ``factor * decoded`` to `out`, the inverse of :func:`quantize`.

    What no encoder writes is decoded too: a block to NaN where its exponent is beyond that of the largest number of the
    dtype, an entry to NaN where its code is NaN or Inf of bf16, and to the largest number where it exceeds that. In fp16
    codes with an exponent of all ones are numbers, from 65536 on.
    """
    _add_quantized(exponents, codes, FORMATS[format], block, factor, overwrite, out, scratch)


@jit
def _to_half(value):
    """Return the fp16 bit pattern of a float32 `value` with magnitude below 65504."""
    word = np.int64(np.float32(value).view(np.uint32))
    sign, magnitude = (word >> 16) & 0x8000, word & 0x7FFFFFFF
    if magnitude < 0x38800000:  # below 2**-14 fp16 is a fixed-point number with 2**-24 as unit
        return sign | np.int64(np.rint(np.float64(abs(value)) * 16777216.0))
    magnitude -= 112 << 23
    return sign | ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13)


@jit
def _from_half(code):
    magnitude = code & 0x7FFF
    if magnitude < 0x400:
        value = magnitude / 16777216.0
    else:
        value = np.float64(np.uint32((magnitude << 13) + (112 << 23)).view(np.float32))
    return -value if code & 0x8000 else value


@jit
def _quantize(terms, factors, keep, keep_factors, less_decoded, headroom, block, exponents, codes, scratch):
    d, finite = terms[0].size, True
    x, other = scratch[:BLOCK], scratch[BLOCK:]
    tile = BLOCK // block * block if block <= BLOCK else BLOCK
    for low in range(0, d, tile):
        m = min(tile, d - low)
        first, last = low // block, -(-(low + m) // block)
        for j in range(first, last):
            if block > BLOCK and j * block >= low:  # it begins here and ends in a later tile
                exponents[j] = _exponent_of_long_block(terms, factors, j * block, min(d, (j + 1) * block), x, headroom)
        form(terms, factors, low, x[:m])
        for j in range(first, last):
            start, stop = max(j * block - low, 0), min((j + 1) * block - low, m)
            if block <= BLOCK:
                exponents[j] = _exponent(_largest(x[start:stop], np.uint64(0)), x, headroom)
            finite &= exponents[j] != _NOT_FINITE
            _encode(x[start:stop], headroom, exponents[j], codes[low + start : low + stop])
        if keep.size:
            form(terms, keep_factors, low, other[:m])
            if less_decoded:
                for j in range(first, last):
                    start, stop = max(j * block - low, 0), min((j + 1) * block - low, m)
                    part = codes[low + start : low + stop]
                    _decode(part, headroom, exponents[j], x.dtype.type(-1), other[start:stop])
            put(other[:m], keep, low)
    fence()
    return finite


@jit
def _largest(x, high):
    for i in range(x.size):
        high = max(high, magnitude(x[i]))
    return high


@jit
def _exponent_of_long_block(terms, factors, start, stop, x, headroom):
    high = np.uint64(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        form(terms, factors, low, x[:m])
        high = _largest(x[:m], high)
    return _exponent(high, x, headroom)


@jit
def _exponent(high, x, headroom):
    """Return the exponent of a block whose largest magnitude has the bits `high`."""
    largest = np.float64(np.uint32(high).view(np.float32)) if x.itemsize == 4 else np.uint64(high).view(np.float64)
    if not math.isfinite(largest):
        return _NOT_FINITE
    if largest == 0.0:
        return 0
    fraction, exponent = math.frexp(largest)
    return exponent - headroom + (headroom == 7 and fraction * 128.0 > 127.0)


@jit
def _power(exponent):
    """Return two factors of ``2**exponent``, -2044 to 2046, because one may lie outside the range of float64."""
    half = exponent >> 1
    return _power_of_two(half), _power_of_two(exponent - half)


@jit
def _power_of_two(exponent):
    return np.uint64((exponent + 1023) << 52).view(np.float64)


@jit
def _encode(x, headroom, exponent, codes):
    if exponent == _NOT_FINITE:
        codes[:] = 0
        return
    first, second = _power(-int(exponent))
    if headroom == 7:
        for i in range(x.size):
            codes[i] = np.int32(np.rint(np.float64(x[i]) * first * second))
    elif headroom == 15:
        for i in range(x.size):
            codes[i] = _to_half(np.float32(np.float64(x[i]) * first * second))
    else:
        for i in range(x.size):
            word = np.int64(np.float32(np.float64(x[i]) * first * second).view(np.uint32))
            codes[i] = (word + 0x7FFF + ((word >> 16) & 1)) >> 16


@jit
def _decode(codes, headroom, exponent, factor, out):
    """Add ``factor * decoded`` to `out`."""
    if exponent > (128 if out.itemsize == 4 else 1024) - headroom + (headroom == 7):
        out[:] = np.nan
        return
    first, second = _power(max(int(exponent), _LEAST))
    limit = np.float64(np.finfo(out.dtype).max)
    if headroom == 7:
        for i in range(out.size):
            value = np.float64(codes[i]) * first * second
            out[i] += factor * out.dtype.type(min(max(value, -limit), limit))
    elif headroom == 15:
        for i in range(out.size):
            value = _from_half(np.int64(codes[i]) & 0xFFFF) * first * second
            out[i] += factor * out.dtype.type(min(max(value, -limit), limit))
    else:
        for i in range(out.size):
            code = np.float64(np.uint32((np.int64(codes[i]) & 0xFFFF) << 16).view(np.float32))
            value = min(max(code * first * second, -limit), limit)
            out[i] += factor * out.dtype.type(value if abs(code) < np.inf else np.nan)


@jit
def _add_quantized(exponents, codes, headroom, block, factor, overwrite, out, scratch):
    tile = BLOCK // block * block if block <= BLOCK else BLOCK
    for low in range(0, out.size, tile):
        m = min(tile, out.size - low)
        target = scratch[:m] if overwrite else out[low : low + m]
        if overwrite:
            target[:] = 0
        for j in range(low // block, -(-(low + m) // block)):
            start, stop = max(j * block - low, 0), min((j + 1) * block - low, m)
            _decode(codes[low + start : low + stop], headroom, exponents[j], factor, target[start:stop])
        if overwrite:
            put(target, out, low)
    fence()
