"""Training without a server and without equal replicas: each rank goes on from the mean of its nearest neighbours."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from mpi_ef.collectives import Peers, RobustMean
from mpi_ef.collectives.exchange import Timer
from mpi_ef.collectives.frames import OK
from mpi_ef.collectives.peers import usable
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import MpiEfError, OptionError, briefly
from mpi_ef.feedback.mixing import MIXING, MixingState
from mpi_ef.ranges import whole, within
from mpi_ef.robust import Median, aggregate, nearest_mean
from mpi_ef.statetree import LOCAL, PER_RANK, Leaf, Reshard, StateTree, attribute
from mpi_ef.vectors import Mask

from .aside import Aside
from .groups import parameters_of
from .wrapper import DistributedOptimizer

__all__ = ["MoNNA", "PeerMixing"]


class PeerMixing(DistributedOptimizer):
    """Any torch optimizer on each rank, which goes on from the mean of the nearest parameters. Construction is collective.

    MoNNA's (Farhadkhani et al. 2023, arXiv 2209.10931) mixing: no server, no equal replicas, up to f of n ranks send
    anything. A step of rank i, of which the torch optimizer makes t_i with this rank's gradient::

        send t_i to all;  x_i = the mean of the n - f vectors that are nearest to t_i, itself first

    Work is O(n d). With `wait_for` ranks send their vectors to each other, and go on with the first `wait_for` of them, of
    which the nearest ``wait_for - f`` are taken: ranks that are silent, stopped or late are not waited for, see
    :class:`mpi_ef.collectives.Peers`. A rank that has missed a round goes on from the median of the others, without moments.
    Where more vectors than that have come, all are used, but for the f farthest.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        As :class:`DistributedOptimizer`'s, with any placement of its own: each rank has its own moments.
    comm : MPI.Comm
    f : int
        How many ranks may be wrong. There is no default.
    compressor : Compressor, optional
        Of what t_i differs by from what all know of it; none by default. Not together with `wait_for`.
    rate : float, optional
        With a compressor: how far a rank goes to the mean of its neighbours, in (0, 1]; twice its contraction constant by
        default, at most 1. Far above that parameters of ranks drift apart.
    wait_for : int, optional
        From 2 f + 1 to n, usually n - f: go on with so many vectors, point to point. By default all ranks meet in one
        allgather. Then a rank that has missed rounds leaves them out, and makes fewer steps than others: train ``while
        optimizer.peers.round < rounds``, and do not count steps.
    patience_seconds : float
        With `wait_for`: so long a step waits for as many ranks, then `SilenceError` names those that are silent. The next
        step waits on with what was sent, and makes no move of its own.
    model : torch.nn.Module, optional
        As :class:`DistributedOptimizer`'s.

    Attributes
    ----------
    x : (d,) array
        The coordinate-wise median of the t_i of the last step, the same on all ranks; what is evaluated and exported, see
        :meth:`shared`. Not with `wait_for`.
    suspicion : (n,) float64
        How much this rank has left out each of them, the share of its steps beyond what is usual, from 0 to 1.
    jumps : int
        How often this rank went on from the median of others: it has missed a round, or its parameters were not finite.
    skipped_local_steps : int
        In how many steps this rank's gradient had a NaN or Inf, and it did not move by itself.
    peers : Peers or None
        What vectors travel by with `wait_for`.

    Notes
    -----
    Checkpoints hold x as the model, and the parameters and moments of every rank; on another number of ranks all go on from
    x, without moments, as an old rank may have been wrong. With `wait_for` no rank knows x, and nothing is collective: save
    ``state_dict()`` of model and optimizer on each rank.
    """

    def __init__(self, optimizer: Optimizer, comm: Comm, *, f: int, compressor: Compressor | None = None,
                 rate: float | None = None, wait_for: int | None = None, patience_seconds: float = 300.0,
                 model: object = None) -> None:
        self.f, self.wait_for, self.patience_seconds = f, wait_for, patience_seconds
        self.jumps = self.skipped_local_steps = 0
        self.peers: Peers | None = None
        self._lost, options = False, dict[str, Any]({} if rate is None else {"rate": rate})
        self._rate = rate
        super().__init__(optimizer, comm, Identity() if compressor is None else compressor, rule=MIXING, model=model,
                         plan=partial(RobustMean, aggregator=Median(), f=f), **options)
        self._lends, self._state = False, cast("MixingState", self.feedback.state)
        rows = self._state.rows.reshape(-1, self.flat.d)[: 0 if wait_for is not None else None]
        for known in (*rows, self._state.x, self._state.mixed):  # all ranks begin as rank 0
            known[:] = self.flat.values
        if wait_for is not None:
            self.peers = Peers(comm, self.flat.d, self.flat.dtype, wait_for=wait_for, patience_seconds=patience_seconds)

    def _check_arguments(self) -> None:
        name, n = type(self).__name__, int(self.comm.Get_size())
        Median().check(n, self.f, name)
        if self.wait_for is not None:
            whole(name, 1, f"{n} ranks less f={self.f} are usual", wait_for=self.wait_for, most=n)
            if self.wait_for <= 2 * self.f:
                raise OptionError(f"{name}: wait_for={self.wait_for} with f={self.f}, which may be most of them; take "
                                  f"{2 * self.f + 1} or more")
            device = next(p for group in self.param_groups for p in group["params"]).device.type
            if not self._exact or device != "cpu":
                raise OptionError(f"{name}: wait_for={self.wait_for} takes whole vectors of the host; leave out compressor, "
                                  "or wait_for")
        within(name, "(0, inf)", "300 is usual", patience_seconds=self.patience_seconds)
        if self._rate is not None and self._exact:
            within(name, "(0, 1]", "it goes with a compressor", rate=self._rate)
            raise OptionError(f"{name}: rate={briefly(self._rate)} without compressor, where ranks go all the way to the "
                              "mean; leave it out, or pass a compressor")
        super()._check_arguments()

    def _facts(self) -> dict[str, object]:
        return {"f": self.f, "wait_for": self.wait_for}

    def _allocate(self) -> None:
        self._after, self._aside = None, Aside(self.flat, type(self).__name__)  # torch steps where the parameters are

    @property
    def synchronized(self) -> bool:
        """False: parameters are each rank's own."""
        return False

    @property
    def x(self) -> Vector:
        """The median of all ranks' vectors of the last step, (d,). Local; the same bits on all ranks; read only."""
        if self.peers is not None:
            raise OptionError(f"{type(self).__name__}: with wait_for={self.wait_for} no rank has the vectors of all; "
                              "evaluate the parameters of a rank, and save state_dict() of model and optimizer on each")
        self._state.settle()
        median: Vector = self._state.x.view()
        median.flags.writeable = False
        return median

    @property
    def shared_values(self) -> Vector:
        """The same as `x`."""
        return self.x

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank so far, those from rank to rank included."""
        return super().sent_nbytes + (0 if self.peers is None else self.peers.sent_nbytes)

    def _account(self) -> list[tuple[int, dict[str, float]]]:
        return super()._account() if self.peers is None else [(self.sent_nbytes, self.seconds)]

    @property
    def suspicion(self) -> NDArray[np.floating]:
        """How much this rank has left out each of them, (n,), from 0 to 1. Local."""
        left_out = np.asarray(self._state.left_out, np.float64)
        n, steps = left_out.size - 1, max(float(left_out[-1]), 1.0)
        usual = self.f / (n - 1) if n > 1 else 0.0
        result: NDArray[np.floating] = np.clip((left_out[:-1] / steps - usual) / (1.0 - usual), 0.0, 1.0)
        return result

    def state_tree(self) -> StateTree:
        """Describe the state: of the torch optimizer, what all know, and where this rank is. Local."""
        tree = super().state_tree()
        state = tree.leaves["state"]  # another number of ranks begins without moments: those of a wrong one may be anything
        own = self._aside.values if self._aside.values is not None else self.flat.current()
        tree.leaves.update({
            "state": Leaf(LOCAL, read=state.read, write=state.write, default={}),
            "own": Leaf(PER_RANK, own, reshard=Reshard("copy", of="x")),
            "jumps": attribute(self, "jumps", LOCAL, default=0),
            "skipped_local_steps": attribute(self, "skipped_local_steps", LOCAL, default=0),
        })
        return tree

    def _masters(self) -> dict[int, Tensor]:
        return super()._masters() if self._aside.values is None else {}

    def before_load(self) -> None:
        """Raise while parameters are others. Local."""
        super().before_load()
        self._aside.refuse("a state is loaded")
        self._writes.adopt()

    def loaded(self) -> None:
        """Derive again what follows from what was written, see :meth:`FlatOptimizer.loaded`. Local."""
        super().loaded()
        self.flat.write_back()
        self._state.mixed[:] = self.flat.values

    def _ready(self, prepare: Callable[[], None]) -> tuple[int, ...]:
        if self.peers is None:
            return super()._ready(prepare)
        prepare()  # with nobody: what is wrong here is raised here
        self.moving = self.flat.present
        return ()

    def _collect(self) -> None:
        self._aside.refuse("a step")
        super()._collect()
        self._own: Mask = self.flat.present.copy()

    def _looked(self) -> dict[str, float]:
        return super()._looked() | {"status": OK}  # a rank with a NaN does not move by itself

    def _stepping(self) -> Mask:
        return self._own

    def _resting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _step_inside(self) -> None:
        overflow = getattr(self, "found_inf", None)  # of GradScaler
        if not overflow and self.flat.kernels.finite(self.flat.collected()):
            super()._step_inside()
            return
        self.skipped_local_steps += 1
        if not overflow:
            warnings.warn(f"step {self.steps}: rank {self.comm.Get_rank()} does not move by itself: NaN or Inf in its "
                          "gradient", RuntimeWarning, stacklevel=3)

    def update(self) -> None:
        """Step, exchange and mix, see :meth:`FlatOptimizer.update`. Collective, but with `wait_for`."""
        values, before = self.flat.values, self._state.mixed
        if self.peers is None or usable(values):
            before[:] = values
        try:
            if self.peers is None:
                self._mix_with_all(values)
            else:
                self._mix_with_some(self.peers, values, before)
        except BaseException:
            values[:] = before
            raise

    def _restart(self) -> None:
        """Go on without moments. Local."""
        self.jumps += 1
        self.optimizer.state.clear()

    def _mix_with_all(self, values: Vector) -> None:
        problem = self._try_inside()

        def take(part: slice, mixed: Vector) -> None:
            values[part] = mixed

        try:
            self.buckets.step(values, take)
        except MpiEfError:
            if problem is not None:
                raise problem from problem.__cause__
            raise
        if self._state.astray:
            self._restart()

    def _mix_with_some(self, peers: Peers, values: Vector, before: Vector) -> None:
        state = self._state
        if not peers.waits:  # else the others have the vector of this round, and wait for no other one
            self._step_inside()
            self._lost = not usable(values)
            if self._lost:
                values[:] = before
        with Timer(self._retired_seconds, "communicate"):
            heard = peers.exchange(values)
        if heard.jumped or self._lost:
            values[:] = aggregate(heard.rows, Median(), f=0)
            self._restart()
            return
        chosen = nearest_mean(heard.rows, heard.own, len(heard.rows) - self.f, state.mixed)
        values[:] = state.mixed
        left = {heard.ranks[row] for row in range(len(heard.rows)) if row not in set(chosen.tolist())}
        state.left_out[sorted(left)] += 1
        state.left_out[-1] += 1

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let the model's parameters be x meanwhile. Local; for evaluating and exporting.

        What is written to parameters meanwhile is forgotten; steps and loading raise `OptionError`. Memory: a vector.
        """
        if not self._aside.active:
            self._writes.adopt()
        with self._aside.instead(self.x):
            yield

    def check_replicas(self) -> None:
        """Raise as :meth:`FlatOptimizer.check_replicas`, of x. Collective."""
        with self.shared():
            super().check_replicas()

    @contextmanager
    def join(self, *, weigh: bool = False) -> Iterator[None]:
        """Refuse: each rank trains its own parameters, which do not stand still without data."""
        raise OptionError(f"{type(self).__name__}.join: weigh={briefly(weigh)}: ranks have parameters of their own, and a "
                          "rank without data would hold the others back; give all ranks as many batches")
        yield

    def close(self) -> Sequence[int]:
        """Tell the others that this rank has ended, and answer those that are behind; return the ranks that have not.

        At the end of a training with `wait_for`, see :meth:`mpi_ef.collectives.Peers.close`; without it does nothing.
        """
        return () if self.peers is None else self.peers.close()


class _Polyak(Optimizer):
    """``m = beta m + (1 - beta) (grad + weight_decay x)``, ``x = x - lr m``, from m = 0."""

    def __init__(self, params: Iterable[Any], *, lr: float, beta: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take the step. Local."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                m = self.state[p].setdefault("momentum", torch.zeros_like(p, dtype=grad.dtype))
                m.mul_(group["beta"]).add_(grad, alpha=1.0 - group["beta"])
                p.sub_(m, alpha=group["lr"])


class MoNNA(PeerMixing):
    """MoNNA (Farhadkhani et al. 2023, arXiv 2209.10931): momentum on each rank, then the mean of the nearest neighbours.

    ::

        m_i = beta m_i + (1 - beta) (grad_i + weight_decay x_i)
        t_i = x_i - lr m_i
        x_i = the mean of the n - f of the t_j nearest to t_i, itself first

    Momentum is what makes it robust where gradients are noisy: honest ranks differ by less, and a wrong one has less room to
    hide in. With large batches it costs accuracy in short runs and brings nothing, see docs/robust.md. The theory wants
    ``n >= 11 f``; below it rank 0 warns once.

    Parameters
    ----------
    params : iterable of parameters or of groups, as for torch optimizers
    comm, f, compressor, rate, wait_for, patience_seconds
        See :class:`PeerMixing`.
    lr : float
    beta : float
        In [0, 1); 0.99 in the paper.
    weight_decay : float
    """

    def __init__(self, params: Iterable[Any], comm: Comm, *, lr: float, f: int, beta: float = 0.99,
                 weight_decay: float = 0.0, compressor: Compressor | None = None, rate: float | None = None,
                 wait_for: int | None = None, patience_seconds: float = 300.0) -> None:
        within(type(self).__name__, "[0, 1)", "0.99 is usual", beta=beta)
        within(type(self).__name__, "[0, inf)", "0 does nothing", lr=lr)
        polyak = _Polyak(parameters_of(params), lr=lr, beta=beta, weight_decay=weight_decay)
        super().__init__(polyak, comm, f=f, compressor=compressor, rate=rate, wait_for=wait_for,
                         patience_seconds=patience_seconds, model=params)
        if comm.Get_size() < 11 * f and comm.Get_rank() == 0:
            warnings.warn(f"MoNNA: n={comm.Get_size()} ranks with f={f}; its theory wants n >= 11 f = {11 * f}. It goes on",
                          RuntimeWarning, stacklevel=3)
