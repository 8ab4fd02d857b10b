"""What all optimizers here share: parameters in one vector, ranks that agree before a step, and skip it together."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any, overload
from weakref import finalize
from zlib import crc32

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from mpi_ef.buffers import broadcast_buffers
from mpi_ef.collectives.frames import NON_FINITE, OK, REJECTED
from mpi_ef.comm.consensus import agree, check_not_freed, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DisagreementError, OptionError
from mpi_ef.ranges import within
from mpi_ef.vectors import FlatParameters, Mask

from .accounts import Channel
from .groups import Listed, check_options, described, hyper_parameters, names_of
from .handshake import DONE, WEIGHS, Handshake, check_order
from .line import line_for, newest_line
from .resting import memories, momenta, silent
from .saved import Saved
from .writes import Writes

__all__ = ["Channel", "FlatOptimizer"]

_numbers = count(1)


class FlatOptimizer(Saved):
    """A torch optimizer whose parameters are one vector, the same on all ranks. Construction and `step` are collective.

    With ``torch.amp.GradScaler``: ``scaler.step(optimizer)`` divides by the scale here, and an overflow on one
    rank makes all of them skip. A rank without an overflow keeps its scale; gradients are unscaled before anything travels.

    Attributes
    ----------
    comm : MPI.Comm
    flat : FlatParameters
    steps, skipped_steps : int
        That were completed, and that all ranks skipped together because some rank's gradient had a NaN or Inf.
    check_replicas_every : int
        Ranks compare their parameters, by a hash, before the first step, the first one after a state was loaded or the
        program has written to parameters (every 16th of steps that all come after such), and every so many; 0 leaves out
        the last.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves dividing and skipping to step()

    clip: float = 0.0
    overlaps = _lends = done = weighs = False  # whether gradients of a step may stay where they are; of join
    weight, _bears = 1.0, False  # whether exchanges go on without the vectors of a few ranks

    def _lay_out(self, comm: Comm, facts: Callable[[], Mapping[str, object]], model: object = None) -> None:
        """Build the vectors of the parameters in ``self.param_groups``; raise on all ranks unless they agree. Collective.

        A module as `model` has its parameters and buffers made equal as well.
        """
        self.comm, self.steps, self.skipped_steps, self.check_replicas_every = comm, 0, 0, 1000
        self._compares, self._last_at_work, self._loads = True, 0, 0
        self._listed, self._named = Listed(self), names_of(self, model)
        self._retired_nbytes, self._retired_seconds = 0, dict.fromkeys(("encode", "communicate", "decode"), 0.0)
        parameters = [p for group in self.param_groups for p in group["params"]]
        hashes = []

        def all_facts() -> Mapping[str, object]:
            more = facts()
            check_options(self)
            self.flat = FlatParameters(parameters)
            self._allocate()
            hashes.append(self.flat.hashes())
            return {**described(parameters, self._named), "whether a model is given": isinstance(model, nn.Module),
                    "hyper-parameters": hyper_parameters(self), **more}

        with newest_line(comm) as state:
            answers = agree(comm, type(self).__name__, all_facts, "build the same model and optimizer on every rank",
                            value=(next(_numbers), state), call=self.built)
            self._number: int = answers[0][0]  # of rank 0, which has all optimizers of this communicator
            line = line_for(comm, {state for _, state in answers})
        self._handshake = Handshake(comm, type(self).__name__, self._number, line)
        finalize(self, self._handshake.leave)
        check_order(comm, type(self).__name__, hashes[0], self._name)
        self.flat.broadcast(comm)
        self._writes = Writes(self.flat)
        if isinstance(model, nn.Module):
            broadcast_buffers(model, comm)

    def _allocate(self) -> None:
        """Make further vectors as long as those of the parameters, where it fails on all ranks if on one. Local."""

    def slices(self) -> list[tuple[dict[str, Any], slice]]:
        """Return the groups and their parts of the vectors."""
        slices, start = [], 0
        sizes = {id(p): p.numel() for p in self.flat.parameters}
        for group in self.param_groups:
            stop = start + sum(sizes.pop(id(p), 0) for p in group["params"])
            slices.append((group, slice(start, stop)))
            start = stop
        return slices

    def loaded(self) -> None:
        """Derive again what follows from parameters, arrays and values that were written. Local."""
        self._compares, self._loads = True, self._loads + 1  # the next step finds out whether all have loaded the same
        for rule, _ in self._rules():
            rule.loaded()

    @property
    def shared_values(self) -> Vector:
        """The parameters, (d,), as far as they are the same on all ranks. Not a copy; read only."""
        return self.flat.values

    @abstractmethod
    def update(self) -> None:
        """Exchange what has to travel and change ``self.flat.values``; all ranks are known to be ready. Collective.

        Raises
        ------
        NonFiniteError
            On all ranks together, with everything as it was.
        """

    def _updated(self) -> None:
        """Decide what follows from the state after a whole step, before it counts. Local, alike on all ranks."""

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
            On all ranks, when they step different optimizers, or their hyper-parameters, numbers of steps or, where
            `check_replicas_every` asks for it, parameters have become different.
        NonFiniteError
            On all ranks, when an update overflowed although all gradients were finite. Parameters and errors are as
            before, a wrapped torch optimizer's moments are not.
        ShapeError, DtypeError, OptionError
            On a rank whose parameters or gradients are not usable any more; all other ranks raise `PeerError`. So it is
            with an error of the closure.
        """
        whole = type(self).step is FlatOptimizer.step  # else torch has made that of a subclass, and calls the hooks
        return self._step_seen(closure) if whole and self.is_watched else self._step_of(closure)

    step.hooked = True  # type: ignore[attr-defined]  # so that torch does not record every step, a tenth of a short one

    def _step_of(self, closure: Callable[[], float] | None = None) -> float | None:
        losses = []

        def prepare() -> None:
            if closure is not None:
                with torch.enable_grad():
                    losses.append(closure())
                self.note_loss(losses[0])
            self._collect()

        self._step(self._ready(prepare))
        return losses[0] if losses else None

    _step_seen = Optimizer.profile_hook_step(_step_of)  # as torch makes it: with hooks, and for the profiler

    def _step(self, broken: tuple[int, ...]) -> None:
        """Take a step for which all ranks are ready, or skip it. Collective."""
        if broken:
            self.skipped_steps += 1
            if self.comm.Get_rank() == 0:
                text = f"step {self.steps} skipped on all ranks: NaN or Inf in the gradient on {ranks_text(broken)}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return
        self._weigh()
        with self._resting():
            self.update()
        self._updated()
        self.flat.write_back()
        self._writes.settle()
        self.steps += 1
        self._handshake.steps = self.steps
        self._compares = bool(self.check_replicas_every) and self.steps % self.check_replicas_every == 0

    @contextmanager
    def join(self, *, weigh: bool = False) -> Iterator[None]:
        """Return a context in which ranks may take different numbers of steps. Collective at its end.

        A rank that comes to its end takes part in the steps of the others with nothing, not even with weight decay or
        momentum of its own, until all have come there. Steps are those of the rank with most. Hyper-parameters are those of
        ranks at work.

        Parameters
        ----------
        weigh : bool
            Take the mean over the ranks that have a gradient, not over all. The same on all ranks, else steps raise.
        """
        if weigh and self.overlaps:
            raise OptionError("join: weigh=True with overlap=True, whose gradients leave before ranks know who has some; "
                              "take overlap=False")
        before, self.weighs = self.weighs, weigh
        try:
            yield
            self.done = True
            while self.take_part():
                pass
        finally:
            self.done, self.weighs = False, before

    def take_part(self) -> bool:
        """Take part in a step of the others with nothing; tell whether there was one. Collective."""
        self.zero_grad()
        with silent([slice(0, self.flat.d)], lambda: momenta(self._rules())):
            broken = self._ready(self._collect)
            if self._handshake.at_work.size == 0:
                self._rollback()
                return False
            self._step(broken)
        return True

    def _collect(self) -> None:
        """Make the vectors of parameters and gradients ready; raise what is wrong with them. Local."""
        self._writes.adopt()
        scale = getattr(self, "grad_scale", None)  # set by GradScaler while it calls step
        self.flat.collect_gradients(lend=self._lends and scale is None and self.steps >= Handshake.LOOKS)
        self.flat.spend_gradients()
        self._listed.check(self)
        if scale is not None:
            self.flat.gradients *= self.flat.dtype.type(1.0 / float(scale))

    def _looked(self) -> dict[str, float]:
        """Return what this rank has to say of its parameters and gradients before a step. Local."""
        groups = crc32(repr((hyper_parameters(self), self.check_replicas_every, self._loads)).encode())
        overflow = getattr(self, "found_inf", None)  # set by GradScaler, which may have seen it before it was clipped
        fine = self._bears or (not overflow and self.flat.kernels.finite(self.flat.collected()))
        words: dict[str, float] = {"groups": groups, "status": OK if fine else NON_FINITE}
        self._compares = self._writes.compares() or self._compares
        if self._compares:
            words["values"] = self._writes.hash(self.shared_values)
        if self.steps < Handshake.LOOKS and self.flat.kernels.any(self.flat.gradients):
            words["gradient"] = crc32(self.flat.fingerprints(self.flat.gradients).data)
        if self.clip:
            words["squared_norm"] = self.flat.kernels.norm(self.flat.gradients) ** 2
        return words

    def _resting(self) -> AbstractContextManager[None]:
        """Return a context in which parameters that have a gradient on no rank stay, and what is kept for them."""
        return nullcontext() if self.moving.all() else self._staying()

    @contextmanager
    def _staying(self) -> Iterator[None]:
        resting, layers = np.flatnonzero(~self.moving).tolist(), len(self.flat.parameters)
        saved = [
            (array[place], array[place].copy()) for number in resting
            for array in (self.flat.values, *self._kept())
            for place in [slice(number, number + 1) if array.size == layers != self.flat.d else self.flat.place(number)]]
        try:
            with self._silent(resting, *self._sent()):
                yield
        finally:
            for part, before in saved:
                part[...] = before

    @contextmanager
    def _silent(self, numbers: Sequence[int], *vectors: Vector) -> Iterator[None]:
        """Let parameters, by number, take part in exchanges with nothing: they neither send nor keep anything of it.

        `vectors`, (d,), and what the rules keep are zero there meanwhile, and what they were afterwards.
        """
        places, rules = [*map(self.flat.place, numbers)], self._rules()
        for rule, first in rules:
            rule.resting = [slice(place.start - first, place.stop - first) for place in places]
        try:
            with silent(places, lambda: [*((v, 0) for v in vectors), *memories(rules)]):
                yield
        finally:
            for rule, _ in rules:
                rule.resting = ()

    def _sent(self) -> Sequence[Vector]:
        """Return the arrays, (d,), that go into messages besides what rules keep. Local."""
        return [self.flat.gradients]

    def _weigh(self) -> None:
        if self.weight != 1.0:
            self.flat.gradients *= self.flat.dtype.type(self.weight)

    def _kept(self) -> Sequence[Vector]:
        """Return arrays, (d,) or of an entry for every parameter, in which what rests does not change. Local."""
        return []

    def _ready(self, prepare: Callable[[], None]) -> tuple[int, ...]:
        """Return the ranks with a NaN or Inf in their gradient, before any state has seen it; raise what else is wrong.

        Collective. Cost: one allgather of 40 bytes, which also tells whether the ranks still agree, and the norm of their
        gradients where `clip` wants it; a second one of a byte for each parameter in steps in which not the same ones have a
        gradient on all ranks.
        """
        problem, self.weight, words = None, 1.0, dict[str, float](status=REJECTED, values=0, gradient=0)
        try:
            prepare()
            words |= self._looked()
        except Exception as error:  # the other ranks are on their way into the step
            problem = error
        words |= {"present": crc32(self.flat.present.data), "joins": DONE * self.done | WEIGHS * self.weighs}
        answers = self._handshake.ask(steps=self.steps, **words)
        agreed = self._handshake.agreed()
        self.moving: Mask = self._handshake.anywhere(self.flat.present) if agreed else np.ones_like(self.flat.present)
        self._wait()
        if not agreed:
            broken = tuple(np.flatnonzero(answers["status"]).tolist())
            self._complain(problem)
            return broken
        if not self._handshake.same("values"):  # hashes differ, or not all ranks had a reason to form one
            self.check_replicas()
        if not self._handshake.all_at_work and not self._keep_up():
            return ()
        self._handshake.look_at_gradients()
        if self.clip:
            self._clip(answers["squared_norm"])
        return ()

    def _wait(self) -> None:
        """Finish, on all ranks that are still there, what is under way since the backward pass. Collective."""

    def _rollback(self) -> None:
        """Forget what has arrived: all is as it was before the step. Local."""

    def _keep_up(self) -> bool:
        """Let ranks without data have the hyper-parameters of those at work, or last at work; tell if any is. Collective."""
        at_work = self._handshake.at_work
        if at_work.size:
            self._last_at_work = int(at_work[0])
            self.weight = int(self.comm.Get_size()) / at_work.size if self.weighs else 1.0
        if not self._handshake.same("groups"):
            answers = self.comm.allgather(hyper_parameters(self))
            for group, values in zip(self.param_groups, answers[self._last_at_work] if self.done else (), strict=False):
                group.update(values)
        return at_work.size > 0

    def _complain(self, problem: Exception | None) -> None:
        """Raise on all ranks what they disagree on, or the problem of one of them; return if there is none. Collective."""

        def facts() -> dict[str, object]:
            if problem is not None:
                raise problem
            return {"the optimizer that takes a step": f"number {self._number} ({type(self).__name__})",
                    "completed steps": self.steps, "how many states were loaded": self._loads,
                    "weigh of join": self.weighs, "hyper-parameters": hyper_parameters(self),
                    "check_replicas_every": self.check_replicas_every}

        agree(self.comm, f"{type(self).__name__}.step", facts, "change and load them on all ranks alike")

    def _clip(self, squared_norms: np.ndarray) -> None:
        """Scale the gradients of all ranks alike, so that the mean of their squared norms is at most ``clip^2``."""
        if (norm := float(np.sqrt(squared_norms.mean()))) > self.clip:
            self.flat.gradients *= self.flat.dtype.type(self.clip / norm)

    def clip_gradients(self, most: float) -> float:
        """Scale this rank's gradient to a norm of at most `most` and return the norm it had. Local; call before `step`.

        As ``torch.nn.utils.clip_grad_norm_``, but that sums of gradients in 16 bits, which are in float32, are not rounded.
        """
        within("clip_gradients", "(0, inf)", "1.0 is usual", most=most)
        self.flat.collect_gradients()
        if (norm := float(self.flat.kernels.norm(self.flat.gradients))) > most:
            self.flat.scale_gradients(most / norm)
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
        check_not_freed(self.comm, type(self).__name__)
        mine = self.flat.hashes()
        answers = np.empty((self.comm.Get_size(), mine.size), np.uint32)
        self.comm.Allgather(mine, answers)
        different = (answers != answers[0]).any(axis=0)
        if different.any():
            number = int(different.argmax())
            ranks = np.flatnonzero(answers[:, number] != answers[0, number]).tolist()
            raise DisagreementError(f"{type(self).__name__}: after step {self.steps} {self._name(number)} is not on "
                                    f"{ranks_text(ranks)} what it is on rank 0; do not change parameters by hand, nor on "
                                    "some ranks only")

    def _name(self, number: int) -> str:
        p = (self.flat.parameters + self.flat.frozen)[number]
        return f"parameter {self._named.get(id(p), f'number {number}')} {tuple(p.shape)}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Take all gradients away or, with ``set_to_none=False``, set them to zero, as in torch. Local."""
        self.flat.zero_gradients(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the vector of parameters is laid out at construction."""
        if hasattr(self, "flat"):
            raise OptionError(f"{type(self).__name__}: a group cannot be added later; build it after all groups are known")
        super().add_param_group(param_group)
