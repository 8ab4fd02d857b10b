"""Law 8: every kernel gives the bits of its plain twin. And: what the twins promise."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectors_for_tests import DTYPES, vectors

from mpi_ef import kernels
from mpi_ef.kernels import reference

FORMATS = {"bf16": np.int16, "fp16": np.int16, "int8": np.int8}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_every_kernel_has_a_twin_with_the_same_parameters():
    assert set(reference.__all__) == set(kernels.__all__) - {"low_bits", "lower_nbytes", "upper_nbytes"}
    for name in reference.__all__:
        kernel = getattr(kernels, name)
        kernel = getattr(kernel, "py_func", kernel)
        assert list(inspect.signature(kernel).parameters) == list(
            inspect.signature(getattr(reference, name)).parameters
        ), name


@each_dtype
def test_select_largest(dtype):
    @given(vectors(dtype, finite=False), st.floats(0, 1))
    def check(x, share):
        mine, twin = (np.full(round(share * x.size), -1, np.int64) for _ in range(2))
        kernels.select_largest(x, mine)
        reference.select_largest(x, twin)
        assert same_bits(mine, twin)

    check()


@each_dtype
def test_select_takes_the_lowest_index_among_ties_and_nan_first(dtype):
    indices = np.empty(3, np.int64)
    kernels.select_largest(np.array([1, -2, 2, 2, -2], dtype), indices)
    assert indices.tolist() == [1, 2, 3]
    kernels.select_largest(np.array([0.0, -0.0, 0, 0, -0.0], dtype), indices)
    assert indices.tolist() == [0, 1, 2]
    kernels.select_largest(np.array([1, np.inf, 5, np.nan, -np.inf], dtype), indices)
    assert indices.tolist() == [1, 3, 4]
    tiny = np.finfo(dtype).smallest_subnormal
    kernels.select_largest(np.array([0, tiny, -3 * tiny, 2 * tiny, tiny], dtype), indices)
    assert indices.tolist() == [1, 2, 3]


@each_dtype
@pytest.mark.parametrize("kind", ["constant", "one-hot", "ascending", "normal"])
def test_select_largest_on_long_vectors(dtype, kind):
    d = 100_003
    x = {"constant": np.ones(d), "one-hot": np.eye(1, d, 77).ravel(), "ascending": np.arange(d, dtype=float),
         "normal": np.random.default_rng(1).normal(size=d)}[kind].astype(dtype)  # fmt: skip
    mine, twin = (np.empty(1000, np.int64) for _ in range(2))
    kernels.select_largest(x, mine)
    reference.select_largest(x, twin)
    assert same_bits(mine, twin)


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
        decode(mine[0], mine[1], low, decoded)
        assert same_bits(decoded, indices)


def test_index_code_beyond_32_bits():
    d = 2**40
    indices = np.array([0, 5, 2**31, 2**33 + 1, 2**40 - 1], np.int64)
    low = kernels.low_bits(d, indices.size)
    lower = np.empty(kernels.lower_nbytes(indices.size, low) // 8, np.uint64)
    upper = np.empty(kernels.upper_nbytes(d, indices.size, low) // 8, np.uint64)
    kernels.encode_indices(indices, low, lower, upper)
    decoded = np.empty_like(indices)
    kernels.decode_indices(lower, upper, low, decoded)
    assert decoded.tolist() == indices.tolist()


@each_dtype
def test_signs(dtype):
    @given(vectors(dtype, finite=False, largest=float(np.finfo(dtype).max)), st.sampled_from([1, 7, 8, 64, 10_000]))
    def check(x, block):
        rows = np.stack([x, -x, x[::-1]])
        sizes = (3, -(-x.size // 8)), (3, -(-x.size // block))
        mine, twin = ((np.full(sizes[0], 255, np.uint8), np.empty(sizes[1], dtype)) for _ in range(2))
        with np.errstate(invalid="ignore", over="ignore"):
            for r in range(3):
                kernels.encode_signs(rows[r], block, mine[0][r], mine[1][r])
                reference.encode_signs(rows[r], block, twin[0][r], twin[1][r])
            assert same_bits(mine[0], twin[0])
            np.testing.assert_array_equal(mine[1], twin[1])
            out, expected = (np.linspace(-1, 1, x.size).astype(dtype) for _ in range(2))
            kernels.add_signs(*mine, block, dtype(1 / 3), out)
            reference.add_signs(*twin, block, dtype(1 / 3), expected)
        np.testing.assert_array_equal(out, expected)

    check()


@each_dtype
@pytest.mark.parametrize("format", FORMATS)
def test_quantize(dtype, format):
    @given(vectors(dtype, finite=False, largest=float(np.finfo(dtype).max)), st.sampled_from([1, 8, 64, 10_000]))
    def check(x, block):
        mine, twin = ((np.empty(-(-x.size // block), np.int16), np.empty(x.size, FORMATS[format])) for _ in range(2))
        kernels.quantize(x, format, block, *mine)
        reference.quantize(x, format, block, *twin)
        assert same_bits(mine[0], twin[0])
        assert same_bits(mine[1], twin[1])
        out, expected = (np.linspace(-1, 1, x.size).astype(dtype) for _ in range(2))
        kernels.add_quantized(*mine, format, block, dtype(1 / 3), out)
        reference.add_quantized(*twin, format, block, dtype(1 / 3), expected)
        np.testing.assert_array_equal(out, expected)

    check()


@each_dtype
@pytest.mark.parametrize("format", FORMATS)
def test_a_block_with_nan_or_inf_decodes_to_nan(dtype, format):
    for broken in (np.nan, np.inf, -np.inf):
        x = np.array([1, 2, broken, 4], dtype)
        exponents, codes = np.empty(2, np.int16), np.empty(4, FORMATS[format])
        kernels.quantize(x, format, 2, exponents, codes)
        out = np.zeros(4, dtype)
        kernels.add_quantized(exponents, codes, format, 2, dtype(1), out)
        np.testing.assert_array_equal(out, [1, 2, np.nan, np.nan])


@given(st.integers(0, 2000), st.floats(0, 1), st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 10**6))
def test_sample_indices(d, share, seed, step, rank):
    mine, twin = (np.empty(round(share * d), np.int64) for _ in range(2))
    kernels.sample_indices(seed, step, rank, d, mine)
    reference.sample_indices(seed, step, rank, d, twin)
    assert same_bits(mine, twin)
    assert (np.diff(mine) > 0).all()
    assert not mine.size or (mine[0] >= 0 and mine[-1] < d)


def test_samples_are_uniform_and_differ_between_keys():
    d, k, draws = 20, 5, 4000
    counts = np.zeros(d)
    indices = np.empty(k, np.int64)
    seen = set()
    for step in range(draws):
        kernels.sample_indices(1, step, 0, d, indices)
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

    check()
