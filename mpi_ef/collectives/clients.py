"""A mean over clients: several of them on every rank, some of which may keep silent."""

from collections.abc import Iterator
from typing import Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Combination, Compressor, Keep, Source
from mpi_ef.compress.combination import Vector
from mpi_ef.compress.compressor import words
from mpi_ef.errors import MpiEfError, OptionError, ShapeError, briefly
from mpi_ef.statetree import Reshard

from .exchange import Round, Timer
from .frames import Frames, Twin
from .plan import LinkTraffic, Plan, Traffic
from .two_phase import chunk_bounds

__all__ = ["ClientsMean"]


class ClientsMean(Plan):
    """Mean of the compressed vectors of many clients by one allgather. The result does not depend on which rank has which.

    Federated and simulated workers: 1000 clients on 2 ranks, or on 7. Rank r carries a run of consecutive clients, whose
    vectors lie one after the other in one array; what every client does is a function of its number alone, sums go
    through the clients in order, and so results are the same bits on any number of ranks.

    1. Encode the vectors of this rank's clients that participate.
    2. Allgather the status of every rank, and for each client whether it participates, and its tag.
    3. Allgather the messages; those of one rank travel together.

    Cost per exchange: two collectives; every rank receives all messages; memory for all of them.
    Other parameters, attributes and errors: see :class:`Plan`.

    Parameters
    ----------
    clients : int
        n, at least one per rank.
    weights : (n,) float, optional
        The mean is ``sum_i weights[i] * C(x_i)``; 1 / n by default.

    Attributes
    ----------
    first, own : int
        This rank carries the clients ``first ... first + own - 1``.
    tags : (n,) uint8
        What the clients have noted in the last exchange.
    message_nbytes : int
        Bytes of all messages of all clients so far, without headers: what the papers plot, with the indices.
    """

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *, clients: int,
                 weights: NDArray[np.floating] | None = None, device: str = "cpu") -> None:
        self._wanted, self.weights, self.message_nbytes, self._last_nbytes = clients, weights, 0, 0
        super().__init__(comm, compressor, d, dtype, device=device)

    def bind(self) -> dict[str, object]:
        """Build codecs and buffers, see :meth:`Plan.bind`."""
        n = self._wanted
        if not isinstance(n, int | np.integer) or n < self.size:
            raise OptionError(f"ClientsMean: clients={briefly(n)} on {self.size} ranks; every rank carries at least one "
                              "client")
        if self.weights is not None:
            try:
                self.weights = np.asarray(self.weights, np.float64)
            except (TypeError, ValueError, OverflowError) as error:
                raise OptionError(f"ClientsMean: weights={briefly(self.weights)}; pass one finite number a "
                                  "client") from error
            if self.weights.shape != (n,) or not np.isfinite(self.weights).all():
                raise OptionError(f"ClientsMean: weights of shape {self.weights.shape}; pass one finite number a client")
        self.clients, bounds = int(n), chunk_bounds(n, self.size)
        self._counts = np.diff(bounds)
        self.first, self.own = bounds[self.rank], int(self._counts[self.rank])
        self._codec = self.compressor.codec_on(self.device, self.d, self.dtype)
        nbytes = self._codec.nbytes
        self._sent, self._arrived = (Twin(self._kernels, rows * nbytes, np.uint8, direct=self._direct)
                                     for rows in (self.own, n))
        self._send, self._received = (twin.there.reshape(rows, nbytes)
                                      for twin, rows in ((self._sent, self.own), (self._arrived, n)))
        most = words(int(self._counts.max()))
        self._word, self._words = Frames(1, most), Frames(self.size, most)
        self._participates, self._tags = np.ones(self.own, np.bool_), np.zeros(self.own, np.uint8)
        self._participants = np.arange(n)
        self.tags: NDArray[np.uint8] = np.zeros(n, np.uint8)
        return {"clients": n, "weights": None if self.weights is None else self.weights.tolist()}

    def exchange(self, x: Vector | Combination, *, keep: Keep | None = None, participates: NDArray[np.bool_] | None = None,
                 tags: NDArray[np.uint8] | None = None) -> Self:
        """Send the messages of this rank's clients and receive those of all. Collective.

        Parameters
        ----------
        x : (own * d,) of the plan's dtype, contiguous, the vectors of this rank's clients; or a combination of such vectors
        keep : Keep, optional
            Not together with `participates`.
        participates : (own,) bool, optional
            Which clients send a message; the message of the others is zero and costs nothing.
        tags : (own,) uint8 below 128, optional
            A small number of every client that all ranks learn: :attr:`tags`.

        Raises
        ------
        As :meth:`Plan.exchange`.
        """
        self._participates = np.ones(self.own, np.bool_) if participates is None else np.asarray(participates, np.bool_)
        self._tags = np.zeros(self.own, np.uint8) if tags is None else np.asarray(tags, np.uint8)
        return super().exchange(x, keep=keep)

    def start(self, x: Vector | Combination, *, keep: Keep | None = None) -> None:
        """Encode `x`, all clients speaking; messages travel in :meth:`wait`. See :meth:`Plan.start`."""
        self._participates, self._tags = np.ones(self.own, np.bool_), np.zeros(self.own, np.uint8)
        super().start(x, keep=keep)

    def _sent_last(self) -> int:
        return self._last_nbytes

    def compress(self, x: Vector, *, into: Vector) -> None:
        """Overwrite `into`, (own * d,), with the decoded messages for `x`, (own * d,), without sending any. Local.

        `into` may be `x`.
        """
        x, into = x.reshape(self.own, self.d), into.reshape(self.own, self.d)
        for j in range(self.own):
            self._codec.encode(x[j], self._send[j], step=self.exchanges, rank=self.first + j)
        into.fill(0)
        for j in range(self.own):
            self._codec.add(self._send[j : j + 1], into[j])

    def _problem(self, x: Vector | Combination, keep: Keep | None) -> MpiEfError | None:
        if self._participates.shape != (self.own,) or self._tags.shape != (self.own,):
            return ShapeError(f"ClientsMean.exchange: participates and tags have shapes {self._participates.shape}, "
                              f"{self._tags.shape}; this rank carries {self.own} clients")
        if (self._tags >= 128).any():
            return OptionError(f"ClientsMean.exchange: a tag of {self._tags.max()}; tags are below 128")
        if keep is not None and not self._participates.all():
            return OptionError("ClientsMean.exchange: keep= with clients that do not participate; nothing is kept for those")
        return super()._problem(x, keep)

    def encode(self, x: Source, *, split: bool) -> bool:  # noqa: ARG002
        """Encode the vectors of the clients that participate, see :meth:`Plan.encode`."""
        finite, d = True, self.d
        for row, j in enumerate(np.flatnonzero(self._participates).tolist()):
            part = x.part(j * d, (j + 1) * d)
            finite &= self._codec.encode(part, self._send[row], step=self.exchanges, rank=self.first + j)
        return finite

    def communicate(self) -> Iterator[Round]:
        """Gather which clients participate, then the messages, see :meth:`Plan.communicate`."""
        if self._exchange.refusal is None:  # else the header says all there is to say
            self._word.wires[0, : self.own] = self._participates | self._tags << 1
        yield Round(self._word, self._words)
        said = np.concatenate([word[:count] for word, count in zip(self._words.wires, self._counts, strict=True)])
        participates, self.tags = said & 1 == 1, (said >> 1).astype(np.uint8)
        self._participants = np.flatnonzero(participates)
        stops = np.cumsum(self._counts)
        sums = [participates[stop - m : stop].sum() for stop, m in zip(stops, self._counts, strict=True)]
        nbytes = self._codec.nbytes * np.array(sums)
        places = np.concatenate([[0], np.cumsum(nbytes)[:-1]])
        self._sent.push()
        mine = self._sent.message[: nbytes[self.rank]]
        with Timer(self.seconds, "communicate"):
            self.comm.Allgatherv(mine, [self._arrived.message, (nbytes, places)])
        self._arrived.pull()
        self.message_nbytes += int(nbytes.sum())
        self._last_nbytes = (self.size - 1) * (self._word.frame_nbytes + int(nbytes[self.rank]))

    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add or write ``scale * sum_i weights[i] * C(x_i)`` in the order of the clients, see :meth:`Plan.decode`.

        With `own` every message of this rank's clients is added to its part of `out`, (own * d,).
        """
        d, codec = self.d, self._codec
        if overwrite:
            out.fill(0)
        if own:
            for row, j in enumerate(np.flatnonzero(self._participates).tolist()):
                codec.add(self._send[row : row + 1], out[j * d : (j + 1) * d], scale)
        elif self.weights is None:
            codec.add(self._received[: self._participants.size], out, scale / self.clients)
        else:
            for row, client in enumerate(self._participants.tolist()):
                codec.add(self._received[row : row + 1], out, scale * float(self.weights[client]))

    def add_message(self, client: int, out: Vector, scale: float = 1.0) -> None:
        """Add ``scale`` times the decoded message of `client`, if it spoke, to `out`, (d,). Local."""
        for row in np.flatnonzero(self._participants == client).tolist():
            self._codec.add(self._received[row : row + 1], out, scale)

    def like(self, compressor: Compressor) -> Plan:
        """Return a plan of the same kind, see :meth:`Plan.like`. Collective."""
        return ClientsMean(self.comm, compressor, self.d, self.dtype, clients=self.clients, weights=self.weights,
                           device=self.device)

    @property
    def share(self) -> Reshard | None:
        """Clients move with their number: all their vectors are one, of which this rank gets those of its clients."""
        return Reshard("cut", start=self.first * self.d, stop=(self.first + self.own) * self.d)

    @property
    def all_message_nbytes(self) -> int:
        """Bytes of all messages so far, those through companions included."""
        companions = [plan for plan in self._companions.values() if isinstance(plan, ClientsMean)]
        return self.message_nbytes + sum(plan.message_nbytes for plan in companions)

    @property
    def traffic(self) -> Traffic:
        """Bytes of an exchange in which all clients participate."""
        nbytes, word = self._codec.nbytes, self._word.frame_nbytes
        others = self.clients - self.own
        dense = 2 * (self.size - 1) * self.d * self.dtype.itemsize // self.size
        return Traffic((self.size - 1) * (word + self.own * nbytes), (self.size - 1) * word + others * nbytes, dense)

    @property
    def link_traffic(self) -> LinkTraffic:
        """Bytes on the link of a node of an exchange in which all clients participate."""
        sent, on = self._word.frame_nbytes + self._counts * self._codec.nbytes, np.asarray(self.nodes.numbers)
        crossing = max(int(sent[on != node].sum()) for node in range(self.nodes.count))
        return LinkTraffic.of(self.nodes, crossing, self.d * self.dtype.itemsize)
