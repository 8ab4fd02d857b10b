"""Start Python programs without paying for their imports: a resident process that has torch in memory forks them.

Importing torch and this package costs 2.5 CPU seconds a process, more than most programs of the tests need for all the
rest. ``command(...)`` returns what a launcher starts in the place of ``python ...``: a client of two hundredths of a second
that hands its arguments, environment, folder and file descriptors to the resident process. That forks; the child runs the
program as ``python ...`` would. Signals to the client are passed on, its death kills the child, and both end alike.

A fork differs from a process of its own in its parent and its command line in /proc (see `processes`), in variables that
Python or a module reads while it starts, and in the seed of hashes, which all forked ranks share. Programs that depend on
those are started for real, and so are all with MPI_EF_TEST_START=real (``make test-all``).
"""

import atexit
import ctypes
import fcntl
import gc
import io
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

ALL_REAL = os.environ.get("MPI_EF_TEST_START") == "real"
LISTENING = b"listening\n"
CLIENT = str(Path(__file__).with_name("resident_client.py"))
_PR_SET_PDEATHSIG = 1
_running: list["Resident"] = []


class Resident:
    """The resident process of this test process; its folder has its socket, and a note for each running child."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mpi-ef-resident-"))
        command = [sys.executable, __file__, str(self.folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a process with threads must not fork
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                                         start_new_session=True)
        if self._process.stdout.readline() != LISTENING:
            self.close()
            raise AssertionError("the resident process did not start; its error is above")

    def close(self) -> None:
        """End it and whatever it has forked."""
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        shutil.rmtree(self.folder)


def command(*arguments: object, real: bool = False) -> list[str]:
    """Return the command that runs ``python ARGUMENTS`` in a fork of the resident process, which is started when needed.

    With `real` it is Python itself.
    """
    if real or ALL_REAL:
        return [sys.executable, *map(str, arguments)]
    if not _running:
        _running.append(Resident())
    return [sys.executable, "-I", "-S", CLIENT, str(_running[0].folder), *map(str, arguments)]


def processes() -> dict[int, tuple[list[str], dict[str, str]]]:
    """Return the arguments and the environment of Python's processes, forked or real, by their number."""
    found = {}
    for path in _running[0].folder.glob("[0-9]*") if _running else []:
        with suppress(FileNotFoundError):
            found[int(path.name)] = tuple(json.loads(path.read_text()))
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            first, *words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "python" in first and CLIENT not in words and __file__ not in words:
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                found[int(process.name)] = (words, dict(word.split("=", 1) for word in environment if "=" in word))
    return found


def close() -> None:
    """End the resident process, if there is one."""
    while _running:
        _running.pop().close()


# ---- the resident process


class Server:
    """Fork a child for each client, and tell them about each other's end."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(f"{folder}/socket")
        self._door.listen(64)
        self._events = selectors.DefaultSelector()
        self._events.register(self._door, selectors.EVENT_READ)
        self._events.register(0, selectors.EVENT_READ)
        self._links: dict[int, tuple[socket.socket, int]] = {}  # of each child: its client, and a handle for its end
        os.write(1, LISTENING)

    def serve(self) -> list[int]:
        """Serve until standard input ends; return in children alone, with what a client has sent."""
        while True:
            for key, _ in self._events.select():
                if key.fileobj == 0:
                    for child in self._links:
                        os.kill(child, signal.SIGKILL)
                    os._exit(0)
                elif key.fileobj is self._door:
                    received = self._fork()
                    if received:
                        return received
                elif key.data in self._links:
                    self._ended(key.data, client=key.fileobj is self._links[key.data][0])

    def _fork(self) -> list[int]:
        link, _ = self._door.accept()
        _, fds, _, _ = socket.recv_fds(link, 1, 250)
        child = os.fork()
        if child == 0:
            for other, handle in self._links.values():
                other.close()
                os.close(handle)
            for own in (self._events, self._door, link):
                own.close()
            return fds
        for fd in fds:
            os.close(fd)
        link.sendall(struct.pack("i", child))
        handle = os.pidfd_open(child)
        self._links[child] = (link, handle)
        self._events.register(handle, selectors.EVENT_READ, child)
        self._events.register(link, selectors.EVENT_READ, child)
        return []

    def _ended(self, child: int, *, client: bool) -> None:
        link, handle = self._links[child]
        if client:
            os.kill(child, signal.SIGKILL)
            self._events.unregister(link)
            return
        _, status = os.waitpid(child, 0)
        (self.folder / str(child)).unlink(missing_ok=True)
        with suppress(OSError):  # the client is dead, too
            link.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
        for watched in (link, handle):
            with suppress(KeyError):
                self._events.unregister(watched)
        link.close()
        os.close(handle)
        del self._links[child]


def import_everything() -> None:
    """Load modules and machine code that most programs need; torch imports its compiler with the first optimizer."""
    import h5py  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    from mpi4py._mpiabi import _get_mpiabi
    from virtual import results

    import mpi_ef.ddp  # noqa: F401
    from mpi_ef import DistributedOptimizer, EControl, OneBitAdam, Quantize, Sign, TopK

    build = (
        lambda p, comm: DistributedOptimizer(torch.optim.AdamW(p), comm, TopK(0.1, values=Quantize("bf16"))),
        lambda p, comm: DistributedOptimizer(torch.optim.AdamW(p), comm, TopK(0.1)),
        lambda p, comm: DistributedOptimizer(torch.optim.AdamW(p), comm, Sign(block=64)),
        lambda p, comm: EControl(p, comm, TopK(0.1), lr=0.1),
        lambda p, comm: OneBitAdam(p, comm, freeze_step=1),
    )

    def steps(comm):
        for number in range(len(build)):
            p = torch.nn.Parameter(torch.zeros(1000))
            optimizer = build[number]([p], comm)
            for _ in range(3):
                p.grad = torch.ones(1000)  # no backward: its threads would not come along
                optimizer.step()

    results(2, steps)
    _get_mpiabi()  # loads the MPI library, and starts nothing
    assert "mpi4py.MPI" not in sys.modules
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) == 1:  # noqa: PTH208
            break
        time.sleep(0.01)  # a thread that Python has joined takes a moment to be gone
    else:
        raise AssertionError("a process with threads must not fork")
    gc.collect()
    gc.freeze()


# ---- a child


def become(folder: Path, fds: list[int]) -> list[str]:
    """Take the client's place: its descriptors under its numbers, its environment, its folder. Return its arguments."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request, *own = fds
    document = os.pread(request, os.fstat(request).st_size, 0).decode("utf-8", "surrogateescape")
    arguments, environment, cwd, wanted = json.loads(document)
    os.close(request)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1 + max(wanted)) for fd in own]
    for fd in own:
        os.close(fd)
    for fd, number in zip(moved, wanted, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    note = folder / f".{os.getpid()}"
    note.write_text(json.dumps([arguments, environment]))
    note.rename(folder / str(os.getpid()))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        raw = open(number, "rb" if number == 0 else "wb", -1 if number < 2 else 0, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, "utf-8", "strict" if number < 2 else "backslashreplace",
                                  line_buffering=number == 2 or raw.isatty(), write_through=number == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    random.seed()
    sys.modules["numpy"].random.seed()
    return arguments


def run(arguments: list[str]) -> None:
    """Do what ``python ARGUMENTS`` does."""
    kind, *rest = arguments
    sys.path.pop(0)  # the folder of this file
    if kind == "-m":
        name, *sys.argv[1:] = rest
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0] = "-c"
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


def status_of(arguments: list[str]) -> int:
    """Run a program and return its exit status; what it raises is printed."""
    try:
        run(arguments)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status: int) -> None:
    """Do what Python does at its end but free every object: a fork would copy all memory for that, in two seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    mpi, leave = sys.modules.get("mpi4py.MPI"), os._exit
    if mpi and mpi.Is_initialized():
        if "MPICH" in mpi.Get_library_version():
            leave = ctypes.CDLL(None).exit  # it says goodbye to its launcher in a handler of C's exit
        if not mpi.Is_finalized():
            mpi.Finalize()  # as mpi4py does when Python is gone
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    leave(status)


if __name__ == "__main__":
    import_everything()
    server = Server(sys.argv[1])
    end(status_of(become(server.folder, server.serve())))
