"""Versions of everything that takes part, and whether all ranks have the same."""

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from mpi_ef.jobs.doctor.finding import Finding, Told, by_value, who

__all__ = ["PACKAGES", "judge_versions", "version_facts"]

PACKAGES = ("mpi_ef", "numpy", "torch", "numba", "llvmlite", "h5py", "mpi4py")
_SERIOUS = ("mpi_ef", "mpi4py", "h5py")  # ranks with different ones do not work together, or write different files


def version_facts() -> dict[str, Any]:
    """Return the versions that this rank has. Local; imports none of the packages."""
    return {
        "python": platform.python_version(),
        "program": sys.executable,
        "least": _least(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    if name == "mpi_ef":
        import mpi_ef

        return mpi_ef.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _least() -> dict[str, str]:
    """Return the oldest versions that mpi_ef works with, as it was packaged; nothing in a plain checkout."""
    try:
        wanted = metadata.requires("mpi_ef") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w-]+)\s*>=\s*([\d.]+)", text) for text in wanted)
    return {match[1]: match[2] for match in found if match}


def judge_versions(told: Sequence[Told]) -> Iterator[Finding]:
    """Yield versions, and what is wrong with them."""
    for name in ("python", *PACKAGES):
        versions = by_value(told, name)
        if len(versions) > 1:
            _, *others = versions.values()
            listed = "; ".join(f"{version or 'none'}{who(some, told)[0]}" for version, some in versions.items())
            yield Finding(
                "Versions",
                "versions-differ",
                "error" if name in _SERIOUS else "warning",
                f"ranks have different versions of {name}: {listed}",
                "activate the same environment on all nodes, in the batch script and not in ~/.bashrc",
                tuple(one.rank for some in others for one in some),
            )
    one = told[0]
    for name, least in (one["least"] or {}).items():
        if one[name] and _numbers(one[name]) < _numbers(least):
            yield Finding(
                "Versions",
                "version-old",
                "error",
                f"{name} {one[name]} is older than {least}",
                f"pip install '{name}>={least}'",
            )
    missing = [
        name for name in PACKAGES if not one[name] and name not in ("mpi4py", "llvmlite")
    ]  # the first has its own finding
    if missing:
        yield Finding(
            "Versions",
            "package-missing",
            "error",
            f"not installed: {', '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )
    names = [f"{name} {one[name]}" for name in PACKAGES if one[name]]
    same = ""
    if len(told) > 1 and all(len(by_value(told, name)) == 1 for name in PACKAGES):
        same = f"; the same on all {len(told)} ranks"
    yield Finding("Versions", "versions", "ok", f"{', '.join(names)}; Python {one['python']} ({one['program']}){same}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
