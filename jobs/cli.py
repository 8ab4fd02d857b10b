"""The command ``mpi-ef``: one word picks the program, which parses the rest."""

import sys
from collections.abc import Sequence
from importlib import import_module

import mpi_ef
from mpi_ef.errors import briefly, nearest
from mpi_ef.jobs.output import lasting_streams

__all__ = ["main"]

# Each program is a module with main(argv). None of them is imported before it is asked for, and none starts MPI for
# --help.
PROGRAMS = {
    "train": ("train.program", "train a model over MPI with compressed communication"),
    "bench": ("bench.program", "measure plans and rules against dense allreduce on this machine"),
    "scale": ("scale.program", "forecast what exchanges take on a larger cluster; needs no MPI"),
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program named by the first argument; it goes on to its end, and has its own status, whoever reads it.

    A reader that has seen enough, as of ``| head``, is no error; nor is a stream that is closed. What cannot be printed
    because a disk is full ends no program; the end of it says so.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with lasting_streams() as output:
        _run(arguments)
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
        sys.exit(f"mpi-ef: there is no program {briefly(name)}; {nearest(name, PROGRAMS, 'see mpi-ef --help')}")
    import_module(f"mpi_ef.jobs.{PROGRAMS[name][0]}").main(arguments[1:])


if __name__ == "__main__":
    main()
