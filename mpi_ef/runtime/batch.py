"""Jobs of batch systems, as a supervisor needs them: Slurm, a chain of Slurm jobs, PBS, LSF."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mpi_ef.documents import MARK, lines, read, shown, written
from mpi_ef.errors import LaunchError

__all__ = ["BatchJob", "Chain", "Lsf", "Pbs", "Slurm", "find_job", "run_command", "write"]

Command = Callable[..., tuple[int, str]]

_PATIENCE = 120.0  # seconds for what is asked of a batch system: one that hangs must not take the time of the job

# On each node, with $1 the scratch folder, which nobody else may have made or write to.
_PRIVATE = """umask 077 && mkdir -p -- "$1" && [[ -O $1 && ! -L $1 && $(stat -c %a -- "$1") == *00 ]]"""
# With $2 a file to copy there, or nothing.
_PREPARE = f"""{_PRIVATE} && if [[ -n $2 ]]; then
    cp -- "$2" "$1/text.$SLURM_NODEID" && mv -- "$1/text.$SLURM_NODEID" "$1/text"; fi"""
# On each rank. Launchers add lines of their own, and many where a status is not 0.
_TELL = f"""{{ {_PRIVATE}; }} 2>/dev/null || echo "not private on:$HOSTNAME:" """
_LAUNCH_SECONDS = 60.0


def run_command(words: Sequence[str], timeout: float | None = None, given: str = "") -> tuple[int, str]:
    """Return exit status and output of a command that reads `given`; 127 where there is none, 124 after `timeout`. Local.

    Bytes that are no text are shown escaped: `qstat -f` prints variables of users.
    """
    try:
        ended = subprocess.run(words, input=given, stdout=subprocess.PIPE, text=True, errors="backslashreplace",  # noqa: S603
                               check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return 124, ""
    except OSError:
        return 127, ""
    return ended.returncode, ended.stdout


def write(file: int, text: str) -> None:
    """Write to a file descriptor; one that is gone or full ends nothing. Local."""
    with suppress(OSError):
        os.write(file, text.encode("utf-8", "backslashreplace"))  # names of files may be no text


def _whole(text: str | None, otherwise: int = 0) -> int:
    """Return the number in a variable; `otherwise` where there is none."""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else otherwise


class BatchJob:
    """A job of a batch system. All calls are local.

    Parameters
    ----------
    environ : mapping of str to str
        Variables of the job; what a job that goes on has to know is added.
    command : callable
        Runs a command of the batch system, in words, with a timeout in seconds; returns exit status and output.
    """

    variables: tuple[str, str] = "", ""  # of the number and of the name
    forward = "USR2"  # the signal, without SIG, that launchers forward to all ranks
    restarted = "requeued"  # the reports of a restart, and of one that is refused ({run} is the folder of the run)
    refused = "cannot be requeued; submit it again with RUN_DIR={run}"
    more_time = "ask for more time"  # what to do where the time of a job is over before it has trained

    def __init__(self, environ: MutableMapping[str, str], command: Command = run_command) -> None:
        self.environ, self.command = environ, command
        self.began = time.time()  # when the job has started, in seconds since 1970, as far as that is known
        self.script: Path | None = None  # of the job
        number, name = self.variables
        self.id = environ[number].partition(".")[0]  # of no other job, nor task of an array
        self.job = self.number = self.id  # for commands of the batch system; common to the tasks of an array
        self.name = environ.get(name, "mpi-ef")  # as the user has given it
        self.folder = ""  # where it was submitted; empty where it has started there
        self.disk = "/tmp"  # noqa: S108  # a folder on the disk of each node
        self.threads = "1"  # of a rank
        self.restarts = 0  # how often it was started again; of LSF known after begin()
        self.arguments: list[str] = environ.get("ARGS", "").split()  # are added to those of the program

    def begin(self, run: Path) -> None:
        """Prepare for a restart, in the folder of the run."""

    def finished(self, run: Path) -> bool:
        """Return whether an earlier job has finished what this one is for."""
        return False

    def deadline(self) -> int | None:
        """Return when the job has to end, in seconds since 1970; None where that is not known."""
        return None

    def lead(self) -> tuple[str, int] | None:
        """Return the option with which the job asks for a signal, and how many seconds before its end; None if unknown."""
        return None

    def launcher(self) -> list[str]:
        """Return the command that starts the ranks."""
        raise NotImplementedError

    def preempted(self) -> bool:
        """Return whether the batch system takes the nodes away and has signalled the ranks, not this process."""
        return False

    def ending(self) -> str:
        """Return the state of a job that the batch system is ending, and may start again; empty for others."""
        return ""

    def restart(self, run: Path) -> bool:
        """Start the job again, later; return whether that is accepted."""
        raise NotImplementedError

    def ended(self, run: Path, status: int) -> str:
        """Note that there will be no restart; return what went wrong with that."""
        return ""

    def prepare(self, scratch: Path, text: str) -> str | None:
        """Make a folder on the disks of all nodes, with a copy of `text`; return its path, None where that fails.

        The folder is this user's alone. Where nothing can be done on nodes it is left to :meth:`make_private`.
        """
        return text

    def make_private(self, scratch: Path, launch: Sequence[str]) -> str:
        """Make the folder by the launcher of the ranks, where :meth:`prepare` has not; return "", or why it is of no use."""
        status, output = self.command([*launch, "bash", "-c", _TELL, "prepare", str(scratch)], timeout=_LAUNCH_SECONDS)
        if status:
            return f"{scratch} cannot be made on the nodes ({shown(' '.join(launch))}: status {status})"
        nodes = shown(", ".join(sorted(set(re.findall("not private on:(.*?):", output)))))[:80]
        return f"{scratch} on {nodes} is not this user's alone, or cannot be made" if nodes else ""

    def tidy(self, scratch: Path) -> bool:
        """Remove that folder; return whether it is gone."""
        with suppress(OSError):
            status = scratch.lstat()
            if status.st_uid == os.geteuid() and not status.st_mode & 0o077:  # or it is none of this job
                shutil.rmtree(scratch, ignore_errors=True)
        return True

    def _done(self, *words: str) -> bool:
        """Run a command and show its output in the log; return whether it worked."""
        status, output = self.command(words, timeout=_PATIENCE)
        write(1, output)
        return status == 0


class Slurm(BatchJob):
    """A job of Slurm; see `BatchJob`. Without `srun`, where the site has a launcher of its own, that is all there is."""

    variables = "SLURM_JOB_ID", "SLURM_JOB_NAME"
    more_time = "ask for more time (--time), or for a shorter lead where --signal has sent it (B:USR2@SECONDS)"

    def __init__(self, environ: MutableMapping[str, str], command: Command = run_command) -> None:
        super().__init__(environ, command)
        self.began = float(_whole(environ.get("SLURM_JOB_START_TIME"))) or self.began  # since 23.02
        self.srun = True
        self.task = environ.get("SLURM_ARRAY_TASK_ID", "")
        if array := environ.get("SLURM_ARRAY_JOB_ID"):
            self.job, self.number = f"{array}_{self.task}", array
        self.threads = environ.get("SLURM_CPUS_PER_TASK") or "1"
        self.disk = environ.get("SLURM_TMPDIR") or self.disk
        self.restarts = _whole(environ.get("SLURM_RESTART_COUNT"))
        self.nodes = _whole(environ.get("SLURM_JOB_NUM_NODES"), 1)
        self.arguments = []
        # Since Slurm 22.05 srun does not inherit --cpus-per-task: each rank would get one core.
        environ["SRUN_CPUS_PER_TASK"] = self.threads

    def deadline(self) -> int | None:
        if known := _whole(self.environ.get("SLURM_JOB_END_TIME")):
            return known
        ends = self._squeue("--format=%e")  # Slurm before 23.02 has no such variable
        try:
            return int(datetime.fromisoformat(ends).timestamp())
        except ValueError:
            return None

    def lead(self) -> tuple[str, int] | None:
        """Return what the job's script, or SBATCH_SIGNAL, asks for. Slurm tells no job what it was given to sbatch."""
        asked = self.environ.get("SBATCH_SIGNAL", "")
        if not asked and self.script is not None:
            with suppress(OSError, ValueError):
                text = read(self.script, MARK, follow=True).decode("utf-8", "replace")
                found = re.findall(r"^#SBATCH\s+--signal[=\s]\s*(\S+)", text, re.MULTILINE)
                asked = found[-1] if found else ""
        seconds = _whole(asked.partition("@")[2] or "60", -1)
        return (f"--signal={shown(asked)}", seconds) if asked and seconds >= 0 else None

    def launcher(self) -> list[str]:
        return ["srun", "--kill-on-bad-exit=1"]

    def preempted(self) -> bool:
        return self._squeue("--Format=PreemptTime")[:1].isdecimal()

    def ending(self) -> str:
        state = self._squeue("--format=%T %r")
        goes_on = not state or state.startswith(("RUNNING", "SIGNALING")) or state == "COMPLETING TimeLimit"
        return "" if goes_on else state

    def restart(self, run: Path) -> bool:
        return self._done("scontrol", "requeue", self.job)

    def prepare(self, scratch: Path, text: str) -> str | None:
        if not self.srun:
            return text
        words = ["--kill-on-bad-exit=1", "bash", "-c", _PREPARE, "prepare", str(scratch), text]
        status, _ = self.command([*self._once_per_node(), *words])
        return (str(scratch / "text") if text else "") if status == 0 else None

    def make_private(self, scratch: Path, launch: Sequence[str]) -> str:
        return "" if self.srun else super().make_private(scratch, launch)

    def tidy(self, scratch: Path) -> bool:
        if not self.srun:
            return super().tidy(scratch)
        return self.command([*self._once_per_node(), "rm", "-rf", "--", str(scratch)], timeout=20)[0] == 0

    def _once_per_node(self) -> list[str]:
        return ["srun", "--mpi=none", f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1"]

    def _squeue(self, *words: str) -> str:
        self.environ["SLURM_TIME_FORMAT"] = "standard"
        status, output = self.command(["squeue", "--noheader", f"--jobs={self.job}", *words], timeout=_PATIENCE)
        return output.strip() if status == 0 else ""


class Chain(Slurm):
    """A task of an array of which one runs at a time; the next one goes on. See `BatchJob`."""

    restarted = ""
    refused = "the array ends here, the training does not: submit it again with RUN_DIR={run}"

    def begin(self, run: Path) -> None:
        self.restarts = -1  # the length of the array is the limit

    def finished(self, run: Path) -> bool:
        return (run / f"done-{self.number}").exists()

    def restart(self, run: Path) -> bool:
        return (self.task or "1") != self.environ.get("SLURM_ARRAY_TASK_MAX", "1")

    def ended(self, run: Path, status: int) -> str:
        if status == 0:
            (run / f"done-{self.number}").touch()
        elif not self._done("scancel", "--state=PENDING", self.number):
            return "the other tasks could not be cancelled"
        return ""


class Pbs(BatchJob):
    """A job of PBS Pro or OpenPBS, which submits another one to go on; see `BatchJob`."""

    variables = "PBS_JOBID", "PBS_JOBNAME"
    forward = "USR1"  # USR2 ends mpiexec of MPICH
    restarted = "submitted again"
    refused = "cannot be submitted again from here; do it by hand, with -v RUN_DIR={run}"
    more_time = "ask for more time (walltime)"
    passed = ("ARGS", "TEXT", "MPI_EF", "LAUNCH", "CHECKPOINT_EVERY", "MAX_RESTARTS", "NODE_DIR", "FORWARD")

    def __init__(self, environ: MutableMapping[str, str], command: Command = run_command) -> None:
        super().__init__(environ, command)
        self.folder = environ["PBS_O_WORKDIR"]
        self.restarts = _whole(environ.get("RESTARTS"))
        self.threads = environ.get("OMP_NUM_THREADS") or "1"  # PBS sets it to ompthreads

    def begin(self, run: Path) -> None:
        copy = run / "train.pbs"  # as PBS removes its own
        if self.script is not None and self.script.is_file() and not (copy.exists() and self.script.samefile(copy)):
            shutil.copy(self.script, copy)

    def deadline(self) -> int | None:
        _, output = self.command(["qstat", "-f", self.environ["PBS_JOBID"]], timeout=_PATIENCE)
        for line in output.splitlines():
            name, _, value = line.strip().partition(" = ")
            if name == "Resource_List.walltime":
                with suppress(ValueError):
                    hours, minutes, seconds = map(int, value.split(":"))
                    return int(time.time()) + 3600 * hours + 60 * minutes + seconds
        return None

    def launcher(self) -> list[str]:
        path = Path(self.environ.get("PBS_NODEFILE", ""))
        try:
            ranks = sum(1 for _ in lines(path))
        except (OSError, ValueError) as error:
            raise LaunchError(f"PBS_NODEFILE={path}: cannot be read ({shown(error)}); give the command that starts the "
                              "ranks, as LAUNCH") from None
        return ["mpiexec", "-n", str(ranks)]

    def restart(self, run: Path) -> bool:
        self.environ.update(RUN_DIR=str(run), RESTARTS=str(self.restarts + 1))
        names = ",".join(["RUN_DIR", "RESTARTS", *(name for name in self.passed if self.environ.get(name))])
        after = f"depend=afterany:{self.environ['PBS_JOBID']}"
        return self._done("qsub", "-W", after, "-v", names, str(run / "train.pbs"))


class Lsf(BatchJob):
    """A job of LSF, which does not count restarts: a file in the folder of the run does. See `BatchJob`."""

    variables = "LSB_JOBID", "LSB_JOBNAME"
    forward = "USR1"
    more_time = "ask for more time (-W), or for a shorter lead (-wt)"

    def __init__(self, environ: MutableMapping[str, str], command: Command = run_command) -> None:
        super().__init__(environ, command)
        self.folder = environ.get("LS_SUBCWD", "")
        self.threads = environ.get("THREADS") or "1"  # -n counts cores

    def begin(self, run: Path) -> None:
        with suppress(OSError, ValueError):
            self.restarts = int(read(self._count(run), MARK))

    def launcher(self) -> list[str]:
        return ["mpiexec", "-n", self.environ["LSB_DJOB_NUMPROC"]]

    def restart(self, run: Path) -> bool:
        with suppress(OSError, ValueError), written(self._count(run)) as descriptor:  # it counts from 0 again then
            os.write(descriptor, f"{self.restarts + 1}\n".encode())
        return self._done("brequeue", "-r", self.job)

    def ended(self, run: Path, status: int) -> str:
        self._count(run).unlink(missing_ok=True)
        return ""

    def _count(self, run: Path) -> Path:
        return run / f"restarts-{self.job}"


def find_job(environ: MutableMapping[str, str], command: Command = run_command, *, chain: bool = False) -> BatchJob | None:
    """Return the job whose variables these are; None outside of a job. Local.

    With `chain`, a task of an array of Slurm continues where the one before has stopped.
    """
    for system in (Chain if chain else Slurm, Pbs, Lsf):
        if environ.get(system.variables[0]):
            return system(environ, command)
    return None
