"""Run a program in a batch job of Slurm, PBS or LSF, and again until it has finished: ``mpi-ef supervise -- PROGRAM ...``.

PROGRAM train stands for mpi-ef train that saves, goes on and writes to the folder of the run; bench for mpi-ef bench. Any
other is a program of your own, which finds that folder in RUN_DIR: docs/cluster.md. Most options may be given as variables
of the environment: RUN_DIR for --run-dir. Needs no MPI and no torch.
"""

import os
import signal
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mpi_ef import documents
from mpi_ef.documents import shown
from mpi_ef.errors import ConfigError, DataError, LaunchError, MpiEfError
from mpi_ef.jobs.options import divided, option, parse
from mpi_ef.runtime.batch import Slurm, find_job, run_command, write
from mpi_ef.runtime.supervise import WRONG, Child, Supervisor, report

__all__ = ["SuperviseConfig", "main", "run"]

PROOF = "summary.json"  # of mpi-ef train


@dataclass(frozen=True)
class SuperviseConfig:
    """Options of ``mpi-ef supervise``."""

    run_dir: Path | None = option(None, "folder of the run", shown="runs/NAME-NUMBER, of the job")
    max_restarts: int = option(20, "how often the job may start again")
    checkpoint_every: int = option(100, "for train: steps between two checkpoints")
    text: str = option(
        "", "a corpus, which is copied to the disks of the nodes: --text of train, TEXT of other programs", shown="none"
    )
    node_dir: str = option("", "a folder on the disks of the nodes", shown="$SLURM_TMPDIR or /tmp")
    mpi_ef: str = option("mpi-ef", "the program mpi-ef, as the ranks start it")
    program: str = option("", "a training program of yours, in place of train", shown="none")
    python: str = option("python3", "the interpreter of that program")
    launch: str = option("", "how MPI programs are started", shown="srun; under PBS and LSF mpiexec -n RANKS")
    mpi_type: str | None = option(None, "--mpi of srun; '' leaves it to Slurm", shown="what the MPI library speaks")
    forward: str = option("", "the signal that the launcher gets, or none", shown="USR2; under PBS and LSF USR1")
    proof: str = option("", "a file in the folder of the run without which it has not finished",
                        shown="summary.json of train")
    chain: bool = option(False, "do not requeue: the next task of the array goes on")
    sweep: str | None = option(
        None, "task N of the array adds the options in line N of this file, - for standard input", shown="none"
    )
    image: str | None = option(None, "an image of apptainer in which the program runs", shown="none")
    apptainer: str = option("apptainer", "the program apptainer, or singularity")
    bind: str = option("", "more folders that the image shall see, separated by commas", shown="none")
    each: str = option("once", "run on 1, 2, 4, ... nodes, or on 1, 2, 3, ... ranks; without restarts",
                       choices=("once", "nodes", "ranks"))
    ranks: str = option("", "numbers of ranks for each=ranks", shown="all")
    script: Path | None = option(
        None, "the script of the job: PBS submits it again, Slurm is asked for signals in it", shown="none"
    )

    def __post_init__(self) -> None:
        """Check what can be checked without a job."""
        if self.forward not in ("", "none") and f"SIG{self.forward}" not in signal.Signals.__members__:
            raise ConfigError(f"forward={self.forward} is no signal; take USR1, USR2, TERM or none")
        if self.image == "":
            raise ConfigError("IMAGE is not set: IMAGE=mpi_ef.sif sbatch container.sbatch ...")
        if not all(word.isdigit() and int(word) for word in self.ranks.split()):
            raise ConfigError(f"ranks={self.ranks} are no numbers; take for example '1 2 4'")


# The kind of a job is set in its script alone; the rest may be variables, of which this one counts also when it is empty.
_NO_VARIABLES = {"chain", "sweep", "image", "each", "ranks", "script", "proof"}
_MAY_BE_EMPTY = {"mpi_type"}


def main(argv: Sequence[str] | None = None) -> None:
    """Supervise a program. Exit status 0 when it has finished or will start again, else its own."""
    child = Child()
    child.listen()  # before everything else: a signal may come at once
    if os.environ.pop("MPI_EF_SIGNALLED", ""):
        child.ask()
    sys.exit(run(sys.argv[1:] if argv is None else argv, os.environ, child))


def run(argv: Sequence[str], environ: MutableMapping[str, str], child: Child) -> int:
    """Supervise a program in the job whose variables are `environ`, and return the exit status of the job. Local."""
    before, words = divided(argv)
    if not words and not {"-h", "--help"} & set(before):
        write(2, "mpi-ef: supervise: there is no program; mpi-ef supervise [OPTIONS] -- PROGRAM ARGUMENT ...\n")
        return WRONG
    given = [*_of_environment(environ), *before]
    config = parse(SuperviseConfig, given, prog="mpi-ef supervise", description=__doc__ or "")
    try:
        return _Job(config, child, environ, words).run()
    except MpiEfError as error:
        write(2, f"mpi-ef: {error}\n")
        return WRONG
    except OSError as error:
        where = f"{shown(error.filename)}: " if error.filename else ""
        write(2, f"mpi-ef: supervise: {where}{error.strerror or error}; submit the job again when that is mended\n")
        return 1


def _of_environment(environ: MutableMapping[str, str]) -> list[str]:
    """Return the options that variables stand for."""
    names = [field.name for field in fields(SuperviseConfig) if field.name not in _NO_VARIABLES]
    given = {name: environ.get(name.upper()) for name in names}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()
            if value or (value is not None and name in _MAY_BE_EMPTY)]


def _in_place_of_train(config: SuperviseConfig) -> list[str]:
    if not config.program:
        return ["train"]
    if not os.access(config.program, os.R_OK):
        raise DataError(f"PROGRAM={config.program} cannot be read")
    return [config.python, "-m", "mpi4py", config.program]


class _Job:
    """What is started in a job, and with which environment."""

    def __init__(self, config: SuperviseConfig, child: Child, environ: MutableMapping[str, str], words: list[str]) -> None:
        job = find_job(environ, run_command, chain=config.chain)
        if job is None:
            raise LaunchError("supervise: this is no job of Slurm, PBS or LSF; submit a script that calls it: mpi-ef slurm")
        if not isinstance(job, Slurm) and (config.chain or config.sweep is not None or config.each != "once"):
            raise LaunchError("supervise: chain, sweep and each are for Slurm; leave them out")
        self.config, self.child, self.environ, self.job = config, child, environ, job
        if config.script is not None:
            job.script = config.script.absolute()
        if job.folder:
            os.chdir(job.folder)
        child.forward = config.forward or job.forward
        self.program, *self.options = [*_in_place_of_train(config), *words[1:]] if words[0] == "train" else words
        self.options += job.arguments
        self.run_dir = config.run_dir or Path(f"runs/{job.name}-{job.number}")
        if config.sweep is not None:
            self._add_options_of_task(config.sweep)
        self.slurm = job if isinstance(job, Slurm) else None
        if self.slurm:
            self.slurm.srun = not config.launch
        if config.each != "once" and config.launch:
            raise LaunchError(f"supervise: each={config.each} needs srun; LAUNCH={config.launch} starts all ranks only")
        if config.text and not os.access(config.text, os.R_OK):
            raise DataError(f"TEXT={config.text} cannot be read")
        self.scratch = Path(config.node_dir or job.disk, f"mpi-ef-{os.getuid()}-{job.id}")

    def run(self) -> int:
        """Do what the job is for, and return its exit status."""
        config, job, run_dir = self.config, self.job, self.run_dir
        if config.each != "ranks":
            run_dir.mkdir(parents=True, exist_ok=True)
        job.begin(run_dir)
        if job.finished(run_dir):
            report(job.job, "the training is finished")
            return 0
        deadline = self._set_environment()
        launch = self._launcher()
        if (text := job.prepare(self.scratch, config.text)) is None:
            where = "set NODE_DIR to a folder on the nodes' own disks, or exclude the node"
            report(job.job, f"a node cannot use {self.scratch}, or it is not this user's alone; {where}")
            return 1
        if why := job.make_private(self.scratch, launch):
            report(job.job, f"{why}: ranks share no machine code there; set NODE_DIR to another folder")
        else:
            self.environ["NUMBA_CACHE_DIR"] = str(self.scratch / "numba")
        supervisor = Supervisor(self.child, job, run_dir, self.scratch, max_restarts=config.max_restarts)
        if self.slurm and config.each != "once":
            status = self._each(self.slurm, launch, text)
            supervisor.tidy()
            return status
        proof = config.proof or (PROOF if self.program == "train" else "")
        return supervisor.supervise([*launch, *self._command(text)], proof=proof, deadline=deadline)

    def _add_options_of_task(self, sweep: str) -> None:
        """Take the options of one line, and a folder of the run for it."""
        if not (task := self.environ.get("SLURM_ARRAY_TASK_ID", "")):
            raise LaunchError("supervise: a sweep is an array of Slurm: sbatch --array=1-20 ...")
        try:
            lines = sys.stdin.read().splitlines() if sweep == "-" else list(documents.lines(Path(sweep)))
        except (OSError, ValueError) as error:
            raise DataError(f"CONFIGS={sweep} cannot be read ({shown(error)}); name a file with a line for each "
                            "task") from None
        options = lines[int(task) - 1].split() if 1 <= int(task) <= len(lines) else []
        if not options:
            name = "the list in this file" if sweep == "-" else sweep
            raise DataError(f"{name} has {len(lines)} lines, nothing in line {task}: see --array")
        report(self.job.job, " ".join(options))
        self.options = [*options, *self.options] if self.program == "train" else [*self.options, *options]
        self.run_dir /= task

    def _set_environment(self) -> int | None:
        """Set the environment of the ranks, and return the deadline of the job."""
        deadline = self.job.deadline()
        self.environ.update({"RUN_DIR": str(self.run_dir), "OMP_NUM_THREADS": self.job.threads,
                         "NUMBA_NUM_THREADS": self.job.threads, "PYTHONUNBUFFERED": "1"})
        if deadline is not None:
            self.environ["SLURM_JOB_END_TIME"] = str(deadline)  # Slurm's variable, which mpi-ef reads everywhere
        return deadline

    def _launcher(self) -> list[str]:
        """Return how MPI programs are started. The wrong --mpi makes every task rank 0 of its own world."""
        config = self.config
        if config.launch:
            return config.launch.split()
        launch = self.job.launcher()
        if self.slurm:
            kind = self._mpi_type() if config.mpi_type is None else config.mpi_type
            launch[1:1] = [f"--mpi={kind}"] if kind else []
        return launch

    def _mpi_type(self) -> str:
        """Return the --mpi that fits the MPI library, of the image where the program runs in one. MPI is not loaded here."""
        from mpi_ef.jobs.slurm import ask_srun

        command, offered = [self.config.mpi_ef, "slurm", "mpi-type"], ""
        if self.config.image is not None:
            command = [self.config.apptainer, "exec", self.config.image, *command, "--offered", "-"]
            offered = ask_srun()
        status, kind = run_command(command, given=offered)
        if status:
            raise LaunchError(f"supervise: {' '.join(command)} ended with status {status}; set MPI_TYPE")
        return kind.strip()

    def _each(self, slurm: Slurm, launch: list[str], text: str) -> int:
        """Run the program on growing parts of the job, and return the last exit status that is not 0."""
        failed, by_nodes = 0, self.config.each == "nodes"
        per_node = int(self.environ.get("SLURM_NTASKS_PER_NODE") or 1)
        if by_nodes:
            worlds = [(nodes, nodes * per_node) for nodes in (1 << n for n in range(slurm.nodes.bit_length()))]
        else:
            all_numbers = range(1, int(self.environ["SLURM_NTASKS"]) + 1)
            numbers = map(int, self.config.ranks.split()) if self.config.ranks else all_numbers
            worlds = [(min(ranks, slurm.nodes), ranks) for ranks in numbers]
        where = f"--ntasks-per-node={per_node}" if by_nodes else "--distribution=cyclic"
        for nodes, ranks in worlds:
            report(slurm.job, f"{ranks} ranks on {nodes} nodes")
            steps = [f"--nodes={nodes}", f"--ntasks={ranks}", where]
            failed = self.child.run([*launch, *steps, *self._command(text, nodes)]) or failed
            if self.child.asked or self.child.interrupted:
                return failed or 1
        if not failed and not by_nodes:
            report(slurm.job, "all passed")
        return failed

    def _command(self, text: str, nodes: int = 1) -> list[str]:
        """Return the program, without its launcher."""
        config, run_dir = self.config, str(self.run_dir)
        if self.program == "train":
            words = [config.mpi_ef, "train", "--checkpoint-every", str(config.checkpoint_every), "--resume", "exact"]
            words += [*(["--text", text] if text else []), *self.options, "--out", run_dir]
        elif self.program == "bench":
            words = [config.mpi_ef, "bench", "--json", f"{run_dir}/nodes-{nodes}.json", *self.options]
        else:
            words = [self.program, *self.options]
        if text:
            self.environ["TEXT"] = text
        if config.image is not None:
            folders = f"{Path.cwd()},{self.run_dir.resolve()},{self.scratch}{config.bind and f',{config.bind}'}"
            words = [config.apptainer, "exec", "--bind", folders, config.image, *words]
        return words
