"""Checking on all ranks, once, that they were given the same things: all raise, none hangs."""

from collections.abc import Callable, Mapping
from typing import Any

from mpi_ef.errors import DisagreementError, MpiEfError, PeerError

__all__ = ["agree", "ranks_text"]

Facts = Mapping[str, object]


def agree(comm: Any, subject: str, facts: Callable[[], Facts], remedy: str, tell: object = None) -> list[Any]:
    """Raise on all ranks unless `facts` returns equal values on all of them. Collective over `comm`.

    Parameters
    ----------
    comm : MPI communicator
    subject : str
        Who asks; begins the error message.
    facts : callable
        Returns the named values that must agree. When it raises, the rank raises that error, and all others a
        `PeerError` that quotes it.
    remedy : str
        What to do; ends the error message.
    tell : object, optional
        What this rank tells the others besides.

    Returns
    -------
    list
        What the ranks have told, in their order.

    Raises
    ------
    DisagreementError, PeerError
        On all ranks together.
    """
    error: Exception | None = None
    try:
        mine: tuple[Facts | None, str, object] = (dict(facts()), "", tell)
    except Exception as raised:
        error, mine = raised, (None, str(raised) or type(raised).__name__, None)
    answers: list[tuple[Facts | None, str, Any]] = comm.allgather(mine)
    if error is not None:
        if isinstance(error, MpiEfError):
            error.everywhere = all(text == mine[1] for _, text, _ in answers)
        raise error
    for rank, (_, text, _) in enumerate(answers):
        if text:
            raise PeerError(f"{subject}: rank {rank} raised: {text}")
    for name in mine[0] or ():
        values: dict[str, list[int]] = {}
        for rank, (theirs, _, _) in enumerate(answers):
            values.setdefault(str((theirs or {}).get(name)), []).append(rank)
        if len(values) > 1:
            listed = "; ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in values.items())
            raise DisagreementError(f"{subject}: ranks disagree on {name}: {listed}; {remedy}")
    return [told for _, _, told in answers]


def ranks_text(ranks: list[int] | tuple[int, ...]) -> str:
    """Return "rank 3" or "ranks 0,1,2" ("ranks 0,1,2 and 13 more" when there are many)."""
    shown = ",".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
