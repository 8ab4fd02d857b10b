"""What of an optimizer is saved, and how it gets to other ranks."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from mpi_ef.collectives import Move
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import ShapeError
from mpi_ef.feedback import ErrorFeedback

from .accounts import Communicating

__all__ = ["Saved"]


class Saved(Communicating):
    """A torch optimizer that says which of its state is the same on all ranks, and which is not."""

    _compares: bool  # whether ranks compare their parameters before the next step
    _loads: int

    @abstractmethod
    def per_rank(self) -> dict[str, Vector]:
        """Return the named arrays that differ between ranks. Not copies. Local."""

    @abstractmethod
    def replicated(self) -> dict[str, Vector]:
        """Return the named arrays, besides the parameters, that are equal on all ranks. Not copies. Local."""

    @abstractmethod
    def moves(self) -> dict[str, Move]:
        """Return how each array that may be in :meth:`per_rank` gets to another number of ranks. Local."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Return what must be the same where a saved state is loaded, on any number of ranks. Local."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what is the same on all ranks besides parameters and arrays: groups, counters. Not copies. Local."""

    @abstractmethod
    def account(self) -> dict[str, Any]:
        """Return what a rank counts for itself: bytes. Local."""

    @abstractmethod
    def load_settings(self, settings: Mapping[str, Any], account: Mapping[str, Any]) -> None:
        """Restore what :meth:`settings` and :meth:`account` returned. Local; arrays and parameters, then :meth:`loaded`."""

    @abstractmethod
    def _state_dict(self) -> dict[str, Any]:
        """Return what :meth:`state_dict` does, before hooks have seen it. Local."""

    @abstractmethod
    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it. Local."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all state of this rank: arrays, rules, counters, groups. Local; save it per rank.

        Of a wrapped optimizer too. Hooks that were registered for it are called as torch calls them.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self._state_dict()
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
            When it belongs to another optimizer, placement, rule, rank, world size or model; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def own_state(self) -> dict[str, Any]:
        """Return further state that differs between ranks, of tensors and plain containers. Not copies. Local."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`own_state` returned, after :meth:`load_settings`. Local."""

    def forget(self) -> None:
        """Let every rule start with errors and estimates of zero, see :meth:`ErrorFeedback.forget`. Local."""
        for channel in self.channels():
            if isinstance(channel, ErrorFeedback):
                channel.forget()

    def _note_load(self) -> None:
        """Let ranks find out in the next step whether all have loaded, and the same. Local."""
        self._compares, self._loads = True, self._loads + 1

    def _saved_masters(self) -> dict[str, Any]:
        """Return what a state holds besides, where there are parameters in 16 bits: a model's state has them rounded."""
        return {"masters": self.flat.masters()} if self.flat.mixed else {}

    def _check_masters(self, state: Mapping[str, Any]) -> None:
        mine = {number: master.shape for number, master in self.flat.masters().items()}
        theirs = {number: master.shape for number, master in state.get("masters", mine).items()} if mine else mine
        if "masters" in state and theirs != mine:
            raise ShapeError("load_state_dict: the saved state has other parameters in 16 bits; load into the model it was "
                             "saved from")  # fmt: skip

    def _load_masters(self, state: Mapping[str, Any]) -> None:
        self._note_load()
        self.flat.load_masters(state.get("masters", {}) if self.flat.mixed else {})
