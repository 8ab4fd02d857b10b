"""EF21 with momentum: of the local gradients (SGDM, SGD2M), or of the step (heavy ball)."""

from dataclasses import dataclass

from mpi_ef.collectives import Plan
from mpi_ef.compress import Keep, lazy
from mpi_ef.compress.combination import Vector

from .rules import EF21State, ef21
from .state import Steps, form, per_rank, replicated, spare

__all__ = ["EF21HBState", "EF21SGD2MState", "EF21SGDMState", "ef21_hb", "ef21_sgd2m", "ef21_sgdm"]


@dataclass(kw_only=True)
class EF21SGDMState(EF21State):
    """Adds v_i: momentum of this rank's gradients. eta: weight of the new gradient."""

    v_i: Vector = per_rank()
    spare: Vector = spare()
    eta: float = 0.1


def ef21_sgdm(s: EF21SGDMState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-SGDM and return g.

    Fatkhullin, Tyurin, Richtarik 2023 (Momentum Provably Improves Error Feedback, arXiv 2305.15155); eta is the weight of
    the new gradient, 0.1 being what is called a momentum of 0.9 elsewhere, and 1 being EF21-SGD::

        v_i = (1 - eta) v_i + eta grad_i
        c_i = C(v_i - g_i)
        g_i = g_i + c_i
        g   = g + mean_i c_i
    """
    v_i = (1.0 - s.eta) * lazy(s.v_i) + s.eta * lazy(grad)
    c = yield plan.offer(v_i - s.g_i, keep=Keep(v_i, into=s.spare))
    s.v_i, s.spare = s.spare, s.v_i
    return s.follow(c)


@dataclass(kw_only=True)
class EF21SGD2MState(EF21SGDMState):
    """Adds u_i: momentum of the momentum v_i."""

    u_i: Vector = per_rank()
    second: Vector = spare()


def ef21_sgd2m(s: EF21SGD2MState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-SGD2M and return g.

    The same paper, appendix; v_i takes a pass over memory of its own::

        v_i = (1 - eta) v_i + eta grad_i
        u_i = (1 - eta) u_i + eta v_i
        c_i = C(u_i - g_i)
        g_i = g_i + c_i
        g   = g + mean_i c_i
    """
    v_i = form((1.0 - s.eta) * lazy(s.v_i) + s.eta * lazy(grad), into=s.spare)
    u_i = (1.0 - s.eta) * lazy(s.u_i) + s.eta * lazy(v_i)
    c = yield plan.offer(u_i - s.g_i, keep=Keep(u_i, into=s.second))
    s.v_i, s.spare = s.spare, s.v_i
    s.u_i, s.second = s.second, s.u_i
    return s.follow(c)


@dataclass(kw_only=True)
class EF21HBState(EF21State):
    """Adds v: the step. eta: heavy-ball momentum."""

    v: Vector = replicated()
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
