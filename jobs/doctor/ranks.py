"""Where the ranks run: nodes, cores, threads. Facts of one rank, and what those of all ranks together mean."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpi_ef.jobs.doctor.finding import Finding, Level, Told, nodes_text, ranks_text, who

__all__ = ["judge_ranks", "quota", "rank_facts"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def rank_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the cores and threads of this rank. Local."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "cores": sorted(cores),
        "of_node": os.cpu_count() or 1,
        "quota": quota(),
        "processor": _processor(),
        "asked": environment.get("SLURM_CPUS_PER_TASK", ""),
        **{name: environment.get(name, "") for name in _THREADS},
    }


def quota(root: Path = Path("/sys/fs/cgroup"), told: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many cores a container may keep busy; None without a limit."""
    try:
        mine = told.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in mine:
        _, kinds, place = line.split(":", 2)
        if kinds == "":
            limits += [_limit(folder / "cpu.max") for folder in _up(root, place)]
        elif "cpu" in kinds.split(","):
            limits += [
                _limit(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in _up(root / "cpu", place)
            ]
    return min((limit for limit in limits if limit is not None), default=None)


def _up(root: Path, place: str) -> Iterator[Path]:
    """Yield a group and those that it is part of; inside of a container the root is the group itself."""
    inner = root / place.strip("/")
    yield from (folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents)


def _limit(*files: Path) -> float | None:
    try:
        quota, period = " ".join(file.read_text(encoding="ascii").strip() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(names, "")


def judge_ranks(told: Sequence[Told], launched: bool = True) -> Iterator[Finding]:
    """Yield what there is to say about nodes, cores and threads; of one process that nobody has launched only the cores."""
    if not launched:
        cores = len(told[0]["cores"])
        yield Finding("Ranks", "binding", "ok", f"{cores} of {told[0]['of_node']} cores here may be used")
        return
    nodes: dict[str, list[Told]] = {}
    for one in told:
        nodes.setdefault(one.node, []).append(one)
    yield from _judge_nodes(nodes)
    # Nodes that look alike are told of once.
    alike: dict[_Row, list[str]] = {}
    for node, ranks in nodes.items():
        for row in (*_cores(ranks), *_threads(ranks)):
            alike.setdefault(row, []).append(node)
    for row, where in alike.items():
        place = f" on {nodes_text(where)}" if len(nodes) > 1 and len(where) < len(nodes) else ""
        about = tuple(one.rank for node in where for one in nodes[node]) if place else ()
        yield Finding("Ranks", row.name, row.level, row.what + place, row.todo, about)
    yield from _judge_asked(told)


def _judge_nodes(nodes: Mapping[str, Sequence[Told]]) -> Iterator[Finding]:
    counts = Counter(len(ranks) for ranks in nodes.values())
    hosts = Counter(node.split("#")[0] for node in nodes)
    n = sum(len(ranks) for ranks in nodes.values())
    if len(nodes) == 1:
        yield Finding("Ranks", "nodes", "ok", f"{n} rank{'s' if n > 1 else ''} on {next(iter(nodes))}")
    elif len(counts) == 1:
        yield Finding(
            "Ranks",
            "nodes",
            "ok",
            f"{next(iter(counts))} rank{'s' if n > len(nodes) else ''} on each of {len(nodes)} nodes: {nodes_text(nodes)}",
        )
    else:
        few, many = min(counts), max(counts)
        some = [node for node, ranks in nodes.items() if len(ranks) == few]
        yield Finding(
            "Ranks",
            "uneven-nodes",
            "note",
            f"{n} ranks on {len(nodes)} nodes, from {few} ({nodes_text(some)}) to {many} on a node",
            "srun --ntasks-per-node=N or mpiexec -ppn N (Open MPI: --map-by ppr:N:node) gives all nodes the same",
        )
    split = [host for host, count in hosts.items() if count > 1]
    if split:
        yield Finding(
            "Ranks",
            "split-host",
            "warning",
            f"ranks on {nodes_text(split)} do not share memory with each other",
            "start all ranks of a node in one container, or with the same /dev/shm: messages between them go "
            "through the network now",
        )
    kinds = Counter(str(one["processor"]) for ranks in nodes.values() for one in ranks[:1])
    if len(kinds) > 1:
        yield Finding(
            "Ranks",
            "processors",
            "note",
            f"nodes have different processors: {'; '.join(kinds)}",
            "the slowest sets the pace; ask for one kind (sbatch --constraint=...) or live with it",
        )


class _Row(NamedTuple):
    """A finding about one node, which may hold for others too."""

    level: Level
    name: str
    what: str
    todo: str = ""


def _cores(ranks: Sequence[Told]) -> Iterator[_Row]:
    """Yield how the ranks of a node share its cores; rank numbers only where they matter."""
    may_run_on: Counter[int] = Counter(core for one in ranks for core in one["cores"])
    all_cores, n, of_node = len(may_run_on), len(ranks), int(ranks[0]["of_node"])
    shares = {one.rank: sum(1 / may_run_on[core] for core in one["cores"]) for one in ranks}
    sizes = sorted({len(one["cores"]) for one in ranks})
    crowded = [rank for rank, share in shares.items() if share < 0.999]
    limit = ranks[0]["quota"]
    if limit is not None and limit < all_cores - 0.01:
        yield _Row(
            "warning" if limit < n else "note",
            "cpu-quota",
            f"the container may keep {limit:g} of {all_cores} cores busy",
            "give the container more (docker --cpus, a larger pod), or start fewer ranks",
        )
    if n > of_node:
        yield _Row(
            "warning",
            "oversubscribed",
            f"{n} ranks share {_cores_text(of_node)}; ranks that wait keep cores busy",
            f"start at most {of_node} ranks a node; for tests let them give way: export "
            "OMPI_MCA_mpi_yield_when_idle=1 (Open MPI), MPIR_CVAR_POLLS_BEFORE_YIELD=1 (MPICH)",
        )
    elif crowded:
        cores = sorted({core for one in ranks if one.rank in crowded for core in one["cores"]})
        yield _Row(
            "warning",
            "binding",
            f"{ranks_text(crowded)} share {_listed(cores)}; the node has {of_node}",
            "ask for a core for each (sbatch --cpus-per-task=C, srun --cpu-bind=cores); mpiexec of Open MPI: --bind-to "
            "none, or --map-by slot:pe=C",
        )
    elif max(may_run_on.values()) == 1:
        size = _cores_text(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} cores"
        yield _Row("ok", "binding", f"every rank has {size} of its own; the node has {of_node}")
    else:
        yield _Row("ok", "binding", f"ranks are not bound: {n} may run on the same {_cores_text(all_cores)}")


def _cores_text(count: int) -> str:
    return f"{count} core{'s' if count > 1 else ''}"


def _listed(cores: Sequence[int]) -> str:
    return f"core{'s' if len(cores) > 1 else ''} {ranks_text(cores).split(' ', 1)[1]}"


def _threads(ranks: Sequence[Told]) -> Iterator[_Row]:
    """Yield how many threads the ranks of a node would start."""
    all_cores, n = len({core for one in ranks for core in one["cores"]}), len(ranks)
    each = max(1, all_cores // n)
    for name in _THREADS:
        values = {str(one[name]) for one in ranks}
        if len(values) > 1:
            yield _Row(
                "warning",
                "threads-differ",
                f"{name} differs between ranks: {', '.join(sorted(v or 'not set' for v in values))}",
                f"export {name} in the batch script, before srun or mpiexec -x/-genv",
            )
    texts = {str(one["OMP_NUM_THREADS"]) for one in ranks}
    text = max(texts)
    first = text.split(",")[0]
    if text == "" and n > 1 and any(len(one["cores"]) > each for one in ranks):
        yield _Row(
            "note",
            "threads",
            f"OMP_NUM_THREADS is not set: torch would start {all_cores} threads in each of {n} ranks",
            f"mpi-ef train shares the cores by itself; for programs of your own export OMP_NUM_THREADS={each}",
        )
    elif text == "":
        yield _Row("ok", "threads", f"OMP_NUM_THREADS is not set: as many threads as cores, {each} a rank")
    elif not first.isdigit() or int(first) == 0:
        yield _Row(
            "warning",
            "threads",
            f"OMP_NUM_THREADS={text} is not a number of threads",
            f"export OMP_NUM_THREADS={each}",
        )
    elif int(first) * n > all_cores and int(first) > 1:
        yield _Row(
            "warning",
            "threads",
            f"OMP_NUM_THREADS={text} in {n} ranks is {int(first) * n} threads on {all_cores} cores",
            f"export OMP_NUM_THREADS={each}",
        )
    elif int(first) * 2 <= each:
        yield _Row(
            "note",
            "threads",
            f"OMP_NUM_THREADS={text}, but there are {each} cores a rank",
            f"export OMP_NUM_THREADS={each}, or start more ranks, unless that is on purpose",
        )
    else:
        numba = ranks[0]["NUMBA_NUM_THREADS"]
        yield _Row(
            "ok",
            "threads",
            f"OMP_NUM_THREADS={text}{f', NUMBA_NUM_THREADS={numba}' if numba else ''}; kernels of mpi_ef use one "
            "thread a rank",
        )


def _judge_asked(told: Sequence[Told]) -> Iterator[Finding]:
    few = [one for one in told if str(one["asked"]).isdigit() and int(one["asked"]) > len(one["cores"])]
    if few:
        where, ranks = who(few, told)
        count = len(few[0]["cores"])
        yield Finding(
            "Ranks",
            "few-cores",
            "warning",
            f"SLURM_CPUS_PER_TASK={few[0]['asked']}, but a rank may run on {count} "
            f"core{'s' if count > 1 else ''}{where}",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun, which does not take it over since Slurm "
            "22.05; with mpiexec of Open MPI: --map-by slot:pe=$SLURM_CPUS_PER_TASK",
            ranks,
        )
