"""Vectors from every rank to every other, of which each rank awaits some: all but a few may be silent, late, or lie."""

import atexit
import sys
from collections.abc import Iterator
from socket import gethostname
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.consensus import OnAllRanks, SharedErrors, agree, check_not_freed
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import DtypeError, NonFiniteError, OptionError, SilenceError, briefly, counted, say
from mpi_ef.ranges import whole, within
from mpi_ef.runtime.ending import end_without_all
from mpi_ef.runtime.world import check_alone

from .late import LONGEST_NBYTES, Frame, Late, next_number
from .misfit import misfit
from .peer import NONE, Peer, listed

__all__ = ["Heard", "Peers", "usable"]

_LONGEST_LOOK = 0.1  # seconds between two looks that count as waiting: a rank that was stopped itself has not waited
_FAILED = 2**62  # less in the step of a final message of a rank that takes nothing any more

Vector = NDArray[Any]


class Heard(NamedTuple):
    """What :meth:`Peers.exchange` returns.

    Attributes
    ----------
    rows : (m, d)
        Vectors, in the order of their ranks. They stay until the next exchange.
    ranks : tuple of int
        Where they come from.
    own : int
        Which row is that of this rank.
    round : int
        Of which round they are; after a jump the round of the next exchange.
    jumped : bool
        Whether this rank has missed its round: rows are the newest vectors of the others, of several rounds, and its own,
        which is old.
    """

    rows: Vector
    ranks: tuple[int, ...]
    own: int
    round: int
    jumped: bool


class Peers(OnAllRanks, metaclass=SharedErrors):
    """Rounds in which every rank sends a vector to all others and goes on with those of `wait_for` ranks, its own included.

    With n ranks f = n - `wait_for` of them may be wrong: silent, stopped for a while, dead, late, or, with n > 3 f, send
    anything, also different vectors to different ranks. No rank waits for them. Ranks hear different vectors, so that what
    they compute of them differs: for rules that allow it, such as MoNNA.

    A round may be over without a rank that was stopped. It goes on as follows:

    * No vector is sent to a rank whose newest round is more than `window` behind. Whoever speaks and has not been sent the
      newest vector gets it at once, and the next `window`.
    * A rank has missed its round when it has, of `wait_for` - 1 peers, the vector of its round or a later one, of some a
      later one alone, and more than f peers are beyond it. It *jumps* to the round that at least f + 1 peers have reached,
      so that one that does not lie has: :meth:`exchange` returns the newest vectors of all that are as far as it or
      beyond, and the caller goes on from them, for example from their coordinate-wise median, with a momentum of zero.
    * At the end ranks say so with a final message, with their last vector, and answer those that are behind.

    A vector with NaN or Inf, or whose squared norm overflows, is taken for none.

    Construction is collective, :meth:`exchange` is between those ranks that are there. Progress of long messages needs calls
    of MPI: :meth:`progress` in a long computation lets ranks that are behind receive.

    Cost of a round: n - 1 messages of ``8 + d * itemsize`` bytes out and in. Memory: about 3 n vectors; up to
    ``n * (window + 3)`` for peers that are ahead, and ``2 * n * window`` for those that receive nothing.

    Parameters
    ----------
    comm : MPI.Comm
        Any intracommunicator of MPI, or of virtual ranks.
    d, dtype : int, float32 or float64
        Of the vectors, which are NumPy arrays.
    wait_for : int
        From 1 to n. With n all have to be there.
    patience_seconds : float
        So long a rank waits in a round, and in :meth:`close`; and a rank that has said nothing for so long, and is more than
        `window` rounds behind, is named on stderr, once.
    window : int
        By how many rounds ranks may differ before the one behind is left out.
    device : str
        "cpu"; others are refused.

    Attributes
    ----------
    round : int
        Of the next exchange, from 0 on.
    rounds, jumps : int
        How many exchanges have returned, of these how many with a jump.
    late : int
        Vectors of rounds that were over when they came.
    withheld : int
        Vectors that were not sent in their round, as the peer was too far behind.
    not_finite : int
        Vectors taken for none.

    Raises
    ------
    DisagreementError, OptionError, DtypeError, PeerError
        On all ranks, where arguments are wrong or differ.
    """

    saved_by = "what was computed"
    built = "the building of Peers"

    def __init__(self, comm: Comm, d: int, dtype: DTypeLike = np.float32, *, wait_for: int, patience_seconds: float = 300.0,
                 window: int = 4, device: str = "cpu") -> None:
        check_not_freed(comm, "Peers")
        if not hasattr(comm, "Iallgather") or comm.Is_inter():
            raise OptionError(f"Peers: comm={briefly(comm)} is not an intracommunicator; pass for example MPI.COMM_WORLD")
        check_alone(comm)
        self.comm, self.size, self.rank = comm, int(comm.Get_size()), int(comm.Get_rank())

        def facts() -> dict[str, object]:
            if mpi_of(comm) is None and not hasattr(comm, "pause"):
                raise OptionError(f"Peers: comm={briefly(comm)} is none of MPI, where ranks may be silent; pass for example "
                                  "MPI.COMM_WORLD")
            if str(device) != "cpu":
                raise OptionError(f"Peers: device={briefly(device)}: vectors are sent from the host alone; copy them there, "
                                  "and take 'cpu'")
            self.dtype = np.dtype(dtype)
            if self.dtype not in (np.float32, np.float64):
                raise DtypeError(f"Peers: dtype={self.dtype} is neither float32 nor float64; convert the vectors")
            self.d = whole("Peers", 1, "take the length of the vectors", d=d, most=LONGEST_NBYTES // self.dtype.itemsize)
            self.wait_for = whole("Peers", 1, f"with f wrong ones of {self.size} ranks it is {self.size} - f",
                                  wait_for=wait_for, most=self.size)
            self.window = whole("Peers", 1, "4 is usual", window=window)
            within("Peers", "(0, inf)", "300 is usual", patience_seconds=patience_seconds)
            self.patience_seconds = float(patience_seconds)
            return {"d": self.d, "dtype": self.dtype, "wait_for": self.wait_for, "window": self.window}

        said = agree(comm, "Peers", facts, "build them from the same arguments everywhere", call=self.built,
                     value=(next_number(), getattr(comm, "node_name", None) or gethostname()))
        others = [rank for rank in range(self.size) if rank != self.rank]
        nbytes = self.d * self.dtype.itemsize
        self._late = Late(comm, others, nbytes, nbytes, number=said[0][0])  # of rank 0, which has all of this communicator
        self._peers = {rank: Peer(rank, said[rank][1], self._late) for rank in others}
        self._rows = np.zeros((self.size, self.d), self.dtype)
        self._mine = self._late.frame()  # the newest vector of this rank, as it is sent
        self._sent = NONE  # its round
        self._over = self._closed = False
        self._waits_for: set[int] = set()  # for whom MPI would wait at its end
        self.round = self.rounds = self.jumps = self.late = self.withheld = self.not_finite = 0

    @property
    def silent(self) -> tuple[int, ...]:
        """The ranks that were named as silent and have said nothing since."""
        return tuple(peer.rank for peer in self._peers.values() if peer.silent)

    @property
    def waits(self) -> bool:
        """Whether the vector of this round was sent, and the round is not over: after `SilenceError`."""
        return not self._over and self._sent == self.round

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank so far."""
        return self._late.sent_nbytes

    @property
    def metrics(self) -> dict[str, int]:
        """How many rounds, jumps, late, withheld and non-finite vectors there were, and silent ranks there are."""
        return {"rounds": self.rounds, "jumps": self.jumps, "late": self.late, "withheld": self.withheld,
                "not_finite": self.not_finite, "silent": len(self.silent)}

    def exchange(self, x: Vector) -> Heard:
        """Send `x`, (d,), to all others, and return the vectors of this round: `wait_for` of them, or more that have come.

        After a jump the caller makes a vector of what is returned, and the next exchange is one of :attr:`round`: programs
        go on ``while peers.round < rounds`` and do not count their calls.

        Raises
        ------
        ShapeError, DtypeError, NonFiniteError
            `x` does not fit, or is not finite. Nothing was sent: call it again with another one, others may wait.
        SilenceError
            Fewer have spoken for `patience_seconds`. To wait longer, call it again with the same `x`.
        """
        if self._closed or self._over:
            raise OptionError("Peers: this rank has closed them; build new ones on all ranks")
        if problem := misfit(x, self.d, self.dtype, "Peers", "x"):
            raise problem
        if not usable(x):
            error = NonFiniteError(f"Peers: x of rank {self.rank} is not finite, or its norm is not; nothing was sent in "
                                   f"round {self.round}, for which others may wait: pass another vector", (self.rank,))
            error.everywhere = False
            raise error
        if not self.waits:
            self.withheld += sum(peer.told < self._sent for peer in self._peers.values())
            self._send(x.view(np.uint8), self.round, self.round)
        for _ in self._looks(self.patience_seconds):
            if (heard := self._complete() or self._jump()) is not None:
                self.rounds += 1
                self._name_silent()
                return heard
            ended = sum(peer.ended and peer.round < self.round for peer in self._peers.values())
            if ended > self.size - self.wait_for:
                break
        raise self._silence()

    def progress(self) -> None:
        """Take what has come, and answer; does not wait. Local, for long computations between exchanges."""
        if not self._closed:
            self._look()

    def close(self, patience_seconds: float | None = None) -> tuple[int, ...]:
        """Send the final message, and answer those that are behind until all have sent theirs, or patience is over.

        Returns
        -------
        tuple of int
            Ranks that have not ended. MPI_Finalize would wait for them: at the end of Python this process goes through
            :meth:`leave`.
        """
        if not self._closed:
            self._end(_final(self._sent))
            for _ in self._looks(self.patience_seconds if patience_seconds is None else patience_seconds):
                if all(peer.failed or peer.rank in self._late.gone or (peer.ended and not self._late.under_way(peer.rank))
                       for peer in self._peers.values()):
                    break
            self._closed = True
            self._late.close()
            self._leave_later(left := [peer for peer in self._peers.values() if peer.failed or not peer.ended])
            if left:
                say(sys.stderr, f"mpi-ef: Peers: {listed(left)} did not end with rank {self.rank} after round "
                                f"{self._sent - 1}; MPI_Finalize would wait for ever, so that all processes are ended when "
                                "those that are there have come to their end\n")
        return tuple(sorted(self._waits_for))

    def leave(self, status: int = 1) -> None:
        """End all processes, where MPI_Finalize would wait for ranks that have not ended; where all have, return.

        What this rank wanted to save is saved before. Ranks that are there wait for each other, as long as their patience
        is, and abort then. It is called at the end of Python with status 1.
        """
        atexit.unregister(self.leave)
        if (mpi := mpi_of(self.comm)) is None or not self._waits_for or mpi.Is_finalized():
            return
        self._late.meet([rank for rank in self._peers if rank not in self._waits_for], self.patience_seconds)
        end_without_all(mpi.COMM_WORLD, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it; after an error let the others know that this rank ends here, and wait for none."""
        if kind is None:
            self.close()
        elif not self._closed:
            for peer in self._peers.values():
                peer.asks = True  # nobody will be answered later
            self._end(_final(self._sent) - _FAILED)

    def _end(self, step: int) -> None:
        """Send the final message."""
        if not self._over:
            self._over = True
            self._send(self._mine.wire, step, self._sent + 1)

    def _send(self, wire: NDArray[np.uint8], step: int, number: int) -> None:
        """Let a vector be the newest one, and send it to those that are not too far behind."""
        frame = self._late.frame()
        frame.wire[:] = wire
        frame.step, self._sent = step, number
        self._late.drop(self._mine)
        self._mine = frame
        for peer in self._peers.values():
            self._tell(peer)

    def _tell(self, peer: Peer) -> None:
        """Send the newest vector to a peer that has not been sent it, if it may be."""
        behind = self._sent - peer.reaches > self.window
        full = self._late.under_way(peer.rank) >= 2 * self.window
        if peer.told < self._sent and (peer.asks or not behind) and not full:
            self._late.send(peer.rank, self._mine)
            peer.told, peer.asks = self._sent, False
            if behind:
                peer.reaches = self._sent  # where it is going to jump; it gets the next ones too

    def _looks(self, patience: float) -> Iterator[None]:
        """Yield after each look at what has come, until it has taken so many seconds."""
        waited, before = 0.0, self._late.now()
        while True:
            something = self._look()
            yield
            if waited > patience:
                return
            if not something:
                self._late.rest()
            now = self._late.now()
            took, before = now - before, now
            waited += min(took, _LONGEST_LOOK)
            for peer in self._peers.values() if took > _LONGEST_LOOK else ():  # nor was a peer silent while nobody looked
                peer.heard += took - _LONGEST_LOOK

    def _look(self) -> bool:
        """Take what has come, and send what is wanted; tell whether anything has come."""
        arrived = self._late.poll()
        for rank, frame in arrived:
            self._take(self._peers[rank], frame)
        for peer in self._peers.values():
            self._tell(peer)
        return bool(arrived)

    def _take(self, peer: Peer, frame: Frame) -> None:
        """Note what a message says, and keep its vector."""
        step = frame.step
        peer.ended, peer.failed = step < 0, step < -_FAILED
        step += _FAILED * peer.failed
        peer.round = peer.reaches = _final(step) if peer.ended else step
        peer.heard, peer.silent, peer.asks = self._late.now(), False, True
        if not usable(frame.wire.view(self.dtype)):
            self.not_finite += 1
            self._late.drop(frame)
            return
        self.late += peer.round < self.round and not peer.ended
        peer.keep(frame, self.round, self.round + self.window)

    def _enter(self, number: int) -> None:
        """Go on with another round."""
        self.round = number
        for peer in self._peers.values():
            peer.enter(number, number + self.window)

    def _complete(self) -> Heard | None:
        """Return the vectors of this round, when enough have come."""
        number, there = self.round, [peer for peer in self._peers.values() if self.round in peer.frames]
        if len(there) + 1 < self.wait_for:
            return None
        heard = self._heard({peer.rank: peer.frames[number] for peer in there}, number, jumped=False)
        self._enter(number + 1)
        return heard

    def _jump(self) -> Heard | None:
        """Return the newest vectors, where this rank has missed its round."""
        awaited, number = self.wait_for - 1, self.round
        there = [peer for peer in self._peers.values() if number in peer.frames]
        ahead = [peer for peer in self._peers.values() if peer.round > number]
        lost = [peer for peer in ahead if number not in peer.frames]
        sure = min(self.size - self.wait_for + 1, awaited)  # so many that not all of them lie, with n > 3 f
        if len(there) + len(lost) < awaited or len(ahead) < sure:
            return None
        self.jumps += 1
        newest = {peer.rank: peer.newest for peer in (*there, *lost) if peer.newest is not None
                  and peer.newest_round >= number}
        self._enter(sorted((peer.round for peer in ahead), reverse=True)[sure - 1])
        return self._heard(newest, self.round, jumped=True)

    def _heard(self, frames: dict[int, Frame], number: int, *, jumped: bool) -> Heard:
        frames[self.rank] = self._mine
        ranks = tuple(sorted(frames))
        for row, rank in zip(self._rows, ranks, strict=False):
            row[:] = frames[rank].wire.view(self.dtype)
        return Heard(self._rows[: len(ranks)], ranks, ranks.index(self.rank), number, jumped)

    def _name_silent(self) -> None:
        """Say on stderr which peers have said nothing for long, each once."""
        now = self._late.now()
        silent = [peer for peer in self._peers.values() if not peer.ended and self.round - peer.round > self.window
                  and now - peer.heard > self.patience_seconds]
        new = [peer for peer in silent if not peer.named]
        for peer in silent:
            peer.silent = peer.named = True
        if new:
            say(sys.stderr, f"mpi-ef: Peers: {listed(new)} said nothing for {self.patience_seconds:g} s, in round "
                            f"{self.round} of rank {self.rank}, which goes on with the others\n")

    def _silence(self) -> SilenceError:
        """Return the error where too few have spoken."""
        missing = [peer for peer in self._peers.values() if self.round not in peer.frames and peer.round <= self.round]
        ended = [peer for peer in missing if peer.ended]
        silent = [peer for peer in missing if not peer.ended]
        for peer in silent:
            peer.silent = peer.named = True
        there = 1 + sum(self.round in peer.frames for peer in self._peers.values())
        why = [f"no vector of {listed(silent)} for {self.patience_seconds:g} s"] if silent else []
        why += [f"{listed(ended)} ended before"] if ended else []
        todo = "start again without them, from what was saved"
        if not silent and self.jumps:
            todo = f"{counted(self.jumps, 'jump')} left rounds out: take steps while peers.round is below theirs at the end"
        self._leave_later(silent)
        return SilenceError(f"Peers: rank {self.rank} has {there} of the {self.wait_for} vectors awaited in round "
                            f"{self.round}: {', '.join(why)}; {todo}",
                            tuple(peer.rank for peer in missing))

    def _leave_later(self, left: list[Peer]) -> None:
        """Let the process end as :meth:`leave` does, at the end of Python, where peers are left for whom MPI would wait."""
        self._waits_for = {peer.rank for peer in left}
        atexit.unregister(self.leave)
        if left:
            atexit.register(self.leave)


def _final(number: int) -> int:
    """Return the step of a final message after a round, or the round of one with such a step."""
    return NONE - 1 - number


def usable(vector: Vector) -> bool:
    """Tell whether the squared norm of a vector is a number of its dtype."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.dot(vector, vector)))
