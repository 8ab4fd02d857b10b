"""Training without a server and without equal replicas: each rank goes on from the mean of its nearest neighbours."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from mpi_ef.collectives import RobustMean
from mpi_ef.collectives.frames import OK
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, briefly
from mpi_ef.feedback.mixing import MIXING
from mpi_ef.ranges import within
from mpi_ef.robust import Median
from mpi_ef.statetree import LOCAL, PER_RANK, Leaf, Reshard, StateTree, attribute
from mpi_ef.vectors import Mask

from .aside import Aside
from .groups import parameters_of
from .wrapper import DistributedOptimizer

__all__ = ["MoNNA", "PeerMixing"]
