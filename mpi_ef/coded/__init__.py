"""Coded computing: redundant work and a code let a step end without the slowest ranks. It knows no torch."""

from .blocks import Blocks, code_for
from .codes import Cyclic, FractionalRepetition, GradientCode, code_of
from .schemes import GC, MSGC, SRSGC, Scheme, Task
from .sequential import Schedule, scheduled
from .simulator import Run, choose, gilbert_elliott, simulate

__all__ = ["GC", "MSGC", "SRSGC", "Blocks", "Cyclic", "FractionalRepetition", "GradientCode", "Run", "Schedule", "Scheme",
           "Task", "choose", "code_for", "code_of", "gilbert_elliott", "scheduled", "simulate"]
