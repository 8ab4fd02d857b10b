"""Arithmetic over elements: NumPy arrays in and out, no MPI, no torch.

Every kernel is a Numba function over contiguous vectors (and rows of messages), does not look at strides, and has a twin
of the same name and signature in :mod:`mpi_ef.kernels.reference`, written in plain NumPy. The twin is the specification:
results agree bit for bit. Vectors are float32 or float64; indices are int64 in ascending order; bytes are uint8.
"""

from ._jit import machine_code as machine_code  # no kernel, so not in __all__
from ._stream import BLOCK
from .adam import adam, adam_step, l1_norm, preconditioned_step, sign_step, update_moments
from .coding import decode_indices, encode_indices, low_bits, lower_nbytes, upper_nbytes
from .finite import all_finite
from .layers import add_layers, follow_momentum, layer_norms, scaled_momentum
from .lowrank import add_low_rank, orthonormalise
from .momentum import local_step, momentum_step
from .quantize import QUANTIZE_SCRATCH, add_quantized, quantize
from .sample import sample_indices
from .select import SELECT_SCRATCH, select_candidates, select_largest
from .signs import SIGNS_SCRATCH, add_signs, encode_signs
from .sparse import COMBINE_SCRATCH, add_dense, add_sparse, clear_sparse, combine, gather, mean_rows, subtract

__all__ = ["BLOCK", "COMBINE_SCRATCH", "QUANTIZE_SCRATCH", "SELECT_SCRATCH", "SIGNS_SCRATCH", "adam", "adam_step",
           "add_dense", "add_layers", "add_low_rank", "add_quantized", "add_signs", "add_sparse", "all_finite",
           "clear_sparse", "combine", "decode_indices", "encode_indices", "encode_signs", "follow_momentum", "gather",
           "l1_norm", "layer_norms", "local_step", "low_bits", "lower_nbytes", "mean_rows", "momentum_step",
           "orthonormalise", "preconditioned_step", "quantize", "sample_indices", "scaled_momentum",
           "select_candidates", "select_largest", "sign_step", "subtract", "update_moments", "upper_nbytes"]
