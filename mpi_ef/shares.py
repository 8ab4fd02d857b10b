"""A rank's share of a dataset, for loops that know nothing of ranks."""

from typing import Any

from torch.utils.data import Subset

from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import Comm
from mpi_ef.data import ShardedSampler
from mpi_ef.errors import DataError

__all__ = ["shard"]


def shard(dataset: Any, comm: Comm, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> Any:
    """Return the samples of a dataset that are this rank's, for loops that know nothing of ranks. Collective.

    The samples in an order drawn from `seed` are dealt out in turn, once and for all, equally many to each rank: where their
    number does not divide, up to n - 1 of them are given to two ranks, or with ``drop_last=True`` to none. `ShardedSampler`
    deals anew in every epoch.

    Parameters
    ----------
    dataset : sequence of samples
        With ``len`` and ``[i]``, the same on all ranks.
    comm : MPI.Comm
    shuffle : bool
        Otherwise the samples are dealt out as they come.
    seed : int
        Of the order, the same on all ranks.
    drop_last : bool

    Returns
    -------
    torch.utils.data.Subset
        Or what ``dataset.select(indices)`` returns, where there is that, as in Hugging Face's `datasets`.

    Raises
    ------
    DataError
        On all ranks: fewer samples than ranks. On a rank whose dataset has no length; other ranks raise `PeerError`.
    DisagreementError
        On all ranks, when lengths or options differ between them.
    """
    def facts() -> dict[str, object]:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(f"shard: {type(dataset).__name__} has no length or no [i]; let every rank read its own part, "
                            "equally many samples on each")
        return {"size": len(dataset)}

    agree(comm, "shard", facts, "give all ranks the same data and options")
    size, ranks = len(dataset), int(comm.Get_size())
    count = size // ranks if drop_last else -(-size // ranks)
    sampler = ShardedSampler(size, comm, batch=max(1, count), shuffle=shuffle, seed=seed, drop_last=drop_last)
    indices = next(iter(sampler))  # the only batch of an epoch
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
