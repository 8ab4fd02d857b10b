"""What the suites of laws share."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import product
from typing import Any, ClassVar, TypeVar

import numpy as np

from mpi_ef.compress import Compressor

from .virtual import results

__all__ = ["Laws", "law", "must", "same_bits"]

T = TypeVar("T")


class Laws:
    """Laws of what an attribute of a subclass, `tested`, has or builds, on `ranks`, with `compressors`."""

    tested: ClassVar[str]
    ranks: ClassVar[tuple[int, ...]]
    compressors: ClassVar[tuple[Compressor, ...]]
    where: str = ""  # what a law is looking at, for messages

    def subject(self) -> str:
        """Return what is tested, for messages."""
        how: Any = getattr(type(self), self.tested)
        return how if isinstance(how, str) else getattr(how, "__name__", str(how))

    def _run(self, program: Callable[..., T], *ranks: int) -> list[tuple[int, Compressor, list[T]]]:
        """Return what ``program(comm, compressor)`` returns on every rank, for all compressors and numbers of ranks."""
        return [(size, compressor, results(size, partial(program, compressor=compressor)))
                for size, compressor in product(ranks or self.ranks, self.compressors)]


def law(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Return what makes a test of a method: whatever it raises becomes an `AssertionError` that names subject and law."""

    def named(test: Callable[[Any], None]) -> Callable[[Any], None]:
        @wraps(test)
        def kept(laws: Any) -> None:
            try:
                test(laws)
            except Exception as error:
                if isinstance(error, AssertionError) and str(error).startswith(f"{laws.subject()} breaks the law of "):
                    raise  # of a law with a name of its own
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                raise AssertionError(f"{laws.subject()} breaks the law of {name}{laws.where}: {kind}{error}") from error

        return kept

    return named


def must(holds: object, text: str) -> None:
    """Raise `AssertionError`, also under ``python -O``, unless something holds."""
    if not holds:
        raise AssertionError(text)


def same_bits(a: Any, b: Any) -> bool:
    """Compare nested results bit for bit. Local."""
    if isinstance(a, dict):
        return bool(a.keys() == b.keys()) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b)
