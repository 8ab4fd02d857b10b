"""Nodes, cores and threads of the ranks."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.errors import counted
from mpi_ef.jobs.doctor.finding import Facts, Finding, Findings, Ranks, finding, listed
from mpi_ef.jobs.doctor.registry import Context, lines_of

__all__ = ["collect", "judge", "quota"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def collect(context: Context) -> Facts:
    """Return the cores and threads of this rank. Local."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    models = (line for line in lines_of("/proc/cpuinfo") if line.startswith(("model name", "CPU part")))
    return {
        "world": context.comm is not None,
        "cores": sorted(cores),
        "of_node": os.cpu_count() or 1,
        "quota": quota(),
        "processor": next(models, "").partition(":")[2].strip(),
        "asked": context.environment.get("SLURM_CPUS_PER_TASK", ""),
        **{name: context.environment.get(name, "") for name in _THREADS},
    }


def quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many cores a container may keep busy; None without a limit. Local."""
    limits = []
    for line in lines_of(groups):
        _, kinds, place = line.split(":", 2)
        old = "cpu" in kinds.split(",")  # the first version of groups
        top, names = (root / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")) if old else (root, ("cpu.max",))
        inner = top / place.strip("/")  # a group is limited by those above it; in a container the root is the group itself
        for folder in (inner, *inner.parents) if old or not kinds else ():
            words = " ".join(line for name in names for line in lines_of(folder / name)).split()
            if folder.is_relative_to(top) and len(words) == 2 and words[0].isdigit():  # neither "max" nor -1
                limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def judge(ranks: Ranks) -> Findings:
    """Yield how ranks lie on nodes and cores, and how many threads they start; of a process alone only its cores."""
    if not ranks[0]["world"]:
        yield finding("binding.alone", ranks, cores=len(ranks[0]["cores"]))
        return
    nodes = ranks.by(lambda one: one.node)
    yield from _judge_nodes(nodes)
    alike: dict[Finding, list[str]] = {}  # what holds for several nodes is one finding
    for node, some in nodes.items():
        for found in (*_judge_cores(some), _judge_threads(some)):
            alike.setdefault(found, []).append(node)
    for found, names in alike.items():
        if len(names) == len(nodes):
            yield found
        else:
            about = tuple(one.rank for node in names for one in nodes[node])
            yield replace(found, what=f"{found.what} on {listed(names)}", ranks=about)
    if few := ranks.which(lambda one: one["asked"].isdigit() and int(one["asked"]) > len(one["cores"])):
        yield finding("few-cores", few, cores=counted(len(few[0]["cores"]), "core"))


def _judge_nodes(nodes: dict[str, Ranks]) -> Findings:
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


def _judge_cores(ranks: Ranks) -> Findings:
    """Yield how the ranks of a node share its cores; rank numbers only where they matter."""
    ranks_on = Counter(core for one in ranks for core in one["cores"])
    cores, n, of_node, limit = len(ranks_on), len(ranks), ranks[0]["of_node"], ranks[0]["quota"]
    crowded = ranks.which(lambda one: sum(1 / ranks_on[core] for core in one["cores"]) < 0.999)
    sizes = sorted({len(one["cores"]) for one in ranks})
    if limit is not None and limit < cores - 0.01:
        yield finding("cpu-quota", severe=limit < n, limit=limit, cores=cores)
    if n > of_node:
        yield finding("oversubscribed", ranks=n, cores=counted(of_node, "core"), of_node=of_node)
    elif crowded:
        shared = ranks_text(core for one in crowded for core in one["cores"]).replace("rank", "core", 1)
        yield finding("binding", ranks=ranks_text(one.rank for one in crowded), cores=shared, of_node=of_node)
    elif max(ranks_on.values()) == 1:
        size = counted(sizes[0], "core") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} cores"
        yield finding("binding.bound", cores=size, of_node=of_node)
    else:
        yield finding("binding.free", ranks=n, cores=counted(cores, "core"))
    for name in _THREADS:
        values = sorted({one[name] or "not set" for one in ranks})
        if len(values) > 1:
            yield finding("threads-differ", variable=name, values=", ".join(values))


def _judge_threads(ranks: Ranks) -> Finding:
    """Return whether the ranks of a node start as many threads as there are cores."""
    cores, n = len({core for one in ranks for core in one["cores"]}), len(ranks)
    each = max(1, cores // n)
    value = max(one["OMP_NUM_THREADS"] for one in ranks)
    first = value.split(",")[0]
    threads = int(first) if first.isdigit() else 0
    numba = f", NUMBA_NUM_THREADS={ranks[0]['NUMBA_NUM_THREADS']}" if ranks[0]["NUMBA_NUM_THREADS"] else ""
    kinds = [("unset", not value and n > 1 and any(len(one["cores"]) > each for one in ranks)), ("default", not value),
             ("wrong", threads == 0), ("many", threads * n > cores and threads > 1), ("few", threads * 2 <= each)]
    kind = next((kind for kind, holds in kinds if holds), "ok")
    return finding(f"threads.{kind}", value=value, total=threads * n, each=each, cores=cores, ranks=n, numba=numba)
