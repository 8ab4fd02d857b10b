"""Versions of all packages, and whether all ranks have the same."""

import platform
import re
import sys
from contextlib import suppress
from importlib import metadata

import mpi_ef
from mpi_ef.jobs.doctor.finding import Facts, Findings, Ranks, finding
from mpi_ef.jobs.doctor.registry import Context

__all__ = ["PACKAGES", "collect", "judge"]

PACKAGES = ("mpi_ef", "numpy", "torch", "numba", "llvmlite", "h5py", "mpi4py")
_SERIOUS = ("mpi_ef", "mpi4py", "h5py")  # ranks with different ones do not work together, or write different files
_NEEDED = ("mpi_ef", "numpy", "torch", "numba", "h5py")  # mpi4py has a finding of its own


def collect(_: Context) -> Facts:
    """Return the versions that this rank has, and the oldest that mpi_ef works with. Local; imports none of the packages."""
    versions, required = dict.fromkeys(PACKAGES, ""), []
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    with suppress(metadata.PackageNotFoundError):  # as in a plain checkout
        required = metadata.requires("mpi_ef") or []
    found = (re.fullmatch(r"([\w-]+)\s*>=\s*([\d.]+)", text) for text in required)
    least = {match[1]: match[2] for match in found if match}
    return versions | {"python": platform.python_version(), "program": sys.executable, "least": least,
                       "mpi_ef": mpi_ef.__version__}


def judge(ranks: Ranks) -> Findings:
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
