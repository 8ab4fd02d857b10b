"""Gradient coding (Tandon et al. 2017), and coded gradients with error feedback, where workers are late or die.

What is counted here is of virtual ranks, with a clock of their own, and the same on any number of real ones; what is timed,
see stragglers.py, is of real ranks, four or more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, islice
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.coded import CodedGradients, Cyclic, FractionalRepetition, GradientCode, Order
from mpi_ef.coded.codes import mask_of
from mpi_ef.comm.consensus import agree
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.compress import TopK
from mpi_ef.errors import DataError
from mpi_ef.feedback.theory import step_size
from mpi_ef.jobs.reproduce import figures, stragglers
from mpi_ef.jobs.reproduce.experiments import carriers, data_file
from mpi_ef.jobs.reproduce.libsvm import content_of, load_libsvm, split_rows
from mpi_ef.jobs.reproduce.monna import demanded, verdicts
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig
from mpi_ef.jobs.reproduce.problems import LogisticRegression, Vector, smoothness
from mpi_ef.jobs.reproduce.simulate import Curve
from mpi_ef.testing import virtual

__all__ = ["gradient_coding"]

N, K, DEAD, DIES_AT, LATE, FACTOR, STEPS = 6, 5, 2, 10, 0.2, 4.0, 700
_EVERY = 20  # steps between measurements
_COMPUTING, _LATER, _SILENT = 1e-4, 3e-3, 5e-3  # seconds of the virtual ranks' clock
_SIZES = ((6, 1), (5, 2), (6, 3), (9, 2), (10, 3), (12, 3), (16, 5), (15, 4), (24, 5), (32, 7))
_RANDOM, _SETS = 8, 4000  # random codes, and sets of workers that are looked at of each
_DECODED: tuple[tuple[GradientCode, int], ...] = (
    (FractionalRepetition(1), 6), (FractionalRepetition(2), 6), (FractionalRepetition(3), 12), (Cyclic(1), 6),
    (Cyclic(2), 5), (Cyclic(3), 6), (Cyclic(3), 10), (Cyclic(3), 12))
_LOSSES = 40  # sets of lost workers of each of these, or all
Matrix = NDArray[np.float64]
Lines = list[str]


def gradient_coding(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Compare codes by what they do to rounding, sums, and runs with late and dead workers. Collective."""
    a, labels, content = _data(comm, config)
    setting = _Setting.of(comm, a, labels, config.steps or STEPS)
    work: list[Callable[[], Any]] = [partial(_amplified, n, s) for n, s in _SIZES]
    work += [partial(_decoded, code, n, a, labels) for code, n in _DECODED]
    work += [partial(setting.train, run) for run in RUNS]
    done = _dealt_out(comm, work)
    codes, sums, runs = (done[i:j] for i, j in ((0, len(_SIZES)), (len(_SIZES), -len(RUNS)), (-len(RUNS), None)))
    timed = stragglers.timed(comm, config.steps)
    lines = [*_of_codes(codes), "", *_of_sums(sums), "", f"data: {content}", *_of_runs(runs), "", *timed.lines, "",
             *demanded(config.steps, lambda: _acceptance(codes, sums, runs, timed.figures))]
    panels: dict[str, dict[str, Curve]] = {"a worker dies": {}, "workers are late": {}}
    for run, found in zip(RUNS, runs, strict=True):
        panels["workers are late" if run.late else "a worker dies"][run.name] = found["curve"]
    rows = [{"panel": panel, "run": name, **row} for panel, curves in panels.items()
            for name, curve in curves.items() for row in curve.rows()]
    rows += [{"panel": "amplification", "n": n, "s": s, **found} for (n, s), found in zip(_SIZES, codes, strict=True)]
    rows += [{"panel": "sums", "n": n, "code": str(code), **found} for (code, n), found in zip(_DECODED, sums, strict=True)]
    return Outcome(rows + timed.rows, "\n".join(lines), lambda path: figures.against("steps")(panels, path),
                   {"phishing": content})


def _dealt_out(comm: MpiComm, work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return what all of this comes to; each rank does a part. Collective."""
    size, rank = comm.Get_size(), comm.Get_rank()
    mine = {i: do() for i, do in enumerate(work) if i % size == rank}
    found = {i: value for part in comm.allgather(mine) for i, value in part.items()}
    return [found[i] for i in range(len(work))]


# ------------------------------------------------------------------ codes


def _random_code(n: int, s: int, seed: int) -> Matrix:
    """Return B, (n, n), by Tandon et al.: rows in the null space of a random H, (s, n), whose rows sum to zero."""
    h = np.random.default_rng(seed).standard_normal((s, n))
    h[:, -1] = -h[:, :-1].sum(axis=1)
    b = np.zeros((n, n))
    for i in range(n):
        others = [(i + k) % n for k in range(1, s + 1)]
        b[i, i], b[i, others] = 1.0, -np.linalg.solve(h[:, others], h[:, i])
    return b


def _lost(n: int, s: int, most: int) -> list[tuple[int, ...]]:
    """Return sets of s workers of n: all, or `most` of them, evenly spaced."""
    return list(islice(combinations(range(n), s), 0, None, -(-comb(n, s) // most)))


def _amplified(n: int, s: int) -> dict[str, float]:
    """Return the largest |a_i| with random codes and with `Cyclic`, and how far a B_F is from ones."""
    lost = _lost(n, s, _SETS)
    there = np.array([[i for i in range(n) if i not in gone] for gone in lost])
    worst = []
    for seed in range(_RANDOM):
        q, r = np.linalg.qr(_random_code(n, s, seed)[there].transpose(0, 2, 1))
        a = np.linalg.solve(r, q.sum(axis=1)[..., None])
        worst.append(float(np.abs(a).max()))
    code = Cyclic(s)
    b = code.matrix(n)
    away = max(float(np.abs(code.decode(mask_of(them.tolist()), n) @ b - 1).max()) for them in there)
    return {"seed 0": worst[0], "median": float(np.median(worst)), "best": min(worst), "cyclic": code.amplification(n),
            "away": away}


def _of_codes(found: Sequence[dict[str, float]]) -> Lines:
    lines = [f"largest |a_i| when s workers are missing, of at most {_SETS} sets; random: {_RANDOM} codes of Tandon et al.",
             f"{'n, s':8}{'seed 0':>10}{'median':>10}{'best':>10}{'Cyclic':>10}{'repetition':>12}{'|a B_F - 1|':>14}"]
    for (n, s), of in zip(_SIZES, found, strict=True):
        row = "".join(f"{of[name]:10.3g}" for name in ("seed 0", "median", "best", "cyclic"))
        lines.append(f"{f'{n}, {s}':8}{row}{'1' if n % (s + 1) == 0 else '-':>12}{of['away']:14.0e}")
    return lines


# ------------------------------------------------------------------ sums


class Gradients:
    """Gradients of parts, which are computed once in a step, though several virtual ranks ask for them."""

    def __init__(self, parts: Sequence[LogisticRegression]) -> None:
        self.parts = parts
        self._known: dict[tuple[int, int], tuple[Vector, Vector]] = {}

    def of(self, step: int, x: Vector, part: int) -> Vector:
        """Return that of a part."""
        where, gradient = self._known.get((step, part), (None, None))
        if where is None or gradient is None or not np.array_equal(where, x):
            gradient = self.parts[part].gradients(x)[0]
            self._known[step, part] = x.copy(), gradient
            self._known.pop((step - 50, part), None)
        return gradient

    def coded(self, order: Order) -> Vector:
        """Return what a worker is asked for."""
        total = np.zeros(order.x.size)
        for part, weight in zip(order.parts, order.weights, strict=True):
            total += weight * self.of(order.step, order.x, part)
        return total


def _decoded(code: GradientCode, n: int, a: Matrix, labels: Vector) -> dict[str, Any]:
    """Decode the gradient at one place for one set of s lost workers after the other; compare with the full one."""
    x = np.random.default_rng(0).standard_normal((a.shape[1],))
    gradients = Gradients([LogisticRegression([(a[rows], labels[rows])]) for rows in split_rows(labels.size, n)])
    full: Vector = np.add.reduce([gradients.of(0, x, part) for part in range(n)])
    lost = _lost(n, code.s, _LOSSES)

    def program(comm: Any) -> Any:
        coded, found = CodedGradients(comm, x.size, x.dtype, code, dedicated=True), []
        with coded:
            if coded.is_server:
                for gone in lost:
                    coded.begin(x)
                    decoded = coded.end()
                    if set(decoded.heard) & set(gone):
                        raise AssertionError(f"{code}: workers {decoded.heard} were heard; {gone} were to be late")
                    found.append(decoded.vector.copy())
                    comm.pause(2 * _LATER)
                    coded.progress()
            else:
                for order in coded.orders():
                    vector = gradients.coded(order)
                    comm.pause(_LATER if coded.worker in lost[order.step] else _COMPUTING)
                    coded.answer(vector)
        return found

    vectors = virtual.results(n + 1, program, virtual=True)[0]
    relative = max(float(np.linalg.norm(vector - full) / np.linalg.norm(full)) for vector in vectors)
    return {"sets": len(lost), "relative": relative, "different": len({vector.tobytes() for vector in vectors})}


def _of_sums(found: Sequence[dict[str, Any]]) -> Lines:
    lines = ["the decoded gradient against the full one, over sets of s workers that are late",
             f"{'code':28}{'n':>4}{'sets':>6}{'relative error':>17}{'different bits':>17}"]
    for (code, n), of in zip(_DECODED, found, strict=True):
        lines.append(f"{code!s:28}{n:4}{of['sets']:6}{of['relative']:17.1e}{of['different']:17}")
    return lines


# ------------------------------------------------------------------ training


@dataclass(frozen=True)
class Run:
    """Which code, and what becomes of workers: one that dies at step 10, or all late at random; `kept` is of no code."""

    name: str
    code: GradientCode
    dies: bool = True
    late: bool = False
    kept: bool = False
    follows: bool = False  # orders are compressed as well


_CODES = {"repetition, s=1": FractionalRepetition(1), "repetition, s=2": FractionalRepetition(2), "Cyclic, s=1": Cyclic(1),
          "Cyclic, s=3": Cyclic(3)}
ALL, DROPPED, KEPT = "EF21, all answer", "EF21, the dead one dropped", "EF21, the dead one's estimate kept"
BOTH_WAYS = "repetition, s=1, orders too"
RUNS = (Run(ALL, FractionalRepetition(0), dies=False), Run(DROPPED, FractionalRepetition(0)),
        Run(KEPT, FractionalRepetition(0), kept=True), *(Run(name, code) for name, code in _CODES.items()),
        *(Run(name, code, dies=False, late=True) for name, code in _CODES.items()),
        *(Run(BOTH_WAYS, FractionalRepetition(1), dies=not late, late=late, follows=True) for late in (False, True)))


@dataclass(frozen=True)
class _Setting:
    """Logistic regression whose clients differ: rows are sorted by label."""

    parts: Sequence[LogisticRegression]
    gamma: float
    x0: Vector
    steps: int

    @classmethod
    def of(cls, comm: MpiComm, a: Matrix, labels: Vector, steps: int) -> "_Setting":
        """Return it, of rows in any order. Collective."""
        order = np.argsort(labels, kind="stable")
        parts = [LogisticRegression([(a[order[rows]], labels[order[rows]])]) for rows in split_rows(labels.size, N)]
        alone, every = carriers(comm, 1), replace(parts[0], parts=[part.parts[0] for part in parts])
        gamma = FACTOR * step_size("ef21", smoothness(alone, every, N), TopK(k=K).alpha(every.d))
        return cls(parts, gamma, np.random.RandomState(0).normal(size=every.d), steps)

    def train(self, run: Run) -> dict[str, Any]:
        """Do a run; return its curve, how many answers were late, and bytes of an answer as a share of a dense one's."""
        s, over = run.code.s, list[bool]()
        late, gradients = _late(self.steps, s if run.late else 0), Gradients(self.parts)
        bits = 8.0 * TopK(k=K).wire_nbytes(self.x0.size, np.float64)

        def measured(x: Vector, step: int, curve: Curve) -> None:
            if step % _EVERY == 0 or step == self.steps:
                full = np.add.reduce([gradients.of(step, x, part) for part in range(N)]) / N
                curve.append(step, float(full @ full), step * bits, 32.0 * K * step)

        def program(comm: Any) -> Any:
            uncoded = run.dies and not s
            coded = CodedGradients(comm, self.x0.size, np.float64, run.code, TopK(k=K), dedicated=True,
                                   order_compressor=TopK(k=K) if run.follows else None,
                                   patience_seconds=_SILENT if uncoded else 1e3,
                                   on_silence="approximate" if uncoded else "raise")
            with coded:
                if not coded.is_server:
                    answers = dense = 0
                    for order in coded.orders():
                        vector, answers = gradients.coded(order), answers + 1
                        comm.pause(_LATER if late[order.step, coded.worker] else _COMPUTING)
                        while run.dies and coded.worker == DEAD and order.step >= DIES_AT and not over:
                            comm.pause(_SILENT)
                        coded.answer(vector)
                        dense = coded.sent_nbytes if answers == 1 else dense  # the first one
                    return coded.h, coded.sent_nbytes, answers, dense
                x: Vector = self.x0.copy()
                curve = Curve()
                for step in range(self.steps):
                    measured(x, step, curve)
                    coded.begin(x)
                    g = coded.end().vector
                    x = x - self.gamma / N * (coded.rows.sum(axis=0) if run.kept else g)
                measured(x, self.steps, curve)
                over.append(True)
                coded.decider.server.patience_seconds = 1e3
                sent = coded.sent_nbytes
                coded.close(x)
                return curve, coded.metrics["late"], coded.rows, sent

        (curve, late_ones, rows, sent), *workers = virtual.results(N + 1, program, virtual=True)
        nbytes, answers = (sum(worker[i] for worker in workers) for i in (1, 2))
        head = workers[0][3] - 8 * self.x0.size
        return {"curve": curve, "late": late_ones, "nbytes": nbytes / answers, "order": sent / answers,
                "bare": (nbytes / answers - head) / (workers[0][3] - head), "dense": workers[0][3],
                "same": all(row.tobytes() == h.tobytes() for row, (h, *_) in zip(rows, workers, strict=True))}


def _late(steps: int, most: int) -> NDArray[np.bool_]:
    """Return which workers are late in which steps, at most so many at a time, (steps, N)."""
    rng = np.random.default_rng(1)
    late = rng.random((steps, N)) < LATE
    for row in late:
        them = rng.permutation(np.flatnonzero(row))
        row[them[most:]] = False
    return late


def _of_runs(runs: Sequence[dict[str, Any]]) -> Lines:
    lines = [f"||grad f||^2 at the end; {N} workers, rows sorted by label, Top-{K}, {FACTOR:g} times theory's step size",
             f"{'':36}{f'worker {DEAD} dies':>16}{f'late with {LATE:g}':>16}{'late':>8}{'bytes: answer':>15}{'order':>8}"]
    of = {(run.name, run.late): found for run, found in zip(RUNS, runs, strict=True)}
    for run in RUNS:
        if not run.late:
            ends = [f"{of[run.name, late]['curve'].squared_norms[-1]:.1e}" if (run.name, late) in of else "-"
                    for late in (False, True)]
            last = of.get((run.name, True), of[run.name, False])
            lines.append(f"{run.name:36}{ends[0]:>16}{ends[1]:>16}{last['late']:8}{last['nbytes']:15.1f}{last['order']:8.1f}")
    return lines


def _data(comm: MpiComm, config: ReproduceConfig) -> tuple[Matrix, Vector, str]:
    """Return phishing, or made data where no folder is given and there is none, and what they are. Collective."""
    found: list[tuple[Matrix, Vector, str]] = []

    def facts() -> dict[str, object]:
        try:
            a, labels = load_libsvm(data_file(config.folder, "phishing"))
            found.append((a, labels, f"phishing, {content_of(a, labels)}"))
        except DataError:
            if config.data is not None:
                raise
            rng = np.random.default_rng(0)
            a = rng.choice([0.0, 0.5, 1.0], (2000, 68))
            labels = np.sign(a @ rng.standard_normal(68) + rng.standard_normal(2000))
            found.append((a, labels, f"made, no phishing in {config.folder}: {content_of(a, labels)}"))
        return {"the content of phishing": found[0][2]}

    agree(comm, "reproduce", facts, "give all ranks the same files")
    return found[0]


def _acceptance(codes: Sequence[dict[str, float]], sums: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]],
                timed: dict[str, float]) -> Lines:
    """Return what was demanded, by the design of these codes before they were built, and what was measured."""
    ends = {(run.name, run.late): found["curve"].squared_norms[-1] for run, found in zip(RUNS, runs, strict=True)}
    at = {run.name: [end for (name, _), end in ends.items() if name == run.name] for run in RUNS}
    kinds = [[of for (code, _), of in zip(_DECODED, sums, strict=True) if isinstance(code, kind)]
             for kind in (FractionalRepetition, Cyclic)]
    ten = codes[_SIZES.index((10, 3))]
    return verdicts([
        ("a step with one of the ranks stopped / without, repetition s=1", "<= 1.5", lambda: timed["stopped"]),
        ("uncoded, one of the ranks stopped: seconds until that is an error", "<= 4", lambda: timed["raised"]),
        ("decoded gradient, repetition: relative error", "<= 1e-12", lambda: max(one["relative"] for one in kinds[0])),
        ("decoded gradient, Cyclic: relative error", "<= 1e-12", lambda: max(one["relative"] for one in kinds[1])),
        ("decoded gradient, repetition: different bits", "<= 1", lambda: max(one["different"] for one in kinds[0])),
        *((f"||grad f||^2: {name}, a worker dead or late", "<= 1e-20", partial(max, at[name]))
          for name in (*_CODES, BOTH_WAYS)),
        *((f"||grad f||^2: {name}", ">= 1e-4", partial(max, at[name])) for name in (DROPPED, KEPT)),
        ("bytes of an answer / of a dense one", "<= 0.125", lambda: max(one["nbytes"] / one["dense"] for one in runs)),
        ("bytes of an order / of a whole one, where orders are compressed", "<= 0.15",
         lambda: max(one["order"] / one["dense"] for run, one in zip(RUNS, runs, strict=True) if run.follows)),
        ("the same of vectors alone, without the heads of messages", "<= 0.125", lambda: max(one["bare"] for one in runs)),
        ("runs at whose end a row is not what its worker has told", "<= 0", lambda: sum(not one["same"] for one in runs)),
        ("largest |a_i| at n = 10, s = 3: Cyclic / median of random", "<= 0.05", lambda: ten["cyclic"] / ten["median"]),
        ("p95 of a step where ranks sleep: repetition s=1 / uncoded", "<= 0.5", lambda: timed["p95"]),
    ])
