"""Values in 16 or 8 bits with a power of two per block, so that every input keeps its relative precision."""

import math

import numpy as np
from numpy.typing import NDArray

from ._jit import jit

__all__ = ["FORMATS", "add_quantized", "quantize"]

# name: (exponent headroom, largest code as a number). The largest magnitude of a block is scaled into [2**(h-1), 2**h].
FORMATS = {"bf16": 0, "fp16": 15, "int8": 7}

_NOT_FINITE = 32767  # exponent of a block that holds NaN or Inf; the whole block decodes to NaN


def quantize(
    x: NDArray[np.floating], format: str, block: int, exponents: NDArray[np.int16], codes: NDArray[np.int16 | np.int8]
) -> None:
    """Write `x` as ``codes * 2**exponents``, rounded to nearest, ties to even.

    Parameters
    ----------
    x : (d,) float32 or float64
    format : {"bf16", "fp16", "int8"}
    block : int, entries that share an exponent; the last block may be shorter
    exponents : (ceil(d / block),) int16, overwritten: the power of two that brings the block's largest magnitude into
        [0.5, 1) for bf16, [2**14, 2**15) for fp16 and (63.5, 127] for int8; 0 for a block of zeros
    codes : (d,) overwritten; the bit patterns of bf16 or fp16 numbers in int16, or int8 integers

    Notes
    -----
    The power of two makes small blocks as precise as large ones: no overflow in fp16, no underflow of subnormal
    inputs, and decoding is exact, except that what rounding has lifted beyond the largest number decodes to that
    number. float64 is rounded to float32 first for the 16-bit formats.
    """
    _quantize(x, FORMATS[format], block, exponents, codes)


def add_quantized(
    exponents: NDArray[np.int16],
    codes: NDArray[np.int16 | np.int8],
    format: str,
    block: int,
    factor: np.floating,
    out: NDArray[np.floating],
) -> None:
    """Add ``factor * decoded`` to `out`, the inverse of :func:`quantize`.

    Parameters
    ----------
    exponents, codes : as :func:`quantize` wrote them
    format, block : the same as there
    factor : scalar of the dtype of `out`
    out : (d,) float32 or float64, updated
    """
    _add_quantized(exponents, codes, FORMATS[format], block, factor, out)


@jit
def _to_half(value):  # type: ignore[no-untyped-def]
    """Return the fp16 bit pattern of a float32 `value` with magnitude below 65504."""
    word = np.int64(np.float32(value).view(np.uint32))
    sign, magnitude = (word >> 16) & 0x8000, word & 0x7FFFFFFF
    if magnitude < 0x38800000:  # below 2**-14 fp16 is a fixed-point number with 2**-24 as unit
        return sign | np.int64(np.rint(np.float64(abs(value)) * 16777216.0))
    magnitude -= 112 << 23
    return sign | ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13)


@jit
def _from_half(code):  # type: ignore[no-untyped-def]
    magnitude = code & 0x7FFF
    if magnitude < 0x400:
        value = magnitude / 16777216.0
    else:
        value = np.float64(np.uint32((magnitude << 13) + (112 << 23)).view(np.float32))
    return -value if code & 0x8000 else value


@jit
def _quantize(x, headroom, block, exponents, codes):  # type: ignore[no-untyped-def]
    for j in range(exponents.size):
        start, stop = j * block, min((j + 1) * block, x.size)
        largest = 0.0
        for i in range(start, stop):
            magnitude = np.float64(abs(x[i]))
            if magnitude > largest or magnitude != magnitude:  # noqa: PLR0124
                largest = magnitude
        if not math.isfinite(largest):
            exponents[j] = _NOT_FINITE
            codes[start:stop] = 0
            continue
        fraction, exponent = math.frexp(largest)
        exponent -= headroom
        if headroom == 7 and fraction * 128.0 > 127.0:
            exponent += 1
        if largest == 0.0:
            exponent = 0
        exponents[j] = exponent
        # Two factors, because one power of two may lie outside the range of float64.
        half = -exponent // 2
        first, second = math.ldexp(1.0, half), math.ldexp(1.0, -exponent - half)
        for i in range(start, stop):
            scaled = np.float64(x[i]) * first * second
            if headroom == 7:
                codes[i] = np.int64(np.rint(scaled))
            elif headroom == 15:
                codes[i] = _to_half(np.float32(scaled))
            else:
                word = np.int64(np.float32(scaled).view(np.uint32))
                codes[i] = (word + 0x7FFF + ((word >> 16) & 1)) >> 16


@jit
def _add_quantized(exponents, codes, headroom, block, factor, out):  # type: ignore[no-untyped-def]
    limit = np.float64(np.finfo(out.dtype).max)
    for j in range(exponents.size):
        start, stop = j * block, min((j + 1) * block, out.size)
        exponent = int(exponents[j])
        if exponent == _NOT_FINITE:
            out[start:stop] = np.nan
            continue
        half = exponent // 2
        first, second = math.ldexp(1.0, half), math.ldexp(1.0, exponent - half)
        for i in range(start, stop):
            code = np.int64(codes[i])
            if headroom == 7:
                value = np.float64(code)
            elif headroom == 15:
                value = _from_half(code & 0xFFFF)
            else:
                value = np.float64(np.uint32((code & 0xFFFF) << 16).view(np.float32))
            decoded = min(max(value * first * second, -limit), limit)
            out[i] += factor * out.dtype.type(decoded)
