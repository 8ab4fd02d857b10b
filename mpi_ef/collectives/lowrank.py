"""The mean of matrices as a product of two thin factors that all ranks find together: PowerSGD's exchange."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, LowRank, Source, aligned_zeros, source
from mpi_ef.compress.combination import Vector, writable
from mpi_ef.errors import NonFiniteError, OptionError, briefly
from mpi_ef.kernels.backend import backend
from mpi_ef.statetree import REPLICATED, Leaf

from .dense import RankOrderMean
from .exchange import Round
from .frames import Frames, Twin
from .plan import LinkTraffic, Plan, Traffic

__all__ = ["LowRankMean"]


class LowRankMean(Plan, kind="low-rank"):
    """Mean of matrices by one step of a power iteration over all ranks: two thin dense means. For :class:`LowRank`.

    PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727, algorithm 1). For all matrices of the vector at once,
    M_i that of rank i and Q the factor that the last exchange has found, orthonormalised:

    1. P_i = M_i Q; what is no matrix joins the message whole.
    2. Allgather 8 bytes: is every rank ready?
    3. P = mean_i P_i in rank order, then its columns are made orthonormal.
    4. Q_i = M_i^T P.
    5. Q = mean_i Q_i in rank order.

    :meth:`add_own` adds ``P Q_i^T = P P^T M_i``, :meth:`add_mean` adds ``P Q^T = P P^T mean_i M_i``: the mean of the own
    messages, and for a mean that changes slowly soon its best approximation of rank r. P and Q are received, and what is
    made of them (orthonormal columns, the product) does not depend on the processor: the same bits on every rank.

    Columns of P that depend on others become zero; such columns of Q are drawn again, so that a matrix that was zero, or
    of lower rank, is seen when it changes.

    Cost per exchange: ``2 (n - 1) / n`` times the factors, r (p + q) numbers a matrix, and what travels whole; independent
    of n. Memory: two left factors and four right ones, and the vector where it is neither plain nor what `keep` leaves
    behind anyway.

    Other parameters, attributes and errors: see :class:`Plan`.

    Parameters
    ----------
    compressor : LowRank
    warm_start : bool
        False begins every exchange with new random numbers: the plan is then without state from one to the next.

    Notes
    -----
    Nothing of the size of a factor travels before :meth:`wait`: P must be known for Q_i. `keep.into` belongs to the plan
    from :meth:`start` to :meth:`wait`. A product that overflows raises `NonFiniteError` on all ranks, as a NaN or Inf in
    `x` does, and leaves Q as it was.
    """

    keeps = "warm_start"

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *,
                 warm_start: bool = True, device: str = "cpu") -> None:
        self._warm_start = warm_start
        super().__init__(comm, compressor, d, dtype, device=device)

    def bind(self) -> dict[str, object]:
        """Build codecs and buffers, see :meth:`Plan.bind`."""
        if not isinstance(self.compressor, LowRank):
            raise OptionError(f"LowRankMean: compressor={briefly(self.compressor)} has no factors; take LowRank, or build "
                              "the plan with plan_for")
        self._seed, self._factors = int(self.compressor.seed), self.compressor.factors(self.d)
        sizes = self._factors.left_size, self._factors.right_size
        # Sums, and what is made of factors entry by entry, are of the host; products are where the vectors are.
        self._on_host = backend(self.dtype)
        self._left, self._right = (Twin(self._kernels, size, self.dtype) for size in sizes)  # P and Q
        self._own_left, self._own_right = (Twin(self._kernels, size, self.dtype) for size in sizes)  # P_i, then P; Q_i
        self._basis = Twin(self._kernels, sizes[1], self.dtype)
        self._drawn, self._earlier = (aligned_zeros(sizes[1], self.dtype) for _ in range(2))
        self._factors.draw((self._seed, 0), self._drawn)
        self._basis.host[:] = self._drawn
        self._nothing: Vector = self._kernels.empty(0)
        self._orthonormalise_basis()
        self._mean_left, self._mean_right = (RankOrderMean(self.comm, size, self.dtype, self.seconds) for size in sizes)
        self._ready, self._known = Frames(1, 0), Frames(self.size, 0)
        self._formed: Vector | None = None
        self._x = self._unsent = self._nothing  # this rank's vector; what its message is to be taken off
        self._missing: Vector | None = None
        return {"warm_start": self._warm_start}

    def _orthonormalise_basis(self) -> None:
        self._on_host.orthonormalise(self._basis.host, self._factors.right_spans, self._factors.rank, self._drawn)
        self._basis.pull()

    def encode(self, x: Source, *, split: bool) -> bool:
        """Take `x`, or a copy of it, and form P_i of it, see :meth:`Plan.encode`."""
        target = self._target(x, split)
        finite: bool = self._kernels.combine(x.terms, x.factors, target)
        if x.keep.size and x.keep is not target:
            self._kernels.combine(x.terms, x.keep_factors, x.keep)
        self._unsent = x.keep if x.less_message else self._nothing
        self._missing = None
        if not self._warm_start:
            self._factors.draw((self._seed, self.exchanges), self._drawn)
            self._basis.host[:] = self._drawn
            self._orthonormalise_basis()
        if finite:
            self._factors.multiply(self._kernels, self._x, self._basis.there, self._own_left.there)
        return finite

    def _target(self, x: Source, split: bool) -> Vector:
        """Choose what holds this rank's vector until Q_i is known, and return what that vector has to be written to."""
        if x.keep.size and np.array_equal(x.keep_factors, x.factors):
            self._x = x.keep
        elif x.factors[0] == 1 and not x.terms[1].size and not split:
            self._x = x.terms[0]
            return self._nothing
        else:
            if self._formed is None:
                self._formed = self._kernels.zeros(self.d)
            self._x = self._formed
        held: Vector = self._x
        return held

    def communicate(self) -> Iterator[Round]:
        """Make P, then Q, see :meth:`Plan.communicate`."""
        yield Round(self._ready, self._known)
        factors = self._factors
        self._mean(self._mean_left, self._own_left, self._left)
        with self._encoding:
            self._on_host.orthonormalise(self._left.host, factors.left_spans, factors.rank, self._drawn[:0])
            factors.copy_left(self._left.host, self._own_left.host)
            self._left.pull()
            self._own_left.pull()
            factors.multiply_back(self._kernels, self._x, self._left.there, self._own_right.there)
        self._mean(self._mean_right, self._own_right, self._right)
        self._conclude()

    def _mean(self, mean: RankOrderMean, own: Twin, out: Twin) -> None:
        own.push()
        mean.form(own.host, 1.0 / self.size, out.host, self.between_nodes)
        if not self._on_host.all_finite(out.host):  # all ranks see the same numbers
            raise NonFiniteError("LowRankMean.exchange: a product of finite numbers overflows; nothing was changed "
                                 "anywhere, so this step can be skipped", ())

    def _conclude(self) -> None:
        """Do what waits for the success of all ranks: the next Q, what is kept, what is measured."""
        self._right.pull()
        with self._encoding:
            if self._warm_start:
                self._earlier[:] = self._basis.host
                self._basis.host[:] = self._right.host
                self._orthonormalise_basis()
        if self._unsent.size:
            self.add_own(self._unsent, -1.0)
        self._x = self._unsent = self._nothing
        if self._missing is not None:
            self.lost = super()._measure_loss(source(self._missing))

    def _measure_loss(self, x: Source) -> float:
        """Remember x; what is lost of it is known when P is."""
        self._missing = self._kernels.empty(self.d)
        self._kernels.combine(x.terms, x.factors, self._missing)
        return 1.0

    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add or write ``scale * P Q^T``, or ``scale * P Q_i^T``, see :meth:`Plan.decode`."""
        left, right = (self._own_left, self._own_right) if own else (self._left, self._right)
        factors = self._factors
        self._kernels.add_low_rank(left.there, right.there, factors.parts, factors.rank, scale, overwrite, writable(out))

    @property
    def alpha(self) -> float:
        """1 when everything travels whole, else 0.

        P belongs to the mean and starts from the last one: no share of a rank's own matrix is certain to be sent in one
        exchange, and a rank whose matrix is minus that of the others' sends none. Rules that derive an option from alpha
        want that option.
        """
        return 0.0 if self._factors.right_size else 1.0

    @property
    def traffic(self) -> Traffic:
        """Bytes of one exchange."""
        status = (self.size - 1) * self._ready.frame_nbytes
        nbytes = status + sum(mean.nbytes(self.between_nodes) for mean in (self._mean_left, self._mean_right))
        return Traffic.both_ways(nbytes, self.size, self.d * self.dtype.itemsize)

    @property
    def link_traffic(self) -> LinkTraffic:
        """Bytes of one exchange on the link of a node."""
        crossing = self.nodes.crossing((self.size - 1) * self._ready.frame_nbytes)
        means = self._mean_left, self._mean_right
        crossing += sum(mean.crossing(self.nodes, self.between_nodes) for mean in means)
        return LinkTraffic.of(self.nodes, crossing, self.d * self.dtype.itemsize)

    def undo(self) -> None:
        """Begin the next exchange with the Q with which the last one began, see :meth:`Plan.undo`."""
        if self._warm_start:
            self._basis.host[:] = self._earlier
            self._basis.pull()

    def loaded(self) -> None:
        """Let the device have Q, see :meth:`Plan.loaded`."""
        self._basis.pull()

    def leaves(self) -> dict[str, Leaf]:
        """Return Q, orthonormalised, of the plan's dtype, the same on all ranks; nothing without a warm start."""
        return {"Q": Leaf(REPLICATED, self._basis.host)} if self._warm_start else {}
