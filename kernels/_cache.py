"""Machine code on disk: it is run, so that a file counts only when it is whole and nobody else can have written it.

Numba keeps an index for each function, which several processes overwrite for each other, unpickles whatever it finds, and
passes on every error. Here a file is one function for one signature and one processor, named by all that its code
depends on, and whatever is wrong with it makes it absent: the function is compiled.
"""

import os
import pickle
import stat
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

__all__ = ["MachineCodeCache", "refusal"]

_DIGEST = sha256().digest_size


def _room_stamp() -> bytes:
    """Return a digest of all files of this folder, and of the versions that compile: helpers are part of a kernel's code."""
    digest = sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


_STAMP = _room_stamp()
_OWNERS = {os.geteuid(), 0, Path(__file__).stat().st_uid}  # who owns this file could change the kernels themselves
_warned: list[bool] = []


def refusal(status: os.stat_result, writable: int) -> str:
    """Return why others may have written what has this `status`, `writable` by whom; "" where they cannot. Local."""
    if status.st_uid not in _OWNERS:
        return f"belongs to user {status.st_uid}"
    return "may be written by others" if status.st_mode & writable else ""


class _Files:
    """What Numba calls the cache file of a function, with the calls that it makes.

    Parameters
    ----------
    folder, name : str
        Where files are, and how the names of all that are for this function begin.
    warn : callable
        Is told about files that are of no use.
    """

    def __init__(self, folder: str, name: str, warn: Callable[[str], None]) -> None:
        self._begin = str(Path(folder, f"{name}.{sha256(_STAMP + name.encode()).hexdigest()[:12]}"))
        self._warn = warn

    def _path(self, key: Any) -> Path:
        return Path(f"{self._begin}.{sha256(repr(key).encode()).hexdigest()[:16]}.nbc")

    def there(self) -> bool:
        """Tell whether there is machine code of this function as it is now, for any signature."""
        begin = Path(self._begin)
        return any(begin.parent.glob(f"{begin.name}.*.nbc"))

    def load(self, key: Any) -> Any:
        """Return what was saved for a key; None where nothing was, or it is of no use."""
        path = self._path(key)
        try:
            # Neither a link nor a pipe; who opens a pipe waits for whoever writes to it.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                wrong = refusal(status, 0o022) if stat.S_ISREG(status.st_mode) else "is no file"
                content = b"" if wrong else file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        if not wrong and content[:_DIGEST] != self._digest(key, content[_DIGEST:]):
            wrong = "is damaged"
        if wrong:
            self._warn(f"{path.name} {wrong}")
            return None
        return pickle.loads(memoryview(content)[_DIGEST:])  # noqa: S301

    def save(self, key: Any, data: Any) -> None:
        """Write what a function was compiled to, whole or not at all."""
        path, code = self._path(key), dumps(data)
        draft = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
                file.write(self._digest(key, code) + code)
            draft.replace(path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise

    def flush(self) -> None:
        """Remove what there is."""
        begin = Path(self._begin)
        for path in begin.parent.glob(f"{begin.name}.*.nbc"):
            path.unlink(missing_ok=True)

    def _digest(self, key: Any, code: bytes) -> bytes:
        """Return a checksum of code and of what it is for: a file that another name was given to is of no use either."""
        return sha256(self._begin.encode() + repr(key).encode() + code).digest()


class MachineCodeCache(FunctionCache):
    """The cache of one function; takes the place of Numba's own. What cannot be loaded or saved is warned about once.

    Attributes
    ----------
    files : object
        Those of the function.

    Raises
    ------
    RuntimeError
        There is no folder that can be written.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.files = vars(self)["_cache_file"] = _Files(self._cache_path, self._impl.filename_base, self._warn)
        self._looked = False

    def usable(self) -> bool:
        """Tell whether nobody else may write to the folder, who could remove files while these are used. Asked once."""
        if not self._looked:
            self._looked = True
            try:
                wrong = refusal(Path(self._cache_path).stat(), 0o002)
            except OSError as error:
                wrong = f"cannot be used ({error.strerror})"
            if wrong:
                self.disable()
                self._warn(f"the folder {wrong}")
        return bool(self._enabled)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the function compiled for a signature; None where it has to be compiled."""
        try:
            return super().load_overload(sig, target_context) if self.usable() else None
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the function compiled for a signature, where that is possible."""
        try:
            if self.usable():
                super().save_overload(sig, data)
        except OSError as error:
            self._warn(f"it cannot be written ({error.strerror})")

    def _warn(self, text: str) -> None:
        if not _warned:
            _warned.append(True)
            warnings.warn(f"{self._cache_path}: {text}; what machine code cannot be kept of is compiled in every process",
                          RuntimeWarning, stacklevel=2)
