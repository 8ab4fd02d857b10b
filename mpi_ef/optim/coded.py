"""Any torch optimizer on one rank, with gradients of which those of the slowest workers are not waited for."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from mpi_ef.coded import CodedGradients, Decoded, GradientCode, Order
from mpi_ef.collectives import Lateness
from mpi_ef.comm.consensus import OnAllRanks, SharedErrors, agree, check_not_freed
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, for_parameters
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import MpiEfError, NonFiniteError, OptionError, counted
from mpi_ef.ranges import whole, within
from mpi_ef.vectors import FlatParameters
from mpi_ef.vectors.places import host_copy, on_host

from .aside import Aside
from .groups import Listed, described, hyper_parameters, names_of
from .inner import check_inner, check_saved, load_inner
from .parts import Part, Reached, Statistics, alone_at_random, seed_of, take_mean, widen_moments
from .untrained import Untrained
from .writes import Writes

__all__ = ["CodedOptimizer"]

_KIND = "CodedOptimizer"


class CodedOptimizer(OnAllRanks, metaclass=SharedErrors):
    """Any torch optimizer on rank 0, which waits for n - s of n workers. Construction is collective, all else is local.

    ::

        coded = CodedOptimizer(SGD(model.parameters(), lr=0.1), comm, FractionalRepetition(1), TopK(0.05), model=model)
        for step in coded.steps(1000):
            for part in coded.parts():
                x, y = batch(step, part.number)  # a function of these two, and of a seed, alone
                part.backward(loss_fn(model(x), y), samples=len(y))
            coded.step()

    The data of a step are in n parts, see :class:`mpi_ef.coded.CodedGradients`, of which a worker computes s + 1. What the
    torch optimizer sees, on the server, is the gradient of the mean over all samples of all parts, exactly, however many
    these have, and whoever is missing; with a compressor, EF21's estimate of it. With `FractionalRepetition` and none it is
    the same bits whoever is late.

    The loop is the same on all ranks. Parameters and running statistics are sent to workers with each order, so that these
    have steps only whose orders they are given, and what was written to parameters there is overwritten. Learning rates,
    schedulers and moments of the server count. Nothing collective may be called inside of the loop.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        As :class:`DistributedOptimizer`'s: any whose step needs no closure. It updates float32 masters of parameters in 16
        bits.
    comm : MPI.Comm
    code : GradientCode
        ``FractionalRepetition(s)`` or ``Cyclic(s)``: s of the n workers may be missing.
    compressor : Compressor, optional
        Of what a coded gradient differs by from what the server knows of it. By default whole vectors are sent.
    order_compressor : Compressor, optional
        Of what parameters differ by from those that workers have, which follow them (EF21-P), and at which all gradients are
        computed: in loops over parts() parameters of the server are those, and what is written to them there is lost.
    model : torch.nn.Module, optional
        Whose parameters these are; wanted where it has buffers. Those named ``running_*``, and ``num_batches_tracked``, are
        running statistics: each part begins with those of the order, and the server adds the mean of what parts have changed
        them by. A forward pass that changes another buffer is refused.
    seed : int
        Torch's generators are seeded for each part, from this, the step and the part, and are put back after the last one.
    clip : float
        The largest norm of the gradient that the torch optimizer sees; 0 for no limit.
    dedicated, patience_seconds, on_silence, twins
        See :class:`mpi_ef.coded.CodedGradients`. Twins compute the same bits only of the same batches.

    Attributes
    ----------
    done : int
        Steps that are completed; of a worker, that were when it got its last order.
    loss : float
        The mean over all samples of the last step. Of the server.
    missing : tuple of int
        Ranks that have not come to the end; not known after a break. Of the server.
    waited : float
        Seconds that the server has waited for answers.
    skipped_steps : int
        Steps in which no part had any samples. Of the server.
    is_server : bool
        Whether this rank decides.
    coded : CodedGradients

    Raises
    ------
    DisagreementError, OptionError, DtypeError, PeerError
        On all ranks, where arguments are wrong or differ.

    Notes
    -----
    Vectors of a device go to the host and back. Memory: two vectors, with `order_compressor` three, and `CodedGradients`'.
    """

    saved_by = "state_dict() of rank 0, and of the model"
    _step_supports_amp_scaling = True  # GradScaler hands over its scale then, which step() refuses

    def __init__(self, optimizer: Optimizer, comm: Comm, code: GradientCode, compressor: Compressor | None = None, *,
                 order_compressor: Compressor | None = None, model: object = None, seed: int = 0, clip: float = 0.0,
                 dedicated: bool = False, patience_seconds: float = 300.0, on_silence: str = "raise",
                 twins: str = "raise") -> None:
        name = self._name = type(self).__name__
        check_not_freed(comm, name)
        self.optimizer, self.comm, self.seed, self.clip = optimizer, comm, seed, clip
        self.done, self.skipped_steps, self.loss, self.missing, self.waited = 0, 0, float("nan"), tuple[int, ...](), 0.0

        def facts() -> Mapping[str, object]:
            check_inner(name, optimizer)
            whole(name, 0, "0 is usual", seed=seed)
            within(name, "[0, inf)", "0 for no limit", clip=clip)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._listed = Listed(optimizer)
            self.flat, self._statistics = FlatParameters(parameters), Statistics(name, model)
            return {**described(parameters, names_of(optimizer, model)), "the optimizer": type(optimizer).__name__,
                    "seed": seed, "clip": clip, "hyper-parameters": hyper_parameters(optimizer),
                    "statistics": self._statistics.described, "whether a model is given": isinstance(model, nn.Module)}

        agree(comm, name, facts, "build the same model and optimizer on every rank")
        self.flat.broadcast(comm)
        self._untrained = Untrained(name, comm, model, self.flat)
        self._writes, self._reached = Writes(self.flat), Reached(self.flat.parameters)
        shapes = tuple(tuple(p.shape) for p in self.flat.parameters)
        bound, orders = (Identity() if each is None else for_parameters(each, shapes)
                         for each in (compressor, order_compressor))
        self._compresses = bound != Identity()
        self._extras = np.zeros(2 + len(shapes) + self._statistics.count)  # samples, loss, which had a gradient, statistics
        self.coded = CodedGradients(comm, self.flat.d, self.flat.dtype, code, bound, order_compressor=orders,
                                    extras=self._extras.size, order_extras=self._statistics.count, dedicated=dedicated,
                                    on_silence=on_silence, patience_seconds=patience_seconds, twins=twins)
        kernels = self.flat.kernels
        self._host: Vector = kernels.on_host(0 if self.flat.device == "cpu" else self.flat.d, self.flat.dtype)
        self.is_server, self._aside, self._computed = self.coded.is_server, Aside(self.flat, name), -1  # see _take_up
        self._order: Order | None = None
        self._sent: NDArray[np.float64] = np.empty(0)  # the statistics of the order
        self._looping = self._open = self._inside = self._begun = self._failed = self._answered = self._noted = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the torch optimizer; those of the server count."""
        return self.optimizer.param_groups

    @property
    def lateness(self) -> Lateness:
        """Who is slow, and what a code has saved. Local, of the server."""
        return self.coded.lateness

    @property
    def metrics(self) -> dict[str, float]:
        """Late, wrong and non-finite answers so far, see :class:`CodedGradients`. Local, of the server."""
        return self.coded.metrics

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank so far."""
        return self.coded.sent_nbytes

    def steps(self, steps: int) -> Iterator[int]:
        """Yield the numbers of steps, from 0, or what was loaded, up to `steps`; on workers of those that they are given.

        At the end all ranks have the last parameters. When the server leaves the loop before, workers end as well; after an
        error that is not caught all ranks end. A worker that leaves before counts as silent from then on.

        Raises
        ------
        SilenceError, NonFiniteError, DisagreementError
            On the server, from :meth:`step`.
        """
        whole(self._name, 0, "how many steps there are to be in all", steps=steps)
        if self._looping or self.coded.closed:
            state = "at work already" if self._looping else "over, and workers have ended"
            raise OptionError(f"{self._name}: steps() is {state}; let one loop go over all steps, of all epochs")
        return self._decide(steps) if self.is_server else self._work()

    def _decide(self, steps: int) -> Iterator[int]:
        self._looping, ended = True, False
        try:
            while self.done < steps:
                self._begin()
                yield self.done
                self._check_over()
            self._failed, ended = False, True
        finally:
            self._looping = self._open = False
            self._aside.back()
            if self._failed or self._inside:  # by an error, which says why
                self.coded.__exit__(MpiEfError, None, None)
            else:
                self._writes.adopt()
                # After a break, or an error of the program, which are the same here: nothing is waited for.
                self.missing = self.coded.close(self.flat.kernels.fetch(self.flat.values), self._statistics.values(),
                                                at_exit=not ended)

    def _begin(self) -> None:
        """Send the order of the next step. Local."""
        if not self._begun:
            self._statistics.settle(again=True)
        self._failed = True
        self._writes.adopt()
        self._writes.settle()
        self._untrained.check(again=not self._begun)
        self._listed.check(self.optimizer)
        self._sent = self._statistics.values()
        self._take_up(self.coded.begin(self.flat.kernels.fetch(self.flat.values), self._sent))
        self._begun, self._failed = True, False

    def _work(self) -> Iterator[int]:
        self._looping = True
        try:
            for order in self.coded.orders():
                self._load(order.x, order.extras)
                self.done = order.step
                self._take_up(order)
                yield order.step
                self._check_over()
            self._load(*self.coded.last)
        finally:
            self._looping = self._open = False

    def _load(self, x: Vector, statistics: Sequence[float] | NDArray[np.float64]) -> None:
        """Let parameters and statistics be those of the server. Local."""
        self._writes.adopt()
        self.flat.values[:] = self._near(x)
        self.flat.write_back()
        self._writes.settle()
        self._statistics.write(statistics)
        self._sent = np.array(statistics)

    def _near(self, x: Vector) -> Vector:
        """Return a vector of the host where vectors of the parameters' device are copied from."""
        if self._host.size:
            self._host[:] = x
        return self._host if self._host.size else x

    def _take_up(self, order: Order | None) -> None:
        self._order, self._open, self._computed, self._answered = order, True, -1, False

    def _check_over(self) -> None:
        if self._open:
            self._failed = True
            raise OptionError(f"{self._name}: step {self.done} was not ended; call step() to end each turn of the loop")

    def parts(self) -> Iterator[Part]:
        """Yield the parts of the step that this rank computes, s + 1 of them; none on a server that is dedicated. Local.

        Gradients that there are before are taken away. Between parts, torch's generators are seeded, and running statistics
        are those of the order.
        """
        if not self._open or self._computed >= 0 or self._answered:
            again = f"were asked for already in step {self.done}; ask once, and call step() after them" if self._open else \
                "there are inside of a loop over steps() alone"
            raise OptionError(f"{self._name}: parts {again}")
        self._computed = 0
        return iter(()) if self._order is None else self._parts(self._order)

    def _parts(self, order: Order) -> Iterator[Part]:
        self._inside = True
        self.flat.zero_gradients()
        self._statistics.settle()
        self._extras[:] = 0
        self._reached.begin()
        elsewhere = self._near(order.x) if self.is_server and self.coded.w.size else None
        with alone_at_random(self.flat.parameters[0].device), self._aside.instead(elsewhere):
            for number, weight in zip(order.parts, order.weights.tolist(), strict=True):
                part = Part(self._name, number, order.step, seed_of(self.seed, order.step, number), weight, self._reached)
                torch.manual_seed(part.seed)
                yield part
                part.end()
                self._note(part, self._reached.which)
                self._reached.clear()
                self.coded.progress()
        self._inside = False

    def _note(self, part: Part, reached: list[bool]) -> None:
        """Add what goes along with the gradient of a part; let statistics be those of the order again. Local."""
        statistics, extras = self._statistics, self._extras
        if self._noted:
            statistics.check()
        else:
            statistics.check_all()
        self._noted = True
        mine = np.concatenate([[part.samples, part.loss], reached, statistics.values() - self._sent])
        extras += part.weight * mine
        statistics.write(self._sent)
        self._computed += 1

    def step(self, closure: None = None) -> None:
        """End the step: send what was computed; on the server wait for enough answers, and let the torch optimizer step.

        Local. Afterwards the server has new parameters and running statistics, workers get them with their next order.

        Raises
        ------
        SilenceError
            On the server: too few have answered. All is as after the last step; call it again to wait longer.
        NonFiniteError
            On the server: too few answers were finite.
        DisagreementError
            On the server: twins have sent different bits.
        OptionError
            Parts were not computed; a closure, or GradScaler.
        """
        if closure is not None:
            raise OptionError(f"{self._name}.step: takes no closure; compute losses in a loop over parts()")
        if hasattr(self, "grad_scale") or hasattr(self, "found_inf"):
            raise OptionError(f"{self._name}.step: GradScaler, whose scale differs between ranks; take bfloat16, which "
                              "needs none")
        if not self._open:
            raise OptionError(f"{self._name}.step: no step has begun; call it inside of a loop over steps()")
        self._failed = True
        self._answer()
        if self.is_server:
            began = perf_counter()
            decoded = self.coded.end()
            self.waited += perf_counter() - began
            self._update(decoded)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001  # else schedulers of workers warn
        self._failed = self._open = False

    def _answer(self) -> None:
        """Send the coded gradient of what was computed. Local."""
        if self._order is None or self._answered:
            return
        if self._computed < len(self._order.parts):
            raise OptionError(f"{self._name}.step: {max(0, self._computed)} of {counted(len(self._order.parts), 'part')} "
                              f"were computed in step {self.done}; let the loop over parts() come to its end")
        self._reached.check(f"{self._name}.step: step {self.done}")
        self.flat.collect_gradients()
        self.flat.spend_gradients()
        self._answered = True
        self.coded.answer(self.flat.kernels.fetch(self.flat.gradients), self._extras)

    def _update(self, decoded: Decoded) -> None:
        """Step with the mean over all samples. Local."""
        flat, samples, layers = self.flat, round(float(decoded.extras[0])), len(self.flat.parameters)
        if samples:
            self.loss = float(decoded.extras[1]) / samples
            if not take_mean(flat, decoded.vector, samples, self.clip):
                raise NonFiniteError(f"{self._name}: the sum of gradients has overflowed in step {self.done}; take a "
                                     "smaller learning rate", ())
            with flat.lent((decoded.extras[2 : 2 + layers] > 0.5).tolist()):
                if flat.mixed:
                    widen_moments(self.optimizer)
                self.optimizer.step()
            flat.write_back()
        else:
            self.skipped_steps += 1
            warnings.warn(f"step {self.done}: no part had any samples; nothing is changed", RuntimeWarning, stacklevel=3)
        self._writes.settle()
        self._untrained.settle()
        self._statistics.write(self._sent + decoded.extras[2 + layers :] / self.coded.n)
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state of the server: the torch optimizer's, steps, what it knows of workers. Local.

        Parameters and buffers are the model's. Workers need no state of their own: after loading, each is told its part.
        """
        self._refuse_on_workers("state_dict")
        if self._aside.values is not None:
            raise OptionError(f"{self._name}.state_dict: inside of parts() parameters are not the server's; wait for step()")
        state = {"kind": _KIND, "optimizer": host_copy(self.optimizer.state_dict()), "done": self.done,
                 "skipped_steps": self.skipped_steps, "code": repr(self.coded.code), "workers": self.coded.n}
        if self._compresses:
            state["rows"] = torch.from_numpy(self.coded.rows.copy())
        if self.coded.w.size:
            state["w"] = torch.from_numpy(self.coded.w.copy())
        if masters := self.flat.masters():
            state["masters"] = {number: on_host(master) for number, master in masters.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Local, of the server, before the first step.

        With another number of workers, or another code, workers begin with whole answers.

        Raises
        ------
        OptionError
            It is of something else, or steps were made.
        """
        self._refuse_on_workers("load_state_dict")
        if self._begun:
            raise OptionError(f"{self._name}.load_state_dict: steps were made; load before them")
        check_saved(f"{self._name}.load_state_dict", state, _KIND, "skipped_steps", "code", "workers")
        alike = state["code"] == repr(self.coded.code) and state["workers"] == self.coded.n and self._compresses
        rows, w = (None if each is None else on_host(each).numpy().astype(self.flat.dtype, copy=False) for each in
                   (state.get("rows") if alike else None, state.get("w") if self.coded.w.size else None))
        with self.flat.lent():  # torch rounds moments to the precision of their parameter
            load_inner(f"{self._name}.load_state_dict", self.optimizer, state["optimizer"])
        if self.flat.mixed and "masters" in state:
            self.flat.load_masters(state["masters"])
        self.coded.restore(rows, state["done"], w)
        self.done, self.skipped_steps = state["done"], state["skipped_steps"]

    def forget(self) -> None:
        """Let workers begin with whole answers, whatever was loaded. Local, of the server, before the first step."""
        self._refuse_on_workers("forget")
        self.coded.restore(None, self.done)

    def _refuse_on_workers(self, call: str) -> None:
        if not self.is_server:
            raise OptionError(f"{self._name}.{call}: is the server's, rank {self.coded.server}, which has all state; "
                              "workers are told theirs")

    def leave(self, status: int = 0) -> None:
        """End all processes with this status, where ranks are missing, for whom MPI would wait; else return. Local."""
        self.coded.leave(status)
