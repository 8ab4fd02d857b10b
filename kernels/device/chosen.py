"""Which kernels a device has: in Triton where that is there and knows the device, else in torch operations."""

from os import environ
from typing import Any

import torch
from numpy.typing import DTypeLike

from mpi_ef.errors import OptionError, briefly

from .backend import DeviceBackend

__all__ = ["kernels_on", "why_not_triton", "why_not_triton_on"]

_LEAST_CAPABILITY = (7, 0)  # of NVIDIA's devices, for atomics and the numbers that kernels use


def why_not_triton(device: torch.device) -> str:
    """Return why the kernels of a device are not those in Triton; "" where they are. Local.

    Raises `OptionError` where MPI_EF_DEVICE_KERNELS asks for kernels that there are not.

    On tensors of the CPU they run in Triton's interpreter, for tests, where TRITON_INTERPRET=1 is set.
    """
    if wanted := environ.get("MPI_EF_DEVICE_KERNELS", ""):
        if wanted != "torch":
            raise OptionError(f"MPI_EF_DEVICE_KERNELS={briefly(wanted)} names no kernels; set it to torch, or not at all")
        return "MPI_EF_DEVICE_KERNELS=torch is set"
    if device.type == "cpu" and environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU"
    if device.type not in ("cpu", "cuda"):
        return f"they were not written for {device.type}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below 7.0"
    try:
        import triton  # noqa: F401
    except Exception as error:  # of a broken one, whatever it raises
        return f"triton cannot be imported ({' '.join(str(error).split())})"
    return ""


def why_not_triton_on(device: str) -> str:
    """Return the same of a device by the name that :func:`mpi_ef.kernels.backend.backend` has for it. Local."""
    return why_not_triton(torch.device(device.removeprefix("side:")))


def kernels_on(dtype: DTypeLike, device: str) -> Any:
    """Return the kernels for vectors of `dtype` on `device`. Local."""
    if why_not_triton_on(device):
        return DeviceBackend(dtype, device)
    from .triton_backend import TritonBackend

    return TritonBackend(dtype, device)
