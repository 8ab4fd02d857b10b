"""Coded computing: redundant work and a code let a step end without the slowest ranks. It knows no torch."""

from .berrut import BerrutCode
from .blocks import Blocks, code_for
from .codes import Cyclic, FractionalRepetition, GradientCode
from .gradients import CodedGradients
from .locator import Parity, locate
from .many import ManyTrainings, ServedMany, serve_many
from .map import CodedMap, Mapped, coded_map, leave
from .rounds import Finished
from .schemes import GC, MSGC, SRSGC, Scheme, Task, scheme_of
from .sequential import Schedule, scheduled
from .serve import Served, serve
from .simulator import Run, choose, gilbert_elliott, profile_of, simulate
from .texts import code_of
from .wire import Decoded, Order

__all__ = ["GC", "MSGC", "SRSGC", "BerrutCode", "Blocks", "CodedGradients", "CodedMap", "Cyclic", "Decoded",
           "Finished", "FractionalRepetition", "GradientCode", "ManyTrainings", "Mapped", "Order", "Parity", "Run",
           "Schedule", "Scheme", "Served", "ServedMany", "Task", "choose", "code_for", "code_of", "coded_map",
           "gilbert_elliott", "leave", "locate", "profile_of", "scheduled", "scheme_of", "serve", "serve_many",
           "simulate"]
