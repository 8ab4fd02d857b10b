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
from mpi_ef.errors import OptionError, briefly

from .chosen import plan_for
from .dense import DenseMean
from .gather import GatherMean
from .given import Given, given
from .plan import Plan

__all__ = ["allgather", "allreduce", "kept_plan"]

KEPT_PLANS = 16  # per communicator; the one unused for longest is dropped

_Key = tuple[str, str, Compressor, int, str, bytes]  # the last tells where the vectors of all ranks are
_Build = Callable[[Compressor, int, str, str], Plan]  # of a compressor, d, a dtype and a device


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
    x : (d1, d2, ...) float32 or float64, contiguous, this rank's vector, read only
        A numpy array, a tensor of torch on the CPU or a GPU, or what another library, such as CuPy or JAX, has on a GPU: it
        has ``__dlpack__``. Ranks may have theirs in different places.
    compressor : Compressor
    op : {"mean", "sum"}
    out : like x and on its device, optional, contiguous, overwritten, with Identity also when `NonFiniteError` is raised;
        may be x itself, which then is not. No array of JAX, which nobody may write to

    Returns
    -------
    array or tensor
        `out`, or a new array of the kind, shape, dtype and device of `x`; a tensor, where x is of another library that has
        no ``from_dlpack`` for it.

    Raises
    ------
    DisagreementError, PeerError, NonFiniteError, ShapeError, DtypeError, OptionError
        On all ranks together when anything differs between them or is wrong on one of them.

    Notes
    -----
    Cost beyond the exchange: one allgather of 8 bytes, which checks that all ranks ask for the same thing.
    """

    def check() -> Given:
        if not (isinstance(op, str) and op in ("mean", "sum")):
            raise OptionError(f"allreduce: op={briefly(op)} is unknown; take 'mean' or 'sum'")
        return given("allreduce", x, out, ())

    plan, (vector, target, _, result) = _plan(
        "allreduce", comm, compressor, check, op,
        lambda *what: plan_for(comm, *what[:3], residual=False, device=what[3]))
    scale = 1.0 if op == "mean" else float(plan.size)
    if isinstance(plan, DenseMean):
        plan.allreduce(vector, target, scale)
    else:
        plan.exchange(vector)
        plan.set_mean(target, scale)
    return result()


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
        `out`, or a new array of the kind, dtype and device of `x`, as for :func:`allreduce`.

    Raises
    ------
    DisagreementError, PeerError, NonFiniteError, ShapeError, DtypeError, OptionError
        On all ranks together, as for :func:`allreduce`.
    """
    check_not_freed(comm, "allgather")
    size = int(comm.Get_size())

    plan, (vector, target, _, result) = _plan(
        "allgather", comm, compressor, lambda: given("allgather", x, out, (size,)), "",
        lambda *what: GatherMean(comm, *what[:3], device=what[3]))
    assert isinstance(plan, GatherMean)  # noqa: S101
    plan.exchange(vector)
    target.fill(0)
    for rank, row in enumerate(target.reshape(size, vector.size)):
        plan.add_message(rank, row)
    return result()


def kept_plan(call: str, comm: Comm, x: Any, out: Any, compressor: Compressor, op: str, build: _Build) -> tuple[Plan, Given]:
    """Return the plan that is kept with a communicator for calls of this kind, and the checked arrays. Collective.

    Raises as :func:`allreduce`. `op` is what else ranks must ask for alike.
    """
    return _plan(call, comm, compressor, lambda: given(call, x, out, ()), op, build)


def _plan(call: str, comm: Comm, compressor: Compressor, check: Callable[[], Given], op: str, build: _Build
          ) -> tuple[Plan, Given]:
    """Return the cached plan for this request and the checked arrays, once all ranks are known to ask for the same."""
    check_not_freed(comm, call)
    error: Exception | None = None
    asked: tuple[str, Compressor, int, str] | None = None
    try:
        arrays = check()
        check_compressor(call, compressor=compressor)
        asked = (call, compressor, arrays.vector.size, str(arrays.vector.dtype))
    except Exception as raised:
        error = raised
    where = 0 if error is not None else crc32(arrays.device.encode()) | 1
    mine = np.array([crc32(repr((op, *asked) if asked else error).encode()), where], np.uint32)
    answers = np.empty((comm.Get_size(), 2), np.uint32)
    comm.Allgather(mine, answers)
    if not answers[:, 1].all() or (answers[:, 0] != mine[0]).any():

        def facts() -> dict[str, object]:
            if error is not None:
                raise error
            assert asked is not None  # noqa: S101
            return {"the call": f"{call}({op})", "compressor": asked[1], "d": asked[2], "dtype": asked[3]}

        agree(comm, call, facts, "call it with the same arguments on all ranks", call="a call in one line")
    assert asked is not None  # noqa: S101
    kept = "" if call == "allreduce" else op  # a sum is a mean, scaled
    key, cache = (call, kept, *asked[1:], answers[:, 1].tobytes()), kept_with(comm, _Plans)
    if key not in cache:
        cache[key] = build(*asked[1:], arrays.device)
        if len(cache) > KEPT_PLANS:  # the same one on all ranks: all have made the same calls in the same order
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key], arrays
