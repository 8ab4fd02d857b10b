"""A checkpoint for other programs: one plain HDF5 file, or one safetensors file. Local, without MPI."""

import importlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from mpi_ef.checkpoint.compare import brain_floats
from mpi_ef.checkpoint.dtypes import BFLOAT16, dtype_name
from mpi_ef.checkpoint.manifest import sync_folder
from mpi_ef.checkpoint.reader import Checkpoint
from mpi_ef.errors import CheckpointError, MpiEfError, OptionError, briefly

from .reshard import RestoreView
from .tree import Array, tensor_of

__all__ = ["export", "model_state"]

_MODEL = "model."
_HDF5, _SAFETENSORS = (".h5", ".hdf5"), (".safetensors",)


def export(checkpoint: Checkpoint, path: str | Path, *, everything: bool = False) -> int:
    """Write a checkpoint to one file that other programs read; the name's end says how. Local.

    ``.safetensors`` for torch and its relatives (needs the package safetensors, and memory for all that is written), ``.h5``
    for h5py and whatever reads HDF5: contiguous datasets of numbers, no compression, no links. In memory is the model,
    or with `everything` one array.

    Parameters
    ----------
    checkpoint : Checkpoint
    path : path
        Replaced when it exists, once everything is written and on the disk.
    everything : bool
        False: parameters and buffers of the model that `Training` has saved, by the names of ``model.state_dict()``; what
        differed between the ranks becomes what resuming on one rank makes of it, see `model_state`. True: all arrays,
        named ``replicated/NAME`` and ``rank-00000/NAME``; and in HDF5 all documents.

    Returns
    -------
    int
        How many arrays were written.

    Raises
    ------
    OptionError
        The name ends in something else; safetensors is missing; there is no model.
    CheckpointError
        The checkpoint is damaged, or the file cannot be written: then nothing is left of it.
    """
    path = Path(path)
    if path.suffix not in _HDF5 + _SAFETENSORS:
        raise OptionError(f"export: {briefly(path.name)} does not say what to write; end it in .safetensors or .h5")
    arrays = _all_arrays(checkpoint) if everything else iter(model_state(checkpoint).items())
    with _replacing(path) as draft:
        if path.suffix in _HDF5:
            return _to_hdf5(checkpoint, draft, arrays, everything=everything)
        return _to_safetensors(checkpoint, draft, dict(arrays))


def model_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return parameters and buffers of the model that `Training` has saved, for ``model.load_state_dict``. Local.

    A buffer that differed between the ranks is their mean where it holds floating point numbers, else that of rank 0: what
    one rank would have after resuming. Parameters in 16 bits have the float32 masters. Tied parameters are there once:
    ``load_state_dict(..., strict=False)`` then.

    Raises
    ------
    OptionError
        It was not saved by `Training`, or without a model.
    CheckpointError
    """
    document = checkpoint.document
    state: dict[str, Tensor] = {}
    if isinstance(document, dict) and {"values", "parts"} <= document.keys():
        past = RestoreView(checkpoint, 0, 1)
        try:
            names = sorted(name for name in past.names() if name.startswith(_MODEL))
            state = {name.removeprefix(_MODEL): _tensor(past.merged(name)) for name in names}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"export: {checkpoint.path} has a document that Training did not write "
                                  f"({type(error).__name__}: {error}); export everything instead") from error
    if not state:
        raise OptionError(f"export: {checkpoint.path} has no model that mpi_ef.Training saved; export everything instead")
    return state


def _all_arrays(checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    for name in sorted(checkpoint.replicated_names()):
        yield f"replicated/{_escaped(name)}", checkpoint.replicated(name)
    for rank in range(checkpoint.world_size):
        for name in sorted(checkpoint.per_rank_names(rank)):
            yield f"rank-{rank:05d}/{_escaped(name)}", checkpoint.per_rank(name, rank)


def _escaped(name: str) -> str:
    """Return a name without slashes, which would be groups in HDF5; percent signs as in addresses."""
    return name.replace("%", "%25").replace("/", "%2F") if name.strip(".") else name.replace(".", "%2E")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; afterwards the file has its own name, and the disk has both, or nothing is left."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # safetensors makes files that others may not read
        yield draft
        with draft.open("rb+") as file:
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except MpiEfError:
        raise
    except Exception as error:  # HDF5 has a full disk as an OSError of many lines, or as a RuntimeError when closing
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"export: {path} cannot be written: {reason}; take another place") from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _to_hdf5(checkpoint: Checkpoint, path: Path, arrays: Any, *, everything: bool) -> int:
    count = 0
    with h5py.File(path, "w", libver=("earliest", "v110"), locking=False) as file:
        file.attrs.update(step=checkpoint.step, world_size=checkpoint.world_size, run=checkpoint.run,
                          written_at=checkpoint.written_at, written_by=json.dumps(checkpoint.written_by))
        for name, value in arrays:
            numbers, dtype = _plain(value)
            file.create_dataset(name if everything else _escaped(name), data=numbers).attrs["dtype"] = dtype
            count += 1
        if everything:
            file.create_dataset("documents/replicated", data=json.dumps(checkpoint.document))
            for rank in range(checkpoint.world_size):
                file.create_dataset(f"documents/rank-{rank:05d}", data=json.dumps(checkpoint.rank_document(rank)))
    return count


def _plain(value: Tensor | Array) -> tuple[Array, str]:
    """Return numbers that NumPy has, and what they were; 16 and 8 bits that it does not have become float32, exactly."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        known = dtype in np.sctypeDict
        return (value if known or not value.is_floating_point() else value.float()).numpy(), dtype
    if value.dtype == BFLOAT16:
        return brain_floats(value), "bfloat16"
    return value, value.dtype.name


def _to_safetensors(checkpoint: Checkpoint, path: Path, arrays: dict[str, Tensor | Array]) -> int:
    try:
        save_file = importlib.import_module("safetensors.torch").save_file
    except ImportError:
        raise OptionError("export: .safetensors needs a package; pip install safetensors, or export to .h5") from None
    tensors = {name: _tensor(value).contiguous() for name, value in arrays.items()}
    metadata = {"format": "pt", "step": str(checkpoint.step), "run": checkpoint.run, "written_at": checkpoint.written_at}
    try:
        save_file(tensors, str(path), metadata=metadata)
    except Exception as error:  # an error type of its own, also for a full disk
        raise CheckpointError(f"export: {path.parent} does not take it: {error}; take another place or .h5") from error
    return len(tensors)


def _tensor(value: Tensor | Array) -> Tensor:
    return value if isinstance(value, Tensor) else tensor_of(value, dtype_name(value.dtype), [*value.shape])
