"""Who has started this process, and whether the ranks are one world; what to do when they are not."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi_ef.jobs.doctor.finding import Finding
from mpi_ef.slurm.mpi_types import offered_by, wanted

__all__ = ["Launcher", "ended_at_start", "judge_world", "launcher_of", "lonely", "offered_by_srun"]


@dataclass(frozen=True)
class Launcher:
    """Who has started this process, as the environment tells.

    Attributes
    ----------
    name : str
    variable : str
        The environment variable that tells the number of tasks.
    tasks : int
    rank : int or None
        Number of this task, by the launcher's count.
    first_on_node : bool
        Whether it is the first one there, as far as the launcher tells.
    """

    name: str
    variable: str
    tasks: int
    rank: int | None
    first_on_node: bool = True


# Name, a variable that only this one sets, those of the number of tasks and of the task. A launcher that starts its
# helpers with srun leaves Slurm's variables in the tasks as well: so srun comes late.
_LAUNCHERS = (
    ("mpiexec of Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec (Hydra)", "MPI_LOCALNRANKS", "PMI_SIZE", "PMI_RANK"),
    ("mpirun of MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("flux run", "FLUX_JOB_SIZE", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpiexec", "PMI_SIZE", "PMI_SIZE", "PMI_RANK"),
)
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
# Numbers of batch scripts and interactive shells, which nobody has started as an MPI program.
_SPECIAL_STEPS = 2**32 - 16


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """Return who has started this process as one of several; None for a shell or a batch script."""
    for name, marker, size, rank in _LAUNCHERS:
        if name == "srun" and _number(environment.get("SLURM_STEP_ID")) >= _SPECIAL_STEPS:
            continue
        tasks = _number(environment.get(size))
        if marker in environment and tasks > 0:
            number = _number(environment.get(rank))
            first = all(environment.get(variable, "0") == "0" for variable in _LOCAL_RANKS)
            return Launcher(name, size, tasks, number if number >= 0 else None, first)
    return None


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else -1


def judge_world(size: int, launcher: Launcher | None) -> Iterator[Finding]:
    """Yield whether the ranks are one world; not for lonely ones, see `lonely`."""
    if launcher is None:
        yield Finding(
            "MPI",
            "no-launcher",
            "note",
            "one process, started without a launcher: what lies between ranks was not looked at",
            "run it as the training will run: srun mpi-ef doctor, or mpiexec -n 4 mpi-ef doctor",
        )
    elif size != launcher.tasks:
        yield Finding(
            "MPI",
            "world-size",
            "warning",
            f"{launcher.name} tells of {launcher.tasks} tasks ({launcher.variable}), but the MPI world has {size} "
            "ranks",
            "look whether several launchers are at work, for example mpiexec inside of srun",
        )
    else:
        yield Finding(
            "MPI", "world", "ok", f"one world of {size} rank{'s' if size > 1 else ''}, started by {launcher.name}"
        )


def lonely(launcher: Launcher, facts: Mapping[str, Any], environment: Mapping[str, str]) -> Finding:
    """Return the finding that every task is rank 0 of a world of its own.

    Parameters
    ----------
    launcher : Launcher
    facts : mapping
        Of the MPI library.
    environment : mapping of str to str
    """
    what = (
        f"{launcher.tasks} tasks were started by {launcher.name} ({launcher.variable}={launcher.tasks}), but every one is "
        f"rank 0 of a world of its own, and would train alone; MPI library: {_library(facts)}"
    )
    return Finding("MPI", "lonely-ranks", "error", what, _remedy(launcher, facts, environment))


def ended_at_start(launcher: Launcher, facts: Mapping[str, Any], environment: Mapping[str, str]) -> Finding:
    """Return the finding that MPI has ended the tasks when it was started; parameters are those of `lonely`."""
    what = f"MPI_Init ended the tasks of {launcher.name}, with the words above if any; MPI library: {_library(facts)}"
    return Finding("MPI", "mpi-init", "error", what, _remedy(launcher, facts, environment))


def _library(facts: Mapping[str, Any]) -> str:
    name = f"{facts.get('library', 'unknown')} {facts.get('release', '')}".strip()
    return f"{name}, {facts.get('file') or 'file unknown'}"


def _remedy(launcher: Launcher, facts: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    if launcher.name != "srun":
        return (
            f"start it with the mpiexec that belongs to this library ({_mpiexec_beside(facts)}); this one is "
            f"{shutil.which('mpiexec') or 'not in PATH'}. Under Slurm: srun --mpi=pmix, --mpi=pmi2 or "
            "--mpi=cray_shasta"
        )
    offered = offered_by_srun()
    speaks = wanted(str(facts.get("library")), offered)[1]
    usable = [kind for kind in speaks if kind in offered]
    best = next(iter((*usable, *speaks)), "")
    asked = _asked_for(environment)
    first = f"{facts.get('library')} wants srun --mpi={best}" if best else "try the others of srun --mpi=list"
    there = f"; srun here has: {', '.join(offered)}" if offered else ""
    lacking = ""
    if speaks and offered and not usable:
        lacking = ", which srun here does not have: start with mpiexec inside of sbatch"
    return (
        f"{first}{lacking} (these tasks were started with --mpi={asked}){there}. Choices: --mpi=pmix (Open MPI, "
        "newer MPICH), --mpi=pmi2 (MPICH, Intel MPI, MVAPICH), --mpi=cray_shasta (Cray MPICH). export "
        "SLURM_MPI_TYPE=... makes one the default"
    )


def _asked_for(environment: Mapping[str, str]) -> str:
    if any(name.startswith("PMIX_") for name in environment):
        return "pmix"
    if "PMI_FD" in environment or "PMI_RANK" in environment:
        return "pmi2"
    return environment.get("SLURM_MPI_TYPE", "none")


def _mpiexec_beside(facts: Mapping[str, Any]) -> str:
    file = Path(str(facts.get("file") or "/"))
    beside = file.parent.parent / "bin" / "mpiexec"
    return str(beside) if beside.exists() else f"that of {facts.get('library', 'the MPI')}"


def offered_by_srun(seconds: float = 10.0) -> tuple[str, ...]:
    """Return what ``srun --mpi=list`` lists; nothing where there is no srun, or it does not answer. Local."""
    if shutil.which("srun") is None:
        return ()
    try:
        done = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return offered_by(done.stdout + done.stderr)
