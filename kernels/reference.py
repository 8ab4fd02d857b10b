"""The kernels in plain NumPy: same names, same signatures, same bits. This file is the specification."""

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "add_dense",
    "add_quantized",
    "add_signs",
    "add_sparse",
    "all_finite",
    "decode_indices",
    "encode_indices",
    "encode_signs",
    "quantize",
    "sample_indices",
    "select_largest",
]

Vector = NDArray[np.floating]


def all_finite(x: Vector) -> bool:
    """Tell whether no entry of `x` is NaN or Inf."""
    return bool(np.isfinite(x).all())


def select_largest(x: Vector, indices: NDArray[np.int64]) -> None:
    """Write the ascending indices of the entries of largest magnitude; ties: lowest index first; NaN above Inf."""
    key = np.abs(x).view(f"u{x.itemsize}")  # floats without a sign order like integers
    order = np.argsort(~key, kind="stable")
    indices[:] = np.sort(order[: indices.size])


def add_sparse(indices: NDArray[np.int64], values: Vector, factor: np.floating, out: Vector) -> None:
    """Add ``factor * values`` to `out` at `indices`."""
    out[indices] += factor * values


def add_dense(values: Vector, factor: np.floating, out: Vector) -> None:
    """Add ``factor * values`` to `out`."""
    out += factor * values


def encode_indices(indices: NDArray[np.int64], low: int, lower: NDArray[np.uint64], upper: NDArray[np.uint64]) -> None:
    """Write the Elias-Fano code of ascending `indices`."""
    unary = np.zeros(64 * upper.size, np.uint8)
    unary[np.arange(indices.size) + (indices >> low)] = 1
    upper[:] = np.packbits(unary, bitorder="little").view(np.uint64)
    parts = np.zeros(64 * lower.size, np.uint8)
    parts[: indices.size * low] = ((indices[:, None] >> np.arange(low)) & 1).ravel()
    lower[:] = np.packbits(parts, bitorder="little").view(np.uint64)


def decode_indices(lower: NDArray[np.uint64], upper: NDArray[np.uint64], low: int, indices: NDArray[np.int64]) -> None:
    """Write the indices coded in `lower` and `upper`."""
    k = indices.size
    high = np.flatnonzero(np.unpackbits(upper.view(np.uint8), bitorder="little"))[:k] - np.arange(k)
    parts = np.unpackbits(lower.view(np.uint8), bitorder="little")[: k * low].reshape(k, low).astype(np.int64)
    indices[:] = (high << low) | (parts << np.arange(low)).sum(axis=1)


def encode_signs(x: Vector, block: int, bits: NDArray[np.uint8], scales: Vector) -> None:
    """Write the signs of `x` as bits, most significant first, and the mean magnitude of each block."""
    bits[:] = np.packbits(x >= 0)
    for j in range(scales.size):
        part = np.abs(x[j * block : (j + 1) * block]).astype(np.float64)
        with np.errstate(over="ignore"):
            total = np.cumsum(part)[-1]  # adds in index order, sum does not
            mean = min(np.cumsum(part / part.size)[-1], part.max()) if np.isinf(total) else total / part.size
        scales[j] = mean


def add_signs(bits: NDArray[np.uint8], scales: Vector, block: int, factor: np.floating, out: Vector) -> None:
    """Add ``factor * scale * sign`` of every row to `out`, in row order."""
    for row, scale in zip(bits, scales, strict=True):
        step = np.repeat(factor * scale, block)[: out.size]
        out += np.where(np.unpackbits(row, count=out.size), step, -step)


def quantize(
    x: Vector, format: str, block: int, exponents: NDArray[np.int16], codes: NDArray[np.int16 | np.int8]
) -> None:
    """Write `x` as ``codes * 2**exponents``, a power of two per block."""
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


def add_quantized(
    exponents: NDArray[np.int16],
    codes: NDArray[np.int16 | np.int8],
    format: str,
    block: int,
    factor: np.floating,
    out: Vector,
) -> None:
    """Add ``factor * decoded`` to `out`."""
    if format == "int8":
        values = codes.astype(np.float64)
    elif format == "fp16":
        values = codes.view(np.float16).astype(np.float64)
    else:
        values = (codes.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    power = np.repeat(exponents.astype(np.int64), block)[: out.size]
    broken = power == 32767
    with np.errstate(over="ignore"):
        decoded = np.ldexp(values, np.where(broken, 0, power))
    limit = float(np.finfo(out.dtype).max)
    decoded = np.clip(decoded, -limit, limit).astype(out.dtype)
    decoded[broken] = np.nan
    out += factor * decoded


_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def sample_indices(seed: int, step: int, rank: int, d: int, indices: NDArray[np.int64]) -> None:
    """Write different indices below `d`, ascending, drawn with Floyd's algorithm from SplitMix64."""
    state = 0
    for part in (seed, step, rank):
        state = _mix(state + part + _GOLDEN & _WORD)
    taken: set[int] = set()
    for last in range(d - indices.size, d):
        state = state + _GOLDEN & _WORD
        drawn = _mix(state) % (last + 1)
        taken.add(last if drawn in taken else drawn)
    indices[:] = sorted(taken)
