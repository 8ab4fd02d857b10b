"""Coded gradients: a server, and workers of which it needs n - s answers; whole vectors, or compressed with error feedback.

::

    worker i, for the order (t, x):  m_i = sum_j B[i, j] g_j(x);  c_i = C(m_i - h_i);  h_i += c_i;  sends (t, c_i)
    server, on any answer of i:      rows[i] += c_i            also on a late one: it is a difference
    when those that answered t, F, are enough:  g = sum_{i in F} a_i rows[i]

Tandon et al. 2017; what follows the *coded* gradients is EF21 (Richtarik, Sokolov, Fatkhullin 2021, arXiv 2106.05203). The
first answer of a worker is m_i whole, as are all where nothing is compressed. Orders may be compressed too: then gradients
are computed at a w that follows x, see moves.py.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.collectives.ends import AT_EXIT, host_of
from mpi_ef.collectives.late import LONGEST_NBYTES, Frame, next_number
from mpi_ef.collectives.lateness import Lateness
from mpi_ef.collectives.misfit import misfit
from mpi_ef.collectives.worker import Worker
from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.consensus import OnAllRanks, SharedErrors, agree, check_not_freed
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity
from mpi_ef.compress.combination import lazy, source
from mpi_ef.compress.compressor import check_compressor
from mpi_ef.errors import DtypeError, OptionError, briefly
from mpi_ef.kernels.backend import backend
from mpi_ef.ranges import whole, within
from mpi_ef.runtime.ending import end_together
from mpi_ef.runtime.world import check_alone

from .codes import FractionalRepetition, GradientCode
from .decider import Decider
from .moves import Moves
from .returned import check_numbers
from .wire import NOT_FINITE, WHOLE, Decoded, Layout, Numbers, Order

__all__ = ["CodedGradients"]

LARGEST_AMPLIFICATION = 1e3  # of rounding in float32
ON_SILENCE = ("raise", "wait", "approximate")
TWINS = ("raise", "warn")

Vector = NDArray[Any]


class CodedGradients(OnAllRanks, metaclass=SharedErrors):
    """The sum of gradients over n parts of the data, from those workers that are in time. Construction is collective.

    Rank `server` decides and has the parameters; all other calls are local, on the server :meth:`begin` and :meth:`end`, on
    workers :meth:`orders` and :meth:`answer`. By default the server is worker 0 as well, and worker i is rank i.

    A step waits for no more than n - s workers. One that is stopped, sleeps or is dead gets one order and no more until it
    answers; then the newest. Late answers are dropped where they are whole, and added to the worker's row where they are
    differences. With `FractionalRepetition` and nothing compressed the sum is the same bits whoever is late.

    Cost of a step: n orders and n answers of d values, or of compressed vectors, all through the server. Memory of the
    server: n d values, and about 2 n orders; of a worker 4 d. With `order_compressor` 2 d more there, and d here.

    Parameters
    ----------
    comm : MPI.Comm
        Any intracommunicator of MPI, or of virtual ranks.
    d, dtype : int, float32 or float64
    code : GradientCode
    compressor : Compressor, optional
        Of what a coded gradient differs by from what the server knows of it. By default whole vectors are sent.
    order_compressor : Compressor, optional
        Of what x differs by from w, which follows it, and where all compute their gradients then, see moves.py. Steps want
        to be shorter with it, about as with `compressor`. By default orders are x.
    extras : int
        Numbers that go along with each answer, coded as the gradient is, for example samples and loss.
    order_extras : int
        Numbers that go along with each order.
    dedicated : bool
        The server computes nothing, and there is a worker less.
    server : int
        Its rank.
    patience_seconds : float
        So long the server waits in a step, and in :meth:`close`.
    on_silence : {"raise", "wait", "approximate"}
        When patience is over and answers are too few: raise `SilenceError`; wait on, with a line on stderr; or take what the
        answers that are there say of the sum, scaled to the number of parts.
    twins : {"raise", "warn"}
        What to do where answers to be of the same bits differ and no majority tells which is right.

    Raises
    ------
    DisagreementError, OptionError, DtypeError, PeerError
        On all ranks, where arguments are wrong or differ.
    """

    saved_by = "the parameters, and rows"

    def __init__(self, comm: Comm, d: int, dtype: DTypeLike, code: GradientCode, compressor: Compressor | None = None, *,
                 order_compressor: Compressor | None = None, extras: int = 0, order_extras: int = 0,
                 dedicated: bool = False, server: int = 0, patience_seconds: float = 300.0, on_silence: str = "raise",
                 twins: str = "raise") -> None:
        name = self._name = type(self).__name__
        check_not_freed(comm, name)
        if not hasattr(comm, "Iallgather") or comm.Is_inter():
            raise OptionError(f"{name}: comm={briefly(comm)} is not an intracommunicator; pass for example MPI.COMM_WORLD")
        check_alone(comm)
        end_together(comm)
        self.comm, self.rank, size = comm, int(comm.Get_rank()), int(comm.Get_size())
        self.code, self.dedicated, self.server = code, bool(dedicated), server
        self.compressor, self.order_compressor = (Identity() if c is None else c for c in (compressor, order_compressor))

        def facts() -> dict[str, object]:
            if mpi_of(comm) is None and not hasattr(comm, "pause"):
                raise OptionError(f"{name}: comm={briefly(comm)} is none of MPI, where ranks may be late; pass for example "
                                  "MPI.COMM_WORLD")
            whole(name, 0, "0 is usual", server=server, most=size - 1)
            within(name, "(0, inf)", "300 is usual", patience_seconds=patience_seconds)
            for option, value, known in (("on_silence", on_silence, ON_SILENCE), ("twins", twins, TWINS)):
                if value not in known:
                    raise OptionError(f"{name}: {option}={briefly(value)} is not known; take one of {', '.join(known)}")
            self._layout = self._laid_out(d, dtype, extras, order_extras)
            self._check_code(size - self.dedicated)
            return {"layout": self._layout, "code": code, "compressor": self.compressor,
                    "order_compressor": self.order_compressor, "dedicated": self.dedicated, "server": server,
                    "patience_seconds": patience_seconds, "on_silence": on_silence, "twins": twins}

        said = agree(comm, name, facts, "build them from the same arguments everywhere",
                     value=(next_number(), host_of(comm)))
        layout, number = self._layout, said[0][0]
        self.d, self.dtype = layout.d, layout.dtype
        self.ranks = tuple(rank for rank in range(size) if not (self.dedicated and rank == server))
        self.n = len(self.ranks)
        self.worker = self.ranks.index(self.rank) if self.rank in self.ranks else None
        self.is_server, self.closed, self._answered = self.rank == server, False, True
        self._compresses = self.compressor != Identity()
        self._codec = self.compressor.codec(self.d, self.dtype)
        self._kernels, self._ends, self._hashed = backend(self.dtype, "cpu"), np.array([0, self.d]), np.zeros(1, np.uint64)
        self._frame: Frame | None = None  # of the order that is computed, on the server of its answer
        self._step = self._restored = 0
        self.h = np.zeros(self.d if self.worker is not None and self._compresses else 0, self.dtype)
        self._knows = False  # whether h is the server's row
        follows = self.order_compressor != Identity()
        self._moves = Moves(layout, self.order_compressor.codec(self.d, self.dtype) if follows else None, self.n)
        if self.is_server:
            self.decider = Decider(name, comm, self.ranks, {rank: host for rank, (_, host) in enumerate(said)}, number, code,
                                   layout, self._codec if self._compresses else None, self._moves, twins=twins,
                                   on_silence=on_silence, patience_seconds=float(patience_seconds))
        else:
            self._link = Worker(comm, server, layout.order_nbytes, layout.answer_nbytes, number, float(patience_seconds))

    def _laid_out(self, d: int, dtype: DTypeLike, extras: int, order_extras: int) -> Layout:
        name, kind = self._name, np.dtype(dtype)
        if kind not in (np.float32, np.float64):
            raise DtypeError(f"{name}: dtype={kind} is neither float32 nor float64; convert the vectors")
        check_compressor(name, compressor=self.compressor)
        check_compressor(name, order_compressor=self.order_compressor)
        length, moves = whole(name, 0, "take the length of the vectors", d=d), self.order_compressor != Identity()
        layout = Layout(length, kind, whole(name, 0, "0 is usual", order_extras=order_extras),
                        whole(name, 0, "0 is usual", extras=extras), self.compressor.wire_nbytes(length, kind),
                        self.order_compressor.wire_nbytes(length, kind) if moves else 0)
        if max(layout.order_nbytes, layout.answer_nbytes) > LONGEST_NBYTES:
            raise OptionError(f"{name}: d={d} is longer than a message of MPI may be; split the vector")
        return layout

    def _check_code(self, n: int) -> None:
        name, code = self._name, self.code
        if not isinstance(code, GradientCode):
            raise OptionError(f"{name}: code={briefly(code)} is no code; take for example FractionalRepetition(1), "
                              "of a text code_of('fr:1')")
        if not n:
            raise OptionError(f"{name}: dedicated=True on one rank, which leaves no worker; start more ranks")
        code.check(n)
        if self._layout.dtype == np.float32 and (grown := code.amplification(n)) > LARGEST_AMPLIFICATION:
            near = min((s for s in range(n) if n % (s + 1) == 0), key=lambda s: (abs(s - code.s), -s))
            raise OptionError(f"{name}: {code} lets rounding grow {grown:.0f} times with n={n} workers, too much for "
                              f"float32; take {FractionalRepetition(near)}, a smaller s, or float64")

    @property
    def step(self) -> int:
        """Of the next order, from 0 on; of a worker, of the one that it computes."""
        return self.decider.step if self.is_server else self._step

    @property
    def rows(self) -> Vector:
        """What the server knows of each coded gradient, (n, d): to be saved, see `restore`. Local, of the server."""
        return self._deciding("rows").rows

    @property
    def w(self) -> Vector:
        """Where gradients were computed last, (d,), with compressed orders; else empty. Local."""
        return self._moves.w

    @property
    def lateness(self) -> Lateness:
        """Who is slow, and what a code has saved. Local, of the server."""
        return self._deciding("lateness").lateness

    @property
    def metrics(self) -> dict[str, float]:
        """Late, wrong and non-finite answers so far, and the parity. Local, of the server.

        parity: `Cyclic`, whole vectors, more answers than needed: the largest relative norm of what has to be zero.
        """
        decider = self._deciding("metrics")
        return {"late": decider.late, "wrong": sum(decider.twins.wrong.values()), "not_finite": decider.not_finite,
                "parity": decider.parity}

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank so far."""
        return self.decider.server.sent_nbytes if self.is_server else self._link.sent_nbytes

    @property
    def received_nbytes(self) -> int:
        """Bytes of answers that have come so far. Local, of the server."""
        return self._deciding("received_nbytes").received_nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of a step, orders and answers of all workers together, if nothing is compressed."""
        workers = self.n - (self.server in self.ranks)
        return workers * (self._layout.whole_order_nbytes + self._layout.answer_nbytes_of(WHOLE))

    def begin(self, x: Vector, extras: Sequence[float] | Numbers = ()) -> Order | None:
        """Send the order of the next step to all workers that are free. Return what the server itself is to compute, if any.

        Parameters
        ----------
        x : (d,)
        extras : (order_extras,)
        """
        decider = self._deciding("begin")
        if problem := misfit(x, self.d, self.dtype, self._name, "x"):
            raise problem
        if decider.open:
            raise OptionError(f"{self._name}: step {decider.step} has begun; call end() first")
        self._check_extras(extras, self._layout.order_extras)
        frame = decider.begin(x, extras)
        if self.worker is None:
            return None
        self._answered = False
        return self._order_of(frame)

    def progress(self) -> bool:
        """Take what has come, and give orders; does not wait. Local; tells on the server whether the answers are enough."""
        if not self.is_server or self.closed:
            return False
        self.decider.look()
        return self.decider.enough()

    def end(self) -> Decoded:
        """Wait for enough answers, and return the sum over all parts.

        Raises
        ------
        SilenceError
            Too few have answered. Nothing was changed: call it again to wait longer.
        NonFiniteError
            Too few answers were finite.
        DisagreementError
            Twins have sent different bits.
        """
        decider = self._deciding("end")
        if not decider.open:
            raise OptionError(f"{self._name}: no step has begun; call begin() first")
        self._answered = True  # or not wanted any more
        return decider.end()

    def restore(self, rows: Vector | None, step: int, w: Vector | None = None) -> None:
        """Go on from the rows, (n, d), step and w that were saved; workers are told their rows. Local, of the server.

        Without rows, before the first step, workers begin with whole answers. Without w the next order is x.
        """
        decider = self._deciding("restore")
        whole(self._name, 0, "pass that of the next order", step=step)
        if rows is None and not decider.fresh:
            raise OptionError(f"{self._name}: steps were made, and workers know their rows; pass the rows to go on from")
        if rows is not None and np.shape(rows) != decider.rows.shape:
            raise OptionError(f"{self._name}: rows have shape {np.shape(rows)}; with n={self.n} workers it is "
                              f"{decider.rows.shape}; leave them out, and workers begin anew")
        if w is not None and (problem := misfit(w, self.d, self.dtype, self._name, "w")):
            raise problem
        decider.restore(rows, step, w)
        if self.h.size:
            self.h[:], self._knows = 0 if rows is None else rows[self.worker], rows is not None

    def orders(self) -> Iterator[Order]:
        """Yield what this worker is to compute, until the server has closed. Local, of workers.

        Each is to be answered before the next one. Afterwards :attr:`last` is what the server has sent last.
        """
        if self.is_server:
            raise OptionError(f"{self._name}: orders() is the workers'; the server, rank {self.server}, calls begin()")
        while not self.closed:
            if not self._answered:
                raise OptionError(f"{self._name}: the order of step {self._step} is not answered; call answer()")
            if self._frame is not None:
                self._link.drop(self._frame)
                self._frame = None
            frame = self._link.next()
            if frame.step < 0:
                self._last = self._layout.x_of(frame).copy(), self._layout.order_extras_of(frame).copy()
                at_exit, self.closed = frame.step >= AT_EXIT, True
                self._link.drop(frame)
                self._link.close(at_exit=at_exit)
                return
            if self._layout.is_row(frame):
                self.h[:], self._knows = self._layout.x_of(frame), True
            elif self._layout.is_missed(frame):
                self._moves.read(frame)
            else:
                self._frame, self._answered = frame, False
                yield self._order_of(frame)
                continue
            self._link.drop(frame)

    @property
    def last(self) -> tuple[Vector, NDArray[np.float64]]:
        """The parameters, (d,), and extras that the server has sent last. Local, of workers, after :meth:`orders`."""
        return self._last

    def answer(self, vector: Vector, extras: Sequence[float] | Numbers = ()) -> None:
        """Send the coded gradient of the order, ``sum_j weights[j] g_j``. Local, of workers and of a server that works.

        Parameters
        ----------
        vector : (d,)
            With a NaN or Inf it counts as missing.
        extras : (extras,)
            Coded in the same way.
        """
        if self._answered:
            raise OptionError(f"{self._name}: there is no order to answer")
        if problem := misfit(vector, self.d, self.dtype, self._name, "vector"):
            raise problem
        self._check_extras(extras, self._layout.extras)
        self._answered = True
        if self.is_server:
            if self._frame is None:
                self._frame = Frame(self._layout.answer_nbytes)
            self._encode(vector, extras, self._frame)
            self.decider.take_own(self._frame)
            return
        frame = self._link.frame()
        nbytes = self._encode(vector, extras, frame)
        self._link.answer(frame, nbytes)
        self._link.drop(frame)

    def close(self, x: Vector | None = None, extras: Sequence[float] | Numbers = (), *,
              at_exit: bool = False) -> tuple[int, ...]:
        """Let workers end; they get these parameters last. Local, of the server; workers end with :meth:`orders`.

        With `at_exit` it returns at once, and workers that have not ended are waited for at the end of Python, or in
        :meth:`leave`.

        Returns
        -------
        tuple of int
            Ranks that have not come to the end: at the end of Python all processes are ended with status 1, or by
            :meth:`leave`.
        """
        if not self.is_server or self.closed:
            return ()
        self.closed = True
        return self.decider.close(np.zeros(self.d, self.dtype) if x is None else x, extras, at_exit=at_exit)

    def leave(self, status: int = 1) -> None:
        """End all processes where some have not ended, see :meth:`close`; else return. Local, of the server."""
        if self.is_server:
            self.decider.server.leave(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it; after an error wait for nobody."""
        if kind is None:
            self.close()
        elif self.is_server and not self.closed:
            self.closed = True
            self.decider.server.abandon()

    def _deciding(self, call: str) -> Decider:
        if not self.is_server:
            raise OptionError(f"{self._name}: {call} is the server's, rank {self.server}; workers call orders()")
        if self.closed and call in {"begin", "end", "restore"}:
            raise OptionError(f"{self._name}: it is closed; build another one on all ranks")
        return self.decider

    def _check_extras(self, extras: Sequence[float] | Numbers, count: int) -> None:
        check_numbers(self._name, extras, count)

    def _order_of(self, frame: Frame) -> Order:
        self._step, self._restored = self._layout.step_of(frame), self._layout.restored_of(frame)
        extras = self._layout.order_extras_of(frame)
        x = self._moves.w.view() if self.is_server and self._moves.w.size else self._moves.read(frame)
        x.flags.writeable = extras.flags.writeable = False
        worker = self.worker or 0
        return Order(self._step, x, extras, self.code.parts(worker, self.n), self.code.row(worker, self.n))

    def _encode(self, vector: Vector, extras: Sequence[float] | Numbers, frame: Frame) -> int:
        """Write the answer, and let h follow; return how many bytes of the wire it takes."""
        flags = 0
        self._kernels.fingerprints(vector, self._ends, self._hashed)
        if not self._kernels.finite([vector]) or not np.isfinite(extras).all():
            flags = NOT_FINITE
        elif not self._compresses or not self._knows:
            flags = WHOLE
            self._layout.whole_of(frame)[:] = vector
            if self._compresses:
                self.h[:], self._knows = vector, True
        else:
            wire = self._layout.compressed_of(frame)
            self._codec.encode(source(lazy(vector) - self.h), wire, step=self._step, rank=self.worker or 0)
            self._codec.add_encoded(wire, self.h)
        return self._layout.write_answer(frame, self._step, flags, int(self._hashed[0]), extras,
                                         restored=self._restored)
