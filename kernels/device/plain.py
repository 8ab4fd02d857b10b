"""The kernels in torch operations, for devices without Triton: the same bits as those of :mod:`mpi_ef.kernels.reference`.

Arguments are those of the functions of the same names, with tensors in place of arrays and floats in place of factors. They
take memory for what is in between, several vectors of it, and passes for every operation. What says whether a vector is
finite is a tensor, so that nothing waits for the device.
"""

# ruff: noqa: D103

from functools import cache
from typing import Any

import numpy as np
import torch

from mpi_ef.kernels import reference

from . import bus

__all__ = ["add_dense", "add_low_rank", "add_quantized", "add_signs", "add_sparse", "all_finite", "clear_sparse",
           "combine", "decode_indices", "encode_indices", "encode_signs", "fingerprints", "gather", "mean_rows",
           "orthonormalise", "quantize", "sample_indices", "select_largest", "subtract"]

Tensor = torch.Tensor
Terms = tuple[Tensor, Tensor, Tensor]
Factors = tuple[float, float, float]
_PART = 4096  # entries whose magnitudes are added up for themselves
_GROUP = 64
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_MAGNITUDE = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}


def _sum(terms: Terms, factors: Factors) -> Tensor:
    """Return ``sum_t factors[t] * terms[t]``; empty terms are absent. Products and sums apart: nothing is fused."""
    x = terms[0] * factors[0]
    for factor, term in zip(factors[1:], terms[1:], strict=True):
        if term.numel():
            x += term * factor
    return x


def _quotient(x: Tensor, by: float) -> Tensor:
    """Return ``x / by``, rounded once: torch multiplies tensors of a GPU by the reciprocal of a number of the host."""
    return x / x.new_full((), by)


def combine(terms: Terms, factors: Factors, out: Tensor) -> Tensor:
    x = _sum(terms, factors)
    if out.numel():
        out.copy_(x)
    return all_finite(x)


def subtract(values: Tensor, out: Tensor) -> None:
    out.copy_(torch.where(values != 0, out - values, out))


def all_finite(x: Tensor) -> Tensor:
    return torch.isfinite(x).all()


def select_largest(terms: Terms, factors: Factors, keep: Tensor, keep_factors: Factors, bounds: Any, counts: Any,
                   indices: Tensor, values: Tensor) -> Tensor:
    x = _sum(terms, factors)
    if keep.numel():
        keep.copy_(_sum(terms, keep_factors))
    magnitudes = x.view(_BITS[x.dtype]) & _MAGNITUDE[x.dtype]  # floats without a sign order like integers
    first = 0
    for start, stop, k in zip(bounds[:-1].tolist(), bounds[1:].tolist(), counts.tolist(), strict=True):
        if k:
            indices[first : first + k] = _places(_largest(magnitudes[start:stop], k), k) + start
            first += k
    values[:first] = x[indices[:first]]
    return all_finite(x)


def _largest(keys: Tensor, k: int) -> Tensor:
    """Return which entries are the k largest, the first ones of equal ones, (d,) bool."""
    least = torch.topk(keys, k, sorted=False).values.min()
    larger, equal = keys > least, keys == least
    return larger | (equal & (torch.cumsum(equal, 0) <= k - larger.sum()))


def _places(chosen: Tensor, k: int) -> Tensor:
    """Return where the `k` entries are that are chosen, ascending, without asking the device how many there are."""
    to = torch.where(chosen, torch.cumsum(chosen, 0) - 1, k)
    places = torch.empty(k + 1, dtype=torch.int64, device=chosen.device)
    return places.scatter_(0, to, torch.arange(chosen.numel(), device=chosen.device))[:k]


def mean_rows(rows: Tensor, own: Tensor, rank: int, factor: float, out: Tensor) -> Tensor:
    total = (own if rank == 0 else rows[0]) * factor
    for r in range(1, len(rows)):
        total += (own if r == rank else rows[r]) * factor
    out.copy_(total)
    return all_finite(out)


def gather(terms: Terms, factors: Factors, indices: Tensor, values: Tensor) -> None:
    some = tuple(term[indices] if term.numel() else term for term in terms)
    values.copy_(_sum((some[0], some[1], some[2]), factors))


def add_sparse(indices: Tensor, values: Tensor, factor: float, out: Tensor) -> None:
    out[indices] = out[indices] + values * factor


def clear_sparse(indices: Tensor, out: Tensor) -> None:
    out[indices] = 0


def add_dense(values: Tensor, factor: float, out: Tensor) -> None:
    out += values * factor


def encode_indices(indices: Tensor, low: int, lower: Tensor, upper: Tensor) -> None:
    marks = torch.zeros(64 * upper.numel(), dtype=torch.uint8, device=indices.device)
    marks[torch.arange(indices.numel(), device=indices.device) + (indices >> low)] = 1
    _octets(upper).copy_(_packed(marks, _LITTLE))
    parts = torch.zeros(64 * lower.numel(), dtype=torch.uint8, device=indices.device)
    if low:
        shifts = torch.arange(low, device=indices.device)
        parts[: indices.numel() * low] = ((indices[:, None] >> shifts) & 1).to(torch.uint8).view(-1)
    _octets(lower).copy_(_packed(parts, _LITTLE))


def decode_indices(lower: Tensor, upper: Tensor, low: int, d: int, indices: Tensor) -> None:
    k, device = indices.numel(), indices.device
    if not k:
        return
    marks, number = _unpacked(_octets(upper), _LITTLE), torch.arange(k, device=device)
    count = torch.cumsum(marks, 0)
    high = _places(marks.bool() & (count <= k), k) - number
    if low:
        parts = _unpacked(_octets(lower), _LITTLE)[: k * low].view(k, low).to(torch.int64)
        high = (high << low) | (parts << torch.arange(low, device=device)).sum(1)
    indices.copy_(torch.where(number < count[-1], high, 0))
    ascend(indices, d)


def ascend(indices: Tensor, d: int) -> None:
    """Make what any bits were decoded to indices that ascend and are below `d`, as the host does; others stay."""
    number = torch.arange(indices.numel(), device=indices.device)
    less = (indices - number).clamp_(0, d - indices.numel())
    indices.copy_(torch.cummax(less, 0).values.add_(number))


def _octets(words: Tensor) -> Tensor:
    return words.view(torch.uint8) if words.numel() else words.new_empty(0, dtype=torch.uint8)


_LITTLE, _BIG = tuple(range(8)), tuple(reversed(range(8)))


@cache
def _shifts(order: tuple[int, ...], device: torch.device) -> Tensor:
    return bus.on_device(order, device, torch.uint8)


def _packed(bits: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return bytes of eight bits each; the number of bits is a multiple of eight."""
    shifts = _shifts(order, bits.device)
    return (bits.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def _unpacked(octets: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the bits of bytes, (..., 8 m) for (..., m)."""
    shifts = _shifts(order, octets.device)
    return ((octets[..., None] >> shifts) & 1).flatten(-2)


def encode_signs(terms: Terms, factors: Factors, keep: Tensor, keep_factors: Factors, less_decoded: bool, row_bits: Tensor,
                 row_scales: Tensor, row_block: int, row_factor: float, block: int, bits: Tensor, scales: Tensor) -> Tensor:
    x = _sum(terms, factors)
    add_signs(row_bits, row_scales, row_block, row_factor, False, x)
    positive = torch.zeros(8 * bits.numel(), dtype=torch.uint8, device=x.device)
    positive[: x.numel()] = x >= 0
    bits.copy_(_packed(positive, _BIG))
    whole = x.numel() // block * block
    if whole:
        scales[: whole // block] = _mean_magnitudes(x[:whole].view(-1, block))
    if whole < x.numel():
        scales[-1:] = _mean_magnitudes(x[None, whole:])
    if keep.numel():
        keep.copy_(_sum(terms, keep_factors))
        add_signs(row_bits, row_scales, row_block, row_factor, False, keep)
        if less_decoded:
            add_signs(bits[None], scales[None], block, -1.0, False, keep)
    return all_finite(x)


def _mean_magnitudes(rows: Tensor) -> Tensor:
    """Return the mean magnitude of every row, added up in the order of the specification."""
    totals = bus.on_host(_part_totals(rows))  # a number for every part: the rest is quicker there
    with np.errstate(over="ignore", invalid="ignore"):
        means = np.cumsum(totals, axis=1)[:, -1] / rows.shape[1]
    for j in np.flatnonzero(np.isinf(means)).tolist():
        means[j] = reference._mean_magnitude(bus.on_host(rows[j]))  # noqa: SLF001
    return bus.on_device(means, rows.device)


def _part_totals(rows: Tensor) -> Tensor:
    """Return the sums of magnitudes in parts of 4096 entries, (rows, parts) float64: groups by halves, groups in order."""
    count, length = rows.shape
    magnitudes = rows.abs()
    whole = length // _GROUP * _GROUP
    groups = magnitudes[:, :whole].reshape(count, -1, _GROUP)
    while groups.shape[2] > 1:
        half = groups.shape[2] // 2
        groups = groups[:, :, :half] + groups[:, :, half:]
    parts, of_part = -(-length // _PART), _PART // _GROUP
    sums = torch.zeros(count, parts * of_part, dtype=torch.float64, device=rows.device)
    sums[:, : whole // _GROUP] = groups[:, :, 0]
    sums = sums.view(count, parts, of_part)
    totals = sums[:, :, 0].clone()
    for j in range(1, of_part):
        totals += sums[:, :, j]
    for j in range(whole, length):
        totals[:, -1] += magnitudes[:, j]
    return totals


def add_signs(bits: Tensor, scales: Tensor, block: int, factor: float, overwrite: bool, out: Tensor) -> None:
    if overwrite:
        out.zero_()
    for row, scale in zip(bits, scales, strict=True):
        step = (scale * factor).repeat_interleave(block, output_size=scale.numel() * block)[: out.numel()]
        out += torch.where(_unpacked(row, _BIG)[: out.numel()].bool(), step, -step)


_HEADROOM = {"bf16": 0, "fp16": 15, "int8": 7}
_BROKEN = 32767


def _power(exponents: Tensor) -> Tensor:
    """Return 2 to these powers, -1022 to 1023, in float64."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


def _scaled(values: Tensor, exponents: Tensor) -> Tensor:
    """Return ``values * 2**exponents`` in float64, also where that power is no number."""
    half = exponents >> 1
    return values * _power(half) * _power(exponents - half)


def _rows(x: Tensor, block: int) -> Tensor:
    """Return x in rows of `block` entries, with zeros at the end."""
    padded = x.new_zeros(-(-x.numel() // block) * block)
    padded[: x.numel()] = x
    return padded.view(-1, block)


def quantize(terms: Terms, factors: Factors, keep: Tensor, keep_factors: Factors, less_decoded: bool, format: str,
             block: int, exponents: Tensor, codes: Tensor) -> Tensor:
    x = _sum(terms, factors)
    d = x.numel()
    rows = _rows(x, max(1, min(block, d))).to(torch.float64)
    largest = rows.abs().amax(1) if d else rows.new_zeros(0)
    broken = ~torch.isfinite(largest)
    largest = torch.where(broken, 0.0, largest)
    fraction, exponent = torch.frexp(largest)
    exponent = exponent.to(torch.int64) - _HEADROOM[format]
    if format == "int8":
        exponent += fraction * 128 > 127
    exponent = torch.where(largest == 0, 0, exponent)
    exponents.copy_(torch.where(broken, _BROKEN, exponent))
    scaled = _scaled(torch.where(broken[:, None], 0.0, rows), -exponent[:, None]).view(-1)[:d]
    codes.copy_(_codes(scaled, format))
    if keep.numel():
        keep.copy_(_sum(terms, keep_factors))
        if less_decoded:
            add_quantized(exponents, codes, format, block, -1.0, False, keep)
    return all_finite(x)


def _codes(scaled: Tensor, format: str) -> Tensor:
    if format == "int8":
        return torch.round(scaled).to(torch.int8)
    if format == "fp16":
        return scaled.to(torch.float32).to(torch.float16).view(torch.int16)
    word = scaled.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return ((rounded ^ 0x8000) - 0x8000).to(torch.int16)


def add_quantized(exponents: Tensor, codes: Tensor, format: str, block: int, factor: float, overwrite: bool,
                  out: Tensor) -> None:
    if overwrite:
        out.zero_()
    if not out.numel():
        return
    if format == "int8":
        values = codes.to(torch.float64)
    elif format == "fp16":
        large = (codes & 0x7C00) == 0x7C00  # no Inf and NaN: twice the numbers with one less in the exponent
        codes = codes ^ (large * 0x400).to(torch.int16)
        values = codes.view(torch.float16).to(torch.float64) * (1 + large.to(torch.int16))
    else:
        values = (codes.to(torch.int32) << 16).view(torch.float32).to(torch.float64)
    rows = _rows(values, min(block, out.numel()))
    power = exponents.to(torch.int64)[:, None]
    most = (128 if out.element_size() == 4 else 1024) - _HEADROOM[format] + (format == "int8")
    broken = (power > most) | ~torch.isfinite(rows)
    limit = torch.finfo(out.dtype).max
    decoded = _scaled(rows, torch.where(broken, 0, power).clamp_(-1300)).clamp(-limit, limit).to(out.dtype)
    decoded = torch.where(broken, float("nan"), decoded)
    out += decoded.view(-1)[: out.numel()] * factor


_GOLDEN, _LARGEST = 0x9E3779B97F4A7C15, (1 << 63) - 1


def _signed(word: int) -> int:
    return (word ^ (1 << 63)) - (1 << 63)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Return words of 64 bits shifted to the right, zeros from the left."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shifted(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shifted(words, 31)


def sample_indices(seed: int, key: Tensor, d: int, indices: Tensor) -> None:
    """Do what the host does with the key (seed, step, rank), of which `key` has the last two: all draws at once.

    Draw i takes the last entry it may, d - k + i, where what it has drawn is taken: by an earlier draw of the same entry, or
    by the one draw whose last entry that is, if it took it. Who depends on whom is a forest, followed to its roots in
    log2(k) rounds.
    """
    k, device = indices.numel(), indices.device
    if not k:
        return
    state = torch.zeros(1, dtype=torch.int64, device=device)
    for part in (seed, key[:1], key[1:2]):
        state = _mix(state + part + _signed(_GOLDEN))
    number = torch.arange(k, device=device)
    last = number + (d - k)
    words = _mix(state + (number + 1) * _signed(_GOLDEN))
    bound = last + 1
    drawn = (words & _LARGEST) % bound
    drawn = torch.where(words < 0, (drawn + (_LARGEST % bound + 1) % bound) % bound, drawn)
    order = torch.argsort(drawn, stable=True)
    again = torch.zeros(k, dtype=torch.bool, device=device)
    again[order[1:]] = drawn[order[1:]] == drawn[order[:-1]]
    parent = torch.where((drawn >= d - k) & (drawn < last), drawn - (d - k), number)
    taken = again
    for _ in range(k.bit_length()):
        taken, parent = taken | taken[parent], parent[parent]
    indices.copy_(torch.sort(torch.where(taken, last, drawn)).values)


def orthonormalise(rows: Tensor, spans: Any, rank: int, spare: Tensor) -> None:
    """Do it on the host: factors are no longer than a message, and sums go entry by entry."""
    ours, drawn = bus.on_host(rows), bus.on_host(spare)
    reference.orthonormalise(ours, spans, rank, drawn)
    bus.to_device(ours, rows)


def add_low_rank(left: Tensor, right: Tensor, parts: Any, rank: int, factor: float, overwrite: bool, out: Tensor) -> None:
    if overwrite:
        out.zero_()
    at = of_left = of_right = 0
    for rows, columns in parts.tolist():
        size = rows * (columns or 1)
        if columns == 0:
            value, of_left = left[of_left : of_left + rows], of_left + rows
        else:
            thin = left[of_left : of_left + rank * rows].view(rank, rows, 1)
            wide = right[of_right : of_right + rank * columns].view(rank, 1, columns)
            of_left, of_right = of_left + rank * rows, of_right + rank * columns
            value = thin[0] * wide[0]
            for one, other in zip(thin[1:], wide[1:], strict=True):
                value += one * other
        out[at : at + size] += value.reshape(-1) * factor
        at += size


def fingerprints(x: Tensor, starts: Any, out: Any) -> None:
    words = x.element_size() // 4
    if not x.numel():
        out[:] = 0
        return
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    begins = bus.on_device(words * np.asarray(starts), x.device)
    sizes = begins.diff()
    number = torch.arange(bits.numel(), device=x.device) - begins[:-1].repeat_interleave(sizes, output_size=bits.numel())
    sums = torch.cumsum(_mix(bits + (number + 1) * _signed(_GOLDEN)), 0)
    sums = torch.cat([sums.new_zeros(1), sums])
    out[:] = bus.on_host(sums[begins].diff()).view(np.uint64)
