"""The one place where Numba's options are chosen."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba

__all__ = ["jit"]

# No fastmath anywhere: NaN and Inf must be seen, and the NumPy twins must give the same bits.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def _room_stamp() -> str:
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _room_stamp()


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first use, once per dtype, with the machine code cached on disk where that is possible.

    Numba raises at decoration when it finds no writable place for its cache (a read-only install in a container,
    a missing home directory); the kernel then compiles in every process instead of failing.
    """
    njit: Any = numba.njit
    try:
        compiled: Any = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return njit(**_OPTIONS)(function)  # type: ignore[no-any-return]
    _depend_on_the_whole_room(compiled)
    return compiled  # type: ignore[no-any-return]


def _depend_on_the_whole_room(compiled: Any) -> None:
    """Let cached machine code be discarded when any file of this folder has changed.

    Numba looks at the file of a kernel only, and would go on using an old helper from another file. Without the
    attributes of today's Numba its own rule stays in force.
    """
    file: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    stamp = getattr(file, "_source_stamp", None)
    if stamp is not None:
        file._source_stamp = (stamp, _STAMP)  # noqa: SLF001
