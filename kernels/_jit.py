"""The one place where Numba's options are chosen."""

import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core.event import Listener, register

__all__ = ["jit", "machine_code"]

# No fastmath anywhere: NaN and Inf must be seen, and the NumPy twins must give the same bits.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def _room_stamp() -> str:
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _room_stamp()
_warned: list[bool] = []  # of a damaged cache


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
            announce(str(getattr(getattr(event.data["dispatcher"], "_cache", None), "cache_path", None) or ""))

    def on_end(self, event: Any) -> None:
        """Numba has ended."""


machine_code = _MachineCode()


def _depend_on_the_whole_room(compiled: Any) -> None:
    """Let cached machine code be discarded when any file of this folder has changed.

    Numba looks at the file of a kernel only, and would go on using an old helper from another file. Without the
    attributes of today's Numba its own rule stays in force.
    """
    file: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    stamp = getattr(file, "_source_stamp", None)
    if stamp is not None:
        file._source_stamp = (stamp, _STAMP)  # noqa: SLF001
        _outlive_damage(file)
        _name_by_content(file)


def _outlive_damage(file: Any) -> None:
    """Let a cache that cannot be read (a job was killed while it wrote, a disk was full) count as empty, with one warning.

    Numba raises what unpickling raises. What is compiled then replaces it.
    """

    def forgiving(load: Callable[..., Any], nothing: Callable[[], Any]) -> Callable[..., Any]:
        def loaded(*key: Any) -> Any:
            try:
                return load(*key)
            except FileNotFoundError:
                raise  # Numba's own business
            except Exception as error:
                if not _warned:
                    _warned.append(True)
                    text = f"compiled kernels cannot be read ({type(error).__name__}: {error}) and are compiled again"
                    warnings.warn(f"{file._index_path}: {text}", RuntimeWarning, stacklevel=2)  # noqa: SLF001
                return nothing()

        return loaded

    file._load_index = forgiving(file._load_index, dict)  # noqa: SLF001
    file._load_data = forgiving(file._load_data, lambda: None)  # noqa: SLF001


def _name_by_content(file: Any) -> None:
    """Let files of machine code be named by what they are for, so that processes may compile at the same time.

    Numba numbers them: two processes that compile a kernel for two dtypes both write number 1, and one of them is loaded
    for the other's dtype from then on.
    """

    def save(key: Any, data: Any) -> None:
        digest = sha256(repr((file._source_stamp, key)).encode()).hexdigest()[:16]  # noqa: SLF001
        name = f"{file._index_name.removesuffix('.nbi')}.{digest}.nbc"  # noqa: SLF001
        file._save_index(file._load_index() | {key: name})  # noqa: SLF001
        file._save_data(name, data)  # noqa: SLF001

    file.save = save
