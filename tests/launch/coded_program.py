"""Logistic regression with coded gradients, with workers that sleep, are stopped, go on, or are killed.

``python coded_program.py OPTIONS``; OPTIONS is JSON: code; steps; k, entries that an answer names, 0 for whole vectors;
orders, the same of orders; lr;
part, seconds that a part of the gradient takes; stopped, a list of [rank, step, step from which it goes on or null], by
rank 0's steps; killed, a list of [rank, step]; sleepers, ranks that sleep at random for `sleep` seconds; patience; status,
with which to leave; ending: "close", or of a server that leaves without a word, "none", or in a with statement, "exit".
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
from mpi_ef.compress import Identity, TopK
from mpi_ef.errors import MpiEfError

options = {"code": "fr:1", "steps": 40, "k": 0, "orders": 0, "lr": 0.5, "part": 0.004, "stopped": [], "killed": [],
           "sleepers": [], "sleep": 0.5, "patience": 30.0, "status": None, "d": 68, "samples": 40, "out": "", "spread": 0.5,
           "seed": 0, "dedicated": False, "ending": "close"}
options |= json.loads(sys.argv[1])
N, D, SAMPLES = comm.size - options["dedicated"], options["d"], options["samples"]
process = comm.allgather(os.getpid())
truth = np.random.default_rng(0).standard_normal(D)
data = [np.random.default_rng((1, part)).standard_normal((SAMPLES, D)) + options["spread"] * part for part in range(N)]
labels = [np.sign(x @ truth + np.random.default_rng((2, part)).standard_normal(SAMPLES)) for part, x in enumerate(data)]


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
    for rank, stop_at, go_at in options["stopped"]:
        if t in (stop_at, go_at):
            os.kill(process[rank], signal.SIGSTOP if t == stop_at else signal.SIGCONT)
    for rank, kill_at in options["killed"]:
        if t == kill_at:
            os.kill(process[rank], signal.SIGKILL)


compressor, order_compressor = (TopK(k=options[name]) if options[name] else None for name in ("k", "orders"))
coded = CodedGradients(comm, D, np.float64, code_of(options["code"]), compressor, order_compressor=order_compressor,
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
        if options["ending"] == "none":
            sys.exit(0)
        if options["ending"] == "exit":
            with coded:
                sys.exit(3)
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


def undisturbed():
    """Return what one process makes of it, adding up groups as `FractionalRepetition` does."""
    y, code = np.zeros(D), code_of(options["code"])
    follower, w = (order_compressor or Identity()).codec(D, np.float64), y
    wire = np.zeros(follower.nbytes, np.uint8)
    for t in range(options["steps"]):
        if order_compressor is None or not t:
            w = y.copy()
        else:
            follower.encode(y - w, wire, step=t, rank=N)
            follower.add(wire[None], w)
        total = np.zeros(D)
        for first in range(0, N, code.s + 1):
            block = np.zeros(D)
            for part in range(first, first + code.s + 1):
                block += gradient(w, part)
            total += block
        y = y - options["lr"] / (N * SAMPLES) * total
    return y


told = {"rank": comm.rank, "x": crc32(x.tobytes()), "computed": len(computed), "h": crc32(coded.h.tobytes()), "rows": rows,
        "norm2": float(np.sum(mean_gradient(x) ** 2)), "left": left, "sent": coded.sent_nbytes}
if coded.is_server:
    told |= {"p50": float(np.median(seconds)), "p95": float(np.quantile(seconds, 0.95)), "late": coded.metrics["late"],
             "same": bool(x.tobytes() == undisturbed().tobytes())}
print(json.dumps(told), flush=True)
if options["status"] is not None:
    coded.leave(options["status"])
