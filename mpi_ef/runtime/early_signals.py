"""Signals that ask a run to stop when it cannot yet save, or has nothing left to save: they must not kill it."""

import signal
from types import FrameType

__all__ = ["ignore", "note", "noted"]

# What batch systems are asked to send before the end; TERM is left alone: launchers end ranks with it.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_noted: list[int] = []


def note() -> None:
    """Keep them in mind from now on. Local; in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _note)


def _note(number: int, _frame: FrameType | None) -> None:
    _noted.append(number)


def noted() -> int | None:
    """Return one that has come since :func:`note`, and forget all of them. Local."""
    number = _noted[0] if _noted else None
    _noted.clear()
    return number


def ignore() -> None:
    """Ignore them until the process has ended, MPI's end included. Local; in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
