"""A mean on two levels: sums in memory that the ranks of a node share, compressed messages between nodes."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.comm.consensus import agree, ranks_text, shared_errors
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Combination, Compressor, Keep, Source, lazy, source
from mpi_ef.compress.combination import Vector, writable
from mpi_ef.errors import DisagreementError, MpiEfError, NonFiniteError, OptionError, PeerError, ShapeError
from mpi_ef.kernels.backend import backend

from .chosen import PlanBuilder, build_plan
from .exchange import Round, Timer
from .placement import NodeOf, Placement, placement_of, slice_bounds
from .plan import Plan, Traffic, plan_for
from .shared import NOT_MPI, shared_zeros

__all__ = ["NodeMean", "same_memory"]

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
        self._share()
        self._way: Callable[[], Any] | None = None  # to the end of an exchange that has begun
        self._part_of_mean: Any = None

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
                self.inner = build_plan(inner, p.rail, self.compressor, size, self.dtype, self.device)
        except ShapeError as error:
            problem = OptionError(f"{subject}: {error}; a rank has {size} of {self.d} entries, so take a compressor that is "
                                  "not bound to parameters: without segments")
        except Exception as error:
            problem = error

        def facts() -> dict[str, object]:
            if problem is not None:
                raise problem
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

    def _share(self) -> None:
        """Take memory for rows, shared where that is possible. Collective."""
        node, size, on_host = self.placement.node, self.part.stop - self.part.start, self.device == "cpu"
        s, place = int(node.Get_size()), int(node.Get_rank())
        rows, why = shared_zeros(node, s + 1, self.d, self.dtype) if s > 1 else (None, "")
        if missing := [rank for rank, theirs in enumerate(self.comm.allgather(why)) if theirs]:
            self._warn(missing, why)
        self._host = backend(self.dtype)
        own = self.table[np.array(self.placement.numbers) == self.placement.mine, 1:3]
        self._counts, self._places = own[:, 1] - own[:, 0], own[:, 0].copy()
        self._arriving = np.full(s, size), np.arange(s) * size
        self.shares = rows is not None
        if rows is not None:
            self._rows, self._mean, self._landing = rows[:s], rows[s, : self.d], rows[place, : self.d]
        else:
            self._rows, self._mean = self._host.zeros((s, size)), self._host.zeros(self.d)
            self._landing = None if on_host else self._host.zeros(self.d)
        self.row = self._landing if self.shares and on_host else None
        self._formed: Any = None  # a combination, where it has no row
        self._last: Vector = self._mean  # this rank's vector of the last exchange
        self._factor = self.placement.nodes / self.size
        self._v = self._host.zeros(size)
        self._v_there, self._mean_there = (here if on_host else self._kernels.zeros(here.size)
                                           for here in (self._v, self._mean))
        self._word, self._words = np.zeros(3, np.int64), np.zeros((s, 3), np.int64)
        self._nothing = source(np.zeros(0, self.dtype))
        self._refusal: MpiEfError | None = None  # of this rank, in the last exchange
        self._communicating = Timer(self.seconds, "communicate")

    def _warn(self, ranks: list[int], why: str) -> None:
        if ranks[0] == self.rank and why != NOT_MPI:
            warnings.warn(f"{type(self).__name__}: {ranks_text(ranks)} share no memory with those of their node ({why}); "
                          "vectors travel there as messages, with the same results", RuntimeWarning, stacklevel=4)

    # The parts of an exchange: a rule at work does its own between the first and the last.

    def gather(self, x: Vector | Combination, refusal: MpiEfError | None, step: tuple[int, int]
               ) -> tuple[Vector, MpiEfError | None]:
        """Return v_q, and why this rank's rail is to refuse it. Collective over the node.

        Parameters
        ----------
        x : (d,) or a combination of such vectors
        refusal : MpiEfError or None
            Why this rank cannot take part; `x` is not looked at then.
        step : two int
            Which exchange this is; the same on all ranks.
        """
        self._refusal, shared = refusal, self.shares
        if refusal is None:
            with self._encoding:
                self._last = self._laid(x)
        if not self._all_fine(refusal is None, step):
            return self._v_there, refusal or PeerError(f"{type(self).__name__}: a rank of its node does not take part")
        rows, start = self._rows, self.part.start if shared else 0
        if len(rows) == 1:
            rows, start = self._last.reshape(1, -1), self.part.start
        elif not shared:
            with self._communicating:
                self.placement.node.Alltoallv([self._last, (self._counts, self._places)], [rows, self._arriving])
        with self._decoding:
            self._host.mean_slice(rows, start, self._factor, self._v)
            if self._v_there is not self._v:
                self._kernels.to_device(self._v, self._v_there)
        return self._v_there, None

    def _laid(self, x: Vector | Combination) -> Any:
        """Return this rank's vector, (d,), on the host, in its row where there is one. Local."""
        terms, on_host = lazy(x).terms, self.device == "cpu"
        vector, plain = terms[0][1], len(terms) == 1 and terms[0][0] == 1
        if plain and on_host and (self._landing is None or same_memory(vector, self._landing)):
            return vector
        if not on_host and plain:
            self._kernels.to_host(vector, self._landing)
            return self._landing
        formed = source(x)
        if on_host and self._landing is not None:
            self._host.combine(formed.terms, formed.factors, self._landing)
            return self._landing
        if self._formed is None:
            self._formed = self._kernels.zeros(self.d)
        self._kernels.combine(formed.terms, formed.factors, self._formed)
        if on_host:
            return self._formed
        self._kernels.to_host(self._formed, self._landing)
        return self._landing

    def _all_fine(self, fine: bool, step: tuple[int, int] = (0, 0)) -> bool:
        """Wait for the ranks of the node; tell whether all are fine, and in the same step. Collective over the node.

        What each has written to shared memory before can be read afterwards.
        """
        self._word[:] = fine, *step
        with self._communicating:
            self._fence()
            self.placement.node.Allgather(self._word, self._words)
            self._fence()
        return fine and bool((self._words == self._word).all())

    def _fence(self) -> None:
        """Let what was written to memory be there for others before what is written later: a kernel ends so."""
        self._host.combine(self._nothing.terms, self._nothing.factors, self._nothing.keep)

    def settle(self, problem: MpiEfError | None) -> None:
        """Raise on all ranks of all nodes where one rail has not succeeded. Collective over the node, then over all.

        `problem` is what this rank's rail has raised, on all its ranks.
        """
        if not self._all_fine(problem is None):
            raise self._what_is_wrong(problem)

    def _what_is_wrong(self, problem: MpiEfError | None) -> MpiEfError:
        """Return what this rank raises, where all do. Collective."""
        subject, mine = f"{type(self).__name__}.exchange", self._refusal
        finite = mine is not None or bool(self._host.all_finite(self._last))
        texts = ["" if error is None else str(error) for error in (mine, problem)]
        said: list[tuple[str, bool, str, str]] = self.comm.allgather((texts[0], finite, type(problem).__name__, texts[1]))
        if refused := [rank for rank, (text, *_) in enumerate(said) if text]:
            if mine is None:
                return PeerError(f"{subject}: {ranks_text(refused)} raised: {said[refused[0]][0]}")
            mine.everywhere = {text for text, *_ in said} == {str(mine)}
            return mine
        if broken := tuple(rank for rank, (_, finite, *_) in enumerate(said) if not finite):
            return NonFiniteError(f"{subject}: NaN or Inf on {ranks_text(broken)}; nothing was changed anywhere, so this "
                                  "step can be skipped", broken)
        kinds = {kind for _, _, kind, text in said if text}
        if NonFiniteError.__name__ in kinds:
            return NonFiniteError(f"{subject}: a sum of vectors overflows; nothing was changed anywhere, so this step can "
                                  "be skipped", ())
        if DisagreementError.__name__ in kinds or kinds <= {PeerError.__name__}:
            return DisagreementError(f"{subject}: ranks are out of step; call the plan equally often on all ranks, and load "
                                     "states on all of them")
        told = [(rank, text) for rank, (_, _, kind, text) in enumerate(said) if text and kind != PeerError.__name__]
        return problem or PeerError(f"{subject}: rank {told[0][0]} raised: {told[0][1]}")

    def spread(self, part: Vector) -> Vector:
        """Return the vector, (d,), of which `part` is this rank's slice; read only, until the next one.

        Collective over the node.
        """
        mine = self._mean[self.part]
        if self.device != "cpu":
            self._kernels.to_host(part, mine)
        elif not same_memory(part, mine):
            mine[:] = part
        if self.shares:
            self._all_fine(fine=True)
        elif len(self._rows) > 1:
            with self._communicating:
                self.placement.node.Allgatherv(mine.copy(), [self._mean, (self._counts, self._places)])
        if self._mean_there is not self._mean:
            self._kernels.to_device(self._mean, self._mean_there)
        view: Vector = self._mean_there.view()
        view.flags.writeable = False
        return view

    @property
    def home(self) -> Vector | None:
        """Where the node reads this rank's slice of the result: what is there need not be copied. None on devices."""
        return self._mean[self.part] if self.device == "cpu" else None

    # As a plan of its own, without a rule.

    def exchange(self, x: Vector | Combination, *, keep: Keep | None = None) -> Self:
        """Take the mean, see :meth:`Plan.exchange`; there is nothing to `keep`. Collective."""
        self._begin(x, keep, split=False)
        return self.wait()

    def start(self, x: Vector | Combination, *, keep: Keep | None = None) -> None:
        """Begin to take the mean, see :meth:`Plan.start`: the node's part is done at once. Collective."""
        self._begin(x, keep, split=True)

    def _begin(self, x: Vector | Combination, keep: Keep | None, *, split: bool) -> None:
        if self._way is not None:
            raise OptionError(f"{type(self).__name__}: start was called twice; call wait between them")
        x, keep = self._taken(x, keep)
        refusal, self._refuses = self._refuses or self._problem(x, keep), None
        if refusal is None and keep is not None:
            refusal = OptionError(f"{type(self).__name__}.exchange: keep= with messages of nodes, not of ranks; put a rule "
                                  "to work: ErrorFeedback('ef14', plan)")
        v, refusal = self.gather(x, refusal, (self.exchanges, 0))
        if refusal is not None:
            self._carrier.refuse(refusal)
        if split:
            self._carrier.start(v)
        self._way = self._carrier.wait if split else partial(self._carrier.exchange, v)

    def progress(self) -> None:
        """Let MPI work on what :meth:`start` has begun. Local."""
        self._carrier.progress()

    def wait(self) -> Self:
        """Finish the exchange begun by :meth:`start`. Collective."""
        if self._way is None:
            raise OptionError(f"{type(self).__name__}: wait was called without start; call start(x) first")
        way, self._way = self._way, None
        problem: MpiEfError | None = None
        try:
            way()
        except MpiEfError as error:
            problem = error
        self.exchanges += 1
        try:
            self.settle(problem)
        except MpiEfError:
            if problem is None:
                self._carrier.undo()
            raise
        if self._part_of_mean is None:
            self._part_of_mean = self._kernels.zeros(self._v.size)
        self._carrier.set_mean(self._part_of_mean, again=True)
        self.spread(self._part_of_mean)
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
            scaled = source(scale * lazy(self._mean_there))
            self._kernels.combine(scaled.terms, scaled.factors, writable(out))
        else:
            self._kernels.add_dense(self._mean_there, scale, writable(out))

    def like(self, compressor: Compressor) -> Plan:
        """Return a plan of the same kind, see :meth:`Plan.like`. Collective."""
        numbers = self.placement.numbers
        return type(self)(self.comm, compressor, self.d, self.dtype, node=numbers.__getitem__, device=self.device)

    @property
    def alpha(self) -> float:
        """Contraction constant of the inner plan: the least over the rails, the same on all ranks."""
        return self._alpha

    @property
    def inside_nbytes(self) -> int:
        """Bytes that this rank sends to others of its node in an exchange."""
        others, shared = len(self._rows) - 1, self.shares
        vectors = 0 if shared else int(self._counts.sum()) - self._v.size + others * self._v.size
        return others * self._word.nbytes * (3 if shared else 2) + vectors * self.dtype.itemsize * (others > 0)

    @property
    def between(self) -> Traffic:
        """Bytes of one exchange of this rank with those of other nodes."""
        return self._carrier.traffic

    @property
    def traffic(self) -> Traffic:
        """Bytes of one exchange, those inside the node included."""
        between, inside = self.between, self.inside_nbytes
        dense = 2 * (self.size - 1) * self.d * self.dtype.itemsize // self.size
        return Traffic(between.sent_nbytes + inside, between.received_nbytes + inside, dense)


def same_memory(x: Vector, row: Vector) -> bool:
    """Tell whether an array is the memory of another one."""
    return x is row or (x.size == row.size and bool(x.ctypes.data == row.ctypes.data))
