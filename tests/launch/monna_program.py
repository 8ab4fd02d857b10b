"""MoNNA on the digits, one client per rank, of which one lies and one is stopped: ``python monna_program.py OPTIONS``.

OPTIONS is JSON: rounds, f, and, where there are any: liar, a rank; stopped, a rank, with the rounds from which on it stops,
and from which on rank 0 lets it go on; hidden units. Every rank prints one line of JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
from sklearn.datasets import load_digits

from mpi_ef.collectives import Peers

options = {"rounds": 200, "f": 2, "hidden": 32, "liar": None, "stopped": None, "lie": -1.0, "patience": 240.0}
options |= json.loads(sys.argv[1])
N, F, ROUNDS, HIDDEN, BATCH, LR, BETA = comm.size, options["f"], options["rounds"], options["hidden"], 25, 0.5, 0.9
victim, stop_at, go_at = options["stopped"] or (None, 0, 0)
process = comm.allgather(os.getpid())[0 if victim is None else victim]

pixels, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(labels.size)
x, y = (pixels[order] / 16).astype(np.float32), labels[order]
cut = labels.size * 4 // 5
mine = np.arange(cut)[comm.rank :: N]
draw = np.random.default_rng(comm.rank + 1)


def parts(theta):
    """Weights and biases as views of the vector."""
    sizes = np.cumsum([64 * HIDDEN, HIDDEN, HIDDEN * 10])
    w, b, v, c = np.split(theta, sizes)
    return w.reshape(64, HIDDEN), b, v.reshape(HIDDEN, 10), c


def gradient(theta, x, y):
    w, b, v, c = parts(theta)
    h = np.maximum(x @ w + b, 0)
    z = h @ v + c
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(y.size), y] -= 1
    p /= y.size
    back = (p @ v.T) * (h > 0)
    return np.concatenate([(x.T @ back).ravel(), back.sum(0), (h.T @ p).ravel(), p.sum(0)])


def accuracy(theta):
    w, b, v, c = parts(theta)
    return float(np.mean((np.maximum(x[cut:] @ w + b, 0) @ v + c).argmax(axis=1) == y[cut:]))


def nearest_mean(rows, own, keep):
    """Mean, in the order of ranks, of the rows nearest to a row: itself first, ties to the lowest rank."""
    away = np.square(rows.astype(np.float64) - rows[own]).sum(axis=1)
    away[own] = -1
    return rows[np.sort(np.argsort(away, kind="stable")[:keep])].mean(axis=0)


def is_stopped():
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def let_it_go_on():
    """Tell whether the stopped rank was stopped, and goes on now."""
    if is_stopped():
        os.kill(process, signal.SIGCONT)
        return True
    return False


start = np.random.default_rng(0)
theta = np.concatenate([start.normal(size=64 * HIDDEN) / 8, np.zeros(HIDDEN), start.normal(size=HIDDEN * 10) / HIDDEN**0.5,
                        np.zeros(10)]).astype(np.float32)
momentum, stopped, freed, jumps, took = np.zeros_like(theta), False, victim is None or comm.rank != 0, [], []
with Peers(comm, theta.size, np.float32, wait_for=N - F, patience_seconds=options["patience"]) as peers:
    while peers.round < ROUNDS:
        if comm.rank == victim and not stopped and peers.round >= stop_at:
            stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)
        if not freed and peers.round >= go_at:
            freed = let_it_go_on()
        batch = draw.choice(mine, BATCH)
        momentum = (BETA * momentum + (1 - BETA) * gradient(theta, x[batch], y[batch])).astype(np.float32)
        half = theta - np.float32(LR) * momentum
        began = perf_counter()
        lies = comm.rank == options["liar"]
        heard = peers.exchange(half * np.float32(options["lie"]) if lies else half)
        if lies:
            heard.rows[heard.own] = half
        took.append(perf_counter() - began)
        if heard.jumped:
            theta, jumps = np.median(heard.rows, axis=0).astype(np.float32), [*jumps, heard.round]
            momentum[:] = 0
        else:
            theta = nearest_mean(heard.rows, heard.own, N - 2 * F).astype(np.float32)
    while not freed:
        peers.progress()
        sleep(0.01)
        freed = let_it_go_on()
without = slice(stop_at + 5, go_at)  # rounds while it was stopped, and has been cut off
told = {"rank": comm.rank, "accuracy": accuracy(theta), "jumped_to": jumps, "ms": 1e3 * float(np.median(took)),
        "ms_without": 1e3 * float(np.median(took[without] or [0])), "seconds": sum(took), **peers.metrics}
print(json.dumps(told), flush=True)
