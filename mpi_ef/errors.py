"""Errors of mpi_ef: one line each, *subject: what is wrong, with the values; what to do*."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb
from typing import TextIO, TypeVar

__all__ = ["CheckpointError", "ConfigError", "DataError", "DisagreementError", "DtypeError", "LaunchError",
           "MpiEfError", "NonFiniteError", "OptionError", "OutOfMemoryError", "PeerError", "ShapeError", "SilenceError",
           "WrongAnswersError", "briefly", "counted", "everywhere", "nearest", "say", "shortage", "told"]


class MpiEfError(Exception):
    """Base of every error that mpi_ef raises on purpose.

    Attributes
    ----------
    everywhere : bool
        True when all ranks of the communicator are known to raise this error together, with the same text, so that one
        of them may print it.
    may_pass : bool
        True when a file system has refused to write what was right: the program may succeed when it is started again, and
        ends with status 1 in place of 2.
    """

    everywhere: bool = False
    may_pass: bool = False

    def __init__(self, *words: object) -> None:
        super().__init__(*(_in_one_line(word) if isinstance(word, str) else word for word in words))


class ShapeError(MpiEfError, ValueError):
    """An array has the wrong shape or is not contiguous."""


class DtypeError(MpiEfError, TypeError):
    """An array has the wrong dtype or lives on the wrong device."""


class OptionError(MpiEfError, ValueError):
    """An option is outside its range, for example a ratio outside (0, 1]."""


class DisagreementError(MpiEfError, RuntimeError):
    """Ranks were given different things where they must agree. Raised on all ranks."""

    everywhere = True


class PeerError(MpiEfError, RuntimeError):
    """Another rank could not take part in a collective; its error is quoted. Raised on all ranks but that one."""


class SilenceError(MpiEfError, RuntimeError):
    """Too many ranks have said nothing for as long as one was to wait. Each rank raises it by itself.

    Attributes
    ----------
    ranks : tuple of int
        The silent ones.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class NonFiniteError(MpiEfError, ArithmeticError):
    """A vector holds NaN or Inf on some rank. Raised on all ranks; no state was changed anywhere.

    Attributes
    ----------
    ranks : tuple of int
        The ranks whose vector is not finite.
    """

    everywhere = True

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class WrongAnswersError(MpiEfError, RuntimeError):
    """Workers have answered wrongly, and which ones cannot be told.

    Attributes
    ----------
    named : tuple of int
        Those of which it could be told, before others were left over.
    """

    def __init__(self, message: str, named: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.named = named


class OutOfMemoryError(MpiEfError, MemoryError):
    """There is no room on a rank, or on its device, for what is to be built."""


class LaunchError(MpiEfError, RuntimeError):
    """The launcher started several tasks, but MPI does not see them as one world."""


class ConfigError(MpiEfError, ValueError):
    """A configuration file or command line is wrong."""


class DataError(MpiEfError, ValueError):
    """Training data are unusable, for example an empty text or fewer samples than ranks."""


class CheckpointError(MpiEfError, OSError):
    """A checkpoint cannot be written or read.

    Attributes
    ----------
    damaged : bool
        True when the files are there and readable, but what they hold is not what was written.
    """

    def __init__(self, message: str, *, damaged: bool = False) -> None:
        super().__init__(message)
        self.damaged = damaged


Error = TypeVar("Error", bound=MpiEfError)
_LIBRARIES = {"mpi_ef", "mpi4py", "numba", "numpy", "torch", *sys.stdlib_module_names}


def everywhere(error: Error) -> Error:
    """Return an error that all ranks raise together, with the same text. Local."""
    error.everywhere = True
    return error


def briefly(value: object, width: int = 60) -> str:
    """Return the repr of a value on one line, cut off where it is long: all that errors say of a user's object. Local."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # it is the user's, too
        text = f"an object of {type(value).__name__}"
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def _in_one_line(text: str) -> str:
    """Return a text, which may quote others, without ends of lines."""
    return " ".join(filter(None, map(str.strip, lines))) if len(lines := text.splitlines()) > 1 else text


def counted(count: int, noun: str) -> str:
    """Return "1 rank" or "3 ranks". Local."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return ``"did you mean X?"`` for the known word that is most like another one; `otherwise` where none is. Local.

    The one that begins with it, where that is one alone and it has four letters or more.
    """
    lower = {name.lower(): name for name in known}
    longer = [name for name in lower if name.startswith(word.lower())] if len(word) > 3 else []
    close = longer if len(longer) == 1 else get_close_matches(word.lower(), lower, n=1)
    return f"did you mean {lower[close[0]]}?" if close else otherwise


def shortage(subject: str, error: BaseException) -> OutOfMemoryError | None:
    """Return an error of ours for one that says that memory is short, of Python, NumPy or torch; None for others. Local."""
    short = isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    if not short or isinstance(error, MpiEfError):
        return None
    said = ". ".join(" ".join(str(error).split()).split(". ")[:3]).rstrip(".")  # torch goes on with advice
    return OutOfMemoryError(f"{subject}: out of memory{f' ({said})' if said else ''}; take a smaller model, fewer ranks for "
                            "each device, or what keeps fewer vectors")


def say(stream: TextIO | None, text: str = "") -> None:
    """Write a text to a standard stream, in one piece, and flush; one that is closed, gone or full ends nothing. Local."""
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


def told(error: BaseException) -> str:
    """Return the kind and the text of an error, and the innermost line of it that is a user's, if there is one. Local."""
    theirs = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)
              if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES]
    place = f" ({Path(theirs[-1][0]).name}, line {theirs[-1][1]})" if theirs else ""
    return f"{type(error).__name__}: {error}{place}"
