"""Laws of all compressors: fixed wire size, contraction, determinism, golden bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from my_compressor import BlockMax
from vectors_for_tests import DTYPES, gaussian, vectors

from mpi_ef.compress import Codec, Identity, Quantize, RandK, Sign, TopK, TwoBits, source
from mpi_ef.compress.combination import lazy
from mpi_ef.errors import DtypeError, OptionError, ShapeError

COMPRESSORS = [
    Identity(),
    Quantize("bf16"),
    Quantize("fp16", block=8),
    Quantize("int8", block=64),
    Sign(),
    Sign(block=8),
    TopK(0.1),
    TopK(0.3, values=Quantize("bf16")),
    TopK(0.5, values=Quantize("int8", block=8)),
    TopK(0.2, values=Sign()),
    TopK(1.0),
    RandK(0.1, seed=7),
    RandK(0.5, values=Quantize("fp16")),
    TwoBits(),
    TwoBits(block=8),
    TopK(0.3, values=TwoBits(block=16)),
    TopK(0.1, segments=16),
]
GOLDEN = Path(__file__).parent / "data" / "wires.json"

each_compressor = pytest.mark.parametrize("compressor", [*COMPRESSORS, BlockMax(8)], ids=str)  # the last from outside
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def roundtrip(compressor, x, step=0, rank=0):
    codec = compressor.codec(x.size, x.dtype)
    wire = np.full(codec.nbytes, 0xA5, np.uint8)
    codec.encode(x, wire, step=step, rank=rank)
    return wire, codec.decode(wire)


@each_dtype
@each_compressor
def test_contraction(compressor, dtype):
    """Law 6, in exact arithmetic; RandK only promises that it never increases the error."""
    unit = float(np.finfo(dtype).smallest_subnormal)

    @given(vectors(dtype, largest=float(np.finfo(dtype).max)))
    def check(x):
        _, decoded = roundtrip(compressor, x)
        assert np.isfinite(decoded).all()
        scale = np.longdouble(np.abs(x).max(initial=0) or 1)
        wide, error = x.astype(np.longdouble) / scale, (decoded.astype(np.longdouble) - x) / scale
        alpha = 0.0 if isinstance(compressor, RandK) else compressor.alpha(x.size)
        # A mean below the smallest subnormal is none: the classes Sign and TwoBits document up to one unit per entry.
        means = "Sign" in str(compressor) or "TwoBits" in str(compressor)
        rounding = x.size * (np.longdouble(unit) / scale) ** 2 if means else 0.0
        # alpha is a rounded double; the scale of Sign is rounded to the dtype, which matters to second order only.
        rounding += (2.0**-50 + float(np.finfo(dtype).eps) ** 2) * (wide**2).sum()
        allowed = (1 - np.longdouble(alpha)) * (wide**2).sum() + rounding
        assert (error**2).sum() <= allowed

    check()


@each_dtype
@each_compressor
@pytest.mark.parametrize("d", [1, 3, 15, 64])
def test_the_largest_numbers_stay_finite(compressor, dtype, d):
    x = np.full(d, np.finfo(dtype).max)
    x[::2] *= -1
    _, decoded = roundtrip(compressor, x)
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded) <= np.abs(x)).all()


@each_dtype
@each_compressor
def test_wire_size_is_known_ahead_and_every_byte_is_written(compressor, dtype):
    @given(vectors(dtype))
    def check(x):
        wire, _ = roundtrip(compressor, x)
        assert wire.size == compressor.wire_nbytes(x.size, dtype)
        assert wire.size % 8 == 0
        codec = compressor.codec(x.size, dtype)
        other = np.full(codec.nbytes, 0x5A, np.uint8)
        codec.encode(x, other)
        assert other.tobytes() == wire.tobytes()

    check()


@each_dtype
@each_compressor
def test_add_adds_rows_in_order(compressor, dtype):
    d = 100
    codec = compressor.codec(d, dtype)
    wires = np.empty((3, codec.nbytes), np.uint8)
    for rank in range(3):
        codec.encode(gaussian(rank, d, dtype), wires[rank], rank=rank)
    together, one_by_one = gaussian(9, d, dtype), gaussian(9, d, dtype)
    codec.add(wires, together, 0.3)
    for row in wires:
        codec.add(row[None], one_by_one, 0.3)
    assert together.tobytes() == one_by_one.tobytes()
    expected = gaussian(9, d, dtype) + sum(dtype(0.3) * codec.decode(row) for row in wires)
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-6)


@each_dtype
def test_identity_and_full_topk_lose_nothing(dtype):
    @given(vectors(dtype))
    def check(x):
        for compressor in (Identity(), TopK(1.0)):
            np.testing.assert_array_equal(roundtrip(compressor, x)[1], x)

    check()


@given(vectors(np.float32, least=1))
def test_topk_is_positively_homogeneous(x):
    """Powers of two scale without rounding, as long as nothing leaves the range."""
    x = np.where(np.abs(x) < 1e-30, np.float32(0), x)
    np.testing.assert_array_equal(roundtrip(TopK(0.3), x * 4)[1], 4 * roundtrip(TopK(0.3), x)[1])


def test_randk_depends_on_its_key_only():
    x = gaussian(0, 1000)
    first = roundtrip(RandK(0.01, seed=1), x, step=3, rank=2)[1]
    np.random.seed(5)  # noqa: NPY002
    np.testing.assert_array_equal(first, roundtrip(RandK(0.01, seed=1), x, step=3, rank=2)[1])
    for other in ({"step": 4, "rank": 2}, {"step": 3, "rank": 1}):
        assert (first != roundtrip(RandK(0.01, seed=1), x, **other)[1]).any()
    assert (first != roundtrip(RandK(0.01, seed=2), x, step=3, rank=2)[1]).any()


def test_randk_contracts_in_expectation():
    x = gaussian(0, 50, np.float64)
    errors = [((roundtrip(RandK(0.2), x, step=t)[1] - x) ** 2).sum() for t in range(2000)]
    relative = np.array(errors) / (x**2).sum()
    assert abs(relative.mean() - 0.8) < 5 * relative.std() / np.sqrt(len(errors))


def test_bits_per_entry():
    """1 % of a long vector with 16-bit values: at most 25 bits for an index and its value."""
    d = 10**6
    assert TopK(0.01, values=Quantize("bf16")).wire_nbytes(d) * 8 / (0.01 * d) <= 25
    assert Sign().wire_nbytes(d) * 8 <= 1.001 * d
    assert Quantize("int8").wire_nbytes(d) * 8 <= 8.1 * d


@pytest.mark.parametrize(("ratio", "d", "k"), [(0.29, 100, 29), (0.01, 99, 1), (0.5, 3, 1), (1.0, 7, 7), (0.1, 0, 0)])
def test_count(ratio, d, k):
    assert TopK(ratio).count(d) == k


def test_segments_keep_their_share_each():
    """Per-tensor selection, as in the papers: every part sends its own largest entries."""
    sizes = (3, 0, 1000, 250_000, 1)
    parts = [gaussian(number, size) * 10.0**number for number, size in enumerate(sizes)]
    x = np.concatenate(parts).astype(np.float32)
    compressor = TopK(0.01, segments=sizes)
    assert compressor.count(x.size) == 1 + 0 + 10 + 2500 + 1
    decoded = roundtrip(compressor, x)[1]
    start = 0
    for part in parts:
        if part.size:
            own = x[start : start + part.size]
            np.testing.assert_array_equal(decoded[start : start + part.size], roundtrip(TopK(0.01), own)[1])
        start += part.size
    assert compressor.alpha(x.size) == 0.01
    assert TopK(0.01, segments=[1, 2]) == TopK(0.01, segments=(1, 2))


def test_segments_of_one_length():
    """All but the last are so long; SparseLoCo's chunks."""
    x = gaussian(0, 10_000)
    same = [roundtrip(TopK(0.03, segments=segments), x)[0] for segments in (4096, (4096, 4096, 1808))]
    np.testing.assert_array_equal(*same)
    assert TopK(0.03, segments=4096).count(10_000) == 122 + 122 + 54


def test_two_bits_send_most_of_values_that_were_kept():
    """Of a long-tailed vector's largest entries 0.9 of the squared norm in 2 bits, where signs send 0.8 in one."""
    kept = np.sort(np.abs(gaussian(0, 100_000)))[-3000:] * np.sign(gaussian(1, 3000))
    lost = {c: ((roundtrip(c, kept)[1] - kept) ** 2).sum() / (kept**2).sum() for c in (TwoBits(), Sign(block=512))}
    assert lost[TwoBits()] < 0.5 * lost[Sign(block=512)]
    assert TwoBits().wire_nbytes(kept.size) * 8 <= 2.2 * kept.size


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: TopK(1.5), OptionError, "ratio=1.5 is not in (0, 1]"),
        (lambda: TopK(0.0), OptionError, "ratio=0.0 is not in (0, 1]"),
        (lambda: TopK(float("nan")), OptionError, "ratio=nan is not in (0, 1]"),
        (lambda: TopK(), OptionError, "either ratio"),
        (lambda: TopK(0.1, k=3), OptionError, "either ratio"),
        (lambda: TopK(k=0), OptionError, "k=0 is not a positive integer"),
        (lambda: TopK(k=5, segments=(3, 4)), OptionError, "segments go with a ratio"),
        (lambda: TopK(0.1, segments="tensors"), OptionError, "segments='tensors'"),
        (lambda: TopK(0.1, segments=(3, -1)), OptionError, "segments=(3, -1)"),
        (lambda: TopK(0.1, segments=(3, 4)).codec(8), ShapeError, "7 entries together, the vector has 8"),
        (lambda: TopK(0.1, segments="parameters").codec(8), OptionError, "optimizers only"),
        (lambda: TopK(k=5).codec(4), OptionError, "k=5 exceeds d=4"),
        (lambda: TopK(0.1, values=TopK(0.1)), OptionError, "sparse itself"),
        (lambda: TopK(k=2.5), OptionError, "k=2.5 is not a positive integer"),
        (lambda: RandK(0.1, seed=-1), OptionError, "seed=-1"),
        (lambda: Quantize("fp8"), OptionError, "'fp8' is unknown"),
        (lambda: Quantize(block=0), OptionError, "block=0"),
        (lambda: Sign(block=0), OptionError, "block=0"),
        (lambda: TwoBits(block=0), OptionError, "TwoBits: block=0 is not a positive integer up to 4096; 512 is usual"),
        (lambda: TwoBits(block=4097), OptionError, "block=4097 is not a positive integer up to 4096"),
        (lambda: TopK(0.1, segments=0), OptionError, "segments=0 is not a positive integer"),
        (lambda: Identity().codec(3, np.int32), DtypeError, "int32 is not supported"),
        (lambda: Sign(block=1.5), OptionError, "block=1.5"),
        (lambda: Identity().codec(3, "float23"), DtypeError, "'float23' is not known"),
        (lambda: Identity().codec(-1), ShapeError, "d=-1"),
        (lambda: Identity().codec(3.5), ShapeError, "d=3.5"),
    ],
)
def test_wrong_options_are_refused_with_their_value(build, error, words):
    with pytest.raises(error) as caught:
        build()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def golden_cases():
    """Vectors written out by arithmetic that is the same everywhere, not by a random generator."""
    for dtype in DTYPES:
        i = np.arange(75)
        x = ((i * 37 % 101 - 50) / 8 * np.where(i % 9 == 0, 0, 1)).astype(dtype)
        for compressor in COMPRESSORS:
            yield f"{compressor} {np.dtype(dtype)}", roundtrip(compressor, x, step=5, rank=3)[0]


def test_wires_are_the_golden_ones():
    """Law 9. A change of the format is a visible act: rewrite the file with ``python tests/test_compress.py``."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert {name: wire.tobytes().hex() for name, wire in golden_cases()} == golden


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: wire.tobytes().hex() for name, wire in golden_cases()}, indent=1) + "\n")


@each_dtype
@each_compressor
def test_clearing_leaves_nothing_of_what_was_added(compressor, dtype):
    codec, out = compressor.codec(101, dtype), np.ones(101, dtype)
    wires = np.stack([roundtrip(compressor, gaussian(rank, 101, dtype), rank=rank)[0] for rank in range(2)])
    codec.clear(wires, out)
    added = np.any([codec.decode(wire) != 0 for wire in wires], axis=0)
    assert added.any()
    assert not out[added].any()
    if compressor.sparse and type(codec).clear is not Codec.clear:
        assert out[~added].any() or added.all()  # and no more than that


@each_compressor
def test_sums_are_encoded_by_those_that_say_so(compressor):
    codec, wires, wire = compressor.codec(64, np.float32), *(np.zeros((n, 0), np.uint8) for n in (2, 1))
    if not codec.can_encode_sum(codec):
        with pytest.raises(NotImplementedError):
            codec.encode_sum(codec, wires, 0.5, source(gaussian(0, 64)), wire[0])


@each_compressor
def test_vectors_with_gaps_are_refused(compressor):
    codec = compressor.codec(50, np.float32)
    with pytest.raises(ShapeError, match="a vector is not contiguous; pass numpy.ascontiguousarray of it"):
        codec.encode(gaussian(0, 100)[::2], np.zeros(codec.nbytes, np.uint8))


@each_compressor
@each_dtype
def test_wires_of_another_size_are_refused(compressor, dtype):
    """Kernels write where the codec says: beyond the end of memory that is too short."""
    codec, x = compressor.codec(4000, dtype), gaussian(0, 4000, dtype)
    before = np.full(codec.nbytes + 8, 7, np.uint8)
    for wire in (before[:8], before[: codec.nbytes - 8], before):
        with pytest.raises(ShapeError, match=f"it must be nbytes = {codec.nbytes}"):
            codec.encode(x, wire)
        with pytest.raises(ShapeError, match=f"must be nbytes = {codec.nbytes}"):
            codec.add(wire[None], x.copy())
        if type(codec).clear is not Codec.clear:  # which looks at no wire
            with pytest.raises(ShapeError, match=f"must be nbytes = {codec.nbytes}"):
                codec.clear(wire[None], x.copy())
        with pytest.raises(ShapeError, match=f"must be nbytes = {codec.nbytes}"):
            codec.decode(wire)
    assert (before == 7).all()


@each_compressor
@each_dtype
def test_vectors_of_another_length_are_refused(compressor, dtype):
    """Kernels read as many entries as the codec says: what lies behind a vector that is too short would be sent."""
    codec = compressor.codec(4000, dtype)
    wire = np.zeros(codec.nbytes, np.uint8)
    for length in (3999, 4001):
        x = np.zeros(length, dtype)
        for each in (x, source(lazy(x) - x.copy())):
            with pytest.raises(ShapeError, match=rf"x has shape \({length},\); it must be d = 4000 long"):
                codec.encode(each, wire)
        with pytest.raises(ShapeError, match=rf"out has shape \({length},\); it must be d = 4000 long"):
            codec.add(wire[None], x)
