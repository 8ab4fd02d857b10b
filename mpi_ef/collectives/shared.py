"""Memory that the ranks of a node share."""

import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.comm.attributes import mpi_of
from mpi_ef.comm.protocol import Comm

__all__ = ["NOT_MPI", "shared_zeros"]

NOT_MPI = "the communicator is not MPI's"
PAGE_NBYTES = 4096
_TOKEN_NBYTES = 16


def shared_zeros(node: Comm, rows: int, size: int, dtype: DTypeLike) -> tuple[Any, str]:
    """Return zeros, (rows, at least `size`), that all ranks have in common; or None, and why not. Collective over `node`.

    It is a file of no folder (``memfd_create``), which is no part of ``/dev/shm`` and its limit, needs no window of MPI, and
    is gone with the last array over it, however a rank ends: giving it back is local. The memory is taken here, each rank
    its row, on the rank's side of the machine; where a rank cannot have it, none has. Rows are whole pages.

    Parameters
    ----------
    rows : int
        At least as many as ranks; those beyond belong to the last rank.
    """
    if mpi_of(node) is None:
        return None, NOT_MPI
    rank, last = int(node.Get_rank()), int(node.Get_size()) - 1
    pitch = -(-max(1, size * np.dtype(dtype).itemsize) // PAGE_NBYTES) * PAGE_NBYTES
    fd, memory, path, token, problem = -1, None, "", b"", ""
    try:
        if rank == 0:
            fd, token = _made(rows * pitch)
            path = f"/proc/{os.getpid()}/fd/{fd}"
    except (OSError, AttributeError) as error:
        problem = str(error)
    path, token, problem = node.allgather((path, token, problem))[0]
    try:
        if path:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC) if rank else fd
            _check(fd, token, path)
            os.posix_fallocate(fd, rank * pitch, (rows - rank if rank == last else 1) * pitch)
            memory = mmap.mmap(fd, rows * pitch)
    except (OSError, ValueError) as error:
        problem = str(error)
    problems = [theirs for theirs in node.allgather(problem) if theirs]
    if fd >= 0:
        os.close(fd)
    if problems or memory is None:
        return None, problems[0]
    array = np.frombuffer(memory, dtype).reshape(rows, -1)
    if rank == 0:
        memory[:_TOKEN_NBYTES] = bytes(_TOKEN_NBYTES)
    node.Barrier()
    return array, ""


def _made(nbytes: int) -> tuple[int, bytes]:
    """Return a new file, and what it begins with."""
    fd, token = os.memfd_create("mpi_ef"), os.urandom(_TOKEN_NBYTES)
    os.ftruncate(fd, nbytes)
    os.pwrite(fd, token, 0)
    return fd, token


def _check(fd: int, token: bytes, path: str) -> None:
    """Raise where a path leads to the file of another process, as it may in another container."""
    if os.pread(fd, _TOKEN_NBYTES, 0) != token:
        raise OSError(f"{path} is not what the first rank of the node has made")
