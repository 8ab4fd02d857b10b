"""A plan of one's own: the mean of every entry without its T largest and T smallest values, whatever some ranks send.

mpiexec -n 4 python -m mpi4py examples/my_plan.py
mpiexec -n 4 mpi-ef train --plan "my_plan:TrimmedMean(trim=1)"          # with examples/ on PYTHONPATH
"""

import numpy as np

from mpi_ef.collectives import GatherMean
from mpi_ef.errors import OptionError


class TrimmedMean(GatherMean):
    """GatherMean's messages, combined in another way. trim=0 is the mean; of 2 trim + 1 ranks it is the median."""

    def __init__(self, comm, compressor, d, dtype=np.float32, *, trim=1):
        self.trim = trim
        super().__init__(comm, compressor, d, dtype)

    def _bind(self):
        if not 0 <= 2 * self.trim < self.size:
            raise OptionError(f"TrimmedMean: trim={self.trim} leaves nothing of {self.size} ranks; take less")
        return super()._bind() | {"trim": self.trim}  # ranks that disagree on it raise

    def _like(self, compressor):
        """Return what first, dense steps and second messages go through."""
        return TrimmedMean(self.comm, compressor, self.d, self.dtype, trim=self.trim)

    def add_mean(self, out, scale=1.0):
        """Add ``scale`` times the trimmed mean to `out`, the same bits on every rank."""
        rows = np.zeros((self.size, self.d), self.dtype)
        for rank, row in enumerate(rows):
            self.add_message(rank, row)
        rows.sort(axis=0)
        left = rows[self.trim : self.size - self.trim]
        out += self.dtype.type(scale) * left.mean(axis=0, dtype=self.dtype)

    def set_mean(self, out, scale=1.0, *, again=False):
        """Overwrite `out` with it."""
        out.fill(0)
        self.add_mean(out, scale)


if __name__ == "__main__":
    from mpi4py.MPI import COMM_WORLD as comm

    from mpi_ef import TopK

    plan = TrimmedMean(comm, TopK(0.5), 1000, trim=(comm.size - 1) // 2)
    x = np.random.default_rng(comm.rank).normal(size=1000).astype(np.float32)
    mean = np.zeros(1000, np.float32)
    plan.exchange(x).add_mean(mean)
    print(comm.rank, mean[:4])
