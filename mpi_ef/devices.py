"""Which GPU a rank computes on."""

from socket import gethostname
from typing import Any

import torch

from mpi_ef.comm.consensus import agree, check_not_freed, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError, briefly, counted, everywhere, told

__all__ = ["local_device"]


def local_device(comm: Comm, *, share: bool = False) -> torch.device:
    """Return the GPU for this rank, one for each rank of a node; the CPU where torch sees no GPU. Collective.

    It is the GPU, of those that this rank sees, whose number is that of the rank on its node, modulo how many it sees: the
    only one where Slurm shows each task its own (``--gpus-per-task``), the next one where all tasks of a node see all
    (``--gpus-per-node``). Nothing is changed: no ``torch.cuda.set_device``, no memory on a GPU.

    Parameters
    ----------
    comm : MPI.Comm
        Any intracommunicator. Ranks are on a node together where they can share memory; over a process group of torch,
        which does not tell, where the name of the host is the same.
    share : bool
        Let ranks of a node have a GPU in common where there are more ranks than GPUs. The same on all ranks.

    Returns
    -------
    torch.device
        ``cuda`` with an index, also for GPUs of AMD, or ``cpu``. Ranks may have different kinds.

    Raises
    ------
    OptionError
        On all ranks, where several of them would have the same GPU, known by its UUID, without `share`. On a rank whose GPUs
        cannot be asked; all others raise `PeerError`.
    DisagreementError
        On all ranks, when `share` differs between them.

    Notes
    -----
    Cost: two small allgathers, and one split of the communicator.
    """
    check_not_freed(comm, "local_device")
    if comm.Is_inter():
        raise OptionError(f"local_device: comm={briefly(comm)} is not an intracommunicator; pass for example MPI.COMM_WORLD")
    place, beside = _on_node(comm)
    mine = ["cpu", "", beside]  # filled by facts, before it is sent

    def facts() -> dict[str, object]:
        if torch.cuda.is_available():
            mine[:2] = _chosen(place)
        return {"share": share}

    answers = agree(comm, "local_device", facts, "pass the same on all ranks", value=mine)
    if not share:
        _check_apart(answers)
    return torch.device(str(mine[0]))


def _on_node(comm: Any) -> tuple[int, int]:
    """Return the number of this rank on its node, and the first rank there. Collective."""
    rank = int(comm.Get_rank())
    if not hasattr(comm, "Split_type"):
        hosts = comm.allgather(gethostname())
        beside = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    else:
        from mpi4py import MPI

        node = comm.Split_type(MPI.COMM_TYPE_SHARED, rank)
        beside = node.allgather(rank)
        node.Free()
    return beside.index(rank), beside[0]


def _chosen(place: int) -> tuple[str, str]:
    """Return the device for the rank with that number on its node, and what tells its hardware from any other. Local."""
    try:
        index = place % torch.cuda.device_count()
        asked = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"local_device: the GPUs here cannot be asked ({told(error)}); look at nvidia-smi or rocminfo, or "
                          "hide them with CUDA_VISIBLE_DEVICES= to compute on the CPU") from error
    bus = [getattr(asked, f"pci_{name}_id", 0) for name in ("domain", "bus", "device")]
    return f"cuda:{index}", f"{getattr(asked, 'uuid', '')} at {bus[0]:04x}:{bus[1]:02x}:{bus[2]:02x}".strip()


def _check_apart(answers: list[tuple[str, str, int]]) -> None:
    """Raise where ranks of a node have the same GPU, by what :func:`local_device` knows of all ranks. Local."""
    ranks: dict[tuple[str, int], list[int]] = {}
    for rank, (_, hardware, node) in enumerate(answers):
        if hardware:
            ranks.setdefault((hardware, node), []).append(rank)
    shared = [there for there in ranks.values() if len(there) > 1]
    if shared:
        device, hardware, _ = answers[shared[0][0]]
        more = f", and others share {counted(len(shared) - 1, 'more GPU')}" if len(shared) > 1 else ""
        raise everywhere(OptionError(f"local_device: {ranks_text(shared[0])} would share one GPU ({device}, {hardware})"
                                     f"{more}; start as many ranks a node as it has GPUs, or pass share=True"))
