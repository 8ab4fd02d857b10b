"""What wrong clients send: for experiments and tests. Nothing outside of these programs can be asked to attack.

An attack knows what all honest clients send in this step. ``mean`` and ``deviation`` are theirs, entry by entry, the latter
of the population (ddof 0; torch.std takes ddof 1). All wrong clients send the same vector, unless it is noise or their own.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ef.errors import ConfigError, briefly, nearest

__all__ = ["ATTACKS", "FACTORS", "Attack", "Attacker", "attack_named", "attacks_in", "searched"]

Matrix = NDArray[Any]
Damage = Callable[[Matrix], float]  # of a vector that all wrong clients send, (d,)

FACTORS: Mapping[str, tuple[float, ...]] = {  # that are searched
    "alie": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
    "foe": (0.01, 0.03, 0.1, 0.3, 0.6, 1.1, 2.0, 5.0),
}


@dataclass(frozen=True)
class Kind:
    """What an attack sends, whether its wrong clients compute as honest ones do, and its number, where it has one."""

    text: str
    default: float | None = None
    whole: bool = False
    follows: bool = False


ATTACKS: Mapping[str, Kind] = {
    "none": Kind("what an honest client sends", follows=True),
    "sign-flip": Kind("- mean"),
    "ipm": Kind("- NUMBER mean (Xie et al. 2019)", 2.0),
    "foe": Kind("(1 - NUMBER) mean; searched without a number (Fall of Empires, as MoNNA's authors have it)"),
    "alie": Kind("mean + NUMBER deviation; searched without a number (Baruch et al. 2019)"),
    "label-flip": Kind("what an honest client sends that takes label l for L - 1 - l", follows=True),
    "mimic": Kind("what honest client NUMBER sends", 0, whole=True),
    "gauss": Kind("normal numbers of deviation NUMBER", 200.0),
    "huge": Kind("- 1000 mean"),
    "nan": Kind("NaN"),
    "inf": Kind("Inf"),
    "stale": Kind("what it would have sent NUMBER steps ago", 10, whole=True, follows=True),
    "silent": Kind("nothing"),
    "garbage": Kind("random bytes"),
}


@dataclass(frozen=True)
class Attack:
    """An attack by its name, with its number or, where that is searched or there is none, without."""

    name: str
    number: float | None = None

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}({self.number:g})"

    @property
    def follows(self) -> bool:
        """Whether wrong clients compute what honest ones would."""
        return ATTACKS[self.name].follows

    @property
    def searched(self) -> bool:
        """Whether the number is searched."""
        return self.name in FACTORS and self.number is None

    def vector(self, honest: Matrix, number: float) -> Matrix:
        """Return what all wrong clients send, (d,), of what honest clients send, (h, d). Local."""
        if self.name == "mimic":
            return np.array(honest[int(number) % len(honest)])
        if self.name in ("nan", "inf"):
            return np.full(honest.shape[1], {"nan": nan, "inf": inf}[self.name], honest.dtype)
        mean = honest.mean(axis=0, dtype=np.float64)
        made = {"sign-flip": lambda: -mean, "ipm": lambda: -number * mean, "huge": lambda: -1000.0 * mean,
                "foe": lambda: mean - number * mean,
                "alie": lambda: mean + number * honest.std(axis=0, dtype=np.float64)}[self.name]()
        vector: Matrix = made.astype(honest.dtype)
        return vector


def attack_named(text: str) -> Attack:
    """Return the attack that a text names: ``alie``, ``alie(1.5)``.

    Raises
    ------
    ConfigError
        There is none, or its number does not fit.
    """
    found = re.fullmatch(r"\s*([a-z-]+)\s*(?:\(([^()]*)\))?\s*", text)
    name = found[1] if found else text
    if not found or name not in ATTACKS:
        hint = nearest(name, ATTACKS, f"take one of {', '.join(ATTACKS)}")
        raise ConfigError(f"attack: there is no attack {briefly(text.strip())}; {hint}")
    kind, given = ATTACKS[name], found[2]
    if given is None:
        return Attack(name, kind.default)
    if kind.default is None and name not in FACTORS:
        raise ConfigError(f"attack: {briefly(text.strip())}: {name} has no number; take {name}")
    try:
        number = float(given)
    except ValueError:
        number = nan
    if not 0.0 <= number < inf or (kind.whole and number != int(number)):
        what = "a whole number" if kind.whole else "a number"
        raise ConfigError(f"attack: {briefly(text.strip())}: {briefly(given)} is not {what}, 0 or more; take for example "
                          f"{name}({kind.default or 1.5:g})")
    return Attack(name, number)


def attacks_in(text: str) -> list[Attack]:
    """Return the attacks that a text names, which commas separate; see :func:`attack_named`."""
    return list(dict.fromkeys(attack_named(part) for part in text.split(",")))


def searched(attack: Attack, honest: Matrix, damage: Damage) -> Attack:
    """Return the attack with that of its factors that does most damage, of equal ones the first. Collective if `damage` is.

    What has no number, NaN, is as much as can be.
    """
    factors = FACTORS[attack.name]
    done = [damage(attack.vector(honest, factor)) for factor in factors]
    return replace(attack, number=factors[int(np.argmax(np.nan_to_num(done, nan=inf, posinf=inf)))])


class Attacker:
    """f wrong clients that know everything, step after step.

    Parameters
    ----------
    attack : Attack
    f : int
    seed : int
        Of noise and random bytes, which are functions of seed and step.
    every : int
        A factor is searched again after so many steps, and kept until then.

    Attributes
    ----------
    chosen : list of float
        The factors that were found.
    """

    def __init__(self, attack: Attack, f: int, *, seed: int = 0, every: int = 1) -> None:
        self.attack, self.f, self.seed, self.every = attack, f, seed, every
        self.chosen: list[float] = []
        self._past: deque[Matrix] = deque(maxlen=1 + int(attack.number or 0) if attack.name == "stale" else 1)

    def rows(self, honest: Matrix, step: int, damage: Damage, own: Matrix | None = None) -> Matrix:
        """Return what the wrong clients send, (f, d). Collective if `damage` is.

        Parameters
        ----------
        honest : (h, d)
            What honest clients send.
        damage : callable
            ``||A(honest + f copies of a vector) - mean||^2``, for factors that are searched.
        own : (f, d), optional
            What wrong clients would send if they were none; for attacks that follow.
        """
        attack = self.attack
        if attack.follows:
            if own is None:
                raise ValueError(f"{attack}: own= is missing")
            self._past.append(np.array(own))
            return self._past[0]
        if attack.name == "silent":
            return np.zeros((self.f, honest.shape[1]), honest.dtype)
        random = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        if attack.name == "gauss":
            return random.normal(0.0, float(attack.number or 0.0), (self.f, honest.shape[1])).astype(honest.dtype)
        if attack.name == "garbage":
            size = self.f * honest.shape[1] * honest.itemsize
            return np.frombuffer(random.bytes(size), honest.dtype).reshape(self.f, -1).copy()
        if attack.searched:
            if step % self.every == 0 or not self.chosen:
                self.chosen.append(float(searched(attack, honest, damage).number or 0.0))
            number = self.chosen[-1]
        else:
            number = attack.number or 0.0
        return np.tile(attack.vector(honest, number), (self.f, 1))
