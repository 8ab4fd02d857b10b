"""Many trainings at once that do not wait for the slowest ranks: sequential gradient coding over MPI.

Job t is step t // J of model t mod J. In round r job r begins, and each worker computes what the scheme says of the jobs
that are open; job t is decoded at the end of round t + T at the latest, before the next one of its model begins.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.collectives.ends import host_of
from mpi_ef.collectives.late import LONGEST_NBYTES, Frame, next_number
from mpi_ef.collectives.lateness import Lateness
from mpi_ef.collectives.misfit import masked
from mpi_ef.collectives.worker import Worker
from mpi_ef.comm.consensus import OnAllRanks, SharedErrors, agree
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DtypeError, OptionError, briefly, counted, nearest
from mpi_ef.ranges import whole, within

from .gradients import LARGEST_AMPLIFICATION
from .returned import check_called, check_comm, step_to
from .rounds import Finished, Rounds
from .schemes import Scheme, scheme_of
from .sequential import RULES
from .tasks import TaskLayout, Tasks

__all__ = ["ManyTrainings", "ServedMany", "serve_many"]

Vector = NDArray[Any]
Gradient = Callable[[Vector, int, range, int], Any]


class ManyTrainings(OnAllRanks, metaclass=SharedErrors):
    """J trainings that do not depend on one another, on one communicator. Construction is collective.

    Rank 0 decides, and has the models; :meth:`run` and :meth:`close` are its calls, :meth:`work` that of workers. By
    default rank 0 is worker 0 as well, and worker i is rank i. A worker that is stopped, sleeps or is dead has one order,
    and gets no more until it answers; its answer counts, whenever it comes, for jobs that are not finished.

    A round ends when the rule allows and ``1 + grace`` times as much time has passed as its first answer took, or when all
    have answered, or when no job is open. Results of a job are added in one order, so that with a code of repetition
    (s + 1 divides n: `SRSGC(1, 2, 2)` on 4 ranks) a model is the same bits whoever is late; with others up to rounding.

    Whole vectors are sent: differences, as `CodedGradients` sends, would want a row for each model and worker. Answers of
    twins are not compared. A model whose gradient is not finite stays as it is from there on, with a line on stderr.

    Cost of a round: of each worker an order of d values, and an answer of ``scheme.vectors`` times d. Memory of rank 0:
    about (T + 1) n vectors of d for SR-SGC, (B + 1) times that for M-SGC, and orders; of a worker J models and an answer.

    Parameters
    ----------
    comm : MPI.Comm
        Any intracommunicator of MPI, or of virtual ranks.
    gradient : callable
        ``gradient(x, model, samples, t)`` returns the sum of the gradients over some samples of step t, a ``range`` of
        numbers from 0 to below `samples`, (d,), or that and the extras. It is a function of its arguments alone: random
        numbers are drawn from (seed, model, t). x is read only. With samples=n and the like, these are parts of the data.
    models, d, dtype : int, int, float32 or float64
        J > T, and the length of each model.
    scheme : Scheme or str
        Of `GC(s)`, `SRSGC(B, W, lam)`, `MSGC(B, W, lam)`.
    samples : int or sequence of int
        How many samples a step has, of each model.
    extras : int
        Numbers that are added up as gradients are, for example losses.
    rule : {"lazy", "paper"}
        See :func:`scheduled`.
    grace : float
    dedicated : bool
        Rank 0 computes nothing, and there is a worker less.
    patience_seconds : float
        So long the server waits in a round, and in :meth:`close`.

    Raises
    ------
    DisagreementError, OptionError, DtypeError, PeerError
        On all ranks, where arguments are wrong or differ.
    """

    saved_by = "the models"

    def __init__(self, comm: Comm, gradient: Gradient, models: int, d: int, dtype: DTypeLike, scheme: Scheme | str, *,
                 samples: int | Sequence[int], extras: int = 0, rule: str = "lazy", grace: float = 0.25,
                 dedicated: bool = False, patience_seconds: float = 300.0) -> None:
        name = self._name = type(self).__name__
        check_comm(name, comm)
        self.comm, self.rank, size = comm, int(comm.Get_rank()), int(comm.Get_size())
        self.dedicated, self.n = bool(dedicated), size - bool(dedicated)

        def facts() -> dict[str, object]:
            check_called(name, "(x, model, samples, t)", gradient=gradient)
            within(name, "(0, inf)", "300 is usual", patience_seconds=patience_seconds)
            within(name, "[0, inf)", "0.25 is usual", grace=grace)
            if rule not in RULES:
                hint = nearest(str(rule), RULES, "take lazy or paper")
                raise OptionError(f"{name}: there is no rule {briefly(rule)}; {hint}")
            self.scheme = scheme_of(scheme)
            self._check_scheme(whole(name, 1, "how many trainings there are", models=models), np.dtype(dtype))
            self.samples = self._checked_samples(samples, models)
            self._layout = self._laid_out(d, np.dtype(dtype), extras)
            return {"layout": self._layout, "scheme": self.scheme, "models": models, "samples": self.samples, "rule": rule,
                    "grace": grace, "dedicated": self.dedicated, "patience_seconds": patience_seconds}

        said = agree(comm, name, facts, "build them from the same arguments everywhere",
                     value=(next_number(), host_of(comm)))
        layout, number = self._layout, said[0][0]
        self.models, self.d, self.dtype = models, layout.d, layout.dtype
        self.is_server, self.closed, self._running = self.rank == 0, False, False
        self._round = -1
        worker = self.rank - self.dedicated
        self._tasks = Tasks(name, gradient, self.scheme, self.n, worker, self.samples, layout) if worker >= 0 else None
        if self.is_server:
            ranks = tuple(range(self.dedicated, size))
            self.rounds = Rounds(name, comm, ranks, {rank: host for rank, (_, host) in enumerate(said)}, number,
                                 self.scheme, layout, self._tasks, self.samples, rule=rule, grace=float(grace),
                                 patience_seconds=float(patience_seconds))
        else:
            self._link = Worker(comm, 0, layout.order_nbytes, layout.answer_nbytes(layout.most), number,
                                float(patience_seconds))

    def _check_scheme(self, models: int, dtype: "np.dtype[Any]") -> None:
        name, scheme = self._name, self.scheme
        if not self.n:
            raise OptionError(f"{name}: dedicated=True on one rank, which leaves no worker; start more ranks")
        scheme.check(self.n)
        if models <= scheme.delay:
            raise OptionError(f"{name}: {scheme} is for {scheme.delay + 1} models or more, and here "
                              f"{'is' if models == 1 else 'are'} {counted(models, 'model')}: gradients would be of models "
                              "from before; take GC(1), or train more of them")
        code = scheme.code(self.n)
        if dtype == np.float32 and code is not None and (grown := code.amplification(self.n)) > LARGEST_AMPLIFICATION:
            raise OptionError(f"{name}: {code} lets rounding grow {grown:.0f} times with n={self.n} workers, too much for "
                              "float32; take float64, or another scheme")

    def _checked_samples(self, samples: int | Sequence[int], models: int) -> tuple[int, ...]:
        each = (samples,) * models if np.ndim(samples) == 0 else tuple(samples)  # type: ignore[arg-type]
        if len(each) != models:
            raise OptionError(f"{self._name}: samples={briefly(samples)} are of {len(each)} models; there are {models}")
        return tuple(whole(self._name, 1, "how many samples a step has", samples=count) for count in each)

    def _laid_out(self, d: int, dtype: "np.dtype[Any]", extras: int) -> TaskLayout:
        name = self._name
        if dtype not in (np.float32, np.float64):
            raise DtypeError(f"{name}: dtype={dtype} is neither float32 nor float64; convert the models")
        layout = TaskLayout(whole(name, 1, "take the length of the models", d=d), dtype, self.scheme.vectors,
                            whole(name, 0, "0 is usual", extras=extras))
        if max(layout.order_nbytes, layout.answer_nbytes(layout.most)) > LONGEST_NBYTES:
            raise OptionError(f"{name}: {counted(layout.most, 'vector')} of d={d} are longer than a message of MPI may be; "
                              "take SRSGC, or smaller models")
        return layout

    @property
    def round(self) -> int:
        """The round that goes on, over all runs; of a worker, that of the tasks that it computes. Local."""
        return self.rounds.round if self.is_server else self._round

    @property
    def lateness(self) -> Lateness:
        """Who is slow: a row for each round. Local, of the server."""
        return self._deciding("lateness").lateness

    @property
    def metrics(self) -> dict[str, float]:
        """Rounds so far, in how many one had to wait beyond the grace, and late answers. Local, of the server."""
        rounds = self._deciding("metrics")
        return {"rounds": rounds.round + 1, "waits": rounds.waits, "late": rounds.late}

    @property
    def ended(self) -> dict[int, int]:
        """Models whose gradient was not finite, and in which step: they stay as they were. Local, of the server."""
        return dict(self._deciding("ended").ended)

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank so far."""
        return self.rounds.server.sent_nbytes if self.is_server else self._link.sent_nbytes

    def run(self, xs: Vector, steps: int, first: int = 0) -> Iterator[Finished]:
        """Make so many steps of each model, from step `first` on; afterwards no job is open. Local, of the server.

        ::

            for model, step, g, _ in many.run(xs, 100):
                xs[model] -= lr * g

        Parameters
        ----------
        xs : (J, d)
            A model is changed when its step has been yielded, before going on.
        steps, first : int

        Raises
        ------
        SilenceError
            Too few have answered; it cannot go on.
        NonFiniteError
            All models have ended.
        """
        rounds = self._deciding("run")
        if self._running:
            raise OptionError(f"{self._name}: another run() has not come to its end; go through all of it")
        whole(self._name, 0, "how many steps are to be made", steps=steps, first=first)
        self._check_models(xs)
        self._running = True
        yield from rounds.run(xs, steps, first) if steps else ()
        self._running = False

    def work(self) -> Vector:
        """Compute what the server asks for, until it has closed; return the last models, (J, d). Local, of workers."""
        if self.is_server or self._tasks is None:
            raise OptionError(f"{self._name}: work() is the workers'; the server, rank 0, calls run()")
        layout, held = self._layout, dict[int, Frame]()
        while (frame := self._link.next()).step >= 0:
            if (model := layout.model_of(frame)) >= 0:
                if model in held:
                    self._link.drop(held[model])
                held[model] = frame
            if given := layout.given_of(frame):
                answer, self._round = self._link.frame(), frame.step
                nbytes = self._tasks.compute(given, lambda model: _read_only(layout.x_of(held[model])), answer,
                                             self._link.now)
                answer.step = frame.step
                self._link.answer(answer, nbytes)
                self._link.drop(answer)
            if model < 0:
                self._link.drop(frame)
        last: Vector = np.array([layout.x_of(held[model]) for model in range(self.models)])
        self._link.drop(frame)
        self.closed = True
        self._link.close()
        return last

    def close(self, xs: Vector) -> tuple[int, ...]:
        """Let workers end; they get these models last. Local, of the server; workers end with :meth:`work`.

        Returns
        -------
        tuple of int
            Ranks that have not come to the end: at the end of Python all processes are ended with status 1, or by
            :meth:`leave`.
        """
        rounds = self._deciding("close")
        self._check_models(xs)
        self.closed = True
        return rounds.close(xs)

    def leave(self, status: int = 1) -> None:
        """End all processes where some have not ended, see :meth:`close`; else return. Local, of the server."""
        if self.is_server:
            self.rounds.server.leave(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error, or without :meth:`close`, wait for nobody."""
        if self.is_server and not self.closed:
            self.closed = True
            self.rounds.server.abandon()

    def _deciding(self, call: str) -> Rounds:
        if not self.is_server:
            raise OptionError(f"{self._name}: {call} is the server's, rank 0; workers call work()")
        if self.closed and call in {"run", "close"}:
            raise OptionError(f"{self._name}: it is closed; build another one on all ranks")
        return self.rounds

    def _check_models(self, xs: Vector) -> None:
        if not isinstance(xs, np.ndarray) or xs.shape != (self.models, self.d) or xs.dtype != self.dtype:
            raise OptionError(f"{self._name}: xs={briefly(xs)} is no NumPy array of shape ({self.models}, {self.d}) and "
                              f"dtype {self.dtype}")


def _read_only(x: Vector) -> Vector:
    x.flags.writeable = False
    return x


@dataclass(frozen=True)
class ServedMany:
    """What :func:`serve_many` returns.

    Attributes
    ----------
    xs : (J, d)
        The last models, the same bits on all ranks.
    missing : tuple of int
        Ranks that did not come to the end; on workers empty.
    ended : dict of int to int
        Models whose gradient was not finite, and in which step; on workers empty.
    metrics : dict of str to float
        Of the server.
    many : ManyTrainings
    """

    xs: Vector
    missing: tuple[int, ...]
    ended: dict[int, int]
    metrics: dict[str, float]
    many: ManyTrainings

    def leave(self, status: int = 0) -> None:
        """End all processes with this status, where some ranks are missing, for whom MPI would wait; else return. Local."""
        self.many.leave(status)


def serve_many(comm: Comm, gradient: Gradient, xs: Vector, scheme: Scheme | str, *, samples: int | Sequence[int],
               step: Callable[[Vector, Vector, int, int], Vector | None], steps: int, **options: Any) -> ServedMany:
    """Make steps of J trainings at once whose gradients do not wait for the slowest workers. Collective.

    Parameters
    ----------
    comm : MPI.Comm
        Its n ranks are workers; rank 0 decides as well.
    gradient : callable
        See :class:`ManyTrainings`: ``gradient(x, model, samples, t)`` returns a sum over samples.
    xs : (J, d) float32 or float64
        The first models, J > T of them: those of rank 0 count. They are updated in place, on workers at the end.
    scheme : Scheme or str
        `SRSGC(B, B + 1, 2)` with B = J - 1 was the fastest in simulations.
    samples : int or sequence of int
        How many samples a step has, of each model.
    step : callable
        ``step(x, g, model, t)`` on rank 0 returns a model's new parameters, or changes x in place and returns None. g is the
        mean over samples.
    steps : int
        Of each model.
    **options
        Of :class:`ManyTrainings`: rule, grace, dedicated, patience_seconds.

    Returns
    -------
    ServedMany

    Raises
    ------
    SilenceError, NonFiniteError
        On rank 0; the other ranks end when it does.
    """
    check_comm("serve_many", comm)

    def facts() -> dict[str, object]:
        whole("serve_many", 0, "how many steps are to be made", steps=steps)
        check_called("serve_many", "(x, g, model, t)", step=step)
        if not isinstance(xs, np.ndarray) or xs.ndim != 2 or not xs.flags.writeable or not xs.flags.c_contiguous:
            raise OptionError(f"serve_many: xs={briefly(xs)} is no contiguous array that can be written to; pass a NumPy "
                              "array (models, d)")
        if isinstance(xs, np.ma.MaskedArray):
            raise masked("serve_many", "xs")
        return {}

    agree(comm, "serve_many", facts, "call it with the same arguments everywhere")
    many = ManyTrainings(comm, gradient, len(xs), xs.shape[1], xs.dtype, scheme, samples=samples, **options)
    missing: tuple[int, ...] = ()
    with many:
        if many.is_server:
            for model, t, g, _ in many.run(xs, steps):
                step_to("serve_many", xs[model], step(xs[model], g, model, t))
            missing = many.close(xs)
        else:
            xs[:] = many.work()
    return ServedMany(xs, missing, many.ended if many.is_server else {}, many.metrics if many.is_server else {}, many)
