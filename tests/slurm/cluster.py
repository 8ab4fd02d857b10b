"""A Slurm of four nodes on this machine, and what tests do with it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import patience

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TEMPLATES = REPOSITORY / "slurm"
BESIDE = Path(sys.executable).parent

# The same as in the Makefile: one thread per rank, ranks that wait give way, Open MPI starts fast and as root.
SETTINGS = {
    "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_rmaps_base_oversubscribe": "true", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "true", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1",
}

ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
         "OUT_OF_MEMORY"}

STEPS = 60
TINY = ["--steps", STEPS, "--warmup", 10, "--batch", 4, "--context", 16, "--layers", 1, "--heads", 2, "--width", 16,
        "--log-every", 5, "--eval-every", 30]


class Cluster:
    """The Slurm that slurm_up.sh has started in the folder `lab`; the jobs of the tests live in ``lab / "jobs"``."""

    def __init__(self, lab: Path) -> None:
        self.lab, self.folder = lab, lab / "jobs"
        self.folder.mkdir()
        self._wholes: dict[tuple[object, ...], Path] = {}
        self.disk = self.lab / "local"  # what a job sees there is its node's own
        ours = ("SLURM", "SBATCH", "SQUEUE", "MPI_EF", "MPI_TYPE", "RUN_DIR", "TEXT", "MAX_RESTARTS", "CHECKPOINT_EVERY",
                "CONFIGS", "IMAGE", "APPTAINER", "LAUNCH", "FORWARD", "NODE_DIR", "PRTE_MCA_prte_tmpdir_base")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment |= SETTINGS | {
            "SLURM_CONF": str(self.lab / "slurm.conf"),
            "PATH": f"{BESIDE}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(self.disk),
            "SLURM_TMPDIR": str(self.disk),
            "MPI_EF_TEST_LAB": str(self.lab),  # slurm_down.sh ends what has this
        }
        self.program = self._script("mpi-ef", f"{sys.executable} {HERE / 'program.py'}")
        self._script("python", f"env --unset=NUMBA_CACHE_DIR {sys.executable}")

    def _script(self, name: str, words: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\nexec {words} "$@"\n')
        path.chmod(0o755)
        return path

    def command(self, *words: object, within: float = 60, status: int = 0, cwd: Path | None = None,
                **variables: object) -> str:
        """Run a program, with some more variables in its environment, and return what it printed."""
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        ended = subprocess.run([str(word) for word in words], env=environment, cwd=cwd, check=False, text=True,
                               timeout=patience.limit(within), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert ended.returncode == status, f"{words} ended with status {ended.returncode}:\n{ended.stdout}"
        return ended.stdout

    def hosts(self, names: str) -> list[str]:
        return self.command("scontrol", "show", "hostnames", names).split()

    def local_files(self) -> list[str]:
        """Return what lies on the disks of the nodes."""
        return sorted(str(path.relative_to(self.lab / "tmp")) for path in self.lab.glob("tmp/*/*"))

    def whole(self, ranks: int, *arguments: object) -> Path:
        """Return the folder of a run with these arguments under mpiexec, which nobody disturbs; it is made once."""
        key = (ranks, *arguments)
        if key not in self._wholes:
            out = self.folder / f"whole-{len(self._wholes)}"
            mpiexec = BESIDE / "mpiexec" if (BESIDE / "mpiexec").exists() else "mpiexec"
            self.command(mpiexec, "-n", ranks, self.program, "train", *arguments, "--out", out, within=300,
                         TMPDIR=self.folder)
            self._wholes[key] = out
        return self._wholes[key]

    def processes(self, node: str) -> list[int]:
        """Return all processes of a node: those in the namespace of its slurmd."""
        slurmd = int((self.lab / "pid" / node).read_text())
        inside, found = Path(f"/proc/{slurmd}/ns/uts").readlink(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (path / "ns/uts").readlink() == inside:
                    found.append(int(path.name))
            except OSError:
                continue
        assert os.getpid() not in found
        return found

    def crash(self, node: str) -> None:
        """Let a node die: all of its processes at once, slurmd too; and let Slurm notice."""
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=crashed")

    def revive(self, node: str) -> None:
        """Start a node again after a crash."""
        subprocess.run([self.lab / "start", node], env=self.environment, check=True, timeout=patience.limit(10))
        resume = ["scontrol", "update", f"nodename={node}", "state=resume"]  # refused if its slurmd has done it already
        subprocess.run(resume, env=self.environment, check=False, capture_output=True, timeout=patience.limit(60))
        until = time.monotonic() + patience.limit(60)
        ask = ("sinfo", "--noheader", f"--nodes={node}", "--partition=debug", "--format=%T")
        while self.command(*ask).strip() != "idle":
            assert time.monotonic() < until, self.command("sinfo", "--Node", "--long")
            time.sleep(0.3)


@dataclass
class Job:
    """A job, or an array of them."""

    cluster: Cluster
    number: str
    folder: Path
    _gone: dict[str, float] = field(default_factory=dict, repr=False)

    def records(self) -> list[dict[str, str]]:
        """Return what Slurm knows of the job, or of the tasks of the array."""
        lines = self.cluster.command("scontrol", "show", "job", self.number, "--oneliner").splitlines()
        return [dict(word.partition("=")[::2] for word in line.split()) for line in lines if line.strip()]

    def record(self) -> dict[str, str]:
        (record,) = self.records()
        return record

    @cached_property
    def nodes(self) -> list[str]:
        """Names of the nodes that the job has, or had when this was first asked."""
        return self.cluster.hosts(self.record()["NodeList"])

    @property
    def log(self) -> str:
        logs = [*self.folder.glob(f"*-{self.number}.log"), *sorted(self.folder.glob(f"*-{self.number}_*.log"))]
        return "\n".join(path.read_text(errors="replace") for path in logs)

    @property
    def run(self) -> Path:
        """The folder of the run: the only one with the job's number in its name."""
        (found,) = self.folder.glob(f"runs/*-{self.number}")
        return found

    def says(self, words: str, times: int | None = None) -> None:
        """Check that the log has these words."""
        count = self.log.count(words)
        assert count if times is None else count == times, f"{words!r} {count} times in the log: {self}"

    def __str__(self) -> str:
        control = (self.cluster.lab / "log" / "slurmctld.log").read_text(errors="replace").splitlines()[-40:]
        return "\n".join(["", *map(str, self.records()), "---- log", self.log, "---- slurmctld", *control])

    def _hurry(self, records: list[dict[str, str]]) -> None:
        """Let a requeued job start before its ten seconds are over, but only when its last launch has been gone for three.

        What the last one's script still tells Slurm would count for the next one; and steps have the same numbers again:
        PMIx could not make sockets that have not been taken away yet.
        """
        for record in records:
            number, now = record["JobId"], time.monotonic()
            waits = record["JobState"] == "PENDING" and record.get("Reason") == "BeginTime" and not steps_of(number)
            if not waits:
                self._gone.pop(number, None)
            elif now > self._gone.setdefault(number, now) + 3.0:
                self._gone[number] = now
                subprocess.run(["scontrol", "update", f"jobid={number}", "starttime=now"], timeout=30,
                               env=self.cluster.environment, stderr=subprocess.DEVNULL, check=False)

    def until(self, condition: Callable[[list[dict[str, str]]], object], what: str, *, within: float = 150) -> None:
        """Wait until the condition on the job's records holds, while the job has not ended."""
        until = time.monotonic() + patience.limit(within)
        while True:
            records = self.records()
            if condition(records):
                return
            assert not all(r["JobState"] in ENDED for r in records), f"the job has ended before {what}: {self}"
            assert time.monotonic() < until, f"no {what} after {patience.explained(within)}: {self}"
            self._hurry(records)
            time.sleep(0.2)

    def running_with_checkpoint(self, least: int = 1) -> None:
        """Wait until the run has saved itself so many times."""
        pattern = f"runs/*-{self.number}/checkpoints/step-*"
        self.until(lambda _: len(list(self.folder.glob(pattern))) >= least, f"{least} checkpoints")

    def restarted(self, times: int = 1) -> None:
        """Wait until Slurm counts so many restarts."""
        self.until(lambda records: int(records[0]["Restarts"]) >= times, f"restart {times}")

    def end(self, *, within: float = 240) -> str:
        """Wait for the end, which a requeue is not, and return the state; of an array, all states together."""
        until, seen = time.monotonic() + patience.limit(within), 0
        while seen < 2:  # on its way back to the queue a job may look ended for a moment
            records = self.records()
            seen = seen + 1 if all(r["JobState"] in ENDED for r in records) else 0
            assert time.monotonic() < until, f"the job has not ended after {patience.explained(within)}: {self}"
            self._hurry(records)
            time.sleep(0.2)
        return " ".join(sorted({record["JobState"] for record in records}))

    def completes(self, *, within: float = 240) -> None:
        state = self.end(within=within)
        assert state == "COMPLETED", self

    def signal(self, name: str) -> None:
        """Send a signal to the batch script, as --signal=B: does before the time is over."""
        self.cluster.command("scancel", "--batch", f"--signal={name}", self.number)


@dataclass
class Place:
    """The folder from which a test submits its jobs."""

    cluster: Cluster
    folder: Path
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.brake = self.folder / "brake"
        self.notes_file = self.folder / "notes"
        self.variables = {"MPI_EF": str(self.cluster.program), "CHECKPOINT_EVERY": "5",
                          "MPI_EF_TEST_NOTES": str(self.notes_file), "MPI_EF_TEST_BRAKE": str(self.brake)}

    def submit(
        self, template: Path | str, *arguments: object, options: tuple[str, ...] = (), **variables: object
    ) -> Job:
        """Submit a template by its name, or a script; options are sbatch's, variables go into the job's environment."""
        script = template if isinstance(template, Path) else TEMPLATES / f"{template}.sbatch"
        answer = self.run("sbatch", "--parsable", *options, script, *arguments, **variables)
        return self.job(answer.strip().splitlines()[-1])

    def job(self, number: str) -> Job:
        """Take care of a job that has been submitted from here."""
        job = Job(self.cluster, number.partition(";")[0], self.folder)
        self.jobs.append(job)
        return job

    def run(self, *words: object, **options: object) -> str:
        """Run a program in this folder, with the variables of the jobs."""
        return self.cluster.command(*words, cwd=self.folder, **(self.variables | options))

    def notes(self, word: str = "train", **wanted: str) -> list[dict[str, object]]:
        """Return what tasks of a program have noted, in the order of their ranks."""
        lines = self.notes_file.read_text().splitlines() if self.notes_file.exists() else []
        rows = [json.loads(line) for line in lines]
        rows = [row for row in rows if word in row["words"] and all(row.get(name) == v for name, v in wanted.items())]
        return sorted(rows, key=lambda row: int(row.get("OMPI_COMM_WORLD_RANK", row["SLURM_PROCID"])))

    def slow(self, seconds: float = 0.5) -> None:
        """Make every step take so much longer."""
        draft = self.folder / ".brake"
        draft.write_text(str(seconds))
        draft.replace(self.brake)

    def fast(self) -> None:
        self.brake.unlink(missing_ok=True)

    def clear(self) -> None:
        """Cancel what a failed test has left running."""
        self.fast()
        for job in self.jobs:
            if not all(record["JobState"] in ENDED for record in job.records()):
                self.cluster.command("scancel", job.number)
        for job in self.jobs:
            job.end(within=60)


def steps_of(number: str) -> list[str]:
    """Return the processes that look after the steps of a job."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text(errors="replace")
        except OSError:
            continue
        if words.startswith(f"slurmstepd: [{number}."):
            found.append(words)
    return found


def summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())


def losses(run: Path) -> list[tuple[object, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["val_loss"], row["sent_nbytes"]) for row in rows]


def assert_same(run: Path, whole: Path) -> None:
    """The same parameters bit for bit, and the same metrics: no row twice, none missing."""
    mine, theirs = summary(run), summary(whole)
    for name in ("ranks", "steps", "parameters", "parameters_crc32"):
        assert mine[name] == theirs[name], name
    assert mine["replicas_equal"]
    assert losses(run) == losses(whole)
