"""One-call forms for programs that have a communicator and an array, and want no objects."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal
from zlib import crc32

import numpy as np

from mpi_ef.comm.attributes import kept_with
from mpi_ef.comm.consensus import agree, check_not_freed
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.compress.compressor import check_compressor
from mpi_ef.errors import DtypeError, OptionError, ShapeError, briefly

from .dense import DenseMean
from .misfit import masked
from .plan import Plan, plan_for
from .plans import GatherMean

__all__ = ["allgather", "allreduce"]

KEPT_PLANS = 16  # per communicator; the one unused for longest is dropped

_Key = tuple[str, Compressor, int, str]


class _Plans(OrderedDict[_Key, Plan]):
    """The plans kept with a communicator; MPI drops them when it is freed."""


def allreduce(comm: Comm, x: Any, compressor: Compressor, *, op: Literal["mean", "sum"] = "mean",
              out: Any = None) -> Any:
    """Return the mean, or the sum, of the compressed vectors of all ranks, the same bits on every rank. Collective.

    Sparse compressors (TopK, RandK) go through :class:`GatherMean`, Identity through :class:`DenseMean`, LowRank through
    :class:`LowRankMean` without warm start, others through :class:`TwoPhaseMean` without residual, which compresses
    twice. What compression loses is lost: for repeated sums use an error-feedback rule of :mod:`mpi_ef.feedback`, which
    sends it later.

    Parameters
    ----------
    comm : MPI.Comm
        Any intracommunicator. The plan, with its buffers, stays cached with it until it is freed.
    x : (d1, d2, ...) float32 or float64, numpy array or CPU tensor, contiguous, this rank's vector, read only
    compressor : Compressor
    op : {"mean", "sum"}
    out : like x, optional, contiguous, overwritten, with Identity also when `NonFiniteError` is raised; may be x itself,
        which then is not

    Returns
    -------
    array or tensor
        `out`, or a new array of the kind, shape and dtype of `x`.

    Raises
    ------
    DisagreementError, PeerError, NonFiniteError, ShapeError, DtypeError, OptionError
        On all ranks together when anything differs between them or is wrong on one of them.

    Notes
    -----
    Cost beyond the exchange: one allgather of 8 bytes, which checks that all ranks ask for the same thing.
    """

    def check() -> tuple[Any, np.ndarray, np.ndarray]:
        if not (isinstance(op, str) and op in ("mean", "sum")):
            raise OptionError(f"allreduce: op={briefly(op)} is unknown; take 'mean' or 'sum'")
        return _arrays("allreduce", x, out, ())

    plan, (result, vector, target) = _plan("allreduce", comm, compressor, check, op)
    scale = 1.0 if op == "mean" else float(plan.size)
    if isinstance(plan, DenseMean):
        plan.allreduce(vector, target, scale)
    else:
        plan.exchange(vector)
        plan.set_mean(target, scale)
    return result


def allgather(comm: Comm, x: Any, compressor: Compressor, *, out: Any = None) -> Any:
    """Return the compressed vectors of all ranks, decoded, one row per rank. Collective.

    Parameters
    ----------
    comm, x, compressor
        As for :func:`allreduce`.
    out : (n, d1, d2, ...) of the dtype of x, optional, contiguous, overwritten

    Returns
    -------
    array or tensor, (n, d1, d2, ...)
        `out`, or a new array of the kind and dtype of `x`.

    Raises
    ------
    DisagreementError, PeerError, NonFiniteError, ShapeError, DtypeError, OptionError
        On all ranks together, as for :func:`allreduce`.
    """
    check_not_freed(comm, "allgather")
    size = int(comm.Get_size())

    plan, (result, vector, target) = _plan("allgather", comm, compressor,
                                           lambda: _arrays("allgather", x, out, (size,)), "")
    assert isinstance(plan, GatherMean)  # noqa: S101
    plan.exchange(vector)
    target.fill(0)
    for rank, row in enumerate(target.reshape(size, vector.size)):
        plan.add_message(rank, row)
    return result


def _flat(call: str, name: str, array: Any) -> np.ndarray:
    """Return a contiguous numpy array or CPU tensor as a one-dimensional view."""
    if not isinstance(array, np.ndarray):
        if not hasattr(array, "detach"):
            raise DtypeError(f"{call}: {name} is a {type(array).__name__}; pass a numpy array or a CPU tensor")
        if str(array.dtype) not in ("torch.float32", "torch.float64"):
            raise DtypeError(f"{call}: {name} has dtype {array.dtype}; pass float32 or float64")
        try:
            array = array.detach().numpy()
        except (TypeError, RuntimeError) as error:
            raise DtypeError(f"{call}: {name} cannot be seen as a numpy array ({error}); pass a CPU tensor") from None
    if isinstance(array, np.ma.MaskedArray):
        raise masked(call, name)
    if array.dtype not in (np.float32, np.float64):
        raise DtypeError(f"{call}: {name} has dtype {array.dtype}; pass float32 or float64")
    if not array.flags.c_contiguous:
        raise ShapeError(f"{call}: {name} is not contiguous; pass numpy.ascontiguousarray({name})")
    flat: np.ndarray = array.view(np.ndarray).reshape(-1)  # matrices stay matrices else
    return flat


def _arrays(call: str, x: Any, out: Any, rows: tuple[int, ...]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return `out`, or a new array for `rows` in front of the shape of `x`; `x` and that as one-dimensional views."""
    vector, shape = _flat(call, "x", x), rows + tuple(x.shape)
    result = out
    if result is None:
        result = np.empty(shape, x.dtype) if isinstance(x, np.ndarray) else x.new_empty(shape)
    target = _flat(call, "out", result)
    if tuple(result.shape) != shape or target.dtype != vector.dtype:
        raise ShapeError(f"{call}: out has shape {tuple(result.shape)} {target.dtype}; it must be {shape} {vector.dtype}")
    if not target.flags.writeable:
        raise ShapeError(f"{call}: out is read-only; pass an array that can be written")
    return result, vector, target


def _plan(call: str, comm: Comm, compressor: Compressor, check: Callable[[], tuple[Any, np.ndarray, np.ndarray]],
          op: str) -> tuple[Plan, tuple[Any, np.ndarray, np.ndarray]]:
    """Return the cached plan for this request and the checked arrays, once all ranks are known to ask for the same."""
    check_not_freed(comm, call)
    error: Exception | None = None
    key: _Key | None = None
    try:
        arrays = check()
        check_compressor(call, compressor=compressor)
        key = (call, compressor, arrays[1].size, str(arrays[1].dtype))
    except Exception as raised:
        error = raised
    asked = repr((op, *key)) if key else "error"
    mine = np.array([crc32(asked.encode()), error is not None], np.uint32)
    answers = np.empty((comm.Get_size(), 2), np.uint32)
    comm.Allgather(mine, answers)
    if answers[:, 1].any() or (answers[:, 0] != mine[0]).any():

        def facts() -> dict[str, object]:
            if error is not None:
                raise error
            assert key is not None  # noqa: S101
            return {"the call": f"{call}({op})", "compressor": key[1], "d": key[2], "dtype": key[3]}

        agree(comm, call, facts, "call it with the same arguments on all ranks", call="a call in one line")
    assert key is not None  # noqa: S101
    cache = kept_with(comm, _Plans)
    if key not in cache:
        if call == "allgather":
            cache[key] = GatherMean(comm, *key[1:])
        else:
            cache[key] = plan_for(comm, *key[1:], residual=False)
        if len(cache) > KEPT_PLANS:  # the same one on all ranks: all have made the same calls in the same order
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key], arrays
