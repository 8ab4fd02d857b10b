"""Coded computing: redundant work and a code let a step end without the slowest ranks. It knows no torch."""

from .blocks import Blocks, code_for
from .codes import Cyclic, FractionalRepetition, GradientCode
from .gradients import CodedGradients
from .many import ManyTrainings, ServedMany, serve_many
from .rounds import Finished
from .schemes import GC, MSGC, SRSGC, Scheme, Task, scheme_of
from .sequential import Schedule, scheduled
from .serve import Served, serve
from .simulator import Run, choose, gilbert_elliott, profile_of, simulate
from .texts import code_of
from .wire import Decoded, Order

__all__ = ["GC", "MSGC", "SRSGC", "Blocks", "CodedGradients", "Cyclic", "Decoded", "Finished", "FractionalRepetition",
           "GradientCode", "ManyTrainings", "Order", "Run", "Schedule", "Scheme", "Served", "ServedMany", "Task", "choose",
           "code_for", "code_of", "gilbert_elliott", "profile_of", "scheduled", "scheme_of", "serve", "serve_many",
           "simulate"]
