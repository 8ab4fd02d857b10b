"""Agreement between ranks: where arguments differ, or an action fails on one of them, all raise and none hangs."""

import re
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Signature, signature
from os.path import commonprefix
from threading import local
from types import MethodType
from typing import Any, NoReturn, TypeVar

from mpi_ef.errors import (
    CheckpointError,
    DisagreementError,
    MpiEfError,
    OptionError,
    PeerError,
    briefly,
    everywhere,
    shortage,
)

from .protocol import Comm

__all__ = ["OnAllRanks", "SharedErrors", "agree", "all_built", "check_not_freed", "gather_values", "ranks_text",
           "shared_errors", "together"]

Facts = Mapping[str, object]
Texts = dict[str, str]
T = TypeVar("T")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_AROUND = 60  # characters before and after the place in which long texts differ
_mine = local()  # how often this rank has called gather_values


class SharedErrors(ABCMeta):
    """Metaclass of what is built on all ranks together: where that fails on one of them, the others raise `PeerError`.

    An error before any communication, such as a `TypeError` for an unknown keyword, is sent to the others, which are in
    :func:`agree`.
    """

    built = ""  # what the others build, if not this class

    def __call__(cls, *args: Any, **keywords: Any) -> Any:
        """Build; send the error to the other ranks if that fails. Collective."""
        comm: Any = keywords.get("comm", next((arg for arg in args if hasattr(arg, "Iallgather")), None))
        with shared_errors(comm, cls.__name__, cls.built):
            return super().__call__(*args, **keywords)

    @property
    def __signature__(cls) -> Signature:
        """What the constructor takes; without it, inspection would show what :meth:`__call__` takes."""
        return signature(MethodType(cls.__init__, cls))  # type: ignore[misc]


@contextmanager
def shared_errors(comm: Comm, subject: str, call: str) -> Iterator[None]:
    """Send an error that this rank raises inside, before any communication there, to the others. Collective then.

    `subject` raises, while the other ranks are in the call `call` of :func:`agree`. Local where `comm` is no communicator.
    """
    before = getattr(_mine, "calls", 0)
    try:
        yield
    except Exception as error:
        problem = _ours(subject, error)
        usable = hasattr(comm, "allgather") and bool(comm) and not comm.Is_inter()
        if not usable or getattr(_mine, "calls", 0) != before:
            if problem is error:
                raise
            raise problem from error

        def facts() -> Facts:
            raise problem

        agree(comm, subject, facts, "", call=call)


class OnAllRanks:
    """An object that is built on all ranks together, and communicates with the others: it is not copied or pickled."""

    saved_by = "state_dict()"

    def __getstate__(self) -> NoReturn:
        """Refuse: no object on the other ranks would answer a copy."""
        raise OptionError(f"{type(self).__name__}: it cannot be copied or pickled, nothing on the other ranks would answer "
                          f"the copy; save {self.saved_by} and build it anew on all ranks")


def check_not_freed(comm: Comm, subject: str, remedy: str = "pass another one") -> None:
    """Raise `OptionError` where `comm` was freed, is null or none. Local; communicators are freed on all ranks together."""
    if not hasattr(comm, "Get_rank"):
        raise OptionError(f"{subject}: comm={briefly(comm)} is not an intracommunicator; pass for example MPI.COMM_WORLD")
    if not comm:
        raise OptionError(f"{subject}: its communicator was freed, or is MPI.COMM_NULL; {remedy}")


def gather_values(comm: Comm, subject: str, value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order. Collective over `comm`.

    Raises
    ------
    DisagreementError
        On all ranks, when they are in different calls, with other subjects.
    OptionError
        On all ranks, when `comm` was freed.
    """
    check_not_freed(comm, subject)
    _mine.calls = getattr(_mine, "calls", 0) + 1
    answers: list[tuple[str, Any]] = comm.allgather((subject, value))
    if listed := _differing(answer[0] if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str) else
                            "something else" for answer in answers):
        raise DisagreementError(f"{subject}: ranks are in different calls: {listed}; call them on all ranks, in one order")
    return [value for _, value in answers]


def agree(comm: Comm, subject: str, facts: Callable[[], Facts], remedy: str, value: object = None,
          call: str = "") -> list[Any]:
    """Raise on all ranks unless `facts` returns equal values on all of them. Collective over `comm`.

    Parameters
    ----------
    comm : MPI communicator
    subject, remedy : str
        Begin and end of the error message.
    facts : callable
        Returns the named values that must agree, as texts. When it raises, the rank raises that error, and all others a
        `PeerError` that quotes it.
    value : object, optional
        Is sent to the others as well.
    call : str, optional
        The common call of ranks whose subjects may differ; `facts` distinguish these then.

    Returns
    -------
    list
        `value` of all ranks, in their order.

    Raises
    ------
    DisagreementError, PeerError
        On all ranks together.
    """
    error: Exception | None = None
    try:
        # Texts are compared, as not everything can be pickled; where an object is in memory differs between processes.
        said = {name: _ADDRESS.sub("", str(fact)) for name, fact in facts().items()}
        mine: tuple[Texts | None, str, object] = (said, "", value)
    except Exception as raised:
        error = _ours(subject, raised)
        mine = (None, str(error) or type(error).__name__, None)
    try:
        answers: list[tuple[Texts | None, str, Any]] = gather_values(comm, call or subject, mine)
    except DisagreementError as different:
        raise different if error is None else error from different
    if error is not None:
        if isinstance(error, MpiEfError):
            error.everywhere = all(text == mine[1] for _, text, _ in answers)
        raise error
    for rank, (_, text, _) in enumerate(answers):
        if text:
            raise PeerError(f"{subject}: rank {rank} raised: {text}")
    for name in mine[0] or ():
        if listed := _differing((theirs or {}).get(name, "") for theirs, _, _ in answers):
            raise DisagreementError(f"{subject}: ranks disagree on {name}: {listed}; {remedy}")
    return [value for _, _, value in answers]


def all_built(comm: Comm, subject: str, build: Callable[[], None], call: str) -> None:
    """Call `build`, which agrees once itself, in the call `call` of :func:`agree`; where it fails, all raise. Collective."""
    problem: Exception | None = None
    try:
        with shared_errors(comm, subject, call):
            build()
    except Exception as error:
        problem = error

    def facts() -> Facts:
        if problem is not None:
            raise problem
        return {}

    agree(comm, subject, facts, "")


def together(comm: Comm, subject: str, action: Callable[[], T], undo: Callable[[], None] = lambda: None) -> list[T]:
    """Call `action` on all ranks and return what it returned on each, or raise the same error on all. Collective.

    `undo` is called everywhere before the error is raised, after the action has ended on all ranks.
    """
    try:
        mine: tuple[Any, str, bool] = (action(), "", False)
    except Exception as raised:
        mine = (None, str(raised) or type(raised).__name__, getattr(raised, "damaged", False))
    answers: list[tuple[Any, str, bool]] = gather_values(comm, subject, mine)
    failed = [rank for rank, (_, text, _) in enumerate(answers) if text]
    if not failed:
        return [value for value, _, _ in answers]
    undo()
    text = answers[failed[0]][1]
    where = ranks_text([rank for rank in failed if answers[rank][1] == text]) if comm.Get_size() > 1 else ""
    others = f" ({where}; {len(failed)} of {len(answers)} ranks failed)" if where else ""
    raise everywhere(CheckpointError(f"{subject}: {text}{others}", damaged=answers[failed[0]][2]))


def _ours(subject: str, error: Exception) -> Exception:
    """Return an error, or ours in place of one that says that memory is short."""
    short = shortage(subject, error)
    if short is None:
        return error
    short.__cause__ = error
    return short


def _differing(texts: Iterable[str]) -> str:
    """Return the texts of the ranks, each with its ranks; "" where all are the same."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{text} on {ranks_text(of_text)}" for text, of_text in _shortened(ranks)) if len(ranks) > 1 else ""


def _shortened(ranks: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """Yield what the keys are, around the first place in which they differ where they are long."""
    start = max(0, len(commonprefix(list(ranks))) - _AROUND)  # noqa: RUF071 - of characters
    for text, of_text in ranks.items():
        part = text[start : start + 2 * _AROUND] if len(text) > 4 * _AROUND else text
        yield f"{'... ' * (start > 0 and part != text)}{part}{' ...' * (start + len(part) < len(text))}", of_text


def ranks_text(ranks: Iterable[int]) -> str:
    """Return "rank 3", "ranks 0,1", "ranks 0-2,5", or "ranks 0,2,4,6,8,10,12,14 and 12 more". Local."""
    ordered = sorted(set(ranks))
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs[:8])
    more = sum(map(len, runs[8:]))
    return f"rank{'s' if len(ordered) > 1 else ''} {','.join(shown)}{f' and {more} more' if more else ''}"
