"""EF21 where up to f of n clients are wrong: a robust aggregate of what all know of every client."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mpi_ef.collectives import Plan, RobustMean
from mpi_ef.compress import Combination, Compressor, Identity, Keep, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError
from mpi_ef.statetree import PER_RANK, Leaf, Reshard

from .state import Reply, State, Steps, average, double_buffer, estimate, form, replicated

__all__ = ["ByzEF21BCState", "ByzEF21SGDMState", "ByzEF21State", "byz_ef21", "byz_ef21_bc", "byz_ef21_sgdm"]


@dataclass(kw_only=True)
class ByzEF21State(State):
    """rows: the estimates of all clients, (n, d), or this rank's columns of them. g: their aggregate.

    g_i: those of this rank's clients where ranks share the columns. suspects: (n + 1,), what each client has been suspected
    of in all steps, added up, and how many steps these were.
    """

    rows: Vector = replicated("rows")
    g_i: Vector = estimate(of="g", owed="", size="own_if_shards")
    g: Vector = replicated()
    suspects: Vector = replicated("suspects")
    robust: RobustMean | None = field(default=None, repr=False)  # the plan that knows the columns of this rank

    @classmethod
    def zeros(cls, plan: Plan, **options: Any) -> Self:
        """Return the state before the first step, see :meth:`State.zeros`."""
        if not isinstance(plan, RobustMean):
            raise OptionError(f"byz-ef21: the plan is a {type(plan).__name__}; this rule needs a RobustMean, which knows an "
                              "aggregator and f: plan=functools.partial(RobustMean, f=1), or 'RobustMean(f=1)'")
        return super().zeros(plan, **options, robust=plan)

    def leaves(self) -> dict[str, Leaf]:
        """Return the arrays that are saved: of shards a row each, which other numbers of ranks cut anew."""
        leaves, plan = super().leaves(), self.robust
        assert plan is not None  # noqa: S101
        rows, suspects, g_i = leaves.pop("rows"), leaves.pop("suspects"), leaves.pop("g_i")
        if self.g_i.size:
            leaves["g_i"] = g_i
            cut = Reshard("cut", start=plan.columns.start, stop=plan.columns.stop)
            of_clients = {f"rows.{j}": Leaf(PER_RANK, row, reshard=cut, resets=True) for j, row in enumerate(self.by_client)}
        elif plan.share is None:  # clients are ranks, of which there may be others
            of_clients = {"rows": replace(rows, reshard=Reshard("repeat", of=self.sum, stop=plan.clients))}
            suspects = replace(suspects, reshard=Reshard("repeat", stop=plan.clients + 1))
        else:
            of_clients = {"rows": rows}
        return leaves | of_clients | {"suspects": suspects}

    @property
    def by_client(self) -> Vector:
        """The rows, (n, width)."""
        return self.rows.reshape(self.suspects.size - 1, -1)

    @property
    def own(self) -> Vector:
        """The estimates of this rank's clients, (own * d,)."""
        plan = self.robust
        assert plan is not None  # noqa: S101
        return self.g_i if self.g_i.size else self.rows[plan.first * plan.d : (plan.first + plan.own) * plan.d]

    @property
    def suspicion(self) -> NDArray[np.floating]:
        """How much each client has been left out, (n,), from 0 to 1: the mean over the steps."""
        return self.suspects[:-1] / max(float(self.suspects[-1]), 1.0)

    sum: ClassVar[str] = "g"  # the array that is the aggregate of the rows

    def learn(self, c: RobustMean, out: Vector) -> None:
        """Add what clients have sent to their rows, and let `out` be their aggregate."""
        c.add_messages(self.by_client)
        if self.g_i.size:
            c.add_own(self.g_i)
        if not c.is_mean:
            c.aggregate(self.by_client, out, step=self.draw)
        self.suspects[:-1] += c.suspicion
        self.suspects[-1] += 1

    def follow(self, c: RobustMean) -> Vector:
        """Do what all of the family end with, and return g."""
        self.learn(c, self.g)
        if c.is_mean:
            c.add_mean(self.g)
        return self.g


def byz_ef21(s: ByzEF21State, plan: RobustMean, grad: Vector | Combination) -> Steps:
    """Take one step of Byz-EF21 and return g. The plan is a :class:`RobustMean`, which has the aggregator A and f.

    Rammal, Gruntkowska, Fedin, Gorbunov, Richtarik 2024 (Communication Compression for Byzantine Robust Learning,
    arXiv 2310.09804). Without wrong clients and with an aggregator that is the mean then, it is EF21, bit for bit::

        c_i = C(grad_i - g_i)
        g_j = g_j + c_j         for all j, as everybody knows all g_j; broken messages count as zero
        g   = A(g_1 ... g_n; f)
    """
    c = yield plan.offer(lazy(grad) - s.own)
    return s.follow(c)  # type: ignore[arg-type]


@dataclass(kw_only=True)
class ByzEF21SGDMState(ByzEF21State):
    """Adds v_i: momentum of this rank's gradients. eta: weight of the new gradient.

    On another number of ranks v_i begins as g: a mean of the old ones would have that of a wrong rank.
    """

    v_i: Vector = field(metadata={**average().metadata, "leaf": Leaf(PER_RANK, reshard=Reshard("copy", of="g"))})
    spare: Vector = double_buffer()
    eta: float = 0.1


def byz_ef21_sgdm(s: ByzEF21SGDMState, plan: RobustMean, grad: Vector) -> Steps:
    """Take one step of Byz-EF21-SGDM and return g.

    The same paper on the momentum of EF21-SGDM (arXiv 2305.15155), which makes honest clients differ by less::

        v_i = (1 - eta) v_i + eta grad_i, the first time grad_i
        c_i = C(v_i - g_i)
        g_j = g_j + c_j         for all j
        g   = A(g_1 ... g_n; f)
    """
    v_i = (1.0 - s.eta) * lazy(s.v_i) + s.eta * lazy(grad)
    if s.begins:
        c = yield plan.offer(lazy(s.averaged(v_i, grad, into=s.spare)) - s.own)
    else:
        c = yield plan.offer(v_i - s.own, keep=Keep(v_i, into=s.spare))
    s.v_i, s.spare = s.spare, s.v_i
    return s.follow(c)  # type: ignore[arg-type]


@dataclass(kw_only=True)
class ByzEF21BCState(ByzEF21State):
    """aggregate: A of the rows. g: what all know of it. behind: what of it g lacks. reply: C', the way back."""

    sum: ClassVar[str] = "aggregate"
    aggregate: Vector = replicated()
    behind: Vector = replicated()
    reply: Compressor = field(default_factory=Identity)
    server: Reply | None = None


def byz_ef21_bc(s: ByzEF21BCState, plan: RobustMean, grad: Vector) -> Steps:
    """Take one step of Byz-EF21-BC and return g: both ways are compressed, the one back as in EF21-BC.

    The same paper, algorithm 3. Every rank plays the server, so the way back costs nothing, see :class:`Reply`::

        c_i = C(grad_i - g_i)
        g_j = g_j + c_j         for all j
        g   = g + C'(A(g_1 ... g_n; f) - g)
    """
    step = plan.exchanges
    c: Any = yield plan.offer(lazy(grad) - s.own)
    s.learn(c, s.aggregate)
    if c.is_mean:
        c.add_mean(s.behind)
    else:
        form(lazy(s.aggregate) - s.g, into=s.behind)
    if isinstance(plan.compressor, Identity):  # a dense step is dense both ways
        s.g += s.behind
        s.behind.fill(0)
        return s.g
    if s.server is None:
        s.server = Reply(s.reply, plan)
    s.server.move(s.behind, s.g, step)
    return s.g

