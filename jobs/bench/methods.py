"""What the benchmark measures: dense means, compressed steps, obvious alternatives, and parts that need no network."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from mpi_ef import kernels, registry
from mpi_ef.collectives import DenseMean, Plan, build_plan, plan_for
from mpi_ef.compress import Keep, Quantize, RandK, Sign, TopK, lazy, source
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.feedback.table import rule_of
from mpi_ef.jobs.bench.place import Place
from mpi_ef.jobs.bench.table import COPIED, EF21_ENCODE, SIGNS_ENCODE, TORCH_ADD, TORCH_SUB, TORCH_TOPK

__all__ = ["Method", "memory_of_ef21", "methods"]


@dataclass
class Method:
    """Something to measure: what to call with a vector, and what is known about it beforehand."""

    name: str
    kind: str  # dense, compressed, alternative, or local: without communication
    call: Callable[[Any], Any]
    sent_nbytes: int = 0
    entry_bits: float | None = None  # of a kept entry on the wire
    index_bits: float | None = None  # those of them for the index
    plan: Plan | None = None
    clock: dict[str, float] = field(default_factory=dict)  # seconds of its parts so far, as of :attr:`Plan.seconds`

    @property
    def link_nbytes(self) -> int | None:
        """Bytes that come over the link of a node; None where that is not known."""
        return None if self.plan is None else self.plan.link_traffic.nbytes

    def __post_init__(self) -> None:
        self.clock = self.clock if self.plan is None else self.plan.seconds


def methods(comm: Any, d: int, ratio: float, specified: Sequence[Sequence[str]] = (),
            place: Place | None = None) -> Iterator[Method]:
    """Yield what there is to measure, with buffers for vectors of `d` float32. Collective.

    Besides dense ones, everything, or what is `specified`: rules, compressors and maybe plans, see :mod:`mpi_ef.registry`.
    Vectors are on the host, or where `place` says, of which all ranks pass one or none does.
    """
    yield from _dense(comm, d) if place is None else _dense_on_device(comm, d, place)
    where = "cpu" if place is None else place.name
    for rule, text, *plan in specified:
        built = registry.built("compressor", text)
        gather = rule_of(rule)[0].gathers
        method = _step(rule, build_plan(plan[0] if plan else plan_for, comm, built, d, np.float32, where, gather=gather))
        yield replace(method, name=" ".join((method.name, *plan)))
    if specified:
        return
    half = Quantize("bf16")
    for rule in ("ef21", "ef14", "econtrol"):
        yield _step(rule, plan_for(comm, TopK(ratio), d, device=where))
    yield _step("ef21", plan_for(comm, TopK(ratio, values=half), d, device=where))
    for compressor in (RandK(ratio), Sign(block=4096), Sign(), Quantize("int8")):
        yield _step("ef14", plan_for(comm, compressor, d, device=where))
    yield from _alternatives(comm, d, ratio, place)
    yield from _local(d, ratio) if place is None else _beside_torch(d, ratio, place)


def memory_of_ef21(comm: Any, d: int, ratio: float, place: Place, vectors: Sequence[Any]) -> float | None:
    """Return what EF21 adds on the device after two steps, in vectors; None where torch does not count it. Collective."""
    before = place.allocated()
    feedback = ErrorFeedback("ef21", plan_for(comm, TopK(ratio), d, device=place.name))
    for x in vectors[:2]:
        feedback.step(x)
    after = place.allocated()
    return None if before is None or after is None else (after - before) / (4 * d)


def _dense_on_device(comm: Any, d: int, place: Place) -> Iterator[Method]:
    """Yield a mean by MPI, which sees memory of the host: copy the vector there, and the mean back."""
    from mpi4py import MPI

    plan = DenseMean(comm, d, device=place.name)
    host, result = place.kernels.on_host(d, np.float32), place.kernels.zeros(d)
    clock = {"communicate": 0.0}

    def step(x: Any) -> Any:
        place.to_host(x, host)
        began = perf_counter()
        comm.Allreduce(MPI.IN_PLACE, host)
        clock["communicate"] += perf_counter() - began
        place.to_device(host, result)
        return result

    yield Method(COPIED, "dense", step, plan.traffic.dense_nbytes, clock=clock)
    yield Method("DenseMean", "dense", plan.exchange, plan.traffic.sent_nbytes, plan=plan)


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


def _alternatives(comm: Any, d: int, ratio: float, place: Place | None) -> Iterator[Method]:
    import torch

    k, others = TopK(ratio).count(d), comm.Get_size() - 1
    step = _torch_topk_step(comm, d, k, place or Place(torch.device("cpu")))
    yield Method("ef21 by torch.topk + Allgather", "alternative", step, others * 8 * k, 64, 32)
    if place is not None:
        return
    yield Method("signs by np.packbits + Allgather", "alternative", _packbits_step(comm, d), others * (-(-d // 8) + 4), 1)


def _torch_topk_step(comm: Any, d: int, k: int, place: Place) -> Callable[[Any], Any]:
    """Return EF21 by torch alone: int32 indices, float32 values, two allgathers."""
    import torch

    size = comm.Get_size()
    g_i, g = (torch.zeros(d, device=place.device) for _ in range(2))
    indices, values = np.empty((size, k), np.int32), np.empty((size, k), np.float32)

    def step(x: Any) -> Any:
        difference = place.tensor(x) - g_i
        chosen = torch.topk(difference.abs(), k, sorted=False).indices
        kept = difference[chosen]
        comm.Allgather(chosen.int().cpu().numpy(), indices)
        comm.Allgather(kept.cpu().numpy(), values)
        g_i.index_add_(0, chosen, kept)
        for row in range(size):
            there, arrived = (torch.from_numpy(part[row]).to(place.device) for part in (indices, values))
            g.index_add_(0, there, arrived, alpha=1 / size)
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


def _beside_torch(d: int, ratio: float, place: Place) -> Iterator[Method]:
    """Yield what a device does for a message, and operations of torch that read and write as much."""
    import torch

    kernels_there, k = place.kernels, TopK(ratio).count(d)
    g_i = kernels_there.place(np.random.default_rng(d).standard_normal(d, dtype=np.float32))
    b, c = place.tensor(g_i), torch.ones(d, device=place.device)

    def encoding(compressor: Any, kept: Any = None) -> Callable[[Any], Any]:
        codec = compressor.codec_on(place.name, d, np.dtype(np.float32))
        wire = kernels_there.zeros(codec.nbytes, np.uint8)

        def encode(x: Any) -> bool:
            difference = lazy(x) - g_i
            keep = None if kept is None else Keep(difference, kept, less_message=True)
            return bool(codec.encode(source(difference, keep), wire))

        return encode

    yield Method(EF21_ENCODE, "local", encoding(TopK(ratio)))
    yield Method(TORCH_SUB, "local", lambda x: torch.sub(place.tensor(x), b, out=c))
    yield Method(TORCH_TOPK, "local", lambda _: torch.topk(c.abs(), k, sorted=False))
    yield Method(SIGNS_ENCODE, "local", encoding(Sign(block=4096), kernels_there.zeros(d)))
    yield Method(TORCH_ADD, "local", lambda x: torch.add(place.tensor(x), b, out=c))


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
