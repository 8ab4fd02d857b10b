"""Which plan is fastest here: forecast from what a communicator's links and ranks can do, and tried."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.comm.attributes import kept_with
from mpi_ef.comm.consensus import agree, gather_values
from mpi_ef.comm.nodes import nodes_of
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Compressor, Identity, Quantize, RandK, Sign, TopK
from mpi_ef.compress.compressor import check_compressor
from mpi_ef.errors import OptionError, briefly, counted
from mpi_ef.ranges import within

from .chosen import BY_WORD, plan_for
from .dense import DenseMean
from .forecast import Forecast, Task, forecast
from .gather import GatherMean
from .node import NodeMean
from .plan import Plan
from .survey import Survey, survey
from .two_phase import TwoPhaseMean

__all__ = ["Advice", "Row", "advise"]

Build = Callable[..., Plan]

# In the order of what they leave out: of two that take about as long the first one is advised.
_PLANS: dict[str, tuple[str, Build]] = {
    "dense": ("dense, rank order", lambda comm, _, d, dtype=np.float32, **where: DenseMean(comm, d, dtype, **where)),
    "nodes, dense": ("nodes, dense", lambda comm, what, d, dtype=np.float32, **where: NodeMean(
        comm, what, d, dtype, inner=lambda rail, _, part, kind, **more: DenseMean(rail, part, kind, **more), **where)),
    "gather": ("gather", GatherMean),
    "nodes, gather": ("nodes, gather", partial(NodeMean, inner=GatherMean)),
    "two-phase": ("two-phase", TwoPhaseMean),
    "nodes, two-phase": ("nodes, two-phase", partial(NodeMean, inner=TwoPhaseMean)),
}
_SPECIFIED = {"gather": "GatherMean", "nodes, gather": "NodeMean(inner='GatherMean')", "two-phase": "TwoPhaseMean",
              "dense": "DenseMean", "nodes, dense": "NodeMean(inner='DenseMean')",
              "nodes, two-phase": "NodeMean(inner='TwoPhaseMean')"}
_KNOWN = (TopK, RandK, Sign, Quantize, Identity)  # of which forecasts know what they cost
_TRIED, _TIMES = 3, 2
_HOPELESS = 3.0  # a forecast so many times the best is not tried
_ALIKE = 1.2
_SHARE_OF_MEMORY = 0.1  # that buffers may take
_SHARE_OF_VECTORS = 0.3  # that vectors may take with which plans are tried


@dataclass(frozen=True)
class Row:
    """What is known of one plan.

    Attributes
    ----------
    plan : str
    forecast : Forecast
    measured : float or None
        Seconds of an exchange, of the slowest rank; None where it was not tried.
    fits : bool
        Whether its buffers take no more than a tenth of the free memory of a rank.
    """

    plan: str
    forecast: Forecast
    measured: float | None = None
    fits: bool = True

    @property
    def seconds(self) -> float:
        """What was measured, else the forecast."""
        return self.forecast.seconds if self.measured is None else self.measured


@dataclass(frozen=True)
class Advice:
    """The plans for vectors of one length, and which of them to take; the same on all ranks.

    Attributes
    ----------
    plan : str
        The name of the one to take, see :attr:`specification`.
    rows : tuple of Row
        In the order of what plans leave out.
    compressor : Compressor
    d : int
    survey : Survey
    """

    plan: str
    rows: tuple[Row, ...]
    compressor: Compressor
    d: int
    survey: Survey

    @property
    def specification(self) -> str:
        """What optimizers and ``mpi-ef train --plan`` take as `plan`."""
        return _SPECIFIED.get(self.plan, self.plan)

    @property
    def seconds(self) -> float:
        """What an exchange through the plan takes, measured or forecast."""
        return next(row.seconds for row in self.rows if row.plan == self.plan)

    def build(self, comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32) -> Plan:
        """Build the plan. Collective."""
        plan = _PLANS[self.plan][1](comm, compressor, d, dtype)
        plan.advice = self
        return plan

    def table(self) -> str:
        """Return what is known of all plans as text, a line for each. Local."""
        of, s = self.survey.cluster, self.survey
        link = "no link between nodes" if of.nodes == 1 else (
            f"{8e-6 * of.bytes_per_second:,.0f} Mbit/s and {1e6 * of.latency_seconds:,.0f} us between nodes")
        noisy = "; noisy: ranks wait for processors, times are rough" * s.noisy
        lines = [f"{counted(of.nodes, 'node')} of {counted(of.ranks_per_node, 'rank')}: {link}{noisy}",
                 f"{self.compressor} of {self.d:,} entries, times of an exchange",
                 f"{'':2}{'plan':18}{'forecast':>12}{'measured':>12}{'on a link':>12}{'buffers':>12}"]
        for row in self.rows:
            measured = "" if row.measured is None else f"{1e3 * row.measured:,.1f} ms"
            mark = "->" if row.plan == self.plan else "  "
            lines.append(f"{mark}{row.plan:18}{1e3 * row.forecast.seconds:>9,.1f} ms{measured:>12}"
                         f"{row.forecast.link_nbytes / 1e6:>9,.2f} MB{row.forecast.memory_nbytes / 1e6:>9,.1f} MB"
                         f"{'' if row.fits else '  more than a tenth of what is free'}")
        return "\n".join(lines)


def advise(comm: Comm, d: int, compressor: Compressor | None = None, *, seconds: float = 1.0, probe: bool = True,
           dense: bool = False) -> Advice:
    """Say which plan is fastest for vectors of `d` float32 entries on `comm`. Collective.

    Measures the links, once for a communicator; forecasts every plan; tries the three best twice each, with real buffers.
    Times that were measured decide, forecasts only say what is worth trying. Of plans that take about as long, up to a fifth
    more, it takes the one that leaves out less: dense, gathered, two phases.

    Parameters
    ----------
    d : int
    compressor : Compressor, optional
        TopK of 1 % in bf16 by default. Its ratio is never changed: that would be another algorithm.
    seconds : float
        How long measuring the links may take, and again trying plans; what has begun is finished. The same on all ranks.
    probe : bool
        Whether to try plans, where there is room for two vectors.
    dense : bool
        Whether plans that compress nothing may be advised; else they are forecast, for comparison.

    Raises
    ------
    OptionError, DisagreementError
        On all ranks.
    """
    what = TopK(0.01, values=Quantize("bf16")) if compressor is None else compressor

    def facts() -> dict[str, object]:
        check_compressor("advise", compressor=what)
        within("advise", "(0, inf)", "1.0 is usual", seconds=seconds)
        if not isinstance(what, _KNOWN):
            raise OptionError(f"advise: what {briefly(what)} costs is not known; take its own plan, that of plan_for, or "
                              f"ask for one of {', '.join(kind.__name__ for kind in _KNOWN)}")
        if not isinstance(d, int | np.integer) or d < 1:
            raise OptionError(f"advise: d={briefly(d)} is not the length of a vector; pass the number of parameters")
        return {"d": int(d), "compressor": what, "seconds": seconds, "probe": probe, "dense": dense}

    agree(comm, "advise", facts, "ask for the same on all ranks")
    found = survey(comm, seconds=seconds)
    task, nodes = Task(int(d), what), nodes_of(comm)
    shared = nodes.largest > 1 and hasattr(comm, "Split")
    rows = []
    for name, (formula, _) in _PLANS.items():
        if not name.startswith("nodes") or (shared and (nodes.count > 1 or not _compresses(name))):  # one node is dense
            of_plan = forecast(formula, task, found.cluster, found.costs)
            fits = not found.free_nbytes or of_plan.memory_nbytes <= _SHARE_OF_MEMORY * found.free_nbytes
            rows.append(Row(name, of_plan, None, fits))
    asked = [row for row in rows if dense or _compresses(row.plan) != isinstance(what, Identity)]
    able = [row for row in asked if row.fits] or [min(asked, key=lambda row: row.forecast.memory_nbytes)]
    room = not found.free_nbytes or 2 * 4 * d <= _SHARE_OF_VECTORS * found.free_nbytes  # for two vectors
    times = _tried(comm, able, what, int(d), seconds) if probe and room else {}
    rows, able = ([replace(row, measured=times.get(row.plan)) for row in some] for some in (rows, able))
    return Advice(_chosen(able), tuple(rows), what, int(d), found)


def _compresses(plan: str) -> bool:
    return "dense" not in plan


def _chosen(rows: Iterable[Row]) -> str:
    tried = [row for row in rows if row.measured is not None] or list(rows)
    least = min(row.seconds for row in tried)
    return next(row.plan for row in tried if row.seconds <= _ALIKE * least)


def _tried(comm: Comm, able: list[Row], what: Compressor, d: int, seconds: float) -> dict[str, float]:
    """Return the times of those that are worth trying, alike on all ranks. Collective."""
    able = sorted(able, key=lambda row: row.forecast.seconds)
    worth = [row for row in able[:_TRIED] if row.forecast.seconds <= _HOPELESS * able[0].forecast.seconds]
    if len(worth) < 2:
        return {}
    x, out = np.random.default_rng(int(comm.Get_rank())).standard_normal(d, np.float32), np.zeros(d, np.float32)
    plans = {row.plan: _PLANS[row.plan][1](comm, what, d, np.float32) for row in worth}
    spent: dict[str, list[float]] = {name: [] for name in plans}
    began, on = perf_counter(), np.ones(1, np.int8)
    for turn in range(_TIMES + 1):  # the first one compiles, and fills buffers
        for name, plan in plans.items():
            comm.Barrier()
            start = perf_counter()
            plan.exchange(x)
            plan.set_mean(out, again=True)
            if turn:
                spent[name].append(perf_counter() - start)
        if turn == 0:
            began = perf_counter()
        on[0] = perf_counter() - began < seconds
        comm.Bcast(on)
        if turn and not on[0]:
            break
    times = np.array([median(spent[name]) for name in plans])
    everywhere = np.empty((comm.Get_size(), times.size))
    comm.Allgather(times, everywhere)
    return dict(zip(plans, everywhere.max(axis=0).tolist(), strict=True))


class _Given:
    """Advice that was given for a communicator, by compressor and about how long vectors are."""

    def __init__(self) -> None:
        self.advice: dict[tuple[Compressor, int], Advice] = {}


def _fastest(comm: Comm, compressor: Compressor, d: int, dtype: DTypeLike = np.float32, *, device: str = "cpu",
             gather: bool = False) -> Plan:
    """Return the plan that is fastest here, for ``plan="auto"``; that of :func:`plan_for` where none is advised. Collective.

    None is for vectors on devices, compressors of which no cost is known, rules that gather, and a single rank.
    """
    asked = isinstance(compressor, _KNOWN) and isinstance(d, int | np.integer) and d > 0 and device == "cpu" and not gather
    if not all(gather_values(comm, "plan='auto'", asked)) or comm.Get_size() == 1:  # vectors of some may be on devices
        where: dict[str, Any] = {} if device == "cpu" else {"device": device}
        return plan_for(comm, compressor, d, dtype, gather=gather, **where)
    given = (kept_with(comm, _Given) if hasattr(type(comm), "Create_keyval") else _Given()).advice
    about = compressor, int(d).bit_length()
    if about not in given:
        given[about] = advise(comm, d, compressor)
    return given[about].build(comm, compressor, d, dtype)


BY_WORD["auto"] = _fastest
