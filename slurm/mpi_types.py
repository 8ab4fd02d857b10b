"""What srun offers to MPI libraries (``srun --mpi=list``), and which of it a library understands."""

import re
from collections.abc import Sequence

__all__ = ["choose", "offered_by", "wanted"]

_NAMES = re.compile(r"(?<![\w/.-])(none|pmi2|cray_shasta|openmpi|pmix(?:_v\d+)?)(?![\w/-])")

# Name, its words, the types that it understands; one that is another in disguise comes first.
_LIBRARIES = (
    ("Open MPI", re.compile("(?:Open|Spectrum) MPI"), ("pmix",)),
    ("Cray MPICH", re.compile("CRAY MPICH", re.IGNORECASE), ("cray_shasta", "pmi2")),
    ("Intel MPI", re.compile(r"Intel(?:\(R\))? MPI"), ("pmi2",)),
    ("MVAPICH", re.compile("MVAPICH"), ("pmi2",)),
    ("MPICH", re.compile("MPICH"), ("pmi2",)),
)


def offered_by(text: str) -> tuple[str, ...]:
    """Return the types in what ``srun --mpi=list`` prints, of any version of Slurm. Local."""
    return tuple(dict.fromkeys(_NAMES.findall(text)))


def choose(library: str, offered: Sequence[str]) -> tuple[str, str]:
    """Return the --mpi of srun for an MPI library, empty where none fits; and a hint, or nothing. Local.

    Parameters
    ----------
    library : str
        What ``MPI.Get_library_version()`` says.
    offered : sequence of str
        What srun offers.
    """
    name, kinds = wanted(library, offered)
    for kind in kinds:
        if kind in offered:
            return kind, ""
    listed = ", ".join(offered) if offered else "nothing"
    needs = f"{name} wants --mpi={' or '.join(kinds)}" if kinds else f"there is {name}"
    return "", f"mpi-type: {needs}, srun --mpi=list has {listed}; set MPI_TYPE, load another MPI, or start with its mpiexec"


def wanted(library: str, offered: Sequence[str] = ()) -> tuple[str, tuple[str, ...]]:
    """Return a readable name of a library, and the types that it understands, the best first; none if unknown. Local.

    Parameters
    ----------
    library : str
        What ``MPI.Get_library_version()`` says, or a name that this has returned.
    offered : sequence of str
        What srun offers: some sites have Open MPI's type with numbers of versions only.
    """
    for name, word, kinds in _LIBRARIES:
        if word.search(library):
            versions = (kind for kind in offered if kind.startswith("pmix_v")) if "pmix" in kinds else ()
            return name, (*kinds, *sorted(versions, key=lambda kind: -int(kind[6:])))
    first = library.replace("\0", "").strip().partition("\n")[0][:60]
    return f"an MPI library that is not known here ({first})", ()
