"""The rooms of the project and who may import whom; what importing costs."""

import ast
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each room may import those before it in its list (and errors, which everyone may import).
ALLOWED = {
    "errors": [],
    "kernels": [],
    "compress": ["kernels"],
    "world": [],
    "ending": [],
    "collectives": ["kernels", "compress", "world", "ending"],
    "feedback": ["kernels", "compress", "collectives"],
    "vectors": ["kernels", "compress", "collectives"],
    "data": ["collectives"],
    "buffers": ["collectives"],
    "stopping": ["collectives"],
    "workers": [],
    "optim": ["kernels", "compress", "collectives", "feedback", "vectors", "buffers"],
    "ddp": ["kernels", "compress", "collectives", "feedback", "vectors"],
    "jobs": [
        "kernels",
        "compress",
        "collectives",
        "feedback",
        "vectors",
        "data",
        "buffers",
        "stopping",
        "optim",
        "checkpoint",
        "slurm",
        "world",
        "ending",
    ],
    "checkpoint": ["kernels", "compress", "collectives", "feedback", "vectors", "optim", "data"],
    "slurm": [],
    "__init__": [
        "compress",
        "collectives",
        "feedback",
        "vectors",
        "data",
        "buffers",
        "stopping",
        "optim",
        "ddp",
        "checkpoint",
    ],
}
# Third-party packages that a room may not name.
FORBIDDEN = {
    "kernels": {"torch", "mpi4py", "h5py"},
    "compress": {"torch", "mpi4py", "numba", "h5py"},
    "collectives": {"torch", "numba", "h5py"},
    "feedback": {"torch", "numba", "mpi4py", "h5py"},
    "world": {"torch", "numpy", "numba", "h5py"},
    "ending": {"torch", "numpy", "numba", "h5py"},
    "vectors": {"numba", "mpi4py"},
    "data": {"numba", "mpi4py", "h5py"},
    "buffers": {"numba", "mpi4py", "h5py"},
    "stopping": {"torch", "numba", "mpi4py", "h5py"},
    "workers": {"torch", "numba", "h5py"},
    "optim": {"numba", "mpi4py"},
    "ddp": {"numba", "mpi4py"},
    "checkpoint": {"numba", "mpi4py"},
    "jobs": {"numba"},
}


def files():
    for folder in ("mpi_ef", "kernels", "jobs", "slurm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in [path, *path.parents]):
                yield path


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "mpi_ef" else parts[1].removesuffix(".py")


def imports(tree: ast.Module):
    """Yield dotted names of everything imported; those of relative imports that leave their room begin with two dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module == "mpi_ef":
                yield from (f"mpi_ef.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            yield "." * node.level + (node.module or "")


def wrong_arrows(mine: str, tree: ast.Module):
    """Yield what a file of the room `mine` imports and must not, with the reason."""
    if mine not in ALLOWED:
        yield f"{mine} is no room of the architecture"
    for name in imports(tree):
        first, *rest = name.split(".")
        if name.startswith(".."):
            yield f"relative import that leaves its room: {name}"
        if first in {"kernels", "jobs", "slurm"}:
            yield f"imports the top-level name {first}"
        if first in FORBIDDEN.get(mine, ()):
            yield f"imports {name}"
        if first == "mpi_ef" and rest and rest[0] not in (mine, "errors", *ALLOWED.get(mine, ())):
            yield f"{mine} may not import {rest[0]}"


def test_arrows_between_rooms():
    paths = list(files())
    assert {room(path) for path in paths} == set(ALLOWED)  # the walk has seen every room
    wrong = [f"{path.relative_to(ROOT)}: {text}" for path in paths
             for text in wrong_arrows(room(path), ast.parse(path.read_text(encoding="utf-8")))]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_wrong_arrows():
    """All of them, not the first."""
    tree = ast.parse("import torch\nfrom mpi_ef import optim\nfrom mpi_ef.jobs.train import main\nimport numpy.linalg\n"
                     "def late():\n from .. import data\n from .plan import Plan\n from jobs import cli\n"
                     "from mpi_ef.errors import MpiEfError\nfrom mpi_ef.kernels import BLOCK\n")  # fmt: skip
    assert sorted(wrong_arrows("collectives", tree)) == [
        "collectives may not import jobs",
        "collectives may not import optim",
        "imports the top-level name jobs",
        "imports torch",
        "relative import that leaves its room: ..",
    ]
    assert "attic is no room of the architecture" in list(wrong_arrows("attic", tree))


def test_no_word_that_says_nothing():
    for path in files():
        assert not {"utils", "core", "base", "common", "helper", "manager"} & {path.stem, path.parent.name}, path


def test_modules_stay_small():
    for path in files():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path


# What is imported, and what must not be there afterwards; fewer and fewer, as all of them are imported by one process.
NOTHING_LARGE = {"torch", "mpi4py.MPI", "numba", "numpy", "h5py"}
ABSENT = [
    ("import mpi_ef", NOTHING_LARGE),
    ("import mpi_ef.workers", NOTHING_LARGE),
    ("import mpi_ef.jobs.cli, mpi_ef.jobs.train, mpi_ef.jobs.report", NOTHING_LARGE),
    ("import mpi_ef.jobs.bench, mpi_ef.jobs.doctor, mpi_ef.jobs.reproduce", NOTHING_LARGE),
    ("import mpi_ef.jobs.checkpoint, mpi_ef.jobs.slurm", NOTHING_LARGE),
    ("import mpi_ef.jobs.least_squares, mpi_ef.jobs.bench_checkpoint", {"torch", "mpi4py.MPI", "numba"}),
    ("import mpi_ef.collectives, mpi_ef.feedback", {"torch", "mpi4py.MPI"}),
    ("from mpi_ef import TopK, allreduce, ErrorFeedback", {"torch", "mpi4py.MPI"}),
    ("import mpi_ef.optim", {"mpi4py.MPI"}),
    ("import mpi_ef.ddp", {"mpi4py.MPI"}),
    ("import mpi_ef.data, mpi_ef.buffers", {"mpi4py.MPI"}),
]
# Before each import everything of mpi_ef is forgotten, so that it works as the first one of a process.
IMPORTING = """
import sys
for code in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "mpi_ef"]:
        del sys.modules[name]
    exec(code, {})
    print(*sys.modules)
"""


@pytest.mark.slow
def test_imports_load_only_what_is_needed():
    assert all(more >= fewer for (_, more), (_, fewer) in pairwise(ABSENT))
    command = [sys.executable, "-c", IMPORTING, *(code for code, _ in ABSENT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = [set(line.split()) for line in done.stdout.splitlines()]
    wrong = [f"{code}: loads {', '.join(sorted(names & absent))}"
             for (code, absent), names in zip(ABSENT, loaded, strict=True) if names & absent]  # fmt: skip
    assert not wrong, "\n".join(wrong)
    assert {"torch", "numba", "numpy"} <= loaded[-1]  # as they are called here


def test_every_public_name_is_there():
    import mpi_ef

    for name in mpi_ef.__all__:
        assert getattr(mpi_ef, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mpi_ef.nothing
    assert set(dir(mpi_ef)) == set(mpi_ef.__all__)


def test_public_docstrings_say_what_is_needed():
    """Everything public is documented; what takes part in communication says so."""
    from mpi_ef.collectives import Plan, allgather, allreduce
    from mpi_ef.feedback import ErrorFeedback
    from mpi_ef.optim import DistributedOptimizer

    for function in (allreduce, allgather, Plan.exchange, Plan.start, Plan.wait, ErrorFeedback.step,
                     DistributedOptimizer.step):  # fmt: skip
        assert "Collective." in (function.__doc__ or "")
