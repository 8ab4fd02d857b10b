"""What the benchmark measures: dense means, compressed steps, obvious alternatives, and parts that need no network."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpi_ef import kernels, registry
from mpi_ef.collectives import DenseMean, GatherMean, Plan, TwoPhaseMean, build_plan, plan_for
from mpi_ef.compress import Quantize, RandK, Sign, TopK, source
from mpi_ef.feedback import ErrorFeedback

__all__ = ["Method", "methods"]


@dataclass
class Method:
    """Something to measure: what to call with a vector, and what is known about it beforehand."""

    name: str
    kind: str  # dense, compressed, alternative, or local: without communication
    call: Callable[[np.ndarray], Any]
    sent_nbytes: int = 0
    entry_bits: float | None = None  # of a kept entry on the wire
    index_bits: float | None = None  # those of them for the index
    plan: Plan | None = None


def methods(comm: Any, d: int, ratio: float, specified: Sequence[Sequence[str]] = ()) -> Iterator[Method]:
    """Yield what there is to measure, with buffers for vectors of `d` float32. Collective.

    Besides dense ones, everything, or what is `specified`: rules, compressors and maybe plans, see :mod:`mpi_ef.registry`.
    """
    yield from _dense(comm, d)
    for rule, text, *plan in specified:
        built = registry.built("compressor", text)
        method = _step(rule, build_plan(plan[0] if plan else plan_for, comm, built, d, np.float32))
        yield replace(method, name=" ".join((method.name, *plan)))
    if specified:
        return
    half = Quantize("bf16")
    for rule in ("ef21", "ef14", "econtrol"):
        yield _step(rule, GatherMean(comm, TopK(ratio), d))
    yield _step("ef21", GatherMean(comm, TopK(ratio, values=half), d))
    yield _step("ef14", GatherMean(comm, RandK(ratio), d))
    for compressor in (Sign(block=4096), Sign(), Quantize("int8")):
        yield _step("ef14", TwoPhaseMean(comm, compressor, d))
    yield from _alternatives(comm, d, ratio)
    yield from _local(d, ratio)


def _dense(comm: Any, d: int) -> Iterator[Method]:
    result = np.ones(d, np.float32)
    plan = DenseMean(comm, d)
    dense_nbytes = plan.traffic.dense_nbytes
    yield Method("MPI_Allreduce", "dense", lambda x: comm.Allreduce(x, result), dense_nbytes)
    yield Method("MPI_Iallreduce + Wait", "dense", lambda x: comm.Iallreduce(x, result).Wait(), dense_nbytes)
    yield Method("DenseMean", "dense", plan.exchange, plan.traffic.sent_nbytes, plan=plan)


def _step(rule: str, plan: Plan) -> Method:
    feedback = ErrorFeedback(rule, plan, eta=0.1) if rule == "econtrol" else ErrorFeedback(rule, plan)
    compressor, index_bits = plan.compressor, None
    k = compressor.count(plan.d) if isinstance(compressor, TopK | RandK) else plan.d
    entry_bits = 8 * compressor.wire_nbytes(plan.d) / k
    if isinstance(compressor, TopK | RandK):
        index_bits = entry_bits - 8 * compressor.values.wire_nbytes(k) / k
    name = f"{rule} {compressor}".replace("values=Quantize(format='bf16', block=256)", "bf16").replace("ratio=", "")
    for default in (", values=Identity()", ", seed=0", ", block=256", "format="):
        name = name.replace(default, "")
    return Method(name, "compressed", feedback.step, plan.traffic.sent_nbytes, entry_bits, index_bits, plan)


def _alternatives(comm: Any, d: int, ratio: float) -> Iterator[Method]:
    k, others = TopK(ratio).count(d), comm.Get_size() - 1
    yield Method("ef21 by torch.topk + Allgather", "alternative", _torch_topk_step(comm, d, k), others * 8 * k, 64, 32)
    yield Method("signs by np.packbits + Allgather", "alternative", _packbits_step(comm, d), others * (-(-d // 8) + 4), 1)


def _torch_topk_step(comm: Any, d: int, k: int) -> Callable[[np.ndarray], Any]:
    """Return EF21 by torch alone: int32 indices, float32 values, two allgathers."""
    import torch

    size = comm.Get_size()
    g_i, g = torch.zeros(d), torch.zeros(d)
    indices, values = np.empty((size, k), np.int32), np.empty((size, k), np.float32)

    def step(x: np.ndarray) -> Any:
        difference = torch.from_numpy(x) - g_i
        chosen = torch.topk(difference.abs(), k, sorted=False).indices
        kept = difference[chosen]
        comm.Allgather(chosen.int().numpy(), indices)
        comm.Allgather(kept.numpy(), values)
        g_i.index_add_(0, chosen, kept)
        for row in range(size):
            g.index_add_(0, torch.from_numpy(indices[row]), torch.from_numpy(values[row]), alpha=1 / size)
        return g

    return step


def _packbits_step(comm: Any, d: int) -> Callable[[np.ndarray], Any]:
    """Return a step with packed signs and error feedback by NumPy alone: one allgather."""
    size = comm.Get_size()
    error, mean = np.zeros(d, np.float32), np.zeros(d, np.float32)
    bits, scales = np.empty((size, -(-d // 8)), np.uint8), np.empty(size, np.float32)

    def step(x: np.ndarray) -> Any:
        p = error + x
        scale = np.abs(p).mean(dtype=np.float32)
        comm.Allgather(np.packbits(p >= 0), bits)
        comm.Allgather(np.array([scale], np.float32), scales)
        np.subtract(p, np.where(p >= 0, scale, -scale), out=error)
        mean.fill(0)
        for row, factor in zip(bits, scales, strict=True):
            mean[:] += np.where(np.unpackbits(row, count=d), factor / size, -factor / size)
        return mean

    return step


def _local(d: int, ratio: float) -> Iterator[Method]:
    import torch

    codec, k = TopK(ratio).codec(d), TopK(ratio).count(d)
    wire = np.zeros(codec.nbytes, np.uint8)
    bounds, counts = np.array([0, d]), np.array([k])
    room = kernels.select_candidates(bounds, counts)
    places = np.zeros(room, np.int64), np.zeros(room, np.float32)
    scratch = np.zeros(kernels.SELECT_SCRATCH, np.float32), np.zeros(2048, np.int64)
    torch.set_num_threads(1)
    yield Method("read the vector once", "local", lambda x: int(np.bitwise_or.reduce(x.view(np.uint32))))
    yield Method("select TopK", "local",
                 lambda x: kernels.select_largest(*source(x)[:4], bounds, counts, *places, *scratch))
    yield Method("select TopK and code it", "local", lambda x: codec.encode(x, wire))
    yield Method("torch.topk, one thread", "local", lambda x: torch.topk(torch.from_numpy(x).abs(), k, sorted=False))
    yield from _updates(d)


def _updates(d: int) -> Iterator[Method]:
    """Yield what Adam does beside its exchange, here and by torch with one thread; the vector is the gradient."""
    import torch

    real = np.float32
    m, v, x, inverse = (np.full(d, value, real) for value in (0.1, 0.01, 1.0, 10.0))

    def warm(gradient: np.ndarray) -> None:
        kernels.adam(gradient, real(0.9), real(0.999), real(1e-3), real(1.0), real(1e-8), real(0.999), m, v, x)

    def frozen(gradient: np.ndarray) -> None:
        kernels.preconditioned_step(gradient, inverse, real(1e-3), real(0.999), x)

    yield Method("1-bit Adam's update, warm-up", "local", warm)
    yield Method("1-bit Adam's update, frozen", "local", frozen)
    for way in ("fused", "foreach"):
        p = torch.nn.Parameter(torch.ones(d))
        options: dict[str, Any] = {way: True}
        adam = torch.optim.AdamW([p], **options)

        def step(gradient: np.ndarray, p: torch.nn.Parameter = p, adam: torch.optim.Optimizer = adam) -> None:
            p.grad = torch.from_numpy(gradient)
            adam.step()

        yield Method(f"torch's AdamW, {way}", "local", step)
