"""A stand-in for the storage of checkpoints: in memory, for all virtual ranks of a test, with JSON that has been text."""

import json

import numpy as np

from mpi_ef.checkpoint import BFLOAT16
from mpi_ef.errors import CheckpointError


class MemoryCheckpoint:
    """What a :class:`MemoryStore` holds of a step. Arrays are read only, as those of a file may be."""

    def __init__(self, step, size):
        self.step, self.world_size = step, size
        self.shared, self.ranks = {}, [None] * size
        self.texts = [None] * size
        self.broken = set()  # names of arrays that cannot be read, with the rank that fails

    @property
    def document(self):
        return json.loads(self.text)

    def rank_document(self, rank):
        return json.loads(self.texts[rank])

    def replicated_names(self):
        return list(self.shared)

    def per_rank_names(self, rank):
        return list(self.ranks[rank])

    def replicated(self, name):
        return self._read(self.shared[name], name)

    def per_rank(self, name, rank):
        return self._read(self.ranks[rank][name], name)

    def _read(self, array, name):
        if name in self.broken:
            raise CheckpointError(f"{name} cannot be read")
        array.flags.writeable = False
        return array


class MemoryStore:
    """Keeps every step."""

    def __init__(self):
        self.steps = {}

    def save(self, comm, step, *, replicated, per_rank, document, rank_document):
        rank, size = comm.Get_rank(), comm.Get_size()
        for array in [*replicated.values(), *per_rank.values()]:
            assert isinstance(array, np.ndarray)
            assert array.dtype.kind in "fiub" or array.dtype == BFLOAT16
            assert array.flags.c_contiguous
        names = comm.allgather(sorted((name, array.shape, str(array.dtype)) for name, array in replicated.items()))
        assert all(row == names[0] for row in names)
        if rank == 0:
            self.steps[step] = MemoryCheckpoint(step, size)
            self.steps[step].shared = {name: array.copy() for name, array in replicated.items()}
            self.steps[step].text = json.dumps(document, allow_nan=False)
        comm.allgather(None)
        self.steps[step].ranks[rank] = {name: array.copy() for name, array in per_rank.items()}
        self.steps[step].texts[rank] = json.dumps(rank_document, allow_nan=False)
        texts = comm.allgather(json.dumps(document))
        assert all(text == texts[0] for text in texts), "the document differs between ranks"

    def newest(self, comm):
        del comm
        return self.steps[max(self.steps)] if self.steps else None

    @property
    def last(self):
        return self.steps[max(self.steps)]
