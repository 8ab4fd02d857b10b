"""What is kept with a communicator, and goes when it is freed."""

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["kept_with"]

Kept = TypeVar("Kept")
_keyvals: dict[tuple[type, object], int] = {}  # by kind of communicator, and what is kept with it


def kept_with(comm: Any, new: Callable[[], Kept]) -> Kept:
    """Return what ``new()`` has made when it was first asked for with `comm`, one that keeps attributes. Local."""
    kind = type(comm)
    if (kind, new) not in _keyvals:
        _keyvals[kind, new] = kind.Create_keyval()
    there: Kept | None = comm.Get_attr(_keyvals[kind, new])
    if there is None:
        comm.Set_attr(_keyvals[kind, new], there := new())
    return there
