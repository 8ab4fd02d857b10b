"""Blocks, functions and wrong answers for the tests of Berrut's codes."""

from collections import Counter

import numpy as np

from mpi_ef.coded import BerrutCode, Parity, locate
from mpi_ef.errors import WrongAnswersError

FUNCTIONS = {"sigmoid": lambda u: 1 / (1 + np.exp(-u)), "linear": lambda u: 2 * u + 1, "tanh": np.tanh, "cos": np.cos}
CODE = BerrutCode(8, 40)


def blocks_of(rng):
    """Return 8 blocks of 40 numbers, sorted before they are cut."""
    return np.sort(rng.normal(size=320)).reshape(8, 40)


def heard_of(rng, lost, n=40):
    return np.sort(rng.permutation(n)[: n - lost])


def trial(rng, function="sigmoid", *, amp=1.0, wrong=1, lost=0, colluding=0, near=False, together=0.9, low=None, limit=5,
          others=False):
    """Make some of 40 answers wrong, look for them, and say what came out: exact, part, refused or FALSE."""
    f = FUNCTIONS[function]
    answers = f(CODE.encode(blocks_of(rng)))
    trusted = f(CODE.encode(blocks_of(rng))) if others else answers
    heard = heard_of(rng, lost)
    if near:
        start = rng.integers(0, heard.size - 2 * wrong)
        chosen = np.sort(heard[start + rng.choice(2 * wrong, wrong, replace=False)])
    else:
        chosen = np.sort(rng.choice(heard, wrong, replace=False))
    if low is None:
        parity = Parity.learned(trusted, 8, together=together)
    else:
        parity = Parity.of(40, 2 * Parity.of(40, 1.0, low).largest(trusted), low)
    errors = rng.normal(size=(wrong, 40)) * amp * answers.std()
    if colluding:
        alike = min(wrong, colluding)
        errors[:alike] = rng.normal(size=(alike, 1)) * rng.normal(size=(1, 40)) * amp * answers.std()
        errors = errors if near else rng.permutation(errors)
    answers = answers.copy()
    answers[chosen] += errors
    try:
        named = set(locate(answers[heard], heard, parity, limit))
    except WrongAnswersError:
        return "refused"
    right = set(chosen.tolist())
    return "exact" if named == right else "part" if named < right else "FALSE"


def count(trials, seed=0, **case):
    """Return how often what came out of so many trials."""
    rng = np.random.default_rng(seed)
    return Counter(trial(rng, **case) for _ in range(trials))
