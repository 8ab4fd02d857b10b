"""Whether exchanges take as long as was forecast when their plan was advised."""

import warnings
from collections.abc import Sequence
from typing import Any

from .accounts import Channel

__all__ = ["Hindsight"]

_FIRST, _STEPS = 4, 20  # the first steps compile, and fill buffers
_FAR = 3.0


class Hindsight:
    """Looks once, after some steps, at what exchanges of advised plans have taken; warns where that is far off. Local."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        plans: list[Any] = [getattr(channel, "node", getattr(channel, "plan", channel)) for channel in channels]
        self._advice = [plan.advice for plan in plans if plan.advice is not None]
        self._at, self._spent = 0, 0.0

    def look(self, channels: Sequence[Channel], rank: int) -> None:
        """Take note of a step."""
        if not self._advice:
            return
        self._at += 1
        if self._at == _FIRST:
            self._spent = _seconds(channels)
        if self._at == _FIRST + _STEPS:
            took, said = (_seconds(channels) - self._spent) / _STEPS, sum(advice.seconds for advice in self._advice)
            if rank == 0 and took > _FAR * said:
                warnings.warn(f"plan='auto': exchanges take {1e3 * took:.1f} ms a step, {took / said:.1f} times as long as "
                              f"when {self._advice[0].plan} was advised ({1e3 * said:.1f} ms); links or processors are "
                              "busier now, or ranks wait for slow ones: mpi-ef doctor --advise shows all plans",
                              RuntimeWarning, stacklevel=2)
            self._advice = []


def _seconds(channels: Sequence[Channel]) -> float:
    return sum(sum(channel.seconds.values()) for channel in channels)
