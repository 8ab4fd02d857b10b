"""The kernels of a device in Triton, where that is installed and knows the device."""

# ruff: noqa: D102 (the methods are described by the functions of the same names)

from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from mpi_ef.kernels.backend import Verdict

from . import bus, fused, fused_dense, plain
from .backend import _floats, _tensors
from .triton_optim import TritonOptimizers

__all__ = ["TritonBackend"]

_SAMPLE = 16384  # entries that are looked at for a threshold
_LANES = 128  # of programs that add up in order: few of them have much to do
_LONG = 4096  # a shorter segment is sorted whole


class TritonBackend(TritonOptimizers):
    """Kernels of :mod:`mpi_ef.kernels.device.fused` and of its siblings, and those in torch operations for the rest."""

    def __init__(self, dtype: DTypeLike, device: str) -> None:
        super().__init__(dtype, device)
        self._wide = self.dtype.itemsize == 8
        self._bits = torch.int64 if self._wide else torch.int32

    def _word(self, number: Any) -> int:
        """Return the bits of a number as a signed integer."""
        return int(np.array(number, self.dtype).view(np.int64 if self._wide else np.int32))

    def _words(self, factors: Any) -> list[int]:
        return [self._word(factor) for factor in _floats(factors)]

    def _launch(self, kernel: Any, size: int, *arguments: Any, **constants: Any) -> None:
        self._run(kernel, -(-size // fused.BLOCK), *arguments, **constants, BLOCK=fused.BLOCK)

    def _run(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs:
            # The interpreter computes with NumPy; on GPUs Triton takes the current one.
            with torch.cuda.device(self.torch_device) if self.torch_device.type == "cuda" else np.errstate(all="ignore"):
                kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)

    def _status(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int32, device=self.torch_device)

    def combine(self, terms: Any, factors: Any, out: Any) -> Verdict:
        status, (a, b, c), size = self._status(), _tensors(terms), terms[0].size
        self._launch(fused.combine, size, a, b, c, out.tensor, status, size, *self._words(factors), NT=_count(terms),
                     WRITES=out.size > 0, F64=self._wide)
        return _sound(status)

    def gather(self, terms: Any, factors: Any, indices: Any, values: Any) -> None:
        self._launch(fused.gather_at, indices.size, *_tensors(terms), indices.tensor, values.tensor, indices.size,
                     *self._words(factors), NT=_count(terms), F64=self._wide)

    def add_sparse(self, indices: Any, values: Any, factor: float, out: Any) -> None:
        self._launch(fused.scatter_add, indices.size, indices.tensor, values.tensor, indices.size, self._word(factor),
                     out.tensor, F64=self._wide)

    def clear_sparse(self, indices: Any, out: Any) -> None:
        self._launch(fused.clear_at, indices.size, indices.tensor, indices.size, out.tensor)

    def encode_indices(self, indices: Any, low: int, lower: Any, upper: Any) -> None:
        lower.tensor.zero_()
        upper.tensor.zero_()
        self._launch(fused.mark_indices, indices.size, indices.tensor, indices.size, low, _halves(lower.tensor),
                     _halves(upper.tensor))

    def decode_indices(self, lower: Any, upper: Any, low: int, d: int, indices: Any) -> None:
        if not indices.size:
            return
        words = _halves(upper.tensor)
        marks = _population(words)
        before = torch.cumsum(marks, 0)
        before -= marks
        indices.tensor.zero_()  # where there are too few marks
        self._launch(fused.emit_indices, words.numel(), words, before, _halves(lower.tensor), words.numel(), indices.size,
                     low, indices.tensor)
        plain.ascend(indices.tensor, d)

    def encode_signs(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, less_decoded: bool, row_bits: Any,
                     row_scales: Any, row_block: int, row_factor: float, block: int, bits: Any, scales: Any) -> Verdict:
        if self._how.exact:
            return super().encode_signs(terms, factors, keep, keep_factors, less_decoded, row_bits, row_scales, row_block,
                                        row_factor, block, bits, scales)
        d, blocks = terms[0].size, scales.size
        rows = (row_bits.tensor, _stride(row_bits), row_scales.tensor, _stride(row_scales), len(row_bits), row_block,
                self._word(row_factor))
        words, formed = self._words(factors), {"NT": _count(terms), "F64": self._wide}
        status = torch.zeros(2, dtype=torch.int32, device=self.torch_device)
        if d:
            totals = self._totals(_tensors(terms), rows, block, d, blocks, status, words, formed)
            parts = totals.numel() // blocks
            lanes, run = (fused.BLOCK, 16) if parts <= 16 else (32, 64)
            self._run(fused_dense.scales_of_blocks, -(-blocks // lanes), totals, parts, blocks, block, d, scales.tensor,
                      status, F64=self._wide, RUN=run, BLOCK=lanes)
            self._run(fused_dense.write_signs, -(-d // fused_dense.PART), *_tensors(terms), keep.tensor, *rows, block, d,
                      bits.tensor, scales.tensor, *words, *self._words(keep_factors), **formed, KEEPS=keep.size > 0,
                      LESS=less_decoded)

        said = bus.Arrival(status)

        def ask() -> bool | None:
            broken, doubt = said.wait().tolist()
            return None if doubt else not broken

        again, less = super().encode_signs, keep if less_decoded else keep[:0]

        def scales_again() -> Verdict:  # signs are right, and may have been turned around since
            spare = self.empty(bits.size, np.uint8)
            return again(terms, factors, less, keep_factors, less_decoded, row_bits, row_scales, row_block, row_factor,
                         block, spare, scales)

        return Verdict(ask, scales_again, said.send)

    def _totals(self, terms: Any, rows: Any, block: int, d: int, blocks: int, status: torch.Tensor, words: list[int],
                formed: dict[str, Any]) -> torch.Tensor:
        """Return the sums of magnitudes of the parts of all blocks, one block after the other, float64."""
        block = min(block, d)
        width = max(fused_dense.GROUP, min(fused_dense.PART, 1 << (block - 1).bit_length()))
        parts, programs = -(-block // width), -(-blocks * -(-block // width) * width // fused_dense.PART)
        sums, totals = self.empty(programs * fused_dense.GROUP).tensor, self.empty(blocks * parts, np.float64).tensor
        most = max(block % fused_dense.GROUP, d % block % fused_dense.GROUP)  # entries of a part behind its last group
        self._run(fused_dense.part_sums, programs, *terms, *rows, block, parts, d, sums, status, *words, **formed,
                  WIDTH=width)
        self._run(fused_dense.part_totals, -(-blocks * parts // _LANES), *terms, *rows, block, parts, d, sums,
                  blocks * parts, most, totals, *words, **formed, WIDTH=width, BLOCK=_LANES)
        return totals

    def l1_norm(self, x: Any) -> float:
        if not x.size:
            return 0.0
        nothing, words = self.empty(0, np.uint8).tensor, self._words((1.0, 0.0, 0.0))
        rows = nothing, 0, x.tensor, 0, 0, 1, 0
        totals = self._totals((x.tensor,) * 3, rows, x.size, x.size, 1, self._status(), words, {"NT": 1, "F64": self._wide})
        return float(np.cumsum([0.0, *bus.on_host(totals)])[-1])

    def add_signs(self, bits: Any, scales: Any, block: int, factor: float, overwrite: bool, out: Any) -> None:
        self._launch(fused_dense.add_signs, out.size, bits.tensor, _stride(bits), scales.tensor, _stride(scales), len(bits),
                     block, self._word(factor), out.tensor, out.size, STARTS=overwrite, F64=self._wide)

    def quantize(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, less_decoded: bool, format: str, block: int,
                 exponents: Any, codes: Any) -> Verdict:
        d, status, words = terms[0].size, self._status(), self._words(factors)
        maxima = torch.zeros(exponents.size, dtype=self._bits, device=self.torch_device)
        number = _FORMATS[format]
        formed = {"NT": _count(terms), "F64": self._wide}
        self._launch(fused_dense.block_maxima, d, *_tensors(terms), maxima, d, block, *words, **formed,
                     RUN=min(block & -block, fused.BLOCK))
        self._launch(fused_dense.write_codes, d, *_tensors(terms), keep.tensor, maxima, d, block, exponents.tensor,
                     codes.tensor, status, *words, *self._words(keep_factors), **formed, KEEPS=keep.size > 0,
                     LESS=less_decoded, FORMAT=number, HEADROOM=(0, 15, 7)[number])
        return _sound(status)

    def add_quantized(self, exponents: Any, codes: Any, format: str, block: int, factor: float, overwrite: bool,
                      out: Any) -> None:
        self._launch(fused_dense.add_codes, out.size, exponents.tensor, codes.tensor, block, self._word(factor), out.tensor,
                     out.size, FORMAT=_FORMATS[format], STARTS=overwrite, F64=self._wide)

    def select_largest(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, bounds: Any, counts: Any, indices: Any,
                       values: Any) -> Verdict:
        if self._how.exact:
            return super().select_largest(terms, factors, keep, keep_factors, bounds, counts, indices, values)
        what = _segments(np.asarray(bounds).tobytes(), np.asarray(counts).tobytes(), str(self.torch_device))
        size, words, formed = terms[0].size, self._words(factors), {"NT": _count(terms), "F64": self._wide}
        status = torch.zeros(1 + what.number, dtype=torch.int64, device=self.torch_device)
        packed = what.number == 1 and not self._wide and size < 2**31
        places = torch.zeros(what.room, dtype=torch.int64, device=self.torch_device)
        candidates = self.empty(0 if packed else what.room).tensor
        if not packed:
            self._launch(fused.make_room, what.room, what.bounds, what.number, what.rooms, what.room, places, candidates)
        self._launch(fused.collect, size, *_tensors(terms), keep.tensor, size, what.bounds, what.number,
                     self._tops(what, terms, words), what.ranks, what.firsts, what.rooms, status, places, candidates, *words,
                     *self._words(keep_factors), **formed, KEEPS=keep.size > 0, PACKED=packed)
        if packed and what.k:
            largest = torch.topk(places, what.k, sorted=False).values.view(torch.int32).view(-1, 2)[:, 0]
            del places
            places = (largest ^ 0x7FFFFFFF).clamp_(max=size - 1)  # there are less than k where the threshold was wrong
            del largest
            indices.tensor[: what.k] = torch.sort(places).values
            self.gather(terms, factors, indices[: what.k], values)
        elif what.k:
            # Sorts are stable: of equal magnitudes those at lower places come first, and last where nothing was found.
            places, by_place = torch.sort(places)
            self._choose(what, size, places, by_place, candidates, indices.tensor, values.tensor)

        said = bus.Arrival(status)

        def ask() -> bool | None:
            broken, *found = said.wait().tolist()
            right = all(map(what.fits, found, range(what.number)))
            return not broken if right else None

        again = super().select_largest
        return Verdict(ask, lambda: again(terms, factors, keep, keep_factors, bounds, counts, indices, values), said.send)

    def _choose(self, what: "_Segments", d: int, places: torch.Tensor, by_place: torch.Tensor, candidates: torch.Tensor,
                indices: torch.Tensor, values: torch.Tensor) -> None:
        """Write place and value of the largest candidates of every segment; their places are sorted."""
        rooms = what.rooms, what.number
        keys = torch.empty_like(places)
        self._launch(fused.write_keys, what.room, candidates, by_place, *rooms, what.room, keys, F64=self._wide)
        order = torch.sort(keys, stable=True).indices
        del keys
        if self._wide and what.number > 1:  # two numbers of 64 bits are sorted one after the other
            of = torch.searchsorted(what.rooms[1:], order, right=True)
            order = order[torch.sort(of, stable=True).indices]
            del of
        chosen = torch.zeros(what.room, dtype=torch.int32, device=self.torch_device)
        self._launch(fused.mark_chosen, what.k, order, what.firsts, *rooms, what.k, chosen)
        del order
        self._launch(fused.write_chosen, what.room, chosen, torch.cumsum(chosen, 0), places, candidates, by_place, *rooms,
                     what.room, d, indices, values)

    def _tops(self, what: "_Segments", terms: Any, words: list[int]) -> torch.Tensor:
        """Return the largest magnitudes of samples of segments, descending, one sample after the other."""
        seen = torch.empty(max(1, what.sampled), what.sample, dtype=self._bits, device=self.torch_device)
        if not what.sampled:
            return seen  # of any content
        self._launch(fused.sample_magnitudes, seen.numel(), *_tensors(terms), what.starts, what.sizes, what.sample,
                     seen.numel(), seen, *words, NT=_count(terms), F64=self._wide)
        return torch.topk(seen, what.most, 1).values


def _sound(status: torch.Tensor) -> Verdict:
    """Return that a vector is finite where its `status`, (1,), is zero."""
    said = bus.Arrival(status)
    return Verdict(lambda: not int(said.wait()[0]), send=said.send)


_FORMATS = {"bf16": 0, "fp16": 1, "int8": 2}


def _stride(rows: Any) -> int:
    """Return how many entries lie between the beginnings of two rows."""
    return int(rows.tensor.stride(0)) if len(rows) else 0


def _count(terms: Any) -> int:
    return 1 + (terms[1].size > 0) + (terms[2].size > 0)


def _halves(words: torch.Tensor) -> torch.Tensor:
    """Return words of 64 bits as twice as many of 32."""
    return words.view(torch.int32) if words.numel() else words.new_empty(0, dtype=torch.int32)


def _population(words: torch.Tensor) -> torch.Tensor:
    """Return how many bits are set in each word of 32 bits."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24) & 0xFF


class _Segments:
    """What is known of segments before a vector is: which are looked at whole, where the others are sampled, and rooms.

    Attributes
    ----------
    number, k, room : int
        Of segments; of entries that are selected, and of candidates that there may be, in all.
    bounds, firsts, rooms : (segments + 1,) int64 on the device
        Where segments begin, where in what is selected, and where in their candidates, before a threshold counts as too low.
    sampled, sample, most : int
        Of so many segments so many entries are looked at, and so many of these are sorted; of the others all are candidates.
    starts, sizes : (sampled,) int64 on the device
        Of these segments.
    ranks : (segments,) int64 on the device
        Which of what is sorted is the threshold; -1 where all entries are candidates, -2 where none is.
    """

    def __init__(self, bounds: Any, counts: Any, device: torch.device) -> None:
        def there(numbers: Any) -> torch.Tensor:
            return bus.on_device(np.asarray(numbers, np.int64), device)

        sizes, self._counts = np.diff(bounds), counts.tolist()
        long = (sizes > _LONG) & (counts > 0) & (2 * counts <= sizes)
        shared = int(sizes[long].sum()) // (8 * max(1, int(long.sum())))
        self.sample = min(_SAMPLE, max(_LONG, shared))
        ranks = np.array([_rank(self.sample, d, k) for d, k in zip(sizes.tolist(), self._counts, strict=True)], np.int64)
        long &= ranks <= self.sample
        wanted = [_room(self.sample, d, rank) for d, rank in zip(sizes.tolist(), ranks.tolist(), strict=True)]
        candidates = np.where(long, np.minimum(sizes, wanted), np.where(counts > 0, sizes, 0))
        rooms, self._rooms = np.cumsum([0, *candidates]), candidates.tolist()
        self.number, self.k, self.room = len(counts), int(counts.sum()), int(rooms[-1])
        self.bounds, self.firsts, self.rooms = there(bounds), there(np.cumsum([0, *counts])), there(rooms)
        self.sampled, self.most = int(long.sum()), int(ranks[long].max(initial=0))
        self.starts, self.sizes = there(bounds[:-1][long]), there(sizes[long])
        within = self.most * (np.cumsum(long) - 1) + ranks - 1
        self.ranks = there(np.where(long, within, np.where(counts > 0, -1, -2)))

    def fits(self, found: int, segment: int) -> bool:
        return bool(self._counts[segment] <= found <= self._rooms[segment])


@lru_cache(maxsize=256)  # some numbers for each segment
def _segments(bounds: bytes, counts: bytes, device: str) -> _Segments:
    return _Segments(np.frombuffer(bounds, np.int64), np.frombuffer(counts, np.int64), torch.device(device))


def _rank(sample: int, d: int, k: int) -> int:
    """Return how far from the top of the sample the threshold lies: three standard deviations below the k-th largest."""
    expected = sample * k / max(d, 1)
    return int(expected + 3 * sqrt(expected) + 4)


def _room(sample: int, d: int, rank: int) -> int:
    """Return how many candidates there may be before the threshold counts as too low."""
    return int((rank + 6 * sqrt(rank) + 16) * d / sample)
