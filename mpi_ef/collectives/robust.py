"""A robust aggregate of the messages of clients, or of what they add up to, in place of a mean."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef import registry
from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, Source
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import NonFiniteError, OptionError, briefly
from mpi_ef.robust import NNM, Aggregation, Aggregator, TrimmedMean
from mpi_ef.robust.aggregation import PARTS
from mpi_ef.statetree import Reshard

from .clients import ClientsMean
from .exchange import Round, Timer
from .onecall import kept_plan
from .plan import Plan
from .two_phase import chunk_bounds

__all__ = ["RobustMean", "robust_mean"]

FEW = 4  # of so many columns one at most has changed where only these are computed


class RobustMean(ClientsMean):
    """What takes the place of the mean of n compressed vectors of which up to f are wrong, by one allgather.

    Messages travel as in :class:`ClientsMean`, and every rank sees those of all. A message with a NaN or Inf in what is
    decoded of it, or of which the squared norm is no finite number of the vectors' dtype, counts as one that was not sent;
    so does one of a vector that is not finite. The exchange goes on while at most f clients are so broken.

    :meth:`add_mean` and :meth:`set_mean` take the aggregate of the messages themselves, those that were sent, with as many
    fewer that may be wrong as are broken; in that of an aggregator that is the mean a broken one is zero, as in
    :class:`ClientsMean`. Of sparse messages that is of little use, as each names other entries: rules such
    as :func:`mpi_ef.feedback.byz_ef21` keep what all messages of a client add up to, its *row*, by :meth:`add_messages`
    and :meth:`aggregate`.

    What it stands is wrong content of messages, not wrong protocol: a rank that does not call hangs all others.
    Cost beyond :class:`ClientsMean`: decoding once more, to see what is broken; the aggregator, see
    :mod:`mpi_ef.robust`; rows, n d, or with `shards` n d / ranks and, in every :meth:`aggregate`, d entries that every rank
    receives, and 64 n^2 numbers.

    Parameters
    ----------
    aggregator : Aggregator or str, optional
        ``NNM(TrimmedMean())`` by default; also as a text.
    f : int
        How many clients may be wrong. It has no default: nobody else can know.
    clients : int, optional
        n, at least one per rank; one per rank by default.
    shards : bool
        Every rank keeps all rows in its share of the columns alone. The bits are the same.

    Attributes
    ----------
    broken : (n,) bool
        Whose message of the last exchange was not one.
    suspicion : (n,) float64
        From 0 to 1: how much each client has been left out the last time, see :class:`mpi_ef.robust.Aggregation`.

    Raises
    ------
    NonFiniteError
        On all ranks, when more than f clients are broken; nothing was changed.
    """

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32,
                 aggregator: Aggregator | str | None = None, *, f: int | None = None, clients: int | None = None,
                 shards: bool = False, device: str = "cpu") -> None:
        self._named = aggregator
        self.shards, self._one_each, self._most = shards, clients is None, f
        super().__init__(comm, compressor, d, dtype, clients=int(comm.Get_size()) if clients is None else clients,
                         device=device)

    def bind(self) -> dict[str, object]:
        """Build codecs and buffers, see :meth:`Plan.bind`."""
        if self.device != "cpu":
            raise OptionError(f"RobustMean: vectors on {self.device}; it takes those of the host alone, pass copies there")
        if not isinstance(self.shards, bool):
            raise OptionError(f"RobustMean: shards={briefly(self.shards)} is no bool; take True or False")
        facts = super().bind()
        n = self.clients
        self.aggregator = aggregator_of(self._named, "RobustMean")
        self.f, bounds = self.aggregator.check(n, self._most, "RobustMean"), chunk_bounds(PARTS, self.size)
        self.is_mean = self.aggregator.is_mean(n, self.f)
        self._parts = [(bounds[r], bounds[r + 1]) if self.shards else (0, PARTS) for r in range(self.size)]
        self._at_work = self._aggregation(self.rank)
        self.columns = self._at_work.columns
        self.width = self.columns.stop - self.columns.start
        starts = [self.d * first // PARTS for first, _ in self._parts]
        self._places = np.diff([*starts, self.d]), np.array(starts)  # of the columns of all ranks, with shards
        self._mine = np.zeros(self.width if self.shards else 0, self.dtype)
        self.sizes = {"rows": n * self.width, "own_if_shards": self.own * self.d * self.shards, "suspects": n + 1}
        self.broken = np.zeros(n, np.bool_)
        self.suspicion = np.zeros(n)
        self._row_of = np.arange(n)
        k = self._codec.k
        self._indices = None if k is None else np.zeros((n, k), np.int64)
        self._values = self._kernels.zeros((1 if k is None else n, self.d if k is None else k))
        self._marks = np.zeros(0 if k is None else self.width, np.bool_)
        self._changed: NDArray[np.int64] | None = None
        self._bare: dict[int, Aggregation] = {}
        self._rows: Any = None
        return facts | {"aggregator": self.aggregator, "f": self.f, "shards": self.shards}

    def _aggregation(self, rank: int, n: int | None = None, f: int | None = None) -> Aggregation:
        return Aggregation(self.aggregator, self.f if f is None else f, self.clients if n is None else n, self.d, self.dtype,
                           parts=self._parts[rank], shared=(self._total, self._added) if self.shards else None)

    def _total(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the parts of all ranks, in order. Collective."""
        size = int(np.prod(mine.shape[1:]))
        counts = np.array([size * (last - first) for first, last in self._parts])
        parts = np.empty((PARTS, *mine.shape[1:]))
        with Timer(self.seconds, "communicate"):
            self.comm.Allgatherv(mine.reshape(-1), [parts.reshape(-1), (counts, np.cumsum(counts) - counts)])
        self.sent_nbytes += (self.size - 1) * mine.nbytes
        return parts

    def _added(self, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sum over the ranks. Collective."""
        everybodys = np.empty((self.size, mine.size), np.int64)
        self.comm.Allgather(mine, everybodys)
        self.sent_nbytes += (self.size - 1) * mine.nbytes
        total: NDArray[np.int64] = everybodys.sum(axis=0)
        return total

    def encode(self, x: Source, *, split: bool) -> bool:  # noqa: ARG002
        """Encode the vectors of the clients that participate and are finite, see :meth:`Plan.encode`."""
        self._participates, row = self._participates.copy(), 0  # which may be the caller's array
        for j in np.flatnonzero(self._participates).tolist():
            part = x.part(j * self.d, (j + 1) * self.d)
            if self._codec.encode(part, self._send[row], step=self.exchanges, rank=self.first + j):
                row += 1
            else:
                self._participates[j] = False
        return True

    def communicate(self) -> Iterator[Round]:
        """Gather the messages, and see which are none, see :meth:`Plan.communicate`."""
        yield from super().communicate()
        with self._decoding:
            self._look()
        self.suspicion[:] = self.broken
        if (count := int(self.broken.sum())) > self.f or count == self.clients:
            who = np.flatnonzero(self.broken)
            ranks = tuple(sorted({int(np.searchsorted(np.cumsum(self._counts), client, side="right")) for client in who}))
            raise NonFiniteError(
                f"RobustMean.exchange: {count} clients, on {ranks_text(ranks)}, sent NaN, Inf or nothing, and f={self.f}; "
                "nothing was changed anywhere, so this step can be skipped", ranks)

    def _look(self) -> None:
        """Decode every message, and note which are broken. Local."""
        most = float(np.sqrt(np.finfo(self.dtype).max))
        self.broken[:] = True
        self._row_of[:] = -1
        for row, client in enumerate(self._participants.tolist()):
            if self._indices is None:
                values = self._values[0]
                self._codec.add(self._received[row : row + 1], values, overwrite=True)
            else:
                values = self._values[row]
                self._codec.entries(self._received[row], self._indices[row], values)
            if self._kernels.norm(values) <= most:  # which no NaN is
                self.broken[client], self._row_of[client] = False, row

    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add or write the aggregate of the messages, or this rank's own, see :meth:`Plan.decode`."""
        if own and self._exchange.is_open:  # what is there now is that of the exchange before
            super().decode(out, scale, own=True, overwrite=overwrite)
            return
        if overwrite and (own or self.is_mean):
            out.fill(0)
        if own:
            for client in range(self.first, self.first + self.own):
                j = client - self.first
                self.add_message(client, out[j * self.d : (j + 1) * self.d], scale)
        elif not self.is_mean:
            self._add_aggregate(out, scale, overwrite=overwrite)
        elif self.broken.any():
            for client in np.flatnonzero(~self.broken).tolist():
                self.add_message(client, out, scale / self.clients)
        else:
            self._codec.add(self._received[: self.clients], out, scale / self.clients)

    def _add_aggregate(self, out: Vector, scale: float, *, overwrite: bool) -> None:
        n, d = self.clients, self.d
        if self._rows is None:
            self._rows = self._kernels.zeros((n + 1, d))
        alive = np.flatnonzero(~self.broken)
        gone = n - alive.size
        if gone not in self._bare:
            self._bare[gone] = Aggregation(self.aggregator, self.f - gone, n - gone, d, self.dtype)
        rows, result = self._rows[: alive.size], self._rows[n]
        rows.fill(0)
        for row, client in zip(rows, alive.tolist(), strict=True):
            self.add_message(client, row)
        result.fill(0)
        self._bare[gone](rows, result, step=self.exchanges)
        self.suspicion[:] = self.broken
        self.suspicion[alive] = self._bare[gone].suspicion
        if overwrite:
            out.fill(0)
        self._kernels.add_dense(result, scale, out)

    def add_message(self, client: int, out: Vector, scale: float = 1.0) -> None:
        """Add ``scale`` times the decoded message of `client`, unless it is broken, to `out`, (d,). Local."""
        if (row := int(self._row_of[client])) >= 0:
            self._codec.add(self._received[row : row + 1], out, scale)

    def add_messages(self, rows: Vector) -> None:
        """Add to the row of every client what its message says of this rank's columns; nothing where it is broken. Local.

        rows : (n, width) of the plan's dtype, contiguous
        """
        start, stop = self.columns.start, self.columns.stop
        sparse = self._indices is not None
        few = sparse and FEW * self._values.size <= self.d
        for client in np.flatnonzero(~self.broken).tolist():
            row = int(self._row_of[client])
            if self._indices is not None:
                indices, values = self._indices[row], self._values[row]
                if self.shards:
                    inside = slice(*np.searchsorted(indices, (start, stop)).tolist())
                    indices, values = indices[inside] - start, values[inside]
                self._kernels.add_sparse(indices, values, 1.0, rows[client])
                if few:
                    self._marks[indices] = True
            elif self.shards:
                self._codec.add(self._received[row : row + 1], self._values[0], overwrite=True)
                self._kernels.add_dense(self._values[0][self.columns], 1.0, rows[client])
            else:
                self._codec.add(self._received[row : row + 1], rows[client])
        self._changed = np.flatnonzero(self._marks) if few else None
        if few:
            self._marks[self._changed] = False

    def aggregate(self, rows: Vector, out: Vector, *, step: int) -> None:
        """Overwrite `out`, (d,), with the aggregate of rows, (n, width). Local; with shards collective.

        `out` holds the last result. Call it after every :meth:`add_messages`: what no message has changed is not computed,
        until :meth:`forget`.
        """
        mine = self._mine if self.shards else out
        if self.shards:
            mine[:] = out[self.columns]
        with self._decoding:
            self._at_work(rows, mine, step=step, changed=self._changed)
        self.suspicion[:] = np.maximum(self._at_work.suspicion, self.broken)
        if self.shards:
            with Timer(self.seconds, "communicate"):
                self.comm.Allgatherv(mine, [out, self._places])
            self.sent_nbytes += (self.size - 1) * mine.nbytes

    def forget(self) -> None:
        """Compute all in the next :meth:`aggregate`, see :meth:`Plan.forget`."""
        self._at_work.forget()

    def like(self, compressor: Compressor) -> Plan:
        """Return a plan of the same kind, see :meth:`Plan.like`. Collective."""
        return RobustMean(self.comm, compressor, self.d, self.dtype, self.aggregator, f=self.f,
                          clients=None if self._one_each else self.clients, shards=self.shards)

    @property
    def share(self) -> Reshard | None:
        """As of :class:`ClientsMean`; None where every rank is a client."""
        return None if self._one_each else super().share

    @property
    def saved_as(self) -> str:
        """What must be the same where a state is loaded."""
        return f"RobustMean({self.aggregator}, f={self.f}{f', clients={self.clients}, shards=True' if self.shards else ''})"

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.saved_as


def aggregator_of(aggregator: object, subject: str) -> Aggregator:
    """Return an aggregator, also one that a text specifies; the default for None. Local.

    Raises
    ------
    OptionError
        It is no aggregator, and no text that specifies one.
    """
    if aggregator is None:
        return NNM(TrimmedMean())
    if isinstance(aggregator, str):
        try:
            aggregator = registry.built("aggregator", aggregator)
        except OptionError as error:
            raise OptionError(f"{subject}: {error}") from None
    if not isinstance(aggregator, Aggregator):
        raise OptionError(f"{subject}: aggregator={briefly(aggregator)} is no aggregator; pass for example "
                          "NNM(TrimmedMean())")
    return aggregator


def robust_mean(comm: Comm, x: Any, aggregator: Aggregator | str | None = None, *, f: int,
                compressor: Compressor | None = None, out: Any = None) -> Any:
    """Return what takes the place of the mean of all ranks' vectors where up to f ranks are wrong. Collective.

    The same bits on every rank. For codes without torch as well: `x` is an array of NumPy. A vector with a NaN or Inf, and
    one of which the squared norm overflows, is left out, while there are at most f of these; each is one of the f, so that
    so many fewer others may be wrong.

    Parameters
    ----------
    comm : MPI.Comm
        The plan, with memory for n + 2 vectors, stays with it until it is freed.
    x : (d1, d2, ...) float32 or float64, contiguous, on the host, this rank's vector, read only
    aggregator : Aggregator or str, optional
        ``NNM(TrimmedMean())`` by default, see :mod:`mpi_ef.robust`. :class:`CenteredClip` begins at zero in every call.
    f : int
    compressor : Compressor, optional
        What of the vectors travels; all by default. Sparse ones are of little use here, see :class:`RobustMean`.
    out : like x, optional, contiguous, overwritten; may be x itself

    Returns
    -------
    array, (d1, d2, ...)
        `out`, or a new one.

    Raises
    ------
    NonFiniteError
        On all ranks, when more than f vectors are left out.
    DisagreementError, PeerError, ShapeError, DtypeError, OptionError
        On all ranks together, as for :func:`allreduce`.
    """
    aggregator = NNM(TrimmedMean()) if aggregator is None else aggregator
    plan, (vector, target, _, result) = kept_plan(
        "robust_mean", comm, x, out, Identity() if compressor is None else compressor, f"{aggregator}, f={f}",
        lambda compressor, d, dtype, device: RobustMean(comm, compressor, d, dtype, aggregator, f=f, device=device))
    assert isinstance(plan, RobustMean)  # noqa: S101
    plan.exchange(vector)
    gone = int(plan.broken.sum()) if plan.is_mean else 0  # whose vectors count as zero there
    plan.set_mean(target, plan.clients / (plan.clients - gone))
    return result()
