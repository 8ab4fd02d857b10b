"""Logistic regression with coded gradients, with workers that sleep, are stopped, go on, or are killed.

``python coded_program.py OPTIONS``; OPTIONS is JSON: code; steps; k, entries that a message names, 0 for whole vectors; lr;
part, seconds that a part of the gradient takes; stopped, [rank, step, step from which it goes on or null], by rank 0's steps;
killed, [rank, step]; sleepers, ranks that sleep at random for `sleep` seconds; patience; status, with which to leave.
Every rank that comes to its end prints one line of JSON.
"""

import json
import os
import signal
import sys
from time import perf_counter, sleep
from zlib import crc32

import numpy as np
from mpi4py.MPI import COMM_WORLD as comm

from mpi_ef.coded import CodedGradients, code_of
from mpi_ef.compress import TopK
from mpi_ef.errors import MpiEfError

options = {"code": "fr:1", "steps": 40, "k": 0, "lr": 0.5, "part": 0.004, "stopped": [None, 0, None], "killed": [None, 0],
           "sleepers": [], "sleep": 0.5, "patience": 30.0, "status": None, "d": 68, "samples": 40, "out": "", "spread": 0.5,
           "seed": 0, "dedicated": False}
options |= json.loads(sys.argv[1])
N, D, SAMPLES = comm.size - options["dedicated"], options["d"], options["samples"]
process = comm.allgather(os.getpid())
(stopped, stop_at, go_at), (killed, kill_at) = options["stopped"], options["killed"]
truth = np.random.default_rng(0).standard_normal(D)
data = [np.random.default_rng((1, part)).standard_normal((SAMPLES, D)) + options["spread"] * part for part in range(N)]
labels = [np.sign(x @ truth + np.random.default_rng((2, part)).standard_normal(SAMPLES)) for part, x in enumerate(data)]
if killed is not None:  # its last word, while all are there
    comm.Barrier()


def gradient(x, part):
    """The sum over samples, of the loss log(1 + exp(-y z)) + 0.01 / 2 x^2 of each."""
    a, y = data[part], labels[part]
    return -a.T @ (y / (1 + np.exp(y * (a @ x)))) + 0.01 * SAMPLES * x


def mean_gradient(x):
    return sum(gradient(x, part) for part in range(N)) / (N * SAMPLES)


def asleep():
    """In which steps this rank sleeps, if it computes them. Gilbert-Elliott: it falls asleep with .05, and wakes with .7."""
    draw, state, states = np.random.default_rng((3, options["seed"], comm.rank)), False, []
    for _ in range(options["steps"]):
        state = draw.random() < (0.3 if state else 0.05)
        states.append(state and comm.rank in options["sleepers"])
    return states


sleeps, computed = asleep(), []


def coded_sum(order):
    if sleeps[order.step]:
        sleep(options["sleep"])
    computed.append(order.step)
    total = np.zeros(D)
    for part, weight in zip(order.parts, order.weights, strict=True):
        total += weight * gradient(order.x, part)
        sleep(options["part"])
        coded.progress()
    return total


def signals(t):
    if stopped is not None and t == stop_at:
        os.kill(process[stopped], signal.SIGSTOP)
    if stopped is not None and go_at is not None and t == go_at:
        os.kill(process[stopped], signal.SIGCONT)
    if killed is not None and t == kill_at:
        os.kill(process[killed], signal.SIGKILL)


compressor = TopK(k=options["k"]) if options["k"] else None
coded = CodedGradients(comm, D, np.float64, code_of(options["code"]), compressor,
                       patience_seconds=options["patience"], dedicated=options["dedicated"])
x, left, seconds, rows = np.zeros(D), (), [], []
if coded.is_server:
    try:
        for t in range(options["steps"]):
            signals(t)
            began = perf_counter()
            order = coded.begin(x)
            if order is not None:
                coded.answer(coded_sum(order))
            x = x - options["lr"] / (N * SAMPLES) * coded.end().vector
            seconds.append(perf_counter() - began)
        coded.decider.server.patience_seconds = min(3.0, options["patience"])
        left = coded.close(x)
    except MpiEfError as error:
        if options["out"]:
            np.save(options["out"], x)
        print(f"caught: {error}; norm^2 {np.sum(mean_gradient(x) ** 2):.1e}", flush=True)
        raise
    rows = [crc32(row) for row in coded.rows]
else:
    for order in coded.orders():
        coded.answer(coded_sum(order))
    x = coded.last[0]
told = {"rank": comm.rank, "x": crc32(x.tobytes()), "computed": len(computed), "h": crc32(coded.h.tobytes()), "rows": rows,
        "norm2": float(np.sum(mean_gradient(x) ** 2)), "left": left, "sent": coded.sent_nbytes}
if coded.is_server:
    told |= {"p50": float(np.median(seconds)), "p95": float(np.quantile(seconds, 0.95)), "late": coded.metrics["late"]}
print(json.dumps(told), flush=True)
if options["status"] is not None:
    coded.leave(options["status"])
