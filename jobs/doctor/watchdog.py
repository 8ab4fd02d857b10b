"""Limits for what may hang: checks of a rank, calls of MPI, ranks that do not answer, other processes."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, cast

import mpi_ef
from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.doctor.finding import FAILED, Facts
from mpi_ef.runtime.timeouts import wait_until

__all__ = ["ExitMessage", "NoAnswerError", "RankPoller", "Watchdog", "error_text", "run_python", "run_with_timeout"]

_ANSWER, _REPLY = 7101, 7102  # tags
_REST_SECONDS = 0.002


def error_text(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run_with_timeout(action: Callable[[], Facts], seconds: float) -> Facts:
    """Return what `action` returns, or why it does not: an error, or no end within a time. Local.

    It runs in a thread, which is left behind when it does not come back: a dead file system would hold it for ever.
    """
    results: list[Facts] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # also SystemExit: whatever it is, it is a finding
            results.append({FAILED: error_text(error)})

    thread = threading.Thread(target=run, daemon=True, name="check")
    thread.start()
    thread.join(seconds)
    return results[0] if results else {FAILED: f"no end after {seconds:.0f} s{_load()}"}


def _load() -> str:
    """Return how busy the machine is, where that may be why something has no end."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return f", at a load of {load:.0f} on {cores} cores" if load > 2 * cores else ""


def run_python(program: str, seconds: float, environment: Mapping[str, str]) -> tuple[int | None, str, list[str]]:
    """Run a program that may import this mpi_ef in another process. Local.

    Returns its exit status, None when it had no end; what it printed; and the lines of its errors, at least one.
    """
    paths = filter(None, [str(Path(mpi_ef.__file__).resolve().parents[1]), environment.get("PYTHONPATH")])
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, and a program of ours
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds, check=False,
            errors="replace", env={**environment, "PYTHONPATH": os.pathsep.join(paths)})
    except subprocess.TimeoutExpired:
        return None, "", [f"no end after {seconds:.0f} s"]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, done.stdout, lines or ["no reason given"]


class NoAnswerError(RuntimeError):
    """Some ranks, which are in `ranks`, did not answer."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"no answer from {ranks_text(ranks)}")
        self.ranks = ranks


class RankPoller:
    """Messages to rank 0 and back that find the ranks that are missing, which a collective of MPI cannot.

    Without a communicator this is the only rank.
    """

    def __init__(self, comm: "MpiComm | None") -> None:
        self._comm = cast("MpiComm", comm)
        self.rank, self.size = (comm.Get_rank(), comm.Get_size()) if comm is not None else (0, 1)
        self._sent: list[Any] = []  # requests, and with them what is under way

    def exchange(self, answer: Any, seconds: float, reply: Callable[[list[Any]], Any]) -> Any:
        """Send the answers of all ranks to rank 0, and to all ranks the `reply` that it makes of them. Collective.

        Both can be pickled. Raises `NoAnswerError` on rank 0 when others are missing after so many seconds; on others, which
        wait longer, when rank 0 is.
        """
        if self.rank:
            self._sent.append(self._comm.isend((self.rank, answer), 0, _ANSWER))
            if not wait_until(lambda: bool(self._comm.iprobe(0, _REPLY)), 2 * seconds + 10, rest=_REST_SECONDS):
                raise NoAnswerError([0])
            return self._comm.recv(source=0, tag=_REPLY)
        answers = {0: answer}

        def complete() -> bool:
            while len(answers) < self.size and (message := self._comm.improbe(tag=_ANSWER)) is not None:
                rank, theirs = message.recv()
                answers[rank] = theirs
            return len(answers) == self.size

        if not wait_until(complete, seconds, rest=_REST_SECONDS):
            raise NoAnswerError([rank for rank in range(self.size) if rank not in answers])
        value = reply([answers[rank] for rank in range(self.size)])
        self._sent += [self._comm.isend(value, rank, _REPLY) for rank in range(1, self.size)]
        return value

    def sent(self, seconds: float) -> bool:
        """Return whether all messages of this rank have left in time. Local."""
        return wait_until(lambda: all(request.Test() for request in self._sent), seconds, rest=_REST_SECONDS)


class ExitMessage:
    """A text, if any, that another process prints when this one has ended, in whatever way, before :meth:`cancel`."""

    def __init__(self, text: str = "") -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if text:
            command = ["/bin/sh", "-c", 'read -r line || printf "%s\\n" "$1"', "sh", text]
            with suppress(OSError):
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603 - a shell, a text of ours

    def cancel(self) -> None:
        """Print nothing."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate(b"cancelled\n")


class Watchdog:
    """Ends this process when a call does not come back, as calls of MPI may, after ``on_timeout(call)``.

    With `grace_seconds` it waits longer than others, of which one is to print before the launcher ends all.
    """

    def __init__(self, on_timeout: Callable[[str], None], grace_seconds: float = 0.0) -> None:
        self._on_timeout, self._grace = on_timeout, grace_seconds
        self.leave()
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def enter(self, call: str, seconds: float) -> None:
        """Begin a call that may take so long."""
        self._call, self._limit = call, monotonic() + seconds + self._grace

    def leave(self) -> None:
        """End the call."""
        self.enter("", float("inf"))

    def _run(self) -> None:
        while monotonic() < self._limit:
            sleep(0.1)
        try:
            self._on_timeout(self._call)
            sys.stdout.flush()
            sleep(0.5)  # the launcher passes on what was printed
        finally:
            os._exit(1)
