"""On which device a rank of a program computes."""

import torch

from mpi_ef import local_device
from mpi_ef.comm.consensus import agree, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.devices import count_gpus
from mpi_ef.errors import ConfigError, counted
from mpi_ef.kernels.backend import written_in

__all__ = ["described", "device_for", "move_to", "told_of"]


def device_for(comm: Comm, asked: str | None, program: str) -> torch.device:
    """Return the device that the option ``--device`` of a program asks for on this rank; None is auto. Collective.

    Raises
    ------
    ConfigError
        On all ranks, where one of them does not have it.
    """
    if asked == "cpu":
        return torch.device("cpu")
    if asked not in (None, "auto"):
        wanted = torch.device(str(asked))

        def facts() -> dict[str, object]:
            count = count_gpus(f"device={asked}")
            if (wanted.index or 0) >= count:
                raise ConfigError(f"device={asked}: torch sees {counted(count, 'GPU')} here; ask for more of them, or take "
                                  "device=auto or cpu")
            return {}

        agree(comm, program, facts, "")
        if wanted.index is not None:
            return wanted
    return local_device(comm, share=True)


def move_to(model: torch.nn.Module, device: torch.device, comm: Comm, program: str) -> None:
    """Move a model to the device of this rank; where there is no room on one, all raise. Collective."""

    def facts() -> dict[str, object]:
        model.to(device)
        return {}

    agree(comm, program, facts, "")


def told_of(device: torch.device, vectors: str) -> str:
    """Return the name of a device, and what its kernels are written in; where that is not Triton, why. Local.

    `vectors` is as for :func:`described`.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, kernels in {written_in(vectors)}"


def described(comm: Comm, device: torch.device, vectors: str) -> dict[str, str]:
    """Return devices and what their kernels are written in, each with its ranks. Collective.

    `vectors` is what :func:`mpi_ef.kernels.backend.backend` calls the place of the vectors of this rank.
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(comm.allgather(told_of(device, vectors))):
        ranks.setdefault(text, []).append(rank)
    return {text: ranks_text(found) for text, found in ranks.items()}
