"""Vector instructions that Numba does not offer, as portable LLVM: 64 entries at a time, one bit each in a 64-bit word.

LLVM lowers them to what the machine has (AVX-512, AVX2, SSE, NEON). Bit q of a word belongs to entry ``start + q``.
None of them checks bounds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numpy.typing import NDArray

__all__ = ["GROUP", "Terms", "Vector", "add_signed", "add_signed_past_caches", "address", "at_least", "fence",
           "fetch", "fetch_entry", "form_group", "load_word", "magnitude", "most_significant_first",
           "non_negative", "population", "squared_distance", "store_past_caches", "store_word", "subtract_group",
           "subtract_signs", "subtract_signs_past_caches", "sum_magnitudes", "trailing_zeros"]

Vector = NDArray[np.floating]
Terms = tuple[Vector, Vector, Vector]
GROUP = 64
_LINE = 64  # bytes
intrinsic: Any = extending.intrinsic
_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _float_type(array: Any) -> Any:
    return ir.FloatType() if array.dtype.bitwidth == 32 else ir.DoubleType()


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, start: Any, element: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), element.as_pointer())


def _word_pointer(context: Any, builder: Any, array_type: Any, array: Any, byte: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    first = builder.bitcast(data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(first, [byte]), _I64.as_pointer())


def _store(builder: Any, value: Any, target: Any, align: int, past_caches: bool) -> None:
    store = builder.store(value, target, align=_LINE if past_caches else align)
    if past_caches:
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def _either_sign(builder: Any, positive: Any, step: Any) -> Any:
    return builder.select(positive, _splat(builder, step), _splat(builder, builder.fneg(step)))


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, GROUP)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined),
                                  ir.Constant(ir.VectorType(_I32, GROUP), [0] * GROUP))


def _on_words(operation: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic from uint64 to uint64."""

    def typing(_context: Any, word: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return operation(builder, arguments[0])

        return types.uint64(types.uint64), generate

    return intrinsic(typing)


def _reverse_in_bytes(builder: Any, word: Any) -> Any:
    declare = cgutils.get_or_insert_function
    kind = ir.FunctionType(_I64, [_I64])
    reverse = declare(builder.module, kind, "llvm.bitreverse.i64")
    swap = declare(builder.module, kind, "llvm.bswap.i64")
    return builder.call(swap, [builder.call(reverse, [word])])


# 64 for a word without bits.
trailing_zeros: Any = _on_words(lambda builder, word: builder.cttz(word, cgutils.false_bit))
population: Any = _on_words(lambda builder, word: builder.ctpop(word))
# Reverse the bits of every byte: between words of this module and bytes in the order of np.packbits.
most_significant_first: Any = _on_words(_reverse_in_bytes)


@intrinsic
def magnitude(_context: Any, value: Any) -> Any:
    """Return the bits of a float without its sign, as uint64: they order like magnitudes, NaN last."""
    bits = value.bitwidth

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        integer = ir.IntType(bits)
        word = builder.and_(builder.bitcast(arguments[0], integer), integer((1 << (bits - 1)) - 1))
        return word if bits == 64 else builder.zext(word, _I64)

    return types.uint64(value), generate


@intrinsic
def at_least(_context: Any, array: Any, start: Any, bound: Any) -> Any:
    """Return a word that says whether the magnitude (as an integer) of entry ``start + q`` is at least `bound`."""
    bits = array.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = ir.IntType(bits)
        vector = ir.VectorType(integer, GROUP)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        mask = ir.Constant(vector, [(1 << (bits - 1)) - 1] * GROUP)
        keys = builder.and_(builder.load(pointer, align=bits // 8), mask)
        limit = arguments[2] if bits == 64 else builder.trunc(arguments[2], integer)
        return builder.bitcast(builder.icmp_unsigned(">=", keys, _splat(builder, limit)), _I64)

    return types.uint64(array, types.int64, types.uint64), generate


@intrinsic
def non_negative(_context: Any, array: Any, start: Any) -> Any:
    """Return a word that says whether entry ``start + q`` is >= 0: -0.0 is, NaN is not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(_float_type(array), GROUP)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        values = builder.load(pointer, align=array.dtype.bitwidth // 8)
        zeros = ir.Constant(vector, [0.0] * GROUP)
        return builder.bitcast(builder.fcmp_ordered(">=", values, zeros), _I64)

    return types.uint64(array, types.int64), generate


@intrinsic
def sum_magnitudes(_context: Any, array: Any, start: Any) -> Any:
    """Return the sum of 64 magnitudes: the upper half is added to the lower one, six times."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, size = array.dtype.bitwidth, GROUP
        vector = ir.VectorType(ir.IntType(bits), GROUP)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        mask = ir.Constant(vector, [(1 << (bits - 1)) - 1] * GROUP)
        words = builder.and_(builder.load(pointer, align=bits // 8), mask)
        total = builder.bitcast(words, ir.VectorType(_float_type(array), GROUP))
        while size > 1:
            size //= 2
            half = ir.VectorType(_I32, size)
            low = builder.shuffle_vector(total, total, ir.Constant(half, list(range(size))))
            high = builder.shuffle_vector(total, total, ir.Constant(half, list(range(size, 2 * size))))
            total = builder.fadd(low, high)
        return builder.extract_element(total, _I32(0))

    return array.dtype(array, types.int64), generate


def _adding_signed(past_caches: bool) -> Any:
    def typing(_context: Any, array: Any, start: Any, word: Any, step: Any, out: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            align = array.dtype.bitwidth // 8
            vector = ir.VectorType(_float_type(array), GROUP)
            origin = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
            target = _pointer(context, builder, signature.args[4], arguments[4], arguments[5], vector)
            positive = builder.bitcast(arguments[2], ir.VectorType(ir.IntType(1), GROUP))
            steps = _either_sign(builder, positive, arguments[3])
            value = builder.fadd(builder.load(origin, align=align), steps)
            _store(builder, value, target, align, past_caches)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.uint64, array.dtype, out, types.int64), generate

    return intrinsic(typing)


# Write ``array[start + q] +- step`` to ``out[at + q]``: plus where bit q of the word is set.
add_signed: Any = _adding_signed(past_caches=False)
# The same; ``out[at]`` must be aligned to 64 bytes and is written past the caches.
add_signed_past_caches: Any = _adding_signed(past_caches=True)


@intrinsic
def subtract_group(_context: Any, values: Any, out: Any, start: Any) -> Any:
    """Subtract ``values[start + q]`` from ``out[start + q]`` where it is not zero; NaN is not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        align, vector = values.dtype.bitwidth // 8, ir.VectorType(_float_type(values), GROUP)
        source, target = (
            _pointer(context, builder, signature.args[n], arguments[n], arguments[2], vector) for n in range(2)
        )
        less, before = builder.load(source, align=align), builder.load(target, align=align)
        there = builder.fcmp_unordered("!=", less, ir.Constant(vector, [0.0] * GROUP))
        builder.store(builder.select(there, builder.fsub(before, less), before), target, align=align)
        return context.get_dummy_value()

    return types.void(values, out, types.int64), generate


def _subtracting_signs(past_caches: bool) -> Any:
    def typing(_context: Any, base: Any, x: Any, start: Any, step: Any, out: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            align = x.dtype.bitwidth // 8
            vector = ir.VectorType(_float_type(x), GROUP)
            origin, signs = (
                _pointer(context, builder, signature.args[n], arguments[n], arguments[2], vector) for n in range(2)
            )
            target = _pointer(context, builder, signature.args[4], arguments[4], arguments[5], vector)
            zeros = ir.Constant(vector, [0.0] * GROUP)
            positive = builder.fcmp_ordered(">=", builder.load(signs, align=align), zeros)
            steps = _either_sign(builder, positive, arguments[3])
            value = builder.fsub(builder.load(origin, align=align), steps)
            _store(builder, value, target, align, past_caches)
            return context.get_dummy_value()

        return types.void(base, x, types.int64, x.dtype, out, types.int64), generate

    return intrinsic(typing)


# Write ``base[start + q] -+ step`` to ``out[at + q]``: less where ``x[start + q] >= 0``, else more.
subtract_signs: Any = _subtracting_signs(past_caches=False)
# The same; ``out[at]`` must be aligned to 64 bytes and is written past the caches.
subtract_signs_past_caches: Any = _subtracting_signs(past_caches=True)


@intrinsic
def load_word(_context: Any, array: Any, byte: Any) -> Any:
    """Return the 64 bits from byte number `byte` of an array of uint8 or uint64, little-endian, aligned or not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_word_pointer(context, builder, signature.args[0], *arguments), align=1)

    return types.uint64(array, types.int64), generate


@intrinsic
def address(_context: Any, array: Any) -> Any:
    """Return the address of the first entry."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), generate


@intrinsic
def store_past_caches(_context: Any, source: Any, out: Any, start: Any) -> Any:
    """Copy 64 bytes from ``source[start:]`` to ``out[start:]``, which must be aligned to 64 bytes.

    The line of `out` is written without being read first, and does not stay in the caches.
    """
    lanes = 512 // source.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(_float_type(source), lanes)
        origin, target = (
            _pointer(context, builder, signature.args[n], arguments[n], arguments[2], vector) for n in range(2)
        )
        _store(builder, builder.load(origin, align=source.dtype.bitwidth // 8), target, _LINE, True)
        return context.get_dummy_value()

    return types.void(source, out, types.int64), generate


@intrinsic
def fence(_context: Any) -> Any:
    """Make stores past the caches visible to other processes before anything that follows."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def store_word(_context: Any, word: Any, array: Any, byte: Any) -> Any:
    """Write 64 bits to byte number `byte` of an array of uint8 or uint64, little-endian, aligned or not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, *place = arguments
        builder.store(word, _word_pointer(context, builder, signature.args[1], *place), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, array, types.int64), generate


def _on_places(nbytes: Callable[[Any], int]) -> Any:
    """Return an intrinsic that asks for the cache lines of so many bytes, from an entry on."""

    def typing(_context: Any, array: Any, start: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            byte = ir.IntType(8)
            kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), _I32, _I32, _I32])
            prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            first = builder.bitcast(builder.gep(data, [arguments[1]]), byte.as_pointer())
            for offset in range(0, nbytes(array), _LINE):
                builder.call(prefetch, [builder.gep(first, [_I64(offset)]), _I32(0), _I32(2), _I32(1)])
            return context.get_dummy_value()

        return types.void(array, types.int64), generate

    return intrinsic(typing)


# Ask for the cache lines of 64 entries from `start` on, or of one entry. They may lie outside of the array.
fetch: Any = _on_places(lambda array: GROUP * array.dtype.bitwidth // 8)
fetch_entry: Any = _on_places(lambda _array: 1)


def _forming(past_caches: bool) -> Any:
    def typing(_: Any, a: Any, b: Any, c: Any, f: Any, g: Any, h: Any, kind: Any, start: Any, out: Any, at: Any) -> Any:
        number = a.dtype
        return types.void(a, b, c, number, number, number, types.int64, types.int64, out, types.int64), _form(a, past_caches)

    return intrinsic(typing)


def _form(a: Any, past_caches: bool) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        align = a.dtype.bitwidth // 8
        vector = ir.VectorType(_float_type(a), GROUP)

        def pointer(n: int, start: Any) -> Any:
            return _pointer(context, builder, signature.args[n], arguments[n], start, vector)

        def term(n: int) -> Any:
            return builder.load(pointer(n, arguments[7]), align=align)

        def is_kind(n: int, code: int) -> Any:
            bits = builder.and_(builder.lshr(arguments[6], _I64(2 * n)), _I64(3))
            return builder.icmp_unsigned("==", bits, _I64(code))

        def either(condition: Any, value: Any, change: Callable[[Any], Any]) -> Any:
            before = builder.block
            with builder.if_then(condition):
                changed, inside = change(value), builder.block
            result = builder.phi(vector)
            result.add_incoming(value, before)
            result.add_incoming(changed, inside)
            return result

        def scaled(n: int, value: Any) -> Any:
            return builder.fmul(_splat(builder, arguments[3 + n]), value)

        value = either(is_kind(0, 3), term(0), partial(scaled, 0))
        changes: list[Callable[[int, Any], Any]] = [
            lambda n, value: builder.fadd(value, term(n)), lambda n, value: builder.fsub(value, term(n)),
            lambda n, value: builder.fadd(value, scaled(n, term(n)))]
        for n in (1, 2):
            for code, change in enumerate(changes, 1):
                value = either(is_kind(n, code), value, partial(change, n))
        _store(builder, value, pointer(8, arguments[9]), align, past_caches)
        return context.get_dummy_value()

    return generate


# Write 64 entries from `start` on of ``f * a + g * b + h * c`` to ``out[at:]``. `kind` says how: its lowest two bits for a,
# then two for b, two for c: 0 leave out, 1 add, 2 subtract, 3 multiply with the factor and add. (a is added or multiplied.)
form_group: Any = _forming(past_caches=False)
# The same; ``out[at]`` must be aligned to 64 bytes and is written past the caches.
form_group_past_caches: Any = _forming(past_caches=True)

_LANES = 32


@intrinsic
def squared_distance(_context: Any, x: Any, y: Any, width: Any) -> Any:
    """Return the sum of ``(x - y)^2`` over `width` float64, a multiple of 32, entry i in lane ``i % 32``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.DoubleType(), _LANES)
        total = cgutils.alloca_once(builder, vector)
        builder.store(ir.Constant(vector, [0.0] * _LANES), total)
        groups = builder.udiv(arguments[2], _I64(_LANES))
        with cgutils.for_range(builder, groups) as loop:
            start = builder.mul(loop.index, _I64(_LANES))
            a, b = (builder.load(_pointer(context, builder, signature.args[n], arguments[n], start, vector), align=8)
                    for n in (0, 1))
            apart = builder.fsub(a, b)
            builder.store(builder.fadd(builder.load(total), builder.fmul(apart, apart)), total)
        lanes, size = builder.load(total), _LANES
        while size > 1:  # lanes q and q + size / 2 are added
            size //= 2
            part = ir.VectorType(_I32, size)
            low, high = (builder.shuffle_vector(lanes, lanes, ir.Constant(part, [*range(at, at + size)]))
                         for at in (0, size))
            lanes = builder.fadd(low, high)
        return builder.extract_element(lanes, _I32(0))

    return types.float64(x, y, types.int64), generate
