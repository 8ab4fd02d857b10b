"""A plan of one's own: the mean of every entry without its T largest and T smallest values, whatever some ranks send.

mpiexec -n 4 python -m mpi4py examples/my_plan.py
mpiexec -n 4 mpi-ef train --plan "my_plan:TrimmedMean(trim=1)"          # with examples/ on PYTHONPATH
"""

import numpy as np

from mpi_ef.collectives import Frames, Plan, Round, Traffic
from mpi_ef.ranges import whole


class TrimmedMean(Plan):
    """All messages are gathered. trim=0 is the mean; of 2 trim + 1 ranks it is the median."""

    def __init__(self, comm, compressor, d, dtype=np.float32, *, trim=1):
        self.trim = trim
        super().__init__(comm, compressor, d, dtype)

    def bind(self):
        whole("TrimmedMean", 0, f"there are {self.size} ranks", most=(self.size - 1) // 2, trim=self.trim)
        self.codec = self.compressor.codec(self.d, self.dtype)
        self.mine, self.all = Frames(1, self.codec.nbytes), Frames(self.size, self.codec.nbytes)
        return {"trim": self.trim}  # ranks that disagree on it raise

    def encode(self, x, *, split):
        return self.codec.encode(x, self.mine.wires[0], step=self.exchanges, rank=self.rank)

    def communicate(self):
        yield Round(self.mine, self.all)

    def decode(self, out, scale, *, own=False, overwrite=False):
        wires = self.mine.wires if own else self.all.wires
        rows = np.sort([self.codec.decode(wire) for wire in wires], axis=0)
        left = rows if own else rows[self.trim : self.size - self.trim]
        if overwrite:
            out.fill(0)
        out += self.dtype.type(scale) * left.mean(axis=0, dtype=self.dtype)

    def like(self, compressor):  # dense steps, and second messages
        return TrimmedMean(self.comm, compressor, self.d, self.dtype, trim=self.trim)

    @property
    def traffic(self):
        return Traffic.both_ways((self.size - 1) * self.mine.frame_nbytes, self.size, self.d * self.dtype.itemsize)


if __name__ == "__main__":
    from mpi4py.MPI import COMM_WORLD as comm

    from mpi_ef import TopK

    plan = TrimmedMean(comm, TopK(0.5), 1000, trim=(comm.size - 1) // 2)
    mean = np.zeros(1000, np.float32)
    plan.exchange(np.random.default_rng(comm.rank).normal(size=1000).astype(np.float32)).add_mean(mean)
    print(comm.rank, mean[:4])
