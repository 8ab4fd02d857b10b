"""A pytest plugin: ``mpiexec -n 2 python -m pytest --real-ranks`` runs the laws of :mod:`mpi_ef.testing` over MPI.

A program for as many ranks as there are runs on these, all others on virtual ranks. Rank 0 reports; a test that fails on
any rank ends all. Without the option nothing is loaded, and nothing done.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

__all__ = ["pytest_addoption", "pytest_configure", "pytest_runtest_makereport"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--real-ranks", action="store_true", help="under mpiexec: run the laws of mpi_ef.testing over MPI")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let programs find the world."""
    if not config.getoption("real_ranks"):
        return
    from mpi4py import MPI

    from mpi_ef.testing import virtual

    virtual.world = MPI.COMM_WORLD
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if MPI.COMM_WORLD.rank and reporter is not None:
        reporter._tw._file = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115, SLF001


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:  # noqa: ARG001
    """End all ranks where a test fails on one: the others may wait for it for ever."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed and item.config.getoption("real_ranks"):
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        print(f"\nrank {comm.rank} of {comm.size}: {item.nodeid} failed\n{report.longreprtext}",
              file=sys.__stderr__, flush=True)
        comm.Abort(3)
