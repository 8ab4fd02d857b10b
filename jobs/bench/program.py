"""Measure every plan and rule against dense allreduce on this machine, alternating: ``mpiexec -n 2 mpi-ef bench``.

Says where compression pays: it fits latency and bandwidth of the link between the ranks, and prints the bandwidth below
which each method beats the fastest dense one. With --device the vectors are on the GPU of each rank.
``mpi-ef bench checkpoint`` measures saving and loading.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mpi_ef.comm.nodes import nodes_of
from mpi_ef.comm.protocol import MpiComm
from mpi_ef.documents import read_json, shown, shown_lines
from mpi_ef.errors import ConfigError, DataError, MpiEfError, everywhere
from mpi_ef.jobs.bench.table import Link, Row, check, combine, plot, table
from mpi_ef.jobs.folder import write_whole
from mpi_ef.jobs.link_fit import of_ends
from mpi_ef.jobs.methods import methods_in
from mpi_ef.jobs.metrics import announcing, made_here
from mpi_ef.jobs.options import Checked, check_device, option, parse
from mpi_ef.jobs.visible import count_once
from mpi_ef.runtime import launch

__all__ = ["BenchConfig", "main", "measure"]

PICTURES = (".png", ".svg", ".pdf", ".jpg")
VECTORS = 3  # that take turns, so that the same entries are not selected again and again


@dataclass(frozen=True)
class BenchConfig(Checked):
    """Options of the benchmark; every field is a flag."""

    d: int | None = option(None, "entries of the vector, float32", "[100, inf)", shown="25000000")
    ratio: float | None = option(None, "share of entries that topk keeps", "(0, 1]", shown="0.01")
    repeats: int | None = option(None, "times each method is measured", 1, shown="9")
    only: str | None = option(None, "measure only methods whose names contain one of these words, separated by commas",
                              shown="all")
    methods: str | None = option(
        None, "measure these beside dense ones: RULE COMPRESSOR, or RULE COMPRESSOR PLAN, separated by semicolons, such as "
        "'econtrol(eta=0.1) TopK(0.05); ef14 my_module:Mine(3) TwoPhaseMean'", shown="the list that --only is about"
    )
    device: str | None = option(
        None, "where vectors are: auto is the GPU for this rank, shared where there are fewer, and the CPU without any; "
        "cuda the same, but no CPU; cuda:0 that one on every rank", shown="cpu", choices=("auto", "cpu", "cuda"),
        others="cuda:NUMBER")
    json: Path | None = option(None, "write all figures to this file")
    plot: Path | None = option(None, "draw them to this picture, .png, .svg, .pdf or .jpg")
    combine: str = option("", "no measurement: medians over the launches in these JSON files, separated by commas")

    def __post_init__(self) -> None:
        super().__post_init__()
        measuring = {name: getattr(self, name) for name in ("d", "ratio", "repeats", "only", "methods", "device")}
        for name, value in measuring.items():
            if self.combine and value is not None:
                raise ConfigError(f"{name}={value} has no effect with combine, which measures nothing")
        for name in ("ratio", "only"):
            if self.methods is not None and measuring[name] is not None:
                raise ConfigError(f"{name}={measuring[name]} has no effect with methods, which says what is measured")
        methods_in(self.methods)
        check_device(self.device)
        if self.plot is not None and self.plot.suffix.lower() not in PICTURES:
            raise ConfigError(f"plot={self.plot} is no name of a picture; take one that ends in {', '.join(PICTURES)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on COMM_WORLD, or put the results of several launches together; or that of checkpoints."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["checkpoint"]:
        from mpi_ef.jobs.bench import checkpoint as bench_checkpoint

        bench_checkpoint.main(arguments[1:])
        return
    config = parse(BenchConfig, arguments, prog="mpi-ef bench", description=__doc__ or "")
    if config.combine:
        try:
            show(config, combine([read(Path(name)) for name in config.combine.split(",")]))
        except MpiEfError as error:
            raise SystemExit(f"mpi-ef: {shown(error)}") from None
    else:
        count_once(os.environ)
        launch.run(lambda comm: run(comm, config))


def run(comm: MpiComm, config: BenchConfig) -> None:
    """Measure, print, write. Collective."""
    with announcing(comm):
        result = measure(comm, config)
    if comm.Get_rank() == 0:
        show(config, result)


def show(config: BenchConfig, result: dict[str, Any]) -> None:
    """Print the table, and write the files of ``--json`` and ``--plot``."""
    print(shown_lines(table(result)))
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    if config.plot:
        plot(result, config.plot)


def read(path: Path) -> dict[str, Any]:
    """Return what a launch has written with ``--json``."""
    try:
        result: dict[str, Any] = read_json(path, follow=True)
        check(result)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no result of mpi-ef bench ({error}); write one with --json") from None
    return result


def measure(comm: MpiComm, config: BenchConfig) -> dict[str, Any]:
    """Return all figures as a JSON document; times are those of the slowest rank. Collective.

    Every method is called once in each round, with the same vector in all of a round, after a barrier; the first two
    rounds do not count. A device has done everything before a call, and after it, when the time is taken.
    """
    import numpy as np
    from mpi4py import MPI

    from mpi_ef.jobs.bench.methods import memory_of_ef21, methods
    from mpi_ef.jobs.bench.place import Place
    from mpi_ef.jobs.bench.traffic import Counting, counted
    from mpi_ef.jobs.device import described, device_for

    d, ratio, repeats = config.d or 25_000_000, config.ratio or 0.01, config.repeats or 9
    place = Place(device_for(comm, config.device or "cpu", "bench"))
    devices = described(comm, place.device, place.name)
    on_host = comm.allreduce(int(place.on_host), MPI.MIN)  # of all ranks: they measure the same
    rng = np.random.default_rng(comm.Get_rank())
    vectors = [place.kernels.place(rng.standard_normal(d, dtype=np.float32)) for _ in range(VECTORS)]
    wanted = [word.strip() for word in (config.only or "").split(",") if word.strip()]
    counting = Counting(comm)
    added = None if on_host or config.methods else memory_of_ef21(comm, d, ratio, place, vectors)
    every = list(methods(counting, d, ratio, methods_in(config.methods), None if on_host else place))
    _check_words(wanted, [m.name for m in every])
    chosen = [m for m in every if not wanted or m.kind == "dense" or any(word in m.name for word in wanted)]
    seconds, messages = np.zeros((len(chosen), repeats + 2)), [0] * len(chosen)
    for turn in range(repeats + 2):
        x = vectors[turn % VECTORS]
        for number, method in enumerate(chosen):
            if turn == 2:
                method.clock.update(dict.fromkeys(method.clock, 0.0))
            before = counting.messages
            place.synchronise()
            comm.Barrier()
            began = perf_counter()
            method.call(x)
            place.synchronise()
            seconds[number, turn] = perf_counter() - began
            messages[number] = counting.messages - before
    mine = seconds[:, 2:].sum(axis=1).tolist()
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    link = fit_link(comm)
    rows = []
    for method, whole, times, sent in zip(chosen, mine, seconds[:, 2:].tolist(), messages, strict=True):
        local = touched = None
        if method.clock:  # a device computes while the host goes on: all that is not communication
            spent = method.clock["encode"] + method.clock["decode"] if on_host else whole - method.clock["communicate"]
            local = comm.allreduce(spent / repeats, MPI.MAX)
        if on_host and method.plan is not None and method.kind == "compressed":
            with counted() as traffic:
                method.call(vectors[0])
            touched = traffic.total() / d
        rows.append(Row(method.name, method.kind, median(times), min(times), max(times), method.sent_nbytes,
                        method.entry_bits, method.index_bits, local, touched, sent, method.link_nbytes))
    return {
        "ranks": comm.Get_size(), "nodes": nodes_of(comm).count, "d": d, "ratio": ratio, "repeats": repeats, "launches": 1,
        "mpi": " ".join(MPI.Get_library_version().split("\x00")[0].splitlines()[0].split(",")[0].split()),
        **made_here(comm), "devices": devices, **_memory(comm, added), "link": asdict(link),
        "rows": [asdict(row) for row in rows],
    }


def _memory(comm: MpiComm, added: float | None) -> dict[str, float]:
    """Return what EF21 adds on the device where it takes most, for the document; nothing where it was not measured."""
    most = max((vectors for vectors in comm.allgather(added) if vectors is not None), default=None)
    return {} if most is None else {"ef21_memory_vectors": most}


def _check_words(wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raise on all ranks when a word of --only is in no name."""
    for word in wanted:
        if not any(word in name for name in names):
            raise everywhere(ConfigError(f"only={word}: no method has that in its name; take of {', '.join(names)}"))


def fit_link(comm: MpiComm) -> Link:
    """Return latency and bandwidth between neighbours, all ranks sending at once. Collective.

    From the least times: what a busy machine adds is no property of a link.
    """
    import numpy as np
    from mpi4py import MPI

    size, rank = comm.Get_size(), comm.Get_rank()
    sizes = [1 << power for power in range(10, 25, 2)]
    send, receive = np.ones(sizes[-1], np.uint8), np.ones(sizes[-1], np.uint8)
    times = np.zeros((len(sizes), 9))
    for (n, turn), _ in np.ndenumerate(times):
        nbytes = sizes[n]
        comm.Barrier()
        began = perf_counter()
        comm.Sendrecv(send[:nbytes], (rank + 1) % size, recvbuf=receive[:nbytes], source=(rank - 1) % size)
        times[n, turn] = perf_counter() - began
    comm.Allreduce(MPI.IN_PLACE, times, MPI.MAX)
    return Link(*of_ends(sizes, times.min(axis=1).tolist()))


if __name__ == "__main__":
    main()
