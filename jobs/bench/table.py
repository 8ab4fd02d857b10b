"""The table and the picture of the benchmark, and medians over several launches."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mpi_ef.errors import DataError, briefly
from mpi_ef.jobs.metrics import in_bytes, is_number

__all__ = ["COPIED", "EF21_ENCODE", "SIGNS_ENCODE", "TORCH_ADD", "TORCH_SUB", "TORCH_TOPK", "Link", "Row", "break_even",
           "check", "combine", "plot", "table"]

# Methods with vectors on a device.
COPIED = "MPI_Allreduce and copies"  # to the host before, to the device afterwards
EF21_ENCODE, SIGNS_ENCODE = "EF21: select from a - b and code", "signs: code a - b, keep the rest"
TORCH_SUB, TORCH_TOPK, TORCH_ADD = "torch.sub(a, b, out=c)", "torch.topk(c.abs(), k)", "torch.add(a, b, out=c)"
# What beside what, and how much of its time it should take at most: on an H100, 25 million entries, 1 % of them kept.
GOALS = ((EF21_ENCODE, TORCH_SUB, 6.0), (EF21_ENCODE, TORCH_TOPK, 0.25), (SIGNS_ENCODE, TORCH_ADD, 3.0),
         ("ef21 TopK(", COPIED, 0.1))
MEMORY_GOAL = 2.2  # vectors: g_i, g, wires, candidates


@dataclass(frozen=True)
class Link:
    """What a message costs between neighbours: ``latency_seconds + nbytes / bytes_per_second``."""

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Row:
    """Figures of one method; seconds of the slowest rank."""

    name: str
    kind: str
    median_seconds: float
    min_seconds: float
    max_seconds: float
    sent_nbytes: int
    entry_bits: float | None
    index_bits: float | None
    local_seconds: float | None  # of computation, as measured: outside of communication
    touched_bytes: float | None  # memory that the kernels of a step stream through, per entry, by :mod:`.traffic`
    messages: int = 0  # that a rank sends one after the other; files of earlier versions do not say
    link_nbytes: int | None = None  # that come over the link of a node; None for what no plan sends, and in such files

    def on(self, link: Link) -> float:
        """Return its seconds on a link by the model: computation, messages times latency, bytes over bandwidth."""
        return (self.local_seconds or 0.0) + self.messages * link.latency_seconds + self.sent_nbytes / link.bytes_per_second


def check(result: Any) -> None:
    """Raise `ValueError` unless a document is a result of the benchmark, of one launch or of several. Local."""
    try:
        rows, link = [Row(**row) for row in result["rows"]], Link(**result["link"])
        counts = [*(result[name] for name in ("ranks", "d", "repeats", "launches")), result.get("nodes", 1)]
        devices = result.get("devices", {"": ""})
        texts = [result["mpi"], *(text for row in rows for text in (row.name, row.kind)), *devices, *devices.values()]
        added = result.get("ef21_memory_vectors", 0.0)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{briefly(error)}") from None
    numbers = [added, link.latency_seconds, *(number for row in rows for number in (
        row.min_seconds, row.max_seconds, row.sent_nbytes))]
    divisors = [*counts, link.bytes_per_second, *(row.median_seconds for row in rows)]
    open_ones = [number for row in rows for number in (row.entry_bits, row.index_bits, row.local_seconds,
                                                            row.touched_bytes, row.link_nbytes)]
    if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts) or devices == {}:
        raise ValueError("names or counts are of wrong types")
    if not all(map(is_number, numbers)) or not all(is_number(number) and number > 0 for number in divisors):
        raise ValueError("figures are no numbers above zero")
    if not all(number is None or is_number(number) for number in open_ones):
        raise ValueError("figures are neither numbers nor null")
    if not any(row.kind == "dense" and row.name.startswith("MPI") for row in rows):
        raise ValueError("there is no row of MPI_Allreduce")


def break_even(row: Row, dense: Row, link: Link) -> float | None:
    """Return the bandwidth in bytes per second below which `row` beats `dense`; None where it does at any bandwidth.

    The latency is that of `link`, the times are those of :meth:`Row.on`. What was measured beyond them, such as waiting, is
    computation of neither: that of a method which does not measure it is 0. But which of the two was faster on `link` is
    known: the bandwidth is not above that of `link` where `row` was slower there, and not below where it was faster.
    """
    saved = dense.sent_nbytes - row.sent_nbytes
    if row.local_seconds is None or saved < 0:
        return 0.0
    here, free = link.bytes_per_second, Link(link.latency_seconds, float("inf"))
    slower = row.on(free) - dense.on(free)
    if row.median_seconds > dense.median_seconds:
        return min(here, saved / slower) if slower > 0 else here if saved else 0.0
    return max(here, saved / slower) if slower > 0 else None


def _parts(result: dict[str, Any]) -> tuple[list[Row], Row, Row, Row, Link]:
    """Return all rows, MPI_Allreduce, the faster of MPI's own, the fastest dense one, the link."""
    rows = [Row(**row) for row in result["rows"]]
    dense = [row for row in rows if row.kind == "dense"]
    library = min((row for row in dense if row.name.startswith("MPI")), key=lambda row: row.median_seconds)
    return rows, dense[0], library, min(dense, key=lambda row: row.median_seconds), Link(**result["link"])


def table(result: dict[str, Any]) -> str:
    """Return all figures as text."""
    rows, plain, library, best, link = _parts(result)
    reading = next((row.median_seconds for row in rows if row.name.startswith("read the vector")), None)
    width = max(len(row.name) for row in rows)
    launches = f"{result['launches']} launches" if result["launches"] > 1 else "1 launch"
    ranks = f"{result['ranks']} ranks" + (f" on {result['nodes']} nodes" if result.get("nodes", 1) > 1 else "")
    title = f"{result['mpi']}, {ranks}, d = {result['d']:,} float32, {launches} of {result['repeats']}"
    speed = f"{1e6 * link.latency_seconds:.1f} us + {link.bytes_per_second / 1e9:.2f} GB/s"
    edge = f"  {'':<{width}}"
    lines = [
        f"{title} rounds: medians, slowest rank",
        *(f"vectors on {text} ({ranks})" for text, ranks in result.get("devices", {}).items()),
        f"link: {speed}",
        "",
        f"{edge}     ms     min     max  against  against  against  reads                                  bytes    pays",
        f"{edge}                      Allreduce best MPI  fastest  of x     sent   a node  bits/entry   touched   below",
    ]
    kind = ""
    for row in rows:
        if row.kind != kind:
            kind = row.kind
            lines.append({"local": "without communication", "alternative": "as one would write it"}.get(kind, kind))
        times = (row.median_seconds, row.min_seconds, row.max_seconds)
        line = f"  {row.name:<{width}}" + "".join(f"{_milliseconds(seconds):>8}" for seconds in times)
        ratios = "".join(f"{other.median_seconds / row.median_seconds:8.2f}x" for other in (plain, library, best))
        line += f"{'':27}" if kind == "local" else ratios
        line += f"{row.median_seconds / reading:7.1f}" if reading else f"{'':7}"
        if kind != "local":
            line += f"{in_bytes(row.sent_nbytes):>9}{'-' if row.link_nbytes is None else in_bytes(row.link_nbytes):>9}"
        if row.entry_bits is not None:
            line += f"  {row.entry_bits:5.1f}" + (f" ({row.index_bits:4.1f})" if row.index_bits else f"{'':7}")
        if row.touched_bytes is not None:
            line += f"{row.touched_bytes:7.1f}" + (f" ({_share(row, reading):4.0%})" if reading else "")
        if kind == "compressed":
            line += f" {_verdict(break_even(row, best, link)):>12}"
        lines.append(line.rstrip())
    lines += [
        *_beside(rows, result.get("ef21_memory_vectors")),
        "",
        "against: how many times faster than MPI_Allreduce, than the faster of MPI's two, than the fastest dense one;",
        "reads of x: the time as a multiple of reading the vector once; sent: by a rank; a node: over its link, each",
        "way; bits/entry: on the wire (of these for the index);",
        "bytes touched per entry of the vector (share of the time that only reading them would take);",
        f"pays below: on links of this latency and less bandwidth it beats {best.name}: each by its computation, messages",
        "times latency, and bytes over bandwidth; on this link as measured",
    ]
    return "\n".join(lines)


def _beside(rows: list[Row], added: float | None) -> list[str]:
    """Return lines on what is measured on a device beside something else, and on its memory."""
    lines = []
    for name, other, goal in GOALS:
        one, another = (next((row for row in rows if row.name.startswith(start)), None) for start in (name, other))
        if one is not None and another is not None:
            ratio = one.median_seconds / another.median_seconds
            lines.append(f"  {one.name}: {ratio:.2f} of the time of {other}; goal: {goal}")
    if added is not None:
        lines.append(f"  EF21 adds {added:.2f} vectors in memory of the device; goal: {MEMORY_GOAL}")
    heading = "on the device (goals are for an H100, 25 million entries, 1 %)"
    return ["", heading, *lines] if lines else []


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds >= 1e-3 else f"{1e3 * seconds:.4f}"


def _share(row: Row, reading: float) -> float:
    """Return how much of a step's time it would take to read as many bytes as it touches."""
    return (row.touched_bytes or 0.0) / 4 * reading / row.median_seconds


def _verdict(limit: float | None) -> str:
    if limit is None:
        return "any link"
    return f"{8 * limit / 1e9:.1f} Gbit/s" if limit else "never"


def combine(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over several launches of the same measurement; minimum and maximum over all of them."""
    first = results[0]
    for number, other in enumerate(results[1:], 1):
        if other in results[:number]:
            raise DataError("bench: one launch is there twice, in one file or in two; combine different ones")
        for key in ("ranks", "d", "ratio", "repeats", "mpi", "devices"):
            if key in other and key in first and other[key] != first[key]:  # earlier versions have not recorded devices
                raise DataError(f"bench: launches differ in {key}: {first[key]} and {other[key]}; combine equal ones")
        if [row["name"] for row in other["rows"]] != [row["name"] for row in first["rows"]]:
            raise DataError("bench: launches measured different methods; combine those with the same --only")
    rows = []
    for same in zip(*(result["rows"] for result in results), strict=True):
        row = dict(same[0])
        for name, choose in (("median_seconds", median), ("min_seconds", min), ("max_seconds", max)):
            row[name] = choose(other[name] for other in same)
        if row["local_seconds"] is not None:
            row["local_seconds"] = median(other["local_seconds"] for other in same)
        rows.append(row)
    link = {name: median(result["link"][name] for result in results) for name in first["link"]}
    return first | {"rows": rows, "link": link, "launches": sum(result["launches"] for result in results)}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the times here, and what they would be on links of other bandwidths.

    Raises
    ------
    DataError
        When matplotlib is not installed.
    """
    from mpi_ef.jobs.figures import pyplot, save, spread

    plt = pyplot()
    rows, _, _, best, link = _parts(result)
    figure, (here, elsewhere) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    shown = [row for row in rows if row.kind != "local"][::-1]
    colours = {"dense": "tab:gray", "compressed": "tab:blue", "alternative": "tab:orange"}
    for place, row in enumerate(shown):
        milliseconds = 1e3 * row.median_seconds
        here.plot([1e3 * row.min_seconds, 1e3 * row.max_seconds], [place, place], color=colours[row.kind], lw=1)
        here.plot([milliseconds], [place], "o", color=colours[row.kind])
        here.annotate(f"{milliseconds:.3g}", (milliseconds, place), (0, 5), textcoords="offset points", fontsize=8)
    here.set(xlabel=f"milliseconds, d = {result['d']:,}, {result['ranks']} ranks",
             yticks=range(len(shown)), yticklabels=[row.name for row in shown])
    spread(here.xaxis, 1e3 * min(row.min_seconds for row in shown), 1e3 * max(row.max_seconds for row in shown))
    here.grid(visible=True, alpha=0.3)
    here.margins(x=0.1)
    bandwidths = [10 ** (power / 20) for power in range(120, 221)]
    for row in rows:
        if row.local_seconds is None and row is not best:
            continue
        seconds = [row.on(Link(link.latency_seconds, b)) for b in bandwidths]
        elsewhere.plot([8e-9 * b for b in bandwidths], [1e3 * s for s in seconds], label=row.name,
                       color="black" if row is best else None, lw=2.5 if row is best else 1.2)
    elsewhere.axvline(8e-9 * link.bytes_per_second, color="tab:gray", ls=":")
    elsewhere.set(yscale="log", xlabel="bandwidth of a link, Gbit/s (dotted: this one)",
                  ylabel="milliseconds, by the model")
    spread(elsewhere.xaxis, 8e-9 * bandwidths[0], 8e-9 * bandwidths[-1])
    elsewhere.legend(fontsize=7)
    elsewhere.grid(visible=True, alpha=0.3)
    save(figure, path)
