"""Linear combinations of up to three vectors, formed block by block in cache: no pass over memory of their own."""

from ._jit import jit
from ._vector import GROUP, address, fetch, form_group, store_past_caches

__all__ = ["BLOCK", "ahead", "fetch_terms", "form", "goes_past_caches", "kinds", "put"]

BLOCK = 4096  # entries; a block of two float32 terms and its result fill a first-level cache of 48 KiB
_LINE = 64
_AHEAD = 640  # entries of all terms together, see ahead()
_LARGE = 1 << 20  # entries; a shorter vector may be in a cache, and should stay there


@jit
def kinds(terms, factors):
    """Return how :func:`form_group` has to form ``factors[0] * terms[0] + factors[1] * terms[1] + factors[2] * terms[2]``.

    terms : three (d,) arrays; the last one, or the last two, may be empty and then count as absent
    factors : (3,)

    A factor of 1 or -1 is not multiplied with: products of subnormal numbers are a hundred times slower.
    """
    kind = 1 if factors[0] == 1 else 3
    if terms[1].size:
        kind |= (1 if factors[1] == 1 else 2 if factors[1] == -1 else 3) << 2
    if terms[2].size:
        kind |= (1 if factors[2] == 1 else 2 if factors[2] == -1 else 3) << 4
    return kind


@jit
def ahead(terms):
    """Return how many entries ahead to ask for cache lines; more and fewer are slower, measured with data out of cache."""
    return _AHEAD // (1 + (terms[1].size > 0) + (terms[2].size > 0))


@jit
def fetch_terms(a, b, c, kind, start):
    """Ask for the cache lines of 64 entries of the terms that :func:`kinds` says are there."""
    fetch(a, start)
    if kind > 3:
        fetch(b, start)
    if kind > 15:
        fetch(c, start)


@jit
def form(terms, factors, start, out):
    """Write the entries from `start` on into `out`, the terms added in their order; see :func:`kinds`."""
    a, b, c = terms
    f, g, h = factors[0], factors[1], factors[2]
    kind, m, far = kinds(terms, factors), out.size, ahead(terms)
    whole = m // GROUP * GROUP
    for at in range(0, whole, GROUP):
        fetch_terms(a, b, c, kind, start + at + far)
        form_group(a, b, c, f, g, h, kind, start + at, out, at)
    for i in range(whole, m):
        value = f * a[start + i]
        if b.size:
            value += g * b[start + i]
        if c.size:
            value += h * c[start + i]
        out[i] = value


@jit
def goes_past_caches(out):
    """Return whether `out` is written past the caches: it is long and begins where a cache line does."""
    return out.size >= _LARGE and address(out) % _LINE == 0


@jit
def put(block, out, start):
    """Copy `block` to ``out[start:]``, past the caches where that is possible. A fence must follow in the end."""
    part = out[start : start + block.size]
    done = 0
    if goes_past_caches(out) and address(part) % _LINE == 0:
        lanes = _LINE // block.itemsize
        done = block.size // lanes * lanes
        for i in range(0, done, lanes):
            store_past_caches(block, part, i)
    for i in range(done, block.size):
        part[i] = block[i]
