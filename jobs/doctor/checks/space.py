"""Space on a node: temporary files, shared memory, memory that may be locked."""

import resource
import uuid
from pathlib import Path

from mpi_ef.errors import counted
from mpi_ef.jobs.doctor.checks.files import MB, NETWORK, attempt, existing, space_of
from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context
from mpi_ef.jobs.metrics import in_bytes

__all__ = ["collect", "judge"]

_SHM = Path("/dev/shm")  # noqa: S108 - where the C library looks
_LEAST_TMP = 256 * MB
_LONG_PATH = 80  # of 107 characters that the name of a socket may have


def collect(context: Context) -> Facts:
    """Return space for temporary files and shared memory on this node. Local."""
    tmp = Path(context.environment.get("TMPDIR") or "/tmp")  # noqa: S108 - the usual default
    facts: Facts = {}
    for kind, folder in (("tmp", tmp), ("shm", _SHM)):
        if folder is tmp or folder.is_dir():
            facts |= {f"{kind}_{name}": value for name, value in space_of(existing(folder)).items()}
            facts[f"{kind}_write"] = attempt(lambda: _write_and_remove(folder / uuid.uuid4().hex))  # noqa: B023
    return facts | {
        "tmp_path": str(tmp),
        "memory_lock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": any(Path("/sys/class/infiniband").glob("*")),
        "ranks_here": sum(placement.node == context.placement.node for placement in context.placements),
    }


def _write_and_remove(path: Path) -> None:
    try:
        path.write_bytes(bytes(MB))
    finally:
        path.unlink(missing_ok=True)


def _shm_wanted(ranks: int) -> int:
    """Return what MPI and workers of DataLoaders are likely to need of shared memory."""
    return (64 + 16 * ranks) * MB


def judge(ranks: Ranks) -> Findings:
    """Yield whether there is space for temporary files and shared memory."""
    if closed := ranks.which("tmp_write"):
        yield finding("tmp", closed)
    else:
        least = Ranks([min(ranks, key=lambda one: one["tmp_free"])])
        path, free, several = least[0]["tmp_path"], least[0]["tmp_free"], len(ranks) > 1
        place = f" on {least[0].node}" if several else ""
        yield finding("tmp-space" if free < _LEAST_TMP else "tmp.ok", least, free=in_bytes(free), place=place)
        if least[0]["tmp_kind"] in NETWORK and several:
            yield finding("tmp-network", least)
        if len(path) > _LONG_PATH:
            yield finding("tmp-path", least, length=len(path))
    if absent := ranks.which(lambda one: one["shm_path"] is None):
        yield finding("shm.absent", absent)
    elif full := ranks.which(lambda one: one["shm_write"] or one["shm_free"] < _shm_wanted(one["ranks_here"])):
        reason = f": {full[0]['shm_write']}" if full[0]["shm_write"] else ""
        here = counted(full[0]["ranks_here"], "rank")
        yield finding("shm", full, free=in_bytes(full[0]["shm_free"]), ranks=here, reason=reason)
    else:
        yield finding("shm.ok", free=in_bytes(min(one["shm_free"] for one in ranks)))
    if limited := ranks.which(lambda one: one["infiniband"] and one["memory_lock"] not in (-1, resource.RLIM_INFINITY)):
        yield finding("memory-lock", limited, limit=in_bytes(limited[0]["memory_lock"]))
