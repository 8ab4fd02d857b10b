"""The compiled kernels: whether they are right, and where their machine code is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpi_ef.jobs.doctor.checks.files import NETWORK, file_system
from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context, trial_in

__all__ = ["collect", "dispatchers", "judge"]


def collect(context: Context) -> Facts:
    """Run a small kernel, and return where machine code is kept, and of how many kernels. Local; imports Numba."""
    import numpy as np

    from mpi_ef import kernels
    from mpi_ef.kernels._cache import MachineCodeCache, refusal

    finite = [bool(kernels.all_finite(x)) for x in (np.ones(9, np.float32), np.full(9, np.nan, np.float32))]
    caches = [getattr(kernel, "_cache", None) for kernel in dispatchers()]
    path = str(getattr(next(iter(caches), None), "cache_path", None) or "")
    facts = {"right": finite == [True, False], "path": path, "nodes": context.nodes, "warm_up": context.config.warmup}
    files = [cache.files for cache in caches if isinstance(cache, MachineCodeCache)]
    facts |= {"there": sum(each.there() for each in files), "total": len(files)}
    if path:
        folder = Path(path)
        facts["kind"] = file_system(folder)
        facts["open"] = bool(refusal(folder.stat(), 0o002))
        try:
            with trial_in(folder) as trial:
                (trial / "file").write_bytes(b"x")
            facts["write"] = ""
        except OSError as error:
            facts["write"] = error.strerror or str(error)
    return facts


def dispatchers() -> Iterator[Any]:
    """Yield what Python calls of the kernels: compiled functions, some of them through a plain one. Local."""
    from mpi_ef import kernels

    for kernel in (getattr(kernels, name) for name in kernels.__all__):
        if hasattr(kernel, "stats"):
            yield kernel
        elif hasattr(kernel, "__code__"):
            called = (kernel.__globals__.get(name) for name in kernel.__code__.co_names)
            yield from (function for function in called if hasattr(function, "stats"))


def judge(ranks: Ranks) -> Findings:
    """Yield whether kernels are right, and their machine code is in a good place."""
    if wrong := ranks.which(lambda one: not one["right"]):
        yield finding("kernels", wrong)
    if lost := ranks.which(lambda one: not one["path"] or one["write"]):
        reason = f"{lost[0]['path']}: {lost[0]['write']}" if lost[0]["path"] else "no folder can be written"
        yield finding("cache", lost, reason=reason)
        return
    one = next((some for some in ranks if some["kind"] in NETWORK), ranks[0])
    others = " and others" if len(ranks.by_value("path")) > 1 else ""
    disturbed = one["kind"] in NETWORK and one["nodes"] > 1
    key = "cache-network" if disturbed else "cache-open" if ranks.which("open") else "cache.ok"
    yield finding(key, place=f"{one['path']}{others} ({one['kind']})")
    cold = ranks.which(lambda some: some["total"] and some["there"] < some["total"])
    if cold and not one["warm_up"]:
        yield finding("cache-cold", cold)
