"""Ranks that keep parameters of their own, and go on from the mean of those that are nearest to them."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from mpi_ef.collectives import Plan, RobustMean
from mpi_ef.compress import Identity, lazy
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import OptionError
from mpi_ef.robust import Median, aggregate, nearest_mean
from mpi_ef.statetree import PER_RANK, REPLICATED, Leaf, Reshard

from .state import State, Steps, persistent, scratch
from .table import Rule

__all__ = ["MIXING", "MixingState", "nearest_neighbours"]


@dataclass(kw_only=True)
class MixingState(State):
    """rows: what all know of every rank's vector, (n, d). x: their median. mixed: the result.

    left_out: (n + 1,), in how many steps this rank has left out each of them, and how many steps there were. rate: how far a
    rank goes to the mean of its neighbours.
    """

    rows: Vector = field(metadata={"size": "rows", "leaf": Leaf(REPLICATED)})  # not forgotten: all begin as x, not as zero
    x: Vector = persistent()
    mixed: Vector = scratch()
    left_out: Vector = field(metadata={"size": "suspects", "leaf": Leaf(PER_RANK, reshard=Reshard("repeat"))})
    rate: float = 1.0
    robust: RobustMean | None = field(default=None, repr=False)
    stale: bool = False  # whether x is not yet the median of the rows
    astray: bool = False  # whether this rank's vector was none in the last step, and it goes on from the median

    @classmethod
    def zeros(cls, plan: Plan, **options: Any) -> Self:
        """Return the state before the first step, see :meth:`State.zeros`."""
        if not isinstance(plan, RobustMean) or plan.own != 1 or plan.shards:
            raise OptionError("nearest-neighbours: it needs a RobustMean with one client a rank, and without shards")
        return super().zeros(plan, **options, robust=plan)

    def leaves(self) -> dict[str, Leaf]:
        """Return the arrays that are saved: rows where they are more than the last messages."""
        self.settle()
        leaves, plan = super().leaves(), self.robust
        assert plan is not None  # noqa: S101
        leaves["left_out"] = replace(leaves["left_out"], reshard=Reshard("repeat", stop=plan.clients + 1))
        rows = leaves.pop("rows")
        if not isinstance(plan.compressor, Identity):
            leaves["rows"] = replace(rows, reshard=Reshard("repeat", of="x", stop=plan.clients))
        return leaves

    def settle(self) -> None:
        """Let x be the median of the rows. Local."""
        if self.stale:
            rows = self.rows.reshape(-1, self.x.size)
            self.x[:] = aggregate(rows, Median(), f=(len(rows) - 1) // 2)
            self.stale = False


def nearest_neighbours(s: MixingState, plan: RobustMean, t: Vector) -> Steps:
    """Send this rank's vector t_i, and return the mean of the n - f that are nearest to it, itself first.

    Farhadkhani et al. 2023 (MoNNA, arXiv 2209.10931), with all vectors heard; each rank has a result of its own. Without
    compression w_i = t_i; with it all know w_i, an estimate as EF21's (arXiv 2106.05203), and ranks keep what they have not
    sent yet, as in CHOCO-SGD (Koloskova et al. 2019, arXiv 1902.00340)::

        w_j = w_j + C(t_j - w_j)        for all j
        N_i = the n - f of the w_j nearest to w_i
        x_i = t_i + rate (mean_{j in N_i} w_j - w_i)
    """
    rows, exact = s.rows.reshape(plan.clients, -1), isinstance(plan.compressor, Identity)
    mine: Vector = rows[plan.rank]
    c: Any = yield plan.offer(t if exact else lazy(t) - mine)
    if exact:
        rows[~c.broken] = 0
    c.add_messages(rows)
    s.stale, s.astray = True, bool(c.broken[plan.rank])
    s.left_out[-1] += 1
    if s.astray:
        s.mixed[:] = aggregate(rows[~c.broken], Median(), f=0)
        return s.mixed
    chosen = nearest_mean(rows, plan.rank, plan.clients - plan.f, s.mixed, ~c.broken)
    others = np.ones(plan.clients, np.bool_)
    others[chosen] = False
    s.left_out[:-1] += others
    if not exact:
        s.mixed -= mine
        s.mixed *= s.mixed.dtype.type(s.rate)
        s.mixed += t
    return s.mixed


MIXING = Rule(nearest_neighbours, MixingState, lambda alpha: {"rate": min(1.0, 2.0 * alpha)},
              ranges={"rate": ("(0, 1]", "in (0, 1]", "1 goes all the way to the mean")})
