"""The checksum of arrays in memory, and in files of version 1: as fast as memory, with NumPy alone."""

import zlib
from collections.abc import Iterable

import numpy as np

__all__ = ["BLOCK", "checksum", "whole_checksum"]

BLOCK = 1 << 20
"""Bytes that a checksum takes at a time; what is there stays in the cache meanwhile."""

_COLUMNS = 256


def checksum(block: memoryview, value: int = 0) -> int:
    """Return the checksum of an array's bytes up to the end of `block`. Local.

    Blocks of 1 MiB count as 512 rows of 256 little-endian numbers of 64 bits. What goes into the CRC-32 is the sum of every
    column, then of every row, modulo 2^64; of a shorter block its bytes. CRC-32 of all bytes would take longer than reading
    them from memory. A flipped bit changes a sum of each kind, rows or columns that have changed places those of the other.

    Parameters
    ----------
    block : memoryview of bytes
        `BLOCK` bytes; fewer only at the end of the array.
    value : int
        Checksum of the blocks before.
    """
    if block.nbytes != BLOCK:
        return zlib.crc32(block, value)
    rows = np.frombuffer(block, "<u8").reshape(-1, _COLUMNS)
    for sums in (rows.sum(axis=0, dtype="<u8"), rows.sum(axis=1, dtype="<u8")):
        value = zlib.crc32(sums.astype("<u8", copy=False).data, value)
    return value


def whole_checksum(pieces: Iterable[memoryview]) -> int:
    """Return the checksum of all bytes of an array, in pieces of which all but the last are multiples of `BLOCK`. Local."""
    value = 0
    for raw in pieces:
        for start in range(0, raw.nbytes, BLOCK):
            value = checksum(raw[start : start + BLOCK], value)
    return value
