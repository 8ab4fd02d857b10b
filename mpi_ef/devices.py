"""Which GPU a rank computes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from socket import gethostname
from typing import Any

import torch

from mpi_ef.comm.consensus import agree, check_not_freed, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import OptionError, briefly, counted, everywhere, told

__all__ = ["count_gpus", "local_device"]


def local_device(comm: Comm, *, share: bool = False) -> torch.device:
    """Return the GPU for this rank, one for each rank of a node; the CPU where torch sees no GPU. Collective.

    The first rank of a node takes the first GPU that it sees, every next one the first that is left of those which it sees:
    the only one where Slurm shows each task its own (``--gpus-per-task``), the next one where all tasks of a node see all
    (``--gpus-per-node``). Where ranks see some of them each (``--gpu-bind=closest``), they get different ones if possible.
    A rank for which none is left takes one that it sees by its number on the node. Nothing is changed: no
    ``torch.cuda.set_device``, no memory on a GPU.

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
    mine: list[Any] = [_first_on_node(comm)]  # facts add what this rank sees, before it is sent

    def facts() -> dict[str, object]:
        mine.append(_visible())
        return {"share": share}

    answers = agree(comm, "local_device", facts, "pass the same on all ranks", value=mine)
    nodes: dict[int, dict[int, list[str]]] = {}
    for rank, (node, visible) in enumerate(answers):
        if visible:
            nodes.setdefault(node, {})[rank] = visible
    chosen = {rank: index for ranks in nodes.values()
              for rank, index in zip(ranks, _apart(list(ranks.values())), strict=True)}
    if not share:
        _check_apart(nodes, chosen)
    index = chosen.get(int(comm.Get_rank()))
    return torch.device("cpu" if index is None else f"cuda:{index}")


def _first_on_node(comm: Any) -> int:
    """Return the first rank on the node of this one. Collective."""
    rank = int(comm.Get_rank())
    if not hasattr(comm, "Split_type"):
        hosts = comm.allgather(gethostname())
        beside = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    else:
        from mpi4py import MPI

        node = comm.Split_type(MPI.COMM_TYPE_SHARED, rank)
        beside = node.allgather(rank)
        node.Free()
    return int(beside[0])


def count_gpus(subject: str) -> int:
    """Return how many GPUs torch sees on this rank. Local.

    Raises
    ------
    OptionError
        From `subject`, whatever torch raises: the kinds differ between its versions and builds.
    """
    with _asked(subject):
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def _asked(subject: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OptionError(f"{subject}: the GPUs here cannot be asked ({told(error)}); look at nvidia-smi or rocminfo, or "
                          "hide them with CUDA_VISIBLE_DEVICES= to compute on the CPU") from error


def _visible() -> list[str]:
    """Return what tells the hardware of each GPU that this rank sees from any other. Local."""
    count = count_gpus("local_device")
    with _asked("local_device"):
        every = [torch.cuda.get_device_properties(index) for index in range(count)]
    found = []
    for asked in every:
        bus = [getattr(asked, f"pci_{name}_id", 0) for name in ("domain", "bus", "device")]
        found.append(f"{getattr(asked, 'uuid', '')} at {bus[0]:04x}:{bus[1]:02x}:{bus[2]:02x}".strip())
    alike = len(set(found)) < len(found)  # torch that says neither; what one rank sees several times is several
    return [f"{name} number {index}" for index, name in enumerate(found)] if alike else found


def _apart(ranks: list[list[str]]) -> list[int]:
    """Return which of the GPUs that it sees each rank of a node takes: as many different ones as there can be. Local."""
    owners: dict[str, int] = {}

    def give(rank: int, refused: set[str]) -> bool:
        """Give a rank a GPU that is free, or one whose owner can take another one."""
        for gpu in ranks[rank]:
            if gpu not in owners:
                owners[gpu] = rank
                return True
        for gpu in ranks[rank]:
            if gpu not in refused:
                refused.add(gpu)
                if give(owners[gpu], refused):
                    owners[gpu] = rank
                    return True
        return False

    for rank in range(len(ranks)):
        give(rank, set())
    taken = {rank: gpu for gpu, rank in owners.items()}
    return [seen.index(taken[rank]) if rank in taken else rank % len(seen) for rank, seen in enumerate(ranks)]


def _check_apart(nodes: dict[int, dict[int, list[str]]], chosen: dict[int, int]) -> None:
    """Raise where ranks of a node have the same GPU, of those that they see. Local."""
    shared: list[list[int]] = []
    named = "", ""
    for seen in nodes.values():
        ranks: dict[str, list[int]] = {}
        for rank, visible in seen.items():
            ranks.setdefault(visible[chosen[rank]], []).append(rank)
        for hardware, several in ranks.items():
            if len(several) > 1:
                named = named if shared else (f"cuda:{chosen[several[0]]}", hardware)
                shared.append(several)
    if shared:
        device, hardware = named
        more = f", and others share {counted(len(shared) - 1, 'more GPU')}" if len(shared) > 1 else ""
        raise everywhere(OptionError(f"local_device: {ranks_text(shared[0])} would share one GPU ({device}, {hardware})"
                                     f"{more}; start as many ranks a node as it has GPUs, or pass share=True"))
