"""One bit per entry and one scale per block: the scaled sign compressor."""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._stream import BLOCK, ahead, fetch_terms, form, goes_past_caches, kinds, put
from ._vector import (
    GROUP,
    Terms,
    Vector,
    add_signed,
    add_signed_past_caches,
    fence,
    form_group,
    load_word,
    most_significant_first,
    non_negative,
    store_word,
    subtract_signs,
    subtract_signs_past_caches,
    sum_magnitudes,
)

__all__ = ["SIGNS_SCRATCH", "add_signs", "encode_signs"]


SIGNS_SCRATCH = 2 * BLOCK + GROUP + BLOCK // GROUP


@jit
def encode_signs(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, less_decoded: bool,
                 row_bits: NDArray[np.uint8], row_scales: Vector, row_block: int, row_factor: np.floating, block: int,
                 bits: NDArray[np.uint8], scales: Vector, scratch: Vector) -> bool:
    """Write the signs of ``x = sum_t factors[t] * terms[t]`` into `bits` and mean magnitudes of blocks into `scales`.

    Parameters
    ----------
    row_bits, row_scales, row_block, row_factor : messages of `m` ranks, as :func:`add_signs` takes them, which are decoded
        and added to x, and to what is kept; m may be 0
    bits : (ceil(d / 8),) uint8, overwritten; entry i is bit ``7 - i % 8`` of byte ``i // 8`` (the order of np.packbits),
        set when ``x[i] >= 0``, so that 0.0, -0.0 count as positive and NaN as negative; bits beyond d are 0
    scales : (ceil(d / block),) of the dtype of x, overwritten

    Returns
    -------
    bool
        Whether x is finite. If not, `keep`, `bits` and `scales` mean nothing.

    Notes
    -----
    The magnitudes of a block are added in groups of 64: within a group, in the dtype of x, the upper half is added to
    the lower half six times; the groups, and what follows the last whole one, are added in order in float64. Blocks of
    more than 4096 entries are added in parts of 4096. Where a sum overflows, the mean of what is divided by the largest
    magnitude is taken, and for long blocks the mean of the means of its parts.
    Memory touched: every term once and `keep` when a block fits the cache; with `keep` and longer blocks, the terms
    twice, because no error is known before the scale.
    """
    d, finite = terms[0].size, True
    x, other, sums = scratch[: BLOCK + GROUP], scratch[BLOCK + GROUP : 2 * BLOCK + GROUP], scratch[2 * BLOCK + GROUP :]
    same = factors[0] == keep_factors[0] and factors[1] == keep_factors[1] and factors[2] == keep_factors[2]
    base = x if same else other
    bits[:] = 0
    if block <= BLOCK:
        run = BLOCK // block * block if block % GROUP == 0 else block  # groups of a run are groups of its blocks
        for low in range(0, d, run):
            m = min(run, d - low)
            _scan(terms, factors, row_bits, row_scales, row_block, row_factor, low, m, bits, x, sums)
            part = scales[low // block : -(-(low + m) // block)]
            for j in range(part.size):
                start, stop = j * block, min((j + 1) * block, m)
                total = _total(x, sums, start, stop)
                part[j] = _mean_of_large_numbers(x[start:stop]) if np.isinf(total) else total / (stop - start)
                finite &= np.isfinite(part[j])
            if keep.size:
                if not same:
                    form(terms, keep_factors, low, other[:m])
                    _add_rows(row_bits, row_scales, row_block, row_factor, low, low + m, other)
                _keep(base, x, low, m, block, part, less_decoded, keep)
    else:
        for j in range(scales.size):
            start, stop = j * block, min((j + 1) * block, d)
            scales[j] = _scale_of_long_block(terms, factors, row_bits, row_scales, row_block, row_factor,
                                             start, stop, bits, x, sums)
            finite &= np.isfinite(scales[j])
            for low in range(start, stop if keep.size else start, BLOCK):
                m = min(BLOCK, stop - low)
                form(terms, factors, low, x[:m])
                _add_rows(row_bits, row_scales, row_block, row_factor, low, low + m, x)
                if not same:
                    form(terms, keep_factors, low, other[:m])
                    _add_rows(row_bits, row_scales, row_block, row_factor, low, low + m, other)
                _keep(base, x, low, m, BLOCK, scales[j : j + 1], less_decoded, keep)
    fence()
    return finite


@jit
def _scan(terms, factors, row_bits, row_scales, row_block, row_factor, low, m, bits, x, sums):
    """Form ``x[:m]``, set its bits (from number `low` on), and sum the magnitudes of its groups."""
    whole, aligned, j = m // GROUP * GROUP, low % 8 == 0, low // row_block
    at_once = aligned and (low + m - 1) // row_block == j  # all steps for a group, while later ones come from memory
    if not at_once:
        form(terms, factors, low, x[:m])
        _add_rows(row_bits, row_scales, row_block, row_factor, low, low + m, x)
    a, b, c = terms
    f, g_, h, kind, far = factors[0], factors[1], factors[2], kinds(terms, factors), ahead(terms)
    for g in range(0, whole, GROUP):
        if at_once:
            fetch_terms(a, b, c, kind, low + g + far)
            form_group(a, b, c, f, g_, h, kind, low + g, x, g)
            for r in range(row_bits.shape[0]):
                word = most_significant_first(load_word(row_bits[r], (low + g) >> 3))
                add_signed(x, g, word, row_factor * row_scales[r, j], x, g)
        sums[g // GROUP] = sum_magnitudes(x, g)
        if aligned:
            store_word(most_significant_first(non_negative(x, g)), bits, (low + g) >> 3)
    if at_once and whole < m:
        form(terms, factors, low + whole, x[whole:m])
        _add_rows(row_bits, row_scales, row_block, row_factor, low + whole, low + m, x[whole:])
    for i in range(whole if aligned else 0, m):
        bits[(low + i) >> 3] |= np.uint8(x[i] >= 0) << (7 - ((low + i) & 7))


@jit
def _total(x, sums, start, stop):
    """Add the groups from `start` to `stop`, and what follows the last one."""
    total, groups = 0.0, (stop - start) // GROUP
    for g in range(start // GROUP, start // GROUP + groups):
        total += sums[g]
    for i in range(start + groups * GROUP, stop):
        total += abs(x[i])
    return total


@jit
def _scale_of_long_block(terms, factors, row_bits, row_scales, row_block, row_factor, start, stop, bits, x, sums):
    total, large = 0.0, 0.0
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _scan(terms, factors, row_bits, row_scales, row_block, row_factor, low, m, bits, x, sums)
        part = _total(x, sums, 0, m)
        total += part
        mean = _mean_of_large_numbers(x[:m]) if np.isinf(part) else part / m
        large += mean * (m / (stop - start))
    return large if np.isinf(total) else total / (stop - start)


@jit
def _mean_of_large_numbers(x):
    """Return the mean magnitude although the sum overflows."""
    largest, mean = 0.0, 0.0
    for i in range(x.size):
        if not np.isfinite(x[i]):
            return np.inf
        largest = max(largest, np.float64(abs(x[i])))
    for i in range(x.size):
        mean += abs(x[i]) / largest / x.size
    return min(mean, 1.0) * largest


@jit
def _keep(base, x, low, m, block, scales, less_decoded, keep):
    """Write a tile of ``base``, less the decoded signs of `x` if that is wanted, to ``keep[low:]``."""
    if not less_decoded:
        put(base[:m], keep, low)
        return
    past = goes_past_caches(keep)
    for j in range(scales.size):
        start, stop, scale = j * block, min((j + 1) * block, m), scales[j]
        whole = start + (stop - start) // GROUP * GROUP
        if past and (low + start) % GROUP == 0:
            for g in range(start, whole, GROUP):
                subtract_signs_past_caches(base, x, g, scale, keep, low + g)
        else:
            for g in range(start, whole, GROUP):
                subtract_signs(base, x, g, scale, keep, low + g)
        for i in range(whole, stop):
            keep[low + i] = base[i] - (scale if x[i] >= 0 else -scale)


@jit
def add_signs(bits: NDArray[np.uint8], scales: Vector, block: int, factor: np.floating, overwrite: bool, out: Vector,
              scratch: Vector) -> None:
    """Add the decoded messages of `m` ranks to `out`, each times `factor`, in row order and in one pass over `out`.

    Parameters
    ----------
    bits : (m, ceil(d / 8)) uint8, as :func:`encode_signs` wrote them
    scales : (m, ceil(d / block)) of the dtype of `out`
    out : (d,), ``out[i] += +-(factor * scales[r, i // block])`` for r = 0, 1, ...
    """
    past = overwrite and goes_past_caches(out) and bits.shape[0] > 0
    for low in range(0, out.size, BLOCK):
        high = min(low + BLOCK, out.size)
        if past and low // block == (high - 1) // block and (high - low) % GROUP == 0:
            _write_sums(bits, scales, low // block, factor, low, high, out, scratch)
            continue
        target = scratch[: high - low] if overwrite else out[low:high]
        if overwrite:
            target[:] = 0
        _add_rows(bits, scales, block, factor, low, high, target)
        if overwrite:
            put(target, out, low)
    fence()


@jit
def _write_sums(bits, scales, j, factor, low, high, out, x):
    """Write the sum of whole groups of all messages to `out`, past the caches, and each as soon as it is known."""
    last = bits.shape[0] - 1
    x[:GROUP] = 0
    for at in range(low, high, GROUP):
        if last:
            x[:GROUP] = 0
        for r in range(last):
            word = most_significant_first(load_word(bits[r], at >> 3))
            add_signed(x, 0, word, factor * scales[r, j], x, 0)
        word = most_significant_first(load_word(bits[last], at >> 3))
        add_signed_past_caches(x, 0, word, factor * scales[last, j], out, at)


@jit
def _add_rows(bits, scales, block, factor, low, high, out):
    """Add the entries from `low` to `high` of all messages to `out`."""
    for r in range(bits.shape[0]):
        for j in range(low // block, -(-high // block)):
            start, stop = max(low, j * block), min(high, (j + 1) * block)
            _add_row(bits[r], start, stop, factor * scales[r, j], out, start - low)


@jit
def _add_row(bits, low, high, step, out, at):
    """Add +-step to ``out[at:]`` by the bits from `low` to `high`."""
    whole = 0
    if low % 8 == 0:
        whole = (high - low) // GROUP * GROUP
        for g in range(0, whole, GROUP):
            add_signed(out, at + g, most_significant_first(load_word(bits, (low + g) >> 3)), step, out, at + g)
    for i in range(whole, high - low):
        bit = low + i
        out[at + i] += step if (bits[bit >> 3] >> (7 - (bit & 7))) & 1 else -step
