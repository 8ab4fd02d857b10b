"""Error feedback over torch.distributed: a communication hook for DistributedDataParallel.

The plans and rules are those that run over MPI; a process group takes the place of the communicator.
"""

from .hook import FeedbackHook
from .process_group import ProcessGroupComm

__all__ = ["FeedbackHook", "ProcessGroupComm"]
