"""The plan that is asked for: by what builds it, by name, or as a specification."""

from collections.abc import Callable
from inspect import isclass
from typing import Any

from numpy.typing import DTypeLike

from mpi_ef import registry
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.errors import OptionError

from .plan import Plan

__all__ = ["PlanBuilder", "build_plan", "check_plan"]

PlanBuilder = str | Callable[[Comm, Compressor, int, Any], Plan]


def check_plan(text: str) -> registry.Specification:
    """Return what a text specifies; raise `OptionError` unless :func:`build_plan` can build it. Local."""
    what = registry.specified("plan", text)
    if isclass(what.thing) and issubclass(what.thing, Plan) and not (what.arguments or what.options):
        return what
    return registry.fitting(what, text, None, None, 0, "float32")


def build_plan(plan: PlanBuilder, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike) -> Plan:
    """Return the plan that was asked for. Collective.

    Parameters
    ----------
    plan : callable or str
        ``plan(comm, compressor, d, dtype)`` builds it, for example a class; or a specification, ``"TwoPhaseMean"``,
        ``"my_plan:TrimmedMean(trim=1)"``, see :mod:`mpi_ef.registry`.
    comm, compressor, d, dtype
        See :class:`Plan`.

    Raises
    ------
    OptionError
        There is no such plan, an option does not fit, or what was built is no plan.
    """
    if isinstance(plan, str):
        what = check_plan(plan)
        plain = isclass(what.thing) and issubclass(what.thing, Plan) and not (what.arguments or what.options)
        built = what.thing.suited(comm, compressor, d, dtype, residual=True) if plain else \
            what.thing(comm, compressor, d, dtype, *what.arguments, **what.options)  # fmt: skip
    elif callable(plan):
        built = plan(comm, compressor, d, dtype)
    else:
        raise OptionError(f"plan={plan!r} builds no plan; pass a class such as TwoPhaseMean, or its name")
    if not isinstance(built, Plan):
        raise OptionError(f"plan={plan!r} has built a {type(built).__name__}, which is no Plan")
    return built
