"""Coded computing: redundant work and a code let a step end without the slowest ranks. It knows no torch."""

from .codes import Cyclic, FractionalRepetition, GradientCode, code_of
from .gradients import CodedGradients
from .serve import Served, serve
from .wire import Decoded, Order

__all__ = ["CodedGradients", "Cyclic", "Decoded", "FractionalRepetition", "GradientCode", "Order", "Served", "code_of",
           "serve"]
