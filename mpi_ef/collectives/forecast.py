"""What an exchange takes on a cluster, and moves: latency, bytes over bandwidth, and computation, by formulas.

Bytes are those of codecs. Seconds are those of an exchange in which nothing waits: what operating systems, other users of
links and slow ranks add is measured, and can be given in place of latencies (:attr:`Cluster.waits`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, log2

from mpi_ef.compress import Compressor, RandK, Sign, TopK

from .chain import block_nbytes, is_long
from .pairwise import ARRIVING_NBYTES, MESSAGE_NBYTES, UNDER_WAY
from .two_phase import growth

__all__ = ["PLANS", "Cluster", "Costs", "Forecast", "Task", "forecast"]

_HEADER_NBYTES = 8
_ENTRY_NBYTES = 4  # float32


@dataclass(frozen=True)
class Cluster:
    """Nodes of as many ranks each, ranks of a node next to each other, and the links between nodes.

    Attributes
    ----------
    nodes, ranks_per_node : int
    latency_seconds : float
        Of a message between two nodes.
    bytes_per_second : float
        Of a node's link, each way, as messages see it: TCP over Ethernet leaves 95 % of what is written on it.
    waits : mapping of (str, str) to float
        What short collectives have been seen to take, in seconds: ("gather" | "scatter" | "reduce", "all" | "rail") for the
        ranks of all nodes, or one of each, and ("barrier", "node"). In place of log2 of their number times the latency.
    """

    nodes: int
    ranks_per_node: int
    latency_seconds: float
    bytes_per_second: float
    waits: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.nodes * self.ranks_per_node

    def wait(self, call: str, among: str) -> float:
        """Return what a short collective takes."""
        if (call, among) in self.waits:
            return self.waits[call, among]
        if among == "node":
            return 0.0
        n = self.ranks if among == "all" and self.nodes > 1 else self.nodes
        return self.latency_seconds * ceil(log2(n)) if n > 1 else 0.0

    def link(self, nbytes: float) -> float:
        """Return what so many bytes take over the link of a node."""
        return nbytes / self.bytes_per_second


@dataclass(frozen=True)
class Costs:
    """What computation takes, in seconds: of an entry of a vector, of one that is kept, of a chunk.

    The numbers are those of a core of a server of 2020, see docs/scaling.md. Memory is that of all ranks of a node, up to
    `cores` of which get `memory_bytes_per_second` each at the same time.
    """

    select: float = 1.7e-9  # error feedback, selection and coding
    decode: float = 4.2e-9  # a kept entry
    sign: float = 1.0e-9  # error feedback and coding
    unsign: float = 0.3e-9
    chunk: float = 4e-6
    memory_bytes_per_second: float = 12e9
    cores: int = 16

    def over(self, entries: float, nbytes: float, ranks: int, each: float = 0.0) -> float:
        """Return what `ranks` of a node need at once for `entries` that touch `nbytes` each and take `each` seconds."""
        shared = max(1.0, ranks / self.cores) / self.memory_bytes_per_second
        return entries * max(each, nbytes * shared)


@dataclass(frozen=True)
class Task:
    """What is exchanged: vectors of `d` float32 entries.

    Attributes
    ----------
    compressor : Compressor
        Of plans that compress.
    reply : Compressor or None
        Of the second phase, by default that of :class:`TwoPhaseMean`.
    every : int
        How many steps there are for each exchange of local steps.
    """

    d: int
    compressor: Compressor = TopK(0.01)
    reply: Compressor | None = None
    every: int = 15

    def reply_on(self, ranks: int) -> Compressor:
        """Return the compressor of the second phase on so many ranks."""
        return self.compressor.grown(growth(ranks), self.d) if self.reply is None else self.reply


@dataclass(frozen=True)
class Forecast:
    """Of one exchange, or of a step where there are fewer exchanges than steps.

    Attributes
    ----------
    compute_seconds, wait_seconds, link_seconds : float
        Computation, latencies, and bytes over the bandwidth of the link of a node.
    link_nbytes : float
        What comes to a node, of all its ranks together, and leaves it.
    memory_nbytes : float
        Buffers of a rank, its vector and the state of a rule not among them.
    """

    compute_seconds: float
    wait_seconds: float
    link_seconds: float
    link_nbytes: float
    memory_nbytes: float

    @property
    def seconds(self) -> float:
        """Return the sum."""
        return self.compute_seconds + self.wait_seconds + self.link_seconds

    def spread(self, steps: int) -> "Forecast":
        """Return that of a step, where there is an exchange every so many."""
        return replace(self, **{name: getattr(self, name) / steps for name in (
            "compute_seconds", "wait_seconds", "link_seconds", "link_nbytes")})


def forecast(plan: str, task: Task, cluster: Cluster, costs: Costs | None = None) -> Forecast:
    """Return what one exchange takes: one of :data:`PLANS`. Local."""
    return PLANS[plan](task, cluster, costs or Costs())


def _frame(compressor: Compressor, d: float) -> int:
    """Return the bytes of a frame for so many entries."""
    return _HEADER_NBYTES + compressor.wire_nbytes(max(1, round(d)))


def _kept(compressor: Compressor, d: float) -> float:
    return compressor.count(max(1, round(d))) if isinstance(compressor, TopK | RandK) else d


def _encode(compressor: Compressor, d: float, ranks: int, costs: Costs) -> float:
    return costs.over(d, 13.4, ranks, costs.select if isinstance(compressor, TopK | RandK) else costs.sign)


def _decode(compressor: Compressor, d: float, costs: Costs) -> float:
    """Return what `d` entries take, of one message or several."""
    return _kept(compressor, d) * (costs.decode if isinstance(compressor, TopK | RandK) else costs.unsign)


def _ring(task: Task, on: Cluster, costs: Costs) -> Forecast:
    n, nbytes = on.ranks, _ENTRY_NBYTES * task.d
    crossing = 2 * (n - 1) / n * nbytes if on.nodes > 1 else 0.0
    steps = on.waits.get(("reduce", "all"), 2 * (n - 1) * on.latency_seconds if on.nodes > 1 else 0.0)
    return Forecast(costs.over(task.d, 8, on.ranks_per_node), steps, on.link(crossing), crossing, nbytes)


def _rank_order(task: Task, on: Cluster, costs: Costs) -> Forecast:
    n, s, nbytes = on.ranks, on.ranks_per_node, _ENTRY_NBYTES * task.d
    if s > 1 and on.nodes > 1 and is_long(nbytes, n):  # from rank to rank, and back
        once = min(on.nodes - 1, 2) * nbytes
        first = 2 * (on.nodes - 1) * block_nbytes(nbytes, n)
        wait = 2 * on.wait("gather", "all") + 2 * (on.nodes - 1) * on.latency_seconds
        return Forecast(costs.over(task.d, 8, s), wait, on.link(once + first), once, nbytes)
    crossing = 2 * s * (n - s) / n * nbytes
    longest = min(MESSAGE_NBYTES, ARRIVING_NBYTES / (2 * n), nbytes / n)
    messages = 2 * (n - 1) * nbytes / n / longest if on.nodes > 1 else 0
    begun = max(0.0, messages * on.latency_seconds / UNDER_WAY - on.link(crossing))  # what bytes do not hide
    wait = 2 * on.wait("gather", "all") + begun
    return Forecast(costs.over(task.d, 8, s), wait, on.link(crossing), crossing, nbytes + 2 * n * longest)


def _gather(task: Task, on: Cluster, costs: Costs) -> Forecast:
    n, s, frame = on.ranks, on.ranks_per_node, _frame(task.compressor, task.d)
    crossing = (n - s) * frame
    compute = _encode(task.compressor, task.d, s, costs) + _decode(task.compressor, n * task.d, costs)
    return Forecast(compute, on.wait("gather", "all"), on.link(crossing), crossing, (2 * n + 1) * frame)


def _two_phase(task: Task, on: Cluster, costs: Costs) -> Forecast:
    n, s, reply = on.ranks, on.ranks_per_node, task.reply_on(on.ranks)
    out, back = _frame(task.compressor, task.d / n), _frame(reply, task.d / n)
    crossing = (n - s) * (s * out + back)
    compute = _encode(task.compressor, task.d * (1 + 1 / n), s, costs) + n * costs.chunk
    compute += _decode(task.compressor, task.d, costs) + _decode(reply, task.d, costs)
    wait = on.wait("scatter", "all") + on.wait("gather", "all")
    return Forecast(compute, wait, on.link(crossing), crossing, 2 * n * (out + back) + 2 * _ENTRY_NBYTES * task.d / n)


def _on_nodes(inner: Callable[[Task, Cluster, Costs], Forecast]) -> Callable[[Task, Cluster, Costs], Forecast]:
    """Return what adds inside of nodes, and has a plan between them for each slice: one rank of every node has it."""

    def of_nodes(task: Task, on: Cluster, costs: Costs) -> Forecast:
        s, slices = on.ranks_per_node, replace(task, d=max(1, -(-task.d // on.ranks_per_node)))
        waits = {(call, "all"): seconds for (call, among), seconds in on.waits.items() if among == "rail"}
        each = Forecast(0.0, 0.0, 0.0, 0.0, 0.0)
        if on.nodes > 1:
            rail = Cluster(on.nodes, 1, on.latency_seconds, on.bytes_per_second / s, waits)
            crowded = costs.memory_bytes_per_second / max(1.0, s / costs.cores)
            each = inner(slices, rail, replace(costs, memory_bytes_per_second=crowded, cores=1))
        inside = costs.over(task.d, 8, s) if s > 1 else 0.0
        return Forecast(each.compute_seconds + inside, each.wait_seconds + 2 * on.wait("barrier", "node"), each.link_seconds,
                        s * each.link_nbytes, each.memory_nbytes + _ENTRY_NBYTES * task.d / s)

    return of_nodes


def _signs(task: Task, on: Cluster, costs: Costs) -> Forecast:
    return _two_phase(replace(task, compressor=Sign(block=4096), reply=None), on, costs)


def _local_steps(task: Task, on: Cluster, costs: Costs) -> Forecast:
    return _two_phase(task, on, costs).spread(task.every)


PLANS: dict[str, Callable[[Task, Cluster, Costs], Forecast]] = {
    "dense, ring": _ring,
    "dense, rank order": _rank_order,
    "gather": _gather,
    "two-phase": _two_phase,
    "signs, two-phase": _signs,
    "local steps, two-phase": _local_steps,
    "nodes, dense": _on_nodes(_rank_order),
    "nodes, gather": _on_nodes(_gather),
    "nodes, two-phase": _on_nodes(_two_phase),
}
