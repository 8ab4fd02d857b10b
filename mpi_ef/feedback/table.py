"""The table of rules. To add one: write its function and its state, and a line here.

When a run goes on with another number of ranks (:meth:`ErrorFeedback.state_tree`), every new rank gets

===================================  ===============================  ================================================
marked as                            gets                             so that stays what it was
===================================  ===============================  ================================================
error: e_i, EF21-BC's g_i            the mean of the old ranks'       mean_i e_i: nothing lost, nothing sent twice
estimate: g_i, h_i                   g or h, and a plan's residual    mean_i g_i = g (+ residual), to the last bit
momentum: m_i, v_i, u_i              the mean of the old ranks'       the mean momentum
replicated, kept: g, h, m, v, all_i  itself                           everything
TwoPhaseMean's residual              its chunk of all residuals       all residuals one after the other
LowRankMean's Q                      itself                           everything
anything of ClientsMean              the vectors of its clients       results, to the last bit
rows of RobustMean                   itself; where ranks are clients  results, to the last bit; else g
                                     g for each
===================================  ===============================  ================================================

A restart (:meth:`ErrorFeedback.forget`) sets errors, estimates, what is replicated and residuals to zero; not momenta,
nor what is kept: m, heavy ball's v, MARINA's g.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any

import numpy as np

from mpi_ef.collectives import Plan
from mpi_ef.compress import Combination, Compressor, Identity, RandK, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, briefly, nearest
from mpi_ef.ranges import is_within
from mpi_ef.registry import specified

from .byzantine import ByzEF21BCState, ByzEF21SGDMState, ByzEF21State, byz_ef21, byz_ef21_bc, byz_ef21_sgdm
from .estimators import CLAGState, DECSGDState, EF21PAGEState, MARINAState, clag, d_ec_sgd, ef21_page, marina
from .federated import EF21BCState, EF21PlusState, EF21PPState, EF21WState, ef21_bc, ef21_plus, ef21_pp, ef21_w
from .momentum import (
    EF14MomentumState,
    EF21HBState,
    EF21SGD2MState,
    EF21SGDMState,
    LionState,
    ef14_momentum,
    ef21_hb,
    ef21_sgd2m,
    ef21_sgdm,
    lion,
)
from .rules import EControlState, EF14State, EF21State, econtrol, ef14, ef21
from .state import State, Steps, average, double_buffer

__all__ = ["RULES", "Rule", "rule_of", "with_momentum"]

Options = dict[str, Any]


Range = tuple[str | Callable[[Any], bool], str, str]  # an interval or a test, what fits in words, and what to try
_RANGES: Mapping[str, Range] = {
    "eta": ("[0, 1]", "in [0, 1]", "try 0.3 * alpha for EControl, 0.1 for momentum"),
    **dict.fromkeys(("beta", "beta1", "beta2"), ("[0, 1)", "in [0, 1)", "0.9 is usual")),
    "decay": ("[0, 1]", "in [0, 1]", "1 keeps all errors, 0.95 is usual where exchanges are seldom"),
    "participation": ("(0, 1]", "in (0, 1]", "0.5 lets half of the clients take part"),
    "seed": (lambda v: isinstance(v, int) and v >= 0, "a non-negative integer", "0 is one"),
    "zeta": ("[0, inf)", "a number >= 0", "1.0 is usual"),
    "correction": (lambda v: isinstance(v, RandK), "a RandK", "its messages must be right in expectation"),
    "reply": (lambda v: isinstance(v, Compressor), "a compressor", "pass for example TopK(0.1)"),
}
_ANYTHING: Range = (lambda _: True, "", "")


@dataclass(frozen=True)
class Rule:
    """A line in the table of rules.

    Attributes
    ----------
    step : callable
        The generator ``step(state, plan, vector, **inputs)``.
    state : type of State
    options : callable
        Defaults of the options for a contraction constant.
    least_alpha : float
        Below this constant the defaults are no guide.
    most_terms : int
        Of how many vectors that of a step may be a combination without being formed beforehand.
    ranges : mapping of str to (str or callable, str, str)
        By the name of an option: an interval such as "[0, 1)", or whether a value fits; what fits, and what to try.
    gathers : bool
        Sparse messages are gathered on any number of ranks unless a plan is named: the rule has a way back of its own, or
        needs an unbiased mean.
    """

    step: Callable[..., Steps]
    state: type[State]
    options: Callable[[float], Options] = lambda _alpha: {}
    least_alpha: float = 0.0
    most_terms: int = 1
    ranges: Mapping[str, Range] = field(default_factory=lambda: _RANGES)
    gathers: bool = False

    def __post_init__(self) -> None:
        self.state.check_marks()
        if not callable(self.options):
            raise OptionError(f"Rule {self.name}: options={briefly(self.options)} is no function; pass lambda alpha: "
                              f"{{...}}")
        options = self.options(1.0)
        if unknown := sorted(options.keys() - {f.name for f in fields(self.state)}):
            raise OptionError(f"Rule {self.name}: {self.state.__name__} has no field {unknown[0]}, which is an option")
        if self.ranges is not _RANGES and (unknown := sorted(self.ranges.keys() - options.keys() - _RANGES.keys())):
            hint = nearest(unknown[0], options, f"it has: {', '.join(options) or 'none'}")
            raise OptionError(f"Rule {self.name}: ranges has {unknown[0]}, which is no option; {hint}")

    @property
    def name(self) -> str:
        """Name of the algorithm."""
        return self.step.__name__.replace("_", "-")

    def check_names(self, given: Iterable[str], subject: str, taker: Callable[..., Any] | None = None) -> None:
        """Raise `OptionError` unless names are of options. Local.

        `taker` passes options on, and takes keywords of its own, of which one may be meant; it has momentum for any rule.
        """
        options, taken = self.options(1.0), signature(taker).parameters.values() if taker else ()
        momentum = {"momentum"} if taker else set()
        if unknown := sorted({*given} - options.keys() - momentum):
            others = {p.name for p in taken if p.kind is p.KEYWORD_ONLY} | momentum
            hint = nearest(unknown[0], (*options, *sorted(others)), f"it has: {', '.join(options) or 'none'}")
            raise OptionError(f"{subject}: {self.name} has no option {', '.join(unknown)}; {hint}")

    def options_for(self, alpha: float, given: Mapping[str, Any]) -> Options:
        """Return the options: those given, and defaults for a contraction constant.

        Raises
        ------
        OptionError
            When an option is unknown or out of its range.
        """
        options = self.options(alpha)
        self.check_names(given, "ErrorFeedback")
        if "eta" in options and "eta" not in given and alpha < self.least_alpha:
            raise OptionError(f"ErrorFeedback: the worst-case constant {alpha:.1e} of this compressor says nothing about a "
                              "good eta; pass one, for example eta=0.1")
        options |= {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        for name, value in options.items():
            fits, text, hint = self.ranges.get(name, _ANYTHING)
            if not (is_within(value, fits) if isinstance(fits, str) else fits(value)):
                raise OptionError(f"ErrorFeedback: {name}={briefly(value)} is not {text}; {hint}")
        return options


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(ef14, EF14State, lambda _: {"decay": 1.0}, most_terms=2),
        Rule(ef21, EF21State, most_terms=2),
        Rule(econtrol, EControlState, lambda alpha: {"eta": 0.3 * alpha}, least_alpha=1e-4),
        Rule(ef14_momentum, EF14MomentumState, lambda _: {"beta": 0.9}),
        Rule(lion, LionState, lambda _: {"beta1": 0.9, "beta2": 0.99}),
        Rule(ef21_sgdm, EF21SGDMState, lambda _: {"eta": 0.1}),
        Rule(ef21_sgd2m, EF21SGD2MState, lambda _: {"eta": 0.1}),
        Rule(ef21_hb, EF21HBState, lambda _: {"eta": 0.5}),
        Rule(ef21_pp, EF21PPState, lambda _: {"participation": 0.5, "seed": 0}),
        Rule(ef21_w, EF21WState, lambda _: {"participation": 1.0, "seed": 0}),
        Rule(ef21_bc, EF21BCState, lambda _: {"reply": Identity()}, gathers=True),
        Rule(ef21_plus, EF21PlusState),
        Rule(ef21_page, EF21PAGEState),
        Rule(marina, MARINAState, gathers=True),
        Rule(clag, CLAGState, lambda _: {"zeta": 1.0}),
        Rule(d_ec_sgd, DECSGDState, lambda _: {"correction": RandK(0.1)}),
        Rule(byz_ef21, ByzEF21State, most_terms=2),
        Rule(byz_ef21_sgdm, ByzEF21SGDMState, lambda _: {"eta": 0.1}),
        Rule(byz_ef21_bc, ByzEF21BCState, lambda _: {"reply": Identity()}),
    )
}


def with_momentum(rule: Rule) -> Rule:
    """Return a rule that exchanges an average of what it is given: ``ErrorFeedback(rule, plan, momentum=0.9)`` uses it.

    As EF21-SGDM is EF21 with momentum (Fatkhullin, Tyurin, Richtarik 2023, arXiv 2305.15155), with any rule::

        v_i = momentum v_i + (1 - momentum) grad_i, the first time grad_i
        result = one step of the rule with v_i in place of grad_i
    """

    @dataclass(kw_only=True)
    class WithMomentum(rule.state):  # type: ignore[name-defined, misc]
        averaged_i: Vector = average()
        averaged_spare: Vector = double_buffer()
        momentum: float = 0.9

    def step(s: Any, plan: Plan, grad: Vector | Combination, **inputs: Any) -> Steps:
        v_i = s.averaged(s.momentum * lazy(s.averaged_i) + (1.0 - s.momentum) * lazy(grad), grad, into=s.averaged_spare)
        result = yield from rule.step(s, plan, v_i, **inputs)
        s.averaged_i, s.averaged_spare = s.averaged_spare, s.averaged_i
        return result

    step.__name__ = f"{rule.step.__name__}_with_momentum"
    within_1: Range = ("[0, 1)", "in [0, 1)", "0.9 is usual")
    return replace(rule, step=step, state=WithMomentum, options=lambda alpha: rule.options(alpha) | {"momentum": 0.9},
                   most_terms=2, ranges={**rule.ranges, "momentum": within_1})


def rule_of(rule: "str | Rule") -> tuple[Rule, Options]:
    """Return a rule and its options: an object of its own, a name, or a specification, ``"econtrol(eta=0.1)"``.

    Raises
    ------
    OptionError
        There is no such rule; the line names the nearest. Or arguments without a name.
    """
    if isinstance(rule, Rule):
        return rule, {}
    if not isinstance(rule, str):
        raise OptionError(f"ErrorFeedback: rule={briefly(rule)} is neither a name nor a Rule; take one of "
                          f"{', '.join(RULES)}")
    try:
        what = specified("rule", rule)
    except OptionError as error:
        raise OptionError(f"ErrorFeedback: {error}") from error
    if what.arguments or not isinstance(what.thing, Rule):
        problem = "its arguments want names" if what.arguments else f"{what.name} is no Rule"
        raise OptionError(f"ErrorFeedback: rule={briefly(rule)}: {problem}, such as econtrol(eta=0.1)")
    return what.thing, what.options
