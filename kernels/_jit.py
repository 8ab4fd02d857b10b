"""The one place where Numba's options are chosen, and the machine instruction that Numba does not offer."""

from collections.abc import Callable
from typing import Any

import numba
from numba.extending import intrinsic

__all__ = ["jit", "trailing_zeros"]

# No fastmath anywhere: NaN and Inf must be seen, and the NumPy twins must give the same bits.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first use, once per dtype, with the machine code cached on disk where that is possible.

    Numba raises at decoration when it finds no writable place for its cache (a read-only install in a container,
    a missing home directory); the kernel then compiles in every process instead of failing.
    """
    njit: Any = numba.njit
    try:
        compiled: Callable[..., Any] = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        compiled = njit(**_OPTIONS)(function)
    return compiled


def _trailing_zeros(_context: Any, word: Any) -> Any:  # noqa: ARG001
    """Count the zero bits below the lowest set bit of a non-zero unsigned 64-bit `word`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], numba.core.cgutils.true_bit)

    return numba.types.uint64(numba.types.uint64), generate


trailing_zeros: Any = intrinsic(_trailing_zeros)
