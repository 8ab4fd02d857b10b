"""Making all machine code before a training needs it: one rank of a node first, then the others load it."""

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

from mpi_ef.comm.protocol import Comm
from mpi_ef.jobs.doctor.checks.kernels import dispatchers
from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context

__all__ = ["collect", "judge", "optimizers", "rules"]

_D = 3000  # entries of the vectors: more than one block of every kernel
# Its ways of making a step follow each other more slowly in a training.
_ZERO_ONE_ADAM = "ZeroOneAdam(var_freeze_step=4, var_update_scaler=1, local_step_scaler=1)"


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
    from mpi_ef.compress import Identity, LowRank, Quantize, RandK, Sign, TopK, TwoBits, Vote

    yield from (partial(_run_rules, compressor) for compressor in (
        TopK(0.01), TopK(0.01, values=Quantize("bf16")), TopK(0.1, values=TwoBits()), RandK(0.01), Sign(),
        Sign(block=1024), Vote(), Quantize("int8"),
        LowRank(2, shapes=((_D // 50, 50),)), Identity()))


def _run_rules(compressor: Any, comm: Comm) -> None:
    import numpy as np

    from mpi_ef.collectives import plan_for
    from mpi_ef.feedback import ErrorFeedback

    rules: dict[str, dict[str, Any]] = {"ef21": {}, "ef14": {}, "econtrol": {"eta": 0.1}}
    for rule, options in rules.items():
        feedback = ErrorFeedback(rule, plan_for(comm, compressor, _D), **options)
        for _ in range(2):
            feedback.step(np.linspace(-1, 1, _D, dtype=np.float32))


def optimizers() -> Iterator[Callable[[Any], None]]:
    """Yield collective programs that make steps of an optimizer each, of all that ``mpi-ef train`` has."""
    from mpi_ef.jobs.train.choices import OPTIMIZERS
    from mpi_ef.jobs.train.config import TrainConfig

    for name, takes in OPTIMIZERS.items():
        options: dict[str, Any] = {"freeze": 2} if "freeze" in takes else {}
        options |= {"ratio": 0.1} if takes["compressor"] == "topk" else {}
        config = TrainConfig(optimizer=name, **options)
        yield partial(_run_optimizer, TrainConfig(optimizer=_ZERO_ONE_ADAM) if name == "zero-one-adam" else config)


def _run_optimizer(config: Any, comm: Comm) -> None:
    import torch

    from mpi_ef.jobs.train.optimizers import build_optimizer

    model = torch.nn.Linear(40, 30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    optimizer = build_optimizer(config, model, comm)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.full((2, 40), 1.0 + comm.Get_rank() + step)).square().sum().backward()
        optimizer.step()
    optimizer.synchronize()


def judge(ranks: Ranks) -> Findings:
    """Yield how long it took, and whether machine code was found by the ranks that came later."""
    first, then = ranks.which("first"), ranks.which(lambda one: one["first"] is False)
    if first:
        compiled, seconds = (max(one[name] for one in first) for name in ("compiled", "seconds"))
        others = f"; the other ranks loaded them in {max(one['seconds'] for one in then):.1f} s" if then else ""
        kernels = f"{compiled} compiled" if compiled else "all loaded from disk"
        yield finding("warm-up", compiled=kernels, seconds=seconds, others=others)
        if again := then.which("compiled"):
            yield finding("warm-up-again", again)
