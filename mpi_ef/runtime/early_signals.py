"""Requests to stop before a run can save, or after its last save: these signals must not kill it."""

import signal
from types import FrameType

__all__ = ["ignore", "pending", "record"]

# What batch systems send before the end by option; not TERM, with which launchers end ranks.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_pending: list[int] = []


def record() -> None:
    """Record them from now on. Local; in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _record)


def _record(number: int, _frame: FrameType | None) -> None:
    _pending.append(number)


def pending() -> int | None:
    """Return one that has arrived since :func:`record`, and forget all of them. Local."""
    number = _pending[0] if _pending else None
    _pending.clear()
    return number


def ignore() -> None:
    """Ignore them until the process has ended, MPI's end included. Local; in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
