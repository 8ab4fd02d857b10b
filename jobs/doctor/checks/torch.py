"""GPUs as torch sees them, and whether MPI takes their memory."""

import signal
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

from mpi_ef.errors import counted
from mpi_ef.jobs.doctor.checks import on_gpu
from mpi_ef.jobs.doctor.finding import Facts, Findings, RankFacts, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context
from mpi_ef.jobs.doctor.watchdog import run_python

__all__ = ["collect", "gpu_aware", "judge"]

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_SLOW_IMPORT_SECONDS = 30.0
# What launchers leave in the environment: without it a process is a world of its own.
_LAUNCHED = ("PMI", "PMIX", "PRTE", "HYDI", "HYDRA", "MPI_LOCAL", "SLURM", "FLUX", "JSM", "PALS", "OMPI_COMM_WORLD",
             "OMPI_UNIVERSE", "OMPI_FILE", "OMPI_FIRST", "OMPI_NUM", "OMPI_APP", "OMPI_ARGV", "OMPI_COMMAND", "OMPI_MCA_ess",
             "OMPI_MCA_orte")
# A message to itself: an MPI that does not know what a device pointer is copies from it, and dies.
_MESSAGE = """
from mpi4py import MPI
import torch
x = torch.arange(4096, dtype=torch.float32, device="cuda")
y = torch.zeros_like(x)
torch.cuda.synchronize()
MPI.COMM_SELF.Sendrecv(x, 0, recvbuf=y, source=0)
torch.cuda.synchronize()
print("gpu_data", bool((x == y).all()), flush=True)
"""


def collect(context: Context) -> Facts:
    """Return the GPUs that this rank sees, and on rank 0 whether MPI takes their memory. Local; imports torch."""
    began = perf_counter()
    import torch

    facts: Facts = {
        "import_seconds": perf_counter() - began,
        "available": torch.cuda.is_available(),
        "count": 0,
        "names": [],
        "built": torch.version.cuda or getattr(torch.version, "hip", None) or "",
        "hip": bool(getattr(torch.version, "hip", None)),
        "torch": torch.__version__,
        "hardware": len([*Path("/dev").glob("nvidia[0-9]*")]) or int(Path("/dev/kfd").exists()),
        **{name: context.environment.get(name) for name in _VISIBLE},
    }
    if facts["available"]:
        facts["count"] = torch.cuda.device_count()
        facts["names"] = sorted({torch.cuda.get_device_name(i) for i in range(facts["count"])})
        facts |= on_gpu.collect(context)
        if context.placement.rank == 0:
            facts["aware"] = gpu_aware(context.environment)
    return facts


def gpu_aware(environment: Mapping[str, str], seconds: float = 60.0) -> str:
    """Return "yes", "no" or why that is not known, tried in a process of its own: where it is "no" that one dies."""
    alone = {name: value for name, value in environment.items() if not name.startswith(_LAUNCHED)}
    status, printed, errors = run_python(_MESSAGE, seconds, alone)
    if "gpu_data" in printed:
        return "yes" if "gpu_data True" in printed else "no"
    if status in (-signal.SIGSEGV, -signal.SIGBUS, 128 + signal.SIGSEGV):
        return "no"
    return errors[-1] if status is None else f"exit status {status}: {errors[-1][:200]}"


def judge(ranks: Ranks) -> Findings:
    """Yield which GPUs there are, and how ranks share them."""
    first, slowest = ranks[0], max(ranks, key=lambda one: one["import_seconds"])
    if slowest["import_seconds"] > _SLOW_IMPORT_SECONDS:
        place = f"rank {slowest.rank} ({slowest.node})"
        yield finding("slow-import", [slowest.rank], seconds=slowest["import_seconds"], place=place)
    if twice := ranks.which(_hidden_twice):
        hiding = "CUDA_VISIBLE_DEVICES" if twice[0]["HIP_VISIBLE_DEVICES"] is None else "HIP_VISIBLE_DEVICES"
        yield finding("gpu-hidden.twice", twice, variable=hiding, numbers=twice[0][hiding])
    if not ranks.which("available"):
        if twice:
            return
        hidden = [name for name in _VISIBLE if first[name] in ("", "-1", "NoDevFiles")]
        key = "gpu-hidden.empty" if hidden else "gpu-hidden"
        if not (first["built"] and first["hardware"]):
            key = "gpu-torch" if first["hardware"] else "gpu.none"
        yield finding(key, ranks, variable=next(iter(hidden), ""))
        return
    seen = ranks.by_value("count")
    if len(seen) > 1:
        yield finding("gpu-differs", counts="; ".join(f"{count}{some.where}" for count, some in seen.items()))
    here, count = max((len(some), _gpus_of(some)) for some in ranks.by(lambda one: one.node).values())
    gpus, sharing = counted(count, "GPU"), counted(here, "rank")
    yield finding("gpu", gpus=gpus, ranks=sharing, names=", ".join(first["names"]))
    if count < here:
        yield finding("gpu-shared", gpus=gpus, ranks=sharing)
    yield from on_gpu.judge(ranks)
    aware = first["aware"]
    yield finding(f"gpu-aware.{aware}" if aware in ("yes", "no") else "gpu-aware", reason=aware)


def _hidden_twice(one: RankFacts) -> bool:
    """Return whether HIP is left with no GPU, as it counts among those that ROCR_VISIBLE_DEVICES has left."""
    left, numbers = (one[name] for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
    numbers = one["CUDA_VISIBLE_DEVICES"] if numbers is None else numbers
    return bool(one["hip"] and not one["available"] and left and numbers)


def _gpus_of(ranks: Ranks) -> int:
    """Return how many GPUs the ranks of a node see together: each all of them, or each one of its own."""
    choices = {tuple(one[name] for name in _VISIBLE) for one in ranks}
    counts = [int(one["count"]) for one in ranks]
    return max(counts) if len(choices) == 1 else sum(counts)
