"""The kernels in plain NumPy: same names, same signatures, same bits. This file is the specification.

What functions do, and with which arguments, is documented at the kernels of the same names.
"""

# ruff: noqa: D103, ARG001

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .reference_messages import (
    add_messages,
    add_quantized,
    add_sparse,
    all_finite,
    clear_messages,
    clear_sparse,
    decode_indices,
    encode_indices,
    quantize,
    read_values,
    summed,
    write_messages,
)
from .reference_robust import add_distances, combine_columns, distances_to_mixture, mixed_distances

__all__ = ["adam", "adam_step", "add_dense", "add_distances", "add_layers", "add_levels", "add_low_rank",
           "add_messages", "add_quantized", "add_signs", "add_sparse", "all_finite", "clear_messages",
           "clear_sparse", "combine", "combine_columns", "decode_indices", "distances_to_mixture",
           "encode_indices", "encode_levels", "encode_signs", "fingerprints", "follow_momentum", "gather",
           "l1_norm", "layer_norms", "local_step", "mean_rows", "mean_slice", "mixed_distances", "momentum_step",
           "orthonormalise", "preconditioned_step", "quantize", "read_values", "sample_indices", "scaled_momentum",
           "select_largest", "sign_step", "subtract", "update_moments", "write_messages"]

Vector = NDArray[np.floating]
Terms = tuple[Vector, Vector, Vector]
Places = NDArray[np.int64]
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def combine(terms: Terms, factors: Vector, out: Vector, scratch: Vector) -> bool:
    x = summed(terms, factors)
    if out.size:
        out[:] = x
    return all_finite(x)


def subtract(values: Vector, out: Vector) -> None:
    np.subtract(out, values, out=out, where=values != 0)


def select_largest(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, bounds: NDArray[np.int64],
                   counts: NDArray[np.int64], indices: NDArray[np.int64], values: Vector, scratch: Vector,
                   histogram: NDArray[np.int64]) -> bool:
    x = summed(terms, factors)
    if keep.size:
        keep[:] = summed(terms, keep_factors)
    first = 0
    for start, stop, k in zip(bounds[:-1], bounds[1:], counts, strict=True):
        key = np.abs(x[start:stop]).view(f"u{x.itemsize}")  # floats without a sign order like integers
        order = np.argsort(~key, kind="stable")
        indices[first : first + k] = start + np.sort(order[:k])
        first += k
    values[:first] = x[indices[:first]]
    return all_finite(x)


def mean_rows(rows: Vector, own: Vector, rank: int, factor: np.floating, out: Vector) -> bool:
    parts = [factor * (own if r == rank else row) for r, row in enumerate(rows)]
    out[:] = sum(parts[1:], start=parts[0])
    return all_finite(out)


def mean_slice(rows: Vector, start: int, factor: np.floating, out: Vector) -> None:
    parts = [factor * row for row in rows[:, start : start + out.size]]
    out[:] = sum(parts[1:], start=parts[0])


def gather(terms: Terms, factors: Vector, indices: NDArray[np.int64], values: Vector) -> None:
    values[:] = summed(terms, factors)[indices]


def add_dense(values: Vector, factor: np.floating, out: Vector) -> None:
    out += factor * values


def encode_signs(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, less_decoded: bool,
                 row_bits: NDArray[np.uint8], row_scales: Vector, row_block: int, row_factor: np.floating, block: int,
                 bits: NDArray[np.uint8], scales: Vector, scratch: Vector) -> bool:
    x = summed(terms, factors)
    add_signs(row_bits, row_scales, row_block, row_factor, False, x, scratch)
    bits[:] = np.packbits(x >= 0)
    for j in range(scales.size):
        scales[j] = _mean_magnitude(x[j * block : (j + 1) * block])
    if keep.size:
        keep[:] = summed(terms, keep_factors)
        add_signs(row_bits, row_scales, row_block, row_factor, False, keep, scratch)
        if less_decoded:
            add_signs(bits[None], scales[None], block, x.dtype.type(-1), False, keep, scratch)
    return all_finite(x)


def _mean_magnitude(x: Vector) -> float:
    parts = [np.abs(x[start : start + 4096]) for start in range(0, x.size, 4096)]  # a whole number of groups
    with np.errstate(over="ignore"):
        totals = [_sum_magnitudes(part) for part in parts]
        if not np.isinf(sum(totals)):
            return sum(totals) / x.size
        means = [_mean_of_large_numbers(part.astype(np.float64)) if np.isinf(total) else total / part.size
                 for part, total in zip(parts, totals, strict=True)]
        return sum(mean * (part.size / x.size) for mean, part in zip(means, parts, strict=True))


def _sum_magnitudes(x: Vector) -> float:
    """Add groups of 64 by halves, and what follows the last one entry by entry."""
    whole = x.size // 64 * 64
    groups = x[:whole].reshape(-1, 64)
    while groups.shape[1] > 1:
        half = groups.shape[1] // 2
        groups = groups[:, :half] + groups[:, half:]
    summands = np.concatenate([[0.0], groups.ravel(), x[whole:]]).astype(np.float64)
    return float(np.cumsum(summands)[-1])  # adds in order, sum does not


def _mean_of_large_numbers(x: NDArray[np.float64]) -> float:
    largest = x.max()
    if not np.isfinite(x).all():
        return float("inf")
    return float(min(np.cumsum(x / largest / x.size)[-1], 1.0) * largest)


def add_signs(bits: NDArray[np.uint8], scales: Vector, block: int, factor: np.floating, overwrite: bool, out: Vector,
              scratch: Vector) -> None:
    if overwrite:
        out[:] = 0
    for row, scale in zip(bits, scales, strict=True):
        step = np.repeat(factor * scale, block)[: out.size]
        out += np.where(np.unpackbits(row, count=out.size), step, -step)


def _mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def sample_indices(seed: int, step: int, rank: int, d: int, indices: NDArray[np.int64],
                   bitmap: NDArray[np.uint64]) -> None:
    state = 0
    for part in (seed, step, rank):
        state = _mix(state + part + _GOLDEN & _WORD)
    taken: set[int] = set()
    for last in range(d - indices.size, d):
        state = state + _GOLDEN & _WORD
        drawn = _mix(state) % (last + 1)
        taken.add(last if drawn in taken else drawn)
    indices[:] = sorted(taken)


def orthonormalise(rows: Vector, spans: NDArray[np.int64], rank: int, spare: Vector) -> None:
    for start, size in spans:
        span = slice(start, start + rank * size)
        factor, others = rows[span].reshape(rank, size), spare[span].reshape(-1, size)
        for k, row in enumerate(factor):
            row[:] = _freed(row, factor[:k])
            if others.size and not row.any():
                row[:] = _freed(others[k], factor[:k])


def _freed(row: Vector, earlier: Vector) -> Vector:
    """Return the unit vector of what `row` has beyond the rows before it; zero when that is rounding error."""
    largest = np.abs(row).max()
    if largest == 0:
        return row
    x: Vector = (row.astype(np.float64) / np.float64(largest)).astype(row.dtype)
    before = np.sqrt(_dot(x, x))
    for _ in range(2):
        for other in earlier:
            x = (x - _dot(x, other) * other.astype(np.float64)).astype(row.dtype)
    length = np.sqrt(_dot(x, x))
    if length <= 16 * float(np.finfo(row.dtype).eps) * before:
        return np.zeros_like(row)
    unit: Vector = (x.astype(np.float64) / length).astype(row.dtype)
    return unit


def _dot(x: Vector, y: Vector) -> np.float64:
    """Add products in eight sums, those by halves, then what follows the last group of eight."""
    products = x.astype(np.float64) * y
    whole = x.size // 8 * 8
    sums = np.cumsum(np.vstack([np.zeros(8), products[:whole].reshape(-1, 8)]), axis=0)[-1]
    while sums.size > 1:
        sums = sums[: sums.size // 2] + sums[sums.size // 2 :]
    total: np.float64 = np.cumsum(np.concatenate([sums, products[whole:]]))[-1]
    return total


def add_low_rank(left: Vector, right: Vector, parts: NDArray[np.int64], rank: int, factor: np.floating, overwrite: bool,
                 out: Vector, scratch: Vector) -> None:
    if overwrite:
        out[:] = 0
    for rows, columns in parts:
        size = rows * (columns or 1)
        if columns == 0:
            thin, left = np.split(left, [rows])
            value = thin
        else:
            (thin, left), (wide, right) = np.split(left, [rank * rows]), np.split(right, [rank * columns])
            terms = thin.reshape(rank, rows, 1) * wide.reshape(rank, 1, columns)
            value = sum(terms[1:], start=terms[0]).reshape(-1)
        part, out = np.split(out, [size])
        part += factor * value


def update_moments(grad: Vector, beta1: np.floating, beta2: np.floating, m: Vector, v: Vector) -> None:
    one = m.dtype.type(1)
    m[:] = beta1 * m + (one - beta1) * grad
    v[:] = beta2 * v + (one - beta2) * (grad * grad)


def adam_step(m: Vector, v: Vector, step: np.floating, root_factor: np.floating, eps: np.floating, decay: np.floating,
              x: Vector) -> None:
    x[:] = decay * x - step * (m / (root_factor * np.sqrt(v) + eps))


def adam(grad: Vector, beta1, beta2, step, root_factor, eps, decay, m: Vector, v: Vector, x: Vector) -> None:
    update_moments(grad, beta1, beta2, m, v)
    adam_step(m, v, step, root_factor, eps, decay, x)


def preconditioned_step(m: Vector, inverse: Vector, step: np.floating, decay: np.floating, x: Vector) -> None:
    x[:] = decay * x - step * (m * inverse)


def l1_norm(x: Vector) -> float:
    totals = [_sum_magnitudes(np.abs(x[low : low + 4096])) for low in range(0, x.size, 4096)]
    return float(np.cumsum([0.0, *totals])[-1])


def sign_step(direction: Vector, step: np.floating, decay: np.floating, x: Vector) -> None:
    x[:] = decay * x - step * np.sign(direction)


def momentum_step(grad: Vector, inverse: Vector, beta: np.floating, step: np.floating, decay: np.floating, m: Vector,
                  x: Vector) -> None:
    m[:] = beta * m + (m.dtype.type(1) - beta) * grad
    x[:] = decay * x - step * (m * inverse)


def local_step(grad: Vector, inverse: Vector, start: Vector, beta: np.floating, weight: np.floating, step: np.floating,
               decay: np.floating, m: Vector, u: Vector, x: Vector) -> None:
    one = m.dtype.type(1)
    m[:] = beta * m + (one - beta) * grad
    u[:] = (one - weight) * u + weight * m
    x[:] = decay * start - step * (u * inverse)


def fingerprints(x: Vector, starts: Places, out: NDArray[np.uint64]) -> None:
    for p, (start, stop) in enumerate(pairwise(starts.tolist())):
        total = 0
        for j, word in enumerate(x[start:stop].view(np.uint32).tolist()):
            total += _mix(word + (j + 1) * _GOLDEN & _WORD)
        out[p] = total & _WORD


def layer_norms(x: Vector, starts: Places, norms: NDArray[np.float64]) -> None:
    for p, (start, stop) in enumerate(pairwise(starts)):
        totals = [_sum_squares(x[low : min(low + 4096, stop)].astype(np.float64) ** 2) for low in range(start, stop, 4096)]
        norms[p] = np.sqrt(np.cumsum([0.0, *totals])[-1])


def _sum_squares(squares: Vector) -> float:
    whole = squares.size // 64 * 64
    sums = np.cumsum(np.vstack([np.zeros(64), squares[:whole].reshape(-1, 64)]), axis=0)[-1]
    return float(np.cumsum(np.concatenate([[0.0], sums, squares[whole:]]))[-1])


def add_layers(values: Vector, factors: Vector, starts: Places, out: Vector) -> None:
    out += np.repeat(factors, np.diff(starts)) * values


def scaled_momentum(grad: Vector, m: Vector, beta: np.floating, scales: Vector, starts: Places, out: Vector) -> None:
    out[:] = np.repeat(scales, np.diff(starts)) * (beta * m + (out.dtype.type(1) - beta) * grad)


def follow_momentum(sent: Vector, inverse: Vector, betas: Vector, root_factor: np.floating, eps: np.floating,
                    scales: Vector, least: Vector, starts: Places, m: Vector, fresh: Vector, ratios: Vector) -> None:
    (beta1, beta2), one, sizes = betas, m.dtype.type(1), np.diff(starts)
    new = np.repeat(one / scales, sizes) * sent
    grad = (new - beta1 * m) / (one - beta1)
    m[:], fresh[:] = new, beta2 * fresh + (one - beta2) * (grad * grad)
    roots = np.maximum(root_factor * np.sqrt(fresh), np.repeat(least, sizes)) + eps
    quotients = np.divide(one, roots * inverse, out=np.zeros_like(m), where=inverse > 0)
    ratios[:] = [quotients[start:stop].max(initial=0) for start, stop in pairwise(starts)]


def encode_levels(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, less_decoded: bool, block: int,
                  levels: Vector, signs: NDArray[np.uint8], highs: NDArray[np.uint8], scratch: Vector) -> bool:
    x = summed(terms, factors)
    high = np.zeros(x.size, bool)
    for j, low in enumerate(range(0, x.size, block)):
        sizes = np.abs(x[low : low + block]).astype(np.float64)
        unit = 1.0 if sizes.max() <= 2.0**1000 else 2.0**-24
        parts = sizes * unit
        above = parts >= np.cumsum(parts)[-1] / parts.size
        means = [np.cumsum(half)[-1] / half.size / unit if half.size else 0.0 for half in (parts[~above], parts[above])]
        levels[2 * j : 2 * j + 2] = np.minimum(means, sizes.max())
        high[low : low + block] = above
    signs[:], highs[:] = np.packbits(x >= 0), np.packbits(high)
    if keep.size:
        keep[:] = summed(terms, keep_factors)
        if less_decoded:
            add_levels(levels, signs, highs, block, x.dtype.type(-1), keep)
    return bool(np.isfinite(x).all())


def add_levels(levels: Vector, signs: NDArray[np.uint8], highs: NDArray[np.uint8], block: int, factor: np.floating,
               out: Vector) -> None:
    d = out.size
    positive, high = (np.unpackbits(bits, count=d).astype(bool) for bits in (signs, highs))
    values = factor * levels[2 * (np.arange(d) // block) + high]
    out += np.where(positive, values, -values)
