"""The compressed plans: gathered mean and two-phase mean."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Keep, Source, lazy, source
from mpi_ef.compress.combination import Vector, writable
from mpi_ef.compress.compressor import Wires, check_compressor
from mpi_ef.statetree import PER_RANK, Leaf, Reshard

from .combine import Combine
from .exchange import Round
from .frames import Frames
from .plan import Plan, Traffic

__all__ = ["GatherMean", "TwoPhaseMean", "chunk_bounds"]

_ALIGNED = 64


def chunk_bounds(d: int, n: int) -> list[int]:
    """Return n + 1 bounds that cut d entries into n chunks in order, whose sizes differ by at most one."""
    return [r * (d // n) + min(r, d % n) for r in range(n + 1)]


def _aligned_chunk_bounds(d: int, n: int) -> list[int]:
    """Return n + 1 bounds, for long vectors at multiples of 64 entries, where cache lines and sign words begin."""
    if d // n < 16 * _ALIGNED:
        return chunk_bounds(d, n)
    return [*(r * d // n // _ALIGNED * _ALIGNED for r in range(n)), d]


class _Turns:
    """Messages of the last exchange and, where :meth:`Plan.set_mean` replaces them entry by entry, of the one before."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build, self.now = build, build()
        self.before: Any = None
        self._written: tuple[Vector, int] | None = None  # what was last written to, after which turn
        self._turn = 0

    def prepare(self) -> None:
        """Take the memory for two of them, if it is wanted: where an exchange can tell all ranks that there is none."""
        if self._written is not None and self.before is None:
            self.before = self._build()

    def next(self) -> Any:
        """Return where the next messages go."""
        self._turn += 1
        if self.before is not None:
            self.now, self.before = self.before, self.now
        return self.now

    def forget(self) -> None:
        self._written = None

    def follows(self, out: Vector) -> bool:
        """Tell whether `out` was last written to, and holds what the messages :attr:`before` say; it is written to now."""
        written, self._written = self._written, (out, self._turn)
        return self.before is not None and written is not None and written[0] is out and written[1] == self._turn - 1


class GatherMean(Plan, kind="gather"):
    """Mean of compressed vectors by one allgather: every rank decodes the messages of all. For sparse messages.

    1. Encode x into one frame.
    2. Allgather the frames.
    3. :meth:`add_mean` adds ``scale / n * C(x_r)`` for r = 0 ... n-1: the mean of exactly what was sent.

    Cost per exchange: ``(n - 1) * frame`` bytes sent and as many received; memory ``(n + 1) * frame``.
    Other parameters, attributes and errors: see :class:`Plan`.

    Parameters
    ----------
    combine : Combine, optional
        What to take in place of the mean; n vectors of memory then.
    """

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *,
                 combine: Combine | None = None, device: str = "cpu") -> None:
        self.combine = combine
        super().__init__(comm, compressor, d, dtype, device=device)

    def bind(self) -> dict[str, object]:
        """Build codecs and buffers, see :meth:`Plan.bind`."""
        Combine.check("GatherMean", self.combine)
        self._codec = self.compressor.codec_on(self.device, self.d, self.dtype)
        self._send = self.frames(1, self._codec.nbytes)
        self._turns = _Turns(lambda: self.frames(self.size, self._codec.nbytes))
        return {"combine": self.combine}

    def like(self, compressor: Compressor) -> Plan:
        """Return a plan of the same kind, see :meth:`Plan.like`. Collective."""
        if self.combine is None:
            return super().like(compressor)
        return GatherMean(self.comm, compressor, self.d, self.dtype, combine=self.combine, device=self.device)

    def encode(self, x: Source, *, split: bool) -> bool:  # noqa: ARG002
        """Encode `x` into one frame, see :meth:`Plan.encode`."""
        self._turns.prepare()
        return self._codec.encode(x, self._send.wires[0], step=self.exchanges, rank=self.rank)

    def communicate(self) -> Iterator[Round]:
        """Gather the frames, see :meth:`Plan.communicate`."""
        yield Round(self._send, self._turns.next())

    def forget(self) -> None:
        """Forget what :meth:`set_mean` has written, see :meth:`Plan.forget`."""
        self._turns.forget()

    def set_mean(self, out: Vector, scale: float = 1.0, *, again: bool = False) -> None:
        """Overwrite `out` with ``scale * mean_r C(x_r)``, see :meth:`Plan.set_mean`."""
        if not again or not self.compressor.sparse or self.combine is not None:
            super().set_mean(out, scale)
            return
        out = self._kernels.array(out)
        if self._turns.follows(out):
            with self._decoding:
                self._codec.clear(self._turns.before.wires, out)
        else:
            out.fill(0)
        self.add_mean(out, scale)

    def add_message(self, rank: int, out: Vector, scale: float = 1.0) -> None:
        """Add ``scale`` times the decoded message of `rank` to `out` (d,). Local."""
        with self._decoding:
            self._codec.add(self._turns.now.wires[rank : rank + 1], self._kernels.array(out), scale)

    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add or write ``scale * C(x_r)``, or ``scale / n * C(x_r)`` for r = 0 ... n-1, see :meth:`Plan.decode`."""
        codec, mine, wires = self._codec, self._send.wires[0], self._turns.now.wires
        if own:
            codec.add_encoded(mine, out, scale)
        elif self.combine is not None:
            if overwrite:
                out.fill(0)
            self._kernels.add_dense(self.combine.of_wires(codec, wires, self._kernels), scale, writable(out))
        elif self.compressor.sparse:  # what is known of the own message saves decoding it
            codec.add(wires[: self.rank], out, scale / self.size, overwrite=overwrite)
            codec.add_encoded(mine, out, scale / self.size)
            codec.add(wires[self.rank + 1 :], out, scale / self.size)
        else:
            codec.add(wires, out, scale / self.size, overwrite=overwrite)

    @property
    def traffic(self) -> Traffic:
        """Bytes of one exchange."""
        nbytes = (self.size - 1) * self._send.frame_nbytes
        return Traffic.both_ways(nbytes, self.size, self.d * self.dtype.itemsize)


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
        C', the compressor of the second phase; the same as the first by default.
    residual : bool
        False forgets the error of the second phase: the plan is then without state from one exchange to the next.
    combine : Combine, optional
        What to take in place of the mean, entry by entry; n vectors of the length of a chunk then.
    """

    keeps = "residual"

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *,
                 reply: Compressor | None = None, residual: bool = True, combine: Combine | None = None,
                 device: str = "cpu") -> None:
        self.reply = compressor if reply is None else reply
        self._remember, self.combine = residual, combine
        super().__init__(comm, compressor, d, dtype, device=device)

    def bind(self) -> dict[str, object]:
        """Build codecs and buffers, see :meth:`Plan.bind`."""
        check_compressor("TwoPhaseMean", "TopK(0.1), or None for that of the first phase", reply=self.reply)
        Combine.check("TwoPhaseMean", combine := self.combine)
        self.bounds = _aligned_chunk_bounds(self.d, self.size)
        self._chunks = list(pairwise(self.bounds))
        sizes = [stop - start for start, stop in self._chunks]
        outward = {size: self.compressor.codec_on(self.device, size, self.dtype) for size in set(sizes)}
        back = {size: self.reply.codec_on(self.device, size, self.dtype) for size in set(sizes)}
        self._outward, self._back = [outward[size] for size in sizes], [back[size] for size in sizes]
        outward_nbytes = max(codec.nbytes for codec in self._outward)
        back_nbytes = max(codec.nbytes for codec in self._back)
        self._send, self._arrived = (self.frames(self.size, outward_nbytes) for _ in range(2))
        self._answer = self.frames(1, back_nbytes)
        self._turns = _Turns(lambda: self._replies(self.frames(self.size, back_nbytes)))
        self._send_wires = [self._send.wire(j, codec) for j, codec in enumerate(self._outward)]
        self._send_parts = [wire[None] for wire in self._send_wires]
        self._arrived_wires = self._arrived.wires[:, : self._outward[self.rank].nbytes]
        self._answer_wire = self._answer.wire(0, self._back[self.rank])
        chunk = sizes[self.rank]
        fits = self._back[self.rank].can_encode_sum(self._outward[self.rank])
        self._fused = self._remember and combine is None and fits
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
        finite = True
        for codec, (start, stop), wire in zip(self._outward, self._chunks, self._send_wires, strict=True):
            finite &= codec.encode(x.part(start, stop), wire, step=2 * self.exchanges, rank=self.rank)
        return finite

    def communicate(self) -> Iterator[Round]:
        """Scatter chunks, and gather their means, see :meth:`Plan.communicate`."""
        yield Round(self._send, self._arrived, scatter=True)
        with self._encoding:
            finite = self._encode_average()
        yield Round(self._answer, self._turns.next()[0], finite=finite)
        self._turn()  # only now: a rank whose average overflowed makes all ranks raise, with nothing changed

    def _encode_average(self) -> bool:
        """Encode residual + average, keep as the next residual what that message misses, and tell whether it is finite."""
        outward, back = self._outward[self.rank], self._back[self.rank]
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
        codecs, wires = (self._outward, self._send_parts) if own else (self._back, self._turns.now[1])
        for codec, (start, stop), wire in zip(codecs, self._chunks, wires, strict=True):
            codec.add(wire, out[start:stop], scale, overwrite=overwrite)

    def _replies(self, frames: Frames) -> tuple[Frames, list[Wires]]:
        """Return frames of all ranks, and the replies in them, one for each chunk."""
        return frames, [frames.wire(j, codec)[None] for j, codec in enumerate(self._back)]

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
                for codec, (start, stop), wire in zip(self._back, self._chunks, self._turns.before[1], strict=True):
                    codec.clear(wire, out[start:stop])
        else:
            out.fill(0)
        self.add_mean(out, scale)

    @property
    def alpha(self) -> float:
        """Contraction constant of the first phase: the least over the chunks."""
        return min(self.compressor.alpha(codec.d) for codec in self._outward)

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
        return {"residual": Leaf(PER_RANK, self._residual, reshard=cut)} if self._remember else {}
