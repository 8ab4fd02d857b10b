"""What differs between two checkpoints: documents, and arrays entry by entry. Local, one pair of arrays in memory."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import BFLOAT16, raw_bytes
from .reader import Checkpoint, Names

__all__ = ["Difference", "brain_floats", "compare", "wide"]

_BLOCK = 1 << 20
_APART = {"seconds", "untimed", "versions"}  # keys in documents whose values are no part of the state, nor are *_seconds


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in checkpoints a and b."""

    where: str  # "checkpoint", "replicated", or "rank 3"
    name: str  # of the array, or the path in the document
    text: str  # what differs
    entries: int = 0  # how many entries of the array have different bits; 0 where it is not about entries
    largest: float | None = None  # absolute difference; None where it is not about numbers
    relative: float | None = None  # norm of the difference over the norm in a; None as before
    counts: bool = True  # False: which run it was, how long it took, with which programs: no part of the state


def compare(a: Checkpoint, b: Checkpoint) -> Iterator[Difference | None]:
    """Yield what differs, and None for every array whose bits are the same. Local; reads all of both.

    Parts of the ranks are compared where as many ranks wrote both.

    Raises
    ------
    CheckpointError
        When one of them is damaged.
    """
    for name in ("step", "world_size", "run"):
        first, second = getattr(a, name), getattr(b, name)
        if first != second:
            yield Difference("checkpoint", name, f"{first} and {second}", counts=name != "run")
    yield from _documents("replicated", a.document, b.document)
    yield from _arrays("replicated", a.replicated_names(), b.replicated_names(), a.replicated, b.replicated)
    for rank in range(a.world_size) if a.world_size == b.world_size else ():
        where = f"rank {rank}"
        yield from _documents(where, a.rank_document(rank), b.rank_document(rank))
        yield from _arrays(where, a.per_rank_names(rank), b.per_rank_names(rank), partial(a.per_rank, rank=rank),
                           partial(b.per_rank, rank=rank))


def _documents(where: str, a: Any, b: Any, path: str = "document", *, counts: bool = True) -> Iterator[Difference]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            inside, apart = f"{path}.{key}", not counts or key in _APART or key.endswith("_seconds")
            if key in a and key in b:
                yield from _documents(where, a[key], b[key], inside, counts=not apart)
            else:
                yield Difference(where, inside, f"only in the {'first' if key in a else 'second'}", counts=not apart)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (first, second) in enumerate(zip(a, b, strict=True)):
            yield from _documents(where, first, second, f"{path}[{number}]", counts=counts)
    elif json.dumps(a) != json.dumps(b):
        yield Difference(where, path, f"{_short(a)} and {_short(b)}", counts=counts)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _arrays(where: str, a: Names, b: Names, read_a: Callable[[str], NDArray[Any]],
            read_b: Callable[[str], NDArray[Any]]) -> Iterator[Difference | None]:
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield Difference(where, name, f"only in the {'first' if name in a else 'second'}")
        elif a[name] != b[name]:
            (shape, dtype), (other_shape, other_dtype) = a[name], b[name]
            yield Difference(where, name, f"{dtype} {shape} and {other_dtype} {other_shape}")
        else:
            yield _entries(where, name, read_a(name), read_b(name))


def _entries(where: str, name: str, a: NDArray[Any], b: NDArray[Any]) -> Difference | None:
    if raw_bytes(a) == raw_bytes(b):
        return None
    as_bits = np.dtype((np.void, a.dtype.itemsize))
    entries, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for start in range(0, a.size, _BLOCK):  # numbers that are wider for a moment only
        first, second = (of.reshape(-1)[start : start + _BLOCK] for of in (a, b))
        entries += int((first.view(as_bits) != second.view(as_bits)).sum())
        x, y = wide(first), wide(second)
        with np.errstate(all="ignore"):
            gap = np.abs(x - y)
            largest = max(largest, float(gap.max())) if np.isfinite(largest) else largest
            squares, norm = squares + float(np.vdot(gap, gap).real), norm + float(np.vdot(x, x).real)
    if not np.isfinite([largest, squares, norm]).all():
        return Difference(where, name, f"{entries:,} of {a.size:,} entries differ, NaN or Inf among all", entries)
    relative = (squares / norm) ** 0.5 if norm else None
    text = f"{entries:,} of {a.size:,} entries differ, by {largest:.3g} at most"
    return Difference(where, name, text + (f", {relative:.3g} of the norm" if norm else ""), entries, largest, relative)


def wide(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy in float64 or complex128; of bfloat16 the numbers that it stands for."""
    with np.errstate(all="ignore"):  # NaNs that signal
        numbers = brain_floats(array) if array.dtype == BFLOAT16 else array
        return numbers.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def brain_floats(array: NDArray[Any]) -> NDArray[Any]:
    """Return what the bits of a bfloat16 array stand for, in float32, bit for bit."""
    bits = array.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)
