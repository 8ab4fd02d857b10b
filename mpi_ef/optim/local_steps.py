"""Steps of every rank by itself, and what they have led to exchanged now and then."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from zlib import crc32

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from mpi_ef.collectives import PlanBuilder, plan_for
from mpi_ef.collectives.frames import OK
from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import MpiEfError, NonFiniteError, OptionError, briefly
from mpi_ef.ranges import whole, within
from mpi_ef.statetree import LOCAL, PER_RANK, REPLICATED, Leaf, Reshard, StateTree, attribute
from mpi_ef.vectors import Mask

from .aside import Aside
from .buckets import Bucket, Buckets, fragment_slices
from .handshake import Handshake
from .outer import OuterStep
from .wrapper import DistributedOptimizer

__all__ = ["LocalSteps"]


class LocalSteps(DistributedOptimizer):
    """Take H steps of any torch optimizer on every rank, then exchange what they have led to. Construction is collective.

    DiLoCo (Douillard et al. 2023, arXiv 2311.08105), SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706), MuLoCo (Therien et
    al. 2025, arXiv 2505.23725, with ``torch.optim.Muon``), for links on which a message every step is too much. All ranks
    share x; rank i trains y_i, which are the model's parameters. In the last step of a round, of H = `every` steps::

        D_i     = x - y_i
        p_i     = decay e_i + D_i
        Delta_i = C(p_i)
        e_i     = p_i - Delta_i
        x       = x - outer_lr mean_i Delta_i      (with outer momentum: M = mu M + mean, x = x - outer_lr (mean + mu M))
        y_i     = x

    Nothing travels in the other steps. With ``every=1, decay=1.0`` it is :class:`DistributedOptimizer`, to the last bit.

    Parameters
    ----------
    optimizer, comm, compressor, plan, model : as :class:`DistributedOptimizer`'s
        ``TopK(0.03, values=TwoBits(), segments=4096)`` is about what SparseLoCo sends.
    every : int
        H. Learning-rate schedules count steps of the torch optimizer, on all ranks alike.
    decay : float
        What of an error counts a round later, in [0, 1]. 1 is EF14, in which nothing is lost; after many steps by themselves
        old errors point to where ranks have been, and 0.95 trains better.
    outer_lr, outer_momentum : float
        Of the step of x, Nesterov's; 0.7 and 0.9 in DiLoCo. Momentum wants ``decay=1.0`` (`OptionError`): it counts old
        messages again, which errors that fade are about to forget.
    fragments : int
        P runs of whole parameters, of about as many entries. Fragment p is exchanged at step ``(p + 1) H / P`` of a round,
        so that a message is 1 / P as long (Streaming DiLoCo, Douillard et al. 2025, arXiv 2501.18512).
    late : bool
        Let messages travel while the next round is trained: what they bring is applied a round later, where y_i gets what x
        has become in place of where rank i had been, ``y_i = y_i + x - (y_i when it was sent)``. A vector more.

    Attributes
    ----------
    x : (d,) array
        What all ranks share, the same bits; read only.
    rounds, skipped_rounds : int
        Exchanges so far, of fragments each by itself, and those skipped because some rank's y_i had a NaN or Inf: x stays,
        and those ranks go on from x without moments.
    skipped_local_steps : int
        Steps that this rank skipped by itself, because its gradient had a NaN or Inf. With ``every=1`` all ranks skip such a
        step together (`skipped_steps`).
    local_steps : int
        Steps since the parameters were the same on all ranks.

    Notes
    -----
    With E the mean of the e_i, ``E_{t+1} = decay E_t + mean_i D_i - mean_t``. What the owners of chunks owe, with a plan of
    two phases, is part of E as well, and does not fade. What a program writes to parameters before the first step of a round
    is to be the same on all ranks, and x becomes that; what it writes in a round is part of this rank's way. Saving is exact
    at any step: x, and y_i of every rank; other numbers of ranks go on from the mean of the y_i. An exchange under way
    (`late`) is sent again after loading.

    What a rank raises in a step without an exchange it raises alone. A parameter without gradient on this rank stays where
    it is, and one that has not moved on any rank takes no part in the exchange. Parameters are compared, by hashes of x, in
    steps with an exchange. Buffers, such as BatchNorm's, are each rank's own: call :func:`mpi_ef.synchronize_buffers`, and
    :meth:`synchronize` or :meth:`shared`, before evaluating. Memory: as with :class:`DistributedOptimizer`.
    """

    def __init__(self, optimizer: Optimizer, comm: Comm, compressor: Compressor, *, every: int, decay: float = 0.95,
                 outer_lr: float = 1.0, outer_momentum: float = 0.0, plan: PlanBuilder = plan_for, fragments: int = 1,
                 late: bool = False, model: object = None) -> None:
        self.every, self.decay, self.fragments, self.late = every, decay, fragments, late
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        self.local_steps = self.rounds = self.skipped_rounds = self.skipped_local_steps = 0
        self._pending: dict[int, list[int]] = {}  # fragments that travel, and their parameters that rest, by number
        super().__init__(optimizer, comm, compressor, rule="ef14", plan=plan, model=model, decay=decay)
        self._alone = self._exact and comm.Get_size() == 1 and outer_lr == 1.0 and not outer_momentum
        self._groups: dict[tuple[int, ...], Buckets] = {}
        self.x[:] = self.flat.values

    def _check_arguments(self) -> None:
        name = type(self).__name__
        whole(name, 1, "15 is usual where links are slow", every=self.every)
        within(name, "[0, 1]", "1 keeps all errors, 0.95 is usual", decay=self.decay)
        within(name, "(0, inf)", "1.0 takes the mean as it is", outer_lr=self.outer_lr)
        within(name, "[0, 1)", "0 is none, 0.9 is usual", outer_momentum=self.outer_momentum)
        if not isinstance(self.late, bool):
            raise OptionError(f"{name}: late={briefly(self.late)} is neither True nor False; pass one of them")
        whole(name, 1, "1 sends all parameters at once", fragments=self.fragments)
        if self.outer_momentum and self.decay < 1:
            raise OptionError(f"{name}: decay={self.decay} with outer_momentum={self.outer_momentum}, which counts old "
                              "messages again while old errors fade; pass decay=1.0, or outer_momentum=0.0")
        super()._check_arguments()

    def _facts(self) -> dict[str, object]:
        return {name: getattr(self, name)
                for name in ("every", "decay", "outer_lr", "outer_momentum", "fragments", "late")}

    def _allocate(self) -> None:
        self._after, self._aside = None, Aside(self.flat, type(self).__name__)  # torch steps where the parameters are
        zeros = self.flat.kernels.zeros
        self.x: Vector = zeros(self.flat.d)
        self._outer = OuterStep(self.x, self.outer_lr, self.outer_momentum)
        self._sent_from: list[Vector] = [zeros(self.flat.d)] if self.late else []  # y_i when it was sent

    def _slices(self, nbytes: int | None) -> list[tuple[range, slice]]:  # noqa: ARG002
        return fragment_slices(self.flat, self.fragments)

    @property
    def synchronized(self) -> bool:
        """Whether the parameters are the same on all ranks now."""
        return self.local_steps == 0

    @property
    def shared_values(self) -> Vector:
        """What all ranks share, (d,): the parameters or, in a round, x. Not a copy; read only."""
        return self.flat.values if self.synchronized else self.x

    def state_tree(self) -> StateTree:
        """Describe the state: that of :class:`DistributedOptimizer`, x, and where this rank is, y. Local."""
        tree = super().state_tree()
        mean = Reshard("mean")
        # While parameters are the same everywhere, those of the model are what counts.
        y = self._aside.values if self._aside.values is not None else self.x if self.synchronized else self.flat.current()
        tree.leaves.update({
            "y": Leaf(PER_RANK, y, reshard=mean),
            "x": Leaf(REPLICATED, self.x),  # after y: at the end of a round they are one array, and means are rounded
            **{name: attribute(self, name) for name in ("local_steps", "rounds", "skipped_rounds")},
            "pending": Leaf(REPLICATED, read=lambda: [[p, *resting] for p, resting in self._pending.items()],
                            write=lambda saved: setattr(self, "_pending", {p: resting for p, *resting in saved})),
            "skipped_local_steps": attribute(self, "skipped_local_steps", LOCAL, default=0),
        })
        if self._outer.arrays:
            tree.leaves["momentum"] = Leaf(REPLICATED, self._outer.arrays[0])
        if self._sent_from:
            tree.leaves["sent_from"] = Leaf(PER_RANK, self._sent_from[0], reshard=mean)
        return tree

    def _masters(self) -> dict[int, Tensor]:
        return super()._masters() if self._aside.values is None else {}  # y has them

    def before_load(self) -> None:
        """Raise while an exchange is under way. Local."""
        if any(bucket.feedback.under_way for bucket in self.buckets):
            raise OptionError(f"{type(self).__name__}: an exchange is under way, as late=True lets it; call synchronize() "
                              "on all ranks before a state is loaded or errors are forgotten")
        super().before_load()
        self._aside.refuse("a state is loaded")
        self._writes.adopt()

    def loaded(self) -> None:
        """Derive again what follows from what was written, see :meth:`FlatOptimizer.loaded`. Local."""
        super().loaded()
        if not self.synchronized:
            self.flat.write_back()

    def _due(self) -> list[int]:
        """Return the fragments that are exchanged in the next step, the same on all ranks. Local."""
        at = (self.local_steps + 1) % self.every
        return [p for p in range(self.fragments) if (p + 1) * self.every // self.fragments % self.every == at]

    def _ready(self, prepare: Callable[[], None]) -> tuple[int, ...]:
        if self._due():
            return super()._ready(prepare)
        prepare()
        return ()

    def _step(self, broken: tuple[int, ...]) -> None:
        due = self._due()
        if self.synchronized and not broken:
            self._compares = self._compares or (not due and self._writes.any)
            self.x[:] = self.flat.values  # to which something may have been written
        if not due:
            self._step_alone()
            return
        super()._step(broken)
        if not broken:
            self.local_steps = 0 if self._met else self.local_steps + 1

    def _collect(self) -> None:
        self._aside.refuse("a step")
        super()._collect()
        self._own: Mask = self.flat.present.copy()
        if not self.synchronized and self._due() and not self._own.all():
            self.flat.present |= self._moved()

    def _moved(self) -> Mask:
        """Return which parameters are not where x is. Local."""
        moved: Mask = self.flat.fingerprints(self.x) != self.flat.fingerprints(self.flat.values)
        return moved

    def _looked(self) -> dict[str, float]:
        words = super()._looked()
        if self.every > 1:  # gradients of single steps are not compared, but what they have led to
            words["status"] = OK  # a rank with a NaN skips its own step
            looks = self.steps < Handshake.LOOKS * self.every and not self.synchronized and self._moved().any()
            words["gradient"] = crc32(self.flat.fingerprints(self.flat.values).data) if looks else 0
        return words

    def _stepping(self) -> Mask:
        # A round of one step is one of DistributedOptimizer, where zeros stand for a gradient that other ranks have.
        return self.moving if self.every == 1 else self._own

    def _step_inside(self) -> None:
        overflow = getattr(self, "found_inf", None)  # of GradScaler
        if self.every == 1 or (not overflow and self.flat.kernels.finite(self.flat.collected())):
            super()._step_inside()
            return
        self.skipped_local_steps += 1
        if not overflow:
            warnings.warn(f"step {self.steps} skipped on rank {self.comm.Get_rank()} alone: NaN or Inf in its gradient",
                          RuntimeWarning, stacklevel=3)

    def _step_alone(self) -> None:
        """Take a step of this rank. Local."""
        if (problem := self._try_inside()) is not None:
            raise problem from problem.__cause__
        self.flat.write_back()
        self._writes.settle(but_frozen=True)
        self.steps += 1
        self.local_steps += 1
        self._handshake.steps = self.steps
        self._compares |= bool(self.check_replicas_every) and self.steps % self.check_replicas_every == 0
        for p in self._pending:
            self.buckets[p].feedback.progress()

    def _now(self) -> Sequence[Bucket]:
        return [self.buckets[p] for p in self._due()]

    def _resting(self) -> AbstractContextManager[None]:
        return nullcontext()  # update() takes care of it: what arrives late is not of the parameters that rest now

    def update(self) -> None:
        """Take the last step of a round, and exchange, see :meth:`FlatOptimizer.update`. Collective."""
        due, resting = self._due(), np.flatnonzero(~self.moving).tolist()
        problem = self._try_inside()
        if problem is not None and self.synchronized:
            self.flat.values[:] = self.x
        try:
            self._arrive([p for p in due if p in self._pending])
            if self.late:
                self._met = False
                self._depart(due, resting)
            else:
                self._met = self._exchange(due, resting) and len(due) == self.fragments
        except MpiEfError:
            if problem is not None:
                raise problem from problem.__cause__
            raise
        if problem is not None:  # the others learn of it where this exchange ends
            raise problem from problem.__cause__
        if (self.late or self.fragments > 1) and not self.flat.kernels.finite([self.flat.values]):
            self._restart()  # and not only when it is known to all, of all fragments

    def _exchange(self, which: Sequence[int], resting: Sequence[int]) -> bool:
        """Exchange fragments, and go on from the new x; tell whether that was possible. Collective."""
        group = tuple(which)
        if group not in self._groups:
            self._groups[group] = Buckets(self.flat, [self.buckets[p] for p in which], None)
        values = self.flat.values

        def take(part: slice, mean: Vector) -> None:
            if not self._alone:  # else nothing is lost of its way: it is not taken apart and put together again
                self._outer.take(part, mean)
                values[part] = self.x[part]
            else:
                self.x[part] = values[part]

        try:
            with self._silent(resting, self.x, values, *self._outer.arrays):
                self._groups[group].step(lazy(self.x) - values, take)
        except NonFiniteError as error:
            self._skip(error.ranks)
            if self.comm.Get_rank() in error.ranks:
                self._restart()
            return False
        self.rounds += 1
        return True

    def _depart(self, which: Sequence[int], resting: Sequence[int]) -> None:
        """Start to exchange fragments. Collective."""
        values, (sent_from,) = self.flat.values, self._sent_from
        with self._silent(resting, self.x, values):
            for p in which:
                part = self.buckets[p].part
                sent_from[part] = values[part]
                self.buckets[p].feedback.start((lazy(self.x) - values)[part])
                self._pending[p] = list(resting)

    def _arrive(self, which: Sequence[int]) -> None:
        """Finish the exchanges of fragments that are under way, and let x and this rank be where they lead. Collective."""
        if not which:
            return
        values, (sent_from,) = self.flat.values, self._sent_from
        broken: set[int] = set()
        for p in which:
            bucket = self.buckets[p]
            if not bucket.feedback.under_way:  # it was when the state was saved that has been loaded
                with self._silent(self._pending[p], self.x, sent_from):
                    bucket.feedback.start((lazy(self.x) - sent_from)[bucket.part])
        for p in which:
            try:
                self.buckets[p].feedback.wait()
            except NonFiniteError as error:
                broken.update(error.ranks)
        for p in which:
            bucket, resting = self.buckets[p], self._pending.pop(p)
            if broken:
                bucket.feedback.rollback()
                continue
            with self._silent(resting, self.x, values, *self._outer.arrays):
                part = bucket.part
                self._outer.take(part, bucket.feedback.commit())
                sent_from[part] *= self.flat.dtype.type(-1)
                self.flat.kernels.add_dense(self.x[part], 1.0, sent_from[part])
                self.flat.kernels.add_dense(sent_from[part], 1.0, values[part])
        if broken:
            self._skip(tuple(sorted(broken)))
        else:
            self.rounds += 1

    def _skip(self, ranks: tuple[int, ...]) -> None:
        self.skipped_rounds += 1
        if self.comm.Get_rank() == 0:
            warnings.warn(f"step {self.steps}: nothing exchanged, as there was a NaN or Inf in parameters on "
                          f"{ranks_text(ranks)}, to go on from what all share, without moments", RuntimeWarning,
                          stacklevel=3)

    def _restart(self) -> None:
        """Go on from what all ranks share, without moments. Local."""
        values = self.flat.values
        for p, bucket in enumerate(self.buckets):
            part = bucket.part
            known = p in self._pending and bool(self.flat.kernels.finite([self._sent_from[0][part]]))
            values[part] = self._sent_from[0][part] if known else self.x[part]
        self.optimizer.state.clear()

    def synchronize(self) -> None:
        """End the round now, between two steps, for example before the model is evaluated or exported. Collective.

        Does nothing when the parameters are the same on all ranks. The steps that follow are not those without it.
        """
        if self.synchronized:
            return
        self._aside.refuse("synchronize()")
        self._writes.adopt()
        self._arrive(sorted(self._pending))
        moved = self._moved()
        answers = np.empty((self.comm.Get_size(), moved.size), bool)
        self.comm.Allgather(moved, answers)
        while not self._exchange(range(self.fragments), np.flatnonzero(~answers.any(axis=0)).tolist()):
            pass  # those with a NaN have gone back to x
        self.local_steps = 0
        self.flat.write_back()
        self._writes.settle()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let the model's parameters be those that all ranks share meanwhile, without ending the round. Local.

        For evaluating and saving. What is written to parameters meanwhile is forgotten; steps, :meth:`synchronize` and
        loading raise `OptionError`. Memory: a vector, from the first time on.
        """
        if not self._aside.active:
            self._writes.adopt()
        with self._aside.instead(None if self.synchronized else self.x):
            yield

    def check_replicas(self) -> None:
        """Raise as :meth:`FlatOptimizer.check_replicas`, of what all ranks share. Collective."""
        with self.shared():
            super().check_replicas()

    @contextmanager
    def join(self, *, weigh: bool = False) -> Iterator[None]:
        """Return a context in which ranks may take different numbers of steps, see :meth:`FlatOptimizer.join`.

        A rank that has come to its end takes part in the exchanges of the others with what it has not exchanged yet.
        """
        if weigh and self.every > 1:
            raise OptionError(f"{type(self).__name__}.join: weigh=True with every={self.every}: in a round a rank may have "
                              "data for some steps only; pass weigh=False, or every=1")
        with super().join(weigh=weigh):
            yield

    def take_part(self) -> bool:
        """Take part in the next exchange of the others; tell whether there was one. Collective."""
        before = self.local_steps
        while not self._due():
            self.local_steps, self.steps = self.local_steps + 1, self.steps + 1
        if super().take_part():
            return True
        most = max(self.comm.allgather(before))  # of the rank that was the last
        self.steps, self.local_steps = self.steps + most - self.local_steps, most
        return False
