"""What all optimizers here share: parameters in one vector, ranks that agree before a step, and skip it together."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload
from zlib import crc32

import numpy as np
import torch
from torch.optim import Optimizer

from mpi_ef import kernels
from mpi_ef.collectives import Move, Plan
from mpi_ef.collectives.agreement import agree, ranks_text
from mpi_ef.collectives.frames import NON_FINITE, OK, REJECTED
from mpi_ef.collectives.plan import Comm
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DisagreementError, MpiEfError, OptionError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.vectors import FlatParameters

__all__ = ["Channel", "FlatOptimizer", "group_sizes", "hyper_parameters"]

_READY = np.dtype([("status", "u4"), ("groups", "u4"), ("steps", "u4"), ("zero", "u4"), ("squared_norm", "f8")])


Channel = Plan | ErrorFeedback


class FlatOptimizer(Optimizer):
    """A torch optimizer whose parameters are one vector, the same on all ranks. Construction and `step` are collective.

    Attributes
    ----------
    comm : MPI.Comm
    flat : FlatParameters
    steps : int
        Completed steps.
    skipped_steps : int
        Steps that all ranks skipped together because some rank's gradient had a NaN or Inf.
    check_replicas_every : int
        Every so many steps the ranks compare their parameters, one hash for each; 0, as at first, never.

    Notes
    -----
    With ``torch.amp.GradScaler`` on the CPU: ``scaler.step(optimizer)`` divides by the scale here, and an overflow on one
    rank makes all of them skip. A rank without an overflow keeps its scale; gradients are unscaled before anything travels.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves dividing and skipping to step()

    comm: Comm
    flat: FlatParameters
    clip: float = 0.0

    def _lay_out(self, comm: Comm, facts: Callable[[], Mapping[str, object]]) -> None:
        """Build the vectors of the parameters in ``self.param_groups``; raise on all ranks unless they agree. Collective."""
        self.comm, self.steps, self.skipped_steps, self.check_replicas_every = comm, 0, 0, 0
        self._retired_nbytes, self._retired_seconds = 0, dict.fromkeys(("encode", "communicate", "decode"), 0.0)
        parameters = [p for group in self.param_groups for p in group["params"]]

        def all_facts() -> Mapping[str, object]:
            more = facts()
            self.flat = FlatParameters(parameters)
            named = {f"parameter {number}": f"{tuple(p.shape)} {p.dtype} trained={p.requires_grad}"
                     for number, p in enumerate(parameters)}  # fmt: skip
            return {"the number of parameters": len(parameters), **named,
                    "hyper-parameters": hyper_parameters(self), **more}  # fmt: skip

        agree(comm, type(self).__name__, all_facts, "build the same model and optimizer on every rank")
        self.flat.broadcast(comm)
        self._put_masters_into_groups()

    def _put_masters_into_groups(self) -> None:
        masters = dict(zip(self.flat.parameters, self.flat.masters, strict=True))
        for group in self.param_groups:
            group["params"] = [masters.get(p, p) for p in group["params"]]

    def _slices(self) -> list[tuple[dict[str, Any], slice]]:
        """Return the groups and their parts of the vectors."""
        slices, start = [], 0
        sizes = {id(master): master.numel() for master in self.flat.masters}
        for group in self.param_groups:
            stop = start + sum(sizes.pop(id(p), 0) for p in group["params"])
            slices.append((group, slice(start, stop)))
            start = stop
        return slices

    @abstractmethod
    def channels(self) -> Sequence[Channel]:
        """Return what this optimizer speaks through now. Local."""

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank in all exchanges so far, see :class:`mpi_ef.collectives.Traffic`."""
        return self._retired_nbytes + sum(channel.sent_nbytes for channel in self.channels())

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of this rank in "encode", "communicate" and "decode", over all steps so far."""
        spent = dict(self._retired_seconds)
        for channel in self.channels():
            for name, seconds in channel.seconds.items():
                spent[name] += seconds
        return spent

    def plans(self) -> list[Plan]:
        """Return the plans of the channels. Local."""
        return [channel if isinstance(channel, Plan) else channel.plan for channel in self.channels()]

    def watch(self, watched: bool) -> None:
        """Let the next steps measure what compression loses, in passes of their own, or not. Local."""
        for plan in self.plans():
            plan.watched, plan.lost = watched, None

    @property
    def lost(self) -> float | None:
        """``||x - C(x)||^2 / ||x||^2`` of this rank's last watched step, mean over its exchanges; None in a dense one."""
        seen = [plan.lost for plan in self.plans() if plan.lost is not None]
        return sum(seen) / len(seen) if seen else None

    def _retire(self, channel: Channel) -> None:
        """Let go of a channel, but not of its account."""
        self._retired_nbytes += channel.sent_nbytes
        for name, seconds in channel.seconds.items():
            self._retired_seconds[name] += seconds

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a bandwidth-optimal uncompressed allreduce of one gradient sends from every rank."""
        size = int(self.comm.Get_size())
        return 2 * (size - 1) * self.flat.values.nbytes // size

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

    def loaded(self) -> None:
        """Derive again what follows from parameters, arrays and settings that were written. Local."""
        self.flat.publish()

    def forget(self) -> None:
        """Let every rule start with errors and estimates of zero, see :meth:`ErrorFeedback.forget`. Local."""
        for channel in self.channels():
            if isinstance(channel, ErrorFeedback):
                channel.forget()

    def own_state(self) -> dict[str, Any]:
        """Return further state that differs between ranks, of tensors and plain containers. Not copies. Local."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`own_state` returned, after :meth:`load_settings`. Local."""

    @property
    def shared_values(self) -> Vector:
        """The parameters, (d,), as far as they are the same on all ranks. Not a copy; read only."""
        return self.flat.values

    @abstractmethod
    def _update(self) -> None:
        """Exchange what has to travel and change ``self.flat.values``; all ranks are known to be ready. Collective.

        Raises
        ------
        NonFiniteError
            On all ranks together, with everything as it was.
        """

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Exchange, and update the parameters; the same bits on all ranks afterwards. Collective.

        When any rank's gradient has a NaN or Inf, all ranks skip the step together, with a warning on rank 0: no
        parameter, moment or error changes.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model once and returns the loss.

        Raises
        ------
        DisagreementError
            On all ranks, when their hyper-parameters or numbers of steps have become different, or, where
            `check_replicas_every` asks for it, parameters.
        NonFiniteError
            On all ranks, when an update overflowed although all gradients were finite. Parameters and errors are as
            before, a wrapped torch optimizer's moments are not.
        ShapeError, DtypeError, OptionError
            On a rank whose parameters or gradients are not usable any more; all other ranks raise `PeerError`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if broken := self._ready(self._collect()):
            self._skip(broken)
            return loss
        self._update()
        self.flat.publish()
        self.steps += 1
        if self.check_replicas_every and self.steps % self.check_replicas_every == 0:
            self.check_replicas()
        return loss

    def _collect(self) -> MpiEfError | None:
        """Make the vector of gradients ready; return what is wrong with it."""
        try:
            self.flat.collect_gradients()
        except MpiEfError as error:
            return error
        scale = getattr(self, "grad_scale", None)  # set by GradScaler while it calls step
        if scale is not None:
            self.flat.gradients *= self.flat.dtype.type(1.0 / float(scale))
        return None

    def _skip(self, broken: tuple[int, ...]) -> None:
        self.skipped_steps += 1
        if self.comm.Get_rank() == 0:
            text = f"step {self.steps} skipped on all ranks: NaN or Inf in the gradient on {ranks_text(broken)}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _ready(self, problem: MpiEfError | None) -> tuple[int, ...]:
        """Return the ranks with a NaN or Inf in their gradient, before any state has seen it; raise what else is wrong.

        Collective. Cost: one allgather of 24 bytes, which also tells whether the ranks still agree, and the norm of their
        gradients where `clip` wants it.
        """
        gradients, mine = self.flat.gradients, np.zeros(1, _READY)
        answers = np.zeros(self.comm.Get_size(), _READY)
        mine["status"] = REJECTED if problem else OK if kernels.all_finite(gradients) else NON_FINITE
        mine["groups"], mine["steps"] = crc32(repr(hyper_parameters(self)).encode()), self.steps
        if self.clip and problem is None:
            mine["squared_norm"] = float(np.linalg.norm(gradients)) ** 2
        self.comm.Allgather(mine.view(np.uint8), answers.view(np.uint8))
        words = answers[["status", "groups", "steps"]]
        if answers["status"].any() or (words != words[0]).any():

            def facts() -> dict[str, object]:
                if problem is not None:
                    raise problem
                return {"completed steps": self.steps, "hyper-parameters": hyper_parameters(self)}

            agree(self.comm, f"{type(self).__name__}.step", facts, "change and load them on all ranks alike")
            return tuple(np.flatnonzero(answers["status"]).tolist())
        if self.clip:
            self._clip(answers["squared_norm"])
        return ()

    def _clip(self, squared_norms: np.ndarray) -> None:
        """Scale the gradients of all ranks alike, so that the mean of their squared norms is at most ``clip^2``."""
        norm = float(np.sqrt(squared_norms.mean()))
        if norm > self.clip:
            self.flat.gradients *= self.flat.dtype.type(self.clip / norm)

    def clip_gradients(self, most: float) -> float:
        """Scale this rank's gradient to a norm of at most `most` and return the norm it had. Local; call before `step`.

        For parameters in 16 bits too, whose ``grad`` is empty: their gradients are kept in float32.
        """
        if not most > 0:
            raise OptionError(f"clip_gradients: most={most} is not positive")
        self.flat.collect_gradients()
        norm = float(np.linalg.norm(self.flat.gradients))
        if norm > most:
            self.flat.gradients *= self.flat.dtype.type(most / norm)
        return norm

    def synchronize(self) -> None:
        """Make parameters equal on all ranks where an optimizer lets them differ for a while. Collective."""

    def check_replicas(self) -> None:
        """Raise on all ranks unless all parameters are the same bits everywhere. Collective.

        Raises
        ------
        DisagreementError
            With the first parameter that differs, and the ranks that hold what rank 0 does not.
        """
        flattened = (p.detach().contiguous().view(-1).view(torch.uint8) for p in self.flat.parameters)
        mine = np.array([crc32(flat.numpy().tobytes()) for flat in flattened], np.uint32)
        answers = np.empty((self.comm.Get_size(), mine.size), np.uint32)
        self.comm.Allgather(mine, answers)
        different = (answers != answers[0]).any(axis=0)
        if different.any():
            number = int(different.argmax())
            ranks = np.flatnonzero(answers[:, number] != answers[0, number]).tolist()
            raise DisagreementError(
                f"{type(self).__name__}: after step {self.steps} {self._name(number)} is not on {ranks_text(ranks)} what it "
                "is on rank 0; do not change parameters by hand, nor on some ranks only"
            )

    def _name(self, number: int) -> str:
        p = self.flat.parameters[number]
        named = {
            id(q): name
            for group in self.param_groups
            for q, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        name = named.get(id(self.flat.masters[number]), f"number {number}")
        return f"parameter {name} {tuple(p.shape)}"

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Set all gradients to zero. They stay views of one vector, also with ``set_to_none=True``. Local."""
        self.flat.zero_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the vector of parameters is laid out at construction."""
        if hasattr(self, "flat"):
            raise OptionError(
                f"{type(self).__name__}: a group cannot be added later; build it after all groups are known"
            )
        super().add_param_group(param_group)


def group_sizes(optimizer: Optimizer) -> str:
    """Return how many parameters each group has, as text."""
    return ", ".join(str(len(group["params"])) for group in optimizer.param_groups)


def hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups without their parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
