"""A real Slurm for these tests: brought up once, taken down whatever happens. Needs root; see slurm_up.sh.

Slurm is installed from Debian's packages where it is missing; that is why a plain ``pytest`` does not come here (see
norecursedirs in pyproject.toml): ``make test-slurm``. MPI_EF_TEST_SLURM=required turns "cannot be installed" into a failure.
"""

import os
import re
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import patience
import pytest
from cluster import Cluster, Place

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let time limits raise in the test, so that the cluster is still taken down in good order."""
    for item in items:
        if HERE in item.path.parents:
            limit = patience.limit(600)
            item.add_marker(pytest.mark.timeout(limit, method="signal", func_only=True), append=False)


def _free_ports(count: int) -> int:
    """Return the first of some ports in a row that nobody uses."""
    start = 16817 + 16 * (os.getpid() % 900)  # another session that looks at the same time finds others
    for first in range(start, 32000, 16):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def cluster():
    """Four nodes n1 to n4, of 4 CPUs and 2 pretended GPUs each."""
    lab = Path(f"/tmp/mpi-ef-slurm-{os.getpid()}")  # short: sockets will be in it
    terminate = signal.signal(
        signal.SIGTERM, signal.getsignal(signal.SIGINT)
    )  # let `timeout` end the tests in good order
    try:
        settings = {"SLURM_LAB_PORT": str(_free_ports(5)), "SLURM_LAB_OWNER": str(os.getpid())}
        with tempfile.TemporaryFile("w+") as log:  # a pipe would stay open as long as the daemons live
            up = subprocess.run([HERE / "slurm_up.sh", lab], env=os.environ | settings, stdin=subprocess.DEVNULL,
                                stdout=log, stderr=log, timeout=600, check=False)
            log.seek(0)
            said = log.read().strip()
        if up.returncode == 77 and os.environ.get("MPI_EF_TEST_SLURM") != "required":
            pytest.skip(said.splitlines()[-1])
        assert up.returncode == 0, said
        yield Cluster(lab)
    finally:
        down = subprocess.run([HERE / "slurm_down.sh", lab], capture_output=True, text=True, timeout=120, check=False)
        signal.signal(signal.SIGTERM, terminate)
    assert down.returncode == 0, down.stderr
    assert not _processes_of(lab)


def _processes_of(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(f"{path.name}: {words.decode(errors='replace')}")
    return found


@pytest.fixture
def place(cluster, request):
    """A folder for the jobs of one test. Whatever they leave on the nodes' disks fails the test."""
    place = Place(cluster, cluster.folder / re.sub(r"\W+", "-", request.node.name).strip("-"))
    try:
        yield place
    finally:
        place.clear()
