"""What vectors on GPUs need: kernels, memory of the host that may be page-locked, a place for what Triton compiles."""

import resource
from pathlib import Path

from mpi_ef.jobs.doctor.checks.files import NETWORK, existing, file_system
from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context
from mpi_ef.jobs.metrics import in_bytes

__all__ = ["collect", "judge", "triton_cache"]

_PINNED_NBYTES = 16 << 20  # as messages of a hundred million entries, 1 % of them kept


def collect(context: Context) -> Facts:
    """Return what the kernels of each GPU that torch sees are written in, and more of this node. Local; imports torch."""
    import torch

    from mpi_ef.jobs.device import told_of

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    facts: Facts = {"kernels": sorted({told_of(device, str(device)) for device in devices}), "nodes": context.nodes}
    if context.placement.local == 0:
        facts["unpinned"] = _page_lock()
        facts["memory_lock"] = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if any(text.endswith("Triton") for text in facts["kernels"]):
        folder = triton_cache(context)
        facts |= {"triton_path": str(folder), "triton_kind": file_system(existing(folder))}
    return facts


def triton_cache(context: Context) -> Path:
    """Return where Triton keeps what it has compiled. Local."""
    variables = context.environment
    home = Path(variables.get("TRITON_HOME") or Path.home())
    return Path(variables.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _page_lock() -> str:
    """Return why memory of the host cannot be page-locked; nothing where it can. Local."""
    import torch

    try:
        torch.empty(_PINNED_NBYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""


def judge(ranks: Ranks) -> Findings:
    """Yield what kernels there are, of ranks that see GPUs, and what makes them slow."""
    kinds = dict.fromkeys(text for one in ranks for text in one["kernels"] or ())
    of = {text: ranks.which(lambda one: text in (one["kernels"] or ())) for text in kinds}  # noqa: B023
    if quick := [f"{text}{some.where}" for text, some in of.items() if text.endswith("Triton")]:
        yield finding("gpu-kernels.ok", device="; ".join(quick))
    for text, some in of.items():
        if not text.endswith("Triton"):
            kind = next((kind for kind, words in ((".asked", "is set"), (".old", "is below")) if words in text), "")
            yield finding(f"gpu-kernels{kind}", some, device=text)
    if limited := ranks.which("unpinned"):
        limit = limited[0]["memory_lock"]
        shown = "unlimited" if limit in (-1, resource.RLIM_INFINITY) else in_bytes(limit)
        yield finding("gpu-page-locked", limited, reason=limited[0]["unpinned"], limit=shown)
    if together := ranks.which(lambda one: one["triton_kind"] in NETWORK and one["nodes"] > 1):
        place = f"{together[0]['triton_path']} ({together[0]['triton_kind']})"
        yield finding("triton-cache-network", together, place=place)
