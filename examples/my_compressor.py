"""A compressor of one's own: the entry of largest magnitude of every block of B. Works wherever TopK does:

mpiexec -n 2 python -m mpi4py examples/my_compressor.py
mpiexec -n 2 mpi-ef train --compressor "my_compressor:BlockMax(64)"      # with examples/ on PYTHONPATH
"""

from dataclasses import dataclass

import numpy as np

from mpi_ef.compress import Compressor, PlainCodec


@dataclass(frozen=True, repr=False)
class BlockMax(Compressor):
    """Keep one entry of every block. Wire: where it is (int64), and its value. alpha = 1 / B."""

    block: int = 64
    sparse = True

    def codec(self, d, dtype=np.float32):
        """Return a codec for vectors of length d."""
        return _Codec(d, dtype, self.block)

    def alpha(self, d):
        """The largest of B entries has at least the mean of their squares."""
        return 1 / max(1, min(self.block, d))


class _Codec(PlainCodec):
    def __init__(self, d, dtype, block):
        super().__init__(d, dtype)
        self.block, self.blocks = block, -(-d // block)
        self.nbytes = 16 * self.blocks  # whole words

    def pack(self, x, wire, *, step, rank):
        padded = np.zeros(self.blocks * self.block, x.dtype)
        padded[: x.size] = x
        rows = padded.reshape(self.blocks, self.block)
        places = np.abs(rows).argmax(axis=1) + np.arange(self.blocks) * self.block
        wire[: 8 * self.blocks] = places.view(np.uint8)
        wire[8 * self.blocks :] = padded[places].astype(np.float64).view(np.uint8)

    def unpack(self, wire):
        places = wire[: 8 * self.blocks].view(np.int64).clip(0, max(0, self.d - 1))  # whatever a wire says
        out = np.zeros(self.blocks * self.block, self.dtype)
        out[places] = wire[8 * self.blocks :].view(np.float64)
        return out[: self.d]


if __name__ == "__main__":
    from mpi4py.MPI import COMM_WORLD as comm

    from mpi_ef import allreduce

    x = np.random.default_rng(comm.rank).normal(size=1000).astype(np.float32)
    print(comm.rank, allreduce(comm, x, BlockMax(64))[:4])
