"""What srun offers to MPI libraries (``srun --mpi=list``), and which of it a library understands."""

import re
from collections.abc import Sequence

__all__ = ["choose", "offered_by"]

_NAMES = re.compile(r"(?<![\w/.-])(none|pmi2|cray_shasta|openmpi|pmix(?:_v\d+)?)(?![\w/-])")


def offered_by(text: str) -> tuple[str, ...]:
    """Return the types in what ``srun --mpi=list`` prints, of any version of Slurm. Local."""
    return tuple(dict.fromkeys(_NAMES.findall(text)))


def choose(library: str, offered: Sequence[str]) -> tuple[str, str]:
    """Return the --mpi of srun for an MPI library, empty where none fits; and a hint for people, or nothing. Local.

    Parameters
    ----------
    library : str
        What ``MPI.Get_library_version()`` says.
    offered : sequence of str
        What srun offers.
    """
    name, wanted = _wanted(library, offered)
    for kind in wanted:
        if kind in offered:
            return kind, ""
    listed = ", ".join(offered) if offered else "nothing"
    needs = f"{name} wants --mpi={' or '.join(wanted)}" if wanted else f"there is {name}"
    return (
        "",
        f"mpi-type: {needs}, srun --mpi=list has {listed}; set MPI_TYPE, load another MPI, or start with its mpiexec",
    )


def _wanted(library: str, offered: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return a name for people, and the types that the library understands, the best first."""
    if "Open MPI" in library:
        versions = sorted((kind for kind in offered if kind.startswith("pmix_v")), key=lambda kind: int(kind[6:]))
        return "Open MPI", ("pmix", *reversed(versions))
    if "CRAY MPICH" in library.upper():
        return "Cray MPICH", ("cray_shasta", "pmi2")
    for name in ("Intel(R) MPI", "MVAPICH", "MPICH"):
        if name in library:
            return name, ("pmi2",)
    first = library.replace("\0", "").strip().partition("\n")[0][:60]
    return f"an MPI library that is not known here ({first})", ()
