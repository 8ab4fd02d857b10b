"""0/1 Adam: variance from fewer and fewer steps, then steps that need no communication at all."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import sqrt
from typing import Any, ClassVar, NamedTuple

from mpi_ef.collectives import Plan
from mpi_ef.compress import lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError
from mpi_ef.feedback.state import form
from mpi_ef.ranges import option, with_options
from mpi_ef.statetree import PER_RANK, Leaf, Reshard, StateTree

from .variance import VarianceOptimizer, inverse_roots

__all__ = ["ZeroOneAdam"]


class Run(NamedTuple):
    """Parameters one after the other, of one group, with one S, D and number of steps; see :class:`ZeroOneAdam`."""

    numbers: range
    part: slice
    group: dict[str, Any]
    covered: float  # S
    left: float  # D
    moves: bool  # have a gradient in this step
    moved: bool  # had one since the last synchronisation
    steps: int
    weight: float = 0.0  # of the newest momentum in u


@with_options
class ZeroOneAdam(VarianceOptimizer):
    """0/1 Adam (Lu et al. 2022, arXiv 2202.06009): seldom a new variance, signs in between; later steps without exchange.

    *Before the freeze* the exact mean gradient travels only in the steps that update the variance, in which it also goes
    into the momentum; the k-th of them is followed by another one after ``2^((k - 1) // var_update_scaler)`` steps. In all
    other steps gradients travel compressed, with error feedback (:func:`mpi_ef.feedback.rules.ef14`).

    *After the freeze* every rank steps along its own momentum m_i. At a synchronisation the means of these momenta since the
    last one, weighted by learning rates, travel compressed; all ranks go back to where they were the last time, x, and take
    the way of the mean together. With S the sum of learning rates since then and D what weight decay has left of x::

        m_i = beta1 m_i + (1 - beta1) grad_i
        u_i = mean of the m_i since the last synchronisation
        parameters = D x - S u_i / sqrt(v)
        at a synchronisation: m = u = mean_i C(u_i + e_i), x = D x - S u / sqrt(v) on all ranks

    One comes every step at first; every `local_step_scaler` steps the interval doubles, up to `local_step_clipper`.

    A parameter whose variance was updated less often (`renewed`) than that of the others (`variance_updates`) catches up in
    the steps in which it has a gradient: that travels whole then, also between two synchronisations. Entries without a
    gradient sleep as with :class:`OneBitAdam`, and wake on all ranks at once.

    Parameters
    ----------
    params, comm, lr, betas, eps, weight_decay, compressor, plan : as :class:`OneBitAdam`'s
    var_freeze_step : int, optional
        As its `freeze_step`.
    var_update_scaler : int
        kappa: after so many updates of the variance the interval between them doubles.
    local_step_scaler, local_step_clipper : int
        After so many steps the interval between synchronisations doubles; H, the longest one.
    bias_correction, variance_floor, clip : as OneBitAdam's
        The floor holds as soon as something compressed is in the momentum, also before the freeze.

    Attributes
    ----------
    frozen_step : int or None
        As OneBitAdam's.
    variance_updates : int
    renewed : list of int
        How often the variance of each parameter was updated.

    Notes
    -----
    Between synchronisations the replicas differ on purpose: see :attr:`synchronized`, and call :meth:`synchronize` before
    parameters of one rank are taken for all, or written to: in between the next step or save would raise. Parameters follow
    from the optimizer's arrays x and u then, and :meth:`load_state_dict` restores those of every rank. While replicas are
    the same the parameters are what counts, and x becomes what they are when a step is taken.

    The paper exchanges S u_i; divided by S, errors keep the size of the momentum when learning rates fall, and nothing is
    divided by a learning rate of zero. With constant rates and intervals it is the same. Errors are never thrown away: at
    the freeze they change from gradients to momenta, as which ``1 - beta1`` of them counts.
    """

    counters: ClassVar = (*VarianceOptimizer.counters, "variance_updates", "variance_step", "local_steps", "covered",
                          "left")
    later_counters: ClassVar = VarianceOptimizer.later_counters | {"renewed": [], "moved": []}
    vectors: ClassVar = ("m", "v", "u", "x")
    hushed: ClassVar = ("u",)
    freezes_at: ClassVar = "var_freeze_step"

    var_freeze_step: int | None = option(None, 1, "the variance needs a step")
    var_update_scaler: int = option(16, 1, "16 is usual")
    local_step_scaler: int = option(32678, 1, "16 is usual")
    local_step_clipper: int = option(16, 1, "16 is usual")

    def build(self, plan: Plan) -> None:
        """Make rules and arrays, see :meth:`ReplicatedOptimizer.build`. Local."""
        super().build(plan)
        self.renewed = [0] * len(self.counted)
        self.variance_updates = self.variance_step = 0
        self._start_afresh()

    @property
    def variance_interval(self) -> int:
        """Steps from the last update of the variance to the next one."""
        return 1 << max(0, self.variance_updates - 1) // self.var_update_scaler

    @property
    def local_step_interval(self) -> int:
        """Steps from one synchronisation to the next, for the next step."""
        if self.frozen_step is None:
            return 1
        doublings = (self.steps - self.frozen_step) // self.local_step_scaler
        return min(self.local_step_clipper, 1 << min(doublings, self.local_step_clipper.bit_length()))

    @property
    def synchronized(self) -> bool:
        """Whether the parameters are the same on all ranks now."""
        return self.local_steps == 0

    @property
    def shared_values(self) -> Vector:
        """The parameters, (d,), of now or, where ranks have gone on alone, of the last synchronisation. Not a copy."""
        return self.flat.values if self.synchronized else self.arrays["x"]

    def state_tree(self) -> StateTree:
        """Describe the state: once the variance is frozen m and u differ between ranks. Local.

        Other ranks get their means. Between synchronisations replicas are then the same: where the mean of all ranks' steps
        leads from x.
        """
        tree = super().state_tree()
        if self.frozen_step is not None:
            tree.leaves.update({n: Leaf(PER_RANK, self.arrays[n], reshard=Reshard("mean")) for n in ("m", "u")})
        return tree

    def _collect(self) -> None:
        super()._collect()
        if self.frozen_step is not None:
            if self.synchronized:
                self.arrays["x"][:] = self.flat.values  # where something has been written to them
            elif problem := self._displaced("step", self.flat.values):
                raise problem

    def before_save(self) -> None:
        """Raise where a save would not have the parameters of this moment: it has x and u. Local."""
        if not self.synchronized and (problem := self._displaced("state_dict", self.flat.current())):
            raise problem

    def _is_whole(self) -> bool:
        due = self.steps + 1 >= self.variance_step + self.variance_interval
        return self.frozen_step is None and (self.variance_updates == 0 or due)

    def _updates(self) -> tuple[list[int], int]:
        return self.renewed, self.variance_updates

    @property
    def _compresses(self) -> bool:
        """Whether something compressed is in the momentum after the last update of the variance, or in the next step."""
        return self.variance_updates < self.variance_step or self.variance_interval > 1

    def update(self) -> None:
        """Take the step, see :meth:`FlatOptimizer.update`. Collective."""
        if self.frozen_step is not None:
            self._step_alone()
        elif self._whole:
            self._step_exactly(self.steps + 1)
        else:
            self._step_compressed()

    def _updated(self) -> None:
        super()._updated()
        if self.frozen_step is None and self._whole and self._compresses:
            self._fall_asleep()

    def _step_exactly(self, step: int) -> None:
        """Update both moments with the mean gradient, and step."""
        mean, real, (beta1, beta2) = self.mean(self.flat.gradients), self.flat.dtype.type, self.betas
        self.variance_updates, self.variance_step = self.variance_updates + 1, step
        moves = self.moving.tolist()
        self.renewed = [updates + now for updates, now in zip(self.renewed, moves, strict=True)]
        keys = list(zip(moves, self.counted, self.renewed, strict=True))
        moving = [stretch for stretch in self._stretches(keys) if stretch[3][0]]
        for _, part, *_ in moving:
            self.flat.kernels.update_moments(mean[part], real(beta1), real(beta2), self.m[part], self.arrays["v"][part])
        if self._compresses:
            self._derive()
        for _, part, group, (_, count, updates) in moving:
            self._step_over_variance(part, group, count + 1, updates, self._inverse[part])

    def _step_over_variance(self, part: slice, group: dict[str, Any], step: int, updates: int, inverse: Vector) -> None:
        """Step along the momentum: as in Adam where nothing compressed is in it, else over roots with a floor."""
        m, v, x, real = self.m[part], self.arrays["v"][part], self.flat.values[part], self.flat.dtype.type
        size, decay = self._scalars(group, step)
        if updates < step:
            self.flat.kernels.preconditioned_step(m, inverse, size, decay, x)
        else:
            root_factor = 1.0 / sqrt(self._correction(self.betas[1], updates))
            self.flat.kernels.adam_step(m, v, size, real(root_factor), real(self.eps), decay, x)

    def _step_compressed(self) -> None:
        """Update the momentum with what all have sent of their gradients, and step over the variance of the last update."""
        beta1, mean = self.flat.dtype.type(self.betas[0]), self._exchange(self.flat.gradients)
        for _, part, group, count in self._stretches(self.counted):
            self.flat.kernels.momentum_step(mean[part], self._inverse[part], beta1, *self._scalars(group, count + 1),
                                            self.m[part], self.flat.values[part])

    def _step_late(self, number: int, group: dict[str, Any], mean: Vector) -> None:
        """Do what :meth:`_step_exactly` does, with one parameter."""
        part, real, (beta1, beta2) = self.flat.place(number), self.flat.dtype.type, self.betas
        m, v, updates = self.m[part], self.arrays["v"][part], self.renewed[number] + 1
        self.flat.kernels.update_moments(mean, real(beta1), real(beta2), m, v)
        inverse = inverse_roots(v, self._factor(updates), [0, v.size], self.eps, self.variance_floor)
        self._step_over_variance(part, group, self.counted[number], updates, inverse)
        self.renewed[number] = updates
        self.arrays["x"][part] = self.flat.values[part]
        self.covered[number], self.left[number], self.moved[number] = 0.0, 1.0, False

    def _fall_asleep(self) -> None:
        super()._fall_asleep()
        self.renewed = [updates if count else 0 for updates, count in zip(self.renewed, self.counted, strict=True)]

    def _freeze(self, step: int) -> None:
        """Let the variance of now hold for good; what was not sent of gradients becomes what was not sent of momenta."""
        super()._freeze(step)
        self.arrays["x"][:] = self.flat.values
        unsent = self.rules["momentum"].per_rank()
        for name in unsent.keys() & {"e_i", "plan.residual"}:
            unsent[name] *= self.flat.dtype.type(1.0 - self.betas[0])

    def _step_alone(self) -> None:
        """Step along this rank's momentum; synchronise if it is time."""
        grad, m, u, x = self.flat.gradients, self.m, self.arrays["u"], self.arrays["x"]
        real, beta1, ways = self.flat.dtype.type, self.betas[0], self._ways(self.moving.tolist())
        if self.local_steps + 1 < self.local_step_interval:
            for run in ways:
                part = run.part
                if run.moves:
                    self.flat.kernels.local_step(grad[part], self._inverse[part], x[part], real(beta1), real(run.weight),
                                                 real(run.covered), real(run.left), m[part], u[part],
                                                 self.flat.values[part])
                for number in run.numbers:
                    self.covered[number], self.left[number], self.moved[number] = run.covered, run.left, run.moved
            self.local_steps += 1
            return
        # The new u takes the place of the parameters, which follow from x and the old u.
        for run in ways:
            part, w = run.part, run.weight
            newest = w * beta1 * lazy(m[part]) + w * (1.0 - beta1) * lazy(grad[part])
            sent = (1.0 - w) * lazy(u[part]) + newest if run.moves else lazy(u[part])
            form(sent, into=self.flat.values[part])
        self._meet(ways)

    def _start_afresh(self) -> None:
        """Count from a synchronisation on: steps, and for every parameter S, D, and whether it has had a gradient."""
        self.local_steps, count = 0, len(self.flat.parameters)
        self.covered, self.left, self.moved = [0.0] * count, [1.0] * count, [False] * count

    def _runs(self, moves: Sequence[bool]) -> Iterator[Run]:
        """Yield the parameters in runs as long as they can be. Local."""
        keys = list(zip(self.covered, self.left, moves, self.moved, self.counted, strict=True))
        for numbers, part, group, key in self._stretches(keys):
            yield Run(numbers, part, group, *key)

    def _displaced(self, call: str, values: Vector) -> OptionError | None:
        """Return an error with the first parameter that is in `values`, (d,), not where x and u say. Local."""
        expected = self.flat.kernels.empty(values.size)
        self._place(expected)
        different = self.flat.kernels.difference(expected, values)
        if different is None:
            return None
        wrong = bisect_right(self.flat.starts, different) - 1
        return OptionError(f"{type(self).__name__}.{call}: {self._name(wrong)} was written to between two synchronisations, "
                           "where each rank has its own values; call optimizer.synchronize() on all ranks first")

    def _ways(self, moves: Sequence[bool]) -> list[Run]:
        """Return the runs with what the next step makes of S and D of those that move. Local."""
        ways = list(self._runs(moves))
        for n, run in enumerate(ways):
            if run.moves:
                decay = 1.0 - run.group["lr"] * run.group["weight_decay"]
                size = run.group["lr"] / self._correction(self.betas[0], run.steps + 1)
                total = decay * run.covered + size
                weight = size / total if total > 0.0 else 1.0
                ways[n] = run._replace(weight=weight, covered=total, left=decay * run.left, moved=True)
        return ways

    def _meet(self, ways: list[Run]) -> None:
        """Exchange the u_i that are in the place of the parameters, and take the way of their mean from x. Collective.

        What has not moved since the last time has no part in it.
        """
        still = [number for run in ways if not run.moved for number in run.numbers]
        try:
            with self._silent(still, self.flat.values) if still else nullcontext():
                mean = self._exchange(self.flat.values)
        except BaseException:
            self._place(self.flat.values)
            raise
        for run in ways:
            if run.moved:
                self._go(run, mean, self.arrays["x"])
                self.m[run.part] = mean[run.part]
        self._start_afresh()
        self._place(self.flat.values)

    def _place(self, values: Vector) -> None:
        """Write to `values`, (d,), where this rank's steps since the last synchronisation lead from x. Local."""
        values[:] = self.arrays["x"]
        for run in self._runs(self.moved):
            if run.moved:
                self._go(run, self.arrays["u"], values)

    def _go(self, run: Run, u: Vector, x: Vector) -> None:
        """Let a run's x be D x - S u / sqrt(v). Local."""
        real, part = self.flat.dtype.type, run.part
        self.flat.kernels.preconditioned_step(u[part], self._inverse[part], real(run.covered), real(run.left), x[part])

    def synchronize(self) -> None:
        """Synchronise now, between two steps, for example before the model is evaluated or saved. Collective.

        Does nothing when the replicas are the same. The steps that follow are not those without it.
        """
        if not self.synchronized:
            self.flat.values[:] = self.arrays["u"]
            self._meet(self._ways([False] * len(self.moved)))
            self.flat.write_back()

    def check_replicas(self) -> None:
        """Raise as :meth:`FlatOptimizer.check_replicas`, of the parameters of the last synchronisation. Collective."""
        if self.synchronized:
            super().check_replicas()
            return
        self.flat.values[:] = self.arrays["x"]
        self.flat.write_back()
        try:
            super().check_replicas()
        finally:
            self._place(self.flat.values)
            self.flat.write_back()

    @contextmanager
    def _staying(self) -> Iterator[None]:
        """Leave alone what has no gradient; with a frozen variance the step itself goes around it."""
        with super()._staying() if self.frozen_step is None else nullcontext():
            yield

    def _kept(self) -> list[Vector]:
        return [self.m, self.arrays["v"]]

    def loaded(self) -> None:
        """Derive again what follows from what was written, see :meth:`FlatOptimizer.loaded`. Local."""
        if not self.renewed:
            self.renewed = self._where_known(self.variance_updates)
        if not self.moved:  # earlier versions counted by group
            owners = [id(group) for group in self._groups]
            of_groups = {id(g): values for g, *values in zip(self.param_groups, self.covered, self.left, strict=True)}
            self.covered, self.left = ([of_groups[owner][n] for owner in owners] for n in range(2))
            self.moved = [self.frozen_step is not None] * len(owners)
        super().loaded()
        if not self.synchronized:  # else the parameters are those of the model, which x may not be yet
            self._place(self.flat.values)
            self.flat.write_back()
        elif self.frozen_step is None and self.variance_updates and self._compresses:
            self._derive()
            self._fall_asleep()
