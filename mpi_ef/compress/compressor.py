"""The two nouns of compression: a compressor (what) and its codec (bound to d and dtype)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import signature
from typing import Any, cast

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray

from mpi_ef.errors import DtypeError, OptionError, ShapeError, briefly
from mpi_ef.kernels.backend import Verdict, backend

from .combination import Source, Vector, source

__all__ = ["Codec", "Compressor", "Vector", "Wires", "check_compressor", "flat", "for_parameters", "words"]

Wires = NDArray[np.uint8]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def words(nbytes: int) -> int:
    """Round `nbytes` up to whole 64-bit words, so that every part of a wire is aligned."""
    return -(-nbytes // 8) * 8


def flat(wires: Wires) -> tuple[Wires, NDArray[np.int64]]:
    """Return rows of bytes as one array, and where in it they begin. Not a copy, unless bytes of a row lie apart."""
    if wires.strides[0] < 0 or wires.strides[1] != 1:
        wires = wires.copy("C")
    stride = wires.strides[0]
    nbytes = (len(wires) - 1) * stride + wires.shape[1] if len(wires) else 0
    return as_strided(wires, (nbytes,), (1,)), np.arange(len(wires)) * stride


def said_finite(answer: Any, subject: str) -> bool:
    """Return what an `encode` has answered; raise `OptionError` where it forgot to. Local."""
    if isinstance(answer, Verdict):
        return answer  # type: ignore[return-value]
    if not isinstance(answer, bool | np.bool_):
        raise OptionError(f"{subject} returned {briefly(answer)}; return True where the vector is finite, else False")
    return bool(answer)


def _of_one_size(encode: Any) -> Any:
    @wraps(encode)
    def checked(self: "Codec", x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:
        if wire.shape != (self.nbytes,):
            raise ShapeError(f"{type(self).__name__}: a wire is {wire.shape} bytes; it must be nbytes = {self.nbytes}")
        if (shape := (x.terms[0] if isinstance(x, Source) else x).shape) != (self.d,):
            raise ShapeError(f"{type(self).__name__}: x has shape {tuple(shape)}; it must be d = {self.d} long")
        return said_finite(encode(self, x, wire, step=step, rank=rank), f"{type(self).__name__}.encode")

    return checked


def _of_many_sizes(decode: Any) -> Any:
    @wraps(decode)
    def checked(self: "Codec", wires: Wires, out: Vector, *arguments: Any, **options: Any) -> None:
        if wires.shape[1:] != (self.nbytes,):
            raise ShapeError(f"{type(self).__name__}: wires are {wires.shape} bytes; rows must be nbytes = {self.nbytes}")
        if out.shape != (self.d,):
            raise ShapeError(f"{type(self).__name__}: out has shape {tuple(out.shape)}; it must be d = {self.d} long")
        decode(self, wires, out, *arguments, **options)

    return checked


class Codec(ABC):
    """A compressor bound to vectors of length `d` and one dtype. Local: no communication. One thread at a time.

    Attributes: the length `d`, the `dtype`, float32 or float64, and the size of wires, `nbytes`. Vectors and wires are NumPy
    arrays, or on another `device` arrays in its memory.
    """

    nbytes: int  # of every wire, a multiple of 8, known before data flow
    k: int | None = None  # entries that a message names, where :meth:`entries` tells which; else None
    form: tuple[int, int] | None = None  # headroom and block, where the wire is one that kernels.messages knows as values

    def __init__(self, d: int, dtype: DTypeLike, device: str = "cpu") -> None:
        if not isinstance(d, int | np.integer) or d < 0:
            raise ShapeError(f"codec: d={briefly(d)} is not a length; pass the number of entries of the vector")
        self.d = int(d)
        try:
            self.dtype: np.dtype[Any] = np.dtype(dtype)
        except (TypeError, ValueError):
            raise DtypeError(f"codec: dtype {briefly(dtype)} is not known; pass float32 or float64") from None
        if self.dtype not in _FLOATS:
            raise DtypeError(f"codec: dtype {self.dtype} is not supported; pass float32 or float64")
        self._kernels = backend(self.dtype, device)

    def __init_subclass__(cls) -> None:
        """Let wires and vectors of another size be refused: kernels go beyond memory that is too short."""
        super().__init_subclass__()
        if "encode" in vars(cls):
            cls.encode = _of_one_size(cls.encode)  # type: ignore[method-assign]
        if "add" in vars(cls):
            cls.add = _of_many_sizes(cls.add)  # type: ignore[method-assign]
        if "clear" in vars(cls):
            cls.clear = _of_many_sizes(cls.clear)  # type: ignore[method-assign]

    @abstractmethod
    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:
        """Write the message for `x` into `wire`, and what is to be kept of it, in one pass where that is possible.

        Parameters
        ----------
        x : (d,) of the codec's dtype, contiguous, read only; or what :func:`source` makes of several such vectors
        wire : (nbytes,) uint8, overwritten completely
        step, rank : int
            Key of this message for compressors that draw random numbers; the others ignore it.

        Returns
        -------
        bool
            Whether x is finite. If it is not, neither the wire nor what was kept is to be used.
        """

    @abstractmethod
    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        """Add ``factor`` times the decoded value of every wire to `out`, in row order.

        Parameters
        ----------
        wires : (m, nbytes) uint8, read only
        out : (d,) of the codec's dtype, contiguous, updated
        factor : float, rounded to the codec's dtype before use
        overwrite : bool
            The sum starts from zero and not from what is in `out`.
        """

    def add_encoded(self, wire: Wires, out: Vector, factor: float = 1.0) -> None:
        """Do what :meth:`add` does for the one wire that :meth:`encode` wrote last."""
        self.add(wire[None], out, factor)

    def encode_sum(self, codec: "Codec", wires: Wires, factor: float, x: Source, wire: Wires) -> bool:
        """Write the message for ``x + factor * (the sum of the decoded wires of codec)``, without forming that sum.

        Only after :meth:`can_encode_sum` has said yes. What `x` keeps is kept of the whole sum.
        """
        raise NotImplementedError

    def can_encode_sum(self, codec: "Codec") -> bool:  # noqa: ARG002
        """Tell whether :meth:`encode_sum` takes messages of `codec`."""
        return False

    def plain_values(self, wire: Wires) -> Vector | None:  # noqa: ARG002
        """Return a (d,) view of the values in `wire` if that is how they travel, else None."""
        return None

    def entries(self, wire: Wires, indices: NDArray[np.int64], values: Vector) -> None:
        """Write which entries one message names, and their values: adding these to zeros is what :meth:`add` does.

        Where `k` is not None. Allocates nothing.

        Parameters
        ----------
        wire : (nbytes,) uint8, read only, of any content
        indices : (k,) int64, contiguous, overwritten; ascending, all different, each in [0, d)
        values : (k,) of the codec's dtype, contiguous, overwritten
        """
        raise NotImplementedError

    def clear(self, wires: Wires, out: Vector) -> None:  # noqa: ARG002
        """Set to zero at least those entries of `out` (d,) to which :meth:`add` would add something."""
        out.fill(0)

    def _keep(self, x: Source, wire: Wires) -> None:
        """Keep what is asked for in passes of its own, for codecs that have no faster way."""
        if x.keep.size:
            self._kernels.combine(x.terms, x.keep_factors, x.keep)
            if x.less_message:
                self.add(wire[None], x.keep, -1.0)

    def decode(self, wire: Wires) -> Vector:
        """Return the decoded value of one wire as a new (d,) array."""
        out: Vector = self._kernels.zeros(self.d)
        self.add(wire[None], out)
        return out


class Compressor(ABC):
    """What is kept of a vector. A frozen dataclass: comparable, hashable, printable."""

    sparse: bool = False  # whether a message names few coordinates, so that gathering the messages of all ranks is cheap

    @property
    def plan(self) -> str:
        """Kind of the plan that suits it: "gather" for sparse ones, else "two-phase"; see `Plan.kinds` of collectives."""
        return "gather" if self.sparse else "two-phase"

    def bound_to(self, shapes: Iterable[tuple[int, ...]]) -> "Compressor":  # noqa: ARG002
        """Return the compressor for a vector of parameters of these shapes, one after the other. Local.

        The same one, unless it has an option that stands for something of the parameters.
        """
        return self

    def __repr__(self) -> str:
        """Return the options that are set, so that ``TopK(0.01)`` says nothing of k."""
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)} if is_dataclass(self) else {}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items() if v is not None)})"

    def grown(self, times: int, d: int) -> "Compressor":  # noqa: ARG002
        """Return what answers the mean of messages for vectors of length `d`, with so many `times` the entries. Local.

        The same one, unless it keeps few entries.
        """
        return self

    def part(self, start: int, stop: int, d: int) -> "Compressor":  # noqa: ARG002
        """Return the compressor for the entries from `start` to `stop` of vectors of length `d`. Local.

        The same one, unless an option counts entries of the whole vector.
        """
        return self

    @abstractmethod
    def codec(self, d: int, dtype: DTypeLike = np.float32) -> Codec:
        """Return a new codec for vectors of length `d`.

        Raises
        ------
        ShapeError, DtypeError, OptionError
            When `d`, `dtype` and the options of the compressor do not fit together.
        """

    def codec_on(self, device: str, d: int, dtype: DTypeLike) -> Codec:
        """Return a new codec for such vectors in the memory of `device`, "cpu" or one of torch.

        Where :meth:`codec` takes no `device`, it is a :class:`StagedCodec`.
        """
        if device == "cpu":
            return self.codec(d, dtype)
        if "device" in signature(self.codec).parameters:
            codec: Codec = cast(Any, self).codec(d, dtype, device)
            return codec
        return StagedCodec(self.codec(d, dtype), device)

    @abstractmethod
    def alpha(self, d: int) -> float:
        """Return the contraction constant for vectors of length `d`.

        The largest known alpha with ``||C(x) - x||^2 <= (1 - alpha) ||x||^2`` for every finite x (for RandK: in
        expectation over its draws). 1 means lossless.
        """

    def wire_nbytes(self, d: int, dtype: DTypeLike = np.float32) -> int:
        """Return the size in bytes of the message for any vector of length `d`, a multiple of 8."""
        return self.codec(d, dtype).nbytes


class StagedCodec(Codec):
    """A codec for vectors on a device of one that knows NumPy arrays alone: what is sent passes through the host whole."""

    def __init__(self, codec: Codec, device: str) -> None:
        super().__init__(codec.d, codec.dtype, device)
        self._codec, self.nbytes = codec, codec.nbytes
        self._x, self._decoded = np.zeros(self.d, self.dtype), np.zeros(self.d, self.dtype)
        self._formed: Vector = self._kernels.zeros(self.d)
        self._wire = np.zeros(self.nbytes, np.uint8)

    def encode(self, x: Vector | Source, wire: Wires, *, step: int = 0, rank: int = 0) -> bool:
        """Do it on the host."""
        x = x if isinstance(x, Source) else source(x)
        finite = self._kernels.combine(x.terms, x.factors, self._formed)
        self._kernels.to_host(self._formed, self._x)
        self._codec.encode(self._x, self._wire, step=step, rank=rank)
        self._kernels.to_device(self._wire, wire)
        self._keep(x, wire)
        return finite  # type: ignore[no-any-return]

    def add(self, wires: Wires, out: Vector, factor: float = 1.0, *, overwrite: bool = False) -> None:
        """Decode on the host."""
        if overwrite:
            out.fill(0)
        for wire in wires:
            self._kernels.to_host(wire, self._wire)
            self._decoded.fill(0)
            self._codec.add(self._wire[None], self._decoded)
            self._kernels.to_device(self._decoded, self._formed)
            self._kernels.add_dense(self._formed, factor, out)


def check_compressor(subject: str, hint: str = "TopK(0.01)", **options: object) -> None:
    """Raise `OptionError` unless options of `subject` are compressors, not their classes or names. Local."""
    for name, value in options.items():
        if not isinstance(value, Compressor):
            raise OptionError(f"{subject}: {name}={briefly(value)} is no compressor; pass for example {hint}")
        if not is_dataclass(value):
            raise OptionError(f"{subject}: {name}={briefly(value)} is no dataclass; put @dataclass(frozen=True, "
                              "repr=False) before "
                              f"{type(value).__name__}")


def for_parameters(compressor: Compressor, shapes: Iterable[tuple[int, ...]]) -> Compressor:
    """Return what :meth:`Compressor.bound_to` does; what is no compressor is left to the plan, which refuses it. Local."""
    return compressor.bound_to(shapes) if isinstance(compressor, Compressor) else compressor
