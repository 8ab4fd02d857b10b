"""Versions of all packages, and whether all ranks have the same."""

import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata

import mpi_ef
from mpi_ef.jobs.doctor.finding import Finding, finding
from mpi_ef.jobs.doctor.ranks import Facts, Ranks
from mpi_ef.jobs.doctor.registry import Context

__all__ = ["PACKAGES", "collect", "judge"]

PACKAGES = ("mpi_ef", "numpy", "torch", "numba", "llvmlite", "h5py", "mpi4py")
_SERIOUS = ("mpi_ef", "mpi4py", "h5py")  # ranks with different ones do not work together, or write different files
_NEEDED = ("mpi_ef", "numpy", "torch", "numba", "h5py")  # mpi4py has a finding of its own


def collect(_: Context) -> Facts:
    """Return the versions that this rank has. Local; imports none of the packages."""
    versions = {name: _version(name) for name in PACKAGES} | {"mpi_ef": mpi_ef.__version__}
    return {"python": platform.python_version(), "program": sys.executable, "least": _least(), **versions}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _least() -> dict[str, str]:
    """Return the oldest versions that mpi_ef works with, as it was packaged; nothing in a plain checkout."""
    try:
        required = metadata.requires("mpi_ef") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w-]+)\s*>=\s*([\d.]+)", text) for text in required)
    return {match[1]: match[2] for match in found if match}


def judge(ranks: Ranks) -> Iterator[Finding]:
    """Yield the versions, and what is wrong with them."""
    one, differing = ranks[0], 0
    for name in ("python", *PACKAGES):
        versions = ranks.by_value(name)
        if len(versions) > 1:
            differing += name != "python"
            _, *others = versions.values()
            shown = "; ".join(f"{version or 'none'}{some.where}" for version, some in versions.items())
            about = [other.rank for some in others for other in some]
            yield finding("versions-differ", about, severe=name in _SERIOUS, package=name, versions=shown)
    for name, least in one["least"].items():
        if one[name] and _numbers(one[name]) < _numbers(least):
            yield finding("version-old", package=name, version=one[name], least=least)
    if missing := [name for name in _NEEDED if not one[name]]:
        yield finding("package-missing", packages=", ".join(missing), arguments=" ".join(missing))
    packages = ", ".join(f"{name} {one[name]}" for name in PACKAGES if one[name])
    same = f"; the same on all {len(ranks)} ranks" if len(ranks) > 1 and not differing else ""
    yield finding("versions", ranks, packages=packages, same=same)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
