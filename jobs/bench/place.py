"""Where the vectors of the benchmark are: in memory of the host, or of the device of this rank."""

from typing import Any

import numpy as np
import torch

from mpi_ef.kernels.backend import backend, side_of

__all__ = ["Place"]


class Place:
    """A device, as torch and as kernels call it, and what a measurement asks of it.

    Attributes
    ----------
    device : torch.device
    name : str
        What :func:`mpi_ef.kernels.backend.backend` calls it.
    kernels : object
        Those for vectors of float32 there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, side_of(device.type, device.index)
        self.kernels = backend(np.dtype(np.float32), self.name)

    @property
    def on_host(self) -> bool:
        """Whether kernels and MPI see the same memory."""
        return self.name == "cpu"

    def tensor(self, x: Any) -> torch.Tensor:
        """Return a vector of the kernels as a tensor over the same memory."""
        tensor: torch.Tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x.tensor
        return tensor

    def to_host(self, x: Any, host: np.ndarray) -> None:
        """Copy a vector of the kernels to one that MPI sees, and wait for it."""
        if self.on_host:
            host[:] = x
        else:
            self.kernels.to_host(x, host)

    def to_device(self, host: np.ndarray, x: Any) -> None:
        """Copy a vector that MPI sees to one of the kernels."""
        if self.on_host:
            x[:] = host
        else:
            self.kernels.to_device(host, x)

    def synchronise(self) -> None:
        """Wait until the device has done everything. Local."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int | None:
        """Return the bytes that torch has given out on the device; None where it does not count them. Local."""
        self.synchronise()
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None
