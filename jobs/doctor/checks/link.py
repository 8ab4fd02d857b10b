"""What a message costs between two ranks of a node and between two nodes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

from mpi_ef.comm.protocol import MpiComm
from mpi_ef.jobs.doctor.checks.allreduce import MESSAGE_SECONDS, PENDING
from mpi_ef.jobs.doctor.finding import Facts, Findings, Placement, Ranks, finding
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
    found = [path for kind in ("infiniband", "cxi", "net") for path in sorted((system / kind).glob("*"))]
    return [path.name for path in found if path.parent.name != "net" or path.name.startswith(_FAST_DEVICES)]


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


def judge(ranks: Ranks) -> Findings:
    """Yield what messages cost, and those that did not arrive."""
    links = [link for one in ranks for link in one["links"]]
    for link in [link for link in links if "lost_nbytes" in link][:3]:
        (a, b), (node_a, node_b) = link["pair"], link["nodes"]
        yield finding("link-dead", (a, b), nbytes=link["lost_nbytes"], a=a, b=b, node_a=node_a, node_b=node_b,
                      seconds=MESSAGE_SECONDS)
    for kind, between in (("node", "within a node"), ("network", "between nodes")):
        good = [link for link in links if link["kind"] == kind and "lost_nbytes" not in link]
        if not good:
            continue
        latency, speed = (median(link[figure] for link in good) for figure in ("latency_seconds", "bytes_per_second"))
        devices = ranks[0]["devices"]
        slow = latency > 200e-6 if kind == "node" else devices and speed < 1.5e9
        many = f", median of {len(good)} pairs" if len(good) > 1 else ""
        figures = f"{between}: {1e6 * latency:.1f} us for a short message, {_speed(speed)}{many}"
        yield finding(f"{'slow' if slow else 'link'}-{kind}", figures=figures, devices=", ".join(devices[:3]))
        worst = next((link for link in good if link["bytes_per_second"] * 3 < speed), None)
        if worst:
            yield finding("slow-link", worst["pair"], place=" and ".join(dict.fromkeys(worst["nodes"])),
                          speed=_speed(worst["bytes_per_second"]), between=between, usual=_speed(speed))


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.0f} MB/s"
