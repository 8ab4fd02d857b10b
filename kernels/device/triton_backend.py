"""The kernels of a device in Triton, where that is installed and knows the device."""

# ruff: noqa: D102 (the methods are described by the functions of the same names)

from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from mpi_ef.kernels.backend import Verdict

from . import bus, fused, fused_dense
from .array import DeviceArray
from .backend import DeviceBackend, _floats, _tensors

__all__ = ["TritonBackend"]

_SAMPLE = 16384  # entries that are looked at for a threshold
_LONG = 4096  # a shorter vector is sorted whole


class TritonBackend(DeviceBackend):
    """Kernels of :mod:`mpi_ef.kernels.device.fused`, and those in torch operations for the rest."""

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
        return Verdict(lambda: not bool(status))

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

    def decode_indices(self, lower: Any, upper: Any, low: int, indices: Any) -> None:
        if not indices.size:
            return
        words = _halves(upper.tensor)
        marks = _population(words)
        before = torch.cumsum(marks, 0, dtype=torch.int32) - marks
        self._launch(fused.emit_indices, words.numel(), words, before, _halves(lower.tensor), words.numel(), indices.size,
                     low, indices.tensor)

    def encode_signs(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, less_decoded: bool, row_bits: Any,
                     row_scales: Any, row_block: int, row_factor: float, block: int, bits: Any, scales: Any) -> Verdict:
        if self._how.exact:
            return super().encode_signs(terms, factors, keep, keep_factors, less_decoded, row_bits, row_scales, row_block,
                                        row_factor, block, bits, scales)
        d = terms[0].size
        rows = (row_bits.tensor, _stride(row_bits), row_scales.tensor, _stride(row_scales), len(row_bits), row_block,
                self._word(row_factor))
        formed = {"NT": _count(terms), "F64": self._wide}
        parts, blocks = -(-block // fused_dense.PART), scales.size
        sums, rest = (self.empty((blocks * parts, fused_dense.GROUP)).tensor for _ in range(2))
        totals = self.empty(blocks * parts, np.float64).tensor
        status, doubt = self._status(), self._status()
        if d:
            self._run(fused_dense.part_sums, blocks * parts, *_tensors(terms), *rows, block, parts, d, sums, rest, status,
                      *self._words(factors), **formed)
            self._launch(fused_dense.part_totals, blocks * parts, sums, rest, blocks * parts, totals)
            self._launch(fused_dense.scales_of_blocks, blocks, totals, parts, blocks, block, d, scales.tensor, doubt,
                         F64=self._wide)
            self._run(fused_dense.write_signs, -(-d // fused_dense.PART), *_tensors(terms), keep.tensor, *rows, block, d,
                      bits.tensor, scales.tensor, *self._words(factors), *self._words(keep_factors), **formed,
                      KEEPS=keep.size > 0, LESS=less_decoded)
        again = super().encode_signs
        return Verdict(lambda: None if bool(doubt) else not bool(status),
                       lambda: again(terms, factors, keep, keep_factors, less_decoded, row_bits, row_scales, row_block,
                                     row_factor, block, bits, scales))

    def l1_norm(self, x: Any) -> float:
        parts, words = -(-x.size // fused_dense.PART), self._words((1.0, 0.0, 0.0))
        sums, rest = (self.empty((parts, fused_dense.GROUP)).tensor for _ in range(2))
        totals, nothing = self.empty(parts, np.float64).tensor, self.empty(0, np.uint8).tensor
        if parts:
            self._run(fused_dense.part_sums, parts, x.tensor, x.tensor, x.tensor, nothing, 0, x.tensor, 0, 0, 1, 0, x.size,
                      parts, x.size, sums, rest, self._status(), *words, NT=1, F64=self._wide)
            self._launch(fused_dense.part_totals, parts, sums, rest, parts, totals)
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
        return Verdict(lambda: not bool(status))

    def add_quantized(self, exponents: Any, codes: Any, format: str, block: int, factor: float, overwrite: bool,
                      out: Any) -> None:
        self._launch(fused_dense.add_codes, out.size, exponents.tensor, codes.tensor, block, self._word(factor), out.tensor,
                     out.size, FORMAT=_FORMATS[format], STARTS=overwrite, F64=self._wide)

    def select_largest(self, terms: Any, factors: Any, keep: Any, keep_factors: Any, bounds: Any, counts: Any, indices: Any,
                       values: Any) -> Verdict:
        if self._how.exact or any(_is_short(d, k) for d, k in zip(np.diff(bounds).tolist(), counts.tolist(), strict=True)):
            return super().select_largest(terms, factors, keep, keep_factors, bounds, counts, indices, values)
        status, first, segments = self._status(), 0, len(counts)
        found = torch.zeros(segments, dtype=torch.int32, device=self.torch_device)
        rooms = np.empty(segments, np.int64)
        for s, (start, stop, k) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), counts.tolist(), strict=True)):
            d, room = stop - start, _room(stop - start, k)
            rooms[s] = room
            threshold = self._threshold(terms, factors, start, d, k)
            places = torch.empty(room, dtype=torch.int64, device=self.torch_device)
            candidates = torch.empty(room, dtype=terms[0].tensor.dtype, device=self.torch_device)
            self._launch(fused.collect, d, *_tensors(terms), keep.tensor, threshold, found[s:], status, places, candidates,
                         start, d, room, *self._words(factors), *self._words(keep_factors), NT=_count(terms),
                         KEEPS=keep.size > 0, F64=self._wide)
            chosen = self._choose(places, candidates, found[s], k)
            indices.tensor[first : first + k] = places[chosen].clamp(start, stop - 1)
            values.tensor[first : first + k] = candidates[chosen]
            first += k

        def ask() -> bool | None:
            seen = bus.on_host(found)
            return None if bool(((seen < counts) | (seen > rooms)).any()) else not bool(status)

        again = super().select_largest
        return Verdict(ask, lambda: again(terms, factors, keep, keep_factors, bounds, counts, indices, values))

    def _threshold(self, terms: Any, factors: Any, start: int, d: int, k: int) -> torch.Tensor:
        """Return a magnitude, (1,), that slightly more than `k` of these entries are expected to reach."""
        places = _sampled(d, str(self.torch_device)) + start
        seen = torch.empty(places.numel(), dtype=terms[0].tensor.dtype, device=self.torch_device)
        self.gather(terms, factors, DeviceArray(places), DeviceArray(seen))
        magnitudes = seen.view(self._bits) & (0x7FFFFFFFFFFFFFFF if self._wide else 0x7FFFFFFF)
        return torch.topk(magnitudes, _rank(d, k)).values[-1:]

    def _choose(self, places: torch.Tensor, candidates: torch.Tensor, found: torch.Tensor, k: int) -> torch.Tensor:
        """Return which of the candidates are the `k` largest, those at lower places first among equals, by place."""
        magnitudes = candidates.view(self._bits).to(torch.int64) & (0x7FFFFFFFFFFFFFFF if self._wide else 0x7FFFFFFF)
        magnitudes = torch.where(torch.arange(places.numel(), device=places.device) < found, magnitudes, -1)
        by_place = torch.argsort(places)
        largest = torch.sort(magnitudes[by_place], descending=True, stable=True).indices[:k]
        return by_place[torch.sort(largest).values]


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


def _rank(d: int, k: int) -> int:
    """Return how far from the top of the sample the threshold lies: three standard deviations below the k-th largest."""
    expected = min(_SAMPLE, d) * k / d
    return int(expected + 3 * sqrt(expected) + 4)


def _room(d: int, k: int) -> int:
    """Return how many candidates there may be before the threshold counts as too low."""
    rank = _rank(d, k)
    return min(d, int((rank + 6 * sqrt(rank) + 16) * d / min(_SAMPLE, d)))


def _is_short(d: int, k: int) -> bool:
    return k == 0 or d <= _LONG or _rank(d, k) > min(_SAMPLE, d) or 2 * k > d


@cache
def _sampled(d: int, device: str) -> torch.Tensor:
    """Return the places of a sample, pseudo-random, the same for all vectors of a length."""
    words = np.arange(1, min(_SAMPLE, d) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return bus.on_device((words % np.uint64(d)).astype(np.int64), torch.device(device))
