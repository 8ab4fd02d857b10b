"""The messages of consecutive chunks of one vector, as a scatter and a gather of them need: one for each chunk."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpi_ef.kernels.backend import backend

from .combination import Source, Vector, writable
from .compressor import Codec, Compressor, Wires, flat
from .sparse import TopKCodec

__all__ = ["Chunks"]


class Chunks:
    """The codecs of the chunks of vectors of one length, chunk j from ``bounds[j]`` to ``bounds[j + 1]``. Local.

    Messages of chunks lie in rows, which may be longer: `wires` is (chunks, nbytes) uint8. Where the compressor is TopK
    with values as they are or quantized, and vectors are on the host, a call in Python serves all chunks.

    Attributes
    ----------
    codecs : list of Codec
        One for each chunk; chunks of equal length share it.
    nbytes : int
        Of the longest message.
    """

    def __init__(self, compressor: Compressor, bounds: Sequence[int], dtype: DTypeLike, device: str = "cpu") -> None:
        d, made = bounds[-1], dict[tuple[Compressor, int], Codec]()
        self.bounds, self.codecs = [*pairwise(bounds)], list[Codec]()
        for start, stop in self.bounds:
            key = compressor.part(start, stop, d), stop - start
            if key not in made:
                made[key] = key[0].codec_on(device, key[1], dtype)
            self.codecs.append(made[key])
        self.nbytes = max(codec.nbytes for codec in self.codecs)
        self._together = _Together.of(self.codecs, bounds, dtype)

    def rows(self, wires: Wires) -> Any:
        """Return the rows as the methods below take them: for memory that stays. Local."""
        if self._together is not None:
            return flat(wires)
        return [row[None, : codec.nbytes] for row, codec in zip(wires, self.codecs, strict=True)]

    def encode(self, x: Source, rows: Any, *, step: int, rank: int) -> bool:
        """Write the messages of all chunks of `x`, see :meth:`Codec.encode`."""
        if self._together is not None:
            return self._together.encode(x, rows)
        finite = True
        for codec, (start, stop), row in zip(self.codecs, self.bounds, rows, strict=True):
            finite &= codec.encode(x.part(start, stop), row[0], step=step, rank=rank)
        return finite

    def add(self, rows: Any, out: Vector, factor: float, *, overwrite: bool = False) -> None:
        """Add ``factor`` times what the messages say to `out` (d,), or overwrite it with that."""
        if self._together is not None:
            self._together.add(rows, out, factor, overwrite=overwrite)
            return
        for codec, (start, stop), row in zip(self.codecs, self.bounds, rows, strict=True):
            codec.add(row, out[start:stop], factor, overwrite=overwrite)

    def add_encoded(self, rows: Any, out: Vector, factor: float) -> None:
        """Do what :meth:`add` does for the messages that :meth:`encode` wrote last."""
        if self._together is not None:
            self._together.add_encoded(rows, out, factor)
        else:
            self.add(rows, out, factor)

    def clear(self, rows: Any, out: Vector) -> None:
        """Set to zero at least those entries of `out` (d,) to which :meth:`add` would add something."""
        if self._together is not None:
            self._together.clear(rows, out)
            return
        for codec, (start, stop), row in zip(self.codecs, self.bounds, rows, strict=True):
            codec.clear(row, out[start:stop])


class _Together:
    """TopK of all chunks, selected at once as segments of the vector, and coded at once."""

    def __init__(self, codecs: Sequence[TopKCodec], bounds: Sequence[int], dtype: DTypeLike) -> None:
        self._kernels: Any = backend(np.dtype(dtype))
        self._form = codecs[0].form or (0, 0)
        self._layout = np.array([(start, *codec.layout[0, 1:]) for codec, start in zip(codecs, bounds[:-1], strict=True)])
        cuts = [codec.bounds[:-1] + start for codec, start in zip(codecs, bounds[:-1], strict=True)]
        self._segments = np.concatenate([*cuts, bounds[-1:]]).astype(np.int64)
        self._counts = np.concatenate([codec.counts for codec in codecs])
        room: int = self._kernels.select_candidates(self._segments, self._counts)
        k, most = int(self._counts.sum()), int(self._layout[:, 1].max())
        places, candidates = np.zeros(max(room, k), np.int64), self._kernels.zeros(max(room, k))
        self._room, self._candidates = places, candidates
        self._indices, self._kept = places[:k], candidates[:k]
        self._decoded, self._values = np.zeros(most, np.int64), self._kernels.zeros(most)

    @classmethod
    def of(cls, codecs: Sequence[Codec], bounds: Sequence[int], dtype: DTypeLike) -> "_Together | None":
        """Return it where it serves these codecs."""
        sparse = [codec for codec in codecs if type(codec) is TopKCodec and codec.form == codecs[0].form is not None]
        return cls(sparse, bounds, dtype) if len(sparse) == len(codecs) else None

    def encode(self, x: Source, rows: Any) -> bool:
        finite: bool = self._kernels.select_largest(x.terms, x.factors, x.keep, x.keep_factors, self._segments,
                                                    self._counts, self._room, self._candidates)
        finite &= self._kernels.write_messages(self._layout, *self._form, self._indices, self._kept, *rows)
        if x.keep.size and x.less_message:
            self.add_encoded(rows, x.keep, -1.0)
        return finite

    def add(self, rows: Any, out: Vector, factor: float, *, overwrite: bool) -> None:
        if overwrite:
            out.fill(0)
        self._kernels.add_messages(self._layout, *self._form, *rows, factor, writable(out), self._decoded, self._values)

    def add_encoded(self, rows: Any, out: Vector, factor: float) -> None:
        self._kernels.read_values(self._layout, *self._form, *rows, self._kept)
        self._kernels.add_sparse(self._indices, self._kept, factor, writable(out))

    def clear(self, rows: Any, out: Vector) -> None:
        self._kernels.clear_messages(self._layout, *rows, out, self._decoded)
