"""The rooms of the project and who may import whom; what importing costs."""

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from mpi_ef.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
# Each room may import those before it in this table that are named, and of third parties what is named after them.
ROOMS = {
    "errors": ("", ""),
    "documents": ("", ""),
    "moved": ("", ""),
    "workers": ("", "mpi4py"),
    "slurm": ("errors", ""),
    "kernels": ("", "numpy numba llvmlite"),
    "kernels.device": ("kernels errors", "numpy torch triton"),
    "comm": ("errors", "mpi4py"),  # for types alone
    "ranges": ("errors", ""),
    "statetree": ("errors", "numpy"),
    "runtime": ("errors documents ranges comm", "numpy mpi4py"),
    "compress": ("errors ranges kernels", "numpy"),
    "robust": ("errors ranges kernels", "numpy"),
    "registry": ("errors", ""),  # the modules of what it finds are loaded by name
    "collectives": ("errors ranges kernels comm runtime compress registry robust statetree", "numpy mpi4py"),
    "coded": ("errors ranges kernels comm runtime compress collectives registry statetree", "numpy"),
    "feedback": ("errors ranges kernels comm compress collectives registry robust statetree", "numpy"),
    "vectors": ("errors kernels kernels.device comm compress", "numpy torch"),
    "reference": ("", "numpy torch"),
    "buffers": ("errors comm vectors", "numpy torch"),
    "data": ("errors ranges comm", "numpy torch"),
    "metrics": ("errors comm", ""),
    "devices": ("errors comm", "torch mpi4py"),
    "shares": ("errors comm data", "torch"),
    "precondition": ("errors ranges statetree kernels comm compress collectives", "numpy torch"),
    "optim": ("errors ranges statetree kernels comm compress collectives coded feedback robust vectors buffers precondition",
              "numpy torch"),
    "ddp": ("errors statetree kernels comm compress collectives feedback vectors", "numpy torch"),
    "checkpoint": ("errors documents comm", "numpy h5py"),
    "state": ("errors documents comm statetree vectors data optim checkpoint", "numpy torch h5py"),
    "integrations": ("errors comm runtime buffers data metrics vectors optim checkpoint state",
                     "torch accelerate transformers lightning"),
    "testing": ("errors comm compress collectives registry feedback optim", "numpy torch mpi4py pytest"),
    "__init__": ("errors moved runtime compress robust collectives feedback buffers data metrics shares devices optim ddp "
                 "precondition checkpoint state", ""),
    "jobs": ("__init__ errors documents ranges registry kernels comm devices runtime slurm compress collectives feedback "
             "checkpoint state", "numpy torch matplotlib mpi4py tensorboard"),
    "jobs.train": ("__init__ errors documents moved registry kernels comm runtime compress collectives coded feedback "
                   "vectors optim checkpoint state jobs", "numpy torch sklearn"),
    "jobs.bench": ("__init__ errors documents moved registry kernels comm runtime compress collectives feedback "
                   "checkpoint jobs", "numpy torch mpi4py"),
    "jobs.reproduce": ("__init__ errors documents moved registry comm runtime compress robust collectives coded feedback "
                       "optim testing jobs jobs.train", "numpy torch sklearn mlxtend"),
    "jobs.scale": ("errors documents compress collectives jobs", ""),
    "jobs.report": ("errors documents moved jobs jobs.train jobs.bench jobs.reproduce", "numpy"),
    "jobs.doctor": ("__init__ errors moved kernels comm runtime slurm compress collectives feedback data optim testing jobs "
                    "jobs.train", "numpy torch mpi4py h5py"),
}


def sources():
    """Return the modules of the project by their dotted names."""
    found = {}
    for folder in ("mpi_ef", "kernels", "jobs", "slurm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in [path, *path.parents]):
                parts = path.relative_to(ROOT).with_suffix("").parts
                parts = parts if folder == "mpi_ef" else ("mpi_ef", *parts)
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def room(module: str) -> str:
    """Return the room of a module: the package below mpi_ef, or the file where it lies in none; of programs their folder."""
    _, *parts = module.split(".")
    if ".".join(parts[:2]) in ROOMS:
        return ".".join(parts[:2])
    return parts[0] if parts else "__init__"


def imported(module: str, is_package: bool, text: str, known) -> set[str]:
    """Return what a module imports anywhere, also inside functions and for types alone: modules of `known`, or others."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if is_package else module.split(".")[:-1]
            parts = parts[: len(parts) - node.level + 1] if node.level else []
            name = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                found.add(f"{name}.{alias.name}" if f"{name}.{alias.name}" in known else name)
    return found - {module}


def imports_of_all() -> dict[str, set[str]]:
    return {name: imported(name, path.name == "__init__.py", path.read_text(encoding="utf-8"), SOURCES)
            for name, path in SOURCES.items()}


def circles(arrows) -> list[list[str]]:
    """Return the sets of modules that reach each other: Tarjan's strongly connected components."""
    order, low, stack, found = {}, {}, [], []

    def visit(name):
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(arrows.get(name, ())):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            members = [stack.pop() for _ in range(len(stack) - stack.index(name))]
            if len(members) > 1:
                found.append(sorted(members))

    for name in sorted(arrows):
        if name not in order:
            visit(name)
    return found


def wrong_arrows(module: str, names):
    """Yield, of what a module imports, what its room must not."""
    mine = room(module)
    if mine not in ROOMS:
        yield f"{mine} is no room of the architecture"
        return
    ours, theirs = (text.split() for text in ROOMS[mine])
    for name in sorted(names):
        first = name.split(".")[0]
        if first == "mpi_ef":
            if room(name) != mine and room(name) not in ours:
                yield f"{module}: {mine} may not import {room(name)} ({name})"
        elif first in {"kernels", "jobs", "slurm"}:
            yield f"{module} imports the top-level name {first}"
        elif first not in sys.stdlib_module_names and first not in theirs:
            yield f"{module}: {mine} may not import {first}"


def test_arrows_between_rooms():
    assert {room(name) for name in SOURCES} == set(ROOMS)  # the walk has seen every room
    wrong = [text for name, names in imports_of_all().items() for text in wrong_arrows(name, names)]
    assert not wrong, "\n".join(wrong)


def test_rooms_stand_on_those_before_them():
    before: list[str] = []
    for name, (ours, _) in ROOMS.items():
        assert not set(ours.split()) - set(before), name
        before.append(name)


def test_no_modules_import_each_other():
    found = circles(imports_of_all())
    assert not found, "\n".join(map(str, found))


def test_circles_are_seen():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a", "numpy"}}
    assert sorted(circles(arrows)) == [["a", "b", "c"], ["d", "e"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c", "a"}}) == []


def test_the_check_sees_wrong_arrows():
    """All of them, not the first."""
    text = ("import torch\nfrom mpi_ef import optim\nfrom mpi_ef.jobs.train.program import main\nimport numpy.linalg\n"
            "def late():\n from ..data import ShardedSampler\n from .plan import Plan\n from jobs import cli\n"
            "from mpi_ef.errors import MpiEfError\nfrom mpi_ef.kernels import BLOCK\n")
    names = imported("mpi_ef.collectives.gather", False, text, SOURCES)
    assert list(wrong_arrows("mpi_ef.collectives.gather", names)) == [
        "mpi_ef.collectives.gather imports the top-level name jobs",
        "mpi_ef.collectives.gather: collectives may not import data (mpi_ef.data)",
        "mpi_ef.collectives.gather: collectives may not import jobs.train (mpi_ef.jobs.train.program)",
        "mpi_ef.collectives.gather: collectives may not import optim (mpi_ef.optim)",
        "mpi_ef.collectives.gather: collectives may not import torch",
    ]
    assert list(wrong_arrows("mpi_ef.attic.plan", ())) == ["attic is no room of the architecture"]


def test_no_word_that_says_nothing():
    for path in SOURCES.values():
        assert not {"utils", "core", "base", "common", "helper", "manager"} & {path.stem, path.parent.name}, path


def test_modules_stay_small():
    for path in SOURCES.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path


def test_packages_are_shipped():
    """Setuptools ships only what pyproject.toml lists, also of files that are no modules."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(n for n, path in SOURCES.items() if path.name == "__init__.py")
    shipped = {path for package, patterns in setuptools["package-data"].items() for pattern in patterns
               for path in SOURCES[package].parent.glob(pattern)}
    folders = {SOURCES[package].parent for package in setuptools["packages"]}
    others = {path for folder in folders for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert others <= shipped


def test_names_from_before_work_with_a_warning():
    for old, new in MOVED.items():
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
            module = import_module(old)
        assert module is import_module(new)
        assert module.__spec__.name == module.__name__ == new
        assert old not in SOURCES
    for package, name in [("train", "TrainConfig"), ("train", "main"), ("bench", "measure"), ("reproduce", "Outcome"),
                          ("report", "Section"), ("doctor", "Report")]:
        with pytest.warns(DeprecationWarning, match=f"mpi_ef.jobs.{package}.{name} is now in"):
            assert callable(getattr(import_module(f"mpi_ef.jobs.{package}"), name))


# What is imported, and what must not be there afterwards; fewer and fewer, as all of them are imported by one process.
NOTHING_LARGE = {"torch", "mpi4py.MPI", "numba", "numpy", "h5py"}
ABSENT = [
    ("import mpi_ef", NOTHING_LARGE),
    ("import mpi_ef.workers", NOTHING_LARGE),
    ("import mpi_ef.testing.plugin", NOTHING_LARGE),
    ("import mpi_ef.jobs.cli, mpi_ef.jobs.train.program, mpi_ef.jobs.report.program", NOTHING_LARGE),
    ("import mpi_ef.jobs.bench.program, mpi_ef.jobs.doctor.program, mpi_ef.jobs.reproduce.program", NOTHING_LARGE),
    ("import mpi_ef.jobs.checkpoint, mpi_ef.jobs.slurm, mpi_ef.jobs.supervise, mpi_ef.jobs.scale.program", NOTHING_LARGE),
    ("import mpi_ef.jobs.least_squares, mpi_ef.jobs.bench.checkpoint", {"torch", "mpi4py.MPI", "numba"}),
    ("import mpi_ef.collectives, mpi_ef.feedback", {"torch", "mpi4py.MPI"}),
    ("from mpi_ef import TopK, allreduce, ErrorFeedback", {"torch", "mpi4py.MPI"}),
    ("from mpi_ef.testing import CompressorLaws, PlanLaws, RuleLaws", {"torch", "mpi4py.MPI"}),
    ("import mpi_ef.optim", {"mpi4py.MPI"}),
    ("import mpi_ef.ddp", {"mpi4py.MPI"}),
    ("import mpi_ef.data, mpi_ef.buffers, mpi_ef.metrics, mpi_ef.shares, mpi_ef.devices", {"mpi4py.MPI"}),
    ("import mpi_ef.integrations", {"mpi4py.MPI"}),  # loops of others are looked for when they are used
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
             for (code, absent), names in zip(ABSENT, loaded, strict=True) if names & absent]
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
                     DistributedOptimizer.step):
        assert "Collective." in (function.__doc__ or "")


def test_no_test_throws_away_what_virtual_ranks_raise():
    """`virtual.run` returns what they raise, `virtual.results` raises it."""
    thrown = [f"{path.name}:{call.lineno}" for path in sorted((ROOT / "tests").rglob("*.py"))
              for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
              if isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
              and ast.unparse(call.value.func) == "virtual.run"]
    assert thrown == []
