"""EF21 where clients differ: some take part, some are smoother than others, the way back is compressed as well."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import ClientsMean, Plan, TwoPhaseMean
from mpi_ef.compress import Compressor, Identity, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError, briefly

from .rules import EF21State
from .state import Reply, State, Steps, double_buffer, error, form, replicated

__all__ = ["EF21BCState", "EF21PPState", "EF21PlusState", "EF21WState", "ef21_bc", "ef21_plus", "ef21_pp", "ef21_w"]


def _clients(rule: str, plan: Plan) -> ClientsMean:
    if not isinstance(plan, ClientsMean):
        raise OptionError(f"{rule}: the plan is a {type(plan).__name__}; this rule needs ClientsMean, which knows clients")
    if plan.broken is not None and rule != "ef21-plus":
        raise OptionError(f"{rule}: clients keep silent in turn, and to a {type(plan).__name__} a silent one is wrong; take "
                          "byz-ef21, or ClientsMean")
    return plan


@dataclass(kw_only=True)
class EF21PPState(EF21State):
    """Participation: the share of the clients that take part in a step. seed: of the draws."""

    participation: float = 0.5
    seed: int = 0


def participants(s: "EF21PPState | EF21WState", clients: int) -> NDArray[np.bool_]:
    """Draw ``max(1, round(participation * clients))`` of the clients without replacement; (n,) bool, equal on all ranks.

    In a dense step all take part, as the papers start with the gradients of all, g_i^0 = grad f_i(x^0).
    """
    if s.whole:
        return np.ones(clients, np.bool_)
    draw = np.random.Generator(np.random.Philox(key=[s.seed, s.draw])).permutation(clients)
    return draw < max(1, round(s.participation * clients))


def ef21_pp(s: EF21PPState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-PP and return g. Clients outside of the sample S_t neither compute nor send.

    In a dense first step S_t is all clients.

    Fatkhullin et al. 2021 (EF21 with Bells & Whistles, arXiv 2110.03294)::

        c_i = C(grad_i - g_i)     for i in S_t, else 0
        g_i = g_i + c_i
        g   = g + 1/n sum_i c_i
    """
    plan = _clients("ef21-pp", plan)
    chosen = participants(s, plan.clients)
    c = yield plan.offer(lazy(grad) - s.g_i, participates=chosen[plan.first : plan.first + plan.own])
    return s.follow(c)


@dataclass(kw_only=True)
class EF21WState(EF21State):
    """g_i estimates grad_i / (n w_i); g is the mean with weights w_i. participation, seed: as EF21-PP, EF21-W-PP then."""

    u_i: Vector = double_buffer()
    participation: float = 1.0
    seed: int = 0


def ef21_w(s: EF21WState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-W and return g. The plan has the weights ``w_i = L_i / sum_j L_j``.

    Richtarik, Gasanov, Burlachenko 2024 (Error Feedback Reloaded, arXiv 2402.10774); with smoother clients weighing
    less the step size may be ``1 / (L + L_AM xi)``, with L_AM in the place of L_QM. With gradients of minibatches this is
    EF21-W-SGD, with a sample S_t of the clients EF21-W-PP::

        c_i = C(grad_i / (n w_i) - g_i)     for i in S_t, else 0
        g_i = g_i + c_i
        g   = g + sum_i w_i c_i
    """
    plan = _clients("ef21-w", plan)
    if plan.weights is None:
        raise OptionError("ef21-w: the plan has no weights; pass weights=L_i / sum(L_i) to ClientsMean")
    mine = slice(plan.first, plan.first + plan.own)
    own, chosen = plan.weights[mine], participants(s, plan.clients)[mine]
    for weight, x, u in zip(own.tolist(), grad.reshape(plan.own, plan.d), s.u_i.reshape(plan.own, plan.d), strict=True):
        form(1.0 / (plan.clients * weight) * lazy(x), into=u)
    c = yield plan.offer(lazy(s.u_i) - s.g_i, participates=chosen)
    return s.follow(c)


@dataclass(kw_only=True)
class EF21BCState(State):
    """g_i: this rank's estimate. g: what all know. behind: mean of the g_i, less g. reply: C', the way back."""

    g_i: Vector = error()  # what is behind belongs to their mean, not to g
    g: Vector = replicated()
    behind: Vector = replicated("server_d")
    reply: Compressor = field(default_factory=Identity)
    server: Reply | None = None


def ef21_bc(s: EF21BCState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21-BC and return g: both ways are compressed.

    Fatkhullin et al. 2021 (EF21 with Bells & Whistles, arXiv 2110.03294)::

        c_i = C(grad_i - g_i)
        g_i = g_i + c_i
        g   = g + C'(mean_i g_i - g)

    The server keeps ``behind = mean_i g_i - g``, to which it adds mean_i c_i, and off which it takes what it sends. In a
    :class:`TwoPhaseMean` every rank is the server of a chunk, `behind` is the plan's residual and C' its reply, on each
    chunk. Gathered messages reach every rank, and every rank plays the server: the way back costs nothing, see
    :class:`Reply`.
    """
    if isinstance(plan, TwoPhaseMean) and s.reply not in (Identity(), plan.reply):
        raise OptionError(f"ef21-bc: reply={briefly(s.reply)} beside a TwoPhaseMean, which has a reply of its own; pass "
                          "it there")
    step = plan.exchanges
    c = yield plan.offer(lazy(grad) - s.g_i)
    c.add_own(s.g_i)
    if not s.behind.size:
        c.add_mean(s.g)
        return s.g
    c.add_mean(s.behind)
    if isinstance(plan.compressor, Identity):  # a dense step is dense both ways
        s.g += s.behind
        s.behind.fill(0)
        return s.g
    if s.server is None:
        s.server = Reply(s.reply, plan)
    s.server.move(s.behind, s.g, step)
    return s.g


@dataclass(kw_only=True)
class EF21PlusState(State):
    """all_i: the estimates of all clients, (n, d) on every rank, because a message alone does not tell the new ones."""

    all_i: Vector = replicated("clients_d")
    g: Vector = replicated()
    markov: Vector = double_buffer()
    plain: Vector = double_buffer()


def squares(rows: Vector) -> NDArray[np.floating]:
    """Return the squared norms of rows, (n, d), on the host, which decides."""
    return np.asarray((on_host(rows) ** 2).sum(axis=1))


def on_host(rows: Vector) -> Vector:
    """Return `rows`, or a copy of them on the host."""
    return rows if isinstance(rows, np.ndarray) else rows.numpy()


def ef21_plus(s: EF21PlusState, plan: Plan, grad: Vector) -> Steps:
    """Take one step of EF21+ and return g. Deterministic compressors only; memory n d on every rank.

    Richtarik, Sokolov, Fatkhullin 2021 (EF21, arXiv 2106.05203), section on EF21+; one bit tells which of the two it is::

        m_i = g_i + C(grad_i - g_i)
        b_i = C(grad_i)
        g_i = m_i if ||m_i - grad_i|| <= ||b_i - grad_i|| else b_i
        g   = mean_i g_i
    """
    plan = _clients("ef21-plus", plan)
    rows, d = s.all_i.reshape(plan.clients, plan.d), plan.d
    own = rows[plan.first : plan.first + plan.own]
    x = grad.reshape(plan.own, d)
    markov, plain = s.markov.reshape(plan.own, d), s.plain.reshape(plan.own, d)
    form(lazy(grad) - own.reshape(-1), into=s.markov)
    plan.compress(s.markov, into=s.markov)
    plan.compress(grad, into=s.plain)
    markov += own
    closer = squares(markov - x) <= squares(plain - x)
    for client, row in enumerate(markov):  # what is sent
        form(lazy(x[client]) - own[client] if closer[client] else lazy(x[client]), into=row)
    yield plan.offer(s.markov, tags=closer.astype(np.uint8))
    s.g.fill(0)
    for client, row in enumerate(rows):
        if not plan.tags[client]:
            row.fill(0)
        plan.add_message(client, row)
        s.g += row / plan.clients
    return s.g
