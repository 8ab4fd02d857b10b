"""Sparse messages of many chunks, or of many ranks, in one call: a call from Python costs more than a short message.

A message is the code of its indices (:mod:`.coding`), relative to where its chunk begins, and their values, as they are
or in the formats of :mod:`.quantize`::

    | low bits of indices | upper bitmap | values                                    |
    | low bits of indices | upper bitmap | exponents | padding | codes     | padding |

layout : (m, 7) int64, a row for each message: where its chunk begins in the vector, how many entries it has (k), low bits of
    an index, bytes of the low bits, bytes of all that comes before the values, bytes of the message, length of its chunk.
    One row stands for all.
headroom : int
    -1 for values as they are, else that of the format, see :data:`FORMATS`.
memory, places : (nbytes,) uint8, and (m,) int64: where each message begins, a multiple of 8
"""

import numpy as np
from numpy.typing import NDArray

from ._jit import jit
from ._vector import Vector
from .coding import decode_indices, encode_indices
from .quantize import _add_quantized, _quantize
from .sparse import add_sparse, clear_sparse

__all__ = ["add_messages", "clear_messages", "read_values", "write_messages"]

Layout = NDArray[np.int64]
Memory = NDArray[np.uint8]


@jit
def write_messages(layout: Layout, headroom: int, block: int, indices: NDArray[np.int64], values: Vector, memory: Memory,
                   places: NDArray[np.int64], scratch: Vector) -> bool:
    """Write the messages of all chunks, whose entries follow each other in `indices`, (sum of k,) into the whole vector.

    Returns
    -------
    bool
        Whether all values are finite.
    """
    first, finite = 0, True
    factors = np.zeros(3, values.dtype)
    factors[0] = 1
    for j in range(places.size):
        start, k, low, lower, head, nbytes, _ = layout[min(j, layout.shape[0] - 1)]
        wire = memory[places[j] : places[j] + nbytes]
        own, kept = indices[first : first + k], values[first : first + k]
        for i in range(k):
            own[i] -= start
        encode_indices(own, low, wire[:lower].view(np.uint64), wire[lower:head].view(np.uint64))
        for i in range(k):
            own[i] += start
        body = wire[head:]
        if headroom < 0:
            used = k * values.itemsize
            body[:used].view(values.dtype)[:] = kept
            body[used:] = 0
        else:
            size = 2 * -(-k // block)
            begin = -(-size // 8) * 8
            body[size:begin] = 0
            none, keep = kept[:0], scratch[:0]
            if headroom == 7:
                body[begin + k :] = 0
                finite &= _quantize((kept, none, none), factors, keep, factors, False, headroom, block,
                                    body[:size].view(np.int16), body[begin : begin + k].view(np.int8), scratch)
            else:
                body[begin + 2 * k :] = 0
                finite &= _quantize((kept, none, none), factors, keep, factors, False, headroom, block,
                                    body[:size].view(np.int16), body[begin : begin + 2 * k].view(np.int16), scratch)
        first += k
    return finite


@jit
def _read(body, headroom, block, values, scratch):
    """Overwrite `values` with those of one message."""
    k, one = values.size, values.dtype.type(1)
    if headroom < 0:
        values[:] = body[: k * values.itemsize].view(values.dtype)
        return
    size = 2 * -(-k // block)
    begin = -(-size // 8) * 8
    if headroom == 7:
        _add_quantized(body[:size].view(np.int16), body[begin : begin + k].view(np.int8), headroom, block, one, True,
                       values, scratch)
    else:
        _add_quantized(body[:size].view(np.int16), body[begin : begin + 2 * k].view(np.int16), headroom, block, one, True,
                       values, scratch)


@jit
def read_values(layout: Layout, headroom: int, block: int, memory: Memory, places: NDArray[np.int64], values: Vector,
                scratch: Vector) -> None:
    """Overwrite `values`, (sum of k,), with those of all messages, one after the other."""
    first = 0
    for j in range(places.size):
        _, k, _, _, head, nbytes, _ = layout[min(j, layout.shape[0] - 1)]
        _read(memory[places[j] + head : places[j] + nbytes], headroom, block, values[first : first + k], scratch)
        first += k


@jit
def add_messages(layout: Layout, headroom: int, block: int, memory: Memory, places: NDArray[np.int64],
                 factor: np.floating, out: Vector, indices: NDArray[np.int64], values: Vector, scratch: Vector) -> None:
    """Add ``factor`` times what each message says to `out`, in the order of messages.

    indices, values : (the largest k,) scratch
    """
    for j in range(places.size):
        start, k, low, lower, head, nbytes, d = layout[min(j, layout.shape[0] - 1)]
        wire = memory[places[j] : places[j] + nbytes]
        decode_indices(wire[:lower].view(np.uint64), wire[lower:head].view(np.uint64), low, d, indices[:k])
        _read(wire[head:], headroom, block, values[:k], scratch)
        add_sparse(indices[:k], values[:k], factor, out[start:])


@jit
def clear_messages(layout: Layout, memory: Memory, places: NDArray[np.int64], out: Vector,
                   indices: NDArray[np.int64]) -> None:
    """Set `out` to zero at the indices of all messages; (the largest k,) `indices` are scratch."""
    for j in range(places.size):
        start, k, low, lower, head, _, d = layout[min(j, layout.shape[0] - 1)]
        wire = memory[places[j] : places[j] + head]
        decode_indices(wire[:lower].view(np.uint64), wire[lower:head].view(np.uint64), low, d, indices[:k])
        clear_sparse(indices[:k], out[start:])
