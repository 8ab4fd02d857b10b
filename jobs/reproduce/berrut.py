"""Berrut's codes for any function of blocks: BACC and SBACC (Borah and Harshan, arXiv 2507.01330), losses, who is wrong.

All of it is computed on rank 0: the numbers do not depend on how many ranks there are.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.coded import BerrutCode, Parity, locate
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.errors import WrongAnswersError, counted
from mpi_ef.jobs import figures
from mpi_ef.jobs.reproduce.monna import demanded, verdicts
from mpi_ef.jobs.reproduce.outcome import Outcome, ReproduceConfig

__all__ = ["berrut"]

Floats = NDArray[np.float64]
Function = Callable[[Floats], Floats]
FUNCTIONS: Mapping[str, Function] = {
    "linear": lambda u: 2 * u + 1, "sigmoid": lambda u: 1 / (1 + np.exp(-u)), "tanh": np.tanh, "cos": np.cos,
    "relu": lambda u: np.maximum(u, 0)}
CODE = BerrutCode(8, 40)
_DECODED, _LOCATED, _DEMANDED = 60, 20, 100  # trials of a row, and where something is demanded of it
_SMOOTH = ("linear", "sigmoid", "tanh", "cos")
Row = dict[str, Any]


def _blocks(rng: np.random.Generator) -> Floats:
    """Return 8 blocks of 40 numbers, sorted before they are cut."""
    return np.sort(rng.normal(size=320)).reshape(8, 40)


def _heard(rng: np.random.Generator, lost: int) -> NDArray[np.int64]:
    return np.sort(rng.permutation(CODE.evaluations)[: CODE.evaluations - lost])


def _off(values: Floats, right: Floats) -> float:
    return float(np.linalg.norm(values - right) / np.linalg.norm(right))


def _by_index(code: BerrutCode, answers: Floats, heard: NDArray[np.int64]) -> Floats:
    """Decode with signs that alternate over all evaluations, lost ones too, as public code does."""
    made = []
    for point, own in zip(code.points, code.systematic, strict=True):
        if own in heard:
            made.append(answers[int(np.searchsorted(heard, own))])
        else:
            weights = (-1.0) ** heard / (point - code.nodes[heard])
            made.append(weights @ answers / weights.sum())
    return np.array(made)


def _wrapped(text: str) -> list[str]:
    return wrap(text, 80)


def _all_survive() -> tuple[list[Row], list[str]]:
    """Return relative errors without losses, of evaluations none of which is a block, as their number grows."""
    counts = (16, 32, 64, 128)
    rows, lines = list[Row](), [*_wrapped(
        "No answer is lost: the relative error of f(blocks), a mean of 10 draws. A row is a function f, a column a number N "
        "of workers; BACC / SBACC. Decoded by Berrut's formula; no worker has a block as it is."),
        f"{'f':<8}" + "".join(f"{f'N = {n}':>18}" for n in counts)]
    for name in ("linear", "sigmoid", "relu"):
        cells = []
        for n in counts:
            errors = {}
            for kind in ("bacc", "sbacc"):
                code, blocks = BerrutCode(8, n, kind), [_blocks(np.random.default_rng(seed)) for seed in range(10)]
                f = FUNCTIONS[name]
                errors[kind] = float(np.mean([_off(code.decode(f(code.encode(x)), range(n), "berrut").values, f(x))
                                              for x in blocks]))
            rows.append({"table": "no losses", "function": name, "evaluations": n, **errors})
            cells.append(f"{errors['bacc']:.1e} / {errors['sbacc']:.1e}")
        lines.append(f"{name:<8}" + "".join(f"{cell:>18}" for cell in cells))
    return rows, lines


def _losses(trials: int) -> tuple[list[Row], list[str]]:
    """Return mean and largest errors by function, losses and way of decoding, and what of the errors the estimate covers."""
    ways = ("signs by index", "berrut", "least-squares", "auto")
    rows = list[Row]()
    lines = [*_wrapped(
        "Some answers of N = 40 are lost (SBACC): relative errors of f(blocks), the mean and the largest of "
        f"{counted(trials, 'draw')}. A row is a function f and how many answers are lost, a column a way to decode: "
        "Berrut's formula with signs by the number of an evaluation, as public code does; Berrut's formula; least squares; "
        "what decode() chooses. 'above': of that, the share of blocks further off than decode() has estimated."),
             f"{'f, lost':<10}" + "".join(f"{way:>16}" for way in ways) + f"{'above':>6}"]
    for name in _SMOOTH:
        f = FUNCTIONS[name]
        for lost in (2, 4, 8, 12, 16, 24):
            rng, errors, covered = np.random.default_rng(lost), dict[str, list[float]](), list[bool]()
            for _ in range(trials):
                blocks, heard = _blocks(rng), _heard(rng, lost)
                answers, right = f(CODE.encode(blocks))[heard], f(blocks)
                errors.setdefault(ways[0], []).append(_off(_by_index(CODE, answers, heard), right))
                for way in ways[1:]:
                    decoded = CODE.decode(answers, heard, way)
                    errors.setdefault(way, []).append(_off(decoded.values, right))
                missing = decoded.error_estimate > 0
                size = np.linalg.norm(decoded.values, axis=1) * decoded.error_estimate
                covered += (np.linalg.norm(decoded.values - right, axis=1) > size)[missing].tolist()
            seen = {way: (float(np.mean(each)), float(max(each))) for way, each in errors.items()}
            above = float(np.mean(covered)) if covered else 0.0
            rows += [{"table": "losses", "function": name, "lost": lost, "way": way, "mean": mean, "largest": most,
                      "above_estimate": above if way == "auto" else None} for way, (mean, most) in seen.items()]
            lines.append(f"{name:<8}{lost:2}" + "".join(f"{f'{mean:.1e} {most:.1e}':>16}" for mean, most in seen.values())
                         + f"{100 * above:4.0f} %")
    return rows, lines


def _trial(rng: np.random.Generator, f: Function, amplitude: float, wrong: int, lost: int, colluding: bool,
           make: Callable[[Floats], Parity]) -> str:
    """Make some answers wrong, and return what the locator says: exactly these, some of them, refused, or another one."""
    answers = f(CODE.encode(_blocks(rng)))
    parity, heard = make(answers), _heard(rng, lost)
    chosen = rng.choice(heard, wrong, replace=False)
    errors = rng.normal(size=(wrong, 40))
    if colluding:
        errors = rng.normal(size=(wrong, 1)) * rng.normal(size=40)
    answers = answers.copy()
    answers[chosen] += amplitude * answers.std() * errors
    try:
        named = set(locate(answers[heard], heard, parity, 5))
    except WrongAnswersError:
        return "refused"
    right = set(chosen.tolist())
    return "exact" if named == right else "some" if named < right else "honest named"


def _flat(answers: Floats) -> Parity:
    return Parity.of(CODE.evaluations, 2 * Parity.of(CODE.evaluations, 1.0).largest(answers))


PARITIES: Mapping[str, Callable[[Floats], Parity]] = {
    "one number": _flat, "learned": lambda v: Parity.learned(v, 8),
    "together .9": lambda v: Parity.learned(v, 8, together=0.9)}
# Name; what is above a column; how large errors are, how many answers are wrong, how many are lost, whether they collude.
CASES = (("1 wrong", "1", 1.0, 1, 0, False), ("3 wrong", "3", 1.0, 3, 0, False), ("5 wrong", "5", 1.0, 5, 0, False),
         ("5 wrong, 4 lost", "5 lost", 1.0, 5, 4, False), ("3 wrong, errors .1", "3 small", 0.1, 3, 0, False),
         ("2 collude", "2 coll.", 1.0, 2, 0, True), ("3 collude", "3 coll.", 1.0, 3, 0, True))


def _located(trials: int) -> tuple[list[Row], list[str]]:
    """Return how often exactly the wrong workers are named, only some of them, and right ones."""
    rows = list[Row]()
    demands = max(trials, _DEMANDED) if trials == _LOCATED else trials
    more = f" ({demands} of 'together .9' with 5 or 2 coll.)" if demands > trials else ""
    lines = [*_wrapped(
        "Some answers of N = 40 are wrong, and locate() is to name whose (SBACC): "
        f"% of {counted(trials, 'draw')}{more} in which it names exactly those / only some of them / a right one; in the "
        "others it refuses. A row is a function f and what is known of right answers to the same blocks: one number, how "
        "large high coefficients are; learned, how large each is; together .9, also how they go with each other. A column "
        "is how many are wrong, by as much as answers spread; lost: 4 others are lost; small: by a tenth of that; coll.: "
        "all err in one direction."),
             f"{'':<20}" + "".join(f"{head:>8}" for _, head, *_ in CASES)]
    for function in _SMOOTH:
        for parity, make in PARITIES.items():
            cells = []
            for name, _, amplitude, wrong, lost, colluding in CASES:
                rng = np.random.default_rng(wrong)
                several = demands if parity == "together .9" and name in {"5 wrong", "2 collude"} else trials
                found = Counter(_trial(rng, FUNCTIONS[function], amplitude, wrong, lost, colluding, make)
                                for _ in range(several))
                shares = {kind: found[kind] / several for kind in ("exact", "some", "honest named", "refused")}
                rows.append({"table": "locator", "function": function, "parity": parity, "case": name, **shares})
                cells.append("/".join(f"{100 * shares[kind]:.0f}" for kind in ("exact", "some", "honest named")))
            lines.append(f"{function:<8}{parity:<12}" + "".join(f" {cell:>7}" for cell in cells))
    return rows, lines


def _figure(rows: Sequence[Row], key: str, **wanted: Any) -> float:
    (found,) = (row for row in rows if all(row.get(name) == value for name, value in wanted.items()))
    return float(found[key])


def _acceptance(rows: Sequence[Row]) -> list[str]:
    """Return what was demanded, by the design before this was built, and what was measured."""
    def ratio(function: str, lost: int, key: str, way: str, other: str) -> Callable[[], float]:
        one, two = ({"table": "losses", "function": function, "lost": lost, "way": each} for each in (way, other))
        return lambda: _figure(rows, key, **one) / _figure(rows, key, **two)

    def share(function: str, case: str) -> Callable[[], float]:
        return lambda: _figure(rows, "exact", function=function, parity="together .9", case=case)

    return verdicts([
        ("sigmoid, 16 lost, largest error: signs by rank / by index", "<= 0.02",
         ratio("sigmoid", 16, "largest", "berrut", "signs by index")),
        *((f"{name}, 4 lost, largest error: least squares / Berrut", "<= 0.3333",
           ratio(name, 4, "largest", "least-squares", "berrut")) for name in ("linear", "sigmoid")),
        *((f"sigmoid, {lost} lost, mean error: auto / Berrut", "<= 0.2", ratio("sigmoid", lost, "mean", "auto", "berrut"))
          for lost in (2, 4)),
        *((f"{name}, 5 of 40 wrong: named exactly", ">= 0.95", share(name, "5 wrong")) for name in _SMOOTH),
        *((f"{name}, 2 collude: named exactly", ">= 0.9", share(name, "2 collude")) for name in _SMOOTH),
        ("all trials: right ones named", "<= 0",
         lambda: max(row["honest named"] for row in rows if row["table"] == "locator")),
    ])


def _draw(rows: Sequence[Row], path: Path) -> None:
    figure, axes = figures.pyplot().subplots(1, len(_SMOOTH), figsize=(3.6 * len(_SMOOTH), 3.2), layout="constrained")
    for axis, name in zip(axes, _SMOOTH, strict=True):
        seen = [row for row in rows if row["table"] == "losses" and row["function"] == name]
        for way in dict.fromkeys(row["way"] for row in seen):
            points = [(row["lost"], row["mean"]) for row in seen if row["way"] == way]
            axis.plot(*zip(*points, strict=True), marker="o", label=way)
        axis.set(yscale="log", title=name, xlabel="answers lost of 40", ylabel="mean relative error")
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=7)
    figures.save(figure, path)


def berrut(comm: MpiComm, config: ReproduceConfig) -> Outcome:
    """Decode with losses, and locate wrong workers, with Berrut's codes. Local.

    ``--steps`` is the number of trials of a row, and three times that of the locator's.
    """
    if comm.Get_rank() != 0:
        return Outcome([], "", lambda _: None)  # rank 0 writes what comes out
    rows, lines = list[Row](), list[str]()
    located = max(1, config.steps // 3) if config.steps else _LOCATED
    for made, text in (_all_survive(), _losses(config.steps or _DECODED), _located(located)):
        rows += made
        lines += [*text, ""]
    lines += demanded(config.steps, lambda: _acceptance(rows))
    return Outcome(rows, "\n".join(lines), lambda path: _draw(rows, path))
