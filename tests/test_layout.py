"""The rooms of the project and who may import whom; what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each room may import those before it in its list (and errors, which everyone may import).
ALLOWED = {
    "errors": [],
    "kernels": [],
    "compress": ["kernels"],
    "collectives": ["kernels", "compress"],
    "feedback": ["kernels", "compress", "collectives"],
    "vectors": ["kernels", "compress", "collectives"],
    "data": ["collectives"],
    "buffers": ["collectives"],
    "stopping": ["collectives"],
    "workers": [],
    "optim": ["kernels", "compress", "collectives", "feedback", "vectors"],
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


def imports(path: Path, tree: ast.Module):
    """Yield dotted names of everything imported, relative imports resolved inside the room."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module == "mpi_ef":
                yield from (f"mpi_ef.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path}: relative import that leaves its room"


@pytest.mark.parametrize("path", list(files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_between_rooms(path):
    mine = room(path)
    assert mine in ALLOWED, f"{mine} is no room of the architecture"
    for name in imports(path, ast.parse(path.read_text(encoding="utf-8"))):
        first, *rest = name.split(".")
        assert first not in {"kernels", "jobs", "slurm"}, f"{path} imports the top-level name {first}"
        assert first not in FORBIDDEN.get(mine, ()), f"{path} imports {name}"
        if first == "mpi_ef" and rest and rest[0] not in (mine, "errors"):
            assert rest[0] in ALLOWED[mine], f"{path}: {mine} may not import {rest[0]}"


def test_the_check_sees_wrong_arrows(tmp_path):
    tree = ast.parse("import torch\nfrom mpi_ef import optim\nfrom mpi_ef.jobs.train import main\n")
    assert list(imports(tmp_path, tree)) == ["torch", "mpi_ef.optim", "mpi_ef.jobs.train"]


def test_no_word_that_says_nothing():
    for path in files():
        assert not {"utils", "core", "base", "common", "helper", "manager"} & {path.stem, path.parent.name}, path


def test_modules_stay_small():
    for path in files():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mpi_ef", {"torch", "mpi4py.MPI", "numba", "numpy"}),
        ("import mpi_ef.collectives, mpi_ef.feedback", {"torch", "mpi4py.MPI"}),
        ("from mpi_ef import TopK, allreduce, ErrorFeedback", {"torch", "mpi4py.MPI"}),
        ("import mpi_ef.optim", {"mpi4py.MPI"}),
        ("import mpi_ef.ddp", {"mpi4py.MPI"}),
        ("import mpi_ef.data, mpi_ef.buffers", {"mpi4py.MPI"}),
        ("import mpi_ef.workers", {"torch", "mpi4py.MPI", "numba", "numpy"}),
        ("import mpi_ef.jobs.cli, mpi_ef.jobs.train, mpi_ef.jobs.report", {"torch", "mpi4py.MPI", "numba"}),
        ("import mpi_ef.jobs.least_squares", {"torch", "mpi4py.MPI"}),
    ],
)
def test_imports_load_only_what_is_needed(code, absent):
    assert not loaded_after(code) & absent


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
