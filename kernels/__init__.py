"""Arithmetic over elements: NumPy arrays in and out, no MPI, no torch.

Every kernel is a Numba function over contiguous vectors (and rows of messages), does not look at strides, and has a twin
of the same name and signature in :mod:`mpi_ef.kernels.reference`, written in plain NumPy. The twin is the specification:
results agree bit for bit.

Arguments, where a kernel does not say otherwise: vectors are (d,), contiguous, all of one dtype, float32 or float64;
numbers (`factor`, `beta`, `step`, ...) are scalars of that dtype, indices int64, bytes uint8; `out` is updated.

terms, factors : three vectors, and (3,) of their dtype
    ``x = sum_t factors[t] * terms[t]``; the last term, or the last two, may be empty and then count as absent.
keep, keep_factors : a vector, or an empty one where nothing is kept, and (3,)
    `keep` is overwritten with ``sum_t keep_factors[t] * terms[t]`` in the same pass.
less_decoded : bool
    What is decoded of the message for x is taken off `keep`.
indices, values : (k,) int64, ascending, all different, each in [0, d); and (k,) of the dtype of the vectors
block : int
    Entries that share a scale or an exponent; the last block may be shorter.
overwrite : bool
    The sum starts from zero and not from what is in `out`, which is then not read.
scratch : memory of the dtype of the vectors
    As long as the constant of the same module says, for example `SELECT_SCRATCH`.
"""

from ._jit import machine_code as machine_code  # no kernel, so not in __all__
from ._stream import BLOCK
from .adam import adam, adam_step, l1_norm, preconditioned_step, sign_step, update_moments
from .coding import decode_indices, encode_indices, low_bits, lower_nbytes, upper_nbytes
from .fingerprint import fingerprints
from .finite import all_finite
from .layers import add_layers, follow_momentum, layer_norms, scaled_momentum
from .levels import LEVELS_SCRATCH, add_levels, encode_levels
from .lowrank import add_low_rank, orthonormalise
from .messages import add_messages, clear_messages, read_values, write_messages
from .momentum import local_step, momentum_step
from .quantize import FORMATS, QUANTIZE_SCRATCH, add_quantized, quantize
from .robust import ROBUST_BLOCK, add_distances, combine_columns, distances_to_mixture, mixed_distances
from .sample import sample_indices
from .select import SELECT_SCRATCH, select_candidates, select_largest
from .signs import SIGNS_SCRATCH, add_signs, encode_signs
from .sparse import (
           COMBINE_SCRATCH,
           add_dense,
           add_sparse,
           clear_sparse,
           combine,
           gather,
           mean_rows,
           mean_slice,
           subtract,
)

__all__ = ["BLOCK", "COMBINE_SCRATCH", "FORMATS", "LEVELS_SCRATCH", "QUANTIZE_SCRATCH", "ROBUST_BLOCK",
           "SELECT_SCRATCH", "SIGNS_SCRATCH", "adam", "adam_step", "add_dense", "add_distances", "add_layers",
           "add_levels", "add_low_rank", "add_messages", "add_quantized", "add_signs", "add_sparse", "all_finite",
           "clear_messages", "clear_sparse", "combine", "combine_columns", "decode_indices", "distances_to_mixture",
           "encode_indices", "encode_levels", "encode_signs", "fingerprints", "follow_momentum", "gather", "l1_norm",
           "layer_norms", "local_step", "low_bits", "lower_nbytes", "mean_rows", "mean_slice", "mixed_distances",
           "momentum_step", "orthonormalise", "preconditioned_step", "quantize", "read_values", "sample_indices",
           "scaled_momentum", "select_candidates", "select_largest", "sign_step", "subtract", "update_moments",
           "upper_nbytes", "write_messages"]
