"""Starting whole MPI programs from a test, under a time limit."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import patience
import resident

BESIDE = Path(sys.executable).parent / "mpiexec"
TMPDIR_OF_PRTE = "PRTE_MCA_prte_tmpdir_base"  # Open MPI's launcher; tests/conftest.py sets it
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec") or "mpiexec"


@dataclass
class Ended:
    """A program that has ended: exit status, everything it printed, and how long it took."""

    status: int
    text: str
    seconds: float

    def lines_with(self, words: str) -> list[str]:
        return [line for line in self.text.splitlines() if words in line]


# Read while Python starts or modules are imported, which a fork of the resident process has behind it.
READ_EARLY = ("MPI4PY_", "NUMBA_", "OMP_", "PYTHON")


def start(n: int, *arguments: object, launcher: Sequence[str] = (), before: Sequence[str] = (), real: bool = False,
          **environment: str) -> subprocess.Popen[str]:
    """Start ``python ARGUMENTS`` on `n` ranks, with more options for the launcher, and what comes before Python.

    They are forks of a resident process, which saves their imports (see resident.py), unless `real` ones are asked for.

    Their output is buffered by lines, also where PYTHONUNBUFFERED is set: Python would write a line and its end apart then,
    and MPICH's launcher puts what other ranks print between the two.
    """
    _remove_folders_of_dead_launchers()
    real = real or any(name.startswith(READ_EARLY) for name in environment)
    environment = {"PYTHONUNBUFFERED": ""} | environment
    command = [MPIEXEC, *launcher, "-n", str(n), *before, *resident.command(*arguments, real=real)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                            env=os.environ | environment, start_new_session=True)


def _remove_folders_of_dead_launchers() -> None:
    """Make room for an mpiexec that is given the process number of one that was killed; see conftest.py."""
    for folder in Path(os.environ.get(TMPDIR_OF_PRTE, "/nowhere")).glob("*.[0-9]*"):
        if not Path("/proc", folder.suffix[1:]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def finish(process: subprocess.Popen[str], *, within: float) -> Ended:
    """Wait for a program; one that takes longer than `within` seconds on a quiet machine is killed and fails the test."""
    began = time.perf_counter()
    try:
        text, _ = process.communicate(timeout=patience.limit(within))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        text, _ = process.communicate()
        raise AssertionError(f"no end within {patience.explained(within)}; the program printed:\n{text}") from None
    return Ended(process.returncode, text, time.perf_counter() - began)


def run(n: int, *arguments: object, within: float = 120, real: bool = False, **environment: str) -> Ended:
    """Start a program and wait for its end."""
    return finish(start(n, *arguments, real=real, **environment), within=within)


def run_alone(*arguments: object, within: float) -> Ended:
    """Start ``python ARGUMENTS`` without a launcher, for ranks that it forks itself and that meet over gloo."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(resident.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", env=environment, start_new_session=True)
    return finish(process, within=within)
