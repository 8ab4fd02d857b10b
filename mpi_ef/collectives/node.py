"""A mean on two levels: sums in memory that the ranks of a node share, compressed messages between nodes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.comm.consensus import agree, check_not_freed, shared_errors
from mpi_ef.comm.nodes import Nodes
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Combination, Compressor, Keep, Source, lazy, source
from mpi_ef.compress.combination import Vector, writable
from mpi_ef.errors import MpiEfError, OptionError, ShapeError

from .chosen import PlanBuilder, build_plan, plan_for
from .exchange import Round
from .inside import Inside
from .placement import NodeOf, Placement, placement_of, slice_bounds
from .plan import LinkTraffic, Plan, Traffic

__all__ = ["NodeMean"]

class NodeMean(Plan):
    """Mean on two levels: ranks of a node add up their vectors in memory that they share, nodes exchange compressed means.

    What a node sends does not grow with its ranks, and what is kept from one exchange to the next is one vector for a node.
    A *rail* is the q-th rank of every node; each has a slice of the vector.

    1. Every rank's vector is in its row of the shared memory; the ranks of a node wait for each other.
    2. Rank q forms ``v_q = m / n * sum_r row_r[slice q]`` in the order of the node's ranks: m nodes, n ranks. The mean over
       the nodes of these is the mean over all ranks, however many each node has.
    3. The plan `inner` exchanges v_q on rail q. All ranks of a node send, each its slice.
    4. The ranks of a node tell each other whether their rails have succeeded: all ranks of all nodes raise, or none.
    5. Rank q writes its slice of the mean to a row that the ranks of its node read.

    A rule at work, :class:`mpi_ef.feedback.ErrorFeedback`, does its part on v_q and the inner plan: a rank keeps a slice.
    With one rank a node it is the inner plan, with one node nothing is compressed and it is the dense mean in rank order.
    Rails are as many as the smallest node has ranks; the others take part in steps 1, 4 and 5.

    Cost per exchange: that of `inner` for d / rails entries; inside a node two passes over the rows and three messages of 16
    bytes. Memory of a node: a row for each rank and one for the mean. Where ranks cannot share memory, vectors travel inside
    the node as messages, with the same bits, and rank 0 warns.
    Other parameters, attributes and errors: see :class:`Plan`. `add_own` means nothing: rules see the inner plan.

    Parameters
    ----------
    inner : callable or str
        The plan between nodes, as :func:`build_plan` takes it.
    node : int, callable or communicator, optional
        Which ranks are on one node: how many consecutive ones, a function of the rank that returns the number of its node,
        or a communicator of those beside this rank. Those that share memory by default.

    Attributes
    ----------
    inner : Plan
        That of this rank's rail.
    placement : Placement
    part : slice
        This rank's of the vector.
    inside : Inside
        What the ranks of a node do with one another. Its `shares` tells whether they share memory.
    row : (d,) array or None
        Memory for this rank's vector that others of its node read where it is: a vector that is there is not copied. It must
        not change during an exchange. None where nothing is shared, and on devices.
    table : (n, 5) int64
        Of every rank its node, where its slice begins and ends, and where what the inner plan owes of the vector does.
    """

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *,
                 inner: PlanBuilder = plan_for, node: NodeOf = None, device: str = "cpu") -> None:
        super().__init__(comm, compressor, d, dtype, device=device)
        self.placement: Placement = placement_of(comm, node, type(self).__name__)
        self._build(inner)
        parts = self.table[np.array(self.placement.numbers) == self.placement.mine, 1:3]
        self.inside = Inside(type(self).__name__, comm, self.placement, parts, self._kernels, self.d, self.seconds)
        self._way: Callable[[], Any] | None = None  # to the end of an exchange that has begun
        self._part_of_mean: Any = None
        self._mean: Any = None

    def bind(self) -> dict[str, object]:
        """Build nothing: the communicators of nodes and rails are not there yet."""
        return {}

    def _build(self, inner: PlanBuilder) -> None:
        """Build the plan of this rank's rail, and learn what all ranks have. Collective."""
        subject, p = type(self).__name__, self.placement
        self.alone = p.nodes == 1
        place, bounds = int(p.node.Get_rank()), slice_bounds(self.d, p.rails)
        self.part = slice(bounds[place], bounds[place + 1]) if place < p.rails else slice(self.d, self.d)
        size, row = self.part.stop - self.part.start, list[Any]()
        problem: Exception | None = None
        try:
            with shared_errors(p.rail, subject, self.built):
                what = self.compressor.part(self.part.start, self.part.stop, self.d)
                self.inner = build_plan(inner, p.rail, what, size, self.dtype, self.device)
        except ShapeError as error:
            problem = OptionError(f"{subject}: {error}; a rank has {size} of {self.d} entries, so take a compressor that is "
                                  "not bound to shapes of parameters")
        except Exception as error:
            problem = error

        def facts() -> dict[str, object]:
            if problem is not None:
                raise problem
            if isinstance(self.inner, NodeMean):
                raise OptionError(f"{subject}: inner={type(self.inner).__name__} is a plan of nodes, too; take GatherMean, "
                                  "TwoPhaseMean or DenseMean, between nodes")
            if self.inner.own != 1 or self.inner.d != size:
                raise OptionError(f"{subject}: inner={type(self.inner).__name__} has {self.inner.own} vectors of "
                                  f"{self.inner.d} entries; pass a plan for one of {size}")
            owed = [leaf.reshard for leaf in self.inner.leaves().values()]
            if len(owed) > 1 or any(move is None or move.how != "cut" for move in owed):
                raise OptionError(f"{subject}: inner={type(self.inner).__name__} keeps what is not cut with the vector; "
                                  "take GatherMean or TwoPhaseMean")
            begin, end = ((owed[0].start, owed[0].stop) if owed and owed[0] is not None else (0, 0))
            first = self.part.start
            alpha = self.inner.alpha if size else 1.0
            row.extend([p.mine, first, self.part.stop, first + begin, first + end, alpha])
            return {"nodes": p.numbers, "inner": type(self.inner).__name__}

        rows = agree(self.comm, subject, facts, "build the plan from the same arguments everywhere", value=row,
                     call=self.built)
        self.table: NDArray[np.int64] = np.array([theirs[:5] for theirs in rows], np.int64).reshape(-1, 5)
        self._alpha = float(min(theirs[5] for theirs in rows))
        self._carrier = self.inner.dense() if self.alone else self.inner
        self.nodes = Nodes(p.numbers)
        for plan in (self.inner, self._carrier):
            plan.nodes = Nodes.of_size(plan.size, 1)  # whatever the hosts are that stand for them

    @property
    def row(self) -> Vector | None:
        """Memory for this rank's vector, see above. Local."""
        return self.inside.row

    # As a plan of its own, without a rule.

    def exchange(self, x: Vector | Combination, *, keep: Keep | None = None) -> Self:
        """Take the mean, see :meth:`Plan.exchange`; there is nothing to `keep`. Collective."""
        v, refusal = self.inside.gather(*self.given(x, keep), (self.exchanges, 0))
        self._forward(refusal)
        self._way = partial(self._carrier.exchange, v)
        return self.wait()

    def start(self, x: Vector | Combination, *, keep: Keep | None = None) -> None:
        """Begin to take the mean, see :meth:`Plan.start`. Collective."""

        def go_on(v: Vector, refusal: MpiEfError | None) -> None:
            self._forward(refusal)
            self._carrier.start(v)

        x, refusal = self.given(x, keep)
        self._way = self._carrier.wait
        self.inside.post(x, refusal, (self.exchanges, 0), go_on)

    def given(self, x: Vector | Combination, keep: Keep | None = None
              ) -> tuple[Vector | Combination, MpiEfError | None]:
        """Return what is exchanged, and why it cannot be. Local."""
        if self._way is not None:
            raise OptionError(f"{type(self).__name__}: start was called twice; call wait between them")
        check_not_freed(self.comm, type(self).__name__, "build the plan again, on another one")
        x, keep = self._taken(x, keep)
        refusal, self._refuses = self._refuses or self._problem(x, keep), None
        if refusal is None and keep is not None:
            refusal = OptionError(f"{type(self).__name__}.exchange: keep= with messages of nodes, not of ranks; put a rule "
                                  "to work: ErrorFeedback('ef14', plan)")
        return x, refusal

    def _forward(self, refusal: MpiEfError | None) -> None:
        self._carrier.exchanges = self.exchanges  # the key of random compressors
        if refusal is not None:
            self._carrier.refuse(refusal)

    def progress(self) -> None:
        """Let MPI work on what :meth:`start` has begun. Local."""
        self.inside.advance(wait=False)
        self._carrier.progress()

    def wait(self) -> Self:
        """Finish the exchange begun by :meth:`start`. Collective."""
        if self._way is None:
            raise OptionError(f"{type(self).__name__}: wait was called without start; call start(x) first")
        way, self._way = self._way, None
        self.inside.advance(wait=True)
        problem: MpiEfError | None = None
        try:
            way()
        except MpiEfError as error:
            problem = error
        self.exchanges += 1
        try:
            self.inside.settle(problem)
        except MpiEfError:
            if problem is None:
                self._carrier.undo()
            raise
        if self._part_of_mean is None:
            self._part_of_mean = self._kernels.zeros(self.part.stop - self.part.start)
        self._carrier.set_mean(self._part_of_mean, again=True)
        self._mean = self.inside.spread(self._part_of_mean)
        self.sent_nbytes += self._sent_last()
        return self

    def undo(self) -> None:
        """Take back what the last exchange has changed, see :meth:`Plan.undo`."""
        self._carrier.undo()

    def encode(self, x: Source, *, split: bool) -> bool:
        """Encode nothing: the inner plan does."""
        raise NotImplementedError

    def communicate(self) -> Iterator[Round]:
        """Send nothing: the inner plan does."""
        raise NotImplementedError

    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add or write ``scale`` times the mean, see :meth:`Plan.decode`."""
        if own:
            raise OptionError(f"{type(self).__name__}.add_own: messages are those of nodes, not of ranks; put a rule to "
                              "work: ErrorFeedback('ef14', plan)")
        if overwrite:
            scaled = source(scale * lazy(self._mean))
            self._kernels.combine(scaled.terms, scaled.factors, writable(out))
        else:
            self._kernels.add_dense(self._mean, scale, writable(out))

    def like(self, compressor: Compressor) -> Plan:
        """Return a plan of the same kind, see :meth:`Plan.like`. Collective."""
        numbers = self.placement.numbers
        return type(self)(self.comm, compressor, self.d, self.dtype, node=numbers.__getitem__, device=self.device)

    @property
    def alpha(self) -> float:
        """Contraction constant of the inner plan: the least over the rails, the same on all ranks."""
        return self._alpha

    @property
    def label(self) -> str:
        """See :attr:`Plan.label`."""
        return f"{super().label} of {self._carrier.label}"

    @property
    def between(self) -> Traffic:
        """Bytes of one exchange of this rank with those of other nodes."""
        return self._carrier.traffic

    @property
    def link_traffic(self) -> LinkTraffic:
        """Bytes of one exchange on the link of this node: of all its rails."""
        nbytes = 0 if self.alone else self.placement.rails * self._carrier.link_traffic.nbytes
        return LinkTraffic.of(self.nodes, nbytes, self.d * self.dtype.itemsize)

    @property
    def traffic(self) -> Traffic:
        """Bytes of one exchange, those inside the node included."""
        between, inside = self.between, self.inside.sent_nbytes
        dense = 2 * (self.size - 1) * self.d * self.dtype.itemsize // self.size
        return Traffic(between.sent_nbytes + inside, between.received_nbytes + inside, dense)
