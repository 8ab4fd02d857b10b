"""Hosts on one machine: network, name and IPC namespaces, joined by links of a chosen bandwidth. As root, with iproute2.

Every host has an interface ``eth0`` on a bridge; a token bucket at both ends of its cable limits each way. What ranks of
one host send each other goes through memory, as on a real one; IPC namespaces keep hosts from sharing it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

NETWORK = "10.91.0"
BURST_NBYTES, QUEUE = 128 << 10, "20ms"

# The same as in the Makefile; and hosts all think that they own core 0, and none sees that the machine is full.
SETTINGS = {
    "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_btl_tcp_if_include": "eth0", "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_mpi_yield_when_idle": "true", "GLOO_SOCKET_IFNAME": "eth0",
}


def missing() -> str:
    """Return what this machine lacks for hosts, "" for nothing."""
    if os.geteuid() != 0:
        return "root, which alone may make network namespaces"
    tools = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    return f"{', '.join(tools)} (packages iproute2 and util-linux)" if tools else ""


def _do(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], check=check, capture_output=True, text=True)


class Hosts:
    """So many hosts, ``h1`` to ``hN``, up inside of a ``with``, with links of `mbit` Mbit/s each way; 0 does not limit."""

    def __init__(self, count: int, mbit: float = 0) -> None:
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="mpi-ef-hosts-", dir="/tmp"))
        self._prefix, self._mbit = f"ef{os.getpid()}", mbit

    def _space(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def __enter__(self) -> Self:
        if lacks := missing():
            raise SystemExit(f"hosts: this needs {lacks}")
        try:
            self._up()
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, subprocess.CalledProcessError):
                raise SystemExit(f"hosts: {' '.join(error.cmd)}: {error.stderr.strip()}") from error
            raise
        return self

    def _up(self) -> None:
        table = "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{i} {name}\n" for i, name in enumerate(self.names, 1))
        switch = self._space("sw")
        _do("ip", "netns", "add", switch)
        _do("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _do("ip", "-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names, 1):
            space = self._space(name)
            _do("ip", "netns", "add", space)
            etc = Path("/etc/netns") / space
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(table, encoding="ascii")
            _do("ip", "link", "add", f"p{i}", "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", space)
            _do("ip", "-n", switch, "link", "set", f"p{i}", "master", "br0", "up")
            for where, device in ((space, "eth0"), (switch, f"p{i}")):
                self._limit(where, device)
            _do("ip", "netns", "exec", space, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1",
                "net.ipv4.tcp_no_metrics_save=1", "net.ipv4.tcp_slow_start_after_idle=0", check=False)
            for what in (("link", "set", "lo", "up"), ("addr", "add", f"{NETWORK}.{i}/24", "dev", "eth0"),
                         ("link", "set", "eth0", "up")):
                _do("ip", "-n", space, *what)
            _do("ip", "-n", space, "route", "change", f"{NETWORK}.0/24", "dev", "eth0", "proto", "kernel", "scope", "link",
                "src", f"{NETWORK}.{i}", "congctl", "cubic", check=False)  # times of other algorithms vary by half
        agent = self.folder / "agent"
        enter = " ".join(self._enter("$h"))
        agent.write_text("#!/bin/bash\n# In the place of ssh: [-options] host command\n"
                         'while [ "${1#-}" != "$1" ]; do shift; done\n'
                         f'h=$1; shift\nexec {enter} bash -c "$*"\n', encoding="ascii")
        agent.chmod(0o755)

    def _limit(self, space: str, device: str) -> None:
        if self._mbit:
            burst = max(BURST_NBYTES, int(self._mbit * 125))  # a millisecond
            _do("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{self._mbit}mbit", "burst",
                burst, "latency", QUEUE)

    def _enter(self, name: str) -> list[str]:
        own = "$h" if name == "$h" else name
        space = f"{self._prefix}{own}"
        inside = "'hostname \"$0\"; exec \"$@\"'"
        return ["ip", "netns", "exec", space, "unshare", "--uts", "--ipc", "bash", "-c", inside, own]

    def command(self, name: str, *words: object) -> list[str]:
        """Return a command that runs `words` on a host."""
        return [word.strip("'") for word in self._enter(name)] + [str(word) for word in words]

    def mpirun(self, ranks: int, *words: object, by_host: bool = True) -> list[str]:
        """Return the command that starts `ranks` of a program with Open MPI, those of a host one after the other.

        ``by_host=False`` deals them out in turn.
        """
        each = -(-ranks // len(self.names))
        beside = Path(sys.executable).parent
        return self.command(
            self.names[0], beside / "mpirun", "--prtemca", "plm_ssh_agent", self.folder / "agent", "--host",
            ",".join(f"{name}:{each}" for name in self.names), "-n", ranks, "--map-by",
            f"ppr:{each}:node" if by_host else "node", "--bind-to", "none",
            *(word for name in [*SETTINGS, *(n for n in os.environ if n == "PYTHONPATH" or n.startswith("MPI_EF_"))]
              for word in ("-x", name)), *words)

    def run(self, ranks: int, *words: object, within: float, by_host: bool = True,
            environment: Mapping[str, str] | None = None) -> str:
        """Return what a program on so many ranks prints. `RuntimeError` with that where it fails or takes too long."""
        taken = [option for name in environment or {} for option in ("-x", name)]
        command = self.mpirun(ranks, *taken, *words, by_host=by_host)
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=os.environ | SETTINGS | (environment or {}), start_new_session=True)
        try:
            text, _ = started.communicate(timeout=within)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            self.crash()
            text, _ = started.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"not done within {within:.0f} s: {command[-6:]}\n{text}") from None
            raise
        if started.returncode:
            raise RuntimeError(f"status {started.returncode}: {command[-6:]}\n{text}")
        return text

    def sent_nbytes(self) -> dict[str, int]:
        """Return the bytes that each host's link has carried away from it so far."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return {name: int(_do("ip", "netns", "exec", self._space(name), "cat", path).stdout) for name in self.names}

    def crash(self, names: Sequence[str] = ()) -> None:
        """Kill all that runs on some hosts, or on all."""
        for name in names or self.names:
            for pid in _do("ip", "netns", "pids", self._space(name), check=False).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.crash()
        for name in [*self.names, "sw"]:
            _do("ip", "netns", "del", self._space(name), check=False)
            shutil.rmtree(Path("/etc/netns") / self._space(name), ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
