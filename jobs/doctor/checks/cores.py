"""Nodes, cores and threads of the ranks."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.jobs.doctor.finding import Finding, finding
from mpi_ef.jobs.doctor.ranks import Facts, Ranks, counted, listed
from mpi_ef.jobs.doctor.registry import Context

__all__ = ["collect", "judge", "quota"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def collect(context: Context) -> Facts:
    """Return the cores and threads of this rank. Local."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "world": context.comm is not None,
        "cores": sorted(cores),
        "of_node": os.cpu_count() or 1,
        "quota": quota(),
        "processor": _processor(),
        "asked": context.environment.get("SLURM_CPUS_PER_TASK", ""),
        **{name: context.environment.get(name, "") for name in _THREADS},
    }


def quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many cores a container may keep busy; None without a limit. Local."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, kinds, place = line.split(":", 2)
        if kinds == "":
            limits += [_limit(folder / "cpu.max") for folder in _up(root, place)]
        elif "cpu" in kinds.split(","):
            folders = _up(root / "cpu", place)
            limits += [_limit(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in folders]
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


def judge(ranks: Ranks) -> Iterator[Finding]:
    """Yield how ranks lie on nodes and cores, and how many threads they start; of a process alone only its cores."""
    if not ranks[0]["world"]:
        yield finding("binding.alone", ranks, cores=len(ranks[0]["cores"]))
        return
    nodes = ranks.by(lambda one: one.node)
    yield from _judge_nodes(nodes)
    alike: dict[Finding, list[str]] = {}  # what holds for several nodes is one finding
    for node, some in nodes.items():
        for found in (*_judge_cores(some), *_judge_variables(some), _judge_threads(some)):
            alike.setdefault(found, []).append(node)
    for found, names in alike.items():
        if len(names) == len(nodes):
            yield found
        else:
            about = tuple(one.rank for node in names for one in nodes[node])
            yield replace(found, what=f"{found.what} on {listed(names)}", ranks=about)
    few = ranks.which(lambda one: str(one["asked"]).isdigit() and int(one["asked"]) > len(one["cores"]))
    if few:
        yield finding("few-cores", few, cores=counted(len(few[0]["cores"]), "core"))


def _judge_nodes(nodes: dict[str, Ranks]) -> Iterator[Finding]:
    sizes = [len(ranks) for ranks in nodes.values()]
    few, many, total = min(sizes), max(sizes), counted(sum(sizes), "rank")
    if len(nodes) == 1:
        yield finding("nodes.one", ranks=total, node=next(iter(nodes)))
    elif few == many:
        yield finding("nodes.even", ranks=counted(few, "rank"), count=len(nodes), nodes=listed(nodes))
    else:
        emptiest = listed(node for node, ranks in nodes.items() if len(ranks) == few)
        yield finding("uneven-nodes", ranks=total, count=len(nodes), few=few, nodes=emptiest, many=many)
    hosts = Counter(node.split("#")[0] for node in nodes)
    if max(hosts.values()) > 1:
        yield finding("split-host", hosts=listed(host for host, count in hosts.items() if count > 1))
    processors = dict.fromkeys(str(ranks[0]["processor"]) for ranks in nodes.values())
    if len(processors) > 1:
        yield finding("processors", processors="; ".join(processors))


def _judge_cores(ranks: Ranks) -> Iterator[Finding]:
    """Yield how the ranks of a node share its cores; rank numbers only where they matter."""
    ranks_on: Counter[int] = Counter(core for one in ranks for core in one["cores"])
    cores, n, of_node, limit = len(ranks_on), len(ranks), int(ranks[0]["of_node"]), ranks[0]["quota"]
    crowded = ranks.which(lambda one: sum(1 / ranks_on[core] for core in one["cores"]) < 0.999)
    sizes = sorted({len(one["cores"]) for one in ranks})
    if limit is not None and limit < cores - 0.01:
        yield finding("cpu-quota", severe=limit < n, limit=limit, cores=cores)
    if n > of_node:
        yield finding("oversubscribed", ranks=n, cores=counted(of_node, "core"), of_node=of_node)
    elif crowded:
        shared = _cores_text({core for one in crowded for core in one["cores"]})
        yield finding("binding", ranks=ranks_text(one.rank for one in crowded), cores=shared, of_node=of_node)
    elif max(ranks_on.values()) == 1:
        size = counted(sizes[0], "core") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} cores"
        yield finding("binding.bound", cores=size, of_node=of_node)
    else:
        yield finding("binding.free", ranks=n, cores=counted(cores, "core"))


def _cores_text(cores: set[int]) -> str:
    return ranks_text(cores).replace("rank", "core", 1)


def _judge_variables(ranks: Ranks) -> Iterator[Finding]:
    for name in _THREADS:
        values = sorted({str(one[name]) or "not set" for one in ranks})
        if len(values) > 1:
            yield finding("threads-differ", variable=name, values=", ".join(values))


def _judge_threads(ranks: Ranks) -> Finding:
    """Return whether the ranks of a node start as many threads as there are cores."""
    cores, n = len({core for one in ranks for core in one["cores"]}), len(ranks)
    each = max(1, cores // n)
    value = max(str(one["OMP_NUM_THREADS"]) for one in ranks)
    first = value.split(",")[0]
    threads = int(first) if first.isdigit() else 0
    numba = f", NUMBA_NUM_THREADS={ranks[0]['NUMBA_NUM_THREADS']}" if ranks[0]["NUMBA_NUM_THREADS"] else ""
    if value == "":
        unset = n > 1 and any(len(one["cores"]) > each for one in ranks)
        key = "threads.unset" if unset else "threads.default"
    elif threads == 0:
        key = "threads.wrong"
    elif threads * n > cores and threads > 1:
        key = "threads.many"
    else:
        key = "threads.few" if threads * 2 <= each else "threads.ok"
    return finding(key, value=value, total=threads * n, each=each, cores=cores, ranks=n, numba=numba)
