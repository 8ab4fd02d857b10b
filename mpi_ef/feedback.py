"""Error feedback: one function per paper algorithm, on explicit state. NumPy only.

A rule turns this rank's vector into a vector that is the same on all ranks, by one compressed exchange. State exists
from construction on, its arrays are named as in the papers and marked *per rank* or *replicated*. Every function
below is one step in the order of operations of its paper. :class:`ErrorFeedback` binds a rule to a plan.

Notation: n ranks, C the compressor, ``c = plan.exchange(v)`` sends C(v); ``c.add_own(a)`` is a += C(v) of this rank,
``c.add_mean(a)`` is a += mean over the ranks. State is always updated with what was sent, never with what was meant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

from mpi_ef.collectives import DenseMean, Plan
from mpi_ef.collectives.agreement import agree
from mpi_ef.compress.compressor import Vector
from mpi_ef.errors import OptionError, ShapeError

__all__ = ["RULES", "ErrorFeedback", "Rule", "State", "econtrol", "ef14", "ef21"]

LEAST_ALPHA = 1e-4  # below it 0.3 * alpha would switch EControl's feedback off for any run of reasonable length


def _array(kind: str) -> Any:
    return field(metadata={"kind": kind})


def _per_rank() -> Any:
    return _array("per rank")


def _replicated() -> Any:
    return _array("replicated")


def _scratch() -> Any:
    return _array("scratch")


@dataclass
class State:
    """Named arrays of a rule, each (d,) and zero at the start. `v` is the vector that is sent, kept between steps only
    to avoid an allocation.
    """  # noqa: D205

    v: Vector = _scratch()

    @classmethod
    def zeros(cls, d: int, dtype: np.dtype[Any], **options: float) -> Self:
        """Return the state before the first step."""
        arrays: dict[str, Any] = {f.name: np.zeros(d, dtype) for f in fields(cls) if "kind" in f.metadata}
        return cls(**(arrays | options))

    def arrays(self, kind: str) -> dict[str, Vector]:
        """Return the arrays marked "per rank" or "replicated", by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("kind") == kind}


# ---------------------------------------------------------------------------------------------------- EF14
@dataclass
class EF14State(State):
    """e_i: what this rank has not sent yet. mean: the last result."""

    e_i: Vector = _per_rank()
    mean: Vector = _scratch()


def ef14(s: EF14State, plan: Plan, u: Vector) -> Vector:
    """Take one step of EF14 and return mean_i Delta_i, to be subtracted from x.

    Seide et al. 2014; Stich, Cordonnier, Jaggi 2018 (arXiv 1809.07599), Algorithm 1; Karimireddy et al. 2019
    (arXiv 1901.09847), Algorithm 2::

        p_i     = e_i + u_i
        Delta_i = C(p_i)
        e_i     = p_i - Delta_i
        x       = x - mean_i Delta_i

    With ``u_i = gamma_t * g_i`` the error is in parameter units, as in the papers, and for every step size schedule
    ``x_T = x_0 - sum_t gamma_t mean_i g_i + mean_i e_i``. With ``u_i = g_i`` and ``x -= gamma_t * result`` the error is
    in gradient units: the same iterates for constant gamma; otherwise old errors are re-weighted by the new gamma.
    """
    np.add(s.e_i, u, out=s.v)
    delta = plan.exchange(s.v)
    s.e_i, s.v = s.v, s.e_i
    delta.add_own(s.e_i, -1.0)
    s.mean.fill(0)
    delta.add_mean(s.mean)
    return s.mean


# ---------------------------------------------------------------------------------------------------- EF21
@dataclass
class EF21State(State):
    """g_i: this rank's gradient estimate, known to all. g: mean of the g_i."""

    g_i: Vector = _per_rank()
    g: Vector = _replicated()


def ef21(s: EF21State, plan: Plan, grad: Vector) -> Vector:
    """Take one step of EF21 and return g, the estimate of the mean gradient.

    Richtarik, Sokolov, Fatkhullin 2021 (arXiv 2106.05203), Algorithm 2; the gradient is taken where the paper takes
    it, at the new x, and the step with the new g follows::

        c_i = C(grad f_i(x) - g_i)
        g_i = g_i + c_i
        g   = g + mean_i c_i
    """
    np.subtract(grad, s.g_i, out=s.v)
    c = plan.exchange(s.v)
    c.add_own(s.g_i)
    c.add_mean(s.g)
    return s.g


# ---------------------------------------------------------------------------------------------------- EControl
@dataclass
class EControlState(State):
    """e_i: error of this rank. h_i: its gradient estimate. h: mean of the h_i. eta: strength of the feedback."""

    e_i: Vector = _per_rank()
    h_i: Vector = _per_rank()
    h: Vector = _replicated()
    eta: float = 0.0


def econtrol(s: EControlState, plan: Plan, grad: Vector) -> Vector:
    """Take one step of EControl and return the new h, the direction of the step.

    Gao, Islamov, Stich 2023 (arXiv 2311.05645), Algorithm 2; e_i uses the old h_i, the step the new h::

        Delta_i = C(eta e_i + grad_i - h_i)
        e_i     = e_i + grad_i - h_i - Delta_i
        h_i     = h_i + Delta_i
        h       = h + mean_i Delta_i
    """
    np.multiply(s.e_i, s.e_i.dtype.type(s.eta), out=s.v)
    s.v += grad
    s.v -= s.h_i
    delta = plan.exchange(s.v)
    s.e_i += grad
    s.e_i -= s.h_i
    delta.add_own(s.e_i, -1.0)
    delta.add_own(s.h_i)
    delta.add_mean(s.h)
    return s.h


@dataclass(frozen=True)
class Rule:
    """A line in the table of rules: the step, its state, and the default of its options for a contraction constant."""

    step: Callable[[Any, Plan, Vector], Vector]
    state: type[State]
    options: Callable[[float], dict[str, float]] = lambda _alpha: {}

    @property
    def name(self) -> str:
        """Name of the algorithm."""
        return self.step.__name__


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(ef14, EF14State),
        Rule(ef21, EF21State),
        Rule(econtrol, EControlState, lambda alpha: {"eta": 0.3 * alpha}),
    )
}


def _options(rule: Rule, alpha: float, given: Mapping[str, float]) -> dict[str, float]:
    """Return the options of `rule`: those given, and defaults for a contraction constant."""
    options = rule.options(alpha)
    if unknown := given.keys() - options.keys():
        known = ", ".join(options) or "none"
        raise OptionError(f"ErrorFeedback: {rule.name} has no option {', '.join(sorted(unknown))}; it has: {known}")
    options |= given
    if not 0.0 <= options.get("eta", 0.0) <= 1.0:
        raise OptionError(f"ErrorFeedback: eta={options['eta']} is not in [0, 1]; try 0.3 * alpha")
    if "eta" in options and "eta" not in given and alpha < LEAST_ALPHA:
        raise OptionError(f"ErrorFeedback: the worst-case constant {alpha:.1e} of this compressor says nothing about a "
                          "good eta; pass one, for example eta=0.1")  # fmt: skip
    return options


class ErrorFeedback:
    """A rule at work: its state on this rank, and the plan through which it speaks. Construction is collective.

    Parameters
    ----------
    rule : {"ef14", "ef21", "econtrol"}
    plan : Plan
        Any plan with any compressor.
    dense_steps : int
        The first steps exchange whole vectors. 1 gives the start with the first gradient: g_i^0 = grad f_i(x^0) for
        EF21, h_i^0 = grad f_i(x^0) for EControl; 0 starts from zero.
    eta : float, optional
        Strength of EControl's feedback, in [0, 1]; 0.3 times the contraction constant of the plan by default, which
        must then be at least 1e-4: the worst case of Sign over a long vector is no guide.

    Attributes
    ----------
    steps : int
        Completed steps.

    Notes
    -----
    A non-finite vector on any rank raises `NonFiniteError` on all of them and leaves every state as it was.
    """

    def __init__(self, rule: str, plan: Plan, *, dense_steps: int = 0, **options: float) -> None:
        self.plan, self.dense_steps, self.steps = plan, dense_steps, 0

        def facts() -> dict[str, object]:
            if rule not in RULES:
                raise OptionError(f"ErrorFeedback: rule={rule!r} is unknown; take one of {', '.join(RULES)}")
            if dense_steps < 0:
                raise OptionError(f"ErrorFeedback: dense_steps={dense_steps} is negative; 0 starts compressed")
            self.rule = RULES[rule]
            self.options = _options(self.rule, plan.alpha, options)
            return {"rule": rule, "dense_steps": dense_steps, "options": self.options}

        agree(plan.comm, "ErrorFeedback", facts, "build it from the same arguments everywhere")
        self.state = self.rule.state.zeros(plan.d, plan.dtype, **self.options)
        self._dense = DenseMean(plan.comm, plan.d, plan.dtype) if dense_steps else None

    def step(self, vector: Vector) -> Vector:
        """Exchange this rank's vector and return the rule's result, the same bits on all ranks. Collective.

        Parameters
        ----------
        vector : (d,) of the plan's dtype, contiguous, this rank's gradient or update, read only

        Returns
        -------
        (d,) array
            Owned by the rule, valid until the next step; read only.

        Raises
        ------
        NonFiniteError
            On all ranks, with all state as before.
        ShapeError, DtypeError
            On a rank whose vector does not fit; all other ranks raise `PeerError`.
        """
        plan = self._current()
        if not (isinstance(vector, np.ndarray) and vector.shape == (plan.d,) and vector.dtype == plan.dtype):
            plan.exchange(vector)  # raises here what is wrong, and PeerError on all other ranks
        result = self.rule.step(self.state, plan, vector)
        self.steps += 1
        result = result.view()
        result.flags.writeable = False
        return result

    def _current(self) -> Plan:
        return self._dense if self._dense is not None and self.steps < self.dense_steps else self.plan

    @property
    def sent_nbytes(self) -> int:
        """Bytes that have left this rank in all steps so far, see :class:`Traffic`."""
        return sum(plan.exchanges * plan.traffic.sent_nbytes for plan in self._plans())

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of this rank in "encode", "communicate" and "decode", over all steps so far."""
        return {phase: sum(plan.seconds[phase] for plan in self._plans()) for phase in self.plan.seconds}

    def _plans(self) -> list[Plan]:
        return [self.plan] if self._dense is None else [self.plan, self._dense]

    # ------------------------------------------------------------------ saving
    def per_rank(self) -> dict[str, Vector]:
        """Return the named arrays that differ between ranks, those of the plan included. Not copies."""
        return self.state.arrays("per rank") | {f"plan.{k}": v for k, v in self.plan.state().items()}

    def replicated(self) -> dict[str, Vector]:
        """Return the named arrays that are equal on all ranks. Not copies."""
        return self.state.arrays("replicated")

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all arrays and counters of this rank. Local."""
        arrays = {name: array.copy() for name, array in (self.per_rank() | self.replicated()).items()}
        counters = {"steps": self.steps, "exchanges": self.plan.exchanges}
        return {**self._identity(), "arrays": arrays, "options": dict(self.options), **counters}

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same where a saved state is loaded."""
        plan = self.plan
        return {"rule": self.rule.name, "plan": type(plan).__name__, "compressor": str(plan.compressor),
                "rank": plan.rank, "size": plan.size}  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on the same rank of a world of the same size. Local; call on all ranks.

        Raises
        ------
        OptionError, ShapeError
            As :meth:`check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(saved)
        for name, array in (self.per_rank() | self.replicated()).items():
            array[:] = saved["arrays"][name]
        self.options = dict(saved["options"])
        for name, option in self.options.items():
            setattr(self.state, name, option)
        self.steps, self.plan.exchanges = saved["steps"], saved["exchanges"]
        if self._dense is not None:
            self._dense.exchanges = min(self.steps, self.dense_steps)

    def check_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raise unless `saved` can be loaded here. Local.

        Raises
        ------
        OptionError
            When it belongs to another rule, plan, compressor, rank or world size.
        ShapeError
            When an array has another shape or dtype.
        """
        for name, value in self._identity().items():
            if saved[name] != value:
                raise OptionError(f"load_state_dict: the saved {name} is {saved[name]}, here it is {value}; load on "
                                  "each rank what that rank saved")  # fmt: skip
        arrays = self.per_rank() | self.replicated()
        for name, array in arrays.items():
            value = saved["arrays"].get(name)
            if value is None or value.shape != array.shape or value.dtype != array.dtype:
                seen = "missing" if value is None else f"{value.shape} {value.dtype}"
                raise ShapeError(f"load_state_dict: {name} is {seen}, here it is {array.shape} {array.dtype}; load into "
                                 "the model, compressor and plan it was saved from")  # fmt: skip
