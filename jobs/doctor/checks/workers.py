"""Worker processes of a DataLoader: whether they start, and without MPI."""

import multiprocessing
import sys
from time import perf_counter
from typing import Any

from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context

__all__ = ["collect", "judge"]

_SECONDS = 30.0


def collect(_: Context) -> Facts:
    """Start a process as DataLoaders should start their workers, and return what it has found. Local; imports torch."""
    from mpi_ef.data import loader_context

    facts: Facts = {
        "default": multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
        "mpi_here": _mpi_is_started(),
    }
    context = loader_context()
    began, answers = perf_counter(), context.SimpleQueue()
    process = context.Process(target=_work, args=(answers,), daemon=True)
    process.start()
    process.join(_SECONDS)
    if process.is_alive():
        process.kill()
        return facts | {"problem": f"a worker had not ended after {_SECONDS:.0f} s"}
    if process.exitcode:
        return facts | {"problem": f"a worker ended with status {process.exitcode}"}
    return facts | {"mpi_in_worker": answers.get(), "seconds": perf_counter() - began}


def _work(answers: Any) -> None:
    answers.put(_mpi_is_started())


def _mpi_is_started() -> bool:
    module = sys.modules.get("mpi4py.MPI")
    return bool(module is not None and module.Is_initialized())


def judge(ranks: Ranks) -> Findings:
    """Yield whether workers start."""
    if broken := ranks.which("problem"):
        yield finding("loader", broken)
    elif started := ranks.which("mpi_in_worker"):
        yield finding("loader.mpi", started)
    else:
        unfit = ranks[0]["default"] == "fork" and ranks[0]["mpi_here"]
        remark = "; the default, fork, does not go with MPI" if unfit else ""
        yield finding("loader.ok", seconds=max(one["seconds"] for one in ranks), remark=remark)
