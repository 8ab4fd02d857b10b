"""EF21 with momentum: of the local gradients (SGDM, SGD2M), or of the step (heavy ball)."""

from dataclasses import dataclass

from mpi_ef.collectives import Plan
from mpi_ef.compress import Keep, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError

from .rules import EF21State, ef21
from .state import State, Steps, average, double_buffer, error, momentum, persistent, scratch

__all__ = ["EF14MomentumState", "EF21HBState", "EF21SGD2MState", "EF21SGDMState", "LionState", "ef14_momentum",
           "ef21_hb", "ef21_sgd2m", "ef21_sgdm", "lion"]


@dataclass(kw_only=True)
class EF14MomentumState(State):
    """e_i: what this rank has not sent yet. m: the momentum that all know. beta: its weight."""

    e_i: Vector = error()
    m: Vector = persistent()
    spare: Vector = double_buffer()
    beta: float = 0.9


def ef14_momentum(s: EF14MomentumState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of error feedback on momentum and return m.

    Tang et al. 2021 (1-bit Adam, arXiv 2102.02888): what all ranks know of the momentum replaces what each of them has::

        m_i     = beta m + (1 - beta) grad_i
        Delta_i = C(e_i + m_i)
        e_i     = e_i + m_i - Delta_i
        m       = mean_i Delta_i
    """
    if plan.own != 1:
        raise OptionError(f"ef14-momentum: {plan.own} vectors on a rank share one momentum; give every rank one client")
    m_i = s.beta * lazy(s.m) + (1.0 - s.beta) * lazy(grad)
    p_i = lazy(s.e_i) + m_i
    delta = yield plan.offer(p_i, keep=Keep(p_i, into=s.spare, less_message=True))
    s.e_i, s.spare = s.spare, s.e_i
    delta.set_mean(s.m)
    return s.m


@dataclass(kw_only=True)
class LionState(State):
    """m_i: momentum of this rank. vote: the last result. beta1: its weight in the vote, beta2: in itself."""

    m_i: Vector = momentum()
    vote: Vector = scratch()
    spare: Vector = double_buffer()
    beta1: float = 0.9
    beta2: float = 0.99


def lion(s: LionState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of Lion and return mean_i C(u_i), whose sign is the direction of the step. There is no feedback.

    Chen et al. 2023 (Lion, arXiv 2302.06675), distributed: with :class:`mpi_ef.compress.Vote` the majority decides (Liu et
    al. 2024, arXiv 2404.00438). With ``beta1 = beta2`` it is Signum (arXiv 1802.04434), with both 0 signSGD::

        u_i = beta1 m_i + (1 - beta1) grad_i
        m_i = beta2 m_i + (1 - beta2) grad_i
        vote = mean_i C(u_i)
    """
    m_i, g = lazy(s.m_i), lazy(grad)
    keep = Keep(s.beta2 * m_i + (1.0 - s.beta2) * g, into=s.spare)
    votes = yield plan.offer(s.beta1 * m_i + (1.0 - s.beta1) * g, keep=keep)
    s.m_i, s.spare = s.spare, s.m_i
    votes.set_mean(s.vote)
    return s.vote


@dataclass(kw_only=True)
class EF21SGDMState(EF21State):
    """Adds v_i: momentum of this rank's gradients. eta: weight of the new gradient."""

    v_i: Vector = average()
    spare: Vector = double_buffer()
    eta: float = 0.1


def ef21_sgdm(s: EF21SGDMState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-SGDM and return g.

    Fatkhullin, Tyurin, Richtarik 2023 (Momentum Provably Improves Error Feedback, arXiv 2305.15155); eta is the weight of
    the new gradient, 0.1 being what is called a momentum of 0.9 elsewhere, and 1 being EF21-SGD::

        v_i = (1 - eta) v_i + eta grad_i, the first time grad_i
        c_i = C(v_i - g_i)
        g_i = g_i + c_i
        g   = g + mean_i c_i
    """
    v_i = (1.0 - s.eta) * lazy(s.v_i) + s.eta * lazy(grad)
    if s.begins:
        c = yield plan.offer(lazy(s.averaged(v_i, grad, into=s.spare)) - s.g_i)
    else:
        c = yield plan.offer(v_i - s.g_i, keep=Keep(v_i, into=s.spare))
    s.v_i, s.spare = s.spare, s.v_i
    return s.follow(c)


@dataclass(kw_only=True)
class EF21SGD2MState(EF21SGDMState):
    """Adds u_i: momentum of the momentum v_i."""

    u_i: Vector = average()
    second: Vector = double_buffer()


def ef21_sgd2m(s: EF21SGD2MState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-SGD2M and return g.

    The same paper, appendix; v_i takes a pass over memory of its own::

        v_i = (1 - eta) v_i + eta grad_i, the first time grad_i
        u_i = (1 - eta) u_i + eta v_i,    the first time v_i
        c_i = C(u_i - g_i)
        g_i = g_i + c_i
        g   = g + mean_i c_i
    """
    v_i = s.averaged((1.0 - s.eta) * lazy(s.v_i) + s.eta * lazy(grad), grad, into=s.spare)
    u_i = (1.0 - s.eta) * lazy(s.u_i) + s.eta * lazy(v_i)
    if s.begins:
        c = yield plan.offer(lazy(s.averaged(u_i, v_i, into=s.second)) - s.g_i)
    else:
        c = yield plan.offer(u_i - s.g_i, keep=Keep(u_i, into=s.second))
    s.v_i, s.spare = s.spare, s.v_i
    s.u_i, s.second = s.second, s.u_i
    return s.follow(c)


@dataclass(kw_only=True)
class EF21HBState(EF21State):
    """Adds v: the step. eta: heavy-ball momentum."""

    v: Vector = persistent()
    eta: float = 0.5


def ef21_hb(s: EF21HBState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-HB and return v, the direction of the heavy-ball step.

    Fatkhullin, Sokolov, Gorbunov, Li, Richtarik 2021 (EF21 with Bells & Whistles, arXiv 2110.03294); as in the authors'
    code, without the second gamma of their poster::

        g = EF21's g
        v = eta v + g
    """
    g = yield from ef21(s, plan, grad)
    s.v *= s.eta
    s.v += g
    return s.v
