"""What messages are made of, in plain NumPy, as :mod:`.reference` has the other kernels: the specification."""

# ruff: noqa: D103, ARG001

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_messages", "add_quantized", "add_sparse", "all_finite", "clear_messages", "clear_sparse", "decode_indices",
           "encode_indices", "quantize", "read_values", "summed", "write_messages"]

Vector = NDArray[np.floating]
Terms = tuple[Vector, Vector, Vector]
Places = NDArray[np.int64]


def summed(terms: Terms, factors: Vector) -> Vector:
    """Return ``sum_t factors[t] * terms[t]``; empty terms are absent."""
    x: Vector = factors[0] * terms[0]
    for factor, term in zip(factors[1:], terms[1:], strict=True):
        if term.size:
            x = x + factor * term
    return x


def all_finite(x: Vector) -> bool:
    return bool(np.isfinite(x).all())


def add_sparse(indices: NDArray[np.int64], values: Vector, factor: np.floating, out: Vector) -> None:
    out[indices] += factor * values


def clear_sparse(indices: NDArray[np.int64], out: Vector) -> None:
    out[indices] = 0


def encode_indices(indices: NDArray[np.int64], low: int, lower: NDArray[np.uint64], upper: NDArray[np.uint64]) -> None:
    unary = np.zeros(64 * upper.size, np.uint8)
    unary[np.arange(indices.size) + (indices >> low)] = 1
    upper[:] = np.packbits(unary, bitorder="little").view(np.uint64)
    parts = np.zeros(64 * lower.size, np.uint8)
    parts[: indices.size * low] = ((indices[:, None] >> np.arange(low)) & 1).ravel()
    lower[:] = np.packbits(parts, bitorder="little").view(np.uint64)


def decode_indices(lower: NDArray[np.uint64], upper: NDArray[np.uint64], low: int, d: int,
                   indices: NDArray[np.int64]) -> None:
    k = indices.size
    marks = np.flatnonzero(np.unpackbits(upper.view(np.uint8), bitorder="little"))[:k]
    parts = np.unpackbits(lower.view(np.uint8), bitorder="little")[: k * low].reshape(k, low).astype(np.int64)
    there = ((marks - np.arange(marks.size)) << low) | (parts << np.arange(low)).sum(axis=1)[: marks.size]
    less = np.zeros(k, np.int64)  # each index less its number
    less[: marks.size] = np.clip(there - np.arange(marks.size), 0, d - k)
    indices[:] = np.maximum.accumulate(less) + np.arange(k)


def _messages(layout: NDArray[np.int64], memory: NDArray[np.uint8],
              places: Places) -> Iterator[tuple[slice, int, int, NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8]]]:
    """Yield of each message: its chunk, k, low bits of an index, low bits, bitmap, values."""
    rows = layout if len(layout) == len(places) else layout.repeat(len(places), 0)
    for (start, k, low, lower, head, nbytes, d), place in zip(rows.tolist(), places.tolist(), strict=True):
        wire = memory[place : place + nbytes]
        chunk = slice(start, start + d)
        yield chunk, k, low, wire[:lower].view(np.uint64), wire[lower:head].view(np.uint64), wire[head:]


def _coded(body: NDArray[np.uint8], k: int, headroom: int, block: int) -> tuple[str, NDArray[np.int16], Any]:
    name = {0: "bf16", 7: "int8", 15: "fp16"}[headroom]
    code = np.dtype(np.int8 if name == "int8" else np.int16)
    size = 2 * -(-k // block)
    begin = -(-size // 8) * 8
    return name, body[:size].view(np.int16), body[begin : begin + k * code.itemsize].view(code)


def write_messages(layout: NDArray[np.int64], headroom: int, block: int, indices: Places, values: Vector,
                   memory: NDArray[np.uint8], places: Places, scratch: Vector) -> bool:
    first, finite = 0, True
    for chunk, k, low, lower, upper, body in _messages(layout, memory, places):
        kept = values[first : first + k]
        encode_indices(indices[first : first + k] - chunk.start, low, lower, upper)
        first += k
        body[:] = 0
        if headroom < 0:
            body[: kept.nbytes].view(values.dtype)[:] = kept
        else:
            name, exponents, codes = _coded(body, k, headroom, block)
            none, one = kept[:0], np.ones(3, values.dtype)
            finite &= quantize((kept, none, none), one, none, one, False, name, block, exponents, codes, scratch)
    return finite


def _read(body: NDArray[np.uint8], values: Vector, headroom: int, block: int, scratch: Vector) -> None:
    if headroom < 0:
        values[:] = body[: values.nbytes].view(values.dtype)
        return
    name, exponents, codes = _coded(body, values.size, headroom, block)
    add_quantized(exponents, codes, name, block, values.dtype.type(1), True, values, scratch)


def read_values(layout: NDArray[np.int64], headroom: int, block: int, memory: NDArray[np.uint8], places: Places,
                values: Vector, scratch: Vector) -> None:
    first = 0
    for _, k, _, _, _, body in _messages(layout, memory, places):
        _read(body, values[first : first + k], headroom, block, scratch)
        first += k


def add_messages(layout: NDArray[np.int64], headroom: int, block: int, memory: NDArray[np.uint8], places: Places,
                 factor: np.floating, out: Vector, indices: Places, values: Vector, scratch: Vector) -> None:
    for chunk, k, low, lower, upper, body in _messages(layout, memory, places):
        decode_indices(lower, upper, low, out[chunk].size, indices[:k])
        _read(body, values[:k], headroom, block, scratch)
        add_sparse(indices[:k], values[:k], factor, out[chunk])


def clear_messages(layout: NDArray[np.int64], memory: NDArray[np.uint8], places: Places, out: Vector,
                   indices: Places) -> None:
    for chunk, k, low, lower, upper, _ in _messages(layout, memory, places):
        decode_indices(lower, upper, low, out[chunk].size, indices[:k])
        clear_sparse(indices[:k], out[chunk])


def quantize(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, less_decoded: bool, format: str,
             block: int, exponents: NDArray[np.int16], codes: NDArray[np.int16 | np.int8], scratch: Vector) -> bool:
    x = summed(terms, factors)
    for j in range(exponents.size):
        part = x[j * block : (j + 1) * block].astype(np.float64)
        code = codes[j * block : (j + 1) * block]
        largest = np.abs(part).max()
        if not np.isfinite(largest):
            exponents[j], code[:] = 32767, 0
            continue
        fraction, exponent = np.frexp(largest)
        exponent = int(exponent) - {"bf16": 0, "fp16": 15, "int8": 7}[format]
        if format == "int8" and fraction * 128 > 127:
            exponent += 1
        exponents[j] = exponent = 0 if largest == 0 else exponent
        scaled = np.ldexp(part, -exponent)
        if format == "int8":
            code[:] = np.rint(scaled)
        elif format == "fp16":
            code[:] = scaled.astype(np.float32).astype(np.float16).view(np.int16)
        else:
            word = scaled.astype(np.float32).view(np.uint32)
            code[:] = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)
    if keep.size:
        keep[:] = summed(terms, keep_factors)
        if less_decoded:
            add_quantized(exponents, codes, format, block, x.dtype.type(-1), False, keep, scratch)
    return all_finite(x)


def add_quantized(exponents: NDArray[np.int16], codes: NDArray[np.int16 | np.int8], format: str, block: int,
                  factor: np.floating, overwrite: bool, out: Vector, scratch: Vector) -> None:
    if overwrite:
        out[:] = 0
    if format == "int8":
        values = codes.astype(np.float64)
    elif format == "fp16":
        large = (codes & 0x7C00) == 0x7C00  # twice the numbers with one less in the exponent
        values = (codes ^ (large * np.int16(0x400))).view(np.float16).astype(np.float64) * (1 + large)
    else:
        values = (codes.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    power = np.repeat(exponents.astype(np.int64), block)[: out.size]
    most = np.finfo(out.dtype).maxexp - {"bf16": 0, "fp16": 15, "int8": 6}[format]
    broken = (power > most) | ~np.isfinite(values)
    limit = float(np.finfo(out.dtype).max)
    with np.errstate(all="ignore"):
        decoded = np.clip(np.ldexp(values, np.where(broken, 0, power)), -limit, limit).astype(out.dtype)
        decoded[broken] = np.nan
        out += factor * decoded
