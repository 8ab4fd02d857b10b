"""Files that anybody may have made: opened without waiting, read up to a limit, shown without control characters.

A disk may have damaged them, or a stranger may have made them to fill the memory or to hang the program.
"""

import json
import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["DOCUMENT", "MARK", "check_size", "lines", "opened", "parse_json", "read", "read_json", "read_toml", "shown",
           "shown_lines", "written"]

DOCUMENT = 64 << 20
"""Bytes that a document may have: a manifest, an index, a summary."""

MARK = 1 << 20
"""Bytes that a small file or a line of a table may have."""

_VALUES = 1 << 22  # in a document: each takes up to 72 bytes of memory for 3 bytes of text
_DEPTH = 200  # of lists in lists: what writes documents, or compares them, calls itself for each


@contextmanager
def opened(path: Path, *, follow: bool = False) -> Iterator[int]:
    """Give the descriptor of a regular file to read from; without `follow` the path is not that of a link. Local.

    Raises
    ------
    OSError
    ValueError
        It is a link, a pipe, a socket, a device or a directory.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    yield from _regular(path, flags if follow else flags | os.O_NOFOLLOW)


@contextmanager
def written(path: Path) -> Iterator[int]:
    """Give the descriptor of a file to write to, empty, made where it is missing; errors as of :func:`opened`. Local."""
    yield from _regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)


def _regular(path: Path, flags: int) -> Iterator[int]:
    if flags & os.O_NOFOLLOW and path.is_symlink():
        raise ValueError(f"{path.name} is a link; put the file there")
    if path.exists() and not path.is_file():  # opening a device may have effects
        raise ValueError(f"{path.name} is no regular file")
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path.name} is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """Return the bytes of a regular file. Local.

    Raises
    ------
    OSError
    ValueError
        As of :func:`opened`; or it has more than `limit` bytes, also where most of them are a hole.
    """
    with opened(path, follow=follow) as descriptor:
        size = os.fstat(descriptor).st_size
        if size <= limit:
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read(limit + 1)
            size = len(content)
            if size <= limit:
                return content
    raise ValueError(f"{path.name} has {size:,} bytes where {limit:,} are allowed")


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text that a user has named; links are followed. Local.

    Raises
    ------
    OSError
    ValueError
        It is no regular file or not UTF-8, or a line has more than `MARK` bytes.
    """
    with opened(path, follow=True) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        while line := file.readline(MARK + 1):
            if len(line) > MARK:
                raise ValueError(f"{path.name} has a line of more than {MARK:,} bytes")
            yield line.decode("utf-8").rstrip("\r\n")


def read_json(path: Path, limit: int = DOCUMENT, *, follow: bool = False) -> Any:
    """Return a document in JSON; errors as of :func:`read` and :func:`parse_json`. Local."""
    return parse_json(read(path, limit, follow=follow))


def parse_json(text: bytes) -> Any:
    """Return what a text in JSON says. Local.

    Raises
    ------
    ValueError
        It is not JSON, or too large (:func:`check_size`), or lists and objects are nested too deeply.
    """
    check_size(text)
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(found)
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """Return a document in TOML that a user has named; errors as of :func:`read`, `ValueError` for what is none. Local."""
    try:
        found = tomllib.loads(read(path, MARK, follow=True).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(found)
    return found


def check_size(text: bytes) -> None:
    """Raise `ValueError` unless a document is one that :func:`parse_json` reads: writers ask before they write. Local."""
    if len(text) > DOCUMENT:
        raise ValueError(f"it has {len(text):,} bytes where {DOCUMENT:,} are allowed")
    if (count := sum(map(text.count, (b",", b"[", b"{")))) > _VALUES:
        raise ValueError(f"it has about {count:,} values where {_VALUES:,} are allowed")


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(_DEPTH):
        level = [value for container in level if isinstance(container, dict | list)
                 for value in (container.values() if isinstance(container, dict) else container)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEPTH} times")


def shown(text: object) -> str:
    """Return a text in one line for a terminal, with what it might obey escaped, and half a character too. Local."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in str(text))


def shown_lines(text: object) -> str:
    """Return a text of several lines for a terminal, each as :func:`shown` returns it. Local."""
    return "\n".join(map(shown, str(text).split("\n")))
