"""What was saved by one world, read by a rank of another: as it was, or moved so that the means over the ranks stay."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mpi_ef.checkpoint.source import pieces_of
from mpi_ef.errors import DtypeError, OptionError, ShapeError
from mpi_ef.statetree import NODES, PER_RANK, REPLICATED, Reshard
from mpi_ef.vectors import mean_over_ranks
from mpi_ef.vectors.pieces import TensorPieces, fill
from mpi_ef.vectors.places import is_on_device, overwrite

from .nodes import Holders, same_nodes
from .tree import _MARK, Array, Arrays, decoded, encoded, filed, tensor_of

__all__ = ["LazyDict", "RestoreView", "Snapshot", "Stored", "mean_over_ranks", "read"]

EITHER = "either"
TensorLeaf = Mapping[str, Any]


class Stored(Protocol):
    """A checkpoint that can be read: what :class:`RestoreView` needs of the storage."""

    step: int  # completed steps when it was written
    world_size: int  # number of ranks that wrote it
    document: Any  # JSON that is the same for all ranks

    def rank_document(self, rank: int) -> Any:
        """Return the JSON of a rank."""

    def replicated(self, name: str) -> Array:
        """Return an array that was the same on all ranks."""

    def per_rank(self, name: str, rank: int) -> Array:
        """Return an array of a rank."""


@runtime_checkable
class InPieces(Protocol):
    """A checkpoint of which arrays can be read in pieces, as :class:`mpi_ef.checkpoint.Checkpoint`."""

    def described(self, name: str, rank: int | None = None) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
        """Return shape and dtype of an array that was the same on all ranks, or of one of a rank."""

    def pieces(self, name: str, rank: int | None, room: Array) -> Iterator[tuple[int, Array]]:
        """Yield where a piece of the array's bytes begins, and the part of `room` that has it."""


@dataclass
class Snapshot:
    """What one rank gives to a checkpoint, by kind (until :meth:`decide` also "either") and name, as JSON and arrays."""

    trees: dict[str, dict[str, Any]] = field(default_factory=lambda: {REPLICATED: {}, PER_RANK: {}, EITHER: {}})
    arrays: dict[str, Arrays] = field(default_factory=lambda: {REPLICATED: {}, PER_RANK: {}})
    _open: dict[str, Arrays] = field(default_factory=dict)

    def add(self, name: str, value: Any, kind: str) -> None:
        """Add a value: "replicated", "per rank", or "either", which is decided by whether it is the same on all ranks."""
        arrays = self._open.setdefault(name, {}) if kind == EITHER else self.arrays[kind]
        if hasattr(value, "tensor"):  # an array on a device
            value = TensorPieces(value.tensor, value.dtype)
        self.trees[kind][name] = encoded(value, name, arrays)

    def undecided(self) -> dict[str, bytes]:
        """Return a hash of every value that may be the same on all ranks. Local; a pass over memory."""
        return {name: _hash(tree, self._open[name]) for name, tree in self.trees[EITHER].items()}

    def decide(self, hashes: list[dict[str, bytes]]) -> None:
        """Sort in what :meth:`undecided` has returned on all ranks. Local; alike everywhere."""
        for name, tree in self.trees[EITHER].items():
            kind = REPLICATED if len({of_rank[name] for of_rank in hashes}) == 1 else PER_RANK
            self.trees[kind][name] = tree
            self.arrays[kind] |= self._open.pop(name)
        self.trees[EITHER].clear()


def _hash(tree: Any, arrays: Arrays) -> bytes:
    digest = sha256(repr(tree).encode())
    for array in arrays.values():
        for piece in pieces_of(array):
            digest.update(piece)
    return digest.digest()


class LazyDict(Mapping[str, Any]):
    """A dict in a checkpoint whose values are read at access: all ranks' states at once may not fit into memory."""

    def __init__(self, tree: Mapping[str, Any], decode: Callable[[Any], Any]) -> None:
        self._tree, self._decode = tree, decode

    def __getitem__(self, key: str) -> Any:
        return _unread(self._tree[key], self._decode)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)


def _unread(tree: Any, decode: Callable[[Any], Any]) -> Any:
    return LazyDict(tree, decode) if isinstance(tree, dict) and _MARK not in tree else decode(tree)


def read(value: Any) -> Any:
    """Return a value in which every :class:`LazyDict` has become a dict."""
    if type(value) in (list, tuple):
        return type(value)(map(read, value))
    return {key: read(part) for key, part in value.items()} if type(value) in (dict, LazyDict) else value


@dataclass
class RestoreView:
    """A checkpoint, seen from rank `rank` of `size`."""

    found: Stored
    rank: int
    size: int
    notes: list[str] = field(default_factory=list)  # what was not put back as it was
    _read: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    other_nodes: bool = False  # whether arrays that were checked belonged to other nodes than here
    _tables: dict[str, Any] = field(default_factory=dict)

    @property
    def same_world(self) -> bool:
        """Whether as many ranks read as have written."""
        return self.found.world_size == self.size

    @property
    def old_rank(self) -> int:
        """The old rank whose place this rank takes where any of them will do."""
        return self.rank % self.found.world_size

    def _trees(self, rank: int) -> Mapping[str, Any]:
        if rank not in self._read:
            self._read[rank] = self.found.rank_document(rank)["values"]
        return self._read[rank]

    def kind(self, name: str) -> str | None:
        """Return "replicated", "per rank", or None where there is no such value."""
        if name in self.found.document["values"]:
            return REPLICATED
        return PER_RANK if name in self._trees(0) else None

    def names(self) -> set[str]:
        """Return the names of all values."""
        return {*self.found.document["values"], *self._trees(0)}

    def tree(self, name: str, rank: int | None = None) -> Any:
        """Return the JSON of a value, of rank `rank` where ranks differ."""
        if self.kind(name) == REPLICATED:
            return self.found.document["values"][name]
        return self._trees(self.old_rank if rank is None else rank)[name]

    def _array(self, name: str, kind: str | None, rank: int) -> Array:
        return self.found.replicated(name) if kind == REPLICATED else self.found.per_rank(name, rank)

    def value(self, name: str, home: torch.device | None = None) -> Any:
        """Return a value as it was: the one of this rank's old rank where ranks differ.

        With `home`, its tensors of more than one entry are there: those of a torch optimizer, which would move them there.
        """
        return self._decoded(self.tree(name), self.kind(name), self.old_rank, home)

    def values(self, name: str) -> list[Any]:
        """Return a value as it was on each old rank, in rank order; plain dicts in it are :class:`LazyDict`."""
        ranks, kind = range(self.found.world_size), self.kind(name)
        return [_unread(self.tree(name, rank), partial(self._decoded, kind=kind, rank=rank)) for rank in ranks]

    def _decoded(self, tree: Any, kind: str | None, rank: int, home: torch.device | None = None) -> Any:
        def tensor(leaf: TensorLeaf) -> Tensor:
            dtype = getattr(torch, leaf["dtype"], None)
            if home is None or math.prod(leaf["shape"]) < 2 or not isinstance(dtype, torch.dtype):
                return tensor_of(self._array(leaf["name"], kind, rank), leaf["dtype"], leaf["shape"])
            there = torch.empty(leaf["shape"], dtype=dtype, device=home)
            if isinstance(self.found, InPieces):
                self._fill(there, leaf["name"], None if kind == REPLICATED else rank, filed(there, leaf["name"])[0])
            else:
                overwrite(there, tensor_of(self._array(leaf["name"], kind, rank), leaf["dtype"], leaf["shape"]))
            return there

        return decoded(tree, tensor, lambda leaf: self._array(leaf, kind, rank))

    def mean(self, name: str, home: torch.device | None = None) -> Any:
        """Return a value with the mean over the old ranks of every tensor; `OptionError` where anything else differed."""
        if self._stays(name):
            return self.value(name, home)
        old = range(self.found.world_size)
        trees = [self.tree(name, rank) for rank in old]
        if any(tree != trees[0] for tree in trees):
            raise OptionError(f"resume: {name} differs between the {len(old)} ranks that saved it, not in tensors alone; "
                              f"resume on {len(old)} ranks")

        def tensor(leaf: TensorLeaf) -> Tensor:
            parts = (tensor_of(self.found.per_rank(leaf["name"], r), leaf["dtype"], leaf["shape"]) for r in old)
            return mean_over_ranks(parts, leaf["name"])

        return decoded(trees[0], tensor, lambda leaf: self.found.per_rank(leaf, 0))

    def merged(self, name: str) -> Any:
        """Return a tensor; where it differs between ranks and their number has changed, the mean of numbers with a point."""
        dtype = getattr(torch, self.tree(name)["dtype"], torch.uint8)
        return self.mean(name) if dtype.is_floating_point or dtype.is_complex else self.value(name)

    def resharded(self, name: str, move: Reshard | None) -> Array:
        """Return this rank's array of that name; where ranks differ and their number has changed, as `move` says.

        `move.of` and `move.owed` are the ends of names that begin as `name` does.
        """
        kind, worlds = self.kind(name), range(self.found.world_size)
        if self._other_nodes(name, move):
            tree = _tree_of(name)
            ends = [tree + end if end and self.kind(tree + end) is not None else ""
                    for end in ((move.owed, move.of) if move else ("", ""))]
            return self._holders(name).moved(name, move, *ends)
        if move is not None and move.how == "repeat" and not self.same_world:
            part = self.found.replicated(name[: name.rindex(".") + 1] + move.of) if move.of else None
            return np.tile(np.zeros(1, self.tree(name)["dtype"]) if part is None else part, move.stop)
        if kind == REPLICATED or self.same_world or move is None:
            return self._array(name, kind, self.old_rank)
        if move.how == "copy":
            prefix = name[: name.rindex(".") + 1]
            aggregate = self.found.replicated(prefix + move.of)
            return self._with_owed(aggregate, prefix + move.owed, move) if move.owed else aggregate
        if move.how == "cut":
            return _cut((self.found.per_rank(name, rank) for rank in worlds), move.start, move.stop, name)
        parts = (torch.from_numpy(np.array(self.found.per_rank(name, rank))) for rank in worlds)
        return mean_over_ranks(parts, name).numpy()

    def _nodes(self, name: str) -> Any:
        """Return the table of nodes of the ranks that have written an array of that name, None where there is none."""
        table = _tree_of(name) + NODES
        if table not in self._tables:
            self._tables[table] = self.found.replicated(table) if table in self.found.document["values"] else None
        return self._tables[table]

    def _other_nodes(self, name: str, move: Reshard | None) -> bool:
        """Tell whether ranks are on nodes, then or now, and not on the same ones."""
        old, new = self._nodes(name), None if move is None else move.nodes
        return not same_nodes(old, new)

    def _holders(self, name: str) -> Holders:
        def read(name: str, rank: int) -> Array:
            return self._array(name, self.kind(name), rank)

        return Holders(self._nodes(name), self.found.world_size, read, self.kind)

    def _with_owed(self, array: Array, name: str, move: Reshard | None) -> Array:
        """Return an array plus that of the name, whose parts on the old ranks are one vector, if there is one."""
        if self.kind(name) is None:
            return array
        start, stop = (move.start, move.stop) if move is not None and move.nodes is not None else (0, array.size)
        whole: Array = array + self._holders(name).owed(name, start, stop)
        return whole

    def write(self, name: str, out: Array, move: Reshard | None = None, inherits: str = "") -> None:
        """Overwrite `out` with what :meth:`resharded` returns; `ShapeError` where that has another shape or dtype.

        `inherits`: the name of what is added to it, a vector of which each old rank had a part, if there is such an array.
        """
        if inherits and self.kind(inherits) is not None:
            out[...] = self._with_owed(self.resharded(name, move), inherits, move)
            return
        tensor: Tensor | None = getattr(out, "tensor", None)
        stays = (self._stays(name) or move is None) and not self._other_nodes(name, move)
        if tensor is not None and stays and isinstance(self.found, InPieces):
            self._fill(tensor, name, None if self.kind(name) == REPLICATED else self.old_rank, out)
            return
        array = self.resharded(name, move)
        _check_read(name, array.shape, array.dtype, out)
        out[...] = array

    @torch.no_grad()
    def overwrite(self, name: str, tensor: Tensor) -> None:
        """Overwrite a tensor of the same dtype and shape with what :meth:`merged` returns."""
        stays = self._stays(name) and isinstance(self.found, InPieces)
        if stays and is_on_device(tensor) and tensor.is_contiguous():
            rank = None if self.kind(name) == REPLICATED else self.old_rank
            self._fill(tensor, self.tree(name)["name"], rank, filed(tensor, name)[0])
        else:
            overwrite(tensor, self.merged(name))

    def _stays(self, name: str) -> bool:
        return self.kind(name) == REPLICATED or self.same_world

    def _fill(self, tensor: Tensor, name: str, rank: int | None, like: Any) -> None:
        """Overwrite a tensor on a device, which is `like` an array of that name, of all ranks or of one, piece by piece."""
        found: Any = self.found
        shape, dtype = found.described(name, rank)
        _check_read(name, shape, dtype, like)
        fill(tensor, lambda room: found.pieces(name, rank, room))

    def check_array(self, name: str, array: Array, move: Reshard | None) -> None:
        """Raise unless the array of that name has dtype and shape of `array`, as far as they stay. Reads no data."""
        leaf = self.tree(name)
        if leaf["dtype"] != array.dtype.name:
            raise DtypeError(f"resume: {name} is {leaf['dtype']} in the checkpoint and {array.dtype} here; build the model "
                             "as it was")
        worlds, shape = range(self.found.world_size), tuple(leaf["shape"])
        if self._other_nodes(name, move):
            self.other_nodes = True
            if move is None or move.how != "cut":  # which has the sizes of the others
                then, now = (int(table[:, 2].max()) if table is not None else size[0] for table, size in (
                    (self._nodes(name), shape), (None if move is None else move.nodes, array.shape)))
                if then != now:
                    raise ShapeError(f"resume: {name} has {then} entries on a node in the checkpoint and {now} here; build "
                                     "the model as it was")
        elif move is not None and move.how == "cut" and not self.same_world and self.kind(name) == PER_RANK:
            whole = sum(self.tree(name, rank)["shape"][0] for rank in worlds)
            if (self.rank == self.size - 1 and whole != move.stop) or whole < move.stop:
                raise ShapeError(f"resume: {name} has {whole} entries on all ranks together in the checkpoint and "
                                 f"{move.stop} here; build the model as it was")
        elif shape != array.shape and (move is None or move.how != "repeat" or self.same_world):
            raise ShapeError(f"resume: {name} is {shape} in the checkpoint and {array.shape} here; build the model as it "
                             "was")


def _tree_of(name: str) -> str:
    """Return what the names of the arrays of a rule begin with, of which one of the rule or of its plan is given."""
    tree = name[: name.rindex(".") + 1]
    return tree.removesuffix("plan.") if tree.endswith(".plan.") else tree


def _check_read(name: str, shape: tuple[int, ...], dtype: "np.dtype[Any]", out: Any) -> None:
    if shape != out.shape or dtype != out.dtype:
        raise ShapeError(f"resume: {name} was read as {shape} {dtype}, here it is {out.shape} {out.dtype}; the checkpoint "
                         "is damaged, resume from another one")


def _cut(parts: Iterable[Array], start: int, stop: int, name: str) -> Array:
    """Return the entries ``start ... stop - 1`` of the parts one after the other."""
    cut, place = [], 0
    for part in parts:
        cut.append(part[max(0, start - place) : max(0, stop - place)])
        place += part.size
    if place < stop:
        raise ShapeError(f"resume: {name} has {place} entries on all ranks together; {stop} are needed")
    return np.concatenate(cut)
