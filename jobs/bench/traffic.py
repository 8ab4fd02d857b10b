"""Counting messages, and the memory that kernels touch: bytes of the arrays they stream through, by argument.

Counted are the passes that a kernel's docstring promises; what an MPI library copies is not seen. Entries touched here
and there (sparse messages) count by their own size, although a whole cache line moves.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from inspect import signature
from math import ceil
from typing import Any

from mpi_ef import kernels
from mpi_ef.collectives.pairwise import UNDER_WAY

__all__ = ["Counting", "counted"]

_REDUCTIONS = ("Allreduce", "Iallreduce")
_GATHERS = ("Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Iallgather", "Ialltoall", "allgather")


class Counting:
    """A communicator that counts the messages that a rank sends one after the other.

    These are n - 1 in a gather or an exchange of all with all, as around a ring. A reduction is said to take no more than
    any has to, log2 n, as well as no more bytes. Of messages to single ranks several are under way, which wait for the link
    together.
    """

    def __init__(self, comm: Any) -> None:
        self.comm, self.counted = comm, Fraction(0)
        others = comm.Get_size() - 1
        self._turns = dict.fromkeys(_GATHERS, Fraction(others)) | {"Isend": Fraction(1, UNDER_WAY)}
        self._turns |= dict.fromkeys(_REDUCTIONS, Fraction(others.bit_length()))

    @property
    def messages(self) -> int:
        """How many of them there were."""
        return ceil(self.counted)

    def __bool__(self) -> bool:
        return bool(self.comm)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.comm, name)
        if name not in self._turns:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.counted += self._turns[name]
            return found(*arguments, **options)

        return call


_CACHED = {"scratch", "histogram", "bitmap"}  # small enough to stay in a cache


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the bytes that kernels called in this process inside of the block touch, by kernel."""
    touched = Counter[str]()
    originals = {name: getattr(kernels, name) for name in kernels.__all__ if callable(getattr(kernels, name))}
    for name, kernel in originals.items():
        setattr(kernels, name, _counting(name, kernel, touched))
    try:
        yield touched
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)


def _counting(name: str, kernel: Callable[..., Any], touched: Counter[str]) -> Callable[..., Any]:
    names = list(signature(getattr(kernel, "py_func", kernel)).parameters)

    def call(*arguments: Any) -> Any:
        touched[name] += _nbytes(name, dict(zip(names, arguments, strict=True)))
        return kernel(*arguments)

    return call


def _nbytes(kernel: str, given: dict[str, Any]) -> int:
    """Return the bytes that one call streams through."""
    if kernel == "select_largest":  # its arrays have room for candidates that come and go
        k = int(given["counts"].sum())
        given = given | {"indices": given["indices"][:k], "values": given["values"][:k]}
    if kernel.endswith(("_messages", "_values")):  # what they say: memory has room for headers, layouts are short
        layout, places = given["layout"], given["places"]
        rows = layout if len(layout) == len(places) else layout[:1].repeat(len(places), 0)
        k, wires = int(rows[:, 1].sum()), int(rows[:, 5 if kernel != "clear_messages" else 4].sum())
        entries = {"write_messages": 1, "read_values": 1, "add_messages": 2, "clear_messages": 1}[kernel]
        return wires + entries * k * int(given["out" if "out" in given else "values"].itemsize)
    arrays = {name: value for name, value in given.items() if hasattr(value, "nbytes") and value.ndim}
    total: int = sum(value.nbytes for name, value in arrays.items() if name not in _CACHED and name != "out")
    total += _passes_over_terms(kernel, given) * sum(term.nbytes for term in given.get("terms", ()))
    if kernel == "gather":
        total += int(given["values"].nbytes) * sum(term.size > 0 for term in given["terms"])
    if kernel == "mean_slice":
        total -= int(given["rows"].nbytes) - len(given["rows"]) * int(given["out"].nbytes)  # the columns that are read
    if kernel == "mean_rows":
        total -= int(given["own"].nbytes)  # stands for a row that is not read
    out = arrays.get("out")
    if out is None:
        return total
    if kernel in ("add_sparse", "clear_sparse"):
        return total + (2 if kernel == "add_sparse" else 1) * int(out.itemsize) * int(given["indices"].size)
    reads = kernel.startswith("add_") and not given.get("overwrite", False)
    return total + (2 if reads else 1) * int(out.nbytes)


def _passes_over_terms(kernel: str, given: dict[str, Any]) -> int:
    """Return how often the terms come from memory: twice where blocks do not fit the cache."""
    if kernel == "gather":
        return 0
    if kernel == "encode_signs":
        return 2 if given["block"] > kernels.BLOCK and given["keep"].size else 1
    return 2 if kernel == "quantize" and given["block"] > kernels.BLOCK else 1
