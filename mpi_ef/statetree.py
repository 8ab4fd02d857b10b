"""State as a tree of named leaves, from which it is saved, checked, loaded, resharded and reset."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mpi_ef.errors import OptionError, ShapeError, briefly

__all__ = ["LOCAL", "NODES", "PER_RANK", "REPLICATED", "Leaf", "Reshard", "StateTree", "Stateful", "attribute"]

Kind = Literal["replicated", "per rank", "local"]
REPLICATED: Kind = "replicated"
PER_RANK: Kind = "per rank"
LOCAL: Kind = "local"
NODES = "nodes"  # name of the array `Reshard.nodes` of those that have written; it is saved, and not written when loaded
_REQUIRED: Any = object()


@dataclass(frozen=True)
class Reshard:
    """What becomes of an array that differs between ranks when a run goes on with another number of ranks.

    "mean": every new rank gets the mean of the old ranks' arrays, so that their mean is what it was.
    "copy": every new rank gets the replicated array `of`, of which the arrays are to be the mean, and what is `owed`.
    "cut": the old ranks' arrays, one after the other, are one vector, of which this rank gets ``start ... stop - 1``.
    "repeat": of an array that is the same on all ranks and has a part for each: `stop` times the replicated array `of`, or
    `stop` zeros without one.

    With `nodes` the array is a part of a vector of the node, ``start ... stop - 1``, and nodes take the place of ranks.
    """

    how: Literal["mean", "copy", "cut", "repeat"]
    of: str = ""
    owed: str = ""  # the array whose parts on the old ranks, concatenated, are what `of` lacks of the mean; "" for nothing
    start: int = 0
    stop: int = 0
    nodes: Any = None  # (n, 5) int64: of each rank its node, where its part begins and ends, and where what is cut does


@dataclass(frozen=True)
class Leaf:
    """One thing that is saved: an array, which is written in place, or a value of plain containers and tensors.

    "replicated": the same on all ranks. "per rank": of this rank; another number of ranks gets arrays as `reshard` says, and
    of values the mean of every tensor. "local": what a rank counts for itself, which starts from its default elsewhere.

    Attributes
    ----------
    kind : {"replicated", "per rank", "local"}
    array : array, optional
    read, write : callable, optional
        Of a value.
    reshard : Reshard, optional
    resets : bool
        Whether a reset sets it to zero.
    default : object
        Where the state of an earlier version lacks it; without one, that state is refused. 0 of an array: it begins with
        zeros where a checkpoint lacks it.
    inherits : str
        The array of a checkpoint that is added to this one, its parts on the old ranks one after the other, where nothing
        here has its name.
    """

    kind: Kind
    array: Any = None
    read: Callable[[], Any] | None = None
    write: Callable[[Any], None] | None = None
    reshard: Reshard | None = None
    resets: bool = False
    default: Any = _REQUIRED
    inherits: str = ""

    @property
    def optional(self) -> bool:
        """Whether a checkpoint may lack it."""
        return self.default is not _REQUIRED


def attribute(owner: object, name: str, kind: Kind = REPLICATED, *, resets: bool = False,
              default: Any = _REQUIRED) -> Leaf:
    """Return the leaf of an attribute that holds a plain value."""
    return Leaf(kind, read=lambda: deepcopy(getattr(owner, name)), resets=resets, default=default,
                write=lambda value: setattr(owner, name, deepcopy(value)))


@dataclass(frozen=True)
class StateTree:
    """The state of an object: leaves by name, and the trees of its parts."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    parts: "dict[str, StateTree | list[StateTree]]" = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)  # must be the same where it is loaded, on any number of ranks
    place: dict[str, int] = field(default_factory=dict)  # rank and size, which load_state_dict compares besides
    prefix: str = ""  # of the names of its arrays and of its identity within the whole

    def trees(self) -> "Iterator[tuple[str, StateTree]]":
        """Yield all trees of this one, each with what its names begin with."""
        yield self.prefix, self
        for tree, _ in self._parts_with({}):
            yield from ((self.prefix + prefix, found) for prefix, found in tree.trees())

    def _parts_with(self, saved: Mapping[str, Any]) -> "Iterator[tuple[StateTree, Mapping[str, Any]]]":
        """Yield all parts, each with what is saved of it, which may be nothing."""
        for name, part in self.parts.items():
            if isinstance(part, list):
                yield from zip(part, saved.get(name, [{}] * len(part)), strict=True)
            else:
                yield part, saved.get(name, {})

    def arrays(self, *kinds: Kind) -> dict[str, Leaf]:
        """Return the leaves that are arrays, of these kinds or of all, by name."""
        return {prefix + name: leaf for prefix, tree in self.trees() for name, leaf in tree.leaves.items()
                if leaf.array is not None and (not kinds or leaf.kind in kinds)}

    def identities(self) -> dict[str, str]:
        """Return what must be the same, of all parts."""
        return {prefix + name: text for prefix, tree in self.trees() for name, text in tree.identity.items()}

    def values(self, kind: Kind) -> dict[str, Any]:
        """Return the values of a kind, nested as the parts are. Not copies."""
        own = {name: leaf.read() for name, leaf in self.leaves.items() if leaf.kind == kind and leaf.read}
        parts = {name: [tree.values(kind) for tree in part] if isinstance(part, list) else part.values(kind)
                 for name, part in self.parts.items()}
        return own | {name: values for name, values in parts.items() if any(values)}

    def write(self, values: Mapping[str, Any], *kinds: Kind) -> None:
        """Write what :meth:`values` has returned for these kinds, or the defaults of what is not there."""
        for name, leaf in self.leaves.items():
            if leaf.kind in kinds and leaf.write:
                if (value := values.get(name, leaf.default)) is _REQUIRED:
                    raise OptionError(f"resume: the saved state has no {briefly(name)}; take a whole one")
                leaf.write(value)
        for tree, of_part in self._parts_with(values):
            tree.write(of_part, *kinds)

    def reset(self) -> None:
        """Set to zero every leaf that :attr:`Leaf.resets` marks."""
        for _, tree in self.trees():
            for leaf in tree.leaves.values():
                if leaf.resets and leaf.array is not None:
                    leaf.array.fill(0)
                elif leaf.resets and leaf.write:
                    leaf.write(0)

    def state_dict(self, of_array: Callable[[Any], Any] = lambda array: array,
                   of_value: Callable[[Any], Any] = deepcopy) -> dict[str, Any]:
        """Return copies of everything; `of_array` makes of a copied array what the dict has, `of_value` copies a value."""
        arrays = {name: of_array(_copy_on_host(leaf.array)) for name, leaf in self.leaves.items() if leaf.array is not None}
        values = {name: of_value(leaf.read()) for name, leaf in self.leaves.items() if leaf.read}
        how = of_array, of_value
        parts = {name: [tree.state_dict(*how) for tree in part] if isinstance(part, list) else part.state_dict(*how)
                 for name, part in self.parts.items()}
        return {**self.identity, **self.place, **values, **({"arrays": arrays} if self.identity else {}), **parts}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise unless what :meth:`state_dict` has returned can be loaded here.

        Raises
        ------
        OptionError
            It belongs to something else, or to another rank or number of ranks.
        ShapeError
            An array has another shape or dtype.
        """
        for name, mine in (self.identity | self.place).items():
            if (theirs := saved.get(name, mine)) != mine:
                raise OptionError(f"load_state_dict: the saved {name} is {theirs}, here it is {mine}; build it as it was, "
                                  "and load on each rank what that rank saved")
        arrays = saved.get("arrays", {})
        wanted = {name: leaf for name, leaf in self.leaves.items() if leaf.array is not None}
        for name in [*wanted, *(arrays.keys() - wanted.keys())]:
            mine = _described(wanted[name].array if name in wanted else None)
            if (theirs := _described(arrays.get(name))) != mine:
                raise ShapeError(f"load_state_dict: {name} is {theirs}, here it is {mine}; load into the model, compressor "
                                 "and plan it was saved from")
        needed = [n for n, leaf in self.leaves.items() if leaf.array is None and leaf.default is _REQUIRED]
        for name in [*needed, *self.parts]:
            if name not in saved:
                raise OptionError(f"load_state_dict: the saved state has no {briefly(name)}; load what state_dict() "
                                  "returned")
        for name, part in self.parts.items():
            if isinstance(part, list) and len(part) != len(saved[name]):
                raise OptionError(f"load_state_dict: the saved state has {len(saved[name])} {name}, here there are "
                                  f"{len(part)}; build it as it was")
        for tree, of_part in self._parts_with(saved):
            tree.check(of_part)

    def load_values(self, saved: Mapping[str, Any]) -> None:
        """Write the values of what :meth:`state_dict` has returned."""
        self.write(_copied(saved), REPLICATED, PER_RANK, LOCAL)

    def load_arrays(self, saved: Mapping[str, Any]) -> None:
        """Write the arrays of what :meth:`state_dict` has returned."""
        for name, leaf in self.leaves.items():
            if leaf.array is not None:
                array = saved["arrays"][name]  # a tensor may have been loaded to a device
                leaf.array[...] = np.asarray(array.cpu() if hasattr(array, "cpu") else array)
        for tree, of_part in self._parts_with(saved):
            tree.load_arrays(of_part)


def _copy_on_host(array: Any) -> Any:
    return array.copy() if isinstance(array, np.ndarray) else array.numpy()


def _copied(saved: Any) -> Any:
    """Return a copy of a state, but for its arrays."""
    if isinstance(saved, Mapping):
        return {key: value if key == "arrays" else _copied(value) for key, value in saved.items()}
    return [*map(_copied, saved)] if type(saved) is list else deepcopy(saved)


def _described(array: Any) -> str:
    return "missing" if array is None else f"{tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}"


class Stateful:
    """An object with state that :meth:`state_tree` describes; what can be done with it follows from that."""

    def state_tree(self) -> StateTree:
        """Describe the state as it is now: which arrays are of a rank may depend on values. Local."""
        raise NotImplementedError

    def loaded(self) -> None:
        """Derive again what follows from state that was written. Local."""

    def before_save(self) -> None:
        """Raise where the state of this moment would not come back. Local."""

    def before_load(self) -> None:
        """Raise where state cannot be written now. Local."""

    def per_rank(self) -> dict[str, Any]:
        """Return the named arrays that differ between ranks. Not copies. Local."""
        return {name: leaf.array for name, leaf in self.state_tree().arrays(PER_RANK).items()}

    def replicated(self) -> dict[str, Any]:
        """Return the named arrays, besides parameters, that are equal on all ranks. Not copies. Local."""
        arrays = self.state_tree().arrays(REPLICATED).items()
        return {name: leaf.array for name, leaf in arrays if name.rpartition(".")[2] != NODES}

    def identity(self) -> dict[str, str]:
        """Return what must be the same where a saved state is loaded, on any number of ranks. Local."""
        return self.state_tree().identities()
