"""What checkpoints cost beside plain files of the same size: ``mpiexec -n 2 mpi-ef bench checkpoint``.

All ranks write and read at once, in turns: files with open().write() and fsync, then checkpoints; files with read(), then
checkpoints with all checks. What is read was written just before, so it comes from memory, where checksums cost most.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from mpi_ef.comm.protocol import Comm
from mpi_ef.errors import CheckpointError, ConfigError
from mpi_ef.jobs.folder import by_first, write_whole
from mpi_ef.jobs.metrics import in_bytes
from mpi_ef.jobs.options import Checked, option, parse
from mpi_ef.runtime import launch

__all__ = ["CheckpointBenchConfig", "main", "measure"]

COPIES = 3  # replicated arrays as with Adam: parameters and two moments; and one error per rank
PAIRS = (("save", "write"), ("copy", "write"), ("readinto", "read"), ("load", "readinto"))
NAMES = {
    "write": "open().write() and fsync of as many bytes",
    "save": "Store.save",
    "copy": "Store.save_async, until it returns",
    "read": "open().read() of as many bytes",
    "readinto": "open().readinto() new arrays",
    "load": "Store.newest, then all arrays",
}


@dataclass(frozen=True)
class CheckpointBenchConfig(Checked):
    """Options of the benchmark; every field is a flag."""

    d: int = option(25_000_000, "parameters of the model, float32; three arrays of them are saved once, one by every rank",
                    1)
    repeats: int = option(5, "times each is measured, after one that does not count", 1)
    folder: Path = option(Path("runs/bench-checkpoint"), "where to write; is deleted afterwards, and must not exist")
    json: Path | None = option(None, "write all figures to this file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder.exists():
            raise ConfigError(f"folder={self.folder} exists, and would be deleted; name one that does not")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on COMM_WORLD."""
    config = parse(CheckpointBenchConfig, argv, prog="mpi-ef bench checkpoint", description=__doc__ or "")
    launch.run(lambda comm: run(comm, config))


def run(comm: Comm, config: CheckpointBenchConfig) -> None:
    """Measure, print, write. Collective."""
    result = measure(comm, config)
    if comm.Get_rank() == 0:
        shutil.rmtree(config.folder, ignore_errors=True)
        print(table(result))
        if config.json:
            write_whole(config.json, json.dumps(result, indent=1) + "\n")


def measure(comm: Comm, config: CheckpointBenchConfig) -> dict[str, Any]:
    """Return all figures as a JSON document; times are those of the slowest rank. Collective."""
    turns = _Turns(comm, config)
    calls: dict[str, Callable[[int], Any]] = {name: getattr(turns, name) for name in NAMES}
    seconds = np.zeros((len(calls), config.repeats + 1))
    for turn in range(config.repeats + 1):
        for number, (name, call) in enumerate(calls.items()):
            comm.Barrier()
            began = perf_counter()
            result = call(turn)
            seconds[number, turn] = perf_counter() - began
            if name == "load":
                turns.check(result)
            del result
            turns.store.finish(comm)
    turns.store.close()
    slowest = np.max(comm.allgather(seconds), axis=0)
    times = dict(zip(calls, slowest[:, 1:].tolist(), strict=True))
    return {
        "ranks": comm.Get_size(), "d": config.d, "repeats": config.repeats, "folder": str(config.folder),
        "written_nbytes": turns.written, "read_nbytes": 4 * config.d * (COPIES + 1), "seconds": times,
        "ratios": {name: median(times[name]) / median(times[beside]) for name, beside in PAIRS},
    }


class _Turns:
    """What is measured: every method but `check` is one entry of the table. Construction is collective."""

    def __init__(self, comm: Comm, config: CheckpointBenchConfig) -> None:
        from mpi_ef.checkpoint import Store

        self.comm, self.folder, self.rank = comm, config.folder, comm.Get_rank()
        rng, size, d = np.random.default_rng(0), comm.Get_size(), config.d
        self.shared = {f"copy {number}": rng.standard_normal(d, dtype=np.float32) for number in range(COPIES)}
        self.own = {"error": np.random.default_rng(self.rank + 1).standard_normal(d, dtype=np.float32)}
        self.stripe, self.written = COPIES * 4 * d // size, COPIES * 4 * d // size + 4 * d
        self.content = np.concatenate([*self.shared.values(), *self.own.values()]).view(np.uint8).data[: self.written]
        self.store = Store(config.folder / "checkpoints", keep_last=1)
        by_first(comm, self.folder, lambda: self.folder.mkdir(parents=True))  # not where another one has just done so

    def write(self, _turn: int) -> None:
        with (self.folder / f"plain-{self.rank}").open("wb", buffering=0) as file:
            done = 0
            while done < self.written:  # a call writes 2 GiB at most
                done += file.write(self.content[done:]) or 0
            os.fsync(file.fileno())

    def save(self, turn: int) -> None:
        self.store.save(self.comm, 2 * turn, replicated=self.shared, per_rank=self.own, document=None, rank_document=None)

    def copy(self, turn: int) -> None:
        self.store.save_async(self.comm, 2 * turn + 1, replicated=self.shared, per_rank=self.own, document=None,
                              rank_document=None)

    def read(self, _turn: int) -> list[bytes]:
        """As many bytes as loading brings: all that is shared, from the files of all ranks, and this rank's own."""
        pieces = []
        for path, wanted in self._plain():
            with path.open("rb", buffering=0) as file:
                left = wanted
                while left:
                    pieces.append(file.read(left))
                    left -= len(pieces[-1])
        return pieces

    def readinto(self, _turn: int) -> list[np.ndarray]:
        """Read the same into new arrays, where loading puts it: other memory than that of bytes, often of larger pages."""
        arrays = []
        for path, wanted in self._plain():
            arrays.append(np.empty(wanted, np.uint8))
            with path.open("rb", buffering=0) as file:
                done = 0
                while done < wanted:
                    done += file.readinto(arrays[-1][done:].data) or 0
        return arrays

    def _plain(self) -> Iterator[tuple[Path, int]]:
        """Yield files and how much to read of them."""
        for rank in range(self.comm.Get_size()):
            yield self.folder / f"plain-{rank}", self.written if rank == self.rank else self.stripe

    def load(self, _turn: int) -> list[np.ndarray]:
        found = self.store.newest(self.comm)
        if found is None:
            raise CheckpointError(f"bench: nothing to read in {self.folder}; choose another --folder")
        return [*(found.replicated(name) for name in self.shared), found.per_rank("error", self.rank)]

    def check(self, loaded: list[np.ndarray]) -> None:
        for array, wanted in zip(loaded, [*self.shared.values(), *self.own.values()], strict=True):
            if not np.array_equal(array, wanted):
                raise CheckpointError(f"bench: {self.folder} gave other numbers than were saved; this must not happen")


def table(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    writes, reads = in_bytes(result["written_nbytes"]), in_bytes(result["read_nbytes"])
    title = f"{result['ranks']} ranks, each writes {writes} and reads {reads}; medians of {result['repeats']}, slowest rank"
    lines = [title, "", f"{'':<44}{'ms':>8}{'min':>8}{'max':>8}{'ratio':>8}"]
    for name, text in NAMES.items():
        times, ratio = result["seconds"][name], result["ratios"].get(name, 1.0)
        figures = "".join(f"{1e3 * value:8.0f}" for value in (median(times), min(times), max(times)))
        lines.append(f"{text:<44}{figures}{ratio:8.2f}")
    return "\n".join(lines)
