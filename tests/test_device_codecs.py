"""Codecs on the device side write the bytes of those on the host, and read them to the same bits."""

from dataclasses import dataclass

import numpy as np
import pytest
from device_side import DEVICE, KINDS, bits, each_dtype, sized, there, vector

from mpi_ef.compress import (
    Identity,
    Keep,
    LowRank,
    PlainCodec,
    Quantize,
    RandK,
    Sign,
    TopK,
    TwoBits,
    Vote,
    lazy,
    source,
)
from mpi_ef.compress.compressor import Compressor, StagedCodec

COMPRESSORS = [
    TopK(0.1), TopK(0.02, values=Quantize("bf16")), TopK(0.3, values=Sign(block=32)), TopK(1.0), RandK(0.1),
    RandK(0.05, values=Quantize("int8", block=16), seed=9), Sign(), Sign(block=64), Sign(block=100), Quantize(),
    Quantize("fp16", block=7), Quantize("int8"), Identity(), Vote(),
    TwoBits(block=100), TopK(0.3, values=TwoBits(block=64), segments=100),
]


def codecs(compressor, d, dtype):
    return compressor.codec(d, dtype), compressor.codec_on(DEVICE, d, dtype)


def sides(d, dtype, kind, seed):
    """Two vectors and what is kept, on the host and on the device side."""
    ours = [vector(d, dtype, seed, kind), vector(d, dtype, seed + 1), np.ones(d, dtype)]
    return ours, [there(x) for x in ours]


FORMS = [  # what a rule may send, and keep of it
    lambda a, b, _: (lazy(a), None),
    lambda a, b, kept: ((x := lazy(a) - b), Keep(x, kept, less_message=True)),
    lambda a, b, kept: (0.3 * lazy(a) - b, Keep(0.5 * lazy(b), kept)),
]


@each_dtype
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_the_same_bytes_and_bits(compressor, dtype):
    for d in sized((1, 77, 1000, 4500), (4500,)):
        ours, its = codecs(compressor, d, dtype)
        assert ours.nbytes == its.nbytes
        for n, kind in enumerate(sized(KINDS, ("ties", "broken"))):
            (*mine, kept), (*theirs, its_kept) = sides(d, dtype, kind, 3 * n)
            for form in FORMS:
                wire = np.full(ours.nbytes, 0xAB, np.uint8)
                its_wire = there(wire)
                with np.errstate(all="ignore"):
                    finite = ours.encode(source(*form(*mine, kept)), wire, step=5 + n, rank=2)
                answer = bool(its.encode(source(*form(*theirs, its_kept)), its_wire, step=5 + n, rank=2))
                assert finite == answer
                if finite:
                    assert bits(wire) == bits(its_wire.numpy())
                    assert bits(kept) == bits(its_kept.numpy())
                    compare_decoding(ours, its, wire, its_wire, d, dtype)


def compare_decoding(ours, its, wire, its_wire, d, dtype):
    before = vector(d, dtype, 50)
    for add in (lambda codec, wire, out: codec.add(wire[None], out, 0.3),
                lambda codec, wire, out: codec.add(wire[None], out, 0.3, overwrite=True),
                lambda codec, wire, out: codec.add_encoded(wire, out, -1.0),
                lambda codec, wire, out: codec.clear(wire[None], out)):
        out, its_out = before.copy(), there(before)
        add(ours, wire, out)
        add(its, its_wire, its_out)
        assert bits(out) == bits(its_out.numpy())
    assert bits(ours.decode(wire)) == bits(its.decode(its_wire).numpy())


@each_dtype
@pytest.mark.parametrize("compressor", [Vote(), Sign(block=100), Sign(block=5000)], ids=str)
def test_signs_whose_magnitudes_sum_to_more_than_there_is(compressor, dtype):
    """A second look at scales leaves signs, which `Vote` has turned around by then, and what it keeps, alone."""
    d = 4500
    ours, its = codecs(compressor, d, dtype)
    for form in FORMS:
        (*mine, kept), (*theirs, its_kept) = sides(d, dtype, "large", 1)
        mine[1][:] = theirs[1].tensor.zero_().cpu().numpy()
        wire, its_wire = np.zeros(ours.nbytes, np.uint8), there(np.zeros(ours.nbytes, np.uint8))
        with np.errstate(all="ignore"):
            assert ours.encode(source(*form(*mine, kept)), wire, step=6, rank=0)
        assert bool(its.encode(source(*form(*theirs, its_kept)), its_wire, step=6, rank=0))
        assert bits(wire) == bits(its_wire.numpy())
        assert bits(kept) == bits(its_kept.numpy())


@each_dtype
def test_two_messages_at_once(dtype):
    """The sum of decoded signs is encoded without being formed, and several wires are added in their order."""
    d = 1000
    ours, its = codecs(Sign(block=64), d, dtype)
    wires = np.zeros((3, ours.nbytes), np.uint8)
    for row, wire in enumerate(wires):
        ours.encode(vector(d, dtype, row), wire)
    x, kept = vector(d, dtype, 9), np.zeros(d, dtype)
    its_x, its_kept = there(x), there(kept)
    wire, its_wire = np.zeros(ours.nbytes, np.uint8), there(np.zeros(ours.nbytes, np.uint8))
    assert its.can_encode_sum(its)
    ours.encode_sum(ours, wires, 1 / 3, source(o := lazy(x), Keep(o, kept, less_message=True)), wire)
    its.encode_sum(its, there(wires), 1 / 3, source(i := lazy(its_x), Keep(i, its_kept, less_message=True)), its_wire)
    assert bits(wire) == bits(its_wire.numpy())
    assert bits(kept) == bits(its_kept.numpy())
    ours.add(wires, x, 0.2)
    its.add(there(wires), its_x, 0.2)
    assert bits(x) == bits(its_x.numpy())


@each_dtype
def test_segments(dtype):
    test_d = 1000
    compressor = TopK(0.1, segments=(10, 0, 500, 490))
    ours, its = codecs(compressor, test_d, dtype)
    wire, its_wire = np.zeros(ours.nbytes, np.uint8), there(np.zeros(ours.nbytes, np.uint8))
    x = vector(test_d, dtype, 1, "ties")
    ours.encode(x, wire)
    its.encode(there(x), its_wire)
    assert bits(wire) == bits(its_wire.numpy())


@each_dtype
def test_low_rank_messages_read_the_same(dtype):
    """Products of matrices are rounded as the library of the side does it; what is made of a message is not."""
    compressor, d = LowRank(2, shapes=((20, 30), (9,), (4, 4))), 625
    ours, its = codecs(compressor, d, dtype)
    wire, its_wire = np.zeros(ours.nbytes, np.uint8), there(np.zeros(ours.nbytes, np.uint8))
    x = vector(d, dtype, 1)
    ours.encode(x, wire)
    its.encode(there(x), its_wire)
    eps = np.finfo(dtype).eps
    assert np.allclose(wire.view(dtype), its_wire.view(dtype).numpy(), rtol=200 * eps, atol=200 * eps)
    compare_decoding(ours, its, wire, there(wire), d, dtype)


@dataclass(frozen=True, repr=False)
class Halves(Compressor):
    """Somebody's compressor, which knows NumPy alone: the first half of the vector."""

    def codec(self, d, dtype=np.float32):
        return _HalvesCodec(d, dtype)

    def alpha(self, d):
        return 0.0


class _HalvesCodec(PlainCodec):
    def __init__(self, d, dtype):
        super().__init__(d, dtype)
        self.nbytes = 8 * (d // 2)

    def pack(self, x, wire, *, step, rank):
        wire.view(np.float64)[:] = x[: self.d // 2]

    def unpack(self, wire):
        x = np.zeros(self.d, self.dtype)
        x[: self.d // 2] = wire.view(np.float64)
        return x


@each_dtype
def test_a_codec_of_ones_own_goes_through_the_host(dtype):
    d = 100
    ours, its = codecs(Halves(), d, dtype)
    assert isinstance(its, StagedCodec)
    x, wire, its_wire = vector(d, dtype), np.zeros(ours.nbytes, np.uint8), there(np.zeros(ours.nbytes, np.uint8))
    assert ours.encode(x, wire)
    assert its.encode(there(x), its_wire)
    assert bits(wire) == bits(its_wire.numpy())
    compare_decoding(ours, its, wire, its_wire, d, dtype)
