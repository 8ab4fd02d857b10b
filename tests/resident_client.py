"""What a launcher starts in place of Python, see resident.py: ``python -I -S resident_client.py FOLDER ARGUMENTS``."""

import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def ask(folder: str, arguments: list[str]) -> None:
    """Hand everything over, pass signals on, end as the child ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    link = socket.socket(socket.AF_UNIX)
    link.connect(f"{folder}/socket")
    inherited = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    inherited = [fd for fd in inherited if fd != link.fileno() and _is_open(fd)]
    request = os.memfd_create("request")
    document = json.dumps([arguments, dict(os.environ), os.getcwd(), inherited])  # noqa: PTH109
    os.write(request, document.encode("utf-8", "surrogateescape"))
    socket.send_fds(link, [b"!"], [request, *inherited])
    (child,) = struct.unpack("i", link.recv(4))

    def forward(number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):  # the child has just ended, and its status is on the way
            os.kill(child, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    answer = link.recv(4)
    status = struct.unpack("i", answer)[0] if answer else 1
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # it was that of the folder of descriptors
        return False
    return True


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:])
