"""Error feedback: what compression drops is sent later. NumPy only.

A rule turns this rank's vector into a vector that is the same on all ranks, by one compressed exchange. The rules are
in :mod:`mpi_ef.feedback.rules`, one function per paper; :class:`ErrorFeedback` puts one to work on a plan.
"""

from .error_feedback import ErrorFeedback
from .rules import RULES, Rule, State, econtrol, ef14, ef21

__all__ = ["RULES", "ErrorFeedback", "Rule", "State", "econtrol", "ef14", "ef21"]
