"""What all plans share: agreement of the ranks, checks of the vector, headers, traffic, timing."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.comm.consensus import OnAllRanks, SharedErrors, agree, check_not_freed, shared_errors
from mpi_ef.comm.nodes import Nodes, node_name
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Codec, Combination, Compressor, Identity, Keep, Source, source
from mpi_ef.compress.combination import Vector
from mpi_ef.compress.compressor import check_compressor, said_finite
from mpi_ef.errors import MpiEfError, OptionError, briefly, nearest, shortage, told
from mpi_ef.kernels.backend import backend
from mpi_ef.runtime.ending import end_together
from mpi_ef.runtime.world import check_alone
from mpi_ef.statetree import Leaf, Reshard

from .exchange import Exchange, Round, Timer
from .frames import WIRE_VERSION, Frames
from .misfit import check_device, misfit, unwritable
from .offer import Offer
from .traffic import Accounted, LinkTraffic, Traffic
from .ways import ways_of

__all__ = ["LinkTraffic", "Offer", "Plan", "Traffic"]

_numbers = count(1)


class Plan(OnAllRanks, Accounted, metaclass=SharedErrors):
    """A compressed mean over the ranks of a communicator, built once, executed many times.

    After ``plan.exchange(x)`` the plan holds the messages of this exchange, until the next one starts:
    :meth:`add_own` adds this rank's decoded message C(x_r), :meth:`add_mean` adds the mean over the ranks, the same
    bits on every rank.

    A plan of one's own is a subclass with :meth:`bind`, :meth:`encode`, :meth:`communicate`, :meth:`decode` and
    :attr:`traffic`.

    Parameters
    ----------
    comm : MPI.Comm
        Any intracommunicator, also one of size 1. Must outlive the plan.
    compressor : Compressor
    d : int
        Length of the vectors.
    dtype : numpy dtype
        float32 or float64.
    device : str or torch.device
        Where the vectors of this rank are: "cpu", arrays of NumPy, or a device of torch, "cuda:0", tensors there. Other
        ranks may have theirs elsewhere: messages are the same bytes.

    Attributes
    ----------
    own, own_d : int
        How many vectors this rank gives to a mean, 1 except for :class:`ClientsMean`; their length one after the other.
    clients : int
        Of how many vectors it is the mean.
    nodes : Nodes
        Which rank is on which node, see :mod:`mpi_ef.comm.nodes`.
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
    advice: Any = None  # that has led to this plan, see :class:`mpi_ef.collectives.advice.Advice`
    saved_by = "state()"
    built = "the building of a plan"
    goes_on: ClassVar[bool] = False  # whether what it does between two rounds is of this rank alone, and may happen early
    keeps: ClassVar[str] = ""  # the option that says whether anything is kept from one exchange to the next
    first = 0  # the number of this rank's first one
    broken: Any = None  # (n,) bool: of which vectors nothing was sent, or nothing that is finite, where a plan goes on then
    sizes: Mapping[str, int] = {}  # of further arrays that rules keep, by name
    kinds: ClassVar[dict[str, type[Self]]] = {}  # those of which compressors say by name that they suit them

    def __init_subclass__(cls, *, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind:
            Plan.kinds[kind] = cls

    @staticmethod
    def kind_for(comm: Comm, compressor: Compressor, subject: str = "plan_for") -> "type[Plan]":
        """Return the class of plans that suits a compressor. Local; raises on all ranks where there is none."""
        kind = compressor.plan if isinstance(compressor, Compressor) else "gather"  # which refuses it, on all ranks
        if kind not in Plan.kinds:
            with shared_errors(comm, subject, Plan.built):
                hint = nearest(kind, Plan.kinds, f"take one of {', '.join(Plan.kinds)}")
                raise OptionError(f"{subject}: {briefly(compressor)} wants a plan of kind {briefly(kind)}, which there is "
                                  f"not; {hint}")
        return Plan.kinds[kind]

    @classmethod
    def suited(cls, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike, *, residual: bool,
               device: str = "cpu") -> "Plan":
        """Return a plan of this kind for :func:`plan_for`. Collective."""
        where = {} if device == "cpu" else {"device": device}
        options: dict[str, Any] = {cls.keeps: residual} if cls.keeps else {}
        return cls(comm, compressor, d, dtype, **options, **where)

    def __init__(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *,
                 device: str = "cpu") -> None:
        subject = type(self).__name__
        check_not_freed(comm, subject)
        if not hasattr(comm, "Iallgather") or comm.Is_inter():
            raise OptionError(f"{subject}: comm={briefly(comm)} is not an intracommunicator; pass for example "
                              "MPI.COMM_WORLD")
        check_alone(comm)
        end_together(comm)
        self.comm, self.size, self.rank = comm, int(comm.Get_size()), int(comm.Get_rank())
        self.clients = self.size
        self.compressor, self.device = compressor, str(device)
        self.exchanges = self.sent_nbytes = 0
        self.seconds = {"encode": 0.0, "communicate": 0.0, "decode": 0.0}
        self.watched, self.lost = False, cast("float | None", None)
        self._encoding, communicating, self._decoding = (Timer(self.seconds, name) for name in self.seconds)
        self._exchange = Exchange(comm, subject, communicating, self._encoding)
        self._exchange.goes_on, self._exchange.goes_early = self.goes_on, self.device == "cpu"
        self._exchange.let_depart(wait=True)  # what follows is collective
        self._direct = self.device != "cpu" and ways_of(comm).direct
        self._refuses: MpiEfError | None = None  # of the next exchange
        self._every_time: int | None = None  # bytes that an exchange sends
        self._companions: dict[Compressor, Plan] = {}

        def facts() -> dict[str, object]:
            check_compressor(subject, compressor=compressor)
            check_device(subject, self.device)
            codec = compressor.codec_on(self.device, d, dtype)
            if not isinstance(codec, Codec):
                raise OptionError(f"{subject}: {briefly(compressor)}.codec returned {briefly(codec)}, which is no Codec")
            self.d, self.dtype, self._kernels = codec.d, codec.dtype, backend(codec.dtype, self.device)
            if not isinstance(bound := self.bind(), Mapping):
                raise OptionError(f"{subject}.bind returned {briefly(bound)}; return a dict of what ranks must agree on")
            return {"plan": subject, "compressor": compressor, "d": self.d, "dtype": self.dtype,
                    "bytes of a message": codec.nbytes, "wire version": WIRE_VERSION, **bound}

        answers = agree(comm, subject, facts, "build the plan from the same arguments everywhere",
                        value=(next(_numbers), node_name(comm)), call=self.built)
        self.own_d, self.nodes = self.own * self.d, Nodes.named(name for _, name in answers)
        between = self.nodes.count > 1 and hasattr(comm, "Isend")  # and each rank can send to any other
        self.between_nodes = self.nodes if between else None
        self._exchange.number = answers[0][0]  # of rank 0, which has all plans of this communicator; in every header

    @abstractmethod
    def bind(self) -> dict[str, object]:
        """Build codecs and frames; return further facts on which the ranks must agree. Local."""

    @abstractmethod
    def encode(self, x: Source, *, split: bool) -> bool:
        """Encode `x` into the frames that leave this rank; tell whether it is finite. Local.

        `x` is what is sent, as terms and factors, and what to keep. With `split` the caller may change what `x` is made of
        before :meth:`communicate` goes on.
        """

    @abstractmethod
    def communicate(self) -> Iterator[Round]:
        """Yield the rounds in which frames travel; after each, those of all ranks are there, and all is well. Collective.

        Between rounds it may do anything that is collective. The first one may be under way while the program computes.
        """

    @abstractmethod
    def decode(self, out: Vector, scale: float, *, own: bool = False, overwrite: bool = False) -> None:
        """Add ``scale`` times the mean of the messages to `out`, or this rank's own, or overwrite `out` with it. Local.

        Sums go in rank order, so that all ranks have the same bits.
        """

    def add_own(self, out: Vector, scale: float = 1.0) -> None:
        """Add ``scale`` times this rank's decoded message to `out`. Local.

        `out` is (own_d,), of the plan's dtype, contiguous.
        """
        with self._decoding:
            self.decode(self._kernels.array(out), scale, own=True)

    def add_mean(self, out: Vector, scale: float = 1.0) -> None:
        """Add ``scale`` times the mean of the messages to `out`, in rank order: the same bits on every rank. Local.

        `out` is (d,), of the plan's dtype, contiguous.
        """
        with self._decoding:
            self.decode(self._kernels.array(out), scale)

    def set_mean(self, out: Vector, scale: float = 1.0, *, again: bool = False) -> None:  # noqa: ARG002
        """Overwrite `out` with ``scale`` times the mean of the messages, the same bits on every rank. Local.

        `out` is (d,), of the plan's dtype, contiguous. `again` promises that it has not changed since this method, with this
        option, last wrote to it: a sparse mean then replaces the previous one entry by entry.
        """
        with self._decoding:
            self.decode(self._kernels.array(out), scale, overwrite=True)

    @property
    def label(self) -> str:
        """What reports call it: the name of its class, of nodes with that of the plan between them."""
        return type(self).__name__

    @property
    def saved_as(self) -> str:
        """What must be the same where a state is loaded: by default the name of the class."""
        return type(self).__name__

    def zeros(self, size: int, dtype: DTypeLike | None = None) -> Any:
        """Return an array of zeros where the vectors of this rank are, of their dtype unless another one is named. Local."""
        return self._kernels.zeros(size, dtype)

    def frames(self, rows: int, wire_nbytes: int) -> Frames:
        """Return memory for frames, where the vectors of this rank are and where MPI sees it. Local."""
        return Frames(rows, wire_nbytes, self._kernels, direct=self._direct)

    def array(self, x: Any) -> Any:
        """Return `x`, or the array over the memory of a tensor on the plan's device. Local."""
        return self._kernels.array(x)

    def misfit(self, x: Any, subject: str, name: str, d: int | None = None) -> MpiEfError | None:
        """Return what is wrong with a vector of this rank, (own_d,) or (`d`,), or None. Local."""
        return misfit(x, self.own_d if d is None else d, self.dtype, subject, name, self._kernels)

    def loaded(self) -> None:
        """Derive again what follows from :meth:`state`, which has been written. Local."""

    def forget(self) -> None:
        """Let the next ``set_mean(again=True)`` start afresh: its array has been written to. Local."""

    def dense(self) -> "Plan":
        """Return a new plan for the uncompressed mean of the same vectors. Collective."""
        return self.like(Identity())

    def companion(self, compressor: Compressor) -> "Plan":
        """Return a plan for the same vectors with another compressor, kept for the next time. Collective the first time.

        For rules that send two messages. Its number of exchanges, the key of random compressors, is set to this plan's.
        """
        if compressor not in self._companions:
            self._companions[compressor] = self.like(compressor)
        companion = self._companions[compressor]
        companion.exchanges = self.exchanges
        return companion

    def like(self, compressor: Compressor) -> "Plan":
        """Return a new plan for the same vectors, through which dense steps and second messages go. Collective."""
        where = {} if self.device == "cpu" else {"device": self.device}
        kind = Plan.kind_for(self.comm, compressor)
        return kind.suited(self.comm, compressor, self.d, self.dtype, residual=True, **where)

    @property
    def all_sent_nbytes(self) -> int:
        """Bytes that have left this rank through this plan and its companions."""
        return self.sent_nbytes + sum(companion.sent_nbytes for companion in self._companions.values())

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
            Itself, now holding the messages.

        Raises
        ------
        NonFiniteError
            On all ranks, when x has a NaN or Inf on any of them.
        ShapeError, DtypeError
            On a rank whose `x` does not fit the plan; all other ranks raise `PeerError`.
        """
        self._begin(x, keep, split=False)
        return self.wait()

    def offer(self, x: Vector | Combination, *, keep: Keep | None = None, **options: Any) -> Offer:
        """Return the exchange of `x`, for a driver to make. Local."""
        return Offer(self, x, keep, options)

    def refuse(self, error: MpiEfError) -> None:
        """Take part in the next exchange with an error in place of a message: all ranks raise there. Local."""
        self._refuses = error

    def progress(self) -> None:
        """Let MPI work on what :meth:`start` has begun, which happens inside of MPI calls only. Local."""
        self._exchange.progress()

    def start(self, x: Vector | Combination, *, keep: Keep | None = None) -> None:
        """Encode `x` and start to exchange it; `x` may be changed as soon as this returns. Collective.

        Every `start` is followed by one :meth:`wait`, in the same order of plans on all ranks; no rank may call
        :meth:`exchange` in their place, because MPI does not match the two forms. A problem with `x` is
        raised there, by all ranks together.
        """
        self._begin(x, keep, split=True)
        self._exchange.launch()

    def _begin(self, x: Vector | Combination, keep: Keep | None, *, split: bool) -> None:
        if self._exchange.is_open:
            raise OptionError(f"{type(self).__name__}: start was called twice; call wait between them")
        check_not_freed(self.comm, type(self).__name__, "build the plan again, on another one")
        finite = True
        with self._encoding:
            x, keep = self._taken(x, keep)
            refusal, self._refuses = self._refuses or self._problem(x, keep), None  # all ranks raise it
            if refusal is None:
                try:
                    finite = said_finite(self.encode(source(x, keep), split=split), f"{type(self).__name__}.encode")
                except MpiEfError as error:
                    refusal = error
                except Exception as error:  # the other ranks are on their way into the exchange
                    subject = f"{type(self).__name__}.exchange"
                    refusal = shortage(subject, error) or OptionError(f"{subject}: {told(error)}")
                    refusal.__cause__ = error
        self._exchange.begin(self.communicate(), self.exchanges, refusal, finite)
        if self.watched and refusal is None:
            self.lost = self._measure_loss(source(x))

    def _measure_loss(self, x: Source) -> float:
        missing = self._kernels.empty(self.own_d)
        self._kernels.combine(x.terms, x.factors, missing)
        whole: float = self._kernels.norm(missing)
        self.decode(missing, -1.0, own=True)
        return (self._kernels.norm(missing) / whole) ** 2 if whole else 0.0

    def wait(self) -> Self:
        """Finish the exchange begun by :meth:`start`. Collective."""
        if not self._exchange.is_open:
            raise OptionError(f"{type(self).__name__}: wait was called without start; call start(x) first")
        try:
            self._exchange.complete()
            self.sent_nbytes += self._sent_last()
        finally:
            self.exchanges += 1
        return self

    def _sent_last(self) -> int:
        """Return how many bytes have left this rank in the last exchange."""
        if self._every_time is None:
            self._every_time = self.traffic.sent_nbytes
        return self._every_time

    def _taken(self, x: Vector | Combination, keep: Keep | None) -> tuple[Vector | Combination, Keep | None]:
        """Return what is sent and what is kept, with arrays in the place of tensors on the plan's device. Local."""
        if self.device == "cpu":
            return x, keep
        arrays: dict[int, Any] = {}

        def of(one: Any) -> Any:
            if not isinstance(one, Combination):
                return self._kernels.array(one)
            return Combination(*((factor, arrays.setdefault(id(vector), self._kernels.array(vector)))
                                 for factor, vector in one.terms))

        sent = of(x)
        if keep is None:
            return sent, None
        return sent, Keep(sent if keep.of is x else of(keep.of), self._kernels.array(keep.into), keep.less_message)

    def _problem(self, x: Vector | Combination, keep: Keep | None) -> MpiEfError | None:
        subject = f"{type(self).__name__}.exchange"
        vectors = [vector for _, vector in x.terms] if isinstance(x, Combination) else [x]
        for vector in vectors:
            if problem := misfit(vector, self.own_d, self.dtype, subject, "x", self._kernels):
                return problem
        if keep is None:
            return None
        if problem := unwritable(keep.into, self.own_d, self.dtype, subject, "keep.into", self._kernels):
            return problem
        if any(vector is keep.into or self._kernels.overlap(vector, keep.into) for vector in vectors):
            return OptionError(f"{subject}: keep.into is one of the vectors that are sent; pass another array")
        return None

    def leaves(self) -> dict[str, Leaf]:
        """Return this rank's named arrays that the next exchanges depend on, and what they are; they are saved. Local."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays of :meth:`leaves`. Not copies. Local."""
        return {name: leaf.array for name, leaf in self.leaves().items()}

    @property
    def share(self) -> Reshard | None:
        """How vectors get to other ranks that belong to clients, not to ranks; None where they belong to ranks."""
        return None

    def undo(self) -> None:
        """Take back what the last exchange has changed of :meth:`state`, because its messages will not be used. Local.

        Once, and only after one that has not raised.
        """
