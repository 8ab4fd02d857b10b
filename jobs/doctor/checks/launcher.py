"""What has started this process, and whether the ranks are one world; what to do when they are not."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mpi_ef.errors import counted
from mpi_ef.jobs.doctor.checks.mpi import name_of
from mpi_ef.jobs.doctor.finding import Facts, Finding, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context, Launcher
from mpi_ef.jobs.slurm import ask_srun
from mpi_ef.slurm.mpi_types import offered_by, wanted

__all__ = ["collect", "ended_at_start", "judge", "launcher_of"]

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
# Numbers of batch scripts and interactive shells, which are no tasks of an MPI program.
_SPECIAL_STEPS = 2**32 - 16
_SRUN_SECONDS = 10.0


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """Return what has started this process as one of several; None for a shell or a batch script. Local."""

    def number(name: str) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else None

    for name, marker, size, rank in _LAUNCHERS:
        special = name == "srun" and (number("SLURM_STEP_ID") or 0) >= _SPECIAL_STEPS
        if marker in environment and (tasks := number(size)) and not special:
            first = all(environment.get(variable, "0") == "0" for variable in _LOCAL_RANKS)
            return Launcher(name, size, tasks, number(rank), first)
    return None


def collect(context: Context) -> Facts:
    """Return the launcher, the size of the world, and what to do if that is too small. Local."""
    launcher, size = context.launcher, context.mpi.get("size")
    if launcher is None:
        return {}
    singleton = size == 1 and launcher.tasks > 1
    return {**asdict(launcher), "size": size, "remedy": list(remedy(context, launcher)) if singleton else None}


def judge(ranks: Ranks) -> Findings:
    """Yield whether the ranks are one world."""
    tasks, size = ranks[0]["tasks"], ranks[0]["size"]
    if tasks is None:
        yield finding("no-launcher")
    elif ranks[0]["remedy"]:
        kind, values = ranks[0]["remedy"]
        yield finding(f"lonely-ranks.{kind}", ranks, **values)
    elif size is not None:
        yield finding("world" if size == tasks else "world-size", ranks, ranks=counted(size, "rank"))


def ended_at_start(context: Context, launcher: Launcher) -> Finding:
    """Return the finding that MPI has ended the tasks when it was started. Local; calls srun."""
    kind, values = remedy(context, launcher)
    return finding(f"mpi-init.{kind}", name=launcher.name, **values)


def remedy(context: Context, launcher: Launcher) -> tuple[str, Facts]:
    """Return which text says how to start the ranks as one world, and its fields. Local; calls srun."""
    library, file, environment = context.mpi.get("library", "unknown"), context.mpi.get("file"), context.environment
    values = {"library": f"{name_of(context.mpi) or 'unknown'}, {file or 'file unknown'}"}
    if launcher.name != "srun":
        beside = Path(str(file or "/")).parent.parent / "bin" / "mpiexec"
        values["beside"] = str(beside) if beside.exists() else f"that of {library}"
        return "mpiexec", values | {"found": shutil.which("mpiexec") or "not in PATH"}
    offered = offered_by(ask_srun(_SRUN_SECONDS))
    kinds = wanted(str(library), offered)[1]
    usable = [kind for kind in kinds if kind in offered]
    best = next(iter((*usable, *kinds)), "")
    advice = f"{library} wants srun --mpi={best}" if best else "try the others of srun --mpi=list"
    if kinds and offered and not usable:
        advice += ", which srun here does not have: start with mpiexec inside of sbatch"
    listed = f"; srun here has: {', '.join(offered)}" if offered else ""
    asked = environment.get("SLURM_MPI_TYPE", "none")
    if any(name.startswith("PMIX_") for name in environment):
        asked = "pmix"
    elif "PMI_FD" in environment or "PMI_RANK" in environment:
        asked = "pmi2"
    return "srun", values | {"advice": advice, "asked": asked, "offered": listed}
