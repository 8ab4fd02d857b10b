"""The command ``mpi-ef``: one word picks the program, which parses the rest."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any, TextIO, cast

import mpi_ef
from mpi_ef.errors import nearest

__all__ = ["main"]

# Each program is a module with main(argv). None of them is imported before it is asked for, and none starts MPI for
# --help.
PROGRAMS = {
    "train": ("train.program", "train a model over MPI with compressed communication"),
    "bench": ("bench.program", "measure plans and rules against dense allreduce on this machine"),
    "checkpoint": ("checkpoint", "list, verify, inspect, compare and export checkpoints; needs no MPI"),
    "doctor": ("doctor.program",
               "look for everything that goes wrong before the first step, on a login node or on all ranks"),
    "supervise": ("supervise", "run a program in a batch job, and again until it has finished; needs no MPI itself"),
    "slurm": ("slurm", "list, show, copy and submit batch templates"),
    "report": ("report.program", "draw and tabulate finished runs: loss against bytes, time and steps"),
    "reproduce": ("reproduce.program", "run published experiments again; NAME, or --list"),
    "least-squares": ("least_squares", "solve a least-squares problem with rows on all ranks; NumPy only, no torch"),
}


_RECORDING = ("train", "reproduce", "supervise")  # what they print is in files as well


class _Output:
    """Standard output for a program that outlives it: when a disk is full nothing more is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = ""  # why what was printed is lost
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files are bytes

    def write(self, text: str) -> int:
        """Write, or forget."""
        return self._attempt(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """Flush, or forget."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], int | None]) -> int | None:
        try:
            return action()
        except BrokenPipeError:
            raise
        except OSError as error:
            self.lost = self.lost or error.strerror or str(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program named by the first argument. A reader that has seen enough, as of ``| head``, is no error.

    What cannot be printed because a disk is full ends no program; the end of it says so.
    """
    stream, arguments = sys.stdout, list(sys.argv[1:] if argv is None else argv)
    if stream is None:  # it was closed
        _run(arguments)
        return
    output = _Output(stream)
    sys.stdout = cast("TextIO", output)
    try:
        try:
            _run(arguments)
        finally:
            output.flush()  # what is left in the buffer would fail at the end of Python, with status 120
            sys.stdout = stream
            if output.lost:
                print(f"mpi-ef: what was printed is lost: {output.lost}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(0)
    if output.lost and arguments[:1] not in ([name] for name in _RECORDING):
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mpi-ef PROGRAM [options]\n")
        print("\n".join(f"  {name:<15}{text}" for name, (_, text) in PROGRAMS.items()))
        print("\nmpi-ef PROGRAM --help shows the options, mpi-ef --version the version. Start programs that use MPI with "
              "mpiexec or srun.")
        return
    name = arguments[0]
    if name == "--version":
        print(f"mpi-ef {mpi_ef.__version__}")
        return
    if name not in PROGRAMS:
        sys.exit(f"mpi-ef: there is no program {name!r}; {nearest(name, PROGRAMS, 'see mpi-ef --help')}")
    import_module(f"mpi_ef.jobs.{PROGRAMS[name][0]}").main(arguments[1:])


if __name__ == "__main__":
    main()
