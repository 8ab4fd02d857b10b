"""Ranks on hosts: what is advised, and how long each plan takes then. Rank 0 prints a line of JSON.

    advice.py D RATIO REPEATS
"""

import json
import sys
from time import perf_counter

import numpy as np
from mpi4py import MPI

from mpi_ef import Quantize, TopK, advise
from mpi_ef.collectives.advice import _PLANS


def main() -> None:
    comm = MPI.COMM_WORLD
    d, what, repeats = int(sys.argv[1]), TopK(float(sys.argv[2]), values=Quantize("bf16")), int(sys.argv[3])
    began = perf_counter()
    found = advise(comm, d, what)
    spent = perf_counter() - began
    x, out = np.random.default_rng(comm.rank).standard_normal(d, np.float32), np.zeros(d, np.float32)
    plans = {row.plan: _PLANS[row.plan][1](comm, what, d) for row in found.rows if "dense" not in row.plan}
    seconds = {name: [] for name in plans}
    for repeat in range(repeats + 1):
        for name, plan in plans.items():
            comm.Barrier()
            start = perf_counter()
            plan.exchange(x)
            plan.set_mean(out, again=True)
            took = comm.allreduce(perf_counter() - start, MPI.MAX)
            if repeat:
                seconds[name].append(took)
    if comm.rank == 0:
        times = {name: float(np.median(each)) for name, each in seconds.items()}
        print(json.dumps({"advised": found.plan, "regret": times[found.plan] / min(times.values()), "times": times,
                          "forecast": {row.plan: row.forecast.seconds for row in found.rows},
                          "mbit": 8e-6 * found.survey.cluster.bytes_per_second, "noisy": found.survey.noisy,
                          "asking": spent}))


if __name__ == "__main__":
    main()
