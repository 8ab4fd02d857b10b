"""What values an option may have, and the one line that says so where it has another."""

import operator
from dataclasses import InitVar, dataclass, field, fields
from math import inf, isfinite
from typing import Any, TypeVar, dataclass_transform

from mpi_ef.errors import OptionError, briefly

__all__ = ["checked", "is_within", "option", "whole", "with_options", "within"]

Class = TypeVar("Class", bound=type)


def is_within(value: Any, interval: str) -> bool:
    """Tell whether `value` is a finite number in an interval such as ``"[0, 1)"`` or ``"(0, inf)"``."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    try:
        fits = isfinite(value) and low <= value <= high
    except (TypeError, ValueError, OverflowError):
        return False
    return fits and (value > low or interval[0] == "[") and (value < high or interval[-1] == "]")


def within(subject: str, interval: str, hint: str, entries: int = 0, /, **values: Any) -> None:
    """Raise unless options of `subject` are numbers in an interval, or tuples of so many `entries` that are.

    Raises
    ------
    OptionError
        ``"TopK: ratio=1.5 is not in (0, 1]; 0.01 keeps one coordinate in a hundred"``
    """
    for name, value in values.items():
        several = isinstance(value, tuple) and len(value) == entries > 0
        if bool(entries) != several or not all(is_within(entry, interval) for entry in (value if several else (value,))):
            negative = interval == "[0, inf)" and is_within(value, "(-inf, 0)")
            plural = f"are not {'' if several else f'{entries} numbers '}in {interval}"
            text = "is negative" if negative else plural if entries else f"is not in {interval}"
            raise OptionError(f"{subject}{': ' * bool(subject)}{name}={briefly(value)} {text}; {hint}")


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
            limit = "" if most == inf else f" up to {most:.0f}"
            raise OptionError(f"{subject}{': ' * bool(subject)}{name}={briefly(value)} {text}{limit}; {hint}")
    return number


def option(default: Any, allowed: str | int, hint: str) -> Any:
    """Return the field of an option, for :func:`with_options`, with what :func:`checked` allows besides a default of None.

    Parameters
    ----------
    default : object
    allowed : str or int
        An interval, as of :func:`within`, which may name other options: ``"(0, {max_coeff}]"``; or the least whole number.
    hint : str
        What to try instead.
    """
    return field(default=default, metadata={"allowed": allowed, "hint": hint})


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def with_options(kind: Class) -> Class:
    """Let the constructor of a class take its fields by name, as that of a dataclass does, and keep but the `InitVar`."""
    dataclass(eq=False, repr=False, match_args=False, kw_only=True)(kind)
    for name, said in kind.__init__.__annotations__.items():  # type: ignore[misc]
        if isinstance(said, InitVar):
            kind.__init__.__annotations__[name] = said.type  # type: ignore[misc]
            if name in vars(kind):
                delattr(kind, name)  # a default is no value of an object that does not keep it
    return kind


def checked(owner: Any, subject: str | None = None) -> dict[str, object]:
    """Return the options that `owner` keeps, by name; raise `OptionError` unless all are allowed. Local.

    The message begins with `subject`, by default the name of the class.
    """
    subject = type(owner).__name__ if subject is None else subject
    values = {f.name: getattr(owner, f.name) for f in fields(owner)}
    for f in fields(owner):
        value, allowed = {f.name: values[f.name]}, f.metadata.get("allowed")
        if allowed is None or values[f.name] is f.default is None:
            continue
        if isinstance(allowed, str):
            entries = len(f.default) if isinstance(f.default, tuple) else 0
            within(subject, allowed.format_map(values), f.metadata["hint"], entries, **value)
        else:
            whole(subject, allowed, f.metadata["hint"], **value)
    return values
