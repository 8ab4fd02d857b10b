"""How long four trainings take on four real ranks of which three are slow now and then: one after the other, or at once."""

from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.coded import (
    GC,
    MSGC,
    SRSGC,
    CodedGradients,
    FractionalRepetition,
    ManyTrainings,
    Scheme,
    gilbert_elliott,
    simulate,
)
from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.protocol import MpiComm

__all__ = ["Timed", "timed"]

Vector = NDArray[np.float64]

N, MODELS, STEPS, _D, _SAMPLES = 4, 4, 25, 64, 240
_PART = 10e-3  # seconds for 1 / N of the samples of a step
# Seconds that a slow rank takes more; chances that a rank becomes slow, and fast again, by rounds.
SETTINGS = ((0.1, 0.05, 0.5), (0.1, 0.2, 0.5), (0.05, 0.1, 0.9))
_SCHEMES: tuple[Scheme, ...] = (GC(0), GC(1), SRSGC(1, 2, 2), SRSGC(3, 4, 2), MSGC(2, 3, 1))
ONE_BY_ONE = "repetition s=1, one training after the other"
HOW = f"times: on real ranks, {N} or more; mpiexec -n {N} mpi-ef reproduce sequential"


@dataclass
class Timed:
    """Lines, rows of metrics, and seconds by setting and name; on ranks other than 0 without content."""

    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[tuple[tuple[float, float, float], str], float] = field(default_factory=dict)


def timed(comm: MpiComm, steps: int) -> Timed:
    """Take the times where there are enough real ranks, else say how to get them. Collective."""
    size, rank = comm.Get_size(), comm.Get_rank()
    if mpi_of(comm) is None or size < N:
        return Timed([HOW])
    ranks = comm.Split(int(rank < N), rank)
    found = _all(ranks, steps or STEPS) if rank < N else Timed()
    ranks.Free()
    comm.Barrier()
    return found


def _all(comm: Any, steps: int) -> Timed:
    found, expected, rank = Timed(), _alone(steps), comm.Get_rank()
    quiet = np.zeros((1, N))
    _one_by_one(comm, 1, quiet)  # kernels are loaded
    _at_once(comm, GC(0), 1, quiet)
    for setting in SETTINGS:
        slow, enter, leave = setting
        profile = gilbert_elliott(MODELS * steps + N, N, enter, leave, slow, seed=1)
        profile[:, 0] = 0
        runs: list[tuple[str, Scheme, float, Vector]] = [(ONE_BY_ONE, GC(1), *_one_by_one(comm, steps, profile))]
        runs += [(f"at once, {scheme}", scheme, *_at_once(comm, scheme, steps, profile)) for scheme in _SCHEMES]
        if rank:
            continue
        share = f"{enter / (enter + leave):.0%}"
        title = (f"{MODELS} trainings, {MODELS * steps} steps in all, {N} real ranks; a share of 1 / {N} takes "
                 f"{1e3 * _PART:g} ms, ranks 1 to {N - 1} {1e3 * slow:g} ms more in {share} of rounds")
        found.lines += [*([""] if found.lines else []), title,
                        f"{'':48}{'load n':>7}{'seconds':>9}{'simulated':>11}{'error':>10}"]
        for name, scheme, seconds, xs in runs:
            guess = simulate(scheme, profile, part_seconds=_PART, rest_seconds=0.0, jobs=MODELS * steps).seconds
            error = float(np.abs(xs - expected).max() / np.abs(expected).max())
            found.lines.append(f"{name:48}{N * scheme.load(N):7.2f}{seconds:9.2f}{guess:11.2f}{error:10.1e}")
            found.rows.append({"panel": f"real ranks, {1e3 * slow:g} ms more in {share} of rounds", "run": name,
                               "step": MODELS * steps, "seconds": seconds, "simulated_seconds": guess, "error": error})
            found.seconds[setting, name] = seconds
    return found


def sums(x: Vector, model: int, samples: range, t: int) -> Vector:
    """Return a sum of gradients: each sample draws x to a place of its own."""
    places = np.cos(np.outer(np.arange(samples.start, samples.stop) + 7 * model + t, np.arange(1, _D + 1)))
    total: Vector = (x - places).sum(axis=0)
    return total


def _alone(steps: int) -> Vector:
    """Return the models as trainings by themselves make them."""
    xs = np.zeros((MODELS, _D))
    for t in range(steps):
        for model in range(MODELS):
            xs[model] -= 0.3 / _SAMPLES * sums(xs[model], model, range(_SAMPLES), t)
    return xs


def _at_once(comm: Any, scheme: Scheme, steps: int, profile: Vector) -> tuple[float, Vector]:
    """Return the seconds from the first order until all steps are made, and the models."""
    rank, slept = comm.Get_rank(), -1

    def gradient(x: Vector, model: int, samples: range, t: int) -> Vector:
        nonlocal slept
        if many.round != slept:  # once in a round
            slept = many.round
            sleep(profile[slept % len(profile), rank])
        sleep(_PART * N * len(samples) / _SAMPLES)
        return sums(x, model, samples, t)

    many = ManyTrainings(comm, gradient, MODELS, _D, np.float64, scheme, samples=_SAMPLES)
    xs = np.zeros((MODELS, _D))
    comm.Barrier()
    with many:
        if not many.is_server:
            return 0.0, many.work()
        began = perf_counter()
        for model, _, g, _ in many.run(xs, steps):
            xs[model] -= 0.3 * g
        seconds = perf_counter() - began
        many.close(xs)
    return seconds, xs


def _one_by_one(comm: Any, steps: int, profile: Vector) -> tuple[float, Vector]:
    """Do the same with `CodedGradients`, model after model."""
    rank, xs, seconds = comm.Get_rank(), np.zeros((MODELS, _D)), 0.0
    for model in range(MODELS):
        coded = CodedGradients(comm, _D, np.float64, FractionalRepetition(1))

        def total(order: Any, model: int = model) -> Vector:
            first, last = order.parts[0] * _SAMPLES // N, (order.parts[-1] + 1) * _SAMPLES // N
            sleep(profile[(model * steps + order.step) % len(profile), rank] + _PART * len(order.parts))
            return sums(order.x, model, range(first, last), order.step)

        comm.Barrier()
        began = perf_counter()
        with coded:
            if coded.is_server:
                for _ in range(steps):
                    coded.answer(total(coded.begin(xs[model])))
                    xs[model] -= 0.3 / _SAMPLES * coded.end().vector
                seconds += perf_counter() - began
                coded.close(xs[model])
            else:
                for order in coded.orders():
                    coded.answer(total(order))
    return seconds, xs
