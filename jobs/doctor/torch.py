"""What the doctor tries with torch: GPUs, whether MPI takes their memory, whether worker processes of a DataLoader start."""

import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from mpi_ef.jobs.doctor.finding import Finding, Spot, Told, by_value, who

__all__ = ["DATA_TEST", "gpu_aware", "gpu_facts", "judge_gpu", "judge_loader", "loader_facts"]

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_SLOW_IMPORT_SECONDS = 30.0
# What launchers leave in the environment: without it a process is a world of its own.
_LAUNCHED = (
    "PMI",
    "PMIX",
    "PRTE",
    "HYDI",
    "HYDRA",
    "MPI_LOCAL",
    "SLURM",
    "FLUX",
    "JSM",
    "PALS",
    "OMPI_COMM_WORLD",
    "OMPI_UNIVERSE",
    "OMPI_FILE",
    "OMPI_FIRST",
    "OMPI_NUM",
    "OMPI_APP",
    "OMPI_ARGV",
    "OMPI_COMMAND",
    "OMPI_MCA_ess",
    "OMPI_MCA_orte",
)

# A message to itself: an MPI that does not know what a device pointer is copies from it, and dies.
DATA_TEST = """
from mpi4py import MPI
import torch
x = torch.arange(4096, dtype=torch.float32, device="cuda")
y = torch.zeros_like(x)
torch.cuda.synchronize()
MPI.COMM_SELF.Sendrecv(x, 0, recvbuf=y, source=0)
torch.cuda.synchronize()
print("gpu_data", bool((x == y).all()), flush=True)
"""


def gpu_facts(spot: Spot, environment: Mapping[str, str], *, seconds: float = 60.0) -> dict[str, Any]:
    """Return the GPUs that this rank sees, and on rank 0 whether MPI takes their memory. Local; imports torch."""
    began = perf_counter()
    import torch

    facts: dict[str, Any] = {
        "import_seconds": perf_counter() - began,
        "available": torch.cuda.is_available(),
        "count": 0,
        "names": [],
        "built": torch.version.cuda or getattr(torch.version, "hip", None) or "",
        "torch": torch.__version__,
        "hardware": len([*Path("/dev").glob("nvidia[0-9]*")]) or int(Path("/dev/kfd").exists()),
        **{name: environment.get(name) for name in _VISIBLE},
    }
    if facts["available"]:
        facts["count"] = torch.cuda.device_count()
        facts["names"] = sorted({torch.cuda.get_device_name(i) for i in range(facts["count"])})
        if spot.rank == 0:
            facts["aware"] = gpu_aware(environment, seconds)
    return facts


def gpu_aware(environment: Mapping[str, str], seconds: float) -> str:
    """Return "yes", "no" or why nobody knows, as a process of its own has found out: where it is "no" that one dies."""
    alone = {name: value for name, value in environment.items() if not name.startswith(_LAUNCHED)}
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, and a program of ours
            [sys.executable, "-c", DATA_TEST],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            errors="replace",
            env=alone,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s"
    if "gpu_data" in done.stdout:
        return "yes" if "gpu_data True" in done.stdout else "no"
    if done.returncode in (-signal.SIGSEGV, -signal.SIGBUS, 128 + signal.SIGSEGV):
        return "no"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"exit status {done.returncode}: {lines[-1][:200] if lines else 'no reason given'}"


def judge_gpu(told: Sequence[Told]) -> Iterator[Finding]:
    """Yield what there is to say about GPUs."""
    yield from _judge_import(told)
    if not any(one["available"] for one in told):
        yield _no_gpu(told[0])
        return
    seen = by_value(told, "count")
    if len(seen) > 1:
        listed = "; ".join(f"{count}{who(some, told)[0]}" for count, some in seen.items())
        yield Finding(
            "GPU",
            "gpu-differs",
            "warning",
            f"ranks see different numbers of GPUs: {listed}",
            "ask for GPUs by node (--gpus-per-node=N), and leave the choice to rank-on-node % N",
        )
    nodes: dict[str, list[Told]] = {}
    for one in told:
        nodes.setdefault(one.node, []).append(one)
    ranks, gpus = max((len(some), _gpus_of(some)) for some in nodes.values())
    names = ", ".join(told[0]["names"])
    yield Finding(
        "GPU",
        "gpu",
        "ok",
        f"{gpus} GPU{'s' if gpus > 1 else ''} for {ranks} rank{'s' if ranks > 1 else ''} on a node: {names}",
    )
    if gpus < ranks:
        yield Finding(
            "GPU",
            "gpu-shared",
            "note",
            f"{ranks} ranks on a node share {gpus} GPU{'s' if gpus > 1 else ''}",
            "start as many ranks a node as there are GPUs",
        )
    yield _judge_aware(str(told[0]["aware"]))


def _gpus_of(ranks: Sequence[Told]) -> int:
    """Return how many GPUs the ranks of a node see together: each all of them, or each one of its own."""
    choices = {tuple(one[name] for name in _VISIBLE) for one in ranks}
    return int(max(one["count"] for one in ranks) if len(choices) == 1 else sum(one["count"] for one in ranks))


def _judge_aware(aware: str) -> Finding:
    if aware == "yes":
        return Finding("GPU", "gpu-aware", "ok", "MPI takes memory of the GPU (a message to itself arrived)")
    if aware == "no":
        return Finding(
            "GPU",
            "gpu-aware",
            "ok",
            "MPI does not take memory of the GPU; mpi_ef needs it in no place: messages are in memory of the host",
        )
    return Finding(
        "GPU",
        "gpu-aware",
        "note",
        f"whether MPI takes memory of the GPU could not be found out: {aware}",
        "mpi_ef does not need it; give MPI memory of the host in programs of your own",
    )


def _no_gpu(one: Told) -> Finding:
    if not one["hardware"]:
        return Finding("GPU", "gpu", "ok", "none")
    if not one["built"]:
        return Finding(
            "GPU",
            "gpu-torch",
            "note",
            f"the node has GPUs, but torch {one['torch']} is built for the CPU",
            "install a torch with CUDA or ROCm to use them",
        )
    hidden = [name for name in _VISIBLE if one[name] in ("", "-1", "NoDevFiles")]
    todo = "look at nvidia-smi or rocminfo: is the driver older than torch?"
    if hidden:
        todo = f"unset {hidden[0]}, or ask for GPUs (--gpus-per-node)"
    return Finding(
        "GPU",
        "gpu-hidden",
        "note",
        f"the node has GPUs, but torch {one['torch']} sees none{f': {hidden[0]} is empty' if hidden else ''}",
        todo,
    )


def _judge_import(told: Sequence[Told]) -> Iterator[Finding]:
    slowest = max(told, key=lambda one: float(one["import_seconds"]))
    seconds = float(slowest["import_seconds"])
    if seconds > _SLOW_IMPORT_SECONDS:
        yield Finding(
            "Files",
            "slow-import",
            "warning",
            f"import torch took {seconds:.0f} s on rank {slowest.rank} ({slowest.node})",
            "keep the environment on a disk of the node: pack it, sbcast it, unpack it once a node; or use a container",
            (slowest.rank,),
        )


def worker(answers: Any) -> None:
    """Tell whether MPI was started in this process; what a worker of the check runs."""
    module = sys.modules.get("mpi4py.MPI")
    answers.put(bool(module is not None and module.Is_initialized()))


def loader_facts(seconds: float = 30.0) -> dict[str, Any]:
    """Start a process as DataLoaders should start their workers, and tell what it has found. Local; imports torch."""
    from mpi_ef.data import loader_context

    module = sys.modules.get("mpi4py.MPI")
    facts: dict[str, Any] = {
        "default": multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
        "mpi_here": bool(module is not None and module.Is_initialized()),
    }
    context = loader_context()
    began, answers = perf_counter(), context.SimpleQueue()
    process = context.Process(target=worker, args=(answers,), daemon=True)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        return facts | {"problem": f"a worker had not ended after {seconds:.0f} s"}
    if process.exitcode:
        return facts | {"problem": f"a worker ended with status {process.exitcode}"}
    return facts | {"mpi_in_worker": answers.get(), "seconds": perf_counter() - began}


def judge_loader(told: Sequence[Told]) -> Iterator[Finding]:
    """Yield what there is to say about worker processes."""
    broken = [one for one in told if one["problem"]]
    started = [one for one in told if one["mpi_in_worker"]]
    if broken:
        where, ranks = who(broken, told)
        yield Finding(
            "Data",
            "loader",
            "warning",
            f"workers of a DataLoader do not start: {broken[0]['problem']}{where}",
            'use num_workers=0, or find out with python -c "import mpi_ef; '
            "mpi_ef.loader_context().Process(target=print)"
            '.start()"',
            ranks,
        )
    elif started:
        where, ranks = who(started, told)
        yield Finding(
            "Data",
            "loader",
            "error",
            f"a worker from loader_context() has started MPI{where}",
            "start no fork server before loader_context() is called, and no MPI in sitecustomize",
            ranks,
        )
    else:
        seconds = max(float(one["seconds"]) for one in told)
        default = told[0]["default"]
        plain = ""
        if default == "fork" and told[0]["mpi_here"]:
            plain = "; the default, fork, does not go with MPI"
        yield Finding(
            "Data",
            "loader",
            "ok",
            f"DataLoader workers: mpi_ef.loader_context() works ({seconds:.1f} s){plain}",
        )
