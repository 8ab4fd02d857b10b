"""One exchange: rounds of frames, what their headers say, at once or in two parts, and how long it takes."""

from collections.abc import Iterator
from itertools import chain
from time import perf_counter
from typing import Any, NamedTuple

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import MpiEfError, NonFiniteError, OptionError, PeerError, briefly
from mpi_ef.kernels.backend import Verdict

from .frames import NON_FINITE, OK, REJECTED, Frames, header_of, misunderstanding, status_of, what_is_wrong
from .in_flight import landed, took_off
from .ways import ways_of

__all__ = ["Exchange", "Round", "Timer"]


class Round(NamedTuple):
    """A collective in which every rank gives the same number of frames.

    Attributes
    ----------
    send, receive : Frames
        One frame for all ranks, or with `scatter` one for each; of every rank one.
    scatter : bool
        Alltoall in place of Allgather.
    finite : bool
        Whether what this rank sends is so; its header tells the others.
    inspect : bool
        Whether all ranks raise where a header says that a rank cannot go on. Else the plan looks at them.
    """

    send: Frames
    receive: Frames
    scatter: bool = False
    finite: bool = True
    inspect: bool = True


class Timer:
    """A context that adds its wall time to an entry of a dict."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name, self._began = seconds, name, 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] += perf_counter() - self._began


class Exchange:
    """The rounds of one exchange after the other, of a plan with that name.

    `timer` sees what MPI takes, `encoding` how long a device is waited for that encodes.
    """

    def __init__(self, comm: Comm, name: str, timer: Timer, encoding: Timer) -> None:
        self._comm, self._rank, self._timer, self._encoding = comm, int(comm.Get_rank()), timer, encoding
        self._plan, self._subject = name, f"{name}.exchange"
        self._ways = ways_of(comm)
        self.goes_on = False  # second rounds have a way of their own, where the communicator has one; the same on all ranks
        self.goes_early = False  # and may begin while the program computes
        self.number = 0  # of the plan, in every header
        self.refusal: MpiEfError | None = None  # why this rank cannot take part; all raise it, or what follows, in round 1
        self._rounds: Iterator[Round] | None = None
        self._first: Round | None = None
        self._request: Any = None
        self._step, self._finite = 0, True
        self._arrived = False  # the round of the last request, at which nobody has looked
        self._failed: BaseException | None = None  # what a second round has raised outside of :meth:`complete`

    @property
    def is_open(self) -> bool:
        """Whether an exchange has begun and is not complete."""
        return self._rounds is not None

    def begin(self, rounds: Iterator[Round], step: int, refusal: MpiEfError | None, finite: Any = True) -> None:
        """Begin with these rounds; `step` is the number of the exchange, `finite` what is said of the vector. Local."""
        if not isinstance(rounds, Iterator):
            raise OptionError(f"{self._plan}.communicate returned {briefly(rounds)}; yield Rounds")
        self._rounds, self._step, self.refusal, self._finite = rounds, step, refusal, finite

    def launch(self) -> None:
        """Start the first round without waiting for it, nor where nothing else may come first for a device. Collective."""
        assert self._rounds is not None  # noqa: S101
        if (sent := next(self._rounds, None)) is None:
            raise self._nothing()
        self._first = sent
        self._send(sent)
        if self._ways.queue is None:
            self.depart()
        else:
            self._ways.queue.append(self)
            self.let_depart(wait=False)
        if self.goes_on and self._ways.second is not None:
            self._ways.later.append(self)

    def let_depart(self, *, wait: bool) -> None:
        """Start the first rounds on this communicator that a device had to send, in order; `wait` for it or not."""
        while self._ways.queue and (wait or self._ways.queue[0].has_been_sent()):
            self._ways.queue.pop(0).depart()

    def has_been_sent(self) -> bool:
        """Tell whether MPI can be given the first round. Local."""
        assert self._first is not None  # noqa: S101
        sent: bool = self._first.send.sent()
        return sent

    def depart(self) -> None:
        """Give the first round to MPI, once a device has sent it. Collective."""
        sent = self._first
        assert sent is not None  # noqa: S101
        self._mark(sent)
        sent.receive.expect()
        start = self._comm.Ialltoall if sent.scatter else self._comm.Iallgather
        self._request = start(sent.send.message, sent.receive.message)
        took_off(self, self._request)

    def progress(self) -> None:
        """Let MPI work on what :meth:`launch` has started, and begin second rounds whose turn it is. Local."""
        self.let_depart(wait=False)
        later = self._ways.later
        while later and later[0].go_on(wait=False):
            later.pop(0)
        if self._request is not None:
            self._request.Test()

    def go_on(self, *, wait: bool) -> bool:
        """Begin the second round when the first has arrived, see :class:`Departing`.

        Where something is wrong nothing begins, on any rank, as all see the same headers: :meth:`complete` tells.
        """
        assert self._rounds is not None  # noqa: S101
        assert self._first is not None  # noqa: S101
        assert self._ways.second is not None  # noqa: S101
        if self._request is None or not (wait or self.goes_early):  # a device has not sent it, or is not to be waited for
            return False
        if wait:
            self._await()
        elif not self._request.Test():
            return False
        self._request, self._arrived = None, True
        landed(self)
        headers = self._first.receive.look().tolist()
        if headers.count(header_of(self._step, OK, self.number)) < len(headers):
            return True
        self._first.receive.pull()
        self._arrived = False
        try:
            if (sent := next(self._rounds, None)) is not None:
                self._send(sent)
                self._mark(sent)
                sent.receive.expect()
                start = self._ways.second.Ialltoall if sent.scatter else self._ways.second.Iallgather
                self._request = start(sent.send.message, sent.receive.message)
                self._ways.begun += 1
                took_off(self, self._request)
            self._first = sent
        except BaseException as error:  # not in a backward pass, or where another plan is waited for
            self._failed = error
        return True

    def _await(self) -> None:
        with self._timer:
            self._request.Wait()

    def complete(self) -> None:
        """Do all rounds, or what is left of them. Collective."""
        assert self._rounds is not None  # noqa: S101
        self.let_depart(wait=True)  # before anything else on this communicator, on all ranks
        later = self._ways.later
        while self in later:
            later.pop(0).go_on(wait=True)
        (rounds, self._rounds), (failed, self._failed) = (self._rounds, None), (self._failed, None)
        if failed is not None:
            raise failed
        if self._request is not None or self._arrived:
            assert self._first is not None  # noqa: S101
            if self._request is not None:
                self._await()
                landed(self)
            self._request, self._arrived = None, False
            self._inspect(self._first)
            self._first = None
        elif (first := next(rounds, None)) is None:
            raise self._nothing()
        else:
            rounds = chain([first], rounds)
        for sent in rounds:
            self._send(sent)
            self._mark(sent)
            with self._timer:
                sent.receive.expect()
                communicate = self._comm.Alltoall if sent.scatter else self._comm.Allgather
                communicate(sent.send.message, sent.receive.message)
            self._inspect(sent)

    def _nothing(self) -> MpiEfError:
        self._rounds = None
        return OptionError(f"{self._plan}.communicate yields no Round; what is wrong on a rank travels with the first one")

    def _send(self, sent: Round) -> None:
        """Let a device send what leaves this rank, and what it has to say of it."""
        if not isinstance(sent, Round):
            raise OptionError(f"{self._plan}.communicate yields {briefly(sent)}; yield Round(send, receive)")
        for finite in (sent.finite, self._finite):
            if isinstance(finite, Verdict):
                finite.send()
        sent.send.send()

    def _mark(self, sent: Round) -> None:
        """Write the headers of frames that leave this rank, and wait for a device."""
        with self._encoding:
            sent.send.push()
            finite = bool(sent.finite)  # a device is asked when what it has encoded has come
            if self.refusal is None and not self._finite:
                self.refusal = NonFiniteError("", (self._rank,))
            if any(getattr(verdict, "repaired", False) for verdict in (sent.finite, self._finite)):
                sent.send.push()
        self._finite = True
        broken = not finite or isinstance(self.refusal, NonFiniteError)
        status = NON_FINITE if broken else OK if self.refusal is None else REJECTED
        sent.send.mark(header_of(self._step, status, self.number))

    def _inspect(self, sent: Round) -> None:
        """Raise, on all ranks, what the headers of the frames of all ranks say."""
        headers = sent.receive.look().tolist()  # quicker than a comparison of arrays for up to 200 ranks
        if not sent.inspect or headers.count(header_of(self._step, OK, self.number)) == len(headers):
            sent.receive.pull()
            return
        if error := misunderstanding(sent.receive, self._subject):
            raise error
        if rejected := status_of(sent.receive, REJECTED):
            texts = self._comm.allgather("" if self.refusal is None else str(self.refusal))
            if self.refusal is not None and self._rank in rejected:
                self.refusal.everywhere = set(texts) == {str(self.refusal)}
                raise self.refusal
            raise PeerError(f"{self._subject}: {ranks_text(rejected)} raised: {texts[rejected[0]]}")
        raise what_is_wrong(sent.receive, self._subject)
