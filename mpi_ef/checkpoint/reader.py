"""Reading a checkpoint: local, without MPI, from any process that sees its directory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import CheckpointError, briefly

from .dtypes import DTYPES
from .extents import Extent, Kind, check_tiles
from .manifest import Manifest, read_manifest
from .rankfile import RankFile, reading

__all__ = ["Checkpoint", "open_checkpoint"]

Names = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
Parts = dict[str, list[tuple[RankFile, Extent]]]


def open_checkpoint(path: str | Path) -> "Checkpoint":
    """Open the checkpoint in the directory `path`. Local: works without MPI, on a login node too.

    Only the manifest is read, and the sizes of the others are compared; a rank's file is checked at the first access to
    something in it, every array when it is read.

    Raises
    ------
    CheckpointError
        It is damaged, unfinished, of a newer version, or cannot be read.
    """
    return Checkpoint(Path(path))


class Checkpoint:
    """A checkpoint on disk. All calls are local; whatever is wrong with the files is a `CheckpointError`.

    Attributes
    ----------
    path : Path
    step : int
    world_size : int
        How many ranks wrote it.
    run : str
        Identity of the run.
    document : JSON
        Of all ranks.
    written_by : dict of str to str
        Versions of mpi_ef, NumPy, h5py and Python.
    written_at : str
        ISO 8601, UTC.
    nbytes : int
        Bytes of all files with arrays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: Manifest = read_manifest(path)
        self._files: dict[int, RankFile] = {}
        self._shared: Parts | None = None
        self.step = self._manifest.step
        self.world_size = self._manifest.world_size
        self.run = self._manifest.run
        self.document: Any = self._manifest.document
        self.written_by = dict(self._manifest.written_by)
        self.written_at = self._manifest.written_at
        self.nbytes = sum(entry.size for entry in self._manifest.files)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step={self.step}, world_size={self.world_size})"

    def rank_document(self, rank: int) -> Any:
        """Return the JSON document of `rank`."""
        return self._file(rank).document

    def replicated_names(self) -> Names:
        """Return name, shape and dtype of every array that all ranks share."""
        return _names(self._replicated())

    def per_rank_names(self, rank: int) -> Names:
        """Return name, shape and dtype of every array of `rank`."""
        return _names(self._parts("per_rank", [rank]))

    def replicated(self, name: str) -> NDArray[Any]:
        """Return an array that all ranks share, put together from the stripes of all files."""
        return self._read(self._found(name, None))

    def per_rank(self, name: str, rank: int) -> NDArray[Any]:
        """Return an array of `rank`."""
        return self._read(self._found(name, rank))

    def described(self, name: str, rank: int | None = None) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of an array that all ranks share, or of one of `rank`. Reads no data."""
        first = self._found(name, rank)[0][1]
        return first.shape, DTYPES[first.dtype]

    def pieces(self, name: str, rank: int | None, room: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Read an array that all ranks share, or one of `rank`, without having all of it in memory.

        Parameters
        ----------
        name : str
        rank : int or None
            None for an array that all ranks share.
        room : (n,) uint8
            Memory for a piece: 1 MiB, or a multiple of that; or as long as the array.

        Yields
        ------
        begin : int
            Where in the array's bytes this piece begins.
        piece : (at most n,) uint8
            A part of `room`, which the next piece overwrites.

        Raises
        ------
        CheckpointError
            It cannot be read; or, after its last piece, it is not what was written.
        """
        for file, extent in self._found(name, rank):
            begin = extent.begin
            for piece in file.pieces(extent, room):
                yield begin, piece
                begin += piece.nbytes

    def verify(self) -> list[str]:
        """Read all files and return what is wrong, one line each; an empty list when nothing is."""
        problems = list(self.verify_files(range(self.world_size)))
        if not problems:
            try:
                self._replicated()
            except CheckpointError as error:
                problems.append(str(error))
        return problems

    def verify_files(self, ranks: range) -> Iterator[str]:
        """Read the files of some ranks and yield what is wrong with them."""
        for rank in ranks:
            try:
                yield from self._file(rank).verify()
            except CheckpointError as error:
                if not error.damaged:
                    raise
                yield str(error)

    def _found(self, name: str, rank: int | None) -> list[tuple[RankFile, Extent]]:
        """Return the extents of an array that all ranks share, or of one of `rank`, in order and complete."""
        parts = (self._replicated() if rank is None else self._parts("per_rank", [rank])).get(name)
        if parts is None:
            lacks = f"it has no replicated array {briefly(name)}; see replicated_names()"
            of_rank = f"rank {rank} has no array {briefly(name)}; see per_rank_names({rank})"
            raise CheckpointError(f"{self.path}: {lacks if rank is None else of_rank}")
        check_tiles(self.path, [extent for _, extent in parts])
        return parts

    def _file(self, rank: int) -> RankFile:
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"{self.path}: it has no rank {rank}; ask for ranks 0 to {self.world_size - 1}")
        if rank not in self._files:
            entry = self._manifest.files[rank]
            self._files[rank] = RankFile(self.path / entry.name, entry, {
                "rank": rank, "world_size": self.world_size, "step": self.step, "run": self.run})
        return self._files[rank]

    def _replicated(self) -> Parts:
        """Return the extents of every replicated array, in order and complete."""
        if self._shared is None:
            shared = self._parts("replicated", range(self.world_size))
            for parts in shared.values():
                check_tiles(self.path, [extent for _, extent in parts])
            self._shared = shared
        return self._shared

    def _parts(self, kind: Kind, ranks: Iterable[int]) -> Parts:
        """Return the extents of all arrays of a kind in the files of some ranks, with their files, by name."""
        found: Parts = {}
        for file in map(self._file, ranks):
            for extent in file.extents:
                if extent.kind == kind:
                    found.setdefault(extent.name, []).append((file, extent))
        return found

    def _read(self, parts: list[tuple[RankFile, Extent]]) -> NDArray[Any]:
        first = parts[0][1]
        with reading(self.path):
            array = np.empty(first.whole_nbytes, np.uint8)
            for file, extent in parts:
                file.read(extent, array[extent.begin : extent.begin + extent.nbytes])
            values: NDArray[Any] = array.view(DTYPES[first.dtype]).reshape(first.shape)
        return values


def _names(parts: Parts) -> Names:
    return {name: (extents[0][1].shape, DTYPES[extents[0][1].dtype]) for name, extents in parts.items()}
