"""Look at checkpoints, compare them, hand them on: ``mpi-ef checkpoint ls RUN``. Needs no MPI; runs on a login node.

A RUN is a folder of checkpoints, or the --out folder of a run that has one; where one CHECKPOINT is asked for, either
stands for the newest in it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ef.documents import parse_json, shown
from mpi_ef.errors import CheckpointError, MpiEfError
from mpi_ef.jobs.metrics import in_bytes
from mpi_ef.jobs.options import refuse

if TYPE_CHECKING:
    from mpi_ef.checkpoint import Checkpoint

__all__ = ["Found", "found_in", "main"]

_MEMORY = 2 << 30  # bytes of address space of a process that reads what nobody trusts
_SECONDS, _RATE = 60, 20e6  # its time on the processor: so long, and for each byte as if it read 20 MB/s
_APART = """
import resource, sys
limits = dict(zip(("AS", "CPU", "FSIZE", "CORE"), (int(sys.argv[1]), int(sys.argv[2]), 0, 0)))
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
from mpi_ef.jobs.checkpoint import main
main(["verify", "--json", sys.argv[3]])
"""
_BLOCK = 1 << 20  # entries
_NAME = re.compile(r"step-(\d+)|\.(tmp|old)-step-(\d+)-.*")


@dataclass(frozen=True)
class Found:
    """A directory in a folder of checkpoints."""

    path: str
    step: int
    state: str  # whole: all files have their sizes; damaged, unreadable, unfinished; replaced: by another of the same step
    reason: str = ""  # what is wrong
    world_size: int | None = None
    nbytes: int | None = None
    written_at: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the tools. Exit status 0; 1 where something is damaged or differs; 2 for what cannot be done."""
    arguments = _parser().parse_args(argv)
    try:
        sys.exit(arguments.tool(arguments))
    except (MpiEfError, OSError) as error:
        refuse(error)
    except MemoryError:
        refuse("there is not enough memory for what the checkpoint declares; use another one")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpi-ef checkpoint", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = parser.add_subparsers(required=True, metavar="TOOL")

    def tool(function: Any, name: str, text: str, **places: Any) -> argparse.ArgumentParser:
        added = tools.add_parser(name, help=text, description=text)
        for place, settings in places.items():
            added.add_argument(place.lower(), type=Path, metavar=place, **settings)
        added.set_defaults(tool=function)
        return added

    listing = tool(_ls, "ls", "list what is in a folder of checkpoints", RUN={})
    verify = tool(_verify, "verify", "read every byte and compare checksums; status 1 if any is damaged",
                  PATH={"nargs": "+", "help": "a checkpoint, or a run: all of its checkpoints"})
    verify.add_argument("--untrusted", action="store_true",
                        help="read each in a process of its own, with limits on memory and time: for those of strangers")
    inspect = tool(_inspect, "inspect", "tell what a checkpoint holds", CHECKPOINT={})
    inspect.add_argument("--rank", type=int, default=0, help="whose own arrays to show (default: 0)")
    inspect.add_argument("--values", action="store_true", help="read all arrays: norms, extremes, NaN and Inf")
    diff = tool(_diff, "diff", "compare two checkpoints; status 1 if more than run, times, versions differs", A={}, B={})
    for each in (listing, verify, inspect, diff):
        each.add_argument("--json", action="store_true", help="print JSON")
    out = tool(_export, "export", "write one file for other programs: .safetensors or plain HDF5",
               CHECKPOINT={}, FILE={"help": "its name ends in .safetensors or .h5"})
    out.add_argument("--all", action="store_true", help="all arrays, also of the optimizer and of every rank")
    return parser


def _folder(path: Path) -> Path:
    inside = path / "checkpoints"
    return inside if inside.is_dir() else path


def found_in(folder: Path) -> list[Found]:
    """Return what is in a folder of checkpoints, by step; raise `CheckpointError` if it cannot be read. Local."""
    try:
        paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}; give a folder of checkpoints or the --out of a run") from None
    found = [(path, _found(path)) for path in paths]
    there = [each for path, each in found if each.state == "whole" or os.path.lexists(path)]  # its run removes old ones
    return sorted(there, key=lambda each: (each.step, each.path))


def _found(path: Path) -> Found:
    from mpi_ef.checkpoint import open_checkpoint
    from mpi_ef.checkpoint.manifest import mark_of

    match = _NAME.fullmatch(path.name)
    assert match is not None  # noqa: S101
    step, kind = int(match[1] or match[3]), match[2]
    if kind == "tmp":
        return Found(str(path), step, "unfinished", "is being written, or was when its job ended")
    try:
        opened = open_checkpoint(path)
    except CheckpointError as error:
        text = str(error).removeprefix(f"{shown(path)}: ").removesuffix("; use another checkpoint")
        return Found(str(path), step, "damaged" if error.damaged else "unreadable", text.removeprefix("damaged: "))
    state, reason = ("replaced", "") if kind else ("whole", "")
    if (marked := mark_of(path)) is not None:
        state, reason = "damaged", marked
    return Found(str(path), step, state, reason, opened.world_size, opened.nbytes, opened.written_at)


def _is_checkpoint(path: Path) -> bool:
    """Return whether this is one, or was to be one, and not a folder of them; its name may be another one."""
    return (path / "master.json").exists() or _NAME.fullmatch(path.name) is not None


def _checkpoints(path: Path, *states: str) -> list[Path]:
    """Return this checkpoint, or those of a run that are in one of these states."""
    if _is_checkpoint(path):
        return [path]
    if paths := [Path(found.path) for found in found_in(_folder(path)) if found.state in states]:
        return paths
    raise CheckpointError(f"{path}: has no checkpoint; mpi-ef checkpoint ls tells what is there")


def _opened(path: Path) -> "Checkpoint":
    """Return this checkpoint, or the newest of a run."""
    from mpi_ef.checkpoint import open_checkpoint

    return open_checkpoint(_checkpoints(path, "whole", "replaced")[-1])


def _ls(arguments: argparse.Namespace) -> int:
    every = found_in(_folder(arguments.run))
    if arguments.json:
        print(json.dumps([asdict(found) for found in every], indent=1))
        return 0
    rows = [("step", "ranks", "size", "written (UTC)", "state")]
    for found in every:
        size = "" if found.nbytes is None else in_bytes(found.nbytes)
        state = f"{found.state}: {found.reason}" if found.reason else found.state
        when = (found.written_at or "").replace("T", " ").removesuffix("+00:00")
        rows.append((str(found.step), str(found.world_size or ""), size, when, state))
    print(_aligned(rows, left=2) if every else f"{shown(_folder(arguments.run))}: no checkpoints")
    return 0


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Return rows in columns, the last `left` ones at the left of theirs, the others at the right."""
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    turn = len(widths) - left
    return "\n".join(
        "  ".join(cell.ljust(w) if i >= turn else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip() for row in rows
    )


def _verify(arguments: argparse.Namespace) -> int:
    from mpi_ef.checkpoint.folder import identity

    rows: list[dict[str, Any]] = []
    for path in arguments.path:
        paths = _checkpoints(path, "whole", "replaced", "damaged", "unreadable")
        for each, seen in [(each, identity(each)) for each in paths]:
            row = _verified_apart(each) if arguments.untrusted else _verified(each)
            if row["problems"] and identity(each) != seen:  # what its run has removed or replaced is not damaged
                if not arguments.json:
                    print(f"{shown(each)}: its run has removed or replaced it meanwhile", flush=True)
                continue
            rows.append(row)
            if arguments.json:
                continue
            if not row["problems"]:
                print(f"{shown(each)}: good, {in_bytes(row['nbytes'])} read in {row['seconds']:.1f} s", flush=True)
            for problem in row["problems"]:
                print(shown(f"{each}: BAD: {problem}"), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["problems"] for row in rows))


def _verified(path: Path) -> dict[str, Any]:
    from mpi_ef.checkpoint import open_checkpoint
    from mpi_ef.checkpoint.manifest import BAD, mark_of

    began, nbytes = time.perf_counter(), 0
    try:
        opened = open_checkpoint(path)
        nbytes, problems = opened.nbytes, opened.verify()
    except CheckpointError as error:
        problems = [str(error)]
    if mark_of(path) is not None and not problems:
        problems = [f"every byte is what was written, but it is marked; nothing resumes from it before {BAD} is removed"]
    return {"path": str(path), "nbytes": nbytes, "seconds": time.perf_counter() - began, "problems": problems}


def _verified_apart(path: Path) -> dict[str, Any]:
    """Return what :func:`_verified` returns in a child process, or how that one ended."""
    began = time.perf_counter()
    seconds = _SECONDS + int(sum(file.lstat().st_size for file in path.glob("rank-*.h5")) / _RATE)
    command = [sys.executable, "-P", "-c", _APART, str(_MEMORY), str(seconds), str(path.absolute())]
    how = "did not end in time"
    try:
        ended = subprocess.run(command, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, capture_output=True,  # noqa: S603
                               check=False, timeout=10 * seconds)
        with suppress(ValueError, LookupError, TypeError):
            row = parse_json(ended.stdout)[0]
            return {"path": str(path), "nbytes": int(row["nbytes"]), "seconds": time.perf_counter() - began,
                    "problems": [str(problem) for problem in row["problems"]]}
        last = shown(ended.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2])
        status = ended.returncode
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}: {last}"
    except subprocess.TimeoutExpired:
        pass
    problems = [f"the process that read it {how}; do not use it"]
    return {"path": str(path), "nbytes": 0, "seconds": time.perf_counter() - began, "problems": problems}


def _inspect(arguments: argparse.Namespace) -> int:
    opened, rank = _opened(arguments.checkpoint), arguments.rank
    versions, parts = (_mapping(opened.document, name) for name in ("versions", "parts"))
    parts = {name: part for name, part in parts.items() if isinstance(part, dict)}
    facts = {
        "path": str(opened.path), "step": opened.step, "world_size": opened.world_size, "run": opened.run,
        "written_at": opened.written_at, "written_by": opened.written_by | versions,
        "nbytes": opened.nbytes, "rank": rank, "parts": parts,
        "replicated": list(_described(opened.replicated_names(), opened.replicated, values=arguments.values)),
        "per_rank": list(_described(opened.per_rank_names(rank), lambda name: opened.per_rank(name, rank),
                                    values=arguments.values)),
    }
    if arguments.json:
        facts |= {"document": opened.document, "rank_document": opened.rank_document(rank)}
        print(json.dumps(facts, indent=1))
        return 0
    by = ", ".join(f"{name} {version}" for name, version in sorted(facts["written_by"].items()))
    print(shown(facts["path"]))
    for name, text in (
        ("step", opened.step), ("ranks", opened.world_size), ("size", in_bytes(opened.nbytes)), ("run", opened.run),
        ("written", opened.written_at), ("by", by),
    ):
        print(f"  {name:<9}{shown(text)}")
    for name, part in parts.items():
        if name != "model" and part:  # of the model these are shapes, which come below
            print(f"  {shown(name)}")
            print(_aligned([("   ", fact, str(value)) for fact, value in part.items()], left=2))
    for title, rows in (("the same on all ranks", facts["replicated"]), (f"of rank {rank} alone", facts["per_rank"])):
        print(f"\n{len(rows)} arrays {title}, {in_bytes(sum(row['nbytes'] for row in rows))}")
        if rows:
            print(_aligned([_cells(row) for row in rows], left=0 if arguments.values else 1))
    return 0


def _mapping(document: Any, name: str) -> dict[str, Any]:
    """Return an entry of a document as `Training` writes it; documents of others may be anything."""
    value = document.get(name) if isinstance(document, dict) else None
    return value if isinstance(value, dict) else {}


def _described(names: Mapping[str, Any], read: Any, *, values: bool) -> Iterator[dict[str, Any]]:
    for name, (shape, dtype) in sorted(names.items()):
        row = {"name": name, "dtype": dtype.names[0] if dtype.names else dtype.name, "shape": list(shape),
               "nbytes": dtype.itemsize * prod(shape)}
        yield row | (_numbers(read(name)) if values else {})


def _numbers(array: Any) -> dict[str, Any]:
    import numpy as np

    from mpi_ef.checkpoint.compare import wide

    count, squares, least, most = 0, 0.0, np.inf, -np.inf
    for start in range(0, array.size, _BLOCK):  # wider for a moment only
        numbers = wide(array.reshape(-1)[start : start + _BLOCK])
        finite = numbers[np.isfinite(numbers)]
        with np.errstate(all="ignore"):
            size = np.abs(finite) if finite.dtype.kind == "c" else finite
            count, squares = count + finite.size, squares + float(np.vdot(finite, finite).real)
            least, most = size.min(initial=least), size.max(initial=most)
    norm = squares**0.5
    return {"norm": norm if np.isfinite(norm) else None, "min": _number(least) if count else None,
            "max": _number(most) if count else None, "non_finite": int(array.size - count)}


def _number(value: Any) -> float | None:
    return float(value) if abs(value) < float("inf") else None  # JSON has no infinities


def _cells(row: Mapping[str, Any]) -> list[str]:
    shape = " x ".join(map(str, row["shape"])) or "scalar"
    cells = [row["dtype"], shape, in_bytes(row["nbytes"])]
    if "norm" not in row:
        return [*cells, row["name"]]
    norm = "-" if row["norm"] is None else f"norm {row['norm']:.4g}"
    extremes = "-" if None in (row["min"], row["max"]) else f"{row['min']:.3g} ... {row['max']:.3g}"
    return [row["name"], *cells, norm, extremes, f"{row['non_finite']} NaN or Inf" if row["non_finite"] else ""]


def _diff(arguments: argparse.Namespace) -> int:
    from mpi_ef.checkpoint.compare import compare

    a, b = _opened(arguments.a), _opened(arguments.b)
    differences, same, apart = [], 0, 0
    for difference in compare(a, b):
        if difference is None:
            same += 1
            continue
        differences.append(asdict(difference))
        apart += not difference.counts
        if not arguments.json:
            print(shown(f"{difference.where}: {difference.name}: {difference.text}"))
    if arguments.json:
        print(json.dumps({"a": str(a.path), "b": str(b.path), "same": same, "differences": differences}, indent=1))
        return int(len(differences) > apart)
    if a.world_size != b.world_size:
        print("what ranks had for themselves was not compared: there is another number of them")
    arrays = sum(bool(row["entries"]) for row in differences)
    print(f"{same} arrays equal bit for bit, {arrays} not; {len(differences) - arrays - apart} other differences")
    if apart:
        print(f"{apart} in run, times or versions, which do not count")
    return int(len(differences) > apart)


def _export(arguments: argparse.Namespace) -> int:
    from mpi_ef.state.export import export

    opened = _opened(arguments.checkpoint)
    count = export(opened, arguments.file, everything=arguments.all)
    size = in_bytes(arguments.file.stat().st_size)
    print(f"{count} arrays of step {opened.step} written to {shown(arguments.file)}, {size}")
    return 0


if __name__ == "__main__":
    main()
