"""Buffers of a torch model, such as BatchNorm's running statistics, made equal on all ranks."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mpi_ef.comm.consensus import agree, gather_values
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DtypeError, OptionError, briefly
from mpi_ef.vectors.flat import broadcast
from mpi_ef.vectors.places import on_host, overwrite

__all__ = ["broadcast_buffers", "synchronize_buffers"]

_GATHERED = 2**24  # entries that all ranks together send at a time: 128 MiB

Numbers = NDArray[np.float64]


def synchronize_buffers(model: nn.Module, comm: Comm, *, policy: str = "mean") -> None:
    """Make the buffers of a model the same bits on all ranks. Collective.

    Each rank's BatchNorm sees its own samples, so that after a while the running statistics differ, and with them
    the outputs in evaluation mode. Call this before validating or saving, not between forward and backward.

    ``policy="mean"`` replaces running statistics, floating-point buffers whose own name begins with ``running_`` as those of
    torch's layers do, by their mean over the ranks, added up in float64 in rank order; an entry that is equal on all ranks
    keeps its value. For the running variance of BatchNorm, also SyncBatchNorm, that
    would miss how far the ranks' means are apart. It becomes the variance of all ranks' samples together instead::

        mean = mean_r(mean_r),  var = mean_r(var_r + (mean_r - mean)^2)

    where ranks have seen equally many samples. (Torch's running variances divide by the number of samples less one; the
    correction for all samples together, a factor close to 1, is left out.) The means need time to move apart again:
    leave some ``3 / momentum`` batches between two calls, 30 by default. With a call after every batch only `momentum`
    times the spread of the means would be counted; SyncBatchNorm is right there. In other layers (InstanceNorm,
    your own) variances are averaged like everything else. All other buffers are taken from rank 0: the mean of whole numbers
    (``num_batches_tracked``), of random features or of a table of positions means nothing.

    ``policy="root"`` takes all buffers from rank 0.

    Buffers registered with ``persistent=False`` are left alone: they are not part of the model's state, and ranks may
    hold other sizes of them (masks, tables of positions).

    Parameters
    ----------
    model : torch.nn.Module
        Its persistent buffers are overwritten where they change; a shared one counts once.
    comm : MPI.Comm
    policy : str
        "mean" or "root".

    Raises
    ------
    DisagreementError
        On all ranks, when names, shapes, dtypes or the policy differ. Nothing was changed.
    OptionError, DtypeError
        An unknown policy; a buffer that has no numbers yet (lazy, meta) or is sparse. Other ranks raise `PeerError`.

    Notes
    -----
    For all buffers together: one gathering of names and shapes, one broadcast, one allgather of floating-point entries
    as float64, one of variances (each cut into pieces only above 128 MiB), those that have nothing to send left out.
    """
    buffers: dict[str, Tensor] = {}

    def facts() -> dict[str, object]:
        if not (isinstance(policy, str) and policy in ("mean", "root")):
            raise OptionError(f'synchronize_buffers: policy={briefly(policy)} is unknown; pass "mean" or "root"')
        buffers.update(_persistent(model))
        shapes = {f"buffer {i}": f"{name} {tuple(b.shape)} {b.dtype}" for i, (name, b) in enumerate(buffers.items())}
        return {"policy": policy, "the number of buffers": len(buffers), **shapes}

    agree(comm, "synchronize_buffers", facts, "build the same model on all ranks")
    averaged = {name: b for name, b in buffers.items() if policy == "mean" and _is_statistic(name, b)}
    _take_from_root(comm, [b for name, b in buffers.items() if name not in averaged])
    _take_mean(comm, averaged, _mean_of_variance(model, averaged))


def broadcast_buffers(model: nn.Module, comm: Comm) -> None:
    """Overwrite all buffers with those of rank 0, as at the start of a training. Collective.

    Those registered with ``persistent=False``, such as random features, too, but for what has another shape, dtype or name
    on another rank.

    Raises
    ------
    DisagreementError, OptionError, DtypeError
        As :func:`synchronize_buffers`.
    """
    synchronize_buffers(model, comm, policy="root")
    passing = {name: b for name, b in model.named_buffers() if not (is_lazy(b) or b.is_meta)}
    for name in _persistent(model):
        passing.pop(name, None)
    described = {(name, tuple(b.shape), str(b.dtype)) for name, b in passing.items() if b.layout is torch.strided}
    of_ranks: list[set[tuple[str, tuple[int, ...], str]]] = gather_values(comm, "broadcast_buffers", described)
    _take_from_root(comm, [passing[name] for name, _, _ in sorted(set.intersection(*of_ranks))])


def _is_statistic(name: str, buffer: Tensor) -> bool:
    return name.rpartition(".")[2].startswith("running_") and buffer.is_floating_point()


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for local, buffer in module.named_buffers(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if local in module._non_persistent_buffers_set or id(buffer) in seen:  # noqa: SLF001
                continue
            if is_lazy(buffer) or buffer.is_meta:
                raise OptionError(f"synchronize_buffers: {name} has no values yet; run a batch through the model first")
            if buffer.layout is not torch.strided:
                raise DtypeError(f"synchronize_buffers: {name} has layout {buffer.layout}; register a dense tensor")
            seen.add(id(buffer))
            named[name] = buffer
    return named


def _mean_of_variance(model: nn.Module, averaged: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for the running variance of each BatchNorm, the name of the mean that belongs to it."""
    prefixes = [f"{p}." if p else "" for p, module in model.named_modules() if isinstance(module, _BatchNorm)]
    pairs = {f"{p}running_var": f"{p}running_mean" for p in prefixes}
    return {v: m for v, m in pairs.items() if v in averaged and m in averaged}


def _take_from_root(comm: Comm, buffers: list[Tensor]) -> None:
    """Overwrite buffers of any dtype with those of rank 0, their bytes in one message. Collective."""
    if not buffers:
        return
    packed = torch.cat([_bytes(b) for b in buffers])
    broadcast(comm, packed.numpy())
    for b, part in zip(buffers, torch.split(packed, [b.numel() * b.element_size() for b in buffers]), strict=True):
        _write(b, part.clone().view(b.dtype))  # a clone begins where any dtype may begin


def _bytes(buffer: Tensor) -> Tensor:
    return on_host(buffer).clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _take_mean(comm: Comm, buffers: Mapping[str, Tensor], mean_of: Mapping[str, str]) -> None:
    """Overwrite buffers with their mean over ranks, those in `mean_of` with the variance of all together. Collective."""
    plain = [name for name in buffers if name not in mean_of]
    own = _packed(buffers[name] for name in plain)
    mean = _mean_over_ranks(comm, own)
    values, mine = _split(mean, plain, buffers), _split(own, plain, buffers)
    if mean_of:
        apart = np.concatenate([mine[name] - values[name] for name in mean_of.values()])
        variances = _packed(buffers[name] for name in mean_of) + apart**2
        values |= _split(_mean_over_ranks(comm, variances), list(mean_of), buffers)
    for name, value in values.items():
        _write(buffers[name], torch.from_numpy(value))


def _packed(buffers: Iterable[Tensor]) -> Numbers:
    parts = [on_host(b).double().reshape(-1) for b in buffers]
    return torch.cat(parts).numpy() if parts else np.empty(0)


def _split(packed: Numbers, names: list[str], buffers: Mapping[str, Tensor]) -> dict[str, Numbers]:
    bounds = np.cumsum([buffers[name].numel() for name in names])[:-1]
    return dict(zip(names, np.split(packed, bounds), strict=True)) if names else {}


def _mean_over_ranks(comm: Comm, x: Numbers) -> Numbers:
    """Return the mean over ranks, in rank order; entries that are equal everywhere keep their value. Collective."""
    ranks = comm.Get_size()
    mean, length = np.empty_like(x), max(1, _GATHERED // ranks)
    for start in range(0, x.size, length):
        own = x[start : start + length]
        rows = np.empty((ranks, own.size))
        comm.Allgather(own, rows)
        with np.errstate(invalid="ignore", over="ignore"):
            total = rows[0].copy()
            for row in rows[1:]:
                total += row
        total[np.isnan(total)] = np.nan  # the same bits for every NaN
        mean[start : start + length] = np.where((rows == rows[0]).all(axis=0), rows[0], total / ranks)
    return mean


@torch.no_grad()
def _write(buffer: Tensor, value: Tensor) -> None:
    """Overwrite a buffer unless it has these bits: constants that share memory with themselves cannot be written."""
    value = value.view(buffer.shape).to(buffer.dtype)
    if not torch.equal(_bytes(buffer), _bytes(value)):
        overwrite(buffer, value)
