"""What every compressor keeps to, one law a test."""

import pickle
from itertools import product
from typing import Any, ClassVar

import numpy as np

from mpi_ef.collectives import Plan
from mpi_ef.compress import Compressor, Keep, lazy, source
from mpi_ef.compress.combination import Vector

from .law import same_bits
from .vectors import gaussian, hard

__all__ = ["CompressorLaws"]

Wire = np.ndarray[Any, np.dtype[np.uint8]]


class CompressorLaws:
    """Tests for a compressor: a subclass, named ``Test...`` for pytest, says which.

    Attributes
    ----------
    compressor : Compressor
    sizes : tuple of int
        Lengths of the vectors that are tried.
    contracts : bool
        False for compressors whose `alpha` holds in expectation only.
    tolerance : float
        By how much of ``||x||^2`` rounding may exceed the bound of the contraction.
    """

    compressor: ClassVar[Compressor]
    sizes: ClassVar[tuple[int, ...]] = (0, 1, 2, 7, 64, 65, 1000)
    contracts: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-6
    dtypes: ClassVar[tuple[Any, ...]] = (np.float32, np.float64)

    def _cases(self) -> list[Vector]:
        return [x for d, dtype in product(self.sizes, self.dtypes) for x in hard(d, dtype)]

    def _sent(self, x: Any, like: Vector, *, fill: int = 0xA5, step: int = 0, rank: int = 0) -> tuple[Wire, Vector, bool]:
        codec = self.compressor.codec(like.size, like.dtype)
        wire = np.full(codec.nbytes, fill, np.uint8)
        finite = codec.encode(x, wire, step=step, rank=rank)
        return wire, codec.decode(wire), finite

    def _law(self, holds: object, law: str, x: Vector, more: str = "") -> None:
        if not holds:
            text = f"{self.compressor} breaks the law of {law} for d={x.size}, {x.dtype}: {more}"
            raise AssertionError(f"{text}; x = {np.array2string(x, threshold=8)}")

    def test_size_is_known_ahead(self) -> None:
        """The size of a message follows from d and dtype, in whole words of 8 bytes, and all of it is written."""
        for x in self._cases():
            wire, _, _ = self._sent(x, x)
            known = self.compressor.wire_nbytes(x.size, x.dtype)
            self._law(wire.size == known, "a size that is known ahead", x, f"wire_nbytes says {known}, a codec {wire.size}")
            self._law(wire.size % 8 == 0, "whole words", x, f"{wire.size} bytes are no multiple of 8")
            again = self._sent(x, x, fill=0x5A)[0]
            self._law(again.tobytes() == wire.tobytes(), "messages that are written whole", x,
                      f"bytes {np.flatnonzero(again != wire)[:5].tolist()} depend on what was there")

    def test_messages_are_deterministic(self) -> None:
        """The same vector, step and rank give the same bytes, whatever a codec has done before."""
        for x in self._cases():
            codec, wires = self.compressor.codec(x.size, x.dtype), []
            for vector in (x, gaussian(9, x.size, x.dtype), x):
                wires.append(np.zeros(codec.nbytes, np.uint8))
                codec.encode(vector, wires[-1], step=3, rank=1)
            same = wires[0].tobytes() == wires[2].tobytes() == self._sent(x, x, step=3, rank=1)[0].tobytes()
            self._law(same, "determinism", x, "the same vector gave other bytes")

    def test_contraction(self) -> None:
        """``||C(x) - x||^2 <= (1 - alpha) ||x||^2``."""
        for x in self._cases() if self.contracts else ():
            alpha = self.compressor.alpha(x.size)
            self._law(0 <= alpha <= 1, "contraction", x, f"alpha = {alpha} is not in [0, 1]")
            scale = np.longdouble(np.abs(x).max(initial=0) or 1)
            whole = ((x.astype(np.longdouble) / scale) ** 2).sum()
            lost = (((self._sent(x, x)[1].astype(np.longdouble) - x) / scale) ** 2).sum()
            subnormal = x.size * (np.longdouble(np.finfo(x.dtype).smallest_subnormal) / scale) ** 2
            self._law(lost <= (1 - alpha + self.tolerance) * whole + subnormal, "contraction", x,
                      f"{float(lost / whole) if whole else 0:.4g} of ||x||^2 is lost, alpha = {alpha} allows "
                      f"{1 - alpha:.4g}")

    def test_messages_are_added_in_order(self) -> None:
        """Adding messages is one addition for every one, in the order of the rows; overwriting starts at zero."""
        for d, dtype in product(self.sizes, self.dtypes):
            codec = self.compressor.codec(d, dtype)
            wires = np.zeros((3, codec.nbytes), np.uint8)
            for rank in range(3):
                codec.encode(gaussian(rank, d, dtype), wires[rank], rank=rank)
            together, apart, over = (gaussian(9, d, dtype) for _ in range(3))
            codec.add(wires, together, 0.3)
            codec.add(wires, over, 0.3, overwrite=True)
            for wire in wires:
                codec.add(wire[None], apart, 0.3)
            self._law(same_bits(together, apart), "addition in rank order", together)
            wanted = sum(np.float64(dtype(0.3)) * codec.decode(wire).astype(np.float64) for wire in wires)
            close = np.allclose(over.astype(np.float64), wanted, rtol=0, atol=1e-6)
            self._law(close, "overwriting", over, "overwrite=True leaves something of what was there")

    def test_combinations_are_what_they_stand_for(self) -> None:
        """``lazy(a) - b`` gives the bytes that the difference gives, and what is kept of it in the same pass."""
        for d, dtype in product(self.sizes, self.dtypes):
            a, b, into = (gaussian(seed, d, dtype) for seed in (1, 2, 3))
            x = lazy(a) - b
            wire, decoded, _ = self._sent(source(x, Keep(x, into=into, less_message=True)), a)
            self._law(same_bits(wire, self._sent(a - b, a)[0]), "combinations", a - b)
            close = np.allclose(into, (a - b) - decoded, rtol=1e-5, atol=1e-5)
            self._law(close, "what is kept", a - b, "x - C(x) is not what was kept")

    def test_what_is_not_finite_is_reported(self) -> None:
        """A NaN or Inf anywhere makes `encode` return False, a finite vector True."""
        for d, dtype, bad in product(filter(None, self.sizes), self.dtypes, (np.nan, np.inf, -np.inf)):
            x = gaussian(0, d, dtype)
            self._law(self._sent(x, x)[2], "finite vectors", x, "encode says that x is not finite")
            x[d // 2] = bad
            self._law(not self._sent(x, x)[2], "vectors that are not finite", x, "encode says that x is finite")

    def test_a_compressor_is_a_value(self) -> None:
        """It can be compared, hashed, pickled, and says which plan suits it; binding it to shapes gives another one."""
        copy, x = pickle.loads(pickle.dumps(self.compressor)), np.zeros(0)  # noqa: S301
        equal = copy == self.compressor and hash(copy) == hash(self.compressor)
        self._law(equal, "comparison", x, "a copy is not equal")
        self._law(str(copy) == str(self.compressor), "comparison", x, "a copy prints something else")
        plan = self.compressor.plan
        self._law(plan in Plan.kinds, "plans", x, f"plan = {plan!r} is no kind of a plan")
        bound = self.compressor.bound_to(((2, 3), (4,)))
        self._law(isinstance(bound, Compressor), "binding", x, f"bound_to returns a {type(bound).__name__}")
