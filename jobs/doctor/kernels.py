"""The compiled kernels: where their machine code is kept, and making all of it before a training needs it."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.jobs.doctor.files import NETWORK, file_system
from mpi_ef.jobs.doctor.finding import Finding, Told, by_value, who

__all__ = ["judge_kernels", "judge_warm_up", "kernel_facts", "warm_up"]

_D = 3000  # entries of the vectors: more than one block of every kernel


def kernel_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a small kernel, and tell where machine code is kept. Local; imports Numba."""
    from mpi_ef import kernels

    finite = [bool(kernels.all_finite(x)) for x in (np.ones(9, np.float32), np.full(9, np.nan, np.float32))]
    facts: dict[str, Any] = {
        "right": finite == [True, False],
        "named": environment.get("NUMBA_CACHE_DIR", ""),
        "path": _cache_folder(),
        **_cached(),
    }
    if facts["path"]:
        folder = Path(facts["path"])
        status = folder.stat()
        facts |= {
            "kind": file_system(folder),
            "of_others": status.st_uid not in (os.getuid(), 0),
            "open": bool(status.st_mode & 0o002),
        }
        try:
            with tempfile.NamedTemporaryFile(dir=folder):
                facts["write"] = ""
        except OSError as error:
            facts["write"] = error.strerror or str(error)
    return facts


def _cache_folder() -> str:
    """Return where Numba keeps machine code; empty where it keeps none."""
    kernel = next(_dispatchers(), None)
    return str(getattr(getattr(kernel, "_cache", None), "cache_path", None) or "")


def _dispatchers() -> Iterator[Any]:
    """Yield what Python calls of the kernels: compiled functions, some of them through a plain one."""
    from mpi_ef import kernels

    for kernel in (getattr(kernels, name) for name in kernels.__all__):
        if hasattr(kernel, "stats"):
            yield kernel
        elif hasattr(kernel, "__code__"):
            called = (kernel.__globals__.get(name) for name in kernel.__code__.co_names)
            yield from (function for function in called if hasattr(function, "stats"))


def _cached() -> dict[str, int]:
    """Return of how many kernels there is machine code on disk; nothing where Numba's inside looks different."""
    there = total = 0
    for kernel in _dispatchers():
        file = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
        load: Callable[[], Mapping[Any, Any]] | None = getattr(file, "_load_index", None)
        if load is None:
            return {}
        total += 1
        there += bool(load())
    return {"there": there, "total": total}


def judge_kernels(told: Sequence[Told], several_nodes: bool, warm_up: bool) -> Iterator[Finding]:
    """Yield what there is to say about the place of machine code."""
    wrong = [one for one in told if not one["right"]]
    if wrong:
        where, ranks = who(wrong, told)
        yield Finding(
            "Kernels",
            "kernels",
            "error",
            f"a compiled kernel gives a wrong result{where}",
            "remove Numba's cache; if that does not help, report it with the versions below",
            ranks,
        )
    without = [one for one in told if not one["path"] or one["write"]]
    if without:
        where, ranks = who(without, told)
        reason = f"{without[0]['path']}: {without[0]['write']}" if without[0]["path"] else "no folder can be written"
        yield Finding(
            "Kernels",
            "cache",
            "warning",
            f"machine code of the kernels cannot be kept ({reason}){where}: every process compiles them anew, for "
            "a minute or two",
            "export NUMBA_CACHE_DIR=/tmp/numba-$UID, or another folder of the node",
            ranks,
        )
        return
    one = next((some for some in told if some["kind"] in NETWORK), told[0])
    same = len(by_value(told, "path")) == 1
    kind = one["kind"] or "unknown file system"
    text = f"machine code is kept in {one['path']}{'' if same else ' and others'} ({kind})"
    if one["kind"] in NETWORK and several_nodes:
        yield Finding(
            "Kernels",
            "cache-network",
            "warning",
            f"{text}, which is on a network: nodes wait for it, and may disturb each other",
            "export NUMBA_CACHE_DIR=${SLURM_TMPDIR:-/tmp}/numba-$UID before srun, then mpi-ef doctor --warmup",
        )
    elif any(some["open"] or some["of_others"] for some in told):
        yield Finding(
            "Kernels",
            "cache-open",
            "warning",
            f"{text}, which others may write to, or own: what lies there is run",
            "export NUMBA_CACHE_DIR to a folder that is yours alone (chmod 700)",
        )
    else:
        yield Finding("Kernels", "cache", "ok", text)
    cold = [some for some in told if some["total"] and some["there"] < some["total"]]
    if cold and not warm_up:
        where, ranks = who(cold, told)
        yield Finding(
            "Kernels",
            "cache-cold",
            "note",
            f"{cold[0]['there']} of {cold[0]['total']} kernels are compiled{where}: first steps wait for the others",
            "mpi-ef doctor --warmup compiles all of them, one rank of every node first",
            ranks,
        )


class _Echo:
    """A communicator of two ranks of which the other echoes this one: plans use all their kernels, without MPI."""

    rank, size = 0, 2

    def Get_size(self) -> int:  # noqa: N802 - as MPI calls it
        return self.size

    def Get_rank(self) -> int:  # noqa: N802
        return self.rank

    def Is_inter(self) -> bool:  # noqa: N802
        return False

    def Barrier(self) -> None:  # noqa: N802
        pass

    def allgather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def Bcast(self, array: Any, root: int = 0) -> None:  # noqa: N802
        pass

    def Allgather(self, send: NDArray[Any], receive: NDArray[Any]) -> None:  # noqa: N802
        receive.reshape(self.size, -1)[:] = send.reshape(1, -1)

    def Alltoall(self, send: NDArray[Any], receive: NDArray[Any]) -> None:  # noqa: N802
        receive.reshape(self.size, -1)[:] = send.reshape(self.size, -1)[self.rank]

    def Iallgather(self, send: NDArray[Any], receive: NDArray[Any]) -> "_Done":  # noqa: N802
        self.Allgather(send, receive)
        return _Done()

    def Ialltoall(self, send: NDArray[Any], receive: NDArray[Any]) -> "_Done":  # noqa: N802
        self.Alltoall(send, receive)
        return _Done()

    def Alltoallv(self, send: Any, receive: Any) -> None:  # noqa: N802
        """Leave what is there in the place of what would arrive."""

    Allgatherv = Alltoallv


class _Done:
    def Wait(self) -> None:  # noqa: N802
        pass

    def Test(self) -> bool:  # noqa: N802
        return True


def warm_up() -> dict[str, Any]:
    """Make every kernel's machine code for float32, or load what is kept. Local; makes no MPI call; takes a minute or two.

    Returns
    -------
    dict
        seconds; and how many kernels were "compiled", how many "loaded".
    """
    began, before = perf_counter(), _made()
    for step in (*_rules(), *_optimizers()):
        step()
    after = _made()
    return {"seconds": perf_counter() - began, "compiled": after[0] - before[0], "loaded": after[1] - before[1]}


def _made() -> tuple[int, int]:
    counts = [
        (sum(kernel.stats.cache_misses.values()), sum(kernel.stats.cache_hits.values())) for kernel in _dispatchers()
    ]
    return sum(misses for misses, _ in counts), sum(hits for _, hits in counts)


def _rules() -> Iterator[Callable[[], object]]:
    """Yield steps of the rules with compressors that use different kernels."""
    from mpi_ef.collectives import plan_for
    from mpi_ef.compress import Compressor, Identity, LowRank, Quantize, RandK, Sign, TopK, Vote
    from mpi_ef.feedback import ErrorFeedback

    compressors: list[Compressor] = [
        TopK(0.01),
        TopK(0.01, values=Quantize("bf16")),
        RandK(0.01),
        Sign(),
        Sign(block=1024),
        Vote(),
        Quantize("int8"),
        LowRank(2, shapes=((_D // 50, 50),)),
        Identity(),
    ]
    comm, x = _Echo(), np.linspace(-1, 1, _D, dtype=np.float32)
    for compressor in compressors:
        for rule in ("ef21", "ef14", "econtrol"):
            options: dict[str, Any] = {"eta": 0.1} if rule == "econtrol" else {}
            feedback = ErrorFeedback(rule, plan_for(comm, compressor, _D), **options)
            yield lambda feedback=feedback: [feedback.step(x) for _ in range(2)]  # type: ignore[misc]


def _optimizers() -> Iterator[Callable[[], object]]:
    """Yield steps of all optimizers that ``mpi-ef train`` knows."""
    import torch

    from mpi_ef.jobs.train.choices import OPTIMIZERS
    from mpi_ef.jobs.train.config import TrainConfig
    from mpi_ef.jobs.train.optimizers import build_optimizer
    from mpi_ef.optim import ZeroOneAdam

    def building(name: Any) -> Callable[[Any], Any]:
        if name == "zero-one-adam":  # whose ways of making a step follow each other more slowly in a training
            return lambda model: ZeroOneAdam(
                model.parameters(), _Echo(), var_freeze_step=4, var_update_scaler=1, local_step_scaler=1
            )
        options: dict[str, Any] = {"freeze": 2} if "freeze" in OPTIMIZERS[name] else {}
        options |= {"ratio": 0.1} if OPTIMIZERS[name]["compressor"] == "topk" else {}
        return lambda model: build_optimizer(TrainConfig(optimizer=name, **options), model, _Echo())

    for name in OPTIMIZERS:
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 30)
        build = building(name)
        yield lambda model=model, build=build: _train(model, build(model))  # type: ignore[misc]


def _train(model: Any, optimizer: Any) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # both ranks have the same gradients
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(2, 40)).square().sum().backward()
            optimizer.step()
    optimizer.synchronize()


def judge_warm_up(first: Sequence[Told], then: Sequence[Told]) -> Iterator[Finding]:
    """Yield what the warm-up has brought.

    Parameters
    ----------
    first, then : sequence of Told
        The ranks that have compiled, and those that came after them.
    """
    slowest = max(first, key=lambda one: float(one["seconds"]))
    compiled = max(int(one["compiled"]) for one in first)
    made = f"{compiled} compiled" if compiled else "all loaded from disk"
    after = f"; the other ranks loaded them in {max(float(one['seconds']) for one in then):.1f} s" if then else ""
    yield Finding("Kernels", "warm-up", "ok", f"kernels are ready: {made} in {slowest['seconds']:.1f} s{after}")
    again = [one for one in then if one["compiled"]]
    if again:
        where, ranks = who(again, (*first, *then))
        yield Finding(
            "Kernels",
            "warm-up-again",
            "warning",
            f"{again[0]['compiled']} kernels were compiled again{where}, although another rank of the node had done it",
            "give all ranks of a node one NUMBA_CACHE_DIR, and nodes with different processors different ones",
            ranks,
        )
