"""Forecast what an exchange takes on a cluster, and what it moves over the link of a node, for more and more ranks.

By formulas, see docs/scaling.md: latencies, bytes of messages over bandwidth, and computation. Needs no MPI and no
cluster. What others do on links and nodes at the same time is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ef.documents import shown
from mpi_ef.errors import ConfigError, MpiEfError
from mpi_ef.jobs.metrics import in_bytes
from mpi_ef.jobs.options import Checked, option, parse

if TYPE_CHECKING:
    from mpi_ef.collectives.forecast import Forecast

__all__ = ["ScaleConfig", "forecasts", "main", "table"]

PICTURES = (".png", ".svg", ".pdf", ".jpg")
Forecasts = dict[str, list["Forecast"]]


@dataclass(frozen=True)
class ScaleConfig(Checked):
    """Options of the forecast; every field is a flag."""

    nodes: int = option(256, "the most nodes; the others are halves, quarters and so on of as many", 1)
    ranks_per_node: int = option(8, "ranks on each of them", 1)
    link: float = option(10.0, "Gbit/s of a node's link, each way, as messages see it", "(0, inf)")
    latency: float = option(10.0, "microseconds of a short message between nodes", "[0, inf)")
    d: int = option(100_000_000, "entries of the vector, float32: parameters of a model", 1)
    ratio: float = option(0.01, "share of entries that TopK keeps", "(0, 1]")
    values: str = option("bf16", "how it sends them", choices=("bf16", "float32"))
    reply: int | None = option(None, "how many times as many entries the second of two phases keeps", 1,
                               shown="4 up to 16 ranks, 8 on more")
    every: int = option(15, "steps for each exchange of local steps", 1)
    memory: float = option(12.0, "GB/s of memory that a rank gets", "(0, inf)")
    cores: int = option(16, "ranks of a node that get as much at the same time", 1)
    only: str | None = option(None, "show only plans whose names contain one of these words, separated by commas",
                              shown="all")
    picture: Path | None = option(None, "draw seconds and bytes to this file, .png, .svg, .pdf or .jpg")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.picture is not None and self.picture.suffix.lower() not in PICTURES:
            raise ConfigError(f"picture={self.picture} is no name of a picture; take one that ends in {', '.join(PICTURES)}")

    @property
    def counts(self) -> list[int]:
        """Numbers of nodes, the most last, but for a single rank."""
        counts = sorted({self.nodes >> halved for halved in range(self.nodes.bit_length())})
        return [count for count in counts if count * self.ranks_per_node > 1] or counts


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and draw the picture of ``--picture``."""
    config = parse(ScaleConfig, argv, prog="mpi-ef scale", description=__doc__ or "")
    try:
        found = forecasts(config)
        print(table(config, found))
        if config.picture is not None:
            from mpi_ef.jobs.scale.figures import draw

            draw([count * config.ranks_per_node for count in config.counts], found, _heading(config), config.picture)
    except MpiEfError as error:
        raise SystemExit(f"mpi-ef scale: {shown(error)}") from None


def forecasts(config: ScaleConfig) -> Forecasts:
    """Return the forecasts of every plan, one for each number of nodes. Local."""
    from dataclasses import replace

    from mpi_ef.collectives.forecast import PLANS, Cluster, Costs, Task, forecast
    from mpi_ef.compress import Quantize, TopK

    compressor = TopK(config.ratio, values=Quantize("bf16")) if config.values == "bf16" else TopK(config.ratio)
    reply = None if config.reply is None else replace(compressor, ratio=min(1.0, config.reply * config.ratio))
    task = Task(config.d, compressor, reply, config.every)
    costs = Costs(memory_bytes_per_second=1e9 * config.memory, cores=config.cores)
    latency, speed = 1e-6 * config.latency, 1e9 / 8 * config.link
    clusters = [Cluster(count, config.ranks_per_node, latency, speed) for count in config.counts]
    words = [word.strip() for word in (config.only or "").split(",") if word.strip()]
    for word in words:
        if not any(word in plan for plan in PLANS):
            raise ConfigError(f"only={word}: no plan has that in its name; take of {'; '.join(PLANS)}")
    plans = [plan for plan in PLANS if not words or any(word in plan for word in words)]
    return {plan: [forecast(plan, task, cluster, costs) for cluster in clusters] for plan in plans}


def table(config: ScaleConfig, found: Forecasts) -> str:
    """Return seconds, bytes on a link and buffers as text, a line for a plan, a column for a number of ranks."""
    ranks = [f"{count * config.ranks_per_node:,}" for count in config.counts]
    every_step = [plan for plan in found if not plan.startswith("local")]
    fastest = [min(every_step or found, key=lambda plan, n=n: found[plan][n].seconds) for n in range(len(ranks))]
    seconds = {plan: [_seconds(one.seconds) + ("*" if fastest[n] == plan else " ") for n, one in enumerate(of_plan)]
               for plan, of_plan in found.items()}
    links = {plan: [f"{in_bytes(one.link_nbytes)} " for one in of_plan] for plan, of_plan in found.items()}
    buffers = {plan: [f"{in_bytes(one.memory_nbytes)} " for one in of_plan] for plan, of_plan in found.items()}
    return "\n".join([
        _heading(config),
        *_lines(f"time of an exchange; local steps: of a step, one every {config.every} (*: least of the others)", ranks,
                seconds),
        *_lines("over the link of a node, each way", ranks, links),
        *_lines("buffers of a rank", ranks, buffers),
    ])


def _heading(config: ScaleConfig) -> str:
    reply = "4 times as many in a reply up to 16 ranks, 8 times on more" if config.reply is None else (
        f"{config.reply} times as many in a reply")
    ranks = f"{config.ranks_per_node} ranks" if config.ranks_per_node > 1 else "1 rank"
    return (f"{ranks} a node; {config.link:g} Gbit/s, {config.latency:g} us between nodes\n"
            f"d = {config.d:,} float32, TopK {100 * config.ratio:g} %, {config.values}; {reply}")


def _lines(title: str, ranks: Sequence[str], cells: dict[str, list[str]]) -> list[str]:
    name, width = max(map(len, cells)), max(10, *(len(cell) for row in cells.values() for cell in row)) + 1
    rows = [f"  {plan:<{name}}{''.join(f'{cell:>{width}}' for cell in row)}" for plan, row in cells.items()]
    return ["", title, f"  {'ranks':<{name}}{''.join(f'{rank:>{width - 1}} ' for rank in ranks)}", *rows]


def _seconds(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if factor * seconds >= 1:
            return f"{factor * seconds:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us"


if __name__ == "__main__":
    main()
