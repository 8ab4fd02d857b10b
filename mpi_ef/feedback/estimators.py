"""Rules that take more than a gradient, send more than one message, or not in every step."""

from dataclasses import dataclass, field

from mpi_ef.collectives import Plan, TwoPhaseMean
from mpi_ef.compress import Compressor, Identity, Keep, RandK, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, briefly

from .federated import _clients, on_host, squares
from .rules import EF21State
from .state import State, Steps, double_buffer, error, estimate, momentum, persistent, replicated, scratch

__all__ = ["CLAGState", "DECSGDState", "EF21PAGEState", "MARINAState", "clag", "d_ec_sgd", "ef21_page", "marina"]


@dataclass(kw_only=True)
class EF21PAGEState(EF21State):
    """v_i: this rank's PAGE estimate of its gradient."""

    v_i: Vector = momentum()
    spare: Vector = double_buffer()


def ef21_page(s: EF21PAGEState, plan: Plan, change: Vector, *, full: bool = False) -> Steps:
    """Take one step of EF21-PAGE and return g.

    Fatkhullin et al. 2021 (EF21 with Bells & Whistles, arXiv 2110.03294). `change` is ``grad_i(x) - grad_i(x_before)`` over
    one minibatch, or with `full`, which all ranks draw together with probability p, the whole gradient at x::

        v_i = grad_i(x) if full else v_i + change
        c_i = C(v_i - g_i)
        g_i = g_i + c_i
        g   = g + mean_i c_i
    """
    v_i = lazy(change) + (0.0 if full else 1.0) * lazy(s.v_i)
    c = yield plan.offer(v_i - s.g_i, keep=Keep(v_i, into=s.spare))
    s.v_i, s.spare = s.spare, s.v_i
    return s.follow(c)


@dataclass(kw_only=True)
class MARINAState(State):
    """g: estimate of the mean gradient."""

    g: Vector = persistent()


def marina(s: MARINAState, plan: Plan, change: Vector) -> Steps:
    """Take one step of MARINA and return g.

    Gorbunov, Burlachenko, Li, Richtarik 2021 (MARINA, arXiv 2102.07845). `change` is ``grad_i(x) - grad_i(x_before)``; in a
    step with ``whole=True``, which all ranks draw together with probability p, it is the gradient at x. Q is the unbiased
    RandK: the d / k-fold of what is sent::

        g = mean_i grad_i(x) if whole else g + mean_i Q(grad_i(x) - grad_i(x_before))
    """
    if isinstance(plan.compressor, Identity):
        whole = yield plan.offer(change)
        whole.set_mean(s.g)
        return s.g
    if not isinstance(plan.compressor, RandK):
        raise OptionError(f"marina: {briefly(plan.compressor)} is not unbiased; take RandK")
    if isinstance(plan, TwoPhaseMean) and not isinstance(plan.reply, Identity):
        raise OptionError(f"marina: reply={briefly(plan.reply)} of the TwoPhaseMean is not unbiased; take GatherMean, or "
                          "reply=Identity()")
    factor = plan.d / plan.compressor.count(plan.d)
    q = yield plan.offer(change)
    q.add_mean(s.g, factor)
    return s.g


@dataclass(kw_only=True)
class CLAGState(EF21State):
    """y_i: the gradient before. zeta: a client is silent while its estimate is that much worse than a step old gradient."""

    y_i: Vector = error()  # moves with its client
    zeta: float = 1.0


def clag(s: CLAGState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of CLAG, with the identity compressor LAG, and return g.

    Richtarik et al. 2022 (3PC, arXiv 2202.00998)::

        c_i = C(grad_i - g_i) if ||grad_i - g_i||^2 > zeta ||grad_i - y_i||^2 else nothing
        g_i = g_i + c_i
        g   = g + 1/n sum_i c_i
        y_i = grad_i
    """
    plan = _clients("clag", plan)
    x, g_i, y_i = (a.reshape(plan.own, plan.d) for a in (grad, s.g_i, s.y_i))
    worse = ~(squares(x - g_i) <= s.zeta * squares(x - y_i))  # a NaN is sent, and found
    c = yield plan.offer(lazy(grad) - s.g_i, participates=worse | ~on_host(y_i).any(axis=1))  # also the first time
    s.y_i[:] = grad
    return s.follow(c)


@dataclass(kw_only=True)
class DECSGDState(State):
    """e_i: error of this rank. h_i: what it has sent of its gradient. h: mean of the h_i. correction: a RandK."""

    e_i: Vector = error()
    h_i: Vector = estimate(of="h", owed="")  # sent by the second message, through a plan without a residual
    h: Vector = replicated()
    step: Vector = scratch()
    spare: Vector = double_buffer()
    correction: Compressor = field(default_factory=lambda: RandK(0.1))


def d_ec_sgd(s: DECSGDState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of D-EC-SGD with bias correction and return h + mean_i Delta_i, with the old h.

    Stich 2020 (On Communication Compression for Distributed Optimization on Heterogeneous Data, arXiv 2009.02388): the two
    messages per step that EControl does without. Q is the unbiased RandK times its largest admissible weight
    ``1 / (1 + omega)``, which is RandK without scaling::

        Delta_i = C(e_i + grad_i - h_i)
        e_i     = e_i + grad_i - h_i - Delta_i
        step    = h + mean_i Delta_i
        h_i     = h_i + Q(grad_i - h_i)
        h       = h + mean_i Q(grad_i - h_i)
    """
    p_i = lazy(s.e_i) + grad - s.h_i
    delta = yield plan.offer(p_i, keep=Keep(p_i, into=s.spare, less_message=True))
    q = yield plan.companion(s.correction).offer(lazy(grad) - s.h_i)
    s.e_i, s.spare = s.spare, s.e_i
    s.step[:] = s.h
    delta.add_mean(s.step)
    q.add_own(s.h_i)
    q.add_mean(s.h)
    return s.step
