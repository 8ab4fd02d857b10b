"""What functions of users are to return, and the communicators that they are called on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.consensus import check_not_freed
from mpi_ef.errors import DtypeError, OptionError, ShapeError, briefly
from mpi_ef.ranges import is_within
from mpi_ef.runtime.ending import end_together
from mpi_ef.runtime.world import check_alone

__all__ = ["array_in", "check_called", "check_comm", "check_numbers", "count_in", "pair_in", "step_to", "vector_in"]

Array = NDArray[Any]


def check_comm(subject: str, comm: Any) -> None:
    """Raise unless this is a communicator on which ranks may be late; from here on an error of one rank ends all. Local."""
    check_not_freed(comm, subject)
    if not hasattr(comm, "Iallgather") or comm.Is_inter():
        raise OptionError(f"{subject}: comm={briefly(comm)} is not an intracommunicator; pass for example MPI.COMM_WORLD")
    if mpi_of(comm) is None and not hasattr(comm, "pause"):
        raise OptionError(f"{subject}: comm={briefly(comm)} is none of MPI, where ranks may be late; pass for example "
                          "MPI.COMM_WORLD")
    check_alone(comm)
    end_together(comm)


def check_called(subject: str, arguments: str, **functions: object) -> None:
    """Raise unless these are functions. Local."""
    for name, function in functions.items():
        if not callable(function):
            raise OptionError(f"{subject}: {name}={briefly(function)} cannot be called; pass a function {arguments}")


def array_in(subject: str, what: str, value: Any) -> Array:
    """Return what a function has returned as an array; raise where there is none, or it has a mask. Local."""
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{subject}: {what} has returned a masked array, and masks are not kept; return it filled(0)")
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths, tensors with gradients or of devices
        raise DtypeError(f"{subject}: {what} has returned {briefly(value)}, of which no array can be made; return a NumPy "
                         "array") from error


def vector_in(subject: str, what: str, value: Any, like: Array) -> Array:
    """Return that as an array of the shape of `like`, which can be added to it. Local."""
    array = array_in(subject, what, value)
    if array.shape != like.shape:
        raise ShapeError(f"{subject}: {what} has returned shape {array.shape}, where {like.shape} was expected: that of x")
    if not np.can_cast(array.dtype, like.dtype, "same_kind"):
        raise DtypeError(f"{subject}: {what} has returned {array.dtype}; it was built for {like.dtype}")
    return array


def pair_in(subject: str, answer: Any, second: str, without: Any) -> tuple[Any, Any]:
    """Return a gradient, and what has come with it, or `without`. Local."""
    if not isinstance(answer, tuple):
        return answer, without
    if len(answer) != 2:
        raise OptionError(f"{subject}: gradient() has returned a tuple of {len(answer)}; return the sum of gradients, or a "
                          f"tuple of that and {second}")
    return answer[0], answer[1]


def check_numbers(subject: str, extras: Any, count: int) -> None:
    """Raise unless these are so many numbers. Local."""
    try:
        given = np.asarray(extras)
    except ValueError:  # rows of several lengths
        given = np.empty((), object)
    if given.ndim != 1 or not np.can_cast(given.dtype, np.float64, "same_kind"):
        raise OptionError(f"{subject}: extras={briefly(extras)} are no sequence of numbers; it was built for {count} "
                          "of them")
    if given.size != count:
        raise OptionError(f"{subject}: {given.size} extras; it was built for {count}")


def count_in(subject: str, value: Any) -> float:
    """Return a number of samples. Local."""
    if np.ndim(value) or not is_within(value, "[0, inf)") or float(value) != int(value):
        raise OptionError(f"{subject}: gradient() has returned {briefly(value)} as the number of samples; return a whole "
                          "number, or the sum of gradients alone, and divide it in step()")
    return float(value)


def step_to(subject: str, x: Array, new: Any) -> None:
    """Write what a step has returned to x, where it has returned anything. Local."""
    if new is not None:
        x[:] = vector_in(subject, "step()", new, x)
