"""What is kept with a communicator, and goes when it is freed; calls that follow from others."""

import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

__all__ = ["DerivedCalls", "kept_with", "mpi_of"]

Kept = TypeVar("Kept")
_keyvals: dict[tuple[type, object], int] = {}  # by kind of communicator, and what is kept with it


def kept_with(comm: Any, new: Callable[[], Kept]) -> Kept:
    """Return what ``new()`` has made at the first call with `comm`, a communicator that keeps attributes. Local.

    Its method ``free``, where `new` is a class with one, is called when MPI's `comm` is freed, by all ranks.
    """
    kind = type(comm)
    if (kind, new) not in _keyvals:
        frees = mpi_of(comm) is not None and hasattr(new, "free")
        _keyvals[kind, new] = kind.Create_keyval(delete_fn=_freed) if frees else kind.Create_keyval()
    there: Kept | None = comm.Get_attr(_keyvals[kind, new])
    if there is None:
        comm.Set_attr(_keyvals[kind, new], there := new())
    return there


def _freed(comm: Any, _: int, kept: Any) -> None:
    mpi = mpi_of(comm)
    if comm not in (mpi.COMM_WORLD, mpi.COMM_SELF):  # these end with MPI
        with suppress(mpi.Exception):  # where a rank has died
            kept.free()


def mpi_of(comm: Any) -> Any:
    """Return the module of MPI's communicators, None where `comm` is something else. Local."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and isinstance(comm, mpi.Comm) else None


class DerivedCalls:
    """Calls of a communicator that is not MPI's, with the names and meanings of mpi4py: they need its others alone."""

    _new_keyvals = count()

    @classmethod
    def Create_keyval(cls) -> int:
        return next(cls._new_keyvals)

    def Get_attr(self, keyval: int) -> Any:
        return vars(self).get(f"attribute {keyval}")

    def Set_attr(self, keyval: int, value: Any) -> None:
        vars(self)[f"attribute {keyval}"] = value

    def Is_inter(self) -> bool:
        return False

    def Allgather(self, send: Any, receive: Any) -> None:
        self.Iallgather(send, receive).Wait()  # type: ignore[attr-defined]

    def Alltoall(self, send: Any, receive: Any) -> None:
        self.Ialltoall(send, receive).Wait()  # type: ignore[attr-defined]
