"""What a message costs between two ranks of a node and between two nodes."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.doctor.checks.allreduce import MESSAGE_SECONDS, PENDING
from mpi_ef.jobs.doctor.finding import Finding, finding
from mpi_ef.jobs.doctor.ranks import Facts, Placement, Ranks
from mpi_ef.jobs.doctor.registry import Context
from mpi_ef.jobs.link_fit import fit_line
from mpi_ef.runtime.timeouts import wait_until

__all__ = ["collect", "fast_devices", "judge", "pairs_of"]

_TAG = 7103
_SIZES = tuple(1 << power for power in (3, 13, 16, 19, 22))
_REPEATS = 7
_FAST_DEVICES = ("hsn", "ib", "opa", "hfi", "cxi", "efa", "roce")


def pairs_of(placements: Sequence[Placement]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return the pairs to measure, in rounds in which no rank is part of two: ("node" or "network", pairs of ranks)."""
    nodes: dict[str, list[int]] = {}
    for placement in sorted(placements, key=lambda placement: placement.rank):
        nodes.setdefault(placement.node, []).append(placement.rank)
    inside = [(ranks[0], ranks[1]) for ranks in nodes.values() if len(ranks) > 1]
    chain = list(pairwise(ranks[0] for ranks in nodes.values()))
    rounds = [("node", inside), ("network", chain[::2]), ("network", chain[1::2])]
    return [(kind, pairs) for kind, pairs in rounds if pairs]


def collect(context: Context) -> Facts:
    """Measure the pairs of which this rank is the first; the second takes part. Collective.

    A pair that does not come together within `MESSAGE_SECONDS` stops at its first message, before the next round.
    """
    rank, links, complete = context.placement.rank, [], True
    for kind, pairs in pairs_of(context.placements):
        for pair in pairs:
            if rank in pair:
                figures = _exchange(context.world, pair[pair[0] == rank])
                complete = complete and "lost_nbytes" not in figures
                if rank == pair[0]:
                    nodes = [context.placements[member].node for member in pair]
                    links.append({"kind": kind, "pair": list(pair), "nodes": nodes, **figures})
    return {"links": links, "arrived": complete, "devices": fast_devices()}


def fast_devices(system: Path = Path("/sys/class")) -> list[str]:
    """Return network devices that are faster than Ethernet usually is. Local."""
    found = []
    for kind in ("infiniband", "cxi", "net"):
        names = sorted(path.name for path in (system / kind).iterdir()) if (system / kind).is_dir() else []
        found += [name for name in names if kind != "net" or name.startswith(_FAST_DEVICES)]
    return found


def _exchange(comm: MpiComm, other: int) -> dict[str, float | int]:
    import numpy as np

    send, receive = np.ones(_SIZES[-1], np.uint8), np.ones(_SIZES[-1], np.uint8)
    times = []
    for nbytes in _SIZES:
        samples = []
        for _ in range(_REPEATS):
            began = perf_counter()
            requests = [comm.Irecv(receive[:nbytes], other, _TAG), comm.Isend(send[:nbytes], other, _TAG)]
            if not wait_until(lambda: all([request.Test() for request in requests]), MESSAGE_SECONDS):  # noqa: B023, C419
                PENDING.append((requests, send, receive))
                return {"lost_nbytes": nbytes}
            samples.append(perf_counter() - began)
        times.append(median(samples[1:]))
    return {"latency_seconds": times[0], "bytes_per_second": fit_line(_SIZES, times)[1]}


def judge(ranks: Ranks) -> Iterator[Finding]:
    """Yield what messages cost, and those that did not arrive."""
    links = [link for one in ranks for link in one["links"]]
    for link in [link for link in links if "lost_nbytes" in link][:3]:
        (a, b), (node_a, node_b) = link["pair"], link["nodes"]
        fields = {"a": a, "b": b, "node_a": node_a, "node_b": node_b, "seconds": MESSAGE_SECONDS}
        yield finding("link-dead", (a, b), nbytes=link["lost_nbytes"], **fields)
    for kind, between in (("node", "within a node"), ("network", "between nodes")):
        good = [link for link in links if link["kind"] == kind and "lost_nbytes" not in link]
        if good:
            yield from _judge_kind(kind, between, good, ranks[0]["devices"])


def _judge_kind(
    kind: str, between: str, links: Sequence[Mapping[str, Any]], devices: Sequence[str]
) -> Iterator[Finding]:
    latency = median(float(link["latency_seconds"]) for link in links)
    speed = median(float(link["bytes_per_second"]) for link in links)
    many = f", median of {len(links)} pairs" if len(links) > 1 else ""
    key = "link-node" if kind == "node" else "link-network"
    if kind == "network" and devices and speed < 1.5e9:
        key = "slow-network"
    elif kind == "node" and latency > 200e-6:
        key = "slow-node"
    figures = f"{between}: {1e6 * latency:.1f} us for a short message, {_speed(speed)}{many}"
    yield finding(key, figures=figures, devices=", ".join(devices[:3]))
    slow = [link for link in links if float(link["bytes_per_second"]) * 3 < speed]
    if slow:
        place, own = " and ".join(dict.fromkeys(slow[0]["nodes"])), _speed(slow[0]["bytes_per_second"])
        yield finding("slow-link", slow[0]["pair"], place=place, speed=own, between=between, usual=_speed(speed))


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.0f} MB/s"
