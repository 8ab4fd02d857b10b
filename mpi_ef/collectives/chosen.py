"""The plan that is asked for: by what builds it, by name, or as a specification."""

from collections.abc import Callable
from functools import partial
from inspect import isclass, signature
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef import registry
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor
from mpi_ef.errors import OptionError, briefly

from .gather import GatherMean
from .plan import Plan
from .two_phase import TwoPhaseMean

__all__ = ["BY_WORD", "PlanBuilder", "build_plan", "plan_for", "plan_named"]

PlanBuilder = str | Callable[[Comm, Compressor, int, Any], Plan]

BY_WORD: dict[str, Callable[..., Plan]] = {}  # words that are no plan's name, and what builds one: "auto"


def plan_for(comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *,
             residual: bool = True, gather: bool = False, device: str = "cpu") -> Plan:
    """Return the plan that suits a compressor, by what its attribute ``plan`` says, and the number of ranks. Collective.

    Sparse messages are gathered on few ranks; where two phases with a larger reply are fewer bytes than n - 1 messages, for
    long vectors from 7 ranks on, they go through two phases, so that neither bytes nor memory of a rank grow with n.
    :class:`DenseMean` for Identity, :class:`LowRankMean` for LowRank, else two phases.

    `residual`: whether the plan keeps something from one exchange to the next, a two-phase plan the error of its second
    phase, a low-rank one the factor it begins with. Without it, or with `gather`, any number of ranks gathers.
    """
    kind, where = Plan.kind_for(comm, compressor), {} if device == "cpu" else {"device": device}
    if kind is GatherMean and residual and not gather and TwoPhaseMean.pays(comm, compressor, d, dtype):
        kind = TwoPhaseMean
    return kind.suited(comm, compressor, d, dtype, residual=residual, **where)


def plan_named(text: str) -> Callable[[Comm, Compressor, int, Any], Plan]:
    """Return what builds the plan that a text specifies. Local.

    Raises
    ------
    OptionError
        There is no such plan, or an option does not fit.
    """
    if text in BY_WORD:
        return BY_WORD[text]
    if text.lower() in BY_WORD:
        raise OptionError(f"there is no plan {briefly(text)}; did you mean {text.lower()}?")
    what = registry.specified("plan", text)
    bare = isclass(what.thing) and issubclass(what.thing, Plan) and not (what.arguments or what.options)
    if bare and what.thing.suited.__qualname__ != Plan.suited.__qualname__:  # which knows what it is built with
        return partial(what.thing.suited, residual=True)
    registry.fitting(what, text, None, None, 0, np.float32)
    if bare:
        return partial(what.thing.suited, residual=True)
    return lambda comm, compressor, d, dtype, **where: what.thing(comm, compressor, d, dtype, *what.arguments,
                                                                  **what.options, **where)


def build_plan(plan: PlanBuilder, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike, device: str = "cpu", *,
               gather: bool = False) -> Plan:
    """Return the plan that was asked for. Collective.

    Parameters
    ----------
    plan : callable or str
        ``plan(comm, compressor, d, dtype)`` builds it, for example a class; or a specification, ``"TwoPhaseMean"``,
        ``"my_plan:TrimmedMean(trim=1)"``, see :mod:`mpi_ef.registry`; or ``"auto"``, the fastest one here, see
        :func:`mpi_ef.advise`. The other arguments are those of :class:`Plan`;
        where vectors are on a device it takes ``device=`` as well.
    gather : bool
        Of :func:`plan_for`, where that is the plan, or may be.

    Raises
    ------
    OptionError
        There is no such plan, an option does not fit, or what was built is no plan.
    """
    if not (isinstance(plan, str) or (issubclass(plan, Plan) if isclass(plan) else callable(plan))):
        raise OptionError(f"plan={briefly(plan)} builds no plan; pass a class such as TwoPhaseMean, or its name")
    build: Callable[..., Any] = plan_named(plan) if isinstance(plan, str) else plan
    where: dict[str, Any] = {} if device == "cpu" else {"device": device}
    if gather and (build is plan_for or build in BY_WORD.values()):
        where["gather"] = True
    try:
        signature(build).bind(comm, compressor, d, dtype, **where)
    except (TypeError, ValueError) as error:  # or it has no signature
        wanted = "plan(comm, compressor, d, dtype, device=...)" if where else "plan(comm, compressor, d, dtype)"
        raise OptionError(f"plan={briefly(plan)}: {error}; pass what {wanted} builds a plan with") from None
    built = build(comm, compressor, d, dtype, **where)
    if not isinstance(built, Plan):
        raise OptionError(f"plan={briefly(plan)} has built a {type(built).__name__}, which is no Plan")
    return built
