"""The optimizers of the papers as they stand there: plain, readable, for one process that sees the mean gradient.

What :mod:`mpi_ef.optim` makes of them without compression is the same step by step, to rounding; the tests compare. Slow on
purpose: a loop over parameters, in the order of the formulas, without kernels, options that check nothing.
"""

from .adam import OneBitAdam
from .lamb import OneBitLamb
from .muon import EF21Muon
from .signs import Lion, Signum
from .zero_one import ZeroOneAdam

__all__ = ["EF21Muon", "Lion", "OneBitAdam", "OneBitLamb", "Signum", "ZeroOneAdam"]
