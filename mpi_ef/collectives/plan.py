"""What all plans share: agreement of the ranks, checks of the vector, headers, traffic, timing."""

from abc import abstractmethod
from collections.abc import Callable
from itertools import count
from time import perf_counter
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef import kernels
from mpi_ef.comm.consensus import OnAllRanks, Telling, agree, check_not_freed, ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Combination, Compressor, Identity, Keep, Source, source
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import MpiEfError, NonFiniteError, OptionError, PeerError
from mpi_ef.runtime.ending import end_together
from mpi_ef.runtime.world import check_alone

from .frames import (
    NON_FINITE,
    OK,
    REJECTED,
    WIRE_VERSION,
    Frames,
    header_of,
    misunderstanding,
    status_of,
    what_is_wrong,  # fmt: skip
)
from .in_flight import landed, took_off
from .memory import Memory
from .misfit import misfit, unwritable
from .offer import Offer
from .traffic import Traffic

__all__ = ["Offer", "Plan", "Traffic", "plan_for"]

_numbers = count(1)


class Plan(OnAllRanks, Memory, metaclass=Telling):
    """A compressed mean over the ranks of a communicator, built once, executed many times.

    After ``plan.exchange(x)`` the plan holds the messages of this exchange, until the next one starts:
    :meth:`add_own` adds this rank's decoded message C(x_r), :meth:`add_mean` adds the mean over the ranks, the same
    bits on every rank.

    Parameters
    ----------
    comm : MPI.Comm
        Any intracommunicator, also one of size 1. Must outlive the plan.
    compressor : Compressor
    d : int
        Length of the vectors.
    dtype : numpy dtype
        float32 or float64.

    Attributes
    ----------
    own : int
        How many vectors this rank gives to a mean; 1 except for :class:`ClientsMean`.
    clients : int
        Of how many vectors it is the mean.
    exchanges : int
        Number of completed exchanges; also the key of random compressors.
    sent_nbytes : int
        Bytes that have left this rank in all exchanges so far.
    seconds : dict of str to float
        Wall time of this rank in "encode", "communicate" and "decode", added up over all exchanges.
    watched : bool
        Whether exchanges measure what is lost, in passes and memory of their own. False at first.
    lost : float or None
        ``||x - C(x)||^2 / ||x||^2`` of this rank's last watched exchange.

    Raises
    ------
    DisagreementError
        On all ranks, when they were given different arguments.
    OptionError, ShapeError, DtypeError
        When the arguments do not fit together; ranks with valid arguments raise `PeerError`.
    """

    own = 1
    saved_by = "state()"
    built = "the building of a plan"
    kinds: ClassVar[dict[str, type[Self]]] = {}  # those of which compressors say by name that they suit them

    def __init_subclass__(cls, *, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind:
            Plan.kinds[kind] = cls

    @classmethod
    def suited(cls, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike, *, residual: bool) -> "Plan":  # noqa: ARG003
        """Return a plan of this kind for :func:`plan_for`. Collective."""
        return cls(comm, compressor, d, dtype)

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32) -> None:
        subject = type(self).__name__
        if not hasattr(comm, "Iallgather") or not comm or comm.Is_inter():
            raise OptionError(f"{subject}: comm={comm!r} is not an intracommunicator; pass for example MPI.COMM_WORLD")
        check_alone(comm)
        end_together(comm)
        self.comm, self.size, self.rank = comm, int(comm.Get_size()), int(comm.Get_rank())
        self.clients = self.size
        self.compressor = compressor
        self.exchanges = self.sent_nbytes = 0
        self.seconds = {"encode": 0.0, "communicate": 0.0, "decode": 0.0}
        self.watched, self.lost = False, cast("float | None", None)
        self._refusal: MpiEfError | None = None
        self._refuses: MpiEfError | None = None  # of the next exchange
        self._started = False
        self._request: Any = None
        self._every_time: int | None = None  # bytes that an exchange sends
        self._siblings: dict[Compressor, Plan] = {}

        def facts() -> dict[str, object]:
            if not isinstance(compressor, Compressor):
                raise OptionError(f"{subject}: compressor={compressor!r} is no compressor; pass for example TopK(0.01)")
            codec = compressor.codec(d, dtype)
            self.d, self.dtype = codec.d, codec.dtype
            return {"plan": subject, "compressor": compressor, "d": self.d, "dtype": self.dtype,
                    "wire version": WIRE_VERSION, **self._bind()}  # fmt: skip

        told = agree(comm, subject, facts, "build the plan from the same arguments everywhere", tell=next(_numbers),
                     call=self.built)  # fmt: skip
        self._number: int = told[0]  # of rank 0, which has all plans of this communicator; in every header

    @abstractmethod
    def _bind(self) -> dict[str, object]:
        """Build codecs and buffers; return further facts on which the ranks must agree."""

    @abstractmethod
    def _encode(self, x: Source) -> bool:
        """Encode `x` into the frames that leave this rank; tell whether it is finite."""

    @abstractmethod
    def _launch(self) -> None:
        """Mark the frames and start the first communication without waiting for it."""

    @abstractmethod
    def _complete(self) -> None:
        """Do the communication, or what is left of it; leave the messages where `add_own` and `add_mean` find them."""

    @abstractmethod
    def add_own(self, out: Vector, scale: float = 1.0) -> None:
        """Add ``scale`` times this rank's decoded message to `out`. Local.

        Parameters
        ----------
        out : (d,) of the plan's dtype, contiguous, updated
        scale : float
        """

    @abstractmethod
    def add_mean(self, out: Vector, scale: float = 1.0) -> None:
        """Add ``scale`` times the mean of the messages to `out`, in rank order: the same bits on every rank. Local.

        Parameters
        ----------
        out : (d,) of the plan's dtype, contiguous, updated
        scale : float
        """

    @abstractmethod
    def set_mean(self, out: Vector, scale: float = 1.0, *, again: bool = False) -> None:
        """Overwrite `out` with ``scale`` times the mean of the messages, the same bits on every rank. Local.

        Parameters
        ----------
        out : (d,) of the plan's dtype, contiguous, overwritten
        scale : float
        again : bool
            Promises that `out` has not changed since this method, with this option, last wrote to it: a sparse mean
            then replaces the previous one entry by entry.
        """

    def forget(self) -> None:
        """Let the next ``set_mean(again=True)`` start afresh: somebody else has written to its array. Local."""

    def dense(self) -> "Plan":
        """Return a new plan for the uncompressed mean of the same vectors. Collective."""
        return self._like(Identity())

    def sibling(self, compressor: Compressor) -> "Plan":
        """Return a plan for the same vectors with another compressor, kept for the next time. Collective the first time.

        For rules that send two messages. Its number of exchanges, the key of random compressors, is set to this plan's.
        """
        if compressor not in self._siblings:
            self._siblings[compressor] = self._like(compressor)
        sibling = self._siblings[compressor]
        sibling.exchanges = self.exchanges
        return sibling

    def _like(self, compressor: Compressor) -> "Plan":
        return plan_for(self.comm, compressor, self.d, self.dtype)

    @property
    def all_sent_nbytes(self) -> int:
        """Bytes that have left this rank through this plan and its siblings."""
        return self.sent_nbytes + sum(sibling.sent_nbytes for sibling in self._siblings.values())

    @property
    def own_d(self) -> int:
        """Length of what this rank exchanges: its vectors one after the other."""
        return self.own * self.d

    @property
    def clients_d(self) -> int:
        """Length of the vectors of all clients one after the other."""
        return self.clients * self.d

    @property
    def server_d(self) -> int:
        """Length of what every rank keeps where it plays the server; 0 where the ranks share that."""
        return self.d

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """Bytes of one exchange."""

    @property
    def alpha(self) -> float:
        """Contraction constant of what this rank's message goes through, see :meth:`Compressor.alpha`."""
        return self.compressor.alpha(self.d)

    def exchange(self, x: Vector | Combination, *, keep: Keep | None = None) -> Self:
        """Send this rank's message and receive those of all. Collective.

        All ranks call this, or all call :meth:`start` and :meth:`wait`: MPI does not match the two forms.

        Parameters
        ----------
        x : (d,) of the plan's dtype, contiguous, this rank's vector, read only; or a combination of up to three such
            vectors, ``lazy(a) - b``, which is formed while it is encoded and costs no pass over memory of its own
        keep : Keep, optional
            What to leave behind in the same pass, for example the error x - C(x). When this raises, ``keep.into`` may
            have been overwritten.

        Returns
        -------
        Plan
            The plan itself, now holding the messages.

        Raises
        ------
        NonFiniteError
            On all ranks, when x has a NaN or Inf on any of them.
        ShapeError, DtypeError
            On a rank whose `x` does not fit the plan; all other ranks raise `PeerError`.
        """
        self._begin(x, keep)
        return self.wait()

    def offer(self, x: Vector | Combination, *, keep: Keep | None = None, **words: Any) -> Offer:
        """Return the exchange of `x` for somebody else to make. Local."""
        return Offer(self, x, keep, words)

    def refuse(self, error: MpiEfError) -> None:
        """Take part in the next exchange with an error in place of a message: all ranks raise there. Local."""
        self._refuses = error

    def progress(self) -> None:
        """Let MPI work on what :meth:`start` has begun, which happens inside of MPI calls only. Local."""
        if self._request is not None:
            self._request.Test()

    def start(self, x: Vector | Combination, *, keep: Keep | None = None) -> None:
        """Encode `x` and start to exchange it; `x` may be changed as soon as this returns. Collective.

        Every `start` is followed by one :meth:`wait`, in the same order of plans on all ranks; no rank may call
        :meth:`exchange` in their place, because MPI does not match the two forms. A problem with `x` is
        raised there, by all ranks together.
        """
        self._begin(x, keep)
        self._launch()

    def _begin(self, x: Vector | Combination, keep: Keep | None) -> None:
        if self._started:
            raise OptionError(f"{type(self).__name__}: start was called twice; call wait between them")
        check_not_freed(self.comm, type(self).__name__, "build the plan anew, on another one")
        began = perf_counter()
        self._refusal, self._refuses = self._refuses or self._problem(x, keep), None  # all ranks raise it, see _inspect
        if self._refusal is None:
            try:
                finite = self._encode(source(x, keep))
                self._refusal = None if finite else NonFiniteError("", (self.rank,))
            except MpiEfError as error:
                self._refusal = error
            except Exception as error:  # the other ranks are on their way into the exchange
                self._refusal = OptionError(f"{type(self).__name__}.exchange: {type(error).__name__}: {error}")
                self._refusal.__cause__ = error
        self._started = True
        self.seconds["encode"] += perf_counter() - began
        if self.watched and self._refusal is None:
            self.lost = self._measure_loss(source(x))

    def _measure_loss(self, x: Source) -> float:
        missing, decoding = np.empty(self.own_d, self.dtype), self.seconds["decode"]
        kernels.combine(x.terms, x.factors, missing, np.empty(kernels.COMBINE_SCRATCH, self.dtype))
        whole = float(np.linalg.norm(missing))
        self.add_own(missing, -1.0)
        self.seconds["decode"] = decoding
        return (float(np.linalg.norm(missing)) / whole) ** 2 if whole else 0.0

    def wait(self) -> Self:
        """Finish the exchange begun by :meth:`start`. Collective."""
        if not self._started:
            raise OptionError(f"{type(self).__name__}: wait was called without start; call start(x) first")
        self._started = False
        try:
            self._complete()
            self.sent_nbytes += self._sent_last()
        finally:
            self.exchanges += 1
        return self

    def _sent_last(self) -> int:
        """Return how many bytes have left this rank in the last exchange."""
        if self._every_time is None:
            self._every_time = self.traffic.sent_nbytes
        return self._every_time

    def _problem(self, x: Vector | Combination, keep: Keep | None) -> MpiEfError | None:
        subject = f"{type(self).__name__}.exchange"
        vectors = [vector for _, vector in x.terms] if isinstance(x, Combination) else [x]
        for vector in vectors:
            if problem := misfit(vector, self.own_d, self.dtype, subject, "x"):
                return problem
        if keep is None:
            return None
        if any(vector is keep.into or np.may_share_memory(vector, keep.into) for vector in vectors):
            return OptionError(f"{subject}: keep.into is one of the vectors that are sent; pass another array")
        return unwritable(keep.into, self.own_d, self.dtype, subject, "keep.into")

    def _mark(self, frames: Frames) -> None:
        """Write the headers of frames that leave this rank."""
        status = OK if self._refusal is None else NON_FINITE if isinstance(self._refusal, NonFiniteError) else REJECTED
        frames.headers.fill(header_of(self.exchanges, status, self._number))

    def _inspect(self, frames: Frames) -> None:
        """Raise, on all ranks, what the headers of the frames of all ranks say."""
        headers = frames.headers.tolist()  # quicker than a comparison of arrays for up to 200 ranks
        if headers.count(header_of(self.exchanges, OK, self._number)) == len(headers):
            return
        subject = f"{type(self).__name__}.exchange"
        if error := misunderstanding(frames, subject):
            raise error
        if rejected := status_of(frames, REJECTED):
            texts = self.comm.allgather("" if self._refusal is None else str(self._refusal))
            if self._refusal is not None and self.rank in rejected:
                self._refusal.everywhere = set(texts) == {str(self._refusal)}
                raise self._refusal
            raise PeerError(f"{subject}: {ranks_text(rejected)} raised: {texts[rejected[0]]}")
        raise what_is_wrong(frames, subject)

    def _post(self, nonblocking: Callable[[Any, Any], Any], send: Frames, receive: Frames) -> None:
        """Start a communication, which :meth:`_communicate` finishes."""
        receive.expect()
        self._request = nonblocking(send.message, receive.message)
        took_off(self, self._request)

    def _communicate(self, blocking: Callable[[Any, Any], None], send: Frames, receive: Frames) -> None:
        """Finish what :meth:`_launch` has started, or do it now."""
        began = perf_counter()
        if self._request is None:
            receive.expect()
            blocking(send.message, receive.message)
        else:
            self._request.Wait()
            self._request = None
            landed(self)
        self.seconds["communicate"] += perf_counter() - began


def plan_for(
    comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *, residual: bool = True
) -> Plan:
    """Return the plan that suits a compressor, by what its attribute ``plan`` says. Collective.

    Gathered for sparse ones, dense for Identity, :class:`LowRankMean` for LowRank, else two-phase.

    Parameters
    ----------
    comm, compressor, d, dtype
        See :class:`Plan`.
    residual : bool
        Whether the plan keeps something from one exchange to the next: a two-phase plan the error of its second phase, a
        low-rank one the factor it begins with.
    """
    kind = getattr(compressor, "plan", "gather")  # what is no compressor is refused there, on all ranks
    return Plan.kinds[kind].suited(comm, compressor, d, dtype, residual=residual)
