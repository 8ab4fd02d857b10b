"""Two trainings at once on real ranks, of which one worker is stopped and goes on.

``python many_program.py SCHEME STEPS RANK STOP GO PATIENCE``: by rank 0, RANK is stopped when step STOP of model 0 has been
made, and goes on after step GO, or not where that is negative. Each rank that comes to its end prints a line of JSON.
"""

import json
import os
import signal
import sys
from time import sleep
from zlib import crc32

import numpy as np
from mpi4py.MPI import COMM_WORLD as comm

from mpi_ef.coded import serve_many

scheme, (steps, stopped, stop, go), patience = sys.argv[1], map(int, sys.argv[2:6]), float(sys.argv[6])
D, SAMPLES, MODELS = 40, 24, 2
process, computed = comm.allgather(os.getpid()), set()
data = np.random.default_rng(0).standard_normal((SAMPLES, D))


def sums(x, model, samples, t):
    rows = data[samples.start : samples.stop]
    return rows.T @ (rows @ x - np.cos(t + model + np.arange(samples.start, samples.stop)))


def gradient(x, model, samples, t):
    computed.add((model, t))
    sleep(0.0005 * len(samples))
    return sums(x, model, samples, t)


def step(x, g, model, t):
    if model == 0 and t in (stop, go):
        os.kill(process[stopped], signal.SIGSTOP if t == stop else signal.SIGCONT)
    x -= 0.1 * g


xs = np.zeros((MODELS, D))
served = serve_many(comm, gradient, xs, scheme, samples=SAMPLES, step=step, steps=steps, patience_seconds=patience)
told = {"rank": comm.rank, "x": crc32(served.xs.tobytes()), "computed": len(computed), "missing": served.missing}
if comm.rank == 0:
    expected = np.zeros((MODELS, D))
    for t in range(steps):
        for model in range(MODELS):
            expected[model] -= 0.1 / SAMPLES * sums(expected[model], model, range(SAMPLES), t)
    told |= {"error": float(np.abs(xs / expected - 1).max()), "late": served.metrics["late"]}
print(json.dumps(told), flush=True)
served.leave()
