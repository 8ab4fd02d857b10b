"""Any function of blocks of arrays, on ranks of which some may be slow, silent, or compute wrongly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives.ends import host_of
from mpi_ef.collectives.late import Frame, next_number
from mpi_ef.collectives.server import Server
from mpi_ef.collectives.worker import Worker
from mpi_ef.comm.consensus import OnAllRanks, SharedErrors, agree
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress.compressor import words
from mpi_ef.errors import DtypeError, NonFiniteError, OptionError, ShapeError, SilenceError, briefly, nearest
from mpi_ef.ranges import whole, within

from .berrut import HOW, BerrutCode, rows_of
from .locator import Parity, locate
from .pieces import Pieces, sent_in_pieces
from .returned import array_in, check_called, check_comm

__all__ = ["CodedMap", "Mapped", "coded_map", "leave"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Mapped:
    """What :func:`coded_map` returns on rank 0.

    Attributes
    ----------
    values : (K, ...) array
        f of every block, of the dtype that f returns.
    error_estimate : (K,) float64
        Of every block the estimated norm of its error by that of its value; 0 where it is the answer to the block itself.
    missing : tuple of int
        Evaluations that were not used as no answer came.
    not_finite, misfits : tuple of int
        Those with NaN or Inf, and with another shape or dtype than most.
    wrong, wrong_ranks : tuple of int
        Those that were located as wrong, and the ranks that computed them.
    terms : int
        Polynomials of least squares; 0 where no block was missing, or Berrut's formula was taken.
    """

    values: Array
    error_estimate: NDArray[np.float64]
    missing: tuple[int, ...]
    not_finite: tuple[int, ...]
    misfits: tuple[int, ...]
    wrong: tuple[int, ...]
    wrong_ranks: tuple[int, ...]
    terms: int


class CodedMap(OnAllRanks, metaclass=SharedErrors):
    """Maps one function over blocks of one shape, again and again. Construction is collective.

    Rank 0 calls :meth:`map`, the others :meth:`serve`, which returns when rank 0 has called :meth:`close`; a context does
    that. Evaluation i is computed by rank ``1 + i mod (n - 1)``; on one rank by that itself. A rank that was late in one map
    takes part in the next one when it is free.

    See :func:`coded_map` for parameters; `shape` and `dtype` are those of a block.
    """

    saved_by = "what was computed"

    def __init__(self, comm: Comm, f: Callable[[Array], Array], blocks: int, shape: Sequence[int], dtype: Any, *,
                 evaluations: int | None = None, kind: str = "sbacc", patience_seconds: float = 60.0, spare: int = 0,
                 wrong: int = 0, decode: str = "auto", floor: "float | Parity | None" = None,
                 sample: Array | Sequence[Array] | None = None) -> None:
        name = type(self).__name__
        check_comm(name, comm)
        self.comm, self.rank = comm, int(comm.Get_rank())
        self._f, self._wrong, self._decode, self.closed, self._round = f, wrong, decode, False, 0
        self._pieces = Pieces()  # of answers, also of those that a map has not waited for
        self._parity: Parity | None = None
        self._sample: list[Array] = []

        def facts() -> dict[str, object]:
            self._check(f, decode=decode, kind=kind)
            self.shape, self.dtype = tuple(int(length) for length in shape), np.dtype(dtype)
            if self.dtype not in (np.float32, np.float64):
                raise DtypeError(f"{name}: dtype={self.dtype} is neither float32 nor float64; convert the blocks")
            k = whole(name, 1, "8 is usual", blocks=blocks)
            self.code = BerrutCode.at_least(k, 3 * k if evaluations is None else evaluations, kind)
            within(name, "(0, inf)", "60 is usual", patience_seconds=patience_seconds)
            whole(name, 0, "as many answers as blocks are needed", spare=spare, most=self.code.evaluations - k)
            whole(name, 0, "so many answers may be wrong", wrong=wrong)
            if self.rank == 0:
                self._check_parity(floor, sample)
            return {"shape": self.shape, "dtype": self.dtype, "code": self.code, "patience_seconds": patience_seconds,
                    "spare": spare, "wrong": wrong, "decode": decode}

        said = agree(comm, name, facts, "call it with the same arguments everywhere", value=(next_number(), host_of(comm)))
        self._spare, number = spare, said[0][0]
        self._nbytes = words(int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize)
        order = 8 + self._nbytes
        self._server: Server | None = None
        self._worker: Worker | None = None
        if self.rank == 0:
            hosts = {rank: host for rank, (_, host) in enumerate(said) if rank}
            if hosts:
                self._server = Server(comm, hosts, order, Pieces.nbytes, number, float(patience_seconds))
            if self._sample:
                self._learn()
        else:
            self._worker = Worker(comm, 0, order, Pieces.nbytes, number, float(patience_seconds))

    def _check(self, f: object, *, decode: str, kind: str) -> None:
        name = type(self).__name__
        check_called(name, "of an array", f=f)
        if decode not in HOW:
            hint = nearest(str(decode), HOW, f"take {HOW[0]}")
            raise OptionError(f"{name}: there is no decoding {briefly(decode)}; {hint}")
        if self._wrong and kind != "sbacc":
            raise OptionError(f"{name}: wrong={self._wrong} answers are located with kind='sbacc' alone")

    def _check_parity(self, floor: "float | Parity | None", sample: Array | Sequence[Array] | None) -> None:
        name, n, wrong = type(self).__name__, self.code.evaluations, self._wrong
        if wrong and (floor is None) == (sample is None):
            raise OptionError(f"{name}: wrong={wrong} needs floor=, or sample= (what parity right answers have is not "
                              "guessed): pass typical blocks, small ones, whose evaluations rank 0 computes itself")
        if not wrong and (floor is not None or sample is not None):
            raise OptionError(f"{name}: floor= and sample= are for wrong answers, and wrong=0 looks for none; pass wrong=1 "
                              "or more")
        if isinstance(floor, Parity) and floor.evaluations != n:
            raise OptionError(f"{name}: floor is the parity of {floor.evaluations} evaluations, and here are {n}; learn it "
                              "with as many")
        if floor is not None:
            self._parity = floor if isinstance(floor, Parity) else Parity.of(n, floor)
        if sample is not None:
            self._sample = rows_of(sample, self.code.blocks, f"{name}: sample")

    def _learn(self) -> None:
        """Measure what parity right answers have; after an error the others end well."""
        try:
            answers = [self._f_of(u).copy() for u in self.code.encode(self._sample)]
            self._parity = Parity.learned(answers, self.code.blocks)
            self._sample.clear()
        except BaseException:
            self.close()
            raise

    def _f_of(self, block: Array) -> Array:
        return array_in(type(self).__name__, "f", self._f(_read_only(block)))

    def rank_of(self, i: int) -> int:
        """Return which rank computes evaluation i. Local."""
        others = int(self.comm.Get_size()) - 1
        return 1 + i % others if others else 0

    def map(self, blocks: Array | Sequence[Array]) -> Mapped:
        """Return f of all blocks. Local, of rank 0; the others are in :meth:`serve`.

        Raises
        ------
        SilenceError
            Fewer answers than blocks came, or fewer that are finite and of one shape; what came is lost.
        NonFiniteError
            Blocks have NaN or Inf.
        WrongAnswersError
            Wrong answers are there, and cannot be named.
        """
        name, n = type(self).__name__, self.code.evaluations
        if self.rank or self.closed:
            raise OptionError(f"{name}: map() is rank 0's, and before close(); the others call serve()")
        rows = rows_of(blocks, self.code.blocks, f"{name}: blocks")
        if rows[0].shape != self.shape or rows[0].dtype != self.dtype:
            raise ShapeError(f"{name}: blocks are {rows[0].dtype} of shape {rows[0].shape}; it was built for {self.dtype} "
                             f"of shape {self.shape}")
        if bad := [j for j, row in enumerate(rows) if not np.isfinite(row).all()]:
            raise NonFiniteError(f"{name}: blocks {briefly(bad)} have NaN or Inf, and so would all that is mixed of them; "
                                 "leave them out, or fill them", (0,))
        self._round += 1
        if self._server is None:  # f may return the same memory every time
            answers = {i: self._f_of(self.code.input(rows, i)).copy() for i in range(n)}
        else:
            answers = self._collected(self._server, rows)
        return self._decoded(answers)

    def _collected(self, server: Server, rows: list[Array]) -> dict[int, Array]:
        """Return the answers that come, by evaluation."""
        n = self.code.evaluations
        waiting = {rank: [i for i in range(n) if self.rank_of(i) == rank] for rank in server.hosts}
        answers = dict[int, Array]()

        def give() -> None:
            for rank, mine in waiting.items():
                if mine and server.free(rank):
                    frame = server.frame()
                    frame.step = mine.pop(0)
                    frame.wire[:8].view(np.int64)[0] = self._round
                    self._block_of(frame)[...] = self.code.input(rows, frame.step)
                    server.order(rank, frame)
                    server.drop(frame)

        def take(rank: int, frame: Frame) -> None:
            done = self._pieces.add(rank, frame) if frame.step >= 0 else None
            if frame.step >= 0 and done is None:
                server.still(rank, frame.step)
            server.drop(frame)
            if done is not None and done.round == self._round:
                answers[done.step] = done.array
            give()

        give()
        enough = server.wait(lambda: len(answers) >= n - self._spare, take)
        if not enough and len(answers) < self.code.blocks:
            silent = [rank for rank in server.hosts if any(self.rank_of(i) == rank and i not in answers for i in range(n))]
            raise SilenceError(f"{type(self).__name__}: {server.listed(silent)} silent for {server.patience_seconds:g} s, "
                               f"{len(answers)} of {n} answers are here, and {self.code.blocks} blocks need as many",
                               tuple(silent))
        return dict(sorted(answers.items()))

    def _block_of(self, frame: Frame) -> Array:
        nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        block: Array = frame.wire[8 : 8 + nbytes].view(self.dtype).reshape(self.shape)
        return block

    def _decoded(self, answers: dict[int, Array]) -> Mapped:
        n = self.code.evaluations
        kinds = [(array.shape, array.dtype) for array in answers.values()]
        most = max(kinds, key=kinds.count)
        misfits = [i for i, array in answers.items() if (array.shape, array.dtype) != most]
        if most[1] not in (np.float32, np.float64):
            raise DtypeError(f"{type(self).__name__}: f returns {most[1]}; let it return float32 or float64")
        not_finite = [i for i, array in answers.items() if i not in misfits and not np.isfinite(array).all()]
        heard = sorted(set(answers) - set(misfits) - set(not_finite))
        if len(heard) < self.code.blocks:
            raise SilenceError(f"{type(self).__name__}: {len(answers)} of {n} answers are here, {len(not_finite)} of them "
                               f"with NaN or Inf and {len(misfits)} not of the shape and dtype of most, and "
                               f"{self.code.blocks} blocks need as many that are neither; look at f")
        wrong: tuple[int, ...] = ()
        if self._parity is not None:
            wrong = locate([answers[i] for i in heard], heard, self._parity, self._wrong)
            heard = [i for i in heard if i not in wrong]
        decoded = self.code.decode([answers[i] for i in heard], heard, self._decode)
        return Mapped(decoded.values, decoded.error_estimate, tuple(i for i in range(n) if i not in answers),
                      tuple(sorted(not_finite)), tuple(sorted(misfits)), wrong,
                      tuple(sorted({self.rank_of(i) for i in wrong})), decoded.decoding.terms)

    def serve(self) -> None:
        """Compute what rank 0 asks for, until it has closed. Local, of the other ranks."""
        worker = self._worker
        if worker is None:
            raise OptionError(f"{type(self).__name__}: serve() is that of the other ranks; rank 0 calls map()")
        while not self.closed:
            frame = worker.next()
            if frame.step < 0:
                worker.drop(frame)
                self.closed = True
                worker.close(at_exit=True)
                _unsettled.append(worker)
                return
            number = int(frame.wire[:8].view(np.int64)[0])
            answer = np.asarray(self._f_of(self._block_of(frame)), order="C")
            for piece in sent_in_pieces(worker, answer, frame.step, number):
                worker.answer(*piece)
                worker.drop(piece[0])
            worker.drop(frame)

    def close(self) -> None:
        """Let the other ranks end, each when it has answered. Local, of rank 0; it waits for nobody before Python's end."""
        if not self.closed and self._server is not None:
            last = self._server.frame()
            last.wire[:] = 0
            self._server.close(last, lambda _, frame: self._drop(frame), type(self).__name__, at_exit=True)
            _unsettled.append(self._server)
        self.closed = True

    def _drop(self, frame: Frame) -> None:
        assert self._server is not None  # noqa: S101
        self._server.drop(frame)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it on rank 0; the others serve. After an error of rank 0 the others still end well."""
        if self.rank == 0:
            self.close()
        elif kind is None:
            self.serve()


_unsettled: list[Server | Worker] = []  # of maps that are over, where some may still be late


def coded_map(comm: Comm, f: Callable[[Array], Array], blocks: Array | Sequence[Array] | None,
              **options: Any) -> Mapped | None:
    """Map a function over K blocks, on ranks of which some may be slow, silent, or compute wrongly. Collective.

    Rank 0 mixes the blocks to N evaluations of f (Berrut's interpolation), the other ranks compute them, and f of the blocks
    is interpolated from the answers that come. With all answers, and by default N is such that the blocks are among the
    evaluations, the result is f of the blocks itself; else it is an approximation, as good as f is smooth along the blocks
    in their order: let neighbours be alike, for example by sorting. It does not train deep networks.

    Parameters
    ----------
    comm : MPI.Comm
    f : callable
        Of an array of the shape and dtype of a block, read only and its own until it returns, returns an array of float32
        or float64, always of one shape. The same on all ranks. An exception ends all of them, as any that is not caught.
    blocks : (K, ...) array, or sequence of K arrays of one shape, float32 or float64, all finite
        On rank 0; None on the others.
    evaluations : int, optional
        N at least; 3 K by default. It becomes an odd multiple of K.
    spare : int
        Go on when all but so many answers are here, N - K at most. By default all are waited for.
    patience_seconds : float
        When nothing has come for so long, go on with what is here; a rank that has not ended by then does not keep Python
        from its end.
    wrong : int
        Locate up to so many wrong answers, with `floor` or `sample`.
    floor : float or Parity, optional
        What parity right answers have at most, see :class:`Parity`.
    sample : (K, ...) array, optional
        Typical blocks of which rank 0 computes all N evaluations itself to learn that; their answers are to have hundreds of
        numbers, else all that is not like them is refused.
    decode : {"auto", "berrut", "least-squares"}
    kind : {"sbacc", "bacc"}

    Returns
    -------
    Mapped
        On rank 0; None on the others.

    Raises
    ------
    SilenceError, WrongAnswersError, NonFiniteError
        On rank 0, see :meth:`CodedMap.map`.
    """
    check_comm("coded_map", comm)
    _unsettled[:] = [one for one in _unsettled if not one.settled()]
    rank, problem = int(comm.Get_rank()), ""

    def facts() -> dict[str, object]:
        if (blocks is None) != bool(rank):
            raise OptionError(f"coded_map: blocks are given on rank 0 alone, and here on rank {rank} they are "
                              f"{briefly(blocks)}; pass None on the others")
        return {}

    form = None
    if blocks is not None and rank == 0:
        try:
            rows = list(blocks)
            whole("coded_map", 1, "8 is usual", blocks=len(rows))
            rows = rows_of(rows, len(rows), "coded_map: blocks")
            form = (len(rows), rows[0].shape, rows[0].dtype.str)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            caught = error
    ((form, problem), *_) = agree(comm, "coded_map", facts, "", value=(form, problem))
    if form is None:
        if rank == 0:
            raise caught
        raise OptionError(f"coded_map: blocks of rank 0 are unusable: {problem}")
    coded = CodedMap(comm, f, form[0], form[1], form[2], **options)
    with coded:
        return coded.map(rows) if rank == 0 else None


def leave(status: int = 0) -> None:
    """End well after :func:`coded_map`, also where ranks are still missing, for whom MPI would wait. Local, on all ranks.

    The last call of a program: rank 0 waits for those that are late, as long as its patience is, and ends all processes with
    `status` where some have not come. Without it that happens at the end of Python, with status 1.
    """
    while _unsettled:
        one = _unsettled.pop()
        if not one.settled():
            one.settle(status)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
