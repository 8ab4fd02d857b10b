"""Standard streams of programs that outlive them: closed, a pipe that nobody reads, a disk that is full."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO, cast

__all__ = ["Output", "lasting_streams"]


class Output:
    """A stream of text; once it fails, nothing more is written, and that ends no program.

    Attributes
    ----------
    lost : str
        Why what was printed is lost, where somebody may miss it; "" where nobody does: the reader of a pipe has gone.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = ""

    def write(self, text: str) -> int:
        """Write, or forget."""
        return self._attempt(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """Flush, or forget."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], int | None]) -> int | None:
        try:
            return action()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.lost = self.lost or error.strerror or str(error)
            _to_nowhere(self._stream.fileno())  # with what is in buffers, which would fail again at the end of Python
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[Output]:
    """Let the standard streams fail without an error in the block, and give that of stdout. Local; in the main thread.

    Those that were closed at the start lead nowhere, their descriptors too: the next file that is opened would get one, and
    with it what libraries and other processes print.
    """
    names = ("stdin", "stdout", "stderr")
    before = [getattr(sys, name) for name in names]
    for number, stream in enumerate(before):
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                _to_nowhere(number)
    opened = {name: open(os.devnull, "w" if name != "stdin" else "r", encoding="utf-8")  # noqa: PTH123, SIM115
              for name, stream in zip(names, before, strict=True) if stream is None}
    for name, nothing in opened.items():
        setattr(sys, name, nothing)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    output, errors = Output(sys.stdout), Output(sys.stderr)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", errors)
    try:
        yield output
    finally:
        output.flush()
        if output.lost:
            errors.write(f"mpi-ef: what was printed is lost: {output.lost}\n")
        errors.flush()
        for name, stream in zip(names, before, strict=True):
            setattr(sys, name, stream)
        for stream in opened.values():
            with suppress(OSError):
                stream.close()


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:
        os.set_inheritable(nowhere, True)
    else:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
