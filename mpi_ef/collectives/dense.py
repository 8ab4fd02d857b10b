"""The uncompressed mean, block by block through the cache."""

from collections.abc import Iterator
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.comm.nodes import Nodes
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, Source, lazy, source
from mpi_ef.compress.combination import Combination, Keep, Vector, writable
from mpi_ef.errors import MpiEfError, NonFiniteError
from mpi_ef.kernels.backend import backend

from .chain import ChainMean, is_long
from .exchange import Round
from .frames import NON_FINITE, Frames, status_of
from .misfit import unwritable
from .pairwise import PairwiseMean
from .plan import LinkTraffic, Plan, Traffic

__all__ = ["DenseMean", "RankOrderMean"]

BLOCK_NBYTES = 4 << 20  # of the vector; what one rank receives of it at a time should fit its second-level cache


class _Block(NamedTuple):
    """Entries from `low` to `high` in n slices of `size` entries; the last slices may reach beyond `high`.

    The rest are arguments of Alltoallv, which moves nothing from a rank to itself: counts, and where slices begin.
    """

    low: int
    high: int
    size: int
    mine: slice
    others: NDArray[np.int64]
    places: NDArray[np.int64]
    own_place: NDArray[np.int64]

    @classmethod
    def of(cls, low: int, high: int, n: int, rank: int) -> "_Block":
        size = -(-(high - low) // n)
        others = np.full(n, size)
        others[rank] = 0
        return cls(low, high, size, slice(rank * size, (rank + 1) * size), others, np.arange(n) * size,
                   np.full(n, rank * size))


class RankOrderMean:
    """The mean of whole vectors, summed in rank order, without a word on whether a rank can take part.

    What :class:`DenseMean` and other plans have in common: steps 1 to 4 of the former. `between` are the nodes of ranks that
    are on several, the same on all of them. Then messages go as :class:`PairwiseMean` says, or, with several ranks on a
    node, numbered by node, and vectors that are long for so many, as :class:`ChainMean` does, with fewer bytes on links.
    Otherwise all send to all at once, longer ones, which is quicker through memory. The bits are the same.

    The time spent in "communicate" and "decode" is added to `seconds`.
    """

    def __init__(self, comm: Comm, d: int, dtype: DTypeLike, seconds: dict[str, float]) -> None:
        self._comm, self._seconds, self._d = comm, seconds, d
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._size, self._rank = n, rank = int(comm.Get_size()), int(comm.Get_rank())
        itemsize, self._kernels = self._dtype.itemsize, backend(self._dtype)
        longest = max(1, min(-(-d // n), BLOCK_NBYTES // (n * itemsize)))
        self._arrived = np.zeros(n * longest, self._dtype)
        self._blocks = [_Block.of(low, min(low + n * longest, d), n, rank) for low in range(0, d, n * longest)]
        self._padded = np.zeros((2, n * self._blocks[-1].size if self._blocks else 0), self._dtype)
        self._pairs, self._chain = PairwiseMean(comm, d, self._kernels), ChainMean(comm, d, self._kernels)

    def _in_chain(self, nodes: Nodes) -> bool:
        """Tell whether messages go from rank to rank."""
        in_order = nodes.largest > 1 and list(nodes.numbers) == sorted(nodes.numbers)
        return in_order and is_long(self._d * self._dtype.itemsize, self._size)

    def nbytes(self, between: Nodes | None) -> int:
        """Return how many bytes leave this rank, and come to it, each time. Local."""
        if between is not None:
            return (self._chain if self._in_chain(between) else self._pairs).nbytes
        return 2 * (self._size - 1) * self._dtype.itemsize * sum(block.size for block in self._blocks)

    def crossing(self, nodes: Nodes, between: Nodes | None) -> int:
        """Return how many bytes come to the node to which most comes. Local."""
        if between is None:
            return nodes.crossing(0, self.nbytes(None))
        if self._in_chain(between):
            return min(nodes.count - 1, 2) * self._d * self._dtype.itemsize
        n, most = self._size, 0
        for node, size in enumerate(nodes.sizes):
            added = sum(share for share, on in zip(self._pairs.shares, nodes.numbers, strict=True) if on == node)
            most = max(most, size * (self._d - added) + (n - size) * added)
        return most * self._dtype.itemsize

    def form(self, x: Vector, factor: float, out: Vector, between: Nodes | None) -> bool:
        """Write ``factor`` times the sum over the ranks of `x` to `out`; tell if this rank's share is finite. Collective.

        Both are (d,) of the dtype, contiguous; `out` is another array, with the same bits on all ranks. The factor is
        rounded to the dtype and multiplies every vector before it is added.
        """
        began, decoding, weight, finite = perf_counter(), self._seconds["decode"], self._dtype.type(factor), True
        if between is not None:
            way = self._chain if self._in_chain(between) else self._pairs
            finite, seconds = way.form(x, weight, out)
            self._seconds["decode"] += seconds
        else:
            for block in self._blocks:
                finite &= self._form_block(block, x[block.low : block.high], weight, out[block.low : block.high])
        self._seconds["communicate"] += perf_counter() - began - (self._seconds["decode"] - decoding)
        return finite

    def _form_block(self, block: _Block, x: Vector, factor: np.floating, result: Vector) -> bool:
        n, target = self._size, result
        if x.size % n:
            self._padded[0, : x.size] = x
            x, result = self._padded
        arrived, own, mine = self._arrived[: n * block.size], x[block.mine], result[block.mine]
        self._comm.Alltoallv([x, (block.others, block.places)], [arrived, (block.others, block.places)])
        began = perf_counter()
        finite: bool = self._kernels.mean_rows(arrived.reshape(n, block.size), own, self._rank, factor, mine)
        self._seconds["decode"] += perf_counter() - began
        self._comm.Alltoallv([result, (block.others, block.own_place)], [result, (block.others, block.places)])
        if result is not target:
            target[:] = result[: target.size]
        return finite


class DenseMean(Plan, kind="dense"):
    """Mean of whole vectors, summed in rank order: the same bits on every rank and in every MPI.

    The baseline of every compressed mean, and the exchange of dense first steps. ``MPI_Allreduce`` chooses its order
    of summation by message size and process number; this plan does not.

    0. Allgather 8 bytes: is every rank ready?
    1. Cut the vector into blocks, and every block into n slices, slice j for rank j. For every block:
    2. send slice j to rank j;
    3. add the received slices in rank order, times 1/n, straight into the result;
    4. send the sum to all.
    5. Allgather 8 bytes: was any sum NaN or Inf?

    Received slices are still in cache when they are added, and sums when they are sent: that makes it faster than an
    allreduce of the whole vector inside one machine. Where ranks are on several hosts, messages are short and go in pairs,
    from every rank to one other at a time, which fills links as the ring of an allreduce does.

    Cost per exchange: ``2 (n - 1) / n`` times the vector sent and as many bytes received. Memory: the result, up to three
    blocks, and for combinations and :meth:`start` one more vector.

    Parameters, attributes and errors: see :class:`Plan`.
    """

    def __init__(self, comm: Comm, d: int, dtype: DTypeLike = np.float32, *, device: str = "cpu") -> None:
        super().__init__(comm, Identity(), d, dtype, device=device)

    @classmethod
    def suited(cls, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike, *, residual: bool,  # noqa: ARG003
               device: str = "cpu") -> "DenseMean":
        """Return a plan of this kind for :func:`plan_for`. Collective."""
        return cls(comm, d, dtype, device=device)

    def bind(self) -> dict[str, object]:
        """Build codecs and buffers, see :meth:`Plan.bind`."""
        self._ready, self._known = Frames(1, 0), Frames(self.size, 0)
        self._rank_order = RankOrderMean(self.comm, self.d, self.dtype, self.seconds)
        self._result = self._kernels.zeros(self.d)
        # What MPI sees of vectors on a device: this rank's, and the mean.
        self._staged = [] if self.device == "cpu" else [self._kernels.on_host(self.d, self.dtype) for _ in range(2)]
        self._own: Vector | None = None
        self._target: Vector | None = None  # what allreduce writes to
        self._x: Vector = self._kernels.empty(0)  # this rank's vector: the caller's while exchange runs, else _own
        self._factor = 1.0 / self.size
        return {}

    def _problem(self, x: Vector | Combination, keep: Keep | None) -> MpiEfError | None:
        problem = super()._problem(x, keep)
        if problem or self._target is None:
            return problem
        return unwritable(self._target, self.d, self.dtype, "DenseMean.exchange", "out", self._kernels)

    @property
    def mean(self) -> Vector:
        """The mean of the last exchange, (d,), owned by the plan, valid until the next one; read only."""
        view: Vector = self._result.view()
        view.flags.writeable = False
        return view

    def encode(self, x: Source, *, split: bool) -> bool:
        """Take `x`, or a copy of it, see :meth:`Plan.encode`."""
        plain = x.factors[0] == 1 and not x.terms[1].size and not self._kernels.overlap(x.terms[0], self._result)
        if plain and not split:
            self._x = x.terms[0]
        else:
            if self._own is None:
                self._own = self._kernels.zeros(self.d)
            self._x = self._own
            self._kernels.combine(x.terms, x.factors, self._x)
        if x.keep.size:
            self._kernels.combine(x.terms, x.keep_factors, x.keep)
            if x.less_message:
                self._kernels.add_dense(self._x, -1.0, x.keep)
        return True  # the sum tells

    def communicate(self) -> Iterator[Round]:
        """Sum in rank order, between two rounds of words, see :meth:`Plan.communicate`."""
        yield Round(self._ready, self._known)
        finite = self._form()
        yield Round(self._ready, self._known, finite=finite, inspect=False)
        if status_of(self._known, NON_FINITE):
            yield Round(self._ready, self._known, finite=self._kernels.all_finite(self._x))  # raises, naming the ranks
            text = "the sum of the ranks' vectors overflows; nothing was changed anywhere, so this step can be skipped"
            raise NonFiniteError(f"DenseMean.exchange: {text}", ())

    def _form(self) -> bool:
        if not self._staged:
            return self._rank_order.form(self._x, self._factor, self._result, self.between_nodes)
        x, mean = self._staged
        self._kernels.to_host(self._x, x)
        finite = self._rank_order.form(x, self._factor, mean, self.between_nodes)
        self._kernels.to_device(mean, self._result)
        return finite

    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add or write ``scale`` times the mean, or ``x_r``, see :meth:`Plan.decode`.

        An array given to :meth:`exchange` must be unchanged.
        """
        values = self._x if own else self._result
        if overwrite:
            scaled = source(scale * lazy(values))
            self._kernels.combine(scaled.terms, scaled.factors, writable(out))
        else:
            self._kernels.add_dense(values, scale, writable(out))

    def allreduce(self, x: Vector, out: Vector, scale: float = 1.0) -> None:
        """Write ``scale`` times the mean of `x` over the ranks to `out`, without a copy in between. Collective.

        Both are (d,), of the plan's dtype, contiguous. Raises what :meth:`exchange` does, on all ranks; `out` is
        overwritten then as well, but for an `out` that is `x`. The result is there only: :attr:`mean`, :meth:`add_mean`,
        :meth:`set_mean` and :meth:`add_own` mean nothing until the next :meth:`exchange`.
        """
        own, factor, x, out = self._result, self._factor, self._kernels.array(x), self._kernels.array(out)
        in_place = self._kernels.overlap(x, out)
        self._factor = scale / self.size
        self._target, self._result = out, own if in_place else out
        try:
            self.exchange(x)
        finally:
            self._target, self._result, self._factor = None, own, factor
            self._x = self._kernels.empty(0)  # the plan may stay for long, and this one is the caller's
        if in_place:
            self.set_mean(out)

    @property
    def traffic(self) -> Traffic:
        """Bytes of one exchange."""
        nbytes = self._rank_order.nbytes(self.between_nodes) + 2 * (self.size - 1) * self._ready.frame_nbytes
        return Traffic.both_ways(nbytes, self.size, self.d * self.dtype.itemsize)

    @property
    def link_traffic(self) -> LinkTraffic:
        """Bytes of one exchange on the link of a node."""
        crossing = self.nodes.crossing(2 * (self.size - 1) * self._ready.frame_nbytes)
        crossing += self._rank_order.crossing(self.nodes, self.between_nodes)
        return LinkTraffic.of(self.nodes, crossing, self.d * self.dtype.itemsize)
