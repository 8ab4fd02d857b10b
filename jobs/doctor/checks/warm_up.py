"""Making all machine code before a training needs it: one rank of a node first, then the others load it."""

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

from mpi_ef.comm.protocol import Comm
from mpi_ef.jobs.doctor.checks.kernels import dispatchers
from mpi_ef.jobs.doctor.finding import Finding, finding
from mpi_ef.jobs.doctor.ranks import Facts, Ranks
from mpi_ef.jobs.doctor.registry import Context

__all__ = ["collect", "judge", "optimizers", "rules"]

_D = 3000  # entries of the vectors: more than one block of every kernel


def collect(context: Context) -> Facts:
    """Make every kernel's machine code for float32, or load what is kept; nothing where it is not this rank's turn. Local.

    The steps run on virtual ranks, so that all kernels are used and MPI is not called; they take a minute or two.
    """
    from mpi_ef.testing import virtual

    placement = context.placement
    first = placement.rank == 0 or (placement.local == 0 and not context.shared_cache)
    if first != (context.turn == 0):
        return {}
    began, before = perf_counter(), _made()
    for program in (*rules(), *optimizers()):
        virtual.results(2, program)
    compiled, loaded = (now - then for now, then in zip(_made(), before, strict=True))
    return {"first": first, "seconds": perf_counter() - began, "compiled": compiled, "loaded": loaded}


def _made() -> tuple[int, int]:
    """Return how many kernels this process has compiled, and how many it has loaded."""
    stats = [kernel.stats for kernel in dispatchers()]
    return sum(sum(s.cache_misses.values()) for s in stats), sum(sum(s.cache_hits.values()) for s in stats)


def rules() -> Iterator[Callable[[Any], None]]:
    """Yield collective programs that make steps of the rules, with compressors that use different kernels."""
    from mpi_ef.compress import Compressor, Identity, LowRank, Quantize, RandK, Sign, TopK, Vote

    top, low = [TopK(0.01), TopK(0.01, values=Quantize("bf16"))], LowRank(2, shapes=((_D // 50, 50),))
    others: list[Compressor] = [RandK(0.01), Sign(), Sign(block=1024), Vote(), Quantize("int8"), low, Identity()]
    yield from (partial(_run_rules, compressor) for compressor in (*top, *others))


def _run_rules(compressor: Any, comm: Comm) -> None:
    import numpy as np

    from mpi_ef.collectives import plan_for
    from mpi_ef.feedback import ErrorFeedback

    for rule in ("ef21", "ef14", "econtrol"):
        options: dict[str, Any] = {"eta": 0.1} if rule == "econtrol" else {}
        feedback = ErrorFeedback(rule, plan_for(comm, compressor, _D), **options)
        for _ in range(2):
            feedback.step(np.linspace(-1, 1, _D, dtype=np.float32))


def optimizers() -> Iterator[Callable[[Any], None]]:
    """Yield collective programs that make steps of an optimizer each, of all that ``mpi-ef train`` knows."""
    from mpi_ef.jobs.train.choices import OPTIMIZERS

    yield from (partial(_run_optimizer, name) for name in OPTIMIZERS)


def _run_optimizer(name: Any, comm: Comm) -> None:
    import torch

    model = torch.nn.Linear(40, 30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    optimizer = _optimizer(name, model, comm)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.full((2, 40), 1.0 + comm.Get_rank() + step)).square().sum().backward()
        optimizer.step()
    optimizer.synchronize()


def _optimizer(name: Any, model: Any, comm: Comm) -> Any:
    from mpi_ef.jobs.train.choices import OPTIMIZERS
    from mpi_ef.jobs.train.config import TrainConfig
    from mpi_ef.jobs.train.optimizers import build_optimizer
    from mpi_ef.optim import ZeroOneAdam

    if name == "zero-one-adam":  # its ways of making a step follow each other more slowly in a training
        options: dict[str, Any] = {"var_freeze_step": 4, "var_update_scaler": 1, "local_step_scaler": 1}
        return ZeroOneAdam(model.parameters(), comm, **options)
    options = {"freeze": 2} if "freeze" in OPTIMIZERS[name] else {}
    options |= {"ratio": 0.1} if OPTIMIZERS[name]["compressor"] == "topk" else {}
    return build_optimizer(TrainConfig(optimizer=name, **options), model, comm)


def judge(ranks: Ranks) -> Iterator[Finding]:
    """Yield how long it took, and whether machine code was found by the ranks that came later."""
    first, then = ranks.which("first"), ranks.which(lambda one: one["first"] is False)
    if first:
        compiled = max(int(one["compiled"]) for one in first)
        others = f"; the other ranks loaded them in {max(one['seconds'] for one in then):.1f} s" if then else ""
        yield finding(
            "warm-up",
            compiled=f"{compiled} compiled" if compiled else "all loaded from disk",
            seconds=max(float(one["seconds"]) for one in first),
            others=others,
        )
        if again := then.which("compiled"):
            yield finding("warm-up-again", again)
