"""A program in a batch job, until it has finished: signals are forwarded, after interruptions and crashes it starts again.

The program saves in ``RUN/checkpoints`` (`mpi_ef.Store`), and writes ``RUN/requeue`` when it has stopped before its end
(`mpi_ef.Stopper.mark_requeue`); that, and its exit status, is all that is known of it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from mpi_ef.documents import MARK, read, shown, written
from mpi_ef.errors import DataError

from .batch import BatchJob, write

__all__ = ["Child", "Supervisor", "newest_step", "report"]

LEAD_SECONDS = 60.0  # before the deadline the program is asked to stop, if nothing else has done it
ROOM_SECONDS = 60.0  # a job that has less for its start and its training is told so
HASTY_STOPS = 3  # so many in a row, each with less training than its start took, end a run
WRONG = 2  # exit status for wrong options or data, which another attempt does not mend
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def report(job: str, text: str) -> None:
    """Write a line to the log of a job; a log that is gone or full ends nothing. Local."""
    write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} job {job}: {text}\n")


class Child:
    """A program that gets the signals of this process. Local; in the main thread.

    Whichever arrives, it gets `forward`, a name without SIG; no signal for "none", where it would end it.
    """

    def __init__(self, forward: str = "USR2") -> None:
        self.forward = forward
        self.asked = False  # whether a signal has arrived that requests a stop
        self.asked_at: float | None = None  # when, in seconds since 1970
        self.interrupted = False  # SIGINT or SIGHUP has arrived: the terminal, or the batch system, ends all processes
        self._pid: int | None = None
        self._pending = False

    def listen(self) -> None:
        """Handle signals from now on, also those that were blocked and have arrived before."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, the status of a program is lost
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self._on_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def run(self, command: Sequence[str], deadline: float | None = None) -> int:
        """Start a program, wait for its end, and return its exit status; 128 and its number where a signal ended it."""
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603
        except OSError as error:
            write(2, f"mpi-ef: {command[0]}: {error.strerror}\n")
            return 127 if isinstance(error, FileNotFoundError) else 126
        self._pid = process.pid
        if self._pending:
            self._deliver()
        due = None if deadline is None or deadline - LEAD_SECONDS <= time.time() else deadline - LEAD_SECONDS
        # The process stays a zombie until _pid is forgotten: no signal goes to another one with its number.
        # A call that blocks until the end would not see a signal that comes just before it.
        pause = 0.001
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if due is not None and time.time() >= due:  # by the clock, which may be set meanwhile
                due = None
                if not self.asked:  # it may be saving, and take no more signals
                    self._deliver()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        self._pid = None
        status = process.wait()
        return status if status >= 0 else 128 - status

    def ask(self) -> None:
        """Note a request to stop."""
        self.asked = True
        self.asked_at = self.asked_at or time.time()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.ask()
        self._deliver()

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.interrupted = True

    def _deliver(self) -> None:
        self._pending = self._pid is None
        if self._pid is not None and self.forward != "none":
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.Signals[f"SIG{self.forward}"])


def newest_step(run: Path) -> int:
    """Return the step of the newest whole checkpoint of a run; 0 without one. Local."""
    whole = [path for path in run.glob("checkpoints/step-*") if (path / "COMMIT").exists()]
    steps = [path.name.removeprefix("step-") for path in whole if not (path / "BAD").exists()]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


@dataclass(frozen=True)
class _Times:
    """When a launch was stopped, in seconds since 1970: what of the job's time went into its start and its training."""

    began: float
    stopped: float
    signalled: bool
    deadline: float | None = None
    first_step: float | None = None  # when that had ended
    last_step: float = 0.0

    @property
    def hasty(self) -> bool:
        """Whether there was less training than the start took. Without times of steps that is not known, and no."""
        return self.first_step is not None and self.last_step - self.first_step < self.first_step - self.began

    @property
    def tight(self) -> bool:
        """Whether the time limit may be the reason: hasty, or more time was left than used."""
        left = self.deadline is not None and self.stopped - self.began < self.deadline - self.stopped
        return self.hasty or (self.first_step is None and self.signalled and left)

    def __str__(self) -> str:
        came = "the signal came" if self.signalled else "it stopped"
        text = f"{came} {max(0.0, self.stopped - self.began):.0f} s after the start"  # clocks may be set
        if self.deadline is not None:
            left, limit = max(0.0, self.deadline - self.stopped), self.deadline - self.began
            text += f" and {left:.0f} s before the end of a job of {limit:.0f} s"
        if self.first_step is not None:
            trained, cost = self.last_step - self.first_step, self.first_step - self.began
            text += f", which trained for {trained:.0f} s after {cost:.0f} s until its first step"
        return text


def _steps_in(mark: str) -> tuple[float, float] | None:
    """Return when the first step had ended and when the last one had, as `Stopper.mark_requeue` says."""
    words = mark.partition("\n")[2].split()
    with suppress(ValueError):
        if words[:2] == ["steps", "from"] and len(words) == 5:
            return float(words[2]), float(words[4])
    return None


class Supervisor:
    """Decides what follows the end of a program. All calls are local.

    `child` listens already: after a signal the program is not started. `run` is the folder of the run, `scratch` one on the
    disks of the nodes, which is removed at the end.
    """

    def __init__(self, child: Child, job: BatchJob, run: Path, scratch: Path, *, max_restarts: int = 20) -> None:
        self.child, self.job, self.run, self.scratch = child, job, run, scratch
        self.max_restarts, self.report = max_restarts, partial(report, job.job)

    def supervise(self, command: Sequence[str], *, proof: str = "", deadline: float | None = None) -> int:
        """Run the program once; return the exit status of the job, 0 where it is started again.

        A run that has stopped, or crashed, goes on if it has a newer checkpoint than before, or if it had to stop before its
        first save, once. Three stops in a row with less training than the start took end it, too.

        Parameters
        ----------
        command : sequence of str
            The program, with its launcher.
        proof : str
            A file that a finished run has in its folder: launchers may return 0 without one.
        deadline : float, optional
            When the job has to end, in seconds since 1970.
        """
        mark, chance, child = self.run / "requeue", self.run / "no-progress", self.child
        _remove(mark)
        before, started = newest_step(self.run), not (child.asked or child.interrupted)
        self._announce_room(deadline)
        status = child.run(command, deadline) if started else 0
        after, failed, proven = newest_step(self.run), status or 1, (self.run / proof).exists()
        why = f"status {status}" if started else "a signal came before the program was started"
        if started and status == 0 and not proven:
            why += f", and there is no {self.run / proof}"
        steps = None
        with suppress(OSError, ValueError):
            text = read(mark, MARK).decode("utf-8", "replace").strip()
            why, steps = shown(" ".join(text.partition("\n")[0].split())), _steps_in(text)
        if started and status == 0 and not mark.exists() and proven:
            self.report("done")
            return self.end(0)
        if status == WRONG:
            self.report("options, data or checkpoints are wrong (status 2): not started again")
            return self.end(WRONG)
        asked = child.asked or self.job.preempted()
        if state := self.job.ending():
            self.report(f"Slurm is ending this job ({state}) and decides whether it starts again")
            return failed
        times = self._times(steps, deadline)
        blame = f"{times}: {self.job.more_time}" if times.tight and not self.job.preempted() else ""
        if child.interrupted:
            self.report(f"interrupted at step {after}: not started again")
        elif after == before and (not asked or chance.exists()):
            self.report(f"no progress since step {before} ({why}): not started again{blame and f'; {blame}'}")
        else:
            if after == before:
                chance.touch()  # stopped before its first save: accepted once
            else:
                chance.unlink(missing_ok=True)
            self.report(f"stopped at step {after}: {why}")
            if self._may_restart(times, blame):
                return self._restart()
        return self.end(failed)

    def _may_restart(self, times: _Times, blame: str) -> bool:
        """Return whether stops in a row and restarts are few enough, and report what there is to say."""
        hasty = self._count_hasty(times.hasty and bool(blame))
        if hasty == HASTY_STOPS:
            why = f"stopped {hasty} times in a row before it has trained for as long as its start took"
            self.report(f"not started again: {why}; {blame}")
            return False
        if blame and hasty <= 1:
            self.report(blame)
        if self.job.restarts < self.max_restarts:
            return True
        self.report(f"not started again: MAX_RESTARTS={self.max_restarts} is reached")
        return False

    def _announce_room(self, deadline: float | None) -> None:
        """Report a time limit that leaves next to nothing for the training."""
        name, lead = self.job.lead() or ("", 0)
        left = 0.0 if deadline is None else deadline - time.time()
        room = left - max(lead, LEAD_SECONDS)
        if left > 0 and room < ROOM_SECONDS:
            early = f"{name} of its script comes {lead} s" if lead > LEAD_SECONDS else f"training stops {LEAD_SECONDS:.0f} s"
            unless = ", unless sbatch was given another --signal" if lead > LEAD_SECONDS else ""
            self.report(f"the job ends in {left:.0f} s and {early} before that: {max(0.0, room):.0f} s are left for start "
                        f"and training; ask for more time{' or a shorter lead' if unless else ''}{unless}")

    def _times(self, steps: tuple[float, float] | None, deadline: float | None) -> _Times:
        first, last = steps or (None, 0.0)
        stopped = self.child.asked_at or last or time.time()
        return _Times(self.job.began, stopped, self.child.asked, deadline, first, last)

    def _count_hasty(self, hasty: bool) -> int:
        """Return how many stops in a row were hasty, this one included."""
        file = self.run / "hasty-stops"
        count = 0
        with suppress(OSError, ValueError):
            count = int(read(file, MARK))
        count = count + 1 if hasty else 0
        if 0 < count < HASTY_STOPS:
            with suppress(OSError, ValueError), written(file) as descriptor:  # it counts from 0 again then
                os.write(descriptor, f"{count}\n".encode())
        else:
            _remove(file)  # of a run that is submitted again, for longer, none count
        return count

    def end(self, status: int) -> int:
        """Tidy up after the last attempt, and return the exit status of the job."""
        self.tidy()
        if problem := self.job.ended(self.run, status):
            self.report(problem)
        return status

    def tidy(self) -> None:
        """Remove the folder on the disks of the nodes."""
        if not self.job.tidy(self.scratch):
            self.report(f"{self.scratch} is still there on some nodes")

    def _restart(self) -> int:
        self.tidy()
        if not self.job.restart(self.run):
            self.report(self.job.refused.format(run=self.run))
            return 1
        if self.job.restarted:
            self.report(f"{self.job.restarted}, restart {self.job.restarts + 1} of at most {self.max_restarts}")
        return 0


def _remove(mark: Path) -> None:
    """Remove the mark that an earlier attempt has left; `DataError` for what cannot be removed so, such as a folder."""
    try:
        mark.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{shown(mark)}: is in the way of the mark of a run that is to go on ({error.strerror}); move "
                        "it") from None
