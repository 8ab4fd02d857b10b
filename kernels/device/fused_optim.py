"""Triton kernels of optimizers: what :mod:`mpi_ef.kernels.device.plain_optim` does in many passes, in one; see `fused`.

Square roots and quotients are rounded to nearest, as on the host. Layers begin at ``starts[0]``, ``starts[1]``, ..., and may
be empty; a block of entries may lie across several.
"""

# ruff: noqa: N803, SIM108 (constants of compilation are written large, as in Triton's own code, and decide by `if`)
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import triton
import triton.language as tl

from .fused import _magnitude, _mixed, _number, _segment_of

__all__ = ["adam", "adam_step", "add_fingerprints", "add_layers", "follow_momentum", "local_step", "momentum_step",
           "part_squares", "preconditioned_step", "scaled_momentum", "sign_step", "square_totals", "update_moments"]


@triton.jit
def _entries(d, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < d


@triton.jit
def _root(x, F64: tl.constexpr):
    if F64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def _quotient(x, y, F64: tl.constexpr):
    if F64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def _moved(x, m, v, step, root_factor, eps, decay, F64: tl.constexpr):
    """Return where Adam's step leads from `x`."""
    root = _number(root_factor, F64) * _root(v, F64) + _number(eps, F64)
    return x * _number(decay, F64) - _quotient(m, root, F64) * _number(step, F64)


@triton.jit(do_not_specialize=["beta1", "rest1", "beta2", "rest2"])
def update_moments(grad, m, v, d, beta1, rest1, beta2, rest2, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Take the mean and the mean square of gradients along."""
    at, there = _entries(d, BLOCK)
    g = tl.load(grad + at, mask=there, other=0.0)
    mean = tl.load(m + at, mask=there, other=0.0) * _number(beta1, F64) + g * _number(rest1, F64)
    square = tl.load(v + at, mask=there, other=0.0) * _number(beta2, F64) + (g * g) * _number(rest2, F64)
    tl.store(m + at, mean, mask=there)
    tl.store(v + at, square, mask=there)


@triton.jit(do_not_specialize=["step", "root_factor", "eps", "decay"])
def adam_step(m, v, x, d, step, root_factor, eps, decay, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Take a step of Adam."""
    at, there = _entries(d, BLOCK)
    mean, square = tl.load(m + at, mask=there, other=0.0), tl.load(v + at, mask=there, other=1.0)
    before = tl.load(x + at, mask=there, other=0.0)
    tl.store(x + at, _moved(before, mean, square, step, root_factor, eps, decay, F64), mask=there)


@triton.jit(do_not_specialize=["beta1", "rest1", "beta2", "rest2", "step", "root_factor", "eps", "decay"])
def adam(grad, m, v, x, d, beta1, rest1, beta2, rest2, step, root_factor, eps, decay, F64: tl.constexpr,
         BLOCK: tl.constexpr):
    """Do what `update_moments` and then `adam_step` do."""
    at, there = _entries(d, BLOCK)
    g, before = tl.load(grad + at, mask=there, other=0.0), tl.load(x + at, mask=there, other=0.0)
    mean = tl.load(m + at, mask=there, other=0.0) * _number(beta1, F64) + g * _number(rest1, F64)
    square = tl.load(v + at, mask=there, other=1.0) * _number(beta2, F64) + (g * g) * _number(rest2, F64)
    tl.store(m + at, mean, mask=there)
    tl.store(v + at, square, mask=there)
    tl.store(x + at, _moved(before, mean, square, step, root_factor, eps, decay, F64), mask=there)


@triton.jit(do_not_specialize=["step", "decay"])
def preconditioned_step(m, inverse, x, d, step, decay, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Take a step along a preconditioned direction."""
    at, there = _entries(d, BLOCK)
    along = tl.load(m + at, mask=there, other=0.0) * tl.load(inverse + at, mask=there, other=0.0)
    before = tl.load(x + at, mask=there, other=0.0)
    tl.store(x + at, before * _number(decay, F64) - along * _number(step, F64), mask=there)


@triton.jit(do_not_specialize=["step", "decay"])
def sign_step(direction, x, d, step, decay, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Take a step of equal length in every entry, none where the direction is zero."""
    at, there = _entries(d, BLOCK)
    along, before = tl.load(direction + at, mask=there, other=0.0), tl.load(x + at, mask=there, other=0.0)
    length = _number(step, F64)
    by = tl.where(along > 0, length, tl.where(along < 0, -length, tl.where(along == 0, 0.0, along)))
    tl.store(x + at, before * _number(decay, F64) - by, mask=there)


@triton.jit(do_not_specialize=["beta", "rest", "step", "decay"])
def momentum_step(grad, inverse, m, x, d, beta, rest, step, decay, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Update the momentum, then take a step along it."""
    at, there = _entries(d, BLOCK)
    g, before = tl.load(grad + at, mask=there, other=0.0), tl.load(x + at, mask=there, other=0.0)
    mean = tl.load(m + at, mask=there, other=0.0) * _number(beta, F64) + g * _number(rest, F64)
    along = mean * tl.load(inverse + at, mask=there, other=0.0)
    tl.store(m + at, mean, mask=there)
    tl.store(x + at, before * _number(decay, F64) - along * _number(step, F64), mask=there)


@triton.jit(do_not_specialize=["beta", "rest", "weight", "left", "step", "decay"])
def local_step(grad, inverse, start, m, u, x, d, beta, rest, weight, left, step, decay, F64: tl.constexpr,
               BLOCK: tl.constexpr):
    """Take a gradient into the momentum, that into a mean of momenta, and place x where this mean leads from `start`."""
    at, there = _entries(d, BLOCK)
    g, before = tl.load(grad + at, mask=there, other=0.0), tl.load(start + at, mask=there, other=0.0)
    momentum = tl.load(m + at, mask=there, other=0.0) * _number(beta, F64) + g * _number(rest, F64)
    mean = tl.load(u + at, mask=there, other=0.0) * _number(left, F64) + momentum * _number(weight, F64)
    along = mean * tl.load(inverse + at, mask=there, other=0.0)
    tl.store(m + at, momentum, mask=there)
    tl.store(u + at, mean, mask=there)
    tl.store(x + at, before * _number(decay, F64) - along * _number(step, F64), mask=there)


@triton.jit
def _of_layers(numbers, starts, layers, d, at, there, BLOCK: tl.constexpr):
    """Return what the layer of each entry of a block has of `numbers`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    p = _segment_of(starts, layers, first)
    of = tl.zeros((BLOCK,), tl.int64) + p
    if tl.load(starts + p + 1) < tl.minimum(first + BLOCK, d):
        of = _segment_of(starts, layers, at)
    return tl.load(numbers + of, mask=there, other=0.0)


@triton.jit
def add_layers(values, factors, starts, layers, out, d, BLOCK: tl.constexpr):
    """Add every layer of `values`, times a factor of its own, to `out`."""
    at, there = _entries(d, BLOCK)
    added = tl.load(values + at, mask=there, other=0.0) * _of_layers(factors, starts, layers, d, at, there, BLOCK)
    tl.store(out + at, tl.load(out + at, mask=there, other=0.0) + added, mask=there)


@triton.jit(do_not_specialize=["beta", "rest"])
def scaled_momentum(grad, m, scales, starts, layers, out, d, beta, rest, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Write every layer of the next momentum, times a scale of its own, to `out`."""
    at, there = _entries(d, BLOCK)
    g = tl.load(grad + at, mask=there, other=0.0)
    momentum = tl.load(m + at, mask=there, other=0.0) * _number(beta, F64) + g * _number(rest, F64)
    tl.store(out + at, momentum * _of_layers(scales, starts, layers, d, at, there, BLOCK), mask=there)


@triton.jit(do_not_specialize=["beta1", "rest1", "beta2", "rest2", "root_factor", "eps"])
def follow_momentum(sent, inverse, backs, least, starts, layers, m, fresh, ratios, d, beta1, rest1, beta2, rest2,
                    root_factor, eps, F64: tl.constexpr, BLOCK: tl.constexpr):
    """Take a new momentum and the gradient that must have led to it; raise `ratios`, bits of zeros at first, of layers."""
    at, there = _entries(d, BLOCK)
    new = tl.load(sent + at, mask=there, other=0.0) * _of_layers(backs, starts, layers, d, at, there, BLOCK)
    g = new - tl.load(m + at, mask=there, other=0.0) * _number(beta1, F64)
    g = _quotient(g, tl.zeros((BLOCK,), m.dtype.element_ty) + _number(rest1, F64), F64)
    square = tl.load(fresh + at, mask=there, other=0.0) * _number(beta2, F64) + (g * g) * _number(rest2, F64)
    tl.store(m + at, new, mask=there)
    tl.store(fresh + at, square, mask=there)
    root = _root(square, F64) * _number(root_factor, F64)
    floor = _of_layers(least, starts, layers, d, at, there, BLOCK)
    root = tl.where(root < floor, floor, root) + _number(eps, F64)
    frozen = tl.load(inverse + at, mask=there, other=0.0)
    counts = there & (frozen > 0)
    product = tl.where(counts, root * frozen, 1.0)
    ratio = _magnitude(_quotient(tl.zeros((BLOCK,), m.dtype.element_ty) + 1.0, product, F64), F64)
    ratio = tl.where(counts, ratio, 0)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    p = _segment_of(starts, layers, first)
    if tl.load(starts + p + 1) >= tl.minimum(first + BLOCK, d):
        tl.atomic_max(ratios + p, tl.max(ratio, 0))
    else:
        tl.atomic_max(ratios + _segment_of(starts, layers, at), ratio, mask=counts)


@triton.jit
def part_squares(x, lows, sizes, parts, sums):
    """Write 64 sums of squares for every part: of its entries i, i + 64, ..., in this order, in whole groups of 64."""
    part = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    there, lane = part < parts, tl.arange(0, 64)
    low, size = tl.load(lows + part, mask=there, other=0), tl.load(sizes + part, mask=there, other=0)
    at, whole = low[:, None] + lane[None, :], size // 64 * 64
    sum_ = tl.zeros((16, 64), tl.float64)
    for group in range(0, tl.max(whole, 0), 64):
        value = tl.load(x + at + group, mask=(group < whole)[:, None] & (lane >= 0)[None, :], other=0.0).to(tl.float64)
        sum_ += value * value
    tl.store(sums + part[:, None] * 64 + lane[None, :], sum_, mask=there[:, None] & (lane >= 0)[None, :])


@triton.jit
def square_totals(x, lows, sizes, parts, sums, totals, BLOCK: tl.constexpr):
    """Add up the 64 sums of every part in order, then the squares of what follows its last group."""
    part = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = part < parts
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, 64, 16):
        for q in tl.static_range(16):
            total += tl.load(sums + part * 64 + first + q, mask=there, other=0.0)
    size = tl.load(sizes + part, mask=there, other=0)
    whole = size // 64 * 64
    low = tl.load(lows + part, mask=there, other=0) + whole
    for i in range(tl.max(size - whole, 0)):
        value = tl.load(x + low + i, mask=i < size - whole, other=0.0).to(tl.float64)
        total += value * value
    tl.store(totals + part, total, mask=there)


@triton.jit
def add_fingerprints(words, starts, layers, d, sums, BLOCK: tl.constexpr):
    """Add to ``sums[p]`` what is made of every word of 32 bits of layer p and of its number there."""
    at, there = _entries(d, BLOCK)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    p = _segment_of(starts, layers, first)
    word = tl.load(words + at, mask=there, other=0).to(tl.int64) & 0xFFFFFFFF
    if tl.load(starts + p + 1) >= tl.minimum(first + BLOCK, d):
        mixed = _mixed(word + (at - tl.load(starts + p) + 1) * -7046029254386353131)
        tl.atomic_add(sums + p, tl.sum(tl.where(there, mixed, 0), 0))
    else:
        of = _segment_of(starts, layers, at)
        number = at - tl.load(starts + of, mask=there, other=0) + 1
        tl.atomic_add(sums + of, _mixed(word + number * -7046029254386353131), mask=there)
