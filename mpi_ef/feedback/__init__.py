"""Error feedback: what compression drops is sent later. NumPy only.

A rule turns this rank's vector into a vector that is the same on all ranks, by one compressed exchange. The rules are
one function per paper, in the table :data:`RULES`; :class:`ErrorFeedback` puts one to work on a plan.
"""

from .error_feedback import ErrorFeedback
from .node import NodeFeedback
from .state import State, Steps, average, double_buffer, error, estimate, momentum, persistent, replicated, scratch
from .table import RULES, Rule, with_momentum

__all__ = ["RULES", "ErrorFeedback", "NodeFeedback", "Rule", "State", "Steps", "average", "double_buffer", "error",
           "estimate", "momentum", "persistent", "replicated", "scratch", "with_momentum"]
