"""Starting whole MPI programs from a test, under a time limit."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def start(n: int, *arguments: object, launcher: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """Start ``python ARGUMENTS`` on `n` ranks, with more options for the launcher.

    Their output is buffered by lines, also where PYTHONUNBUFFERED is set: Python would write a line and its end apart then,
    and MPICH's launcher puts what other ranks print between the two.
    """
    _remove_folders_of_dead_launchers()
    environment = {"PYTHONUNBUFFERED": ""} | environment
    command = [MPIEXEC, *launcher, "-n", str(n), sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                            env=os.environ | environment, start_new_session=True)  # fmt: skip


def _remove_folders_of_dead_launchers() -> None:
    """Make room for an mpiexec that is given the process number of one that was killed; see conftest.py."""
    for folder in Path(os.environ.get(TMPDIR_OF_PRTE, "/nowhere")).glob("*.[0-9]*"):
        if not Path("/proc", folder.suffix[1:]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def finish(process: subprocess.Popen[str], *, within: float) -> Ended:
    """Wait for a program; one that takes longer than `within` seconds is killed and fails the test."""
    began = time.perf_counter()
    try:
        text, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        text, _ = process.communicate()
        raise AssertionError(f"the program hangs; it printed:\n{text}") from None
    return Ended(process.returncode, text, time.perf_counter() - began)


def run(n: int, *arguments: object, within: float = 120, **environment: str) -> Ended:
    """Start a program and wait for its end."""
    return finish(start(n, *arguments, **environment), within=within)
