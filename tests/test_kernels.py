"""Law 8: every kernel gives the bits of its plain twin. And: what the twins promise."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectors_for_tests import DTYPES, vectors

from mpi_ef import kernels
from mpi_ef.kernels import reference

SIZES = {"low_bits", "lower_nbytes", "upper_nbytes", "select_candidates"}  # how much memory the kernels need
FORMATS = {"bf16": np.int16, "fp16": np.int16, "int8": np.int8}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_every_kernel_has_a_twin_with_the_same_parameters():
    assert set(reference.__all__) == {name for name in kernels.__all__ if name.islower()} - SIZES
    for name in reference.__all__:
        kernel = getattr(kernels, name)
        kernel = getattr(kernel, "py_func", kernel)
        assert list(inspect.signature(kernel).parameters) == list(
            inspect.signature(getattr(reference, name)).parameters
        ), name


def terms_of(x, count):
    """Return `count` vectors made of x, and empty ones in the place of the rest, as codecs hand them to kernels."""
    terms = tuple([x.view(), x[::-1].copy(), np.roll(x, 1)][:count] + [x[:0] for _ in range(3 - count)])
    for term in terms:
        term.flags.writeable = False  # other types are other machine code
    return terms


@st.composite
def sources(draw, dtype, **limits):
    """Terms, factors, an array to keep something in (or an empty one), factors for that."""
    x = draw(vectors(dtype, finite=False, **limits))
    count = draw(st.integers(1, 3))
    factor = st.sampled_from([1.0, -1.0, 0.5, 0.3, 0.0])
    factors, kept = (np.array([draw(factor) for _ in range(3)], dtype) for _ in range(2))
    keep = np.full(x.size if draw(st.booleans()) else 0, 7, dtype)
    return terms_of(x, count), factors, keep, kept


def select(kernel, source, bounds, counts):
    terms, factors, keep, kept = source
    dtype, k = factors.dtype, counts.sum()
    room = kernels.select_candidates(bounds, counts)
    indices, values, keep = np.full(room, -1, np.int64), np.full(room, 7, dtype), keep.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        finite = kernel(terms, factors, keep, kept, bounds, counts, indices, values,
                        np.empty(kernels.SELECT_SCRATCH, dtype), np.empty(2048, np.int64))
    return bool(finite), indices[:k], values[:k], keep


def assert_selects_like_the_twin(source, bounds, counts):
    finite, indices, values, keep = select(kernels.select_largest, source, bounds, counts)
    expected = select(reference.select_largest, source, bounds, counts)
    assert finite == expected[0]
    if finite:  # NaNs made by arithmetic have any bits
        assert same_bits(indices, expected[1])
        assert same_bits(values, expected[2])
    if keep.size and np.isfinite(expected[3]).all():
        np.testing.assert_array_equal(keep, expected[3])


def whole(x, k):
    return (terms_of(x, 1), np.ones(3, x.dtype), x[:0], np.ones(3, x.dtype)), np.array([0, x.size]), np.array([k])


@each_dtype
def test_select_largest(dtype):
    @given(sources(dtype), st.lists(st.floats(0, 1), max_size=3), st.floats(0, 1))
    def check(source, cuts, share):
        d = source[0][0].size
        bounds = np.array([0, *sorted(round(cut * d) for cut in cuts), d])
        sizes = np.diff(bounds)
        assert_selects_like_the_twin(
            source, bounds, np.clip(np.round(share * sizes), 1, None).astype(np.int64) * (sizes > 0)
        )

    check()


@each_dtype
def test_select_takes_the_lowest_index_among_ties_and_nan_first(dtype):
    def largest(*x):
        return select(kernels.select_largest, *whole(np.array(x, dtype), 3))[:2]

    tiny = np.finfo(dtype).smallest_subnormal
    for x, finite, expected in (
        ((1, -2, 2, 2, -2), True, [1, 2, 3]),
        ((0.0, -0.0, 0, 0, -0.0), True, [0, 1, 2]),
        ((1, np.inf, 5, np.nan, -np.inf), False, [1, 3, 4]),
        ((0, tiny, -3 * tiny, 2 * tiny, tiny), True, [1, 2, 3]),
    ):
        seen, indices = largest(*x)
        assert (seen, indices.tolist()) == (finite, expected)


def hard_vectors(d, k):
    """Vectors that mislead a threshold guessed from a sample, or that have no threshold at all."""
    normal = np.random.default_rng(1).normal(size=d)
    return {
        "normal": normal,
        "constant": np.full(d, -3.0),
        "zero": np.zeros(d),
        "one-hot": np.eye(1, d, d // 3).ravel(),
        "ascending": np.arange(d, dtype=float),
        "descending": -np.arange(d, dtype=float)[::-1],
        "equal magnitudes": np.where(normal > 0, 2.0, -2.0),
        "subnormal": normal * 1e-40,
        "zeros and few others": np.where(np.arange(d) % 977 == 5, normal, 0),
        "two values, k of the larger": np.where(np.arange(d) < k, 2.0, 1.0),
        "two values, k + 1 of the larger, at the end": np.where(np.arange(d) >= d - k - 1, 2.0, 1.0),
        "three values": np.random.default_rng(2).choice([0.0, 1.0, 2.0], d, p=[0.985, 0.01, 0.005]),
        "heavy tail": np.random.default_rng(3).standard_cauchy(d),
        "all in one place": np.where(abs(np.arange(d) - d // 2) < k, normal, 1e-3 * normal),
    }


@each_dtype
@pytest.mark.parametrize("d", [1_025, 100_003])
@pytest.mark.parametrize("ratio", [1e-4, 0.01, 0.1, 0.9])
def test_select_largest_on_long_vectors(dtype, ratio, d):
    k = max(1, int(ratio * d))
    for name, x in hard_vectors(d, k).items():
        source, bounds, counts = whole(x.astype(dtype), k)
        try:
            assert_selects_like_the_twin(source, bounds, counts)
        except AssertionError as error:
            raise AssertionError(name) from error


def sampled_places(d, sizes):
    """Where the samples of select_largest look."""
    word, places = 2**64 - 1, []
    for attempt, size in enumerate(sizes):
        for j in range(1, size + 1):
            state = attempt + j * 0x9E3779B97F4A7C15 & word
            state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & word
            state = (state ^ (state >> 27)) * 0x94D049BB133111EB & word
            places.append(((state ^ (state >> 31)) >> 32) * d >> 32)
    return np.unique(places)


@each_dtype
@pytest.mark.parametrize("sampled", [1000.0, 0.0])
def test_select_when_the_samples_mislead(dtype, sampled):
    """Thresholds that are far too high, or far too low, end in counting digits: still exact."""
    from mpi_ef.kernels.select import _rank_in_sample, _sample_size, _sample_threshold

    d, k = 50_000, 2500
    x = 1 + np.random.default_rng(0).random(d)
    x[sampled_places(d, [_sample_size(d, attempt) for attempt in range(2)])] *= sampled
    (terms, factors, _, kept), bounds, counts = whole(x.astype(dtype), k)
    scratch, histogram = np.empty(kernels.SELECT_SCRATCH, dtype), np.empty(2048, np.int64)
    for attempt in range(2):  # this test knows where the samples look
        rank = _rank_in_sample(d, k, attempt)
        found = np.uint64(_sample_threshold(terms, factors, 0, d, rank, attempt, scratch, histogram))
        threshold = found.astype(f"u{x.astype(dtype).itemsize}").view(dtype)
        assert threshold == 0 if sampled == 0 else threshold > 900
    assert_selects_like_the_twin((terms, factors, np.empty(d, dtype), 2 * kept), bounds, counts)


@each_dtype
def test_all_finite(dtype):
    @given(vectors(dtype, finite=False))
    def check(x):
        assert kernels.all_finite(x) == reference.all_finite(x)

    check()
    assert kernels.all_finite(np.array([np.finfo(dtype).max, -0.0, np.finfo(dtype).smallest_subnormal], dtype))


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 2**32))
def test_index_code_round_trip(d, share, seed):
    k = round(share * d)
    indices = np.sort(np.random.default_rng(seed).permutation(d)[:k]).astype(np.int64)
    low = kernels.low_bits(d, k)
    sizes = kernels.lower_nbytes(k, low) // 8, kernels.upper_nbytes(d, k, low) // 8
    mine, twin = ([np.full(size, 2**64 - 1, np.uint64) for size in sizes] for _ in range(2))
    kernels.encode_indices(indices, low, *mine)
    reference.encode_indices(indices, low, *twin)
    assert same_bits(mine[0], twin[0])
    assert same_bits(mine[1], twin[1])
    for decode in (kernels.decode_indices, reference.decode_indices):
        decoded = np.full(k, -1, np.int64)
        decode(mine[0], mine[1], low, d, decoded)
        assert same_bits(decoded, indices)


def test_index_code_beyond_32_bits():
    d = 2**40
    indices = np.array([0, 5, 2**31, 2**33 + 1, 2**40 - 1], np.int64)
    low = kernels.low_bits(d, indices.size)
    lower = np.empty(kernels.lower_nbytes(indices.size, low) // 8, np.uint64)
    upper = np.empty(kernels.upper_nbytes(d, indices.size, low) // 8, np.uint64)
    kernels.encode_indices(indices, low, lower, upper)
    decoded = np.empty_like(indices)
    kernels.decode_indices(lower, upper, low, d, decoded)
    assert decoded.tolist() == indices.tolist()


BLOCKS = st.sampled_from([1, 7, 8, 64, 100, 128, 10_000])


@each_dtype
def test_signs(dtype):
    @given(sources(dtype, largest=float(np.finfo(dtype).max)), BLOCKS, st.booleans(), st.integers(0, 2), BLOCKS)
    def check(source, block, less_decoded, rows, row_block):
        assert_signs_like_the_twin(source, block, less_decoded, rows, row_block)

    check()


def assert_signs_like_the_twin(source, block, less_decoded, rows=0, row_block=64):
    terms, factors, keep, kept = source
    d, dtype, rng = terms[0].size, factors.dtype, np.random.default_rng(block)
    messages = (rng.integers(0, 256, (rows, -(-d // 8)), np.uint8), rng.random((rows, -(-d // row_block))).astype(dtype),
                row_block, dtype.type(0.3))
    seen = []
    for room in (kernels, reference):
        bits, scales = np.full(-(-d // 8), 255, np.uint8), np.empty(-(-d // block), dtype)
        left, scratch = keep.copy(), np.empty(kernels.SIGNS_SCRATCH, dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            finite = room.encode_signs(terms, factors, left, kept, less_decoded, *messages, block, bits,
                                       scales, scratch)
        seen.append((bool(finite), bits, scales, left))
    mine, twin = seen
    assert mine[0] == twin[0]
    if mine[0]:
        assert same_bits(mine[1], twin[1])
        assert same_bits(mine[2], twin[2])
        np.testing.assert_array_equal(mine[3], twin[3])


@each_dtype
@pytest.mark.parametrize("block", [64, 100, 4096, 4100, 20_000, 10**6])
def test_signs_of_long_vectors(dtype, block):
    x = np.random.default_rng(1).normal(size=30_001).astype(dtype)
    for large in (1, float(np.finfo(dtype).max) / 2 / np.abs(x).max()):
        terms, keep = terms_of(x * dtype(large), 2), np.empty_like(x)
        factors, kept = np.array([1, 0.25, 0], dtype), np.array([0.5, 0.25, 0], dtype)
        assert_signs_like_the_twin((terms, factors, keep, factors), block, True, 2, 128)
        assert_signs_like_the_twin((terms, factors, keep, kept), block, True, 3, 5000)


@each_dtype
def test_adding_signs(dtype):
    @given(st.integers(1, 5000), st.integers(0, 4), BLOCKS, st.booleans(), st.integers(0, 2**32))
    def check(d, rows, block, overwrite, seed):
        rng = np.random.default_rng(seed)
        bits = rng.integers(0, 256, (rows, -(-d // 8)), np.uint8)
        scales = rng.random((rows, -(-d // block))).astype(dtype)
        out, expected = (np.linspace(-1, 1, d).astype(dtype) for _ in range(2))
        scratch = np.empty(kernels.SIGNS_SCRATCH, dtype)
        kernels.add_signs(bits, scales, block, dtype(1 / 3), overwrite, out, scratch)
        reference.add_signs(bits, scales, block, dtype(1 / 3), overwrite, expected, scratch)
        np.testing.assert_array_equal(out, expected)

    check()


@each_dtype
@pytest.mark.parametrize("format", FORMATS)
def test_quantize(dtype, format):
    @given(sources(dtype, largest=float(np.finfo(dtype).max)), BLOCKS, st.booleans(), st.booleans())
    def check(source, block, less_decoded, overwrite):
        assert_quantizes_like_the_twin(source, format, block, less_decoded, overwrite)

    check()


def assert_quantizes_like_the_twin(source, format, block, less_decoded, overwrite):
    terms, factors, keep, kept = source
    d, dtype = terms[0].size, factors.dtype.type
    seen = []
    for room in (kernels, reference):
        exponents, codes = np.empty(-(-d // block), np.int16), np.empty(d, FORMATS[format])
        left, scratch, out = keep.copy(), np.empty(kernels.QUANTIZE_SCRATCH, dtype), np.linspace(-1, 1, d).astype(dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            finite = room.quantize(terms, factors, left, kept, less_decoded, format, block, exponents, codes, scratch)
            room.add_quantized(exponents, codes, format, block, dtype(1 / 3), overwrite, out, scratch)
        seen.append((bool(finite), exponents, codes, left, out))
    mine, twin = seen
    assert mine[0] == twin[0]
    assert same_bits(mine[1], twin[1])
    assert same_bits(mine[2], twin[2])
    np.testing.assert_array_equal(mine[4], twin[4])
    if mine[0]:
        np.testing.assert_array_equal(mine[3], twin[3])


@each_dtype
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", [256, 3000, 5000, 10**6])
def test_quantizing_long_vectors(dtype, format, block):
    x = np.random.default_rng(1).standard_cauchy(size=20_001).astype(dtype)
    factors, kept = np.array([1, 0.25, 0], dtype), np.array([0.5, 0.25, 0], dtype)
    assert_quantizes_like_the_twin((terms_of(x, 2), factors, np.empty_like(x), kept), format, block, True, True)


@each_dtype
@pytest.mark.parametrize("format", FORMATS)
def test_a_block_with_nan_or_inf_decodes_to_nan(dtype, format):
    for broken in (np.nan, np.inf, -np.inf):
        x = np.array([1, 2, broken, 4], dtype)
        exponents, codes = np.empty(2, np.int16), np.empty(4, FORMATS[format])
        out, scratch = np.zeros(4, dtype), np.empty(kernels.QUANTIZE_SCRATCH, dtype)
        (terms, factors, keep, kept), _, _ = whole(x, 1)
        assert not kernels.quantize(terms, factors, keep, kept, False, format, 2, exponents, codes, scratch)
        kernels.add_quantized(exponents, codes, format, 2, dtype(1), False, out, scratch)
        np.testing.assert_array_equal(out, [1, 2, np.nan, np.nan])


@each_dtype
def test_two_bits(dtype):
    @given(sources(dtype, largest=float(np.finfo(dtype).max)), st.sampled_from([1, 7, 8, 64, 300, 4096]), st.booleans())
    def check(source, block, less_decoded):
        assert_encodes_levels_like_the_twin(source, block, less_decoded)

    check()


def test_equal_entries_are_decoded_as_they_are():
    """Their mean may round to more than each of them."""
    source = terms_of(np.full(7, 3.0), 1), np.array([0.3, 1, 1]), np.empty(0), np.ones(3)
    assert_encodes_levels_like_the_twin(source, 7, less_decoded=False)


def assert_encodes_levels_like_the_twin(source, block, less_decoded):
    terms, factors, keep, kept = source
    d, dtype = terms[0].size, factors.dtype.type
    seen = []
    for room in (kernels, reference):
        levels, (signs, highs) = np.full(2 * -(-d // block), 7, dtype), np.full((2, -(-d // 8)), 0xA5, np.uint8)
        left, scratch, out = keep.copy(), np.full(kernels.LEVELS_SCRATCH, np.nan, dtype), np.linspace(-1, 1, d).astype(dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            finite = bool(room.encode_levels(terms, factors, left, kept, less_decoded, block, levels, signs, highs, scratch))
            if finite:
                room.add_levels(levels, signs, highs, block, dtype(1 / 3), out)
        seen.append((levels, signs, highs, left, out) if finite else None)
    mine, twin = seen
    assert (mine is None) == (twin is None)
    for a, b in zip(mine or (), twin or (), strict=True):
        np.testing.assert_array_equal(a, b)


@each_dtype
@pytest.mark.parametrize("block", [64, 300, 4096])
def test_two_bits_of_long_vectors(dtype, block):
    x = np.random.default_rng(1).standard_cauchy(size=20_001).astype(dtype)
    factors, kept = np.array([1, 0.25, 0], dtype), np.array([0.5, 0.25, 0], dtype)
    assert_encodes_levels_like_the_twin((terms_of(x, 2), factors, np.empty_like(x), kept), block, True)


@each_dtype
def test_combining(dtype):
    @given(sources(dtype))
    def check(source):
        terms, factors, out, _ = source
        scratch, expected = np.empty(kernels.COMBINE_SCRATCH, dtype), out.copy()
        values, gathered = np.empty((2, -(-terms[0].size // 3)), dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            finite = kernels.combine(terms, factors, out, scratch)
            assert bool(finite) == reference.combine(terms, factors, expected, scratch)
            kernels.gather(terms, factors, np.arange(0, terms[0].size, 3), values)
            reference.gather(terms, factors, np.arange(0, terms[0].size, 3), gathered)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(values, gathered)

    check()


@each_dtype
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_subtracting_what_is_mostly_zero(dtype, share):
    """Entries from which nothing is subtracted keep their bits, a -0.0 too; NaN and -0.0 are subtracted as NumPy does it."""
    rng = np.random.default_rng(7)
    for d in (0, 1, 63, 64, 65, 1000, 9001):
        values, out = rng.normal(size=(2, d)).astype(dtype)
        values[rng.random(d) >= share] = 0
        values[::97], values[5::101], out[::7] = -0.0, np.nan, -0.0
        expected = out.copy()
        reference.subtract(values, expected)
        kernels.subtract(values, out)
        assert out.tobytes() == expected.tobytes()


@each_dtype
def test_mean_of_rows(dtype):
    @given(vectors(dtype, finite=False), st.integers(1, 4), st.integers(0, 3))
    def check(x, n, rank):
        rows = np.stack([np.roll(x, r) for r in range(n)])
        own, rank = rows[rank % n].copy(), rank % n
        rows[rank] = 77  # not read
        out, expected = np.empty((2, x.size), dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            finite = kernels.mean_rows(rows, own, rank, dtype(1 / n), out)
            assert bool(finite) == reference.mean_rows(rows, own, rank, dtype(1 / n), expected)
        np.testing.assert_array_equal(out, expected)
        rows[rank], start = own, x.size // 3
        with np.errstate(invalid="ignore", over="ignore"):
            kernels.mean_slice(rows, start, dtype(1 / n), part := np.empty(x.size - start, dtype))
        np.testing.assert_array_equal(part, expected[start:])
        reference.mean_slice(rows, start, dtype(1 / n), part)
        np.testing.assert_array_equal(part, expected[start:])

    check()


@each_dtype
def test_long_aligned_vectors_are_written_past_the_caches(dtype):
    """The same numbers, wherever the array begins."""
    d = (1 << 20) + 77
    x, memory = np.random.default_rng(0).normal(size=d).astype(dtype), np.empty(d + 32, dtype)
    aligned = -memory.ctypes.data % 64 // memory.itemsize
    for start in (aligned, aligned + 1):
        out = memory[start : start + d]
        kernels.combine(terms_of(x, 2), np.array([1, -1, 0], dtype), out, np.empty(kernels.COMBINE_SCRATCH, dtype))
        np.testing.assert_array_equal(out, x - x[::-1])


@each_dtype
@pytest.mark.parametrize("cut", [None, 64 * 1000, 64 * 1000 + 1])
def test_long_errors_are_written_past_the_caches_while_selecting(dtype, cut):
    d = (1 << 20) + 64 * 3 + 5
    x, memory = np.random.default_rng(0).normal(size=d).astype(dtype), np.empty(d + 32, dtype)
    aligned = -memory.ctypes.data % 64 // memory.itemsize
    bounds = np.array([0, d] if cut is None else [0, cut, d])
    counts = np.diff(bounds) // 100
    factors, room = np.array([0.1, 1, -1], dtype), kernels.select_candidates(bounds, counts)
    for kept in (factors, np.array([1, 1, -1], dtype)):
        keep, expected, seen = memory[aligned : aligned + d], np.empty(d, dtype), []
        for module, into in ((kernels, keep), (reference, expected)):
            into.fill(9)
            indices, values = np.empty(room, np.int64), np.empty(room, dtype)
            module.select_largest(terms_of(x, 3), factors, into, kept, bounds, counts, indices, values,
                                  np.empty(kernels.SELECT_SCRATCH, dtype), np.empty(2048, np.int64))
            seen.append((indices[: counts.sum()], values[: counts.sum()]))
        assert same_bits(seen[0][0], seen[1][0])
        assert same_bits(seen[0][1], seen[1][1])
        np.testing.assert_array_equal(keep, expected)


@each_dtype
@pytest.mark.parametrize("block", [192, 4096, 10**7])
def test_long_signs_are_written_past_the_caches(dtype, block):
    """The error that is kept, and sums of messages of several ranks, where the arrays begin with a cache line."""
    d, rows, rng = (1 << 20) + 4096 + 77, 3, np.random.default_rng(block)
    x, memory = rng.normal(size=d).astype(dtype), np.empty(d + 32, dtype)
    aligned = -memory.ctypes.data % 64 // memory.itemsize
    out, expected = memory[aligned : aligned + d], np.empty(d, dtype)
    messages = rng.integers(0, 256, (rows, -(-d // 8)), np.uint8), rng.random((rows, -(-d // block))).astype(dtype)
    factors, sent = np.array([1, 0.5, 0], dtype), []
    for room, kept in ((kernels, out), (reference, expected)):
        bits, scales = np.empty(-(-d // 8), np.uint8), np.empty(-(-d // block), dtype)
        room.encode_signs(terms_of(x, 2), factors, kept, factors, True, *messages, block, dtype(0.3), block, bits, scales,
                          np.empty(kernels.SIGNS_SCRATCH, dtype))
        sent.append((bits, scales))
    assert same_bits(sent[0][0], sent[1][0])
    assert same_bits(sent[0][1], sent[1][1])
    np.testing.assert_array_equal(out, expected)
    for m in range(rows + 1):
        rest = messages[0][:m], messages[1][:m], block, dtype(0.3), True
        for room, result in ((kernels, out), (reference, expected)):
            result.fill(5)
            room.add_signs(*rest, result, np.empty(kernels.SIGNS_SCRATCH, dtype))
        np.testing.assert_array_equal(out, expected)


@given(st.integers(0, 2000), st.floats(0, 1), st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 10**6))
def test_sample_indices(d, share, seed, step, rank):
    mine, twin = (np.empty(round(share * d), np.int64) for _ in range(2))
    kernels.sample_indices(seed, step, rank, d, mine, np.empty((d + 63) // 64, np.uint64))
    reference.sample_indices(seed, step, rank, d, twin, np.empty(0, np.uint64))
    assert same_bits(mine, twin)
    assert (np.diff(mine) > 0).all()
    assert not mine.size or (mine[0] >= 0 and mine[-1] < d)


def test_samples_are_uniform_and_differ_between_keys():
    d, k, draws = 20, 5, 4000
    counts = np.zeros(d)
    indices = np.empty(k, np.int64)
    seen = set()
    for step in range(draws):
        kernels.sample_indices(1, step, 0, d, indices, np.empty(1, np.uint64))
        counts[indices] += 1
        seen.add(tuple(indices))
    # Each count is binomial(draws, k/d): mean 1000, standard deviation 27. Five deviations for the worst of 20.
    assert abs(counts - draws * k / d).max() < 5 * np.sqrt(draws * k / d * (1 - k / d))
    assert len(seen) > 3000


@each_dtype
def test_adding(dtype):
    @given(vectors(dtype, least=1), st.floats(-2, 2))
    def check(x, factor):
        indices = np.arange(0, x.size, 3)
        pairs = (
            (kernels.add_dense, reference.add_dense, (x,)),
            (kernels.add_sparse, reference.add_sparse, (indices, x[indices])),
        )
        for kernel, twin, arguments in pairs:
            out, expected = (np.linspace(-1, 1, x.size).astype(dtype) for _ in range(2))
            kernel(*arguments, dtype(factor), out)
            twin(*arguments, dtype(factor), expected)
            assert same_bits(out, expected)
        kernels.clear_sparse(indices, out)
        reference.clear_sparse(indices, expected)
        assert same_bits(out, expected)

    check()
