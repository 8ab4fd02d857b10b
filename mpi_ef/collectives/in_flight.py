"""Exchanges that MPI is still at work on: their memory stays, whoever drops the objects that own it."""

import atexit
import ctypes
from time import monotonic, sleep
from typing import Any

__all__ = ["landed", "let_go", "outlives", "took_off"]

_PATIENCE_SECONDS = 5.0
_owners: dict[int, tuple[Any, Any]] = {}


def took_off(owner: object, request: Any) -> None:
    """Keep `owner`, which has the memory of a request, until it has :func:`landed`. Local."""
    if not _owners:
        atexit.unregister(_wait)
        atexit.register(_wait)  # runs before what was registered earlier, such as the end of process groups
    _owners[id(owner)] = owner, request


def landed(owner: object) -> None:
    """Let go of it. Local."""
    _owners.pop(id(owner), None)


def let_go() -> None:
    """Let go of what MPI is done with, of owners that nobody waits for any more, for example. Local."""
    for number in [number for number, (_, request) in _owners.items() if request.Test()]:
        del _owners[number]


def _wait() -> None:
    """Give requests that were not waited for some time; what is left must outlive Python's end, in which MPI ends."""
    deadline = monotonic() + _PATIENCE_SECONDS
    for owner, request in _owners.values():
        while not request.Test() and monotonic() < deadline:
            sleep(0.001)
        outlives(owner)


def outlives(owner: object) -> None:
    """Keep it to the very end, after that of Python. Local."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))
