"""Exact selection of the entries of largest magnitude of a linear combination that is formed on the fly."""

import math

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._stream import BLOCK, ahead, fetch_terms, form, goes_past_caches, kinds, put
from ._vector import (
    GROUP,
    Terms,
    Vector,
    at_least,
    fence,
    form_group,
    form_group_past_caches,
    magnitude,
    population,
    trailing_zeros,
)

__all__ = ["SELECT_SCRATCH", "select_candidates", "select_largest"]


_SMALL = 1024  # shorter segments are collected whole
_SAMPLE = 16384
_DIGIT = 11
_FEW = 48  # so many are sorted
_NO_LIMIT = np.uint64(1 << 63)
SELECT_SCRATCH = BLOCK + GROUP + max(_SAMPLE, BLOCK)


@jit
def select_largest(terms: Terms, factors: Vector, keep: Vector, keep_factors: Vector, bounds: NDArray[np.int64],
                   counts: NDArray[np.int64], indices: NDArray[np.int64], values: Vector, scratch: Vector,
                   histogram: NDArray[np.int64]) -> bool:
    """Select the entries of largest magnitude of each segment of ``x = sum_t factors[t] * terms[t]``.

    Parameters
    ----------
    bounds : (s + 1,) int64, ascending from 0 to d: the segments
    counts : (s,) int64, how many entries of each segment are selected, at least one unless it is empty; together k
    indices : (:func:`select_candidates`,) int64; the first k are overwritten with the selected indices, ascending
    values : likewise, with the selected entries of x
    histogram : (2048,) int64 scratch

    Returns
    -------
    bool
        Whether x is finite (the selected entries tell: NaN counts as larger than Inf, Inf as larger than any number).

    Notes
    -----
    Exact. Among equal magnitudes the lowest index comes first; -0.0 and 0.0 are equal.

    Without its sign bit a float orders like an integer. The k-th largest of a random sample, lowered by three standard
    deviations, is a threshold which slightly more than k entries exceed, whatever the distribution: one streaming pass
    collects them, and a histogram finds the k largest among them. Equal magnitudes may need a second pass. Once in
    about a thousand selections the sample misleads: then a larger sample and margin, and at last digit-by-digit counting.
    Memory touched: each term once, and `keep`; twice when the k-th largest magnitude is shared by many entries.
    """
    first, largest = 0, np.uint64(0)
    for s in range(counts.size):
        k, start, stop = counts[s], bounds[s], bounds[s + 1]
        if k:
            _select_segment(terms, factors, keep, keep_factors, start, stop, k,
                            indices[first:], values[first:], scratch, histogram)
            largest = max(largest, _largest(values[first:], k))
            first += k
    fence()
    return bool(largest < magnitude(values.dtype.type(np.inf)))


def select_candidates(bounds: NDArray[np.int64], counts: NDArray[np.int64]) -> int:
    """Return how long the arrays `indices` and `values` of :func:`select_largest` must be."""
    room, first = 0, 0
    for start, stop, k in zip(bounds[:-1].tolist(), bounds[1:].tolist(), counts.tolist(), strict=True):
        room = max(room, first + _room(stop - start, k))
        first += k
    return room + BLOCK + 1


@jit
def _sample_size(d, attempt):
    """Return how many entries are looked at: each costs a cache miss, as much as ten candidates more or less."""
    return min(max(64, int(math.sqrt(d))) << (2 * attempt), _SAMPLE)


@jit
def _rank_in_sample(d, k, attempt):
    """Return how far from the top of the sample the threshold lies, so that at least k of d entries exceed it."""
    expected = _sample_size(d, attempt) * k / d
    return int(expected + (3 + 3 * attempt) * math.sqrt(expected) + 4 + 8 * attempt)


@jit
def _room(d, k):
    """Return how many candidates there may be before the threshold counts as too low."""
    if d <= _SMALL:
        return d
    rank = _rank_in_sample(d, k, 0)
    return min(d, int((rank + 6 * math.sqrt(rank) + 16) * d / _sample_size(d, 0)))


@jit
def _select_segment(terms, factors, keep, keep_factors, start, stop, k,
                    indices, values, scratch, histogram):
    d, one = stop - start, np.uint64(1)
    sample = scratch[BLOCK + GROUP :]
    if d <= _SMALL or k == d:
        _collect(terms, factors, keep, keep_factors, start, stop, np.uint64(0), d, indices, values, scratch)
        _reduce(indices, values, d, k, np.uint64(0), histogram, sample)
        return
    for attempt in range(2):
        rank = _rank_in_sample(d, k, attempt)
        threshold = np.uint64(0)
        if rank <= _sample_size(d, attempt):
            threshold = _sample_threshold(terms, factors, start, d, rank, attempt, sample, histogram)
        found = _collect(terms, factors, keep, keep_factors, start, stop, threshold + one, _room(d, k),
                         indices, values, scratch)
        if k <= found <= _room(d, k):
            _reduce(indices, values, found, k, threshold + one, histogram, sample)
            return
        if found < k and k == _collect_ties(terms, factors, start, stop, threshold, k - found, k,
                                            indices, values, scratch):
            return  # many entries are equal to the threshold; else it was too high, or too low
    if keep.size:
        form(terms, keep_factors, start, keep[start:stop])
    threshold, ties = _count_digits(terms, factors, start, stop, k, scratch[:BLOCK], histogram)
    _collect_ties(terms, factors, start, stop, threshold, ties, k, indices, values, scratch)


@jit
def _sample_threshold(terms, factors, start, d, rank, attempt, sample, histogram):
    """Return the magnitude of the `rank`-th largest of a sample at pseudo-random places."""
    m = _sample_size(d, attempt)
    a, b, c = terms
    state = np.uint64(attempt)
    for j in range(m):
        state += np.uint64(0x9E3779B97F4A7C15)  # SplitMix64
        word = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
        i = start + np.int64(
            (word >> np.uint64(32)) * np.uint64(d) >> np.uint64(32) if d < 1 << 32 else word % np.uint64(d)
        )
        value = factors[0] * a[i]
        if b.size:
            value += factors[1] * b[i]
        if c.size:
            value += factors[2] * c[i]
        sample[j] = value
    return _kth_largest(sample, m, rank, np.uint64(0), _largest(sample, m), histogram, sample)[0]


@jit
def _collect(terms, factors, keep, keep_factors, start, stop, bound, limit, indices, values, scratch):
    """Collect the entries of magnitude >= `bound`; stop where they are more than `limit`. Return how many there are."""
    found, one = 0, np.uint64(1)
    x, other = scratch[: BLOCK + GROUP], scratch[BLOCK + GROUP :]
    a, b, c = terms
    f0, f1, f2, kind = factors[0], factors[1], factors[2], kinds(terms, factors)
    k0, k1, k2, keep_kind = keep_factors[0], keep_factors[1], keep_factors[2], kinds(terms, keep_factors)
    far, past = ahead(terms), goes_past_caches(keep) and start % GROUP == 0
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        for g in range(0, m, GROUP):
            if m - g >= GROUP:
                fetch_terms(a, b, c, kind, low + g + far)
                form_group(a, b, c, f0, f1, f2, kind, low + g, x, g)
                if past:
                    form_group_past_caches(a, b, c, k0, k1, k2, keep_kind, low + g, keep, low + g)
                elif keep.size:
                    form_group(a, b, c, k0, k1, k2, keep_kind, low + g, other, g)
                word = at_least(x, g, bound)
            else:
                form(terms, factors, low + g, x[g:m])
                form(terms, keep_factors, low + g, other[g:m])
                word = at_least(x, g, bound) & ((one << np.uint64(m - g)) - one)
            # Unsigned places, because Numba asks of every signed one whether it is negative. The first candidate is
            # written without asking whether there is one: x[g + 64] is something, and found stays where it is.
            place, first = np.uint64(found), np.uint64(g)
            found += int(population(word))
            i = first + trailing_zeros(word)
            indices[place], values[place] = np.uint64(low) + i, x[i]
            word &= word - one
            while word:
                place += one
                i = first + trailing_zeros(word)
                indices[place], values[place] = np.uint64(low) + i, x[i]
                word &= word - one
        if keep.size:
            done = m // GROUP * GROUP if past else 0
            put(other[done:m], keep, low + done)
        if found > limit:
            break
    return found


@jit
def _collect_ties(terms, factors, start, stop, threshold, ties, k, indices, values, x):
    """Collect `k` entries: those of larger magnitude than `threshold`, and the first `ties` of those equal to it."""
    found, bound, one = 0, threshold, np.uint64(1)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        form(terms, factors, low, x[:m])
        x[m : m + GROUP] = 0
        for g in range(0, m, GROUP):
            word = at_least(x, g, bound)
            while word:
                i = g + np.int64(trailing_zeros(word))
                word &= word - one
                if i < m and (magnitude(x[i]) > threshold or ties > 0):
                    ties -= magnitude(x[i]) == threshold
                    indices[found], values[found] = low + i, x[i]
                    found += 1
                    if found == k:
                        return found
        if ties == 0:  # from now on only what is larger
            bound = threshold + one
    return found


@jit
def _reduce(indices, values, found, k, low, histogram, few):
    """Move the k largest of the first `found` candidates, all of magnitude >= `low`, to the front."""
    if found == k:
        return
    one = np.uint64(1)
    high = low + (one << np.uint64(24 if values.itemsize == 4 else 53))  # four times as large as `low`: far enough
    beyond = 0
    for g in range(0, found, GROUP):
        beyond += int(population(_between(values, g, found, high + one, _NO_LIMIT)))
    if beyond < k:
        threshold, ties = _kth_largest(values, found, k - beyond, low, high, histogram, few)
    else:
        threshold, ties = _kth_largest(values, found, k, high + one, _largest(values, found), histogram, few)
    kept = np.uint64(0)
    for g in range(0, found, GROUP):
        word = _between(values, g, found, threshold, _NO_LIMIT)
        while word:
            j = np.uint64(g) + trailing_zeros(word)
            word &= word - one
            tie = magnitude(values[j]) == threshold
            ties -= tie
            indices[kept], values[kept] = indices[j], values[j]
            kept += np.uint64(not tie or ties >= 0)


@jit
def _between(values, start, stop, low, high):
    """Return a word that says which entries from `start` on, before `stop`, have magnitudes from `low` to `high`."""
    one = np.uint64(1)
    word = at_least(values, start, low)
    if high < _NO_LIMIT:
        word &= ~at_least(values, start, high + one)
    if stop - start < GROUP:
        word &= (one << np.uint64(stop - start)) - one
    return word


@jit
def _kth_largest(values, size, k, low, high, histogram, few):
    """Return the k-th largest magnitude from `low` to `high` in ``values[:size]``, and which of its equals that is.

    Others do not count. Each round looks at the next 11 bits; `few`, whose content is lost and which may be where
    `values` are, takes the entries that still count as soon as there is room for them.
    """
    ties = k
    while high > low:
        shift = _digit_shift(low, high)
        histogram[:] = 0
        for j in range(size):
            key = magnitude(values[j])
            if low <= key <= high:
                histogram[(key - low) >> shift] += 1
        low, high, ties = _descend(low, high, shift, ties, histogram)
        if shift and size > few.size >= histogram[0]:  # histogram[0]: how many entries are in [low, high] now
            kept, one = 0, np.uint64(1)
            for g in range(0, size, GROUP):
                word = _between(values, g, size, low, high)
                while word:
                    few[kept] = values[np.uint64(g) + trailing_zeros(word)]
                    word &= word - one
                    kept += 1
            values, size = few, kept
            if size <= _FEW:
                return _kth_of_few(values, size, ties)
    return low, ties


@jit
def _kth_of_few(values, size, k):
    """Return what :func:`_kth_largest` returns, by sorting the values."""
    for j in range(1, size):
        value, i = values[j], j
        while i > 0 and magnitude(values[i - 1]) < magnitude(value):
            values[i] = values[i - 1]
            i -= 1
        values[i] = value
    key, larger = magnitude(values[k - 1]), k - 1
    while larger > 0 and magnitude(values[larger - 1]) == key:
        larger -= 1
    return key, k - larger


@jit
def _largest(values, size):
    high = np.uint64(0)
    for j in range(size):
        high = max(high, magnitude(values[j]))
    return high


@jit
def _digit_shift(low, high):
    shift = np.uint64(0)
    while (high - low) >> (shift + np.uint64(_DIGIT)):
        shift += np.uint64(1)
    return shift


@jit
def _descend(low, high, shift, ties, histogram):
    """Return the bucket that holds the entry sought, and what is left of its rank; ``histogram[0]`` becomes its size."""
    one = np.uint64(1)
    digit = (high - low) >> shift
    while histogram[digit] < ties:
        ties -= histogram[digit]
        digit -= one
    histogram[0] = histogram[digit]
    low += digit << shift
    return low, min(high, low + (one << shift) - one), ties


@jit
def _count_digits(terms, factors, start, stop, k, block, histogram):
    """Return what :func:`_kth_largest` returns for the whole segment, by a pass over it for every 11 bits."""
    low, high, ties = np.uint64(0), ~np.uint64(0) >> np.uint64(65 - 8 * block.itemsize), k
    while high > low:
        shift = _digit_shift(low, high)
        histogram[:] = 0
        for begin in range(start, stop, BLOCK):
            m = min(BLOCK, stop - begin)
            form(terms, factors, begin, block[:m])
            for j in range(m):
                key = magnitude(block[j])
                if low <= key <= high:
                    histogram[(key - low) >> shift] += 1
        low, high, ties = _descend(low, high, shift, ties, histogram)
    return low, ties
