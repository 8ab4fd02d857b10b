"""Ranks that all begin with the same batch: they do the work of one."""

import pickle
import warnings
from hashlib import blake2b
from typing import Any

from torch import Tensor, nn

from mpi_ef.comm.consensus import gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.optim.flat import FlatOptimizer

__all__ = ["compare_first_batch", "digest", "warn_of_the_same"]


def compare_first_batch(model: nn.Module, optimizer: FlatOptimizer, comm: Comm, subject: str) -> None:
    """Warn, on rank 0, where all ranks put the same samples into the model before the first step. Local.

    What goes into the model first in training is compared after the first step that is not skipped, where all ranks are
    anyway.
    """
    size = int(comm.Get_size())
    if size == 1:
        return
    seen: list[bytes] = []

    def look(module: nn.Module, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.training and not seen:
            seen.append(digest([values, named]))

    def compare(*_: Any) -> None:
        for hook in hooks:
            hook.remove()
        if optimizer._handshake.at_work.size == size:  # noqa: SLF001 - a rank in `join` without any data is not here
            digests = gather_values(comm, "the first step", seen[0] if seen else b"")
            warn_of_the_same(digests, int(comm.Get_rank()), subject)

    hooks = [model.register_forward_pre_hook(look, with_kwargs=True), optimizer.register_step_post_hook(compare)]


def digest(batch: Any) -> bytes:
    """Return a hash of the tensors in a batch, empty where there are none. Local."""
    tensors = [*_tensors(batch)]
    whole = pickle.dumps([(str(tensor.dtype), tensor.detach().tolist()) for tensor in tensors])
    return blake2b(whole, digest_size=16).digest() if tensors else b""


def warn_of_the_same(digests: list[bytes], rank: int, subject: str) -> None:
    """Warn, on rank 0, where several ranks have the same batch. Local."""
    if rank == 0 and digests[0] and len(digests) > 1 and len(set(digests)) == 1:
        text = (f"{subject}: all {len(digests)} ranks began with the same batch, and so do the work of one; give each rank "
                "its own samples, for example mpi_ef.shard(dataset, comm)")
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or hasattr(value, "keys"):
        for name in value.keys():  # noqa: SIM118
            yield from _tensors(value[name])
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
