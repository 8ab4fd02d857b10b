"""Parameters and gradients of a torch model as views of two contiguous vectors; the mean of tensors of several ranks."""

from .flat import FlatParameters, Mask
from .mean import mean_over_ranks

__all__ = ["FlatParameters", "Mask", "mean_over_ranks"]
