"""Ranks on hosts: how long exchanges take, and what crosses a host's link. Rank 0 prints one line of JSON.

    exchanges.py D RATIO REPEATS METHOD...

A repeat begins with a barrier, and its time is that of the slowest rank. Methods take turns: all see the same machine.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI

from mpi_ef import DenseMean, GatherMean, Quantize, Sign, TopK, TwoPhaseMean
from mpi_ef.collectives import NodeMean
from mpi_ef.compress import Identity

COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")


def built(name: str, comm: MPI.Intracomm, d: int, ratio: float) -> Callable[[np.ndarray], None]:
    """Return what exchanges a vector by that method."""
    what, out = TopK(ratio, values=Quantize("bf16")), np.zeros(d, np.float32)
    if name == "MPI_Allreduce":
        return lambda x: comm.Allreduce(x, out)
    plans = {
        "dense": lambda: DenseMean(comm, d),
        "gather": lambda: GatherMean(comm, what, d),
        "two-phase": lambda: TwoPhaseMean(comm, what, d),
        "two-phase, reply k": lambda: TwoPhaseMean(comm, what, d, reply=what),
        "sign": lambda: TwoPhaseMean(comm, Sign(block=4096), d),
        "node gather": lambda: NodeMean(comm, what, d, inner=GatherMean),
        "node two-phase": lambda: NodeMean(comm, what, d, inner=TwoPhaseMean),
        "node two-phase, reply k": lambda: NodeMean(
            comm, what, d, inner=lambda *of, **more: TwoPhaseMean(*of, **more, reply=what)),
        "node dense": lambda: NodeMean(comm, Identity(), d),
    }
    plan = plans[name]()

    def exchange(x: np.ndarray) -> None:
        plan.exchange(x)
        plan.set_mean(out, again=True)

    return exchange


def main() -> None:
    comm = MPI.COMM_WORLD
    d, ratio, repeats, names = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    x = np.random.default_rng(comm.rank).standard_normal(d, np.float32)
    methods = {name: built(name, comm, d, ratio) for name in names}
    seconds, nbytes = {name: [] for name in names}, {name: [] for name in names}
    for repeat in range(repeats + 1):  # the first compiles, and fills buffers
        for name, exchange in methods.items():
            comm.Barrier()
            before = int(COUNTER.read_text())
            comm.Barrier()
            began = perf_counter()
            exchange(x)
            spent = perf_counter() - began
            comm.Barrier()
            sent = int(COUNTER.read_text()) - before if node.rank == 0 else 0
            spent, sent = comm.allreduce(spent, MPI.MAX), comm.allreduce(sent, MPI.MAX)
            if repeat:
                seconds[name].append(spent)
                nbytes[name].append(sent)
    if comm.rank == 0:
        print(json.dumps({name: {"ms": 1e3 * median(seconds[name]), "link": median(nbytes[name])} for name in names}))


if __name__ == "__main__":
    main()
