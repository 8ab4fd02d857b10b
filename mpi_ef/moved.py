"""Modules that have moved: for one release their old names work as well, with a warning."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from warnings import warn

__all__ = ["MOVED", "earlier", "find_moved"]

_JOBS = {
    "train": "changes choices data interruptible models optimizers settings trainer",
    "bench": "bench_checkpoint bench_methods bench_report traffic",
    "reproduce": "experiments libsvm problems simulate",
    "report": "page",
}
_RENAMED = {"bench_checkpoint": "checkpoint", "bench_methods": "methods", "bench_report": "table", "data": "datasets",
            "interruptible": "recovery", "page": "html", "trainer": "loop"}
_DOCTOR = {"checks": "registry", "ranks": "checks.cores", "roll": "watchdog", "together": "all_ranks",
           "world": "checks.launcher", "finding": "finding", "files": "checks.files", "kernels": "checks.kernels",
           "link": "checks.link", "mpi": "checks.mpi", "space": "checks.space", "torch": "checks.torch",
           "versions": "checks.versions"}

MOVED = {
    **{f"mpi_ef.jobs.{name}": f"mpi_ef.jobs.{folder}.{_RENAMED.get(name, name)}"
       for folder, names in _JOBS.items() for name in names.split()},
    **{f"mpi_ef.jobs.doctor_{old}": f"mpi_ef.jobs.doctor.{new}" for old, new in _DOCTOR.items()},
    "mpi_ef.jobs.config": "mpi_ef.jobs.options",
    "mpi_ef.jobs.early": "mpi_ef.runtime.early_signals",
    "mpi_ef.jobs.launch": "mpi_ef.runtime.launch",
    "mpi_ef.jobs.survivors": "mpi_ef.runtime.ulfm",
    "mpi_ef.checkpoint.documents": "mpi_ef.checkpoint.manifest",
    "mpi_ef.checkpoint.export": "mpi_ef.state.export",
    "mpi_ef.checkpoint.master": "mpi_ef.checkpoint.manifest",
    "mpi_ef.checkpoint.opened": "mpi_ef.checkpoint.reader",
    "mpi_ef.checkpoint.parts": "mpi_ef.state.components",
    "mpi_ef.checkpoint.pieces": "mpi_ef.checkpoint.extents",
    "mpi_ef.checkpoint.state": "mpi_ef.state.training",
    "mpi_ef.checkpoint.together": "mpi_ef.comm.consensus",
    "mpi_ef.checkpoint.tree": "mpi_ef.state.tree",
    "mpi_ef.checkpoint.world": "mpi_ef.state.reshard",
    "mpi_ef.collectives.agreement": "mpi_ef.comm.consensus",
    "mpi_ef.ending": "mpi_ef.runtime.ending",
    "mpi_ef.stopping": "mpi_ef.runtime.stopper",
    "mpi_ef.world": "mpi_ef.runtime.world",
}


class _Finder(MetaPathFinder):
    """Finds modules that have moved, by their old names."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        return ModuleSpec(fullname, _Alias(MOVED[fullname])) if fullname in MOVED else None


class _Alias(Loader):
    """Loads a module under another name: it is the same one under both."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warn(f"{spec.name} is now {self._name}; the old name goes with the next release", DeprecationWarning,
             stacklevel=2)
        module = import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has set that of the old name


def find_moved() -> None:
    """Let old names of modules be found from now on; once. Local."""
    if all(type(finder).__module__ != __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def earlier(package: str, **homes: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package that was a module: its names, and in which modules of it they are now."""

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warn(f"{package}.{name} is now in {package}.{homes[name]}; the old name goes with the next release",
             DeprecationWarning, stacklevel=2)
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return getattribute
