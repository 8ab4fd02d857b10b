"""The one place where Numba's options are chosen."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
from numba.core.event import Listener, register

from ._cache import MachineCodeCache

__all__ = ["jit", "machine_code"]

# No fastmath anywhere: NaN and Inf must be seen, and the NumPy twins must give the same bits.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first use, once per dtype, with the machine code cached on disk where that is possible.

    Where there is no place for it (a read-only install in a container, a missing home directory), or none that can be
    trusted, the kernel compiles in every process.
    """
    njit: Any = numba.njit
    compiled = njit(**_OPTIONS)(function)
    with suppress(RuntimeError):
        compiled._cache = MachineCodeCache(function)  # noqa: SLF001
    return compiled


class _MachineCode(Listener):
    """What Numba does in this process: it compiles, or loads what has been compiled. Calls of ready kernels cost nothing.

    Attributes
    ----------
    made : int
        Grows whenever machine code is compiled or loaded.
    announce : callable or None
        Called once, before the next kernel is compiled (not loaded), with the folder that will keep it; with "" where
        none can.
    """

    def __init__(self) -> None:
        self.made = 0
        self.announce: Callable[[str], object] | None = None
        register("numba:compiler_lock", self)  # held for both
        register("numba:compile", self)

    def on_start(self, event: Any) -> None:
        """Numba begins."""
        self.made += 1
        announce = self.announce
        if announce is not None and event.kind == "numba:compile":
            self.announce = None
            cache = getattr(event.data["dispatcher"], "_cache", None)
            announce(str(cache.cache_path) if isinstance(cache, MachineCodeCache) and cache.usable() else "")

    def on_end(self, event: Any) -> None:
        """Numba has ended."""


machine_code = _MachineCode()
