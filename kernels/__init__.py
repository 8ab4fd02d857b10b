"""Arithmetic over elements: NumPy arrays in and out, no MPI, no torch.

Every kernel is a Numba function over contiguous one-dimensional arrays and has a twin of the same name and signature in
:mod:`mpi_ef.kernels.reference`, written in plain NumPy. The twin is the specification: results agree bit for bit.
Vectors are float32 or float64; indices are int64 in ascending order; bytes are uint8.
"""

from .coding import decode_indices, encode_indices, low_bits, lower_nbytes, upper_nbytes
from .finite import all_finite
from .quantize import add_quantized, quantize
from .sample import sample_indices
from .select import select_largest
from .signs import add_signs, encode_signs
from .sparse import add_dense, add_sparse

__all__ = [
    "add_dense",
    "add_quantized",
    "add_signs",
    "add_sparse",
    "all_finite",
    "decode_indices",
    "encode_indices",
    "encode_signs",
    "low_bits",
    "lower_nbytes",
    "quantize",
    "sample_indices",
    "select_largest",
    "upper_nbytes",
]
