"""Doing something on every rank, with one outcome for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from mpi_ef.comm.consensus import ranks_text, tell_all
from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import CheckpointError

__all__ = ["together"]

T = TypeVar("T")


def together(comm: Comm, subject: str, action: Callable[[], T], undo: Callable[[], None] = lambda: None) -> list[T]:
    """Call `action` on all ranks and return what it returned on each, or raise the same error on all. Collective.

    `undo` is called everywhere before the error is raised, when no rank works on its action any more.
    """
    try:
        mine: tuple[Any, str, bool] = (action(), "", False)
    except Exception as raised:
        mine = (None, str(raised) or type(raised).__name__, getattr(raised, "damaged", False))
    answers: list[tuple[Any, str, bool]] = tell_all(comm, subject, mine)
    failed = [rank for rank, (_, text, _) in enumerate(answers) if text]
    if not failed:
        return [value for value, _, _ in answers]
    undo()
    text = answers[failed[0]][1]
    where = ranks_text([rank for rank in failed if answers[rank][1] == text]) if comm.Get_size() > 1 else ""
    others = f" ({where}; {len(failed)} of {len(answers)} ranks failed)" if where else ""
    error = CheckpointError(f"{subject}: {text}{others}")
    error.damaged, error.everywhere = answers[failed[0]][2], True
    raise error
