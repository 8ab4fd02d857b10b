"""When a preconditioner has stopped to help: MKOR-H."""

from typing import Any

from mpi_ef.statetree import REPLICATED, Leaf

__all__ = ["Fallback"]

_WEIGHT = 0.05  # of a step's loss in the running mean


class Fallback:
    """Says when to go on without preconditioner, from the losses that all ranks know. Local, alike on all ranks.

    Of the mean loss, l is a running mean with weight 0.05 a step. At looks, every so many steps, the rate of progress is
    ``r = (l_before - l_now) / max(|l_before|, |l_now|)``; where it is less than `share` of the largest rate so far at two
    looks in a row, that is it. The paper (Mozaffari et al. 2023) does not say its rule, and its package has none: this one
    is this library's own.

    Parameters
    ----------
    share : float
    every : int
    rounded : bool
        Losses travel in few bits, and as differences from :attr:`reference`, of which those bits are enough. The first one,
        which is rounded itself, serves as reference alone.

    Attributes
    ----------
    at : int or None
        In which step that was.
    """

    def __init__(self, share: float, every: int, *, rounded: bool = False) -> None:
        self._share, self._every, self._rounded = share, every, rounded
        self.at: int | None = None
        self._last = 0  # step of the last loss
        self._mean: float | None = None
        self._before: float | None = None
        self._looked, self._largest, self._slow = 0, 0.0, 0

    @property
    def reference(self) -> float:
        """What losses are told as differences from: alike on all ranks."""
        return self._mean or 0.0

    def hear(self, step: int, loss: float) -> None:
        """Take note of the mean loss of the steps up to and with number `step`, from 0."""
        weight = 1 - (1 - _WEIGHT) ** max(1, step - self._last)
        if self._before is None:  # that of a second loss which was rounded is known by itself
            if self._mean is not None or not self._rounded:
                self._before, self._looked = loss, step
            self._mean, self._last = loss, step
            return
        assert self._mean is not None  # noqa: S101
        self._mean, self._last = (1 - weight) * self._mean + weight * loss, step
        if step - self._looked >= self._every:
            size = max(abs(self._before), abs(self._mean))  # also where losses change their sign
            rate = (self._before - self._mean) / size if size else 0.0
            self._slow = self._slow + 1 if rate < self._share * self._largest else 0
            self._largest, self._before, self._looked = max(self._largest, rate), self._mean, step
            if self._slow == 2 and self.at is None:
                self.at = step

    def leaf(self) -> Leaf:
        """Return what is saved of it."""
        names = ("at", "_last", "_mean", "_before", "_looked", "_largest", "_slow")

        def write(saved: Any) -> None:
            vars(self).update(zip(names, saved, strict=True))

        return Leaf(REPLICATED, read=lambda: [getattr(self, name) for name in names], write=write)
