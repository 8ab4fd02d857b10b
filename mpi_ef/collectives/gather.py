"""The gathered mean."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Source
from mpi_ef.compress.combination import Vector, writable

from .combine import Combine
from .exchange import Round
from .plan import Plan, Traffic
from .turns import Turns

__all__ = ["GatherMean"]


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
        self._turns = Turns(lambda: self.frames(self.size, self._codec.nbytes))
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
