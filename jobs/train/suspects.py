"""Which ranks a robust rule has left out."""

import numpy as np

from mpi_ef.comm.protocol import Comm
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.optim.flat import FlatOptimizer

__all__ = ["suspicion_of"]


def suspicion_of(optimizer: FlatOptimizer, comm: Comm) -> list[float] | None:
    """Return how much each rank has been left out, from 0 to 1, the median of what ranks say; None without such a rule.

    Collective.
    """
    states = [channel.state for channel in optimizer.channels() if isinstance(channel, ErrorFeedback)]
    own = getattr(optimizer, "suspicion", None)
    said = [getattr(state, "suspicion", None) for state in states] if own is None else [own]
    said = [found for found in said if found is not None]
    if not said:
        return None
    everybodys = np.array(comm.allgather(np.mean(np.array(said, np.float64), axis=0)))
    return [round(float(one), 4) for one in np.median(everybodys, axis=0)]
