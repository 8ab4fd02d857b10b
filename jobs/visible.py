"""Which GPUs a rank sees, where Slurm has said it in several variables."""

from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["count_once"]


def count_once(environ: MutableMapping[str, str], devices: Path = Path("/dev")) -> None:
    """Take away what hides GPUs of AMD a second time, before torch is loaded. Local.

    Where a site has not said what its GPUs are (``Flags=amd_gpu_env`` or ``AutoDetect=rsmi``), Slurm sets
    ROCR_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES to the same numbers. HIP takes the second for numbers among what the first
    has left: with "1" in both it sees no GPU, with "2,3" none either. Nothing changes on GPUs of NVIDIA, or where the two
    differ.
    """
    first = environ.get("ROCR_VISIBLE_DEVICES")
    if first and (devices / "kfd").exists() and not (devices / "nvidiactl").exists():
        for name in ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"):
            if environ.get(name) == first:
                del environ[name]
