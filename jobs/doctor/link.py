"""What a message costs between two ranks of a node and between two nodes; whether MPI moves data right at all."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from mpi_ef.jobs.doctor.finding import Finding, Spot, Told
from mpi_ef.jobs.doctor.roll import wait_for

__all__ = ["data_test", "judge_data", "judge_link", "measure_link", "pairs_of"]

_TAG = 7103
_SIZES = tuple(1 << power for power in (3, 13, 16, 19, 22))
_REPEATS = 7
_FAST_DEVICES = ("hsn", "ib", "opa", "hfi", "cxi", "efa", "roce")


def data_test(comm: Any, seconds: float) -> dict[str, Any]:
    """Sum numbers of all ranks, and tell whether the sum is right. Collective, for so many seconds at most."""
    n, rank = int(comm.Get_size()), int(comm.Get_rank())
    ramp = np.arange(100_000, dtype=np.float64)
    mine, total = ramp + rank, np.zeros_like(ramp)
    request = comm.Iallreduce(mine, total)
    if not wait_for(request.Test, seconds):
        _LEFT.append((request, mine, total))  # MPI may still write to it
        return {"late": True}
    return {"right": bool(np.array_equal(total, n * ramp + n * (n - 1) / 2))}


_LEFT: list[Any] = []


def judge_data(told: Sequence[Told], seconds: float) -> Iterator[Finding]:
    """Yield whether sums over all ranks are right."""
    late = [one for one in told if one["late"]]
    wrong = [one for one in told if one["right"] is False]
    if late:
        yield Finding(
            "Network",
            "allreduce",
            "error",
            f"a sum over all ranks (0.8 MB) had not arrived after {seconds:.0f} s",
            "MPI talks over a network that does not carry it: look at the links below; choose the network by "
            "UCX_NET_DEVICES, FI_PROVIDER and FI_TCP_IFACE, or OMPI_MCA_btl_tcp_if_include",
            tuple(one.rank for one in late) if len(late) < len(told) else (),
        )
    elif wrong:
        yield Finding(
            "Network",
            "allreduce",
            "error",
            "a sum over all ranks is wrong",
            "MPI or its network driver is broken: use another version, or OMPI_MCA_coll=^han, UCX_TLS=tcp,self,sm "
            "to find the part",
            tuple(one.rank for one in wrong),
        )
    elif len(told) > 1:
        yield Finding("Network", "allreduce", "ok", f"a sum over all {len(told)} ranks is right")


def pairs_of(spots: Sequence[Spot]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return whom to measure, in rounds in which no rank is part of two pairs: ("node" or "network", pairs of ranks)."""
    nodes: dict[str, list[int]] = {}
    for spot in sorted(spots, key=lambda spot: spot.rank):
        nodes.setdefault(spot.node, []).append(spot.rank)
    inside = [(ranks[0], ranks[1]) for ranks in nodes.values() if len(ranks) > 1]
    first = [ranks[0] for ranks in nodes.values()]
    chain = list(pairwise(first))
    rounds = [("node", inside), ("network", chain[::2]), ("network", chain[1::2])]
    return [(kind, pairs) for kind, pairs in rounds if pairs]


def measure_link(comm: Any, rounds: Sequence[tuple[str, Sequence[tuple[int, int]]]], seconds: float) -> dict[str, Any]:
    """Measure the pairs of which this rank is the first; the second takes part. For so many seconds a message at most.

    Returns
    -------
    dict
        "links": of every pair that begins with this rank, its kind, both ranks, latency and bytes per second, or how many
        bytes did not arrive.
    """
    rank, links = int(comm.Get_rank()), []
    for kind, pairs in rounds:
        for pair in pairs:
            if rank in pair:
                figures = _exchange(comm, pair[pair[0] == rank], seconds)
                if rank == pair[0]:
                    links.append({"kind": kind, "pair": pair, **figures})
    return {"links": links}


def _exchange(comm: Any, other: int, seconds: float) -> dict[str, float | int]:
    send, receive = np.ones(_SIZES[-1], np.uint8), np.ones(_SIZES[-1], np.uint8)
    times = []
    for nbytes in _SIZES:
        samples = []
        for _ in range(_REPEATS):
            began = perf_counter()
            requests = [comm.Irecv(receive[:nbytes], other, _TAG), comm.Isend(send[:nbytes], other, _TAG)]
            if not wait_for(lambda: all([request.Test() for request in requests]), seconds):  # noqa: B023, C419
                _LEFT.append((requests, send, receive))
                return {"lost_nbytes": nbytes}
            samples.append(perf_counter() - began)
        times.append(median(samples[1:]))
    # Relative errors count alike at all sizes: divide every equation by its time.
    columns = np.stack([np.ones(len(times)), np.array(_SIZES)], axis=1) / np.array(times)[:, None]
    (_, inverse), *_ = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)
    return {"latency_seconds": times[0], "bytes_per_second": 1.0 / max(1e-15, float(inverse))}


def judge_link(
    told: Sequence[Told], seconds: float, nodes: Mapping[int, str], net: Path = Path("/sys/class")
) -> Iterator[Finding]:
    """Yield what messages cost.

    Parameters
    ----------
    told : sequence of Told
        What `measure_link` has returned.
    seconds : float
        How long it has waited.
    nodes : mapping of int to str
        Node of every rank.
    net : Path
        Where the kernel lists network devices.
    """
    links = [link for one in told for link in one["links"] or ()]
    lost = [link for link in links if "lost_nbytes" in link]
    for link in lost[:3]:
        a, b = link["pair"]
        yield Finding(
            "Network",
            "link-dead",
            "error",
            f"{link['lost_nbytes']} bytes between rank {a} ({nodes[a]}) and rank {b} ({nodes[b]}) had not arrived "
            f"after {seconds:.0f} s",
            "leave the node out (sbatch --exclude=...) if it is one; else choose the network by UCX_NET_DEVICES, "
            "FI_PROVIDER and FI_TCP_IFACE, or OMPI_MCA_btl_tcp_if_include",
            (a, b),
        )
    for kind, words in (("node", "within a node"), ("network", "between nodes")):
        good = [link for link in links if link["kind"] == kind and "lost_nbytes" not in link]
        if good:
            yield from _judge_kind(kind, words, good, nodes, net)


def _judge_kind(
    kind: str, words: str, links: Sequence[Mapping[str, Any]], nodes: Mapping[int, str], net: Path
) -> Iterator[Finding]:
    speeds = sorted(float(link["bytes_per_second"]) for link in links)
    latency, speed = median(float(link["latency_seconds"]) for link in links), median(speeds)
    many = f", median of {len(links)} pairs" if len(links) > 1 else ""
    text = f"{words}: {1e6 * latency:.1f} us for a short message, {_speed(speed)}{many}"
    devices = _fast_devices(net)
    if kind == "network" and devices and speed < 1.5e9:
        yield Finding(
            "Network",
            "slow-network",
            "warning",
            f"{text}, although the node has {', '.join(devices[:3])}",
            "MPI seems to use TCP: load the site's MPI, built for this network, instead of one from the Python "
            "index; look at UCX_TLS, FI_PROVIDER, OMPI_MCA_pml",
        )
    elif kind == "node" and latency > 200e-6:
        yield Finding(
            "Network",
            "slow-node",
            "note",
            f"{text}; that is slow for shared memory",
            "are there more ranks than cores, or several bound to one? See above",
        )
    else:
        yield Finding("Network", f"link-{kind}", "ok", text)
    slow = [link for link in links if float(link["bytes_per_second"]) * 3 < speed]
    if slow:
        a, b = slow[0]["pair"]
        names = f"{nodes[a]} and {nodes[b]}" if kind == "network" else nodes[a]
        yield Finding(
            "Network",
            "slow-link",
            "warning",
            f"{names}: only {_speed(slow[0]['bytes_per_second'])} {words}; others have {_speed(speed)}",
            "one node may be ill or busy: run again, and leave it out (sbatch --exclude=...) if it stays so",
            (a, b),
        )


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.0f} MB/s"


def _fast_devices(net: Path) -> list[str]:
    """Return devices that are faster than Ethernet usually is."""
    found = []
    for kind in ("infiniband", "cxi"):
        if (net / kind).is_dir():
            found += sorted(path.name for path in (net / kind).iterdir())
    if (net / "net").is_dir():
        found += sorted(path.name for path in (net / "net").iterdir() if path.name.startswith(_FAST_DEVICES))
    return found
