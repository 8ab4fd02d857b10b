"""Wires of any content: decoders keep to the vector's own entries, and say the same everywhere.

The law of mpi_ef.testing says what holds of a codec; here are more of them, more wires, twins, devices and chunks.
"""

import subprocess
import sys
import tracemalloc
from functools import partial
from importlib import import_module
from itertools import islice, pairwise
from os import environ
from unittest import mock

import numpy as np
import pytest
from my_compressor import BlockMax
from vectors_for_tests import DTYPES, gaussian

from mpi_ef import kernels
from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK, TwoBits, Vote, source
from mpi_ef.compress.chunks import Chunks
from mpi_ef.errors import ShapeError
from mpi_ef.kernels import reference
from mpi_ef.testing.garbage import Decoders, garbage, same_numbers

VALUES = (Identity(), Quantize("bf16", block=16), Quantize("fp16", block=7), Quantize("int8"), Sign(), Sign(block=8),
          TwoBits(), LowRank(1))
SPARSE = (*(TopK(0.1, values=values) for values in VALUES), TopK(0.1, segments=50), TopK(1.0), RandK(0.1),
          RandK(0.3, values=Quantize("int8"), seed=3))
DENSE = (Identity(), Quantize(), Quantize("fp16", block=10_000), Quantize("int8", block=64), Sign(), Sign(block=8), Vote(),
         TwoBits(), LowRank(1), LowRank(3, shapes="parameters"), BlockMax(8))
ALL = [compressor.bound_to(((20, 30), (1,), (7, 7, 7), (56,))) for compressor in (*SPARSE, *DENSE)]  # 1000 entries
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each = pytest.mark.parametrize("compressor", ALL, ids=str)
each_sparse = pytest.mark.parametrize("compressor", SPARSE, ids=str)
exhaustive = pytest.mark.exhaustive
few_or_all = pytest.mark.parametrize("count", [10, pytest.param(100_000, marks=exhaustive)])
few_or_many = pytest.mark.parametrize("count", [10, pytest.param(4000, marks=exhaustive)])  # by slower ways


def cases(compressor, count):
    """Yield lengths, dtypes, and how many wires to try: `count` in all."""
    sizes = (1000,) if getattr(compressor, "shapes", None) else (1000, 1, 7, 65)
    pairs = [(d, dtype) for d in sizes for dtype in DTYPES][: count // 10]
    return [(d, dtype, count // len(pairs)) for d, dtype in pairs]


def wires_of(codec, count, seed=0):
    """Return so many wires that nobody has written."""
    return islice(garbage(Decoders(lambda: codec).messages, seed), count)


@each
@few_or_all
@pytest.mark.timeout(600)
def test_any_bytes_are_decoded(compressor, count):
    for d, dtype, number in cases(compressor, count):
        decoders = Decoders(partial(compressor.codec, d, dtype))
        for n, wire in enumerate(islice(garbage(decoders.messages, d), number)):
            try:
                assert decoders.check(wire) is not None
            except AssertionError as error:
                raise AssertionError(f"d={d}, {dtype}, wire {n}: {error}") from error


def specified(codec, wire):
    """Return what the twins of the kernels decode."""
    module = import_module("mpi_ef.kernels.backend")
    with mock.patch.object(module, "kernels", reference), np.errstate(all="ignore"):
        for part in (codec, getattr(codec, "_values", codec)):
            part._kernels = module.Backend(codec.dtype)
        return codec.decode(wire)


@each
@few_or_many
@pytest.mark.timeout(600)
def test_twins_decode_the_same(compressor, count):
    for d, dtype, number in cases(compressor, count):
        codec, twin = compressor.codec(d, dtype), compressor.codec(d, dtype)
        for n, wire in enumerate(wires_of(compressor.codec(d, dtype), number)):
            with np.errstate(all="ignore"):
                ours = codec.decode(wire)
            assert same_numbers(ours, specified(twin, wire)), f"d={d}, {dtype}, wire {n}"


@each
@few_or_many
@pytest.mark.timeout(600)
def test_devices_decode_the_same(compressor, count):
    for d, dtype, number in cases(compressor, count):
        codec, other = compressor.codec(d, dtype), compressor.codec_on("side:cpu", d, dtype)
        its, before = other._kernels, None
        for n, wire in enumerate(wires_of(compressor.codec(d, dtype), number)):
            with np.errstate(all="ignore"):
                ours = codec.decode(wire)
                theirs = other.decode(its.place(wire))
                assert same_numbers(ours, its.fetch(theirs)), f"d={d}, {dtype}, wire {n}"
                other.clear(its.place(wire[None]), theirs)
                assert not its.fetch(theirs).any(), f"clear: d={d}, {dtype}, wire {n}"
                if before is not None:
                    rows = np.stack([before, wire])
                    one, two = gaussian(1, d, dtype), its.place(gaussian(1, d, dtype))
                    codec.add(rows, one, 0.3)
                    other.add(its.place(rows), two, 0.3)
                    assert same_numbers(one, its.fetch(two)), f"two wires: d={d}, {dtype}, wire {n}"
            before = wire


@each_sparse
@few_or_many
@each_dtype
def test_chunks_decode_what_their_codecs_do(compressor, count, dtype):
    """Wires of chunks say nothing about other chunks; several ranks' wires for one chunk are added in order."""
    bounds, fill = [0, 250, 512, 512, 700, 1001], 3.0
    together = Chunks(compressor, bounds, dtype)
    codecs = [compressor.part(a, b, 1001).codec(b - a, dtype) for a, b in pairwise(bounds)]
    wires = np.full((len(codecs), together.nbytes + 40), 0xA5, np.uint8)
    rows, memory = together.rows(wires), np.full(1001 + 2000, fill, dtype)
    sources = [wires_of(codec, count, seed) for seed, codec in enumerate(codecs)]
    for _ in range(count):
        out, clean = memory[1000:-1000], wires.copy()
        for row, codec, of in zip(clean, codecs, sources, strict=True):
            row[: codec.nbytes] = next(of)
        wires[:] = clean
        with np.errstate(all="ignore"):
            wanted = np.concatenate([codec.decode(row[: codec.nbytes]) for row, codec in zip(wires, codecs, strict=True)])
            together.add(rows, out, 1.0, overwrite=True)
            assert same_numbers(out, wanted)
            together.clear(rows, out)
        assert not out.any()
        assert (memory[:1000] == fill).all()
        assert (memory[-1000:] == fill).all()
        assert (wires == clean).all()


@each_dtype
@each_sparse
@pytest.mark.parametrize("device", ["cpu", "side:cpu"])
def test_entries_are_what_is_added(compressor, dtype, device):
    codec, other = compressor.codec_on(device, 1000, dtype), compressor.codec(1000, dtype)
    its = codec._kernels
    for wire in wires_of(compressor.codec(1000, dtype), 6):
        indices, values = its.place(np.full(codec.k, -1)), its.place(np.full(codec.k, 7, dtype))
        codec.entries(its.place(wire), indices, values)
        indices, values = its.fetch(indices), its.fetch(values)
        assert 0 <= indices[0] <= indices[-1] < 1000
        assert (np.diff(indices) > 0).all()
        sparse = np.zeros(1000, dtype)
        with np.errstate(all="ignore"):
            sparse[indices] += values
            assert same_numbers(sparse, other.decode(wire))


def test_entries_go_where_they_fit():
    codec = TopK(k=10).codec(100)
    wire, indices, values = np.zeros(codec.nbytes, np.uint8), np.zeros(10, np.int64), np.zeros(10, np.float32)
    for wrong in ((wire[:-8], indices, values), (wire, indices[1:], values), (wire, indices.astype(np.int32), values),
                  (wire, indices, values.astype(np.float64)), (wire, np.zeros(20, np.int64)[::2], values),
                  (wire, indices, np.zeros(20, np.float32)[::2])):
        with pytest.raises(ShapeError, match="pass"):
            codec.entries(*wrong)


@pytest.mark.parametrize("compressor", [compressor for compressor in ALL if not isinstance(compressor, BlockMax)], ids=str)
def test_what_a_wire_says_takes_no_memory(compressor):
    codec = compressor.codec(1000, np.float64)
    wires = [*wires_of(compressor.codec(1000, np.float64), 20)]
    indices, values, out = np.zeros(codec.k or 0, np.int64), np.zeros(codec.k or 0), np.zeros(1000)
    most = []
    for _ in range(2):  # kernels are loaded at the first
        tracemalloc.start()
        for wire in wires:
            codec.add(wire[None], out)
            codec.clear(wire[None], out)
            if codec.k is not None:
                codec.entries(wire, indices, values)
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] < 8000, most  # less than a vector


@pytest.mark.parametrize(("marks", "parts", "indices"), [
    ([0, 1, 2], [3, 5, 9], [3, 5, 9]),
    ([0, 1, 2], [9, 5, 9], [9, 10, 11]),  # out of order, twice
    ([0, 1, 2], [5, 5, 5], [5, 6, 7]),
    ([0, 7, 63], [3, 5, 9], [3, 98, 99]),  # beyond d
    ([61, 62, 63], [0, 0, 0], [97, 98, 99]),
    ([0], [3, 5, 9], [3, 4, 5]),  # too few
    ([], [3, 5, 9], [0, 1, 2]),
    ([0, 1, 2, 3, 4], [3, 5, 9], [3, 5, 9]),  # too many
])
def test_codes_of_indices_that_there_are_not(marks, parts, indices):
    """They ascend and are below d, on the host, in the specification and on devices."""
    upper = np.array([sum(1 << mark for mark in marks)], np.uint64)
    lower = np.array([sum(part << 4 * j for j, part in enumerate(parts))], np.uint64)
    device = TopK(k=3).codec_on("side:cpu", 100, np.float32)._kernels
    for decode, place in ((kernels.decode_indices, np.array), (reference.decode_indices, np.array),
                          (device.decode_indices, device.place)):
        decoded = place(np.full(3, 77))
        decode(place(lower), place(upper), 4, 100, decoded)
        assert decoded.tolist() == indices


@each_dtype
@pytest.mark.parametrize(("format", "exponent", "code", "value"), [
    ("bf16", "most + 1", 0x3F80, np.nan), ("bf16", "most", 0x3F80, "limit"), ("bf16", 32766, 0, np.nan),
    ("bf16", -32768, 0x7F7F, 0.0), ("bf16", 0, 0x7F80, np.nan), ("bf16", 0, 0x7FC0, np.nan), ("bf16", 1, 0x4000, 4.0),
    ("bf16", "most", 0x7F7F, "limit"), ("fp16", "most + 1", 0x3C00, np.nan), ("fp16", "most", 0x7C00, "limit"),
    ("fp16", 0, 0x7C00, 65536.0), ("fp16", 0, 0x7E01, 98368.0), ("int8", "most + 1", 1, np.nan),
    ("int8", "most", 127, "limit"), ("int8", -1200, 127, 0.0), ("int8", 0, -128, -128.0),
])
def test_numbers_that_no_encoder_writes(format, exponent, code, value, dtype):
    if isinstance(exponent, str):  # of the largest number
        exponent = np.finfo(dtype).maxexp - {"bf16": 0, "fp16": 15, "int8": 6}[format] + (exponent == "most + 1")
    codec = Quantize(format).codec(3, dtype)
    wire = np.zeros(codec.nbytes, np.uint8)
    exponents, codes = codec._parts(wire)
    exponents[0], codes[:] = exponent, np.int64(code).astype(codes.dtype)
    wanted = np.full(3, np.finfo(dtype).max if value == "limit" else value, dtype)
    with np.errstate(all="ignore"):
        for decode in (codec.decode, partial(specified, Quantize(format).codec(3, dtype))):
            assert same_numbers(decode(wire), wanted)
        device = Quantize(format).codec_on("side:cpu", 3, dtype)
        assert same_numbers(device.decode(device._kernels.place(wire)).numpy(), wanted)


@each_dtype
def test_a_sum_of_wires_that_are_not_finite_is_told(dtype):
    """An encoder that adds them says that it is not finite, for any scale of any row."""
    codec = Sign(block=64).codec(1000, dtype)
    wires = np.zeros((3, codec.nbytes), np.uint8)
    for rank, wire in enumerate(wires):
        codec.encode(gaussian(rank, 1000, dtype), wire)
    x, sent = source(gaussian(9, 1000, dtype)), np.zeros(codec.nbytes, np.uint8)
    assert codec.encode_sum(codec, wires, 0.5, x, sent)
    for row in range(3):
        for block in (0, 7, 15):
            for number in (np.nan, np.inf, -np.inf):
                wrong = wires.copy()
                wrong[row, : codec._scales_nbytes].view(dtype)[block] = number
                assert not codec.encode_sum(codec, wrong, 0.5, x, sent)


CHECKED = """
import numpy as np
from functools import partial
from itertools import islice
from test_garbage_wires import ALL
from mpi_ef import kernels
from mpi_ef.testing.garbage import Decoders, garbage

try:  # bounds are looked at
    kernels.clear_sparse(np.array([5]), np.zeros(3))
    raise SystemExit("no bounds were looked at")
except IndexError:
    pass
for compressor in ALL:
    decoders = Decoders(partial(compressor.codec, 1000, np.float32))
    for wire in islice(garbage(decoders.messages, 0), 200):
        decoders.check(wire)
"""


@exhaustive
@pytest.mark.timeout(900)
def test_no_kernel_looks_beyond_its_arrays(tmp_path):
    """Numba looks at bounds if it is told to; of what was compiled so nothing is kept."""
    told = environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CHECKED], env=told, capture_output=True, text=True, timeout=800,
                          check=False)
    assert done.returncode == 0, done.stderr[-3000:]
