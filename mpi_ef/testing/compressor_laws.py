"""What every compressor keeps to, one law a test."""

import pickle
from collections.abc import Iterator
from functools import partial
from itertools import islice, product
from typing import Any, ClassVar

import numpy as np

from mpi_ef.collectives import Plan
from mpi_ef.compress import Compressor, Keep, PlainCodec, lazy, source
from mpi_ef.compress.combination import Vector
from mpi_ef.errors import briefly

from .garbage import Decoders, garbage
from .law import Laws, law
from .vectors import gaussian, hard

__all__ = ["CompressorLaws"]

Wire = np.ndarray[Any, np.dtype[np.uint8]]


class CompressorLaws(Laws):
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
    wires : int
        How many wires of any content are decoded, for each length and dtype.
    """

    tested = "compressor"
    compressor: ClassVar[Compressor]
    sizes: ClassVar[tuple[int, ...]] = (0, 1, 2, 7, 64, 65, 1000)
    contracts: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-6
    wires: ClassVar[int] = 20
    dtypes: ClassVar[tuple[Any, ...]] = (np.float32, np.float64)

    def _lengths(self, *sizes: int) -> Iterator[tuple[int, Any]]:
        for d, dtype in product(sizes or self.sizes, self.dtypes):
            self.where = f" for d={d}, {np.dtype(dtype)}"
            yield d, dtype

    def _cases(self) -> Iterator[Vector]:
        return (x for d, dtype in self._lengths() for x in hard(d, dtype))

    def _sent(self, x: Any, like: Vector, *, step: int = 0, rank: int = 0) -> tuple[Wire, Vector, bool]:
        codec = self.compressor.codec(like.size, like.dtype)
        wire = np.full(codec.nbytes, 0xA5, np.uint8)
        if isinstance(x, np.ndarray):
            x = x.view()
            x.flags.writeable = False  # what is sent is only read
        finite = codec.encode(x, wire, step=step, rank=rank)
        return wire, codec.decode(wire), finite

    def _law(self, holds: object, law: str, more: str, x: Vector | None = None) -> None:
        if not holds:
            vector = "" if x is None else f"; x = {np.array2string(x, threshold=8)}"
            raise AssertionError(f"{self.subject()} breaks the law of {law}{self.where}: {more}{vector}")

    @law("a size that is known ahead")
    def test_size_is_known_ahead(self) -> None:
        """The size of a message follows from d and dtype, in whole words of 8 bytes, and all of it, and no more, is written.

        It is decoded to d numbers.
        """
        ahead = "a size that is known ahead"
        for x in self._cases():
            codec, known, wires = self.compressor.codec(x.size, x.dtype), self.compressor.wire_nbytes(x.size, x.dtype), []
            nbytes = codec.nbytes
            self._law(nbytes == known, ahead, f"wire_nbytes says {known}, a codec {nbytes}", x)
            self._law(nbytes % 8 == 0, "whole words", f"{nbytes} bytes are no multiple of 8", x)
            for fill in (0xA5, 0x5A):
                memory = np.full(8 + nbytes + 64, fill, np.uint8)
                wires.append(memory[8 : 8 + nbytes])
                self._fits(f"encode, with a wire of nbytes = {nbytes},", x, codec.encode, x, wires[-1])
                around = np.delete(memory, np.s_[8 : 8 + nbytes])
                self._law((around == fill).all(), ahead, f"encode writes beyond a wire of nbytes = {nbytes}", x)
            changed = np.flatnonzero(wires[0] != wires[1])[:5].tolist()
            self._law(not changed, "messages that are written whole", f"bytes {changed} depend on what was there", x)
            for read in ("decode", *["unpack"] * isinstance(codec, PlainCodec)):
                shape = np.shape(self._fits(f"{read}, of {nbytes} bytes,", x, getattr(codec, read), wires[0]))
                self._law(shape == x.shape, ahead, f"{read} returns {shape} and not {x.shape}", x)

    def _fits(self, what: str, x: Vector, call: Any, *arguments: Any) -> Any:
        """Call what is to fit the size of a message."""
        try:
            return call(*arguments)
        except Exception as error:
            self._law(False, "a size that is known ahead", f"{what} raises {type(error).__name__}: {error}", x)

    @law("determinism")
    def test_messages_are_deterministic(self) -> None:
        """The same vector, step and rank give the same bytes, whatever a codec has done before."""
        for x in self._cases():
            codec, wires = self.compressor.codec(x.size, x.dtype), []
            for vector in (x, gaussian(9, x.size, x.dtype), x):
                wires.append(np.zeros(codec.nbytes, np.uint8))
                codec.encode(vector, wires[-1], step=3, rank=1)
            same = wires[0].tobytes() == wires[2].tobytes() == self._sent(x, x, step=3, rank=1)[0].tobytes()
            self._law(same, "determinism", "the same vector gave other bytes", x)

    @law("messages that say all")
    def test_any_codec_decodes_a_message(self) -> None:
        """A rank decodes what others have sent: nothing counts but the bytes, not what a codec has done before."""
        for d, dtype in self._lengths():
            sender, other, fresh = (self.compressor.codec(d, dtype) for _ in range(3))
            wire, elsewhere = (np.full(sender.nbytes, 0xA5, np.uint8) for _ in range(2))
            sender.encode(x := gaussian(1, d, dtype), wire, step=5, rank=1)
            other.encode(gaussian(2, d, dtype), elsewhere, step=6)
            decoded = [codec.decode(wire).tobytes() for codec in (sender, other, fresh)]
            more = "has sent something else" if decoded[1] != decoded[0] else "has sent nothing"
            self._law(decoded[1] == decoded[0] == decoded[2], "messages that say all",
                      f"a codec that {more} decodes it to other bits than that of the sender", x)

    @law("messages of later steps")
    def test_later_steps_are_sent(self) -> None:
        """A finite vector is a finite message in any step, of any rank."""
        for d, dtype in self._lengths():
            codec, wire = self.compressor.codec(d, dtype), np.zeros(self.compressor.wire_nbytes(d, dtype), np.uint8)
            for step in (*range(12), 1000, 2**31, 2**40):
                x, rank = gaussian(step % 12, d, dtype), step % 3
                finite = codec.encode(x, wire, step=step, rank=rank) and bool(np.isfinite(codec.decode(wire)).all())
                self._law(finite, "messages of later steps", f"step {step} of rank {rank} is not finite", x)

    @law("contraction")
    def test_contraction(self) -> None:
        """``||C(x) - x||^2 <= (1 - alpha) ||x||^2``, in any step, on any rank."""
        for x in self._cases():
            self._contracts(x)
        for d, dtype in self._lengths():
            for step, rank in ((1, 0), (0, 1), (7, 2), (1000, 3)):
                self.where = f" for d={d}, {np.dtype(dtype)}, step {step} of rank {rank}"
                self._contracts(gaussian(step, d, dtype), step=step, rank=rank)

    def _contracts(self, x: Vector, **key: int) -> None:
        alpha = self.compressor.alpha(x.size)
        self._law(0 <= alpha <= 1, "contraction", f"alpha = {alpha} is not in [0, 1]", x)
        if self.contracts:
            scale = np.longdouble(np.abs(x).max(initial=0) or 1)
            whole = ((x.astype(np.longdouble) / scale) ** 2).sum()
            lost = (((self._sent(x, x, **key)[1].astype(np.longdouble) - x) / scale) ** 2).sum()
            subnormal = x.size * (np.longdouble(np.finfo(x.dtype).smallest_subnormal) / scale) ** 2
            self._law(lost <= (1 - alpha + self.tolerance) * whole + subnormal, "contraction",
                      f"{float(lost / whole) if whole else 0:.4g} of ||x||^2 is lost, alpha = {alpha} allows "
                      f"{1 - alpha:.4g}", x)

    @law("addition in rank order")
    def test_messages_are_added_in_order(self) -> None:
        """Adding messages is one addition for every one, in the order of the rows; overwriting starts at zero."""
        for d, dtype in self._lengths():
            codec = self.compressor.codec(d, dtype)
            wires = np.zeros((3, codec.nbytes), np.uint8)
            for rank in range(3):
                codec.encode(gaussian(rank, d, dtype), wires[rank], rank=rank)
            together, apart, over = (gaussian(9, d, dtype) for _ in range(3))
            codec.add(wires, together, 0.3)
            codec.add(wires, over, 0.3, overwrite=True)
            for wire in wires:
                codec.add(wire[None], apart, 0.3)
            bits = f"u{together.itemsize}"
            others = np.flatnonzero(together.view(bits) != apart.view(bits))[:5].tolist()
            self._law(not others, "addition in rank order",
                      f"three messages at once give other bits than one after the other, in entries {others}")
            wanted = sum(np.float64(dtype(0.3)) * codec.decode(wire).astype(np.float64) for wire in wires)
            close = np.allclose(over.astype(np.float64), wanted, rtol=0, atol=1e-6)
            self._law(close, "overwriting", "overwrite=True leaves something of what was there", over)

    @law("combinations")
    def test_combinations_are_what_they_stand_for(self) -> None:
        """``lazy(a) - b`` gives the bytes that the difference gives, and what is kept of it in the same pass."""
        for d, dtype in self._lengths():
            a, b, into = (gaussian(seed, d, dtype) for seed in (1, 2, 3))
            x = lazy(a) - b
            wire, decoded, _ = self._sent(source(x, Keep(x, into=into, less_message=True)), a)
            others = np.flatnonzero(wire != self._sent(a - b, a)[0])[:5].tolist()
            self._law(not others, "combinations",
                      f"bytes {others} of the message for lazy(a) - b are others than for a - b", a - b)
            close = np.allclose(into, (a - b) - decoded, rtol=1e-5, atol=1e-5)
            self._law(close, "what is kept", "x - C(x) is not what was kept", a - b)

    @law("vectors that are not finite")
    def test_what_is_not_finite_is_reported(self) -> None:
        """A NaN or Inf anywhere makes `encode` return False, a finite vector True."""
        for d, dtype in self._lengths(*filter(None, self.sizes)):
            x = gaussian(0, d, dtype)
            self._law(self._sent(x, x)[2], "finite vectors", "encode says that x is not finite", x)
            for x[d // 2] in (np.nan, np.inf, -np.inf):
                self._law(not self._sent(x, x)[2], "vectors that are not finite", "encode says that x is finite", x)

    @law("wires of any content")
    def test_wires_of_any_content_are_decoded(self) -> None:
        """Bytes that no encoder has written give numbers that follow from them alone, or an error of mpi_ef.

        Whatever they are, nothing beyond wire and vector is written or counts, what is refused changes nothing, and NaN and
        Inf are seen.
        """
        for d, dtype in self._lengths():
            decoders = Decoders(partial(self.compressor.codec, d, dtype))
            for wire in islice(garbage(decoders.messages, seed=d), self.wires):
                decoders.check(wire)

    @law("values")
    def test_a_compressor_is_a_value(self) -> None:
        """It can be compared, hashed, pickled, and says which plan suits it; binding it to shapes gives another one."""
        copy = pickle.loads(pickle.dumps(self.compressor))  # noqa: S301
        equal = copy == self.compressor and hash(copy) == hash(self.compressor)
        self._law(equal, "comparison", "a copy is not equal")
        self._law(str(copy) == str(self.compressor), "comparison", "a copy prints something else")
        plan = self.compressor.plan
        self._law(plan in Plan.kinds, "plans", f"plan = {briefly(plan, 200)} is no kind of a plan")
        bound = self.compressor.bound_to(((2, 3), (4,)))
        self._law(isinstance(bound, Compressor), "binding", f"bound_to returns a {type(bound).__name__}")
