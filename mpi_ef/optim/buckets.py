"""A vector in runs of whole parameters, each with a rule of its own: messages travel while autograd is still at work."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.compress.combination import Combination, Vector
from mpi_ef.errors import MpiEfError, NonFiniteError, OptionError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.ranges import whole
from mpi_ef.statetree import StateTree
from mpi_ef.vectors import FlatParameters

from .line import Lane

__all__ = ["Bucket", "Buckets", "bucket_slices", "fragment_slices"]

Take = Callable[[slice, Vector], None]  # a part of the vector, and the result of its rule


@dataclass
class Bucket:
    """A run of parameters."""

    numbers: range  # which parameters
    part: slice  # where they are in the vector
    feedback: ErrorFeedback


def bucket_slices(flat: FlatParameters, nbytes: int | None) -> list[tuple[range, slice]]:
    """Return runs of parameters of about so many bytes, the last parameters first: those autograd is done with first."""
    if nbytes is None:
        return [(range(len(flat.parameters)), slice(0, flat.d))]
    whole("DistributedOptimizer", 1, "25_000_000 is usual", bucket_nbytes=nbytes)
    most, runs, stop = max(1, nbytes // flat.dtype.itemsize), [], len(flat.parameters)
    for number in reversed(range(len(flat.parameters))):
        if number == 0 or flat.starts[stop] - flat.starts[number - 1] > most:
            runs.append((range(number, stop), slice(flat.starts[number], flat.starts[stop])))
            stop = number
    return runs


def fragment_slices(flat: FlatParameters, number: int) -> list[tuple[range, slice]]:
    """Return so many runs of parameters of about as many entries."""
    count = len(flat.parameters)
    if number > count:
        raise OptionError(f"LocalSteps: fragments={number} of {count} parameters; a fragment has at least one")
    bounds = [0]
    for p in range(1, number):
        stop = min(range(count + 1), key=lambda at: abs(flat.starts[at] - flat.d * p // number))
        bounds.append(min(max(stop, bounds[-1] + 1), count - number + p))
    bounds.append(count)
    return [(range(start, stop), slice(flat.starts[start], flat.starts[stop]))
            for start, stop in pairwise(bounds)]


class Buckets:
    """The rules of all buckets, which step together or not at all.

    A step starts the exchange of every bucket, in this order on all ranks; waits for all; and changes state only when all
    have arrived, so that a NaN in the last bucket leaves the first as it was. With a lane a bucket starts as soon as
    autograd has made all its gradients; their plans were built on that lane.
    """

    def __init__(self, flat: FlatParameters, buckets: Sequence[Bucket], lane: Lane | None) -> None:
        self._flat, self._buckets, self._lane, self._started = flat, list(buckets), lane, 0
        self._bucket_of = {number: n for n, bucket in enumerate(self._buckets) for number in bucket.numbers}
        self._missing = [set(bucket.numbers) for bucket in self._buckets]
        self.paused = False  # whether gradients only add up
        self.early = 0  # how many buckets of the last step started during the backward pass
        self.problem: OptionError | None = None  # of a backward pass
        if lane is not None:
            flat.watch(self._arrived)

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._buckets)

    def __getitem__(self, number: int) -> Bucket:
        return self._buckets[number]

    def _arrived(self, number: int) -> None:
        """Take note that autograd has made a gradient, and start the buckets that are whole now."""
        if self.paused or (self._lane is not None and self._lane.closed):
            return
        n = self._bucket_of[number]
        if n < self._started:
            self.problem = OptionError(
                "DistributedOptimizer: a second backward pass before step(), with overlap=True: what the first one sent, "
                "also where that one raised, cannot be taken back; to add up gradients do all but the last one inside `with "
                "optimizer.no_sync():`; take overlap=False to repeat a backward pass. A layer that torch.utils.checkpoint "
                "runs twice has two as well: pass use_reentrant=False"
            )
            raise self.problem
        self._missing[n].discard(number)
        # A plan is not built in a backward pass, where others may not come.
        while (n := self._started) < len(self._buckets) and not self._missing[n] and self._buckets[n].feedback.prepared:
            self._start_next(self._flat.gradients)
        for bucket in self._buckets[: self._started]:
            bucket.feedback.progress()

    def _start_next(self, vector: Vector | Combination) -> None:
        bucket = self._buckets[self._started]
        self._started += 1
        bucket.feedback.start(vector[bucket.part])
        if self._lane is not None:
            self._lane.started += 1

    def changed(self) -> int | None:
        """Return a parameter whose gradient is no longer what has been sent of it in the backward pass. Local."""
        sent = (number for bucket in self._buckets[: self._started] for number in bucket.numbers)
        return next((number for number in sent if not self._flat.untouched(number)), None)

    def step(self, vector: Vector | Combination, take: Take) -> None:
        """Give `vector`, (d,), to the rules, and their results to `take`. Collective.

        Raises
        ------
        NonFiniteError
            On all ranks, with all state as it was.
        """
        if len(self._buckets) == 1:
            part = self._buckets[0].part
            take(part, self._buckets[0].feedback.step(vector[part]))
            return
        if broken := self.wait(vector):
            self.rollback()
            raise NonFiniteError(f"DistributedOptimizer: NaN or Inf on {ranks_text(broken)}; nothing was changed", broken)
        self.commit(take)

    def wait(self, vector: Vector | Combination) -> tuple[int, ...]:
        """Start what has not started, wait for everything, and return the ranks with a NaN or Inf. Collective."""
        self.early = self._started
        while self._started < len(self._buckets):
            self._start_next(vector)
        broken: set[int] = set()
        others: list[MpiEfError] = []
        for bucket in self._buckets:
            try:
                bucket.feedback.wait()
            except NonFiniteError as error:
                broken |= set(error.ranks)
            except MpiEfError as error:  # of all ranks; the messages of the other buckets are on their way
                others.append(error)
        self._started, self.problem = 0, None
        self._missing = [set(bucket.numbers) for bucket in self._buckets]
        if others:
            self.rollback()
            raise others[0]
        return tuple(sorted(broken))

    def rollback(self) -> None:
        """Forget what has arrived; all state is as it was. Local."""
        for bucket in self._buckets:
            bucket.feedback.rollback()

    def commit(self, take: Take) -> None:
        """Update all states, and give the results of the rules to `take`. Local."""
        results = [bucket.feedback.commit() for bucket in self._buckets]  # all, before anything is taken
        for bucket, result in zip(self._buckets, results, strict=True):
            take(bucket.part, result)

    def state_trees(self) -> list[StateTree]:
        """Describe the state of all rules; with several, names begin with the number of the bucket. Local."""
        trees = [bucket.feedback.state_tree() for bucket in self._buckets]
        return [replace(tree, prefix=f"{n}.") for n, tree in enumerate(trees)] if len(trees) > 1 else trees
