"""What of an optimizer is saved, and how it gets to other ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mpi_ef.errors import OptionError, ShapeError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.statetree import Stateful
from mpi_ef.vectors.places import host_copy, on_host

from .accounts import Communicating

__all__ = ["WRAPPED", "Saved"]

WRAPPED = "DistributedOptimizer"


class Saved(Communicating, Stateful):
    """A torch optimizer whose state is described by :meth:`state_tree`, and saved and loaded as torch does it."""

    _kind: str  # what a state says that it is of

    def _packed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state of the tree as it is handed out. Local."""
        return state_dict

    def _unpacked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return what :meth:`_packed` was given. Local."""
        return state_dict

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all state of this rank: arrays, rules, counters, groups. Local; save it per rank.

        Of a wrapped optimizer too. Tensors are in the memory of the host, also those of a device: they can be loaded where
        there is none. Hooks that were registered for it are called as torch calls them.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self.before_save()
        state_dict = self._packed(self.state_tree().state_dict(torch.from_numpy, host_copy))
        if masters := self._masters():  # a model's state has parameters in 16 bits rounded
            state_dict["masters"] = {number: on_host(master) for number, master in masters.items()}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on the same rank of a world of the same size. Local; call on all ranks.

        Parameters are not part of it: load the model's state as well. The next :meth:`step` raises on all ranks when
        some have loaded and others have not. Hooks that were registered for it are called as torch calls them.

        Raises
        ------
        OptionError, ShapeError
            When it belongs to another optimizer, placement, rule, rank, world size or model, or with overlap a backward pass
            has begun the next step; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.before_load()
        self._check_kind(state_dict)
        saved = self._unpacked(state_dict)
        self.state_tree().check(saved)
        self._check_masters(saved)
        self.state_tree().load_values(saved)
        self.state_tree().load_arrays(saved)  # which arrays are of a rank may follow from values
        self.flat.load_masters(saved.get("masters", {}) if self.flat.mixed else {})
        self.loaded()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _rules(self) -> Sequence[tuple[ErrorFeedback, int]]:
        """Return the rules at work, each with the entry at which its vector begins. Local."""
        return [(channel, 0) for channel in self.channels() if isinstance(channel, ErrorFeedback)]

    def before_load(self) -> None:
        """Raise while exchanges of a backward pass are under way. Local."""
        for rule, _ in self._rules():
            rule.before_load()

    def forget(self) -> None:
        """Let every rule start with errors and estimates of zero, see :meth:`ErrorFeedback.forget`. Local."""
        for rule, _ in self._rules():
            rule.forget()

    def _check_kind(self, state_dict: Mapping[str, Any]) -> None:
        """Raise unless it is the state of an optimizer of this package that is built in the same way. Local."""
        named = state_dict.get("optimizer")
        theirs = named if isinstance(named, str) else WRAPPED if "placement" in state_dict else "a torch optimizer"
        if theirs != self._kind:
            raise OptionError(f"load_state_dict: the state is of {theirs}, this is {type(self).__name__}; load a torch "
                              "optimizer's into that optimizer, before or after it is wrapped, and of others build what it "
                              "was saved from")

    def _masters(self) -> dict[int, torch.Tensor]:
        """Return what is saved as the masters, by the number of the parameter. Local."""
        return self.flat.masters()

    def _check_masters(self, state: Mapping[str, Any]) -> None:
        mine = {number: master.shape for number, master in self.flat.masters().items()}
        if mine and "masters" in state and {n: master.shape for n, master in state["masters"].items()} != mine:
            raise ShapeError("load_state_dict: the saved state has other parameters in 16 bits; load into the model it was "
                             "saved from")
