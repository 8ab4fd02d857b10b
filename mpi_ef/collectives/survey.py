"""What a communicator's links and ranks can do, measured: for :mod:`.forecast`."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from mpi_ef.comm.attributes import kept_with
from mpi_ef.comm.nodes import Nodes, nodes_of
from mpi_ef.comm.protocol import Comm
from mpi_ef.compress import Codec, Keep, Quantize, Sign, TopK, lazy, source

from .forecast import Cluster, Costs
from .pairwise import MESSAGE_NBYTES

__all__ = ["Survey", "survey"]

_SHORT_NBYTES, _LONGEST_NBYTES = 64, 64 << 20
_FIRST_NBYTES = 64 << 10  # of longer messages, each twice the one before
_LONG_ONES, _LONG_SECONDS, _LATENCIES = 2, 0.02, 10  # a message is long enough from so many seconds, or latencies, on
_ENTRIES = 1 << 20
_NOISY = 10  # a short collective takes so many latencies where ranks wait for processors
_REPEATS = 15
_TAG = 1


@dataclass(frozen=True)
class Survey:
    """What was measured, the same on all ranks.

    Attributes
    ----------
    cluster : Cluster
        Of the smallest node's ranks on each.
    costs : Costs
    free_nbytes : int
        Memory of the node that has least, for each of its ranks; 0 where that is not known.
    noisy : bool
        Short collectives took many times the latency of the link: ranks wait for processors, and times are rough.
    seconds : float
        That measuring took.
    """

    cluster: Cluster
    costs: Costs
    free_nbytes: int
    noisy: bool
    seconds: float


class _Known:
    survey: Survey | None = None


def survey(comm: Comm, *, seconds: float = 1.0) -> Survey:
    """Return what the links and ranks of `comm` can do. Collective; measured once, and kept with the communicator.

    Parameters
    ----------
    seconds : float
        How long measuring may take, about: what has begun by then is finished.
    """
    known = kept_with(comm, _Known) if hasattr(type(comm), "Create_keyval") else _Known()
    if known.survey is None:
        known.survey = _measured(comm, seconds)
    return known.survey


def _measured(comm: Comm, seconds: float) -> Survey:
    began, nodes, rank = perf_counter(), nodes_of(comm), int(comm.Get_rank())

    def left() -> bool:
        """Tell whether there is time left; alike on all ranks, by the clock of rank 0. Collective."""
        answer = np.array([perf_counter() - began < seconds], np.int8)
        comm.Bcast(answer)
        return bool(answer[0])

    ranks = nodes.beside(rank)
    latency, speed = _link(comm, nodes, left)
    waits = _waits(comm, nodes, ranks)
    costs = _costs(comm)
    short = max((seconds for (_, among), seconds in waits.items() if among == "all"), default=0.0)
    cluster = Cluster(nodes.count, min(nodes.sizes), latency, speed, waits)
    free = -_slowest(comm, [-_free_nbytes() / len(ranks)])[0]
    spent = _slowest(comm, [perf_counter() - began])[0]
    return Survey(cluster, costs, int(free), nodes.count > 1 and short > _NOISY * latency, spent)


def _slowest(comm: Comm, values: list[float]) -> list[float]:
    """Return the largest of all ranks, of each of some numbers. Collective."""
    rows = np.empty((comm.Get_size(), len(values)))
    comm.Allgather(np.array(values, np.float64), rows)
    return rows.max(axis=0).tolist()  # type: ignore[no-any-return]


def _timed(comm: Comm, call: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of a call that all ranks make, those of the slowest of each repeat. Collective."""
    spent = []
    for _ in range(repeats):
        comm.Barrier()
        began = perf_counter()
        call()
        spent.append(perf_counter() - began)
    return _slowest(comm, spent)


def _link(comm: Any, nodes: Nodes, left: Callable[[], bool]) -> tuple[float, float]:
    """Return seconds of a short message between nodes, and bytes per second of their links, both ways busy. Collective.

    The first rank of every node sends to that of the next one, all at once, in pieces for which MPI does not ask whether
    they may come: the answer would wait behind what is sent. Least times, not means, and the two longest sizes, not a line
    through all: on busy machines these gave negative bandwidths, and a quarter of that of a link.
    """
    if nodes.count == 1 or not hasattr(comm, "Isend"):
        return 0.0, float("inf")
    firsts = [nodes.numbers.index(node) for node in range(nodes.count)]
    rank = int(comm.Get_rank())
    place = firsts.index(rank) if rank in firsts else None

    def least(nbytes: int, repeats: int) -> float:
        there, here = np.zeros(nbytes, np.uint8), np.empty(nbytes, np.uint8)

        def send() -> None:
            if place is not None:
                pieces = [slice(low, low + MESSAGE_NBYTES) for low in range(0, nbytes, MESSAGE_NBYTES)]
                requests = [comm.Irecv(here[piece], firsts[place - 1], _TAG) for piece in pieces]
                requests += [comm.Isend(there[piece], firsts[(place + 1) % len(firsts)], _TAG) for piece in pieces]
                for request in requests:
                    request.Wait()

        return min(_timed(comm, send, repeats))

    latency, nbytes = least(8, 9), _FIRST_NBYTES
    points = [(nbytes, least(nbytes, 3))]
    long = max(_LATENCIES * latency, _LONG_SECONDS)
    # Until two are long: buckets of tokens let the first 128 KiB of a message pass for nothing, at both ends of a cable.
    while sum(took >= long for _, took in points) < _LONG_ONES and nbytes < _LONGEST_NBYTES and left():
        nbytes *= 2
        points.append((nbytes, least(nbytes, 3)))
    (less, sooner), (more, later) = points[-2:] if len(points) > 1 else [(8, latency), *points]
    return latency, (more - less) / max(1e-9, later - sooner)


def _waits(comm: Any, nodes: Nodes, ranks: list[int]) -> dict[tuple[str, str], float]:
    """Return what short collectives take among all ranks, among one rank of each node, and inside of a node. Collective."""
    waits = _of_collectives(comm, comm, "all")
    if nodes.count > 1 and nodes.largest > 1 and hasattr(comm, "Split"):
        place, rank = ranks.index(int(comm.Get_rank())), int(comm.Get_rank())
        rail, node = comm.Split(place, rank), comm.Split(nodes.numbers[rank], rank)
        waits |= _of_collectives(comm, rail, "rail")
        waits["barrier", "node"] = median(_timed(comm, node.Barrier, _REPEATS))
        for part in (rail, node):
            if hasattr(part, "Free"):
                part.Free()
    return waits


def _of_collectives(comm: Comm, among: Any, name: str) -> dict[tuple[str, str], float]:
    n = int(among.Get_size())
    one, row = np.zeros(_SHORT_NBYTES, np.uint8), np.zeros((n, _SHORT_NBYTES), np.uint8)
    rows = np.zeros_like(row)
    calls: dict[str, Callable[[], Any]] = {"gather": lambda: among.Allgather(one, row),
                                           "scatter": lambda: among.Alltoall(row, rows)}
    return {(call, name): median(_timed(comm, calls[call], _REPEATS)) for call in calls}


def _costs(comm: Comm) -> Costs:
    """Return what computation takes with all ranks at it. Collective."""
    d = _ENTRIES
    x, e = np.random.default_rng(int(comm.Get_rank())).standard_normal((2, d), np.float32)
    kept, out = np.empty(d, np.float32), np.zeros(d, np.float32)
    sparse, signs = TopK(0.01, values=Quantize("bf16")).codec(d), Sign(block=4096).codec(d)

    def encode(codec: Codec, wire: Any) -> Callable[[], Any]:
        sent = lazy(x) + e
        return lambda: codec.encode(source(sent, Keep(sent, kept, less_message=True)), wire)

    def decode(codec: Codec, wire: Any) -> Callable[[], Any]:
        return lambda: codec.add(wire[None], out, 0.5)

    wires = [np.zeros(codec.nbytes, np.uint8) for codec in (sparse, signs)]
    calls: list[Callable[[], Any]] = [encode(sparse, wires[0]), decode(sparse, wires[0]), encode(signs, wires[1]),
                                      decode(signs, wires[1]), lambda: np.add(x, e, out=kept)]
    for compiled in calls:
        compiled()
    select, add, sign, unsign, summed = (min(_timed(comm, call, 3)) for call in calls)
    return Costs(select=select / d, decode=add / (d // 100), sign=sign / d, unsign=unsign / d,
                 memory_bytes_per_second=12 * d / summed, cores=comm.Get_size())


def _free_nbytes() -> float:
    """Return the memory that this node, or the control group of this process, has left; 0 where that is not known. Local."""
    left = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return float(min(left, default=0))
