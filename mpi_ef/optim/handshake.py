"""What the ranks of an optimizer tell each other before a step."""

import warnings
from collections import Counter
from collections.abc import Callable
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DisagreementError, PeerError
from mpi_ef.vectors import Mask

from .line import Line
from .waits import Waits

__all__ = ["DONE", "WEIGHS", "Handshake", "check_order"]

# May the step be taken; what must be the same; hashes of what should be, where they are compared (else 0); which parameters
# have a gradient; DONE and WEIGHS; what it has to say of entries that sleep (resting.py).
_WORDS = np.dtype([("status", "u4"), ("groups", "u4"), ("steps", "u4"), ("number", "u4"), ("values", "u4"),
                   ("gradient", "u4"), ("present", "u4"), ("joins", "u2"), ("sleepers", "u2"),
                   ("squared_norm", "f8")])
_FORM = Struct("=7I2Hd")  # the same
_BUT_THE_NORM = 8  # words of 32 bits
LEFT = 3  # besides the statuses of frames
DONE, WEIGHS = 1, 2  # of joins: whether a rank has run out of data, and which mean it takes where others have
_SAME = ["status", "groups", "steps", "number"]
Answers = NDArray[Any]


class Handshake:
    """One message of 40 bytes from every rank to every rank of `line`, before a step of optimizer `name` changes anything.

    `number` tells which of all optimizers of this communicator that is, the same on all ranks.
    """

    LOOKS = 3  # steps in which gradients are compared

    def __init__(self, comm: Comm, name: str, number: int, line: Line) -> None:
        self._comm, self._name, self._same, self._line = comm, name, 0, line
        self._fields: dict[str, Any] = dict.fromkeys(_WORDS.names or (), 0) | {"number": number}
        self._mine, self._answers = np.zeros(_FORM.size, np.uint8), np.zeros(comm.Get_size(), _WORDS)
        self._table = self._answers.view(np.uint32).reshape(self._answers.size, -1)[:, :_BUT_THE_NORM]
        self._alike = False  # all ranks have sent the same, but for the norm
        self.steps = 0  # that were completed
        self.waits = Waits(comm, f"{name}.lateness of optimizer {number}")

    def note(self, **fields: float) -> None:
        """Set `fields` of what is sent next. Local."""
        self._fields |= fields

    def answers(self, name: str) -> Answers:
        """Return one field of the last answers of all ranks, (n,). Local."""
        answers: Answers = self._answers[name]
        return answers

    def ask(self, **fields: float) -> Answers:
        """Send `fields` to all ranks, and return those of all: (n,) with a field for each. Collective.

        They are valid until the next time.
        """
        self.note(**fields)
        _FORM.pack_into(self._mine.data, 0, *self._fields.values())
        answers = self._answers.view(np.uint8)
        if not self._line.gone:
            answers.fill(0xFF)  # no valid answer
            waited = self._line.allgather(self._mine, answers, lambda: f"step {self._fields['steps']} of {self._name}")
            self._alike = self._are_alike()
            if not self._alike:
                self._line.gone = np.flatnonzero(self._answers["status"] == LEFT).tolist()
            if self._alike or self.same("number"):
                self.waits.note(waited, counts=self.all_at_work and not self._line.gone)
        if self._line.gone:
            last = self._answers[self._line.gone[0]]
            ours = last["status"] == LEFT and last["number"] == self._fields["number"]  # it sent after which step
            when = f" after {last['steps']} steps" if ours else ""
            raise PeerError(f"{self._name}.step: {ranks_text(self._line.gone)} left the training{when}, by ending or by "
                            "dropping the optimizer; give all ranks as many batches, or train inside `with "
                            "optimizer.join():`")
        return self._answers

    def _are_alike(self) -> bool:
        size, few = self._answers.size, 8
        if size > few:
            return bool((self._table == self._table[0]).all())
        answers = self._answers.tobytes()  # NumPy's way of comparing takes ten times as long
        row, part = _FORM.size, 4 * _BUT_THE_NORM
        return all(answers[start : start + part] == answers[:part] for start in range(row, size * row, row))

    def leave(self) -> None:
        """Say that this rank takes no further steps. Local."""
        self.note(status=LEFT, steps=self.steps)
        _FORM.pack_into(self._mine.data, 0, *self._fields.values())
        self._line.leave(self._mine)

    def agreed(self) -> bool:
        """Return whether all ranks can take the step, and mean the same one. Local."""
        if self._alike:
            return not self._fields["status"]
        steps = self._answers[["steps", "number"]]
        weighs = self._answers["joins"] & WEIGHS
        fields = self._answers[_SAME] if self.all_at_work else self._answers[_SAME][self.at_work]
        alike = (steps == steps[0]).all() and (weighs == weighs[0]).all() and (fields == fields[:1]).all()
        return not self._answers["status"].any() and bool(alike)

    def same(self, name: str) -> bool:
        """Return whether all ranks, also those that have run out of data, have sent the same in this field. Local."""
        answers = self._answers[name]
        return self._alike or bool((answers == answers[0]).all())

    @property
    def all_at_work(self) -> bool:
        """Whether no rank has run out of data."""
        return not (self._fields["joins"] & DONE if self._alike else (self._answers["joins"] & DONE).any())

    @property
    def at_work(self) -> NDArray[np.intp]:
        """The ranks that have data, by their number."""
        return np.flatnonzero(self._answers["joins"] & DONE == 0)

    def anywhere(self, present: Mask) -> Mask:
        """Return which parameters have a gradient on any rank. Collective where that is not the same on all of them."""
        found = present.copy()
        if not self.same("present"):
            answers = np.empty((self._answers.size, found.size), bool)
            self._comm.Allgather(found, answers)
            answers.any(axis=0, out=found)
        return found

    def look_at_gradients(self) -> None:
        """Warn on rank 0 when all ranks have had the same bits as gradients in the first steps. Local."""
        if not self._fields["gradient"]:
            return
        hashes = self._answers["gradient"]
        self._same += int(hashes.size > 1 and hashes[0] != 0 and (hashes == hashes[0]).all())
        if self._same == self.LOOKS and self._comm.Get_rank() == 0:
            self._same = 0
            warnings.warn(
                f"{self._name}: all {hashes.size} ranks had the same gradients, to the last bit, in {self.LOOKS} steps: "
                "they read the same data. Give each rank its own share: mpi_ef.ShardedSampler, or torch's "
                "DistributedSampler(dataset, num_replicas=comm.size, rank=comm.rank), or, where data are drawn at random, "
                "mpi_ef.seed_rank(comm, seed)", RuntimeWarning, stacklevel=5)


def check_order(comm: Comm, name: str, hashes: NDArray[np.uint32], described: Callable[[int], str]) -> None:
    """Raise on all ranks where parameters of rank 0 are, by their values, at other places on another rank. Collective.

    Ranks that were seeded differently have other values, and take those of rank 0. `hashes` are those of the values of each
    parameter; `described` returns a parameter, by its number, in words.
    """
    answers = np.empty((comm.Get_size(), hashes.size), np.uint32)
    comm.Allgather(hashes, answers)
    alone = {value for value, times in Counter(answers[0].tolist()).items() if times == 1}
    for number, first in enumerate(answers[0].tolist()):
        for rank, theirs in enumerate(answers.tolist()) if first in alone else ():
            if theirs[number] != first and first in theirs:
                raise DisagreementError(
                    f"{name}: {described(number)} of rank 0 is number {theirs.index(first)} on rank {rank}: the ranks list "
                    "their parameters in different orders; list them in one order"
                )
