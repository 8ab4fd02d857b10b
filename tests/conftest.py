"""Settings of the whole suite, and the end of a run under mpiexec when one rank fails."""

import faulthandler
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import idle
import patience
import pytest
import resident
from hypothesis import HealthCheck, settings

settings.register_profile(
    "mpi_ef", derandomize=True, database=None, deadline=None, max_examples=60, print_blob=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mpi_ef")

TMPDIR_OF_PRTE = "PRTE_MCA_prte_tmpdir_base"  # Open MPI's launcher
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "examples"))  # what strangers write: the laws hold for it as well
SHARED_PROGRAMS = {"world", "whole", "ended"}  # fixtures that start programs for all tests of a module
SHARED_DATA = HERE.parents[1] / "shared" / "data"
STDERR = pytest.StashKey[int]()
GRACE_SECONDS = 60


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data sets that are not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data sets in {SHARED_DATA}, which this machine does not have")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def _leftovers(pytestconfig: pytest.Config):
    """Remove what is left of killed programs; under mpiexec nothing is.

    Folders of Open MPI's mpiexec, which have its process number as a name: a later one with the same number would not start.
    Segments in /dev/shm, megabytes for each rank under MPICH, where containers have 64 MB at times.
    """
    if _under_mpi(pytestconfig):
        yield
        return
    before = set(_segments())
    with tempfile.TemporaryDirectory(prefix="mpi-ef-", ignore_cleanup_errors=True) as folder:
        os.environ[TMPDIR_OF_PRTE] = folder
        if sleeping := idle.library():
            os.environ["LD_PRELOAD"] = str(sleeping)
        yield
        resident.close()
        del os.environ[TMPDIR_OF_PRTE]
    candidates = {path: number for path, number in _segments().items() if path not in before}
    in_use = set()  # by number: the name that a semaphore has in its creator's map is that of a draft
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            lines = maps.read_text(errors="replace").splitlines()
            in_use |= {int(line.split()[4]) for line in lines if "/dev/shm/" in line}
    for path, number in candidates.items():
        if number not in in_use:
            path.unlink(missing_ok=True)


def _segments() -> dict[Path, int]:
    found = {}
    for path in (path for name in ("mpich_shm_*", "sm_segment.*", "sem.mp-*") for path in Path("/dev/shm").glob(name)):
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_ino
    return found


def _under_mpi(config: pytest.Config) -> bool:
    return bool(config.getoption("with_mpi", default=False))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Scale its time limit; one worker runs all tests that look at the same programs."""
    marker = item.get_closest_marker("timeout")
    seconds = marker.args[0] if marker else float(item.config.getini("timeout") or 0)
    method = "thread" if _under_mpi(item.config) else "signal"  # a signal ends the test, a thread the process
    item.add_marker(pytest.mark.timeout(patience.limit(seconds), method=method), append=False)  # the first one counts
    started = SHARED_PROGRAMS & set(getattr(item, "fixturenames", ()))
    if started:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        which = [str(params[name]) for name in sorted(started) if name in params]
        item.add_marker(pytest.mark.xdist_group(" ".join([item.path.stem, *which])))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out tests so that a process that dies costs one test and stops no other."""
    from scheduling import Scheduler

    return Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """End a process that runs no Python code any more, and show where it is: what pytest-timeout does is Python code."""
    seconds = next(item.iter_markers("timeout")).args[0]
    if seconds:
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Let no test leave MPI loaded and not started: it would end the process in whatever test comes later."""
    library = sys.modules.get("mpi4py.MPI")
    assert library is None or library.Is_initialized(), f"{item.nodeid} has loaded MPI without starting it"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let rank 0 alone report; failures of other ranks are printed below."""
    config.stash[STDERR] = os.dup(2)  # not yet that of a test
    if _under_mpi(config) and not config.getoption("real_ranks", default=False):
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank:
            reporter = config.pluginmanager.get_plugin("terminalreporter")
            reporter._tw._file = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """End all ranks at the first failure of one of them: the others may wait for it for ever."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and _under_mpi(item.config):
        from mpi4py import MPI

        from mpi_ef.runtime.launch import abort

        comm = MPI.COMM_WORLD
        print(f"\nrank {comm.rank} of {comm.size}: {item.nodeid} failed\n{report.longreprtext}",
              file=sys.__stderr__, flush=True)
        abort(comm, 3)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """End all ranks when one cannot even import its tests."""
    if report.failed and "mpi4py.MPI" in sys.modules and os.environ.get("MPI_EF_TEST_RANKS"):
        from mpi4py import MPI

        from mpi_ef.runtime.launch import abort

        print(f"\nrank {MPI.COMM_WORLD.rank}: {report.longreprtext}", file=sys.__stderr__, flush=True)
        abort(MPI.COMM_WORLD, 3)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run under mpiexec in which not every test ran, or whose ranks are not one world of the expected size."""
    expected = os.environ.get("MPI_EF_TEST_RANKS")
    if not expected or not _under_mpi(session.config):
        return
    from mpi4py import MPI

    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed, skipped = (len(reporter.stats.get(kind, [])) for kind in ("passed", "skipped"))
    if MPI.COMM_WORLD.size != int(expected) or skipped or not passed:
        print(f"expected all tests to run on {expected} ranks: {passed} passed and {skipped} were skipped on "
              f"{MPI.COMM_WORLD.size} ranks", file=sys.__stderr__, flush=True)
        session.exitstatus = 4
