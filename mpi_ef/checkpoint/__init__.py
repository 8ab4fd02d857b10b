"""Checkpoints in HDF5 that survive full disks, killed jobs and flipped bits."""

from .dtypes import BFLOAT16
from .reader import Checkpoint, open_checkpoint
from .store import Pending, Store

__all__ = ["BFLOAT16", "Checkpoint", "Pending", "Store", "open_checkpoint"]
