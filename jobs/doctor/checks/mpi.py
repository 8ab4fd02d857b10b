"""The MPI library: which one it is, whether it starts, what it can do."""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context, lines_of
from mpi_ef.jobs.doctor.watchdog import run_python

__all__ = ["collect", "facts_of_library", "facts_of_process", "judge", "name_of", "start"]

# Name, its words in the version text, the ABI.
_LIBRARIES = (
    ("Open MPI", r"(?:Open|Spectrum) MPI v?([\w.]+)", "openmpi"),
    ("Cray MPICH", r"CRAY MPICH version ([\w.]+)", "mpich"),
    ("Intel MPI", r"Intel\(R\) MPI Library ([\w.]+)", "mpich"),
    ("MVAPICH", r"MVAPICH\S*\s+Version\s*:\s*([\w.]+)", "mpich"),
    ("MPICH", r"MPICH Version\s*:\s*([\w.]+)", "mpich"),
)


def collect(context: Context) -> Facts:
    """Return the facts with which MPI was started, before any check. Local."""
    return {"launched": context.launcher is not None, "installed": find_spec("mpi4py") is not None, **context.mpi}


def facts_of_library() -> Facts:
    """Load the MPI library and return its version text, ABI and file, without a start of MPI. Local."""
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    text = MPI.Get_library_version().split("\x00")[0]
    known = ((name, re.search(pattern, text, re.IGNORECASE), abi) for name, pattern, abi in _LIBRARIES)
    named = ((name, match[1], abi) for name, match, abi in known if match)
    library, release, abi = next(named, (" ".join(text.split())[:60], "", "unknown"))
    # The library's file is empty where the system has no list.
    files = (line.split(maxsplit=5)[-1] for line in lines_of("/proc/self/maps") if "libmpi" in line)
    file = next((file for file in files if re.search(r"/libmpi(ch)?(_\w+)?\.so[\d.]*$", file)), "")
    return {"library": library, "release": release, "abi": abi, "built_for": _built_for(MPI), "file": file,
            "standard": ".".join(map(str, MPI.Get_version()))}


def start() -> Facts:
    """Start MPI as mpi4py does, and return what it can do. Collective; MPI may end the process."""
    import mpi4py
    from mpi4py import MPI

    if not MPI.Is_initialized():
        if mpi4py.rc.threads:
            MPI.Init_thread(getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}"))
        else:
            MPI.Init()
    return {"threads": MPI.Query_thread(), "large": _large_counts(MPI), "size": MPI.COMM_WORLD.Get_size()}


def _built_for(module: Any) -> str:
    """Return the ABI that mpi4py's extension module was built for."""
    middle = Path(module.__file__).name.split(".")[1]
    if middle in ("mpich", "openmpi", "mpiabi"):
        return middle
    vendor = str(module.get_vendor()[0])
    return "openmpi" if vendor in ("Open MPI", "Spectrum MPI") else "mpich" if "MPI" in vendor.upper() else "unknown"


def _large_counts(module: Any) -> bool:
    """Return whether one call takes more than 2^31 entries: so many of nothing, from this rank to itself."""
    try:
        nothing = module.BYTE.Create_contiguous(0).Commit()
        message, target = ([bytearray(8), (1 << 31) + 8, nothing] for _ in range(2))
        module.COMM_SELF.Sendrecv(message, 0, recvbuf=target, source=0)
        nothing.Free()
    except (OverflowError, ValueError, module.Exception):
        return False
    return True


_CHILD = """
import json
from mpi_ef.jobs.doctor.checks import mpi
print("facts", json.dumps(mpi.facts_of_library()), flush=True)
print("facts", json.dumps(mpi.start()), flush=True)
"""


def facts_of_process(seconds: float) -> Facts:
    """Return the facts of another process: without a launcher some MPIs end the process that starts them. Local.

    When MPI did not start, they include why, as "problem"; and "ended" when it has ended the process.
    """
    status, printed, errors = run_python(_CHILD, seconds, os.environ)
    parts = [json.loads(line.removeprefix("facts ")) for line in printed.splitlines() if line.startswith("facts ")]
    facts: Facts = {name: value for part in parts for name, value in part.items()}
    if len(parts) == 2:
        return facts
    if any("Traceback" in line for line in errors):
        return facts | {"problem": errors[-1][:300]}
    first = next((line for line in errors if "MPI" in line or "PMI" in line), errors[0])
    return facts | {"problem": first if status is None else f"exit status {status}: {first[:200]}", "ended": True}


def name_of(facts: Any) -> str:
    """Return name and release of a library."""
    return f"{facts.get('library', '')} {facts.get('release', '')}".strip()


def judge(ranks: Ranks) -> Findings:
    """Yield whether there is an MPI library, and whether it is one for all ranks."""
    first = ranks[0]
    if not first["installed"]:
        yield finding("mpi4py-missing")
    elif first["ended"]:
        yield finding("mpi-singleton", ranks, name=name_of(first) or "MPI")
    elif first["problem"] is not None:
        yield finding("mpi-missing", ranks, severe=first["launched"])
    else:
        yield from _judge_library(ranks)


def _judge_library(ranks: Ranks) -> Findings:
    kinds, files = ranks.by_value("library"), ranks.by_value("file")
    if len(kinds) == 1:
        kinds = ranks.by_value("release")
    if len(kinds) > 1 or len(files) > 1:
        groups = (files if len(files) > 1 else kinds).values()
        names = [f"{name_of(some[0])} from {some[0]['file']}{some.where}" for some in groups]
        yield finding("mpi-differs", severe=len(kinds) > 1, libraries="; ".join(names))
    yield finding("mpi", ranks, name=name_of(ranks[0]), file=ranks[0]["file"] or "file unknown")
    for some in files.values():
        built, abi = some[0]["built_for"], some[0]["abi"]
        if "unknown" not in (built, abi) and built not in (abi, "mpiabi"):
            yield finding("mpi-abi", Ranks(some[:1]))
    lowest = min(one["threads"] for one in ranks)
    level = ("single", "funneled", "serialized", "multiple")[lowest]
    low = ranks.which(lambda one: one["threads"] == lowest)
    yield finding("thread-level", low, level=level) if lowest < 2 else finding("thread-level.ok", level=level)
    yield finding("large-counts.ok" if ranks[0]["large"] else "large-counts.none", ranks)
