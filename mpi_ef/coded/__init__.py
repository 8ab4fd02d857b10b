"""Coded computing: redundant work and a code let a step end without the slowest ranks. It knows no torch."""

from .codes import Cyclic, FractionalRepetition, GradientCode, code_of

__all__ = ["Cyclic", "FractionalRepetition", "GradientCode", "code_of"]
