"""What a preconditioner can be told."""

from dataclasses import dataclass

from mpi_ef.compress import Identity, Quantize
from mpi_ef.errors import OptionError, briefly
from mpi_ef.ranges import whole, within

from .forms import FORMS

__all__ = ["Options", "check"]


@dataclass(frozen=True)
class Options:
    """What the sides of layers go by."""

    gamma: float
    window: int
    damping: float
    stabilizer: tuple[float, float]


def check(name: str, options: Options, form: object, sides: object, every: int, rescale: object, statistics: object,
          fallback: float | None, fallback_every: int) -> None:
    """Raise `OptionError`, as `name`, where something is out of range. Local."""
    damping, stabilizer = options.damping, options.stabilizer
    if not (isinstance(form, str) and form in FORMS):
        raise OptionError(f"{name}: form={briefly(form)} is unknown; take one of {', '.join(FORMS)}")
    if not (isinstance(sides, str) and sides in ("both", "inputs", "outputs")):
        raise OptionError(f"{name}: sides={briefly(sides)} is unknown; take 'both', 'inputs' or 'outputs'")
    whole(name, 1, "10 is usual", every=every)
    within(name, "(0, 1)", "0.95 is usual", gamma=options.gamma)
    whole(name, 1, "16 is usual", window=options.window)
    # Sums in float32 are not known better than that.
    within(name, "(0, inf)" if form == "eva" else "[1e-06, inf)", "0.03 is usual", damping=damping)
    if not isinstance(rescale, bool):
        raise OptionError(f"{name}: rescale={briefly(rescale)} is neither True nor False; pass one of them")
    if not (isinstance(stabilizer, tuple) and len(stabilizer) == 2):
        raise OptionError(f"{name}: stabilizer={briefly(stabilizer)} is no pair; (2.0, 0.9) is usual")
    within(name, "(0, inf)", "2.0 is usual", **{"stabilizer[0]": stabilizer[0]})
    within(name, "(0, 1]", "0.9 is usual", **{"stabilizer[1]": stabilizer[1]})
    halved = isinstance(statistics, Quantize) and statistics.format == "bf16"
    if not (halved or isinstance(statistics, Identity)):
        raise OptionError(f"{name}: statistics={briefly(statistics)} does not keep means of every size; pass "
                          "Quantize('bf16'), or None")
    if halved and form == "kfac" and damping < 0.01:
        raise OptionError(f"{name}: damping={damping} of matrices that travel in bf16, which are not known better than "
                          "0.01 of their trace; take damping=0.03, or statistics=None")
    if fallback is not None:
        within(name, "(0, 1)", "0.1 is usual", fallback=fallback)
    whole(name, 1, "20 is usual", fallback_every=fallback_every)
