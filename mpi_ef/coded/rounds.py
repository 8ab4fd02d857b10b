"""The server of many trainings: tasks out round by round, results in, and the gradients of jobs that can be decoded."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.late import Frame
from mpi_ef.collectives.lateness import Lateness
from mpi_ef.collectives.server import Server
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import NonFiniteError, SilenceError, say
from mpi_ef.kernels.backend import backend

from .schemes import MSGC, Scheme, Task
from .sequential import Schedule, scheduled
from .tasks import Given, TaskLayout, Tasks

__all__ = ["Finished", "Rounds"]

Vector = NDArray[Any]
Numbers = NDArray[np.float64]


class Finished(NamedTuple):
    """The gradient of one step of one model.

    Attributes
    ----------
    model, step : int
    vector : (d,)
        The mean of the gradients over the samples of the job. It stays until the next one.
    extras : (e,) float64
        The sums of the extras of all samples.
    """

    model: int
    step: int
    vector: Vector
    extras: Numbers


class Rounds:
    """What the server does, see :class:`ManyTrainings`. All is local.

    Parameters
    ----------
    ranks : tuple of int
        Of the workers; the server's own may be one of them.
    tasks : Tasks or None
        What the server computes itself.
    """

    def __init__(self, subject: str, comm: Comm, ranks: tuple[int, ...], hosts: Mapping[int, str], number: int,
                 scheme: Scheme, layout: TaskLayout, tasks: Tasks | None, samples: tuple[int, ...], *, rule: str,
                 grace: float, patience_seconds: float) -> None:
        self._subject, self._ranks, self._scheme, self._layout, self._tasks = subject, ranks, scheme, layout, tasks
        self._rule, self._grace, self._samples, self.n = rule, grace, samples, len(ranks)
        own = int(comm.Get_rank())
        self._own = ranks.index(own) if tasks is not None else -1
        self._number = {rank: i for i, rank in enumerate(ranks)}
        self.server = Server(comm, {rank: hosts[rank] for rank in ranks if rank != own}, layout.order_nbytes,
                             layout.answer_nbytes(layout.most), number, patience_seconds)
        self._kernels = backend(layout.dtype, "cpu")
        self._xs: Vector = np.zeros((0, 0), layout.dtype)
        self._versions = np.zeros(len(samples), np.int64)  # of x of each model
        self._holds = np.zeros((self.n, len(samples)), np.int64)  # which of them a worker has
        self._orders: dict[tuple[tuple[Given, ...], int], Frame] = {}  # of this round
        self._answer = Frame(layout.answer_nbytes(layout.most) if tasks is not None else 0)
        self._rows: dict[int, dict[tuple[int, int], tuple[Vector, Numbers]]] = {}  # by job, worker and slot
        self._pool: list[tuple[Vector, Numbers]] = []
        self._sum, self._spare = np.zeros(layout.d, layout.dtype), np.zeros(layout.d, layout.dtype)
        self._schedule: Schedule | None = None
        self._first_step = 0
        self.round, self._first_round = -1, 0  # over all runs; the first one of this run
        self._began, self._given, self._idle = 0.0, 0, False
        self._until: float | None = None  # so long the round lasts, when its first answer has come
        self._done: list[int] = []
        self._computed, self._firsts = 0.0, 0  # seconds of the first answers of rounds, and how many these are
        self.ended: dict[int, int] = {}
        self.lateness = Lateness(self.n)
        self.late = self.waits = self.received_nbytes = 0

    def run(self, xs: Vector, steps: int, first: int) -> Iterator[Finished]:
        """Yield what is finished; whoever is told so changes xs[model] before going on."""
        models = len(self._samples)
        schedule = self._schedule = scheduled(self._scheme, self.n, jobs=models * steps, rule=self._rule)
        self._xs, self._first_step, self._first_round, left = xs, first, self.round + 1, models * steps
        self._versions += 1
        while left and schedule.begin():
            self.round += 1
            if schedule.round < models * steps:
                self._versions[schedule.round % models] += schedule.round >= models
            self._go(schedule)
            for job in sorted(self._done):
                left -= 1
                if (finished := self._decoded(schedule, job)) is not None:
                    yield finished
        self._schedule = None
        self._release()

    def look(self) -> None:
        """Take what has come, and give tasks; does not wait."""
        for rank, frame in self.server.look():
            self.take(rank, frame)

    def take(self, rank: int, frame: Frame) -> None:
        """Take an answer, drop it, and give its worker tasks of this round."""
        if frame.step >= 0:
            self._take_answer(self._number[rank], frame)
        self.server.drop(frame)
        if self._schedule is not None and self._number[rank] in self._schedule.free():
            self._give(self._schedule, self._number[rank])

    def close(self, xs: Vector) -> tuple[int, ...]:
        """Let workers end with these models; return the ranks that do not."""
        self._schedule, self._xs = None, xs
        for model in range(len(xs)):
            frame = self._order((), model)
            for rank in self.server.hosts:
                self.server.also(rank, frame)
        self._release()
        last = self.server.frame()
        last.step = self.round + 1
        last.wire[:] = 0
        return self.server.close(last, self.take, self._subject)

    def _go(self, schedule: Schedule) -> None:
        """Give tasks, compute the server's own, and wait until the round may end."""
        self._release()
        self._began, self._given, self._idle, self._until, self._done = self.server.now(), 0, False, None, []
        self.lateness.begin(self.round)
        self.look()  # late answers, which free their workers
        for i in schedule.free():
            self._give(schedule, i)
        if self._tasks is not None and (given := self._named(schedule.tasks(self._own))):
            self._given += 1
            self._answer.step = self.round
            self._tasks.compute(given, self._x_of, self._answer, self.server.now, self.look)
            self._take_answer(self._own, self._answer)
        waited = False
        for arrived in self.server.looks():
            for rank, frame in arrived:
                self.take(rank, frame)
            if self._over(schedule):
                break
            waited |= self._until is not None and self.server.now() > self._until
        else:
            raise self._silence(schedule)
        self.waits += waited
        self.lateness.over(self.round)

    def _x_of(self, model: int) -> Vector:
        x: Vector = self._xs[model]
        x.flags.writeable = False
        return x

    def _over(self, schedule: Schedule) -> bool:
        self._done += schedule.finished()
        if schedule.must_wait():
            return False
        if not schedule.open():
            return True
        if not self._given:
            return self._idle  # else all are late with what they had before
        return not schedule.awaited() or (self._until is not None and self.server.now() >= self._until)

    def _named(self, tasks: tuple[Task, ...]) -> tuple[Given, ...]:
        models = len(self._samples)
        return tuple(Given(task.job % models, -1 if task.job % models in self.ended else self._first_step +
                           task.job // models, task.slot) for task in tasks)

    def _give(self, schedule: Schedule, i: int) -> None:
        """Give a worker its tasks of this round, and the models that it lacks."""
        rank = self._ranks[i]
        if i == self._own or not self.server.free(rank):
            return
        if not (given := self._named(schedule.tasks(i))):
            self._idle = True
            return
        lacks = sorted({task.model for task in given if task.step >= 0
                        and self._holds[i, task.model] != self._versions[task.model]})
        for model in lacks[:-1]:
            self.server.also(rank, self._order((), model))
        model = lacks[-1] if lacks else -1
        self._holds[i, lacks] = self._versions[lacks]
        self.server.order(rank, self._order(given, model), None if lacks else self._layout.head_nbytes)
        self._given += 1

    def _order(self, given: tuple[Given, ...], model: int) -> Frame:
        """Return a frame that all workers of this round share who are to have the same."""
        if (given, model) not in self._orders:
            frame = self._orders[given, model] = self.server.frame()
            self._layout.write_order(frame, max(0, self.round), given, model, self._xs[model] if model >= 0 else None)
        return self._orders[given, model]

    def _release(self) -> None:
        """Drop the orders of a round that is over."""
        for frame in self._orders.values():
            self.server.drop(frame)
        self._orders.clear()

    def _take_answer(self, i: int, frame: Frame) -> None:
        now, in_time = self.server.now(), frame.step == self.round
        self.lateness.arrived(frame.step, i, now)
        self.late += not in_time
        schedule = self._schedule
        if schedule is None or frame.step < self._first_round:
            return  # of a run that is over
        if in_time and self._until is None:
            self._until = self._began + (1.0 + self._grace) * (now - self._began)
            self._computed, self._firsts = self._computed + float(self._layout.seconds_of(frame)[0]), self._firsts + 1
            self.lateness.part_seconds = self._computed / self._firsts / (self.n * self._scheme.load(self.n))
        tasks = schedule.delivered(i)
        self.received_nbytes += 0 if i == self._own else self._layout.answer_nbytes(len(tasks))
        for k, task in enumerate(tasks):
            if task is not None:
                self._keep(task, *self._layout.result_of(frame, k))

    def _keep(self, task: Task, vector: Vector, extras: Numbers) -> None:
        """Keep a result until its job is decoded; chunks of a worker's own, which come in their order, are added up."""
        rows, slot = self._rows.setdefault(task.job, {}), self._slot(task)
        if (task.worker, slot) in rows:
            row, more = rows[task.worker, slot]
            with np.errstate(all="ignore"):
                np.add(row, vector, out=row)
                np.add(more, extras, out=more)
            return
        layout = self._layout
        row, more = self._pool.pop() if self._pool else (np.empty(layout.d, layout.dtype), np.empty(layout.extras))
        row[:], more[:] = vector, extras
        rows[task.worker, slot] = row, more

    def _slot(self, task: Task) -> int:
        return 0 if isinstance(self._scheme, MSGC) and task.slot < self._scheme.own else task.slot

    def _decoded(self, schedule: Schedule, job: int) -> Finished | None:
        """Return the gradient of a job; None if it is not finite, or its model has ended."""
        models = len(self._samples)
        model, step, rows = job % models, self._first_step + job // models, self._rows.pop(job)
        total, extras = self._sum, np.zeros(self._layout.extras)
        if model not in self.ended:
            with np.errstate(all="ignore"):
                self._add_up(schedule.decode(job), rows, total, extras)
        self._pool += rows.values()
        if model in self.ended:
            return None
        if not self._kernels.finite([total]):
            self._end(model, step)
            return None
        total /= self._samples[model]
        return Finished(model, step, total, extras)

    def _add_up(self, of: Iterable[tuple[Task, float]], rows: Mapping[tuple[int, int], tuple[Vector, Numbers]],
                total: Vector, extras: Numbers) -> None:
        total[:] = 0
        for task, a in of:
            if self._slot(task) != task.slot:
                continue  # is in the sum of the worker's own
            row, more = rows[task.worker, task.slot]
            if a == 1.0:
                np.add(total, row, out=total)
            else:
                np.multiply(row, total.dtype.type(a), out=self._spare)
                np.add(total, self._spare, out=total)
            extras += a * more

    def _end(self, model: int, step: int) -> None:
        """Let a model be as it is from here on."""
        self.ended[model] = step
        text = f"model {model} ends: its gradient of step {step} is not finite; take a smaller learning rate"
        if len(self.ended) == len(self._samples):
            raise NonFiniteError(f"{self._subject}: all models have ended, the last one is {text}", ())
        say(sys.stderr, f"mpi-ef: {self._subject}: {text}\n")

    def _silence(self, schedule: Schedule) -> SilenceError:
        ranks = [rank for rank in self.server.hosts if not self.server.free(rank)]
        job, models = min(schedule.open(), default=0), len(self._samples)
        return SilenceError(f"{self._subject}: {self.server.listed(ranks)} silent for {self.server.patience_seconds:g} s in "
                            f"round {self.round}; step {self._first_step + job // models} of model {job % models} cannot be "
                            f"decoded without; start again without them, from what was saved", tuple(ranks))
