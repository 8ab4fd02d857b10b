"""What values an option may have, and the one line that says so where it has another."""

import operator
from math import inf, isfinite
from typing import Any

from mpi_ef.errors import OptionError

__all__ = ["is_within", "whole", "within"]


def is_within(value: Any, interval: str) -> bool:
    """Tell whether `value` is a finite number in an interval such as ``"[0, 1)"`` or ``"(0, inf)"``."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    try:
        fits = isfinite(value) and low <= value <= high
    except (TypeError, ValueError):
        return False
    return fits and (value > low or interval[0] == "[") and (value < high or interval[-1] == "]")


def within(subject: str, interval: str, hint: str, **values: Any) -> None:
    """Raise unless options of `subject` are numbers in an interval, of a tuple all.

    Raises
    ------
    OptionError
        ``"TopK: ratio=1.5 is not in (0, 1]; 0.01 keeps one coordinate in a hundred"``
    """
    for name, value in values.items():
        several = isinstance(value, tuple)
        if not all(is_within(entry, interval) for entry in (value if several else (value,))):
            negative = interval == "[0, inf)" and is_within(value, "(-inf, 0)")
            text = "is negative" if negative else f"{'are' if several else 'is'} not in {interval}"
            raise OptionError(f"{subject}: {name}={value!r} {text}; {hint}")


def whole(subject: str, least: int, hint: str, *, most: float = inf, **values: Any) -> int:
    """Raise unless options of `subject` are whole numbers from `least` to `most`; return the last of them.

    Raises
    ------
    OptionError
        ``"LowRank: rank=0 is not a positive integer; 2 is usual"``
    """
    number = least
    for name, value in values.items():
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
        if not least <= number <= most:
            kind = {0: "non-negative", 1: "positive"}[least]
            text = "is negative" if is_within(value, "(-inf, 0)") and not least else f"is not a {kind} integer"
            raise OptionError(
                f"{subject}: {name}={value!r} {text}{'' if most == inf else f' up to {most:.0f}'}; {hint}"
            )
    return number
