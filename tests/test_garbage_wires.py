"""Wires of any content: decoders write to the vector's own entries, and say the same everywhere."""

import numpy as np
import pytest
from vectors_for_tests import DTYPES, gaussian

from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK, TwoBits
from mpi_ef.errors import ShapeError

VALUES = (Identity(), Quantize("bf16", block=16), Quantize("fp16", block=7), Quantize("int8"), Sign(), Sign(block=8),
          TwoBits(), LowRank(1))
SPARSE = (*(TopK(0.1, values=values) for values in VALUES), TopK(0.3, segments=(500, 1, 300, 200)), TopK(1.0),
          RandK(0.1), RandK(0.3, values=Quantize("int8"), seed=3))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_sparse = pytest.mark.parametrize("compressor", SPARSE, ids=str)


@each_dtype
@each_sparse
@pytest.mark.parametrize("device", ["cpu", "side:cpu"])
def test_entries_are_what_is_added(compressor, dtype, device):
    """Of a message, and of any bytes; a codec that has decoded another one before says the same."""
    codec, other = compressor.codec_on(device, 1001, dtype), compressor.codec(1001, dtype)
    rng, place = np.random.default_rng(0), codec._kernels.place
    wires = [rng.integers(0, 256, codec.nbytes, np.uint8) for _ in range(6)]
    for x in range(2):
        other.encode(gaussian(x, 1001, dtype), wires[x], step=x)
    for wire in wires:
        indices, values = place(np.full(codec.k, -1)), place(np.full(codec.k, 7, dtype))
        codec.entries(place(wire), indices, values)
        indices, values = codec._kernels.fetch(indices), codec._kernels.fetch(values)
        assert 0 <= indices[0] <= indices[-1] < 1001
        assert (np.diff(indices) > 0).all()
        sparse = np.zeros(1001, dtype)
        sparse[indices] = values
        np.testing.assert_array_equal(sparse, other.decode(wire))
        np.testing.assert_array_equal(sparse, codec._kernels.fetch(codec.decode(place(wire))))


def test_entries_go_where_they_fit():
    codec = TopK(k=10).codec(100)
    wire, indices, values = np.zeros(codec.nbytes, np.uint8), np.zeros(10, np.int64), np.zeros(10, np.float32)
    for wrong in ((wire[:-8], indices, values), (wire, indices[1:], values), (wire, indices.astype(np.int32), values),
                  (wire, indices, values.astype(np.float64)), (wire, np.zeros(20, np.int64)[::2], values), (wire, indices, np.zeros(20, np.float32)[::2])):
        with pytest.raises(ShapeError, match="pass"):
            codec.entries(*wrong)
