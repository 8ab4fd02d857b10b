"""Who computes what in which round, what has come, whether to go on: sequential gradient coding as facts, without clocks.

::

    schedule = scheduled(MSGC(1, 4, 3), n, jobs=120)
    while schedule.begin():                          # the next round, with one more job
        while schedule.must_wait() or there is time:
            for worker in schedule.free(): ...       # give it schedule.tasks(worker)
            schedule.delivered(worker)               # when an answer has come, of this round or of one before
        for job in schedule.finished():              # these jobs can be decoded now
            g = sum(a * result of task for task, a in schedule.decode(job))

A worker that has not answered is given nothing. Its answer may come in any later round: what of it belongs to jobs that are
not finished counts, and the worker is given the tasks of that round at once.
"""

from abc import ABC, abstractmethod
from collections import deque

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import OptionError, briefly, nearest
from mpi_ef.ranges import whole

from .blocks import quorums
from .codes import Coefficients, GradientCode, mask_of
from .schemes import GC, MSGC, SRSGC, Scheme, Task

__all__ = ["RULES", "Schedule", "scheduled"]

RULES = ("lazy", "paper")
Bools = NDArray[np.bool_]
Workers = NDArray[np.intp]


def scheduled(scheme: Scheme, n: int, *, jobs: int | None = None, rule: str = "lazy") -> "Schedule":
    """Return a schedule before its first round. Local; the same on all ranks that are told the same facts in the same order.

    Parameters
    ----------
    scheme : Scheme
    n : int
        The number of workers.
    jobs : int, optional
        How many there are in all; by default there is no end.
    rule : {"lazy", "paper"}
        When to wait at the end of a round. *lazy*: if some job that has begun could not be decoded in time even if all
        workers answered from the next round on. *paper*: also if the slow workers of the last W rounds leave the model that
        W, B and lam say.

    Raises
    ------
    OptionError
        There is no such scheme for n workers, or no such rule.
    """
    if not isinstance(scheme, GC | SRSGC | MSGC):
        raise OptionError(f"scheduled: {briefly(scheme)} is no scheme; take GC, SRSGC or MSGC")
    whole("scheduled", 1, "the number of workers", n=n)
    if jobs is not None:
        whole("scheduled", 1, "how many jobs there are", jobs=jobs)
    if rule not in RULES:
        raise OptionError(f"scheduled: there is no rule {briefly(rule)}; {nearest(str(rule), RULES, 'take lazy or paper')}")
    scheme.check(n)
    if isinstance(scheme, MSGC):
        return _Multiplexed(scheme, n, jobs, rule)
    return _Reattempts(scheme, n, jobs, rule)


class Schedule(ABC):
    """The facts of a run, see :func:`scheduled`. Every method is local.

    Attributes
    ----------
    scheme : Scheme
    n : int
    jobs : int or None
    round : int
        The round that goes on; -1 before the first.
    """

    def __init__(self, scheme: Scheme, n: int, jobs: int | None, rule: str) -> None:
        self.scheme, self.n, self.jobs, self.rule, self.round = scheme, n, jobs, rule, -1
        self._depth = scheme.delay + 1  # rows for so many jobs: job t has row t mod depth
        self._at = np.full(n, -1, np.int64)  # the round of the tasks that are under way
        self._served = np.full(n, -1, np.int64)  # the last round of which a worker was given tasks
        self._over = np.zeros(self._depth, np.bool_)
        self._given: dict[int, tuple[Task, ...]] = {}
        self._slow: deque[Bools] = deque(maxlen=max(1, getattr(scheme, "window", 2) - 1))

    def begin(self) -> bool:
        """Begin the next round, and its job if there is one more; False: all is over.

        Raises
        ------
        OptionError
            A job could not be decoded in time any more: :meth:`must_wait`.
        """
        if self.round >= 0 and self._stuck():
            raise OptionError(f"Schedule: round {self.round} cannot end, a job could not be decoded in time any more; wait "
                              f"for workers {self.awaited() or self.free()}")
        if self.jobs is not None and self.round >= self.jobs + self.scheme.delay - 1:
            return False
        if self.round >= 0:
            self._slow.append(self._at >= 0)
        self.round += 1
        row = self.round % self._depth
        self._over[row] = False
        self._clear(row)
        return True

    def free(self) -> list[int]:
        """Return who can be given tasks of this round: who has not had them yet, and of whom nothing is under way."""
        return [int(i) for i in np.flatnonzero((self._at < 0) & (self._served < self.round))]

    def awaited(self) -> list[int]:
        """Return of whom an answer is under way."""
        return [int(i) for i in np.flatnonzero(self._at >= 0)]

    def tasks(self, worker: int) -> tuple[Task, ...]:
        """Return what a free worker is to compute in this round, and note that it is under way, unless there is nothing.

        It answers with the results of all of them, in this order.
        """
        if not (0 <= worker < self.n and self._at[worker] < 0 and self._served[worker] < self.round):
            raise OptionError(f"Schedule: worker {worker} of {self.n} is not free in round {self.round}; free are "
                              f"{self.free()}")
        self.assign(np.array([worker]))
        if self._at[worker] < 0:
            return ()
        given = tuple(self.scheme.task(job, worker, slot, self.n) for job, slot in self._slots_of(worker))
        self._given[worker] = given
        return given

    def delivered(self, worker: int) -> tuple[Task | None, ...]:
        """Note that a worker has answered, in time or late; return its tasks, None for one of a job that is finished."""
        if not (0 <= worker < self.n and self._at[worker] >= 0):
            raise OptionError(f"Schedule: nothing of worker {worker} is under way in round {self.round}; awaited are "
                              f"{self.awaited()}")
        given = self._given.pop(worker, ())
        counts = tuple(task if self._is_open(task.job) else None for task in given)
        self.deliver(np.array([worker]))
        return counts

    def assign(self, workers: Workers) -> None:
        """Give free workers, (m,) integers, their tasks without telling which: for a simulation."""
        self._served[workers] = self.round
        self._assign(workers)

    def deliver(self, workers: Workers) -> None:
        """Note that the answers of these workers, (m,) integers, have come: for a simulation."""
        self._deliver(workers)
        self._at[workers] = -1

    def lost(self, workers: Workers) -> None:
        """Note that the answers of these workers, (m,) integers, will not come: they are free, also in this round."""
        self._lost(workers)
        self._at[workers] = self._served[workers] = -1
        for worker in workers:
            self._given.pop(int(worker), None)

    def must_wait(self) -> bool:
        """Tell whether the rule forbids to end the round now. When all workers have answered, it may end."""
        slow = self._at >= 0
        if not slow.any() and (self._served == self.round).all():
            return False
        return self._stuck() or (self.rule == "paper" and not self._within_model(slow))

    def finished(self) -> list[int]:
        """Return the jobs that can be decoded and were not named before: what comes of them later does not count."""
        found = [job for job in self._open_jobs() if self._decodable(job)]
        for job in found:
            self._over[job % self._depth] = True
        return found

    def open(self) -> list[int]:
        """Return the jobs that have begun, and that :meth:`finished` has not named."""
        return self._open_jobs()

    def decode(self, job: int) -> tuple[tuple[Task, float], ...]:
        """Return whose results make up the gradient of a job, in the order in which to add them, and their coefficients.

        Until :meth:`begin` of round job + T + 1.

        Raises
        ------
        OptionError
            It cannot be decoded yet, or no longer.
        """
        if not (max(0, self.round - self.scheme.delay) <= job <= self.round and self._decodable(job)):
            raise OptionError(f"Schedule: job {job} cannot be decoded in round {self.round}; finished() names those that "
                              "can")
        return self._decode(job)

    def _is_open(self, job: int) -> bool:
        return self.round - self.scheme.delay <= job and not self._over[job % self._depth]

    def _open_jobs(self) -> list[int]:
        last = self.round if self.jobs is None else min(self.round, self.jobs - 1)
        return [job for job in range(max(0, self.round - self.scheme.delay), last + 1) if not self._over[job % self._depth]]

    def _within_model(self, slow: Bools) -> bool:
        """Tell whether the last W rounds fit: lam workers or fewer, and who was slow twice was so within B rounds."""
        if not isinstance(self.scheme, MSGC | SRSGC):
            return True
        window, allowed = np.array([*self._slow, slow]), self._allowed()
        if isinstance(self.scheme, SRSGC):  # rounds of up to s are no matter
            window[window.sum(axis=1) <= allowed] = False
            allowed = self.scheme.lam
        if int(window.any(axis=0).sum()) > allowed:
            return False
        before = window[: max(0, len(window) - self.scheme.burst)].any(axis=0)
        return not (before & window[-1]).any()

    @abstractmethod
    def _allowed(self) -> int:
        """Return lam of M-SGC, s of SR-SGC, as their codes have them."""

    @abstractmethod
    def _clear(self, row: int) -> None:
        """Forget the job that had this row."""

    @abstractmethod
    def _slots_of(self, worker: int) -> list[tuple[int, int]]:
        """Return job and slot of what is under way."""

    @abstractmethod
    def _assign(self, workers: Workers) -> None: ...

    @abstractmethod
    def _deliver(self, workers: Workers) -> None: ...

    @abstractmethod
    def _lost(self, workers: Workers) -> None: ...

    @abstractmethod
    def _stuck(self) -> bool:
        """Tell whether a job could not be decoded in time even if all answered from the next round on."""

    @abstractmethod
    def _decodable(self, job: int) -> bool: ...

    @abstractmethod
    def _decode(self, job: int) -> tuple[tuple[Task, float], ...]: ...


class _Reattempts(Schedule):
    """SR-SGC, and with T = 0 gradient coding."""

    def __init__(self, scheme: GC | SRSGC, n: int, jobs: int | None, rule: str) -> None:
        super().__init__(scheme, n, jobs, rule)
        self._code = scheme.code(n)
        self._members, self._least = quorums(self._code, n)
        self._done = np.zeros((self._depth, n), np.bool_)
        self._job = np.full(n, -1, np.int64)  # of what is under way
        self._again = np.zeros(n, np.bool_)  # who does job r - B in this round

    def _allowed(self) -> int:
        return self._code.s

    def _clear(self, row: int) -> None:
        self._done[row] = self._again[:] = False

    def _slots_of(self, worker: int) -> list[tuple[int, int]]:
        return [(int(self._job[worker]), 0)]

    def _assign(self, workers: Workers) -> None:
        has_new = self.jobs is None or self.round < self.jobs
        self._job[workers] = self.round if has_new else -1
        old = self.round - self.scheme.delay
        if self.scheme.delay and old >= 0 and self._is_open(old):
            have = self._done[old % self._depth] | self._again
            there = have @ self._members
            for worker in workers[~have[workers]]:
                of = self._members[worker]
                if (there < self._least) @ of:  # its block is short of answers
                    there += of
                    self._again[worker], self._job[worker] = True, old
        self._at[workers] = np.where(self._job[workers] >= 0, self.round, -1)

    def _deliver(self, workers: Workers) -> None:
        jobs = self._job[workers]
        rows = jobs % self._depth
        counts = (jobs >= self.round - self.scheme.delay) & ~self._over[rows]
        self._done[rows[counts], workers[counts]] = True

    def _lost(self, workers: Workers) -> None:
        self._again[workers] = False

    def _stuck(self) -> bool:
        job = self.round - self.scheme.delay
        return job >= 0 and self._is_open(job) and not self._decodable(job)

    def _decodable(self, job: int) -> bool:
        return bool((self._done[job % self._depth] @ self._members >= self._least).all())

    def _decode(self, job: int) -> tuple[tuple[Task, float], ...]:
        a = self._code.decode(mask_of(np.flatnonzero(self._done[job % self._depth]).tolist()), self.n)
        return tuple((self.scheme.task(job, i, 0, self.n), float(a[i])) for i in _in_order(self._code, a))


class _Multiplexed(Schedule):
    """M-SGC. Task m of a worker is of job r - m, and m is the number of its group + W - 1 where it is coded."""

    scheme: MSGC

    def __init__(self, scheme: MSGC, n: int, jobs: int | None, rule: str) -> None:
        super().__init__(scheme, n, jobs, rule)
        self._own, self._code = scheme.own, scheme.code(n)
        if self._code is not None:
            self._members, self._least = quorums(self._code, n)
        self._count = np.zeros((self._depth, n), np.int64)  # of own chunks that have come
        self._sums = np.zeros((self._depth, scheme.burst, n), np.bool_)  # of groups
        self._coded = np.zeros((self._depth, n), np.bool_)  # by m, of what is under way
        self._m = np.arange(self._depth)  # W - 1 of own chunks, then B of groups
        self._m_of_group = self._m[self._own :]

    def _allowed(self) -> int:
        return self.n if self._code is None else self._code.s

    def _clear(self, row: int) -> None:
        self._count[row] = 0
        self._sums[row] = False

    def _open_tasks(self, begun: int) -> Bools:
        """Return by m which tasks of a round are of jobs that there are and that are not finished."""
        jobs = begun - self._m
        known = (jobs >= max(0, self.round - self.scheme.delay)) & ~self._over[jobs % self._depth]
        return known if self.jobs is None else known & (jobs < self.jobs)

    def _slots_of(self, worker: int) -> list[tuple[int, int]]:
        found = []
        for m in np.flatnonzero(self._open_tasks(self.round)):
            job = self.round - int(m)
            coded = self._coded[m, worker]
            if not coded or self._code is not None:
                found.append((job, int(m if coded else self._count[job % self._depth, worker])))
        return found

    def _assign(self, workers: Workers) -> None:
        rows = (self.round - self._m) % self._depth
        coded = self._count[rows[:, None], workers] == self._own
        self._coded[:, workers] = coded
        useful = self._open_tasks(self.round)[:, None] & (~coded if self._code is None else True)
        self._at[workers] = np.where(useful.any(axis=0), self.round, -1)

    def _deliver(self, workers: Workers) -> None:
        for begun in np.unique(self._at[workers]):
            of = workers[self._at[workers] == begun]
            m = self._m[self._open_tasks(int(begun))]
            rows, coded = (begun - m) % self._depth, self._coded[m[:, None], of]
            self._count[rows[:, None], of] += ~coded
            late = m >= self._own
            self._sums[rows[late, None], (m[late] - self._own)[:, None], of] |= coded[late]

    def _lost(self, workers: Workers) -> None: ...

    def _stuck(self) -> bool:
        jobs = self.round - self._m
        ahead = self._m + 1  # the next task of each of these jobs
        open_ones = self._open_tasks(self.round)
        rows = (jobs % self._depth)[open_ones]
        ready = (ahead[open_ones, None] + self._own - self._count[rows])  # from this task on: coded sums
        if (ready > self._depth).any():
            return True
        if self._code is None:
            return False
        past = self._m_of_group < ahead[open_ones, None]  # (jobs, B)
        will = np.where(past[:, :, None], self._sums[rows], ready[:, None, :] <= self._m_of_group[:, None])
        return not bool((will @ self._members >= self._least).all())

    def _decodable(self, job: int) -> bool:
        row = job % self._depth
        if (self._count[row] < self._own).any():
            return False
        return self._code is None or bool((self._sums[row] @ self._members >= self._least).all())

    def _decode(self, job: int) -> tuple[tuple[Task, float], ...]:
        scheme, n = self.scheme, self.n
        found = [(scheme.task(job, i, slot, n), 1.0) for i in range(n) for slot in range(self._own)]
        if self._code is not None:
            for group, have in enumerate(self._sums[job % self._depth]):
                a = self._code.decode(mask_of(np.flatnonzero(have).tolist()), n)
                found += [(scheme.task(job, i, self._own + group, n), float(a[i])) for i in _in_order(self._code, a)]
        return tuple(found)


def _in_order(code: GradientCode, a: Coefficients) -> list[int]:
    """Return whose results are added, in the order of their groups: a twin has the place of the one that is missing."""
    return sorted(np.flatnonzero(a).tolist(), key=lambda i: code.place(i, a.size))
