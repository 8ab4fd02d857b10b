"""The server of coded gradients: orders out, answers in, and the sum over all parts from those that have come."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.late import Frame
from mpi_ef.collectives.lateness import Lateness
from mpi_ef.collectives.server import Server
from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress.compressor import Codec
from mpi_ef.errors import DisagreementError, NonFiniteError, SilenceError, say

from .codes import Cyclic, GradientCode, mask_of, members
from .moves import Moves
from .twins import Dispute, Twins
from .wire import NOT_FINITE, ROW, WHOLE, Decoded, Layout, Numbers

__all__ = ["Decider"]

_NONE = -2  # before the step before any

Vector = NDArray[Any]


class Decider:
    """What the server does, see :class:`CodedGradients`. All is local.

    Parameters
    ----------
    ranks : tuple of int
        Of the workers; the server's own may be one of them, whose answers come by :meth:`take_own`.
    """

    def __init__(self, subject: str, comm: Comm, ranks: tuple[int, ...], hosts: Mapping[int, str], number: int,
                 code: GradientCode, layout: Layout, codec: Codec | None, moves: Moves, *, patience_seconds: float,
                 on_silence: str, twins: str) -> None:
        self._subject, self._own = subject, int(comm.Get_rank())
        self.ranks, self.n, self.code, self._layout, self._codec = ranks, len(ranks), code, layout, codec
        self._on_silence, self._raises, self.moves = on_silence, twins == "raise", moves
        self.server = Server(comm, {rank: hosts[rank] for rank in ranks if rank != self._own}, layout.order_nbytes,
                             layout.answer_nbytes, number, patience_seconds)
        self.rows = np.zeros((self.n, layout.d), layout.dtype)
        self._extra_rows = np.zeros((self.n, layout.extras))
        self._sum, self._spare = np.zeros(layout.d, layout.dtype), np.zeros(layout.d, layout.dtype)
        self._number = {rank: i for i, rank in enumerate(ranks)}
        self._knows_row = mask_of(range(self.n))
        self._newest: Frame | None = None  # the order of this step
        self._whole: Frame | None = None  # for workers that do not have the model before, where that is a move
        self._moves = False
        self._has = [_NONE] * self.n  # the step of the newest order that a worker was given
        self.twins, self.lateness = Twins(code, self.n), Lateness(self.n)
        self._computed, self._firsts, self._began = 0.0, 0, 0.0  # seconds to first answers, and how many these are
        self._heard = self._bad = 0  # masks of this step
        self.open = False  # a step has begun
        self.step = self.late = self.not_finite = self.received_nbytes = self._restored = 0
        self.parity = 0.0

    def restore(self, rows: Vector | None, step: int, w: Vector | None) -> None:
        """Go on from the rows, step and w of another one; workers are told theirs, with their next order."""
        self.moves.restore(w)
        self._has[:] = [_NONE] * self.n
        self.step, self._restored, self.open = step, self._restored + 1, False
        self.rows[:] = 0 if rows is None else rows
        self._knows_row = 0 if self._codec is not None and rows is not None else mask_of(range(self.n))
        self.twins, self.lateness = Twins(self.code, self.n), Lateness(self.n)

    @property
    def fresh(self) -> bool:
        """Whether no step has begun."""
        return self._newest is None

    def begin(self, x: Vector, extras: Sequence[float] | Numbers) -> Frame:
        """Send the order of the next step to those that are free, and return it."""
        for old in (self._newest, self._whole):
            if old is not None:
                self.server.drop(old)
        self._newest = frame = self.server.frame()
        self._whole = None
        self._moves = self.moves.write(frame, self.step, x, extras, restored=self._restored)
        self._heard = self._bad = 0
        self.open, self._began = True, self.server.now()
        self.lateness.begin(self.step)
        self.look()  # late answers, which free their workers
        for i in range(self.n):
            self._give(i)
        return frame

    def look(self) -> None:
        """Take what has come, and give orders; does not wait."""
        for rank, frame in self.server.look():
            self.take(rank, frame)

    def end(self) -> Decoded:
        """Wait for enough answers, and return the sum."""
        while not self.server.wait(self.enough, self.take):
            problem = self._silence()
            if self._on_silence == "raise" or not isinstance(problem, SilenceError):
                raise problem
            if self._on_silence == "approximate" and self._heard:
                break
            if not self.server.under_way:
                raise problem
            say(sys.stderr, f"mpi-ef: {problem}; waiting on\n")
        decoded = self._decode()
        self.open = False
        self.lateness.over(self.step)
        self.step += 1
        return decoded

    def enough(self) -> bool:
        """Tell whether the answers of this step are enough."""
        return self.open and self.code.decodable(self._usable(), self.n)

    def take(self, rank: int, frame: Frame) -> None:
        """Take an answer, drop it, and give its worker the newest order."""
        i = self._number[rank]
        if frame.step >= 0:
            self._take_answer(i, frame)
        self.server.drop(frame)
        self._give(i)

    def take_own(self, frame: Frame) -> None:
        """Take the answer of the server itself."""
        self._take_answer(self._number[self._own], frame)

    def close(self, x: Vector, extras: Sequence[float] | Numbers, *, at_exit: bool = False) -> tuple[int, ...]:
        """Let workers end with these parameters; return the ranks that do not."""
        self.open = False
        last = self.server.frame()
        self._layout.write_order(last, self.step, x, extras, restored=self._restored)
        return self.server.close(last, self.take, self._subject, at_exit=at_exit)

    def _usable(self) -> int:
        return self._heard & ~self.twins.undecided(self.step)

    def _give(self, i: int) -> None:
        """Give a worker the newest order, if it is free and has not answered it."""
        rank = self.ranks[i]
        if rank == self._own or self._newest is None or not self.open:
            return
        if (self._heard | self._bad) >> i & 1 or not self.server.free(rank):
            return
        if not self._knows_row >> i & 1:
            frame = self.server.frame()
            self._layout.write_order(frame, self.step, self.rows[i], (), restored=self._restored, flags=ROW)
            self.server.also(rank, frame)
            self.server.drop(frame)
            self._knows_row |= 1 << i
        if not self._moves:
            self.server.order(rank, self._newest)
        elif (missed := self.moves.since(self._has[i], self.step)) is None:
            self.server.order(rank, self._whole_order(self._newest))
        else:
            for frame in missed:
                self.server.also(rank, frame, self._layout.move_order_nbytes)
            self.server.order(rank, self._newest, self._layout.move_order_nbytes)
        self._has[i] = self.step

    def _whole_order(self, newest: Frame) -> Frame:
        if self._whole is None:
            self._whole = self.server.frame()
            self.moves.write_whole(self._whole, self.step, self._layout.order_extras_of(newest), restored=self._restored)
        return self._whole

    def _take_answer(self, i: int, frame: Frame) -> None:
        if self._layout.restored_of(frame) != self._restored % 256:
            return  # of an order from before
        step, (flags, said) = self._layout.step_of(frame), self._layout.read_answer(frame)
        if self.ranks[i] != self._own:
            self.received_nbytes += self._layout.answer_nbytes_of(flags)
        in_time = self.open and step == self.step
        self.late += not in_time
        self.lateness.arrived(step, i, self.server.now())
        if flags & NOT_FINITE:
            self.not_finite += 1
            self._bad |= in_time << i
            return
        if flags & WHOLE:
            self.rows[i] = self._layout.whole_of(frame)
        elif self._codec is not None:
            self._codec.add(self._layout.compressed_of(frame)[None], self.rows[i])
        if in_time:
            if not self._heard:
                self._computed, self._firsts = self._computed + self.server.now() - self._began, self._firsts + 1
                self.lateness.part_seconds = self._computed / self._firsts / (self.code.s + 1)
            self._extra_rows[i] = self._layout.answer_extras_of(frame)
            self._heard |= 1 << i
        for dispute in self.twins.note(i, step, said):
            self._settle(dispute)

    def _settle(self, dispute: Dispute) -> None:
        """Say who is wrong, or raise where nobody knows."""
        wrong, right = (ranks_text(self.ranks[j] for j in side) for side in (dispute.wrong, dispute.right))
        first = max(self.twins.wrong[j] for j in dispute.wrong) == 1
        if dispute.decided:
            text = (f"{wrong} computed another sum than {right} of the same parts in step {dispute.step}, which is not used")
            if dispute.step == self.step:
                self._heard &= ~mask_of(dispute.wrong)
                self._bad |= mask_of(dispute.wrong)
        else:
            text = (f"{wrong} and {right} computed different sums of the same parts in step {dispute.step}, and no majority "
                    "tells which is wrong; compute them from (seed, step, part) alone, dropout and batches included; where "
                    "processors differ take twins='warn'")
            if self._raises:
                raise DisagreementError(f"{self._subject}: {text}")
        if first:
            say(sys.stderr, f"mpi-ef: {self._subject}: {text}\n")

    def _decode(self) -> Decoded:
        mask = self._usable()
        approximate = not self.code.decodable(mask, self.n)
        a = self.code.approximate(mask, self.n) if approximate else self.code.decode(mask, self.n)
        used = sorted((i for i in range(self.n) if a[i]), key=lambda i: self.code.place(i, self.n))
        self._add_up(a, used, self._sum)
        if self._codec is None and isinstance(self.code, Cyclic) and mask.bit_count() > self.n - self.code.s:
            self._check_parity(mask)
        return Decoded(self._sum, a[used] @ self._extra_rows[used], self.step, tuple(sorted(used)), approximate)

    def _add_up(self, a: NDArray[np.float64], used: Sequence[int], out: Vector) -> None:
        """Add rows up in this order, without memory of their size."""
        out[:] = 0
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asked for the sum looks at it
            for i in used:
                if a[i] == 1.0:
                    np.add(out, self.rows[i], out=out)
                else:
                    np.multiply(self.rows[i], out.dtype.type(a[i]), out=self._spare)
                    np.add(out, self._spare, out=out)

    def _check_parity(self, mask: int) -> None:
        """Compare answers beyond those that are needed with the others."""
        there = members(mask)
        zero = np.zeros(self.n)
        zero[there] = np.linalg.svd(self.code.matrix(self.n)[there].T)[2][-1]
        keep = self._sum.copy()
        self._add_up(zero, there, self._sum)
        size = max(float(np.linalg.norm(self.rows[i])) for i in there)
        self.parity = max(self.parity, float(np.linalg.norm(self._sum)) / size if size else 0.0)
        self._sum[:] = keep

    def _silence(self) -> SilenceError | NonFiniteError | DisagreementError:
        """Return the error where too few have answered."""
        here = f"{self._usable().bit_count()} of {self.n} are here"
        needed = self.code.needed(self.n)
        waiting = [rank for rank, step in self.server.under_way.items() if not self._answered(rank)]
        if self._bad and not waiting:
            ranks = tuple(self.ranks[i] for i in members(self._bad))
            return NonFiniteError(f"{self._subject}: {ranks_text(ranks)} sent NaN or Inf, or what twins did not, in step "
                                  f"{self.step}; {needed}, {here}; take a smaller learning rate, or look for the NaN", ranks)
        missing = [rank for rank in self.ranks if not self._answered(rank)]
        if not missing:
            return DisagreementError(f"{self._subject}: too few workers agree at step {self.step}; {needed}, {here}; look "
                                     f"for what makes {sorted(self.twins.wrong)} compute something else")
        ended = [rank for rank in missing if rank in self.server.ended]
        silent = [rank for rank in missing if rank not in self.server.ended]
        why = [f"{self.server.listed(silent)} silent for {self.server.patience_seconds:g} s"] if silent else []
        why += [f"{self.server.listed(ended)} ended before"] if ended else []
        return SilenceError(f"{self._subject}: {', '.join(why)}, at step {self.step}; {needed}, {here}; start again without "
                            "them, from what was saved", tuple(missing))

    def _answered(self, rank: int) -> bool:
        return bool((self._heard | self._bad) >> self._number[rank] & 1)
