"""Compressors: what is kept of a vector, and how it looks on the wire. They know nothing of MPI.

A compressor is a frozen dataclass, for example ``TopK(0.01, values=Quantize("bf16"))``. Bound to a vector length and a
dtype it becomes a :class:`Codec` with a fixed wire size, one method that encodes and one that adds what it decodes.
What is encoded may be a combination of vectors that is only formed while it is encoded: ``lazy(grad) - g_i``.
"""

from .chunks import Chunks
from .combination import Combination, Keep, Source, aligned_zeros, lazy, source
from .compressor import Codec, Compressor, for_parameters
from .dense import Identity, Quantize, Sign, Vote
from .levels import TwoBits
from .lowrank import LowRank
from .plain import PlainCodec
from .sparse import RandK, TopK

__all__ = ["Chunks", "Codec", "Combination", "Compressor", "Identity", "Keep", "LowRank", "PlainCodec", "Quantize",
           "RandK", "Sign", "Source", "TopK", "TwoBits", "Vote", "aligned_zeros", "for_parameters", "lazy", "source"]
