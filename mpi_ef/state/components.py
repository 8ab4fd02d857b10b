"""The components of a training: what of each is saved, how it is put back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mpi_ef.comm.protocol import Comm
from mpi_ef.data import random_state, rank_seed, seed_rank, set_random_state
from mpi_ef.errors import OptionError, ShapeError
from mpi_ef.optim.flat import FlatOptimizer
from mpi_ef.optim.wrapper import DistributedOptimizer
from mpi_ef.statetree import LOCAL, NODES, PER_RANK, REPLICATED, Leaf, Stateful
from mpi_ef.vectors.places import is_on_device

from .reshard import EITHER, RestoreView, Snapshot, read

__all__ = ["Component", "Finish", "GeneratorComponent", "ModelComponent", "RandomComponent", "Reshardable", "component_of"]

Finish = Callable[[], None]


@runtime_checkable
class Reshardable(Protocol):
    """An object that reshards its own state: `FeedbackHook`, and objects of users."""

    def state_dict_from(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> Any:
        """Return what rank `rank` of `size` loads, from what ``state_dict()`` was on all old ranks, in rank order. Local."""


class Component:
    """A component of a training. Everything is local; :meth:`restore` returns what is left to do for all ranks together."""

    name = ""

    def identity(self) -> dict[str, str]:
        """Return what must be the same where it is put back."""
        return {}

    def collect(self, into: Snapshot) -> None:
        """Add what is saved."""
        raise NotImplementedError

    def check(self, past: RestoreView) -> None:
        """Raise where what was saved does not fit. Nothing is changed."""

    def restore(self, past: RestoreView) -> Finish | None:
        """Put back what was saved."""
        raise NotImplementedError

    def forget(self) -> Finish | None:
        """Return the call that resets errors and estimates, where there are such."""
        return None


def component_of(name: str, value: Any) -> Component:
    """Return the component that a value is; `OptionError` where it has no state."""
    if isinstance(value, Stateful):
        return StateComponent(name, value)
    if isinstance(value, torch.Generator):
        return GeneratorComponent(name, value)
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return ObjectComponent(name, value)
    raise OptionError(f"Training: {name} is a {type(value).__name__} without state_dict() and load_state_dict(); give it "
                      "both")


class StateComponent(Component):
    """An optimizer of this package, or a rule at work; not the parameters."""

    def __init__(self, name: str, owner: Stateful) -> None:
        self.name, self.owner = name, owner

    def identity(self) -> dict[str, str]:
        return self.owner.identity()

    def collect(self, into: Snapshot) -> None:
        self.owner.before_save()
        tree, name = self.owner.state_tree(), self.name
        for key, leaf in tree.arrays().items():
            into.add(f"{name}.{key}", leaf.array, leaf.kind)
        into.add(f"{name}:settings", tree.values(REPLICATED), REPLICATED)
        into.add(f"{name}:account", tree.values(LOCAL), PER_RANK)
        if own := tree.values(PER_RANK):
            into.add(f"{name}:own", own, PER_RANK)

    def check(self, past: RestoreView) -> None:
        """Compare the names, shapes and dtypes of all arrays."""
        self.owner.before_load()
        mine, start = self._arrays(), f"{self.name}."
        theirs = {name.removeprefix(start) for name in past.names() if name.startswith(start)}
        theirs = {name for name in theirs if not _of_nodes(name)}
        heirs = {_inherited(key, leaf) for key, leaf in mine.items()}
        needed = {key for key, leaf in mine.items() if not leaf.optional}
        if different := sorted((needed - theirs) | (theirs - mine.keys() - heirs)):
            where = "here" if different[0] in mine else "in the checkpoint"
            raise ShapeError(f"resume: {start}{different[0]} is only {where}; build the training as it was")
        for key, leaf in mine.items():
            if key in theirs:
                past.check_array(start + key, leaf.array, leaf.reshard)

    def restore(self, past: RestoreView) -> None:
        """Write values, then arrays, which may follow from them, then derive what follows from all."""
        owner, name = self.owner, self.name
        tree = owner.state_tree()
        home = _home_of(owner)
        tree.write(past.value(f"{name}:settings", home), REPLICATED)
        tree.write(past.value(f"{name}:account") if past.same_world else {}, LOCAL)
        if past.kind(f"{name}:own"):
            tree.write(past.mean(f"{name}:own", home), PER_RANK)
        for key, leaf in self._arrays().items():
            if leaf.optional and past.kind(f"{name}.{key}") is None:
                leaf.array.fill(0)
            else:
                past.write(f"{name}.{key}", leaf.array, leaf.reshard, f"{name}.{_inherited(key, leaf)}")
        owner.loaded()

    def _arrays(self) -> dict[str, Leaf]:
        """Return the arrays that are put back, by name."""
        return {key: leaf for key, leaf in self.owner.state_tree().arrays().items() if not _of_nodes(key)}

    def forget(self) -> Finish | None:
        return getattr(self.owner, "forget", None)


def _inherited(key: str, leaf: Leaf) -> str:
    """Return the name of what an array inherits, which begins as its own does; "" for nothing."""
    return key[: key.rfind(".") + 1] + leaf.inherits if leaf.inherits else ""


def _of_nodes(name: str) -> bool:
    """Tell whether an array is said of other arrays, and is no state."""
    return name.rpartition(".")[2] == NODES


class ModelComponent(Component):
    """Parameters and buffers of a module. Of parameters in 16 bits that an optimizer here has, the masters are saved."""

    def __init__(self, model: nn.Module | None, optimizers: Mapping[str, FlatOptimizer]) -> None:
        self.model, self.optimizers = model, optimizers
        self._named: dict[str, Tensor] = {}
        self._extra: dict[str, Any] = {}
        self._look()

    def _look(self) -> None:
        """Collect the current parameters and buffers of the model; tied parameters count once."""
        entries = {} if self.model is None else self.model.state_dict(keep_vars=True)
        distinct = {id(entry): name for name, entry in reversed(entries.items()) if isinstance(entry, Tensor)}
        self._extra = {name: entry for name, entry in entries.items() if not isinstance(entry, Tensor)}
        trained: dict[str, Tensor] = {}
        self._flat: dict[str, tuple[FlatOptimizer, int, torch.Size]] = {}
        for part, optimizer in self.optimizers.items():
            flat = optimizer.flat
            for number, p in enumerate(flat.parameters):
                name = distinct.pop(id(p), f"{part} parameter {number}")
                self._flat[f"model.{name}"] = optimizer, number, p.shape
                trained[f"model.{name}"] = p
        self._named = {f"model.{name}": entries[name] for name in reversed(distinct.values())}
        self._described = {name: _described(t) for name, t in sorted((trained | self._named).items())}

    def identity(self) -> dict[str, str]:
        return self._described

    def collect(self, into: Snapshot) -> None:
        """Add every parameter once, in the precision in which it is trained, and buffers."""
        self._look()
        # In a round of steps of each rank by itself, what a program writes is of that rank.
        written = {id(optimizer): optimizer.flat.written() if getattr(optimizer, "synchronized", True) else {}
                   for optimizer in self.optimizers.values()}
        for name, (optimizer, number, shape) in self._flat.items():
            value = optimizer.shared_values[optimizer.flat.place(number)].reshape(shape)
            if number in written[id(optimizer)]:
                value = optimizer.flat.kernels.vector(written[id(optimizer)][number].contiguous()).reshape(shape)
            into.add(name, value, REPLICATED)
        for name, tensor in self._named.items():
            into.add(name, tensor, EITHER)
        if self._extra:
            into.add("model:extra", self._extra, EITHER)

    def check(self, past: RestoreView) -> None:
        """Compare what is in vectors here; :meth:`identity` has the rest."""
        for name, (optimizer, number, shape) in self._flat.items():
            past.check_array(name, optimizer.flat.values[optimizer.flat.place(number)].reshape(shape), None)

    @torch.no_grad()
    def restore(self, past: RestoreView) -> None:
        """Write parameters and buffers; buffers that differ between ranks become their mean on another number of ranks."""
        self._look()
        for optimizer in self.optimizers.values():
            optimizer.flat.adopt()
        for name, (optimizer, number, shape) in self._flat.items():
            past.write(name, optimizer.flat.values[optimizer.flat.place(number)].reshape(shape))
        for name, tensor in self._named.items():
            if past.kind(name) == PER_RANK and not past.same_world:
                past.notes.append(f"{name} differed between ranks: averaged")
            past.overwrite(name, tensor)
        if self._extra and self.model is not None:
            self.model.load_state_dict(past.value("model:extra"), strict=False)
        for optimizer in self.optimizers.values():
            optimizer.flat.write_back()


def _home_of(owner: object) -> torch.device | None:
    """Return the device to which a torch optimizer moves what it loads, where there is one."""
    optimizer = owner.optimizer if isinstance(owner, DistributedOptimizer) else owner
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, FlatOptimizer):
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    one = len({p.device for p in parameters}) == 1 and is_on_device(parameters[0])
    return parameters[0].device if one else None


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class ObjectComponent(Component):
    """Anything with ``state_dict()`` and ``load_state_dict()``: schedulers, samplers, scalers, hooks, torch optimizers."""

    def __init__(self, name: str, owner: Any) -> None:
        self.name, self.owner = name, owner

    def identity(self) -> dict[str, str]:
        return {"type": type(self.owner).__name__}

    def collect(self, into: Snapshot) -> None:
        """Add its state, once where it is the same on all ranks."""
        into.add(self.name, self.owner.state_dict(), EITHER)

    def restore(self, past: RestoreView) -> Finish:
        """Read its state, and return the loading, which may be collective."""
        if isinstance(self.owner, Reshardable) and not past.same_world:
            state = read(self.owner.state_dict_from(past.values(self.name), past.rank, past.size))
        else:
            if past.kind(self.name) == PER_RANK and not past.same_world:
                past.notes.append(f"{self.name} differed between ranks: rank r takes that of old rank r mod "
                                  f"{past.found.world_size}")
            state = past.value(self.name, _home_of(self.owner))
        return lambda: self.owner.load_state_dict(state)

    def forget(self) -> Finish | None:
        return getattr(self.owner, "forget", None) if isinstance(self.owner, Reshardable) else None


class GeneratorComponent(Component):
    """A torch generator of this rank, for example of a DataLoader; on new ranks it is seeded from the seed and the step."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        self.name, self.generator = name, generator

    def identity(self) -> dict[str, str]:
        return {"type": f"Generator on {self.generator.device}"}

    def collect(self, into: Snapshot) -> None:
        into.add(self.name, self.generator.get_state(), PER_RANK)

    def restore(self, past: RestoreView) -> None:
        if past.rank < past.found.world_size:
            self.generator.set_state(past.value(self.name))
        else:
            self.generator.manual_seed(rank_seed(_fresh_seed(past), past.rank, stream=1))


class RandomComponent(Component):
    """The global generators of torch, numpy and python on this rank; on new ranks, as `GeneratorComponent`."""

    name = "random"

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def collect(self, into: Snapshot) -> None:
        into.add(self.name, random_state(), PER_RANK)

    def restore(self, past: RestoreView) -> None:
        if past.rank < past.found.world_size:
            set_random_state(past.value(self.name))
        else:
            seed_rank(self.comm, _fresh_seed(past))
        if past.size > past.found.world_size:
            first = past.found.world_size
            ranks = f"rank {first}" if past.size == first + 1 else f"ranks {first} to {past.size - 1}"
            past.notes.append(f"random numbers of {ranks} begin anew from seed {past.found.document['seed']} and the step")


def _fresh_seed(past: RestoreView) -> int:
    words = np.random.SeedSequence([int(past.found.document["seed"]), past.found.step]).generate_state(2)
    return int(words[0]) << 32 | int(words[1])
