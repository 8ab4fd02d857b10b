"""Whether exchanges take as long as was forecast when their plan was advised."""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from mpi_ef.feedback import ErrorFeedback

from .accounts import Channel

__all__ = ["Hindsight"]

_FIRST, _STEPS = 4, 20  # the first steps compile, and fill buffers
_FAR = 3.0


class Hindsight:
    """Looks once, after some steps, at what exchanges of advised plans have taken; warns where that is far off. Local."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        plans = [plan for plan in map(_plan_of, channels) if plan.advice is not None]
        self._advice = [plan.advice for plan in plans]
        # Advice for about as many float32 entries serves longer vectors, and float64.
        self._said = sum(plan.advice.seconds * max(1.0, plan.d * plan.dtype.itemsize / (4 * plan.advice.d))
                         for plan in plans)
        self._spent: list[float] = []  # in all, after every step

    def look(self, channels: Sequence[Channel], rank: int) -> None:
        """Take note of a step."""
        advised = [channel for channel in channels if _plan_of(channel).advice is not None]
        if not self._advice or any(channel.steps <= channel.dense_steps for channel in advised
                                   if isinstance(channel, ErrorFeedback)):
            return
        self._spent.append(_seconds(advised))
        if len(self._spent) == _FIRST + _STEPS:
            steps = pairwise(self._spent[_FIRST - 1 :])
            took, said = median(after - before for before, after in steps), self._said  # a pause is no slow link
            if rank == 0 and took > _FAR * said:
                warnings.warn(f"plan='auto': exchanges take {1e3 * took:.1f} ms a step, {took / said:.1f} times as long as "
                              f"when {self._advice[0].plan} was advised ({1e3 * said:.1f} ms); links or processors are "
                              "busier now, or ranks wait for slow ones: mpi-ef doctor --advise shows all plans",
                              RuntimeWarning, stacklevel=2)
            self._advice = []


def _plan_of(channel: Any) -> Any:
    return getattr(channel, "node", getattr(channel, "plan", channel))


def _seconds(channels: Sequence[Channel]) -> float:
    return sum(sum(channel.seconds.values()) for channel in channels)
