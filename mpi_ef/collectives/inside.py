"""What the ranks of a node do with one another: sums in memory that they share, or by messages; errors that all raise."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Combination, lazy, source
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import DisagreementError, MpiEfError, NonFiniteError, PeerError
from mpi_ef.kernels.backend import backend

from .exchange import Timer
from .in_flight import landed, took_off
from .placement import Placement
from .shared import NOT_MPI, shared_zeros

__all__ = ["Inside", "same_memory"]


class Inside:
    """The vectors of a node, (d,) each, of which this rank sums up a part and sends on what has become of it.

    Construction is collective over `comm`. An exchange is :meth:`gather`, or :meth:`post` and :meth:`advance`; then
    :meth:`settle`, with what the rail has raised; then, if that does not raise, :meth:`spread`.

    Parameters
    ----------
    subject : str
        The plan, for messages.
    comm : Comm
        All ranks.
    placement : Placement
    parts : (s, 2) int64
        Where those of the node's ranks begin and end.
    kernels : backend where vectors are
    d : int
    seconds : dict of str to float
        As :attr:`Plan.seconds`.

    Attributes
    ----------
    shares : bool
        Whether the vectors are in memory that the node shares.
    part : slice
        This rank's.
    row : (d,) array or None
        See :class:`NodeMean`.
    """

    def __init__(self, subject: str, comm: Comm, placement: Placement, parts: NDArray[np.int64], kernels: Any, d: int,
                 seconds: dict[str, float]) -> None:
        self._subject, self._comm, self._node, self._kernels, self._d = subject, comm, placement.node, kernels, d
        self._pending, self._on_host = placement.pending, kernels.device == "cpu"
        s, place, dtype = len(parts), int(self._node.Get_rank()), kernels.dtype
        self._host = backend(dtype)
        self._counts, self._places = parts[:, 1] - parts[:, 0], parts[:, 0].copy()
        self.part, size = slice(*parts[place].tolist()), int(self._counts[place])
        self._arriving = np.full(s, size), np.arange(s) * size
        rows, why = shared_zeros(self._node, s + 1, d, dtype) if s > 1 else (None, "")
        self._warn([rank for rank, theirs in enumerate(comm.allgather(why)) if theirs], why)
        self.shares = rows is not None
        if rows is not None:
            self._rows, self._mean, self._landing = rows[:s], rows[s, :d], rows[place, :d]
        else:
            self._rows, self._mean = self._host.zeros((s, size)), self._host.zeros(d)
            self._landing = None if self._on_host else self._host.zeros(d)
        self.row = self._landing if self.shares and self._on_host else None
        self._formed: Any = None  # a vector that has no row
        self._last: Vector = self._mean  # this rank's vector of the last exchange
        self._factor = placement.nodes / int(comm.Get_size())
        self._v = self._host.zeros(size)
        self._v_there, self._mean_there = (here if self._on_host else kernels.zeros(here.size)
                                           for here in (self._v, self._mean))
        self._word, self._words = np.zeros(3, np.int64), np.zeros((s, 3), np.int64)
        self._nothing = source(np.zeros(0, dtype))
        self._refusal: MpiEfError | None = None  # of this rank, in the last exchange
        self._request: Any = None
        self._encoding, self._communicating, self._decoding = (
            Timer(seconds, name) for name in ("encode", "communicate", "decode"))

    def _warn(self, ranks: list[int], why: str) -> None:
        if ranks and ranks[0] == self._comm.Get_rank() and why != NOT_MPI:
            warnings.warn(f"{self._subject}: {ranks_text(ranks)} share no memory with those of their node ({why}); "
                          "vectors travel there as messages, with the same results", RuntimeWarning, stacklevel=4)

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
        self._take(x, refusal, step, keep=False)
        with self._communicating:
            self._fence()
            self._node.Allgather(self._word, self._words)
        return self._slice()

    def post(self, x: Vector | Combination, refusal: MpiEfError | None, step: tuple[int, int],
             go_on: Callable[[Vector, MpiEfError | None], None]) -> None:
        """Begin what :meth:`gather` does, without waiting: `x` may change, but for the row. Collective over the node.

        `go_on` is called with what that returns, in :meth:`advance`: plans with the same nodes go on in the order in which
        they have begun, which is the same on all ranks.
        """
        self._take(x, refusal, step, keep=True)
        self._fence()
        self._go_on = go_on
        self._request = self._node.Iallgather(self._word, self._words)
        took_off(self, self._request)
        self._pending.append(self)
        self.advance(wait=False)

    def advance(self, *, wait: bool) -> None:
        """Let exchanges that :meth:`post` has begun go on, those before this one first; all those up to it with `wait`.

        Without it, as far as no rank has to be waited for. Local without `wait`.
        """
        pending = self._pending
        while pending and (self in pending if wait else pending[0].has_arrived()):
            first = pending.pop(0)
            with first._communicating:  # noqa: SLF001
                first._request.Wait()  # noqa: SLF001
            landed(first)
            first._go_on(*first._slice())  # noqa: SLF001

    def has_arrived(self) -> bool:
        """Tell whether an exchange that has begun can go on without waiting for another rank. Local."""
        return (self.shares or len(self._rows) == 1) and bool(self._request.Test())

    def _take(self, x: Vector | Combination, refusal: MpiEfError | None, step: tuple[int, int], *, keep: bool) -> None:
        """Put this rank's vector where it is read, and make the word for the others. Local."""
        self._refusal, alone = refusal, len(self._rows) == 1
        if refusal is None:
            with self._encoding:
                self._last = self._laid(x, keep=keep and not alone)
                if alone:
                    self._host.mean_slice(self._last.reshape(1, -1), self.part.start, self._factor, self._v)
                    self._last = self._v
        self._word[:] = refusal is None, *step

    def _slice(self) -> tuple[Vector, MpiEfError | None]:
        """Return what :meth:`gather` does, once the words of the node are there. Collective where memory is not shared."""
        self._fence()
        if self._refusal is not None or not (self._words == self._word).all():
            return self._v_there, self._refusal or PeerError(f"{self._subject}: a rank of its node does not take part")
        if len(self._rows) > 1:
            if not self.shares:
                with self._communicating:
                    self._node.Alltoallv([self._last, (self._counts, self._places)], [self._rows, self._arriving])
            with self._decoding:
                self._host.mean_slice(self._rows, self.part.start if self.shares else 0, self._factor, self._v)
        if self._v_there is not self._v:
            self._kernels.to_device(self._v, self._v_there)
        return self._v_there, None

    def _laid(self, x: Vector | Combination, *, keep: bool) -> Any:
        """Return this rank's vector, (d,), on the host, in its row where there is one; a copy with `keep`. Local."""
        terms, on_host = lazy(x).terms, self._on_host
        vector, plain = terms[0][1], len(terms) == 1 and terms[0][0] == 1
        if plain and on_host and (not keep if self._landing is None else same_memory(vector, self._landing)):
            return vector
        if not on_host and plain:
            self._kernels.to_host(vector, self._landing)
            return self._landing
        formed = source(x)
        if on_host and self._landing is not None:
            self._host.combine(formed.terms, formed.factors, self._landing)
            return self._landing
        if self._formed is None:
            self._formed = self._kernels.zeros(self._d)
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
            self._node.Allgather(self._word, self._words)
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
        subject, mine = f"{self._subject}.exchange", self._refusal
        finite = mine is not None or bool(self._host.all_finite(self._last))
        texts = ["" if error is None else str(error) for error in (mine, problem)]
        said: list[tuple[str, bool, str, str]] = self._comm.allgather((texts[0], finite, type(problem).__name__, texts[1]))
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
        if not self._on_host:
            self._kernels.to_host(part, mine)
        elif not same_memory(part, mine):
            mine[:] = part
        if self.shares:
            self._all_fine(fine=True)
        elif len(self._rows) > 1:
            with self._communicating:
                self._node.Allgatherv(mine.copy(), [self._mean, (self._counts, self._places)])
        if self._mean_there is not self._mean:
            self._kernels.to_device(self._mean, self._mean_there)
        view: Vector = self._mean_there.view()
        view.flags.writeable = False
        return view

    @property
    def home(self) -> Vector | None:
        """Where the node reads this rank's slice of the result: what is there need not be copied. None on devices."""
        return self._mean[self.part] if self._on_host else None

    @property
    def sent_nbytes(self) -> int:
        """Bytes that this rank sends to others of its node in an exchange."""
        others, shared = len(self._rows) - 1, self.shares
        vectors = 0 if shared else int(self._counts.sum()) - self._v.size + others * self._v.size
        return others * int(self._word.nbytes) * (3 if shared else 2) + vectors * int(self._v.itemsize) * (others > 0)


def same_memory(x: Vector, row: Vector) -> bool:
    """Tell whether an array is the memory of another one."""
    return x is row or (x.size == row.size and bool(x.ctypes.data == row.ctypes.data))
