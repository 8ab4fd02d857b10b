"""The mean through owners of chunks."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Chunks, Compressor, Keep, Source, lazy, source
from mpi_ef.compress.combination import Vector
from mpi_ef.compress.compressor import check_compressor
from mpi_ef.statetree import PER_RANK, Leaf, Reshard

from .combine import Combine
from .exchange import Round
from .frames import Frames
from .plan import Plan, Traffic
from .turns import Turns

__all__ = ["TwoPhaseMean", "chunk_bounds", "growth"]

_ALIGNED = 64


def chunk_bounds(d: int, n: int) -> list[int]:
    """Return n + 1 bounds that cut d entries into n chunks in order, whose sizes differ by at most one."""
    return [r * (d // n) + min(r, d % n) for r in range(n + 1)]


def _aligned_chunk_bounds(d: int, n: int) -> list[int]:
    """Return n + 1 bounds, for long vectors at multiples of 64 entries, where cache lines and sign words begin."""
    if d // n < 16 * _ALIGNED:
        return chunk_bounds(d, n)
    return [*(r * d // n // _ALIGNED * _ALIGNED for r in range(n)), d]


# By how much the answer to sparse messages is larger than one, up to 16 ranks and on more: n of them have up to n times as
# many entries together, and what an answer of their size leaves behind (95 % of the squared norm on 8 ranks) slows training.
_GROWTH = 4, 8
_HEADER_NBYTES = 8


def growth(n: int) -> int:
    """Return by how much the answer to sparse messages of n ranks is larger than one."""
    return min(n, _GROWTH[n > 16])


class TwoPhaseMean(Plan, kind="two-phase"):
    """Mean of compressed vectors by scatter and gather of chunks: the cost does not grow with n. For dense messages.

    1. Cut x into n chunks, encode each; alltoall: chunk j travels to rank j.
    2. Rank j averages the n decoded chunks in rank order and adds its residual: a = mean_r C(x_r)_j + residual.
    3. Rank j encodes a, keeps ``residual = a - C'(a)`` for the next exchange, and all ranks gather the C'(a).

    :meth:`add_own` adds the first-phase message of this rank, :meth:`add_mean` the second-phase result. The sums agree
    up to what is in the residuals: ``sum_t mean_t + residual_T = sum_t mean_r C(x_r,t)`` over exchanges t.

    This is `compressed_allreduce` of 1-bit Adam (Tang et al. 2021, arXiv 2102.02888) for any compressor.
    Cost per exchange: ``2 (n - 1)`` frames of a chunk sent and as many received.
    Other parameters, attributes and errors: see :class:`Plan`.

    Parameters
    ----------
    reply : Compressor, optional
        C', the compressor of the second phase. By default the same as the first, but for sparse ones: TopK of
        ``min(n, 4)``, from 17 ranks on 8, times the entries, because n messages have up to n times as many together.
    residual : bool
        False forgets the error of the second phase: the plan is then without state from one exchange to the next.
    combine : Combine, optional
        What to take in place of the mean, entry by entry; n vectors of the length of a chunk then.
    """

    keeps, goes_on = "residual", True

    @classmethod
    def pays(cls, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike) -> bool:
        """Tell whether sparse messages are fewer bytes through this plan than gathered. Local, alike on all ranks."""
        n = int(comm.Get_size()) if hasattr(comm, "Get_size") else 1
        try:
            if type(compressor).grown is Compressor.grown:  # nothing is known to answer its messages with
                return False
            start, stop = chunk_bounds(d, n)[:2]
            whole = _HEADER_NBYTES + compressor.wire_nbytes(d, dtype)
            chunk = _HEADER_NBYTES + compressor.part(start, stop, d).wire_nbytes(stop - start, dtype)
        except Exception:
            return False  # arguments are wrong, which any plan tells all ranks
        return (n - 1) * whole > (1 + growth(n)) * n * chunk

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *,
                 reply: Compressor | None = None, residual: bool = True, combine: Combine | None = None,
                 device: str = "cpu") -> None:
        self.reply = compressor if reply is None else reply
        self._grows, self._remember, self.combine = reply is None, residual, combine
        super().__init__(comm, compressor, d, dtype, device=device)

    def bind(self) -> dict[str, object]:
        """Build codecs and buffers, see :meth:`Plan.bind`."""
        if self._grows:
            self.reply = self.compressor.grown(growth(self.size), self.d)
        check_compressor("TwoPhaseMean", "TopK(0.1), or None for that of the first phase", reply=self.reply)
        Combine.check("TwoPhaseMean", combine := self.combine)
        self.bounds = _aligned_chunk_bounds(self.d, self.size)
        self._chunks = list(pairwise(self.bounds))
        self._outward = Chunks(self.compressor, self.bounds, self.dtype, self.device)
        self._back = Chunks(self.reply, self.bounds, self.dtype, self.device)
        self._send, self._arrived = (self.frames(self.size, self._outward.nbytes) for _ in range(2))
        self._answer = self.frames(1, self._back.nbytes)
        self._turns = Turns(lambda: self._replies(self.frames(self.size, self._back.nbytes)))
        self._send_rows = self._outward.rows(self._send.wires)
        outward, back = self._outward.codecs[self.rank], self._back.codecs[self.rank]
        self._arrived_wires = self._arrived.wires[:, : outward.nbytes]
        self._answer_wire = self._answer.wire(0, back)
        chunk = outward.d
        self._fused = self._remember and combine is None and back.can_encode_sum(outward)
        self._average = self._kernels.zeros(0 if self._fused else chunk)
        self._residual, self._next = (self._kernels.zeros(chunk if self._remember else 0) for _ in range(2))
        self._owed, self._owed_next = (
            source(x := lazy(old), Keep(x, new, less_message=True))
            for old, new in ((self._residual, self._next), (self._next, self._residual))
        )
        return {"reply": self.reply, "residual": self._remember, "combine": combine}

    def like(self, compressor: Compressor) -> Plan:
        """Return a plan of the same kind, see :meth:`Plan.like`. Collective."""
        if self.combine is None:
            return super().like(compressor)
        return TwoPhaseMean(self.comm, compressor, self.d, self.dtype, combine=self.combine, device=self.device)

    def encode(self, x: Source, *, split: bool) -> bool:  # noqa: ARG002
        """Encode every chunk of `x`, see :meth:`Plan.encode`."""
        self._turns.prepare()
        return self._outward.encode(x, self._send_rows, step=2 * self.exchanges, rank=self.rank)

    def communicate(self) -> Iterator[Round]:
        """Scatter chunks, and gather their means, see :meth:`Plan.communicate`."""
        yield Round(self._send, self._arrived, scatter=True)
        with self._encoding:
            finite = self._encode_average()
        yield Round(self._answer, self._turns.next()[0], finite=finite)
        self._turn()  # only now: a rank whose average overflowed makes all ranks raise, with nothing changed

    def _encode_average(self) -> bool:
        """Encode residual + average, keep as the next residual what that message misses, and tell whether it is finite."""
        outward, back = self._outward.codecs[self.rank], self._back.codecs[self.rank]
        arrived, wire = self._arrived_wires, self._answer_wire
        if self._fused:
            return back.encode_sum(outward, arrived, 1.0 / self.size, self._owed, wire)
        if self.combine is None:
            outward.add(arrived, self._average, 1.0 / self.size, overwrite=True)
        else:
            self._average[:] = self.combine.of_wires(outward, arrived, self._kernels)
        x, keep = lazy(self._average), None
        if self._remember:
            x = lazy(self._residual) + self._average
            keep = Keep(x, self._next, less_message=True)
        return back.encode(source(x, keep), wire, step=2 * self.exchanges + 1, rank=self.rank)

    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add or write ``scale`` times the second-phase result, or ``scale * C(x_r)``, see :meth:`Plan.decode`."""
        if not own:
            self._back.add(self._turns.now[1], out, scale, overwrite=overwrite)
        elif overwrite:
            self._outward.add(self._send_rows, out, scale, overwrite=True)
        else:
            self._outward.add_encoded(self._send_rows, out, scale)

    def _replies(self, frames: Frames) -> tuple[Frames, Any]:
        """Return frames of all ranks, and the replies in them, one for each chunk."""
        return frames, self._back.rows(frames.wires)

    def forget(self) -> None:
        """Forget what :meth:`set_mean` has written, see :meth:`Plan.forget`."""
        self._turns.forget()

    def set_mean(self, out: Vector, scale: float = 1.0, *, again: bool = False) -> None:
        """Overwrite `out` with ``scale`` times the second-phase result, see :meth:`Plan.set_mean`."""
        if not again or not self.reply.sparse:
            super().set_mean(out, scale)
            return
        out = self._kernels.array(out)
        if self._turns.follows(out):
            with self._decoding:
                self._back.clear(self._turns.before[1], out)
        else:
            out.fill(0)
        self.add_mean(out, scale)

    @property
    def alpha(self) -> float:
        """Contraction constant of the first phase: the least over the chunks."""
        return min(self.compressor.part(start, stop, self.d).alpha(stop - start) for start, stop in self._chunks)

    @property
    def traffic(self) -> Traffic:
        """Bytes of one exchange."""
        nbytes = (self.size - 1) * (self._send.frame_nbytes + self._answer.frame_nbytes)
        return Traffic.both_ways(nbytes, self.size, self.d * self.dtype.itemsize)

    @property
    def scattered_nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the first phase."""
        return (self.size - 1) * self._send.frame_nbytes

    def undo(self) -> None:
        """Remember the residual from before the last exchange, see :meth:`Plan.undo`."""
        self._turn()

    def _turn(self) -> None:
        self._residual, self._next = self._next, self._residual
        self._owed, self._owed_next = self._owed_next, self._owed

    def leaves(self) -> dict[str, Leaf]:
        """Return the residual of this rank's chunk, (chunk,) of the plan's dtype; nothing without a residual.

        The residuals of all chunks are one vector, cut again for other ranks.
        """
        start, stop = self._chunks[self.rank]
        cut = Reshard("cut", start=start, stop=stop)
        return {"residual": Leaf(PER_RANK, self._residual, reshard=cut, default=0)} if self._remember else {}
