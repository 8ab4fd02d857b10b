"""Asking all ranks without waiting for ever: a roll call, a limit for what runs on one rank, a watch over MPI calls."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

__all__ = ["FAILED", "LastWord", "Roll", "SilenceError", "Watch", "bounded", "wait_for"]

FAILED = "failed"  # the fact that stands for all others where a check has raised or has not come back
_ANSWER, _WORD = 7101, 7102  # tags
_LOOK_SECONDS = 0.002


class SilenceError(RuntimeError):
    """Ranks did not answer.

    Attributes
    ----------
    ranks : list of int
    """

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"no answer from {ranks}")
        self.ranks = ranks


def bounded(action: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return what `action` returns, or why it does not: an error, or no end within a time. Local.

    It runs in a thread, which is left behind when it does not come back: a dead file system would hold it for ever.
    """
    results: list[dict[str, Any]] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # also SystemExit: whatever it is, it is a finding
            results.append({FAILED: f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})

    thread = threading.Thread(target=run, daemon=True, name="check")
    thread.start()
    thread.join(seconds)
    return results[0] if results else {FAILED: f"no end after {seconds:.0f} s"}


def wait_for(done: Callable[[], bool], seconds: float, *, rest: float = 0.0) -> bool:
    """Ask again and again whether something is done, and tell whether it was in time. Local.

    Parameters
    ----------
    done : callable
    seconds : float
    rest : float
        Seconds between two questions; 0 asks at once again, but lets others have the core.
    """
    limit = monotonic() + seconds
    while not done():
        if monotonic() > limit:
            return False
        if rest:
            sleep(rest)
        else:
            os.sched_yield()
    return True


class Roll:
    """Messages to rank 0 and back, for which nobody waits longer than was said.

    Collectives of MPI cannot tell who is missing; messages between two ranks can.

    Parameters
    ----------
    comm : MPI.Comm
    """

    def __init__(self, comm: Any) -> None:
        self._comm, self.rank, self.size = comm, int(comm.Get_rank()), int(comm.Get_size())
        self._sent: list[Any] = []  # requests, and with them what is under way

    def call(self, answer: Any, seconds: float, word: Callable[[list[Any]], Any]) -> tuple[list[Any], Any]:
        """Bring the answers of all ranks to rank 0, and the word that it makes of them to all ranks. Collective.

        Parameters
        ----------
        answer : picklable
        seconds : float
            How long rank 0 waits for the others.
        word : callable
            Called on rank 0 with the answers in the order of ranks; returns something picklable.

        Returns
        -------
        answers : list
            Empty on other ranks than 0.
        word

        Raises
        ------
        SilenceError
            On rank 0 when others are missing; on others when rank 0 is.
        """
        if self.rank:
            self._sent.append(self._comm.isend((self.rank, answer), 0, _ANSWER))
            if not wait_for(lambda: bool(self._comm.iprobe(0, _WORD)), 2 * seconds + 10, rest=_LOOK_SECONDS):
                raise SilenceError([0])
            return [], self._comm.recv(source=0, tag=_WORD)
        answers = {0: answer} | self._collect(seconds)
        missing = [rank for rank in range(self.size) if rank not in answers]
        if missing:
            raise SilenceError(missing)
        ordered = [answers[rank] for rank in range(self.size)]
        told = word(ordered)
        self._sent += [self._comm.isend(told, rank, _WORD) for rank in range(1, self.size)]
        return ordered, told

    def _collect(self, seconds: float) -> dict[int, Any]:
        answers: dict[int, Any] = {}

        def all_there() -> bool:
            while (message := self._comm.improbe(tag=_ANSWER)) is not None:
                rank, answer = message.recv()
                answers[rank] = answer
            return len(answers) == self.size - 1

        wait_for(all_there, seconds, rest=_LOOK_SECONDS)
        return answers

    def sent(self, seconds: float) -> bool:
        """Tell whether all messages of this rank have left in time. Local."""
        return wait_for(lambda: all(request.Test() for request in self._sent), seconds, rest=_LOOK_SECONDS)


class LastWord:
    """A text that another process prints when this one has ended, however it was ended, before :meth:`take_back`.

    Parameters
    ----------
    text : str
        Nothing is printed when it is empty.
    """

    _SHELL = 'read -r word || printf "%s\\n" "$1"'

    def __init__(self, text: str) -> None:
        self._other: subprocess.Popen[bytes] | None = None
        if text:
            with suppress(OSError):
                command = ["/bin/sh", "-c", self._SHELL, "sh", text]
                self._other = subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603 - a shell, and a text of ours

    def take_back(self) -> None:
        """Let the text not be printed."""
        other, self._other = self._other, None
        if other is not None:
            other.communicate(b"taken back\n")


class Watch:
    """Ends this process when a call does not come back, as calls of MPI may.

    Parameters
    ----------
    last_words : callable
        Called with what hangs; prints what is known so far.
    grace_seconds : float
        How much longer than others this process waits: one of them is to speak before the launcher ends all.
    """

    def __init__(self, last_words: Callable[[str], None], grace_seconds: float = 0.0) -> None:
        self._last_words, self._grace = last_words, grace_seconds
        self._what, self._limit = "", float("inf")
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def enter(self, what: str, seconds: float) -> None:
        """Say what begins now, and how long it may take."""
        self._what, self._limit = what, monotonic() + seconds + self._grace

    def leave(self) -> None:
        """Say that nothing is watched any more."""
        self._limit = float("inf")

    def _run(self) -> None:
        while monotonic() < self._limit:
            sleep(0.1)
        try:
            self._last_words(self._what)
            sys.stdout.flush()
            sleep(0.5)  # the launcher passes on what was printed
        finally:
            os._exit(1)
