"""The rules that the others grow from: one function per paper algorithm, on explicit state.

State exists from construction on; its arrays are named as in the papers and marked *per rank* or *replicated*. Every
function is one step in the order of operations of its paper.

Notation: n ranks, C the compressor, ``c = yield plan.offer(v)`` sends C(v); ``c.add_own(a)`` is a += C(v) of this rank,
``c.add_mean(a)`` is a += mean over the ranks, ``keep=Keep(p, into=a, less_message=True)`` is a = p - C(v). Vectors like
``lazy(grad) - g_i`` are formed while they are encoded. State is always updated with what was sent, never with what was
meant, and only once all ranks are known to have sent something finite: what replaces it waits in ``spare``. Rules are
generators, because who drives them decides when a message travels: at once, or while the next one is prepared.
"""

from dataclasses import dataclass, field

from mpi_ef.collectives import Plan
from mpi_ef.compress import Combination, Keep, lazy
from mpi_ef.compress.combination import Vector

from .state import State, Steps, double_buffer, error, estimate, replicated, scratch

__all__ = ["EControlState", "EF14State", "EF21State", "econtrol", "ef14", "ef21"]


@dataclass(kw_only=True)
class EF14State(State):
    """e_i: what this rank has not sent yet. mean: the last result. decay: what share of e_i counts a step later."""

    e_i: Vector = error()
    mean: Vector = scratch()
    spare: Vector = double_buffer()
    decay: float = field(default=1.0, repr=False)


def ef14(s: EF14State, plan: Plan, u: Vector | Combination) -> Steps:
    """Take one step of EF14 and return mean_i Delta_i, to be subtracted from x.

    Seide et al. 2014; Stich, Cordonnier, Jaggi 2018 (Mem-SGD, arXiv 1809.07599); Karimireddy et al. 2019
    (EF-SGD, arXiv 1901.09847)::

        p_i     = e_i + u_i
        Delta_i = C(p_i)
        e_i     = p_i - Delta_i
        x       = x - mean_i Delta_i

    With ``u_i = gamma_t * g_i`` the error is in parameter units, as in the papers, and for every step size schedule
    ``x_T = x_0 - sum_t gamma_t mean_i g_i + mean_i e_i``. With ``u_i = g_i`` and ``x -= gamma_t * result`` the error is
    in gradient units: the same iterates for constant gamma; otherwise old errors are re-weighted by the new gamma.

    With ``decay < 1`` old errors fade, ``p_i = decay e_i + u_i``, as in SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706),
    whose messages are seldom: with E the mean of the e_i, and D that of the u_i, ``E_{t+1} = decay E_t + D_t - mean_t``.
    What fades is never sent; a plan's residual does not fade.
    """
    p_i = lazy(u) + s.decay * lazy(s.e_i)  # u first: what it is made of is added up before e_i, as if it had been formed
    delta = yield plan.offer(p_i, keep=Keep(p_i, into=s.spare, less_message=True))
    s.e_i, s.spare = s.spare, s.e_i
    delta.set_mean(s.mean, again=True)
    return s.mean


@dataclass(kw_only=True)
class EF21State(State):
    """g_i: this rank's gradient estimate, known to all. g: mean of the g_i."""

    g_i: Vector = estimate(of="g")
    g: Vector = replicated()

    def follow(self, c: Plan) -> Vector:
        """Do what all of the family end with, ``g_i = g_i + c_i``, ``g = g + mean_i c_i``, and return g."""
        c.add_own(self.g_i)
        c.add_mean(self.g)
        return self.g


def ef21(s: EF21State, plan: Plan, grad: Vector | Combination) -> Steps:
    """Take one step of EF21 and return g, the estimate of the mean gradient.

    Richtarik, Sokolov, Fatkhullin 2021 (EF21, arXiv 2106.05203); the gradient is taken where the paper takes
    it, at the new x, and the step with the new g follows::

        c_i = C(grad f_i(x) - g_i)
        g_i = g_i + c_i
        g   = g + mean_i c_i
    """
    c = yield plan.offer(lazy(grad) - s.g_i)
    return s.follow(c)


@dataclass(kw_only=True)
class EControlState(State):
    """e_i: error of this rank. h_i: its gradient estimate. h: mean of the h_i. eta: strength of the feedback."""

    e_i: Vector = error()
    h_i: Vector = estimate(of="h")
    h: Vector = replicated()
    spare: Vector = double_buffer()
    eta: float = 0.0


def econtrol(s: EControlState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EControl and return the new h, the direction of the step.

    Gao, Islamov, Stich 2023 (EControl, arXiv 2311.05645); e_i uses the old h_i, the step the new h::

        Delta_i = C(eta e_i + grad_i - h_i)
        e_i     = e_i + grad_i - h_i - Delta_i
        h_i     = h_i + Delta_i
        h       = h + mean_i Delta_i
    """
    e_i = lazy(s.e_i)
    keep = Keep(e_i + grad - s.h_i, into=s.spare, less_message=True)
    delta = yield plan.offer(s.eta * e_i + grad - s.h_i, keep=keep)
    s.e_i, s.spare = s.spare, s.e_i
    delta.add_own(s.h_i)
    delta.add_mean(s.h)
    return s.h
