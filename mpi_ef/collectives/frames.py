"""Frames: the messages of an exchange as MPI sees them, one row per rank, each with a header.

::

    frame   | step (u32) | status (u8) | version (u8) | plan (u16) | wire of the compressor | padding |

The status lets a rank that cannot take part (a NaN in its gradient, an array of the wrong shape) say so inside the
exchange itself: all ranks see it and raise together, and no extra message is needed for that.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpi_ef.comm.consensus import ranks_text
from mpi_ef.compress import Codec
from mpi_ef.errors import DisagreementError, MpiEfError, NonFiniteError, PeerError
from mpi_ef.kernels.backend import backend

__all__ = ["NON_FINITE", "NOTHING", "OK", "REJECTED", "WIRE_VERSION", "Frames", "Twin", "header_of", "misunderstanding",
           "status_of", "what_is_wrong"]

OK, NON_FINITE, REJECTED, NOTHING = 0, 1, 2, 255  # the last is what is there before anything has arrived

# Of messages that cannot be read by a package with another version.
WIRE_VERSION = 2

_HEADER = np.dtype([("step", "<u4"), ("status", "u1"), ("version", "u1"), ("plan", "<u2")])

# MPI counts are C ints in the calls every MPI has. Longer frames are counted in units of one MiB.
LARGEST_COUNT = 2**31 - 1
UNIT_NBYTES = 2**20


class Twin:
    """An array where the vectors of `kernels` are, and its twin on the host, which MPI sees. On the CPU they are one.

    With `direct` there is no twin: MPI sees the memory of the device.

    Attributes
    ----------
    there, host : the two arrays, of one shape and dtype
    message : what MPI is given
    """

    def __init__(self, kernels: Any, shape: int | tuple[int, ...], dtype: DTypeLike, *, direct: bool = False) -> None:
        self._kernels, self._direct = kernels, direct
        self.host: NDArray[Any] = kernels.on_host(0 if direct else shape, dtype)
        self.there: NDArray[Any] = self.host if kernels.device == "cpu" else kernels.zeros(shape, dtype)
        self.message: Any = kernels.message(self.there) if direct else self.host
        self._sending: Any = None

    def send(self) -> None:
        """Let the host have what is on the device, without waiting for it."""
        if self.there is not self.host:
            self._sending = self._kernels.settled() if self._direct else self._kernels.sending(self.there, self.host)

    def sent(self) -> bool:
        """Tell whether what :meth:`send` has begun is done. Does not wait."""
        return self._sending is None or bool(self._sending.here())

    def push(self) -> None:
        """Let the host have what is on the device, and wait for it; the device has done then what it was asked for."""
        if self.there is not self.host:
            if self._sending is None:
                self.send()
            self._sending.wait()
            self._sending = None

    def pull(self) -> None:
        """Let the device have what is on the host."""
        if self.there is not self.host and not self._direct:
            self._kernels.to_device(self.host, self.there)


class Frames:
    """Memory for `rows` frames, contiguous, also on the device of the `kernels`, which is what MPI sees with `direct`.

    Attributes
    ----------
    header : (rows,) structured array with the fields ``step``, ``status``, ``version`` and ``plan``, on the host
    headers : (rows,) uint64, the same 8 bytes as one number, for quick comparison
    wires : (rows, wire_nbytes) uint8, a view, where vectors are
    message : buffer specification for an MPI collective in which every rank has one row
    """

    def __init__(self, rows: int, wire_nbytes: int, kernels: Any = None, *, direct: bool = False) -> None:
        start = _HEADER.itemsize
        nbytes = start + wire_nbytes
        if nbytes > LARGEST_COUNT:
            nbytes = -(-nbytes // UNIT_NBYTES) * UNIT_NBYTES
        self.frame_nbytes = nbytes
        self._kernels = backend(np.float32) if kernels is None else kernels
        self._twin = Twin(self._kernels, (rows, nbytes), np.uint8, direct=direct)
        self.send, self.sent, self.push, self.pull = (getattr(self._twin, name) for name in ("send", "sent", "push", "pull"))
        # What the host writes and reads of frames that are on the device alone.
        self._apart = self._twin.there[:, :start] if direct else None
        heads = self._kernels.on_host((rows, start), np.uint8) if direct else self._twin.host[:, :start]
        self.header, self.headers = heads.view(_HEADER)[:, 0], heads.view("<u8")[:, 0]
        self._heads: NDArray[np.uint8] = heads
        self.wires = self._twin.there[:, start : start + wire_nbytes]
        self.message: Any = self._twin.message
        if nbytes > LARGEST_COUNT:
            from mpi4py import MPI

            unit = MPI.BYTE.Create_contiguous(UNIT_NBYTES).Commit()
            self.message = [self._twin.message, nbytes // UNIT_NBYTES, unit]

    def expect(self) -> None:
        """Let no header look like that of a message, before messages arrive in these frames."""
        self.mark(0xFFFFFFFFFFFFFFFF)

    def mark(self, header: int) -> None:
        """Write a header into all frames, where MPI sees it."""
        self.headers.fill(header)
        if self._apart is not None:
            self._kernels.exchange_now(self._heads, self._apart, to_device=True)

    def look(self) -> NDArray[np.uint64]:
        """Return the headers of the frames that MPI has written."""
        if self._apart is not None:
            self._kernels.exchange_now(self._heads, self._apart, to_device=False)
        return self.headers

    def wire(self, row: int, codec: Codec) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the wire in `row` for `codec`, whose messages may be shorter than the row."""
        return self.wires[row, : codec.nbytes]


def header_of(step: int, status: int, plan: int) -> int:
    """Return the header of a frame as one number."""
    return (step & 0xFFFFFFFF) | status << 32 | WIRE_VERSION << 40 | (plan & 0xFFFF) << 48


def status_of(frames: Frames, status: int) -> tuple[int, ...]:
    """Return the rows of `frames` whose header carries `status`."""
    return tuple(np.flatnonzero(frames.header["status"] == status).tolist())


def what_is_wrong(frames: Frames, subject: str) -> MpiEfError:
    """Return the error where `frames`, of all ranks, are of one plan, not all are messages, and no rank has refused."""
    if broken := status_of(frames, NON_FINITE):
        return NonFiniteError(f"{subject}: NaN or Inf on {ranks_text(broken)}; nothing was changed anywhere, so this step "
                              "can be skipped", broken)
    steps = frames.header["step"].tolist()
    return DisagreementError(f"{subject}: ranks are out of step: exchange number {steps} by rank; call the plan equally "
                             "often on all ranks")


def misunderstanding(frames: Frames, subject: str) -> MpiEfError | None:
    """Return an error where `frames`, of all ranks, are not all messages of one exchange of one plan."""
    if missing := status_of(frames, NOTHING):
        return PeerError(f"{subject}: nothing has arrived from {ranks_text(missing)}; was the communicator freed?")
    for field, what, remedy in (
        ("version", "messages of version", "install one version of mpi_ef everywhere"),
        ("plan", "plan number", "use the plans of a communicator in the same order on all ranks"),
    ):
        values = frames.header[field].tolist()
        if len(set(values)) > 1:
            return DisagreementError(f"{subject}: ranks are not in the same exchange: {what} {values} by rank; {remedy}")
    return None
