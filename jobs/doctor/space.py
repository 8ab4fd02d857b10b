"""What the doctor knows of space on a node: temporary files, shared memory, memory that may be locked."""

import resource
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpi_ef.jobs.doctor.files import MB, NETWORK, attempt, existing, space_of
from mpi_ef.jobs.doctor.finding import Finding, Told, who
from mpi_ef.jobs.metrics import in_bytes

__all__ = ["judge_space", "space_facts"]

_LEAST_TMP = 256 * MB
_SHM_FOR_ALL, _SHM_PER_RANK = 64 * MB, 16 * MB  # what MPI and workers of DataLoaders are likely to want
_LONG_PATH = 80  # of 107 characters that the name of a socket may have


def space_facts(environment: Mapping[str, str], shm: Path = Path("/dev/shm")) -> dict[str, Any]:  # noqa: S108
    """Return space for temporary files and shared memory on this node. Local."""
    tmp, trial = Path(environment.get("TMPDIR") or "/tmp"), uuid.uuid4().hex  # noqa: S108 - where everybody looks
    facts: dict[str, Any] = {f"tmp_{name}": value for name, value in space_of(existing(tmp)).items()}
    facts |= {"tmp_path": str(tmp), "tmp_write": attempt(lambda: _write_and_remove(tmp / trial))}
    if shm.is_dir():
        facts |= {f"shm_{name}": value for name, value in space_of(shm).items()}
        facts["shm_write"] = attempt(lambda: _write_and_remove(shm / trial))
    facts["memory_lock"] = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    facts["infiniband"] = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    return facts


def _write_and_remove(path: Path) -> None:
    try:
        path.write_bytes(bytes(MB))
    finally:
        path.unlink(missing_ok=True)


def judge_space(told: Sequence[Told], ranks_on: Mapping[str, int]) -> Iterator[Finding]:
    """Yield what there is to say about temporary files and shared memory.

    Parameters
    ----------
    told : sequence of Told
        One of every node.
    ranks_on : mapping of str to int
        How many ranks a node has.
    """
    yield from _judge_tmp(told)
    yield from _judge_shm(told, ranks_on)
    tight = [one for one in told if one["infiniband"] and one["memory_lock"] not in (-1, resource.RLIM_INFINITY)]
    if tight:
        where, ranks = who(tight, told)
        yield Finding(
            "Network",
            "memory-lock",
            "warning",
            f"only {in_bytes(tight[0]['memory_lock'])} of memory may be locked, and the node has InfiniBand{where}",
            "ask the site for ulimit -l unlimited in jobs; submit from a shell that has it, or sbatch --propagate=NONE",
            ranks,
        )


def _judge_tmp(told: Sequence[Told]) -> Iterator[Finding]:
    bad = [one for one in told if one["tmp_write"]]
    if bad:
        where, ranks = who(bad, told)
        yield Finding(
            "Files",
            "tmp",
            "error",
            f"nothing can be written to {bad[0]['tmp_path']} (for temporary files): {bad[0]['tmp_write']}{where}",
            "export TMPDIR=... to a folder of the node that has space",
            ranks,
        )
        return
    least = min(told, key=lambda one: int(one["tmp_free"]))
    path, free = least["tmp_path"], least["tmp_free"]
    place = f" on {least.node}" if len(told) > 1 else ""
    if free < _LEAST_TMP:
        yield Finding(
            "Files",
            "tmp-space",
            "warning",
            f"{in_bytes(free)} free in {path}, for temporary files{place}",
            "export TMPDIR=... to a folder of the node that has space; MPI and compilers need some",
        )
    else:
        yield Finding(
            "Files",
            "tmp",
            "ok",
            f"temporary files go to {path}: {least['tmp_kind'] or 'unknown'}, {in_bytes(free)} free",
        )
    if least["tmp_kind"] in NETWORK and len(told) > 1:
        yield Finding(
            "Files",
            "tmp-network",
            "warning",
            f"temporary files go to {path}, which is on a network ({least['tmp_kind']})",
            "export TMPDIR=/tmp or another folder of the node: MPI's shared memory and sockets must not be on a "
            "network",
        )
    if len(path) > _LONG_PATH:
        yield Finding(
            "Files",
            "tmp-path",
            "warning",
            f"the name of the folder for temporary files has {len(path)} characters: {path}",
            "export TMPDIR=/tmp: names of sockets in it may not exceed 107 characters, and workers of DataLoaders "
            "and MPI make some",
        )


def _judge_shm(told: Sequence[Told], ranks_on: Mapping[str, int]) -> Iterator[Finding]:
    absent = [one for one in told if one["shm_path"] is None]
    if absent:
        where, ranks = who(absent, told)
        yield Finding(
            "Files",
            "shm",
            "warning",
            f"there is no /dev/shm{where}",
            "mount a tmpfs there (container: --shm-size or --ipc=host): MPI and DataLoaders move data through it",
            ranks,
        )
        return
    tight = [
        one
        for one in told
        if one["shm_write"] or one["shm_free"] < _SHM_FOR_ALL + _SHM_PER_RANK * ranks_on.get(one.node, 1)
    ]
    if tight:
        where, ranks = who(tight, told)
        reason = f": {tight[0]['shm_write']}" if tight[0]["shm_write"] else ""
        yield Finding(
            "Files",
            "shm",
            "warning",
            f"{in_bytes(tight[0]['shm_free'])} free in /dev/shm for {ranks_on.get(tight[0].node, 1)} "
            f"ranks{reason}{where}",
            "in a container: --shm-size=8g or --ipc=host; else remove what dead jobs have left there",
            ranks,
        )
    else:
        least = min(told, key=lambda one: int(one["shm_free"]))
        yield Finding("Files", "shm", "ok", f"shared memory: {in_bytes(least['shm_free'])} free in /dev/shm")
