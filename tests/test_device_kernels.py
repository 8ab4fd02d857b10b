"""Kernels of the device side give the bits of the specification, on tensors of the CPU."""

import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from device_side import BACKENDS, DEVICE, HARDWARE, KINDS, bits, each_dtype, host, sized, there, vector
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mpi_ef.kernels import low_bits, lower_nbytes, reference, upper_nbytes
from mpi_ef.kernels.backend import backend
from mpi_ef.kernels.device import bus
from mpi_ef.kernels.device.array import DeviceArray

if len(BACKENDS) > 1:
    from mpi_ef.kernels.device import fused_dense

SIZES = sized((1, 63, 64, 1000, 4096, 9001), (65, 5000))


def check_same(name, dtype, *arguments, scratch=(), host=()):
    """Run the kernel on the host and on the device side, and compare what is in all arrays afterwards."""
    for kind in BACKENDS:
        with nullcontext() if kind is not BACKENDS[0] else NoQuotientsByNumbers():
            check_backend(kind(dtype, DEVICE), name, *arguments, scratch=scratch, host=host)


def check_backend(backend, name, *arguments, scratch, host):
    ours = [tuple(a.copy() for a in x) if isinstance(x, tuple) else x.copy() if isinstance(x, np.ndarray) else x
            for x in arguments]
    theirs = [tuple(map(there, x)) if isinstance(x, tuple) else there(x) if isinstance(x, np.ndarray) and n not in host
              else x.copy() if isinstance(x, np.ndarray) else x for n, x in enumerate(arguments)]
    with np.errstate(all="ignore"):
        expected = getattr(reference, name)(*ours, *scratch)
        answer = getattr(backend, name)(*theirs)
    if expected is None:
        assert answer is None
    elif isinstance(expected, float):
        assert answer == expected
    else:
        assert bool(answer) == expected
    for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        for mine, its in pairs:
            if isinstance(mine, np.ndarray):
                other_bits = its if isinstance(its, np.ndarray) else its.numpy()
                assert bits(mine) == bits(other_bits), f"{name}: argument {n}"


def sources(dtype, sizes=SIZES, kinds=KINDS):
    """Terms and factors of one to three vectors, and what to keep of them."""
    for n, d in enumerate(sizes):
        for m, kind in enumerate(kinds):
            count = 1 + (n + m) % 3
            terms = [vector(d, dtype, 10 * n + t, kind if t == 0 else "normal") for t in range(count)]
            empty = np.empty(0, dtype)
            factors = np.array([1.0, -1.0, 0.3][:count] + [0.0] * (3 - count), dtype)
            keep_factors = np.array([0.7, 1.0, -1.0][:count] + [0.0] * (3 - count), dtype)
            keep = np.zeros(d, dtype) if (n + m) % 2 else empty
            yield tuple(terms + [empty] * (3 - count)), factors, keep, keep_factors, d


@each_dtype
def test_combine(dtype):
    for terms, factors, keep, _, _ in sources(dtype):
        check_same("combine", dtype, terms, factors, keep, scratch=[None], host=(1,))


@each_dtype
def test_select_largest(dtype):
    for terms, factors, keep, keep_factors, d in sources(dtype):
        for k in {1, max(1, d // 10), d}:
            check_same("select_largest", dtype, terms, factors, keep, keep_factors, np.array([0, d]), np.array([k]),
                       np.zeros(d, np.int64), np.zeros(d, dtype), scratch=[None, None], host=(1, 3, 4, 5))
    for terms, factors, keep, keep_factors, d in sources(dtype, (1000,)):
        check_same("select_largest", dtype, terms, factors, keep, keep_factors, np.array([0, 10, 10, 700, d]),
                   np.array([3, 0, 69, 300]), np.zeros(d, np.int64), np.zeros(d, dtype), scratch=[None, None],
                   host=(1, 3, 4, 5))


SEGMENTS = ((0, 10, 10, 700, 5000, 5001, 10_300, 10_301, 14_500), (3, 0, 69, 300, 1, 90, 0, 4150))


@each_dtype
def test_segments_of_any_length(dtype):
    """Empty, of one entry, without a choice, short, sampled, and nearly whole; blocks of the kernel lie across them."""
    bounds, counts = map(np.array, SEGMENTS)
    for terms, factors, keep, keep_factors, d in sources(dtype, (bounds[-1],)):
        check_same("select_largest", dtype, terms, factors, keep, keep_factors, bounds, counts, np.zeros(d, np.int64),
                   np.zeros(d, dtype), scratch=[None, None], host=(1, 3, 4, 5))


class NoQuotientsByNumbers(TorchDispatchMode):
    """On a GPU torch multiplies by the reciprocal of a number of the host, which is rounded, in place of dividing by it."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert not str(operation).startswith("aten.div.") or isinstance(arguments[1], torch.Tensor), operation
        return operation(*arguments, **(options or {}))


@each_dtype
def test_quotients_are_rounded_once(dtype):
    x = vector(100, dtype)
    with NoQuotientsByNumbers():
        assert bits((there(x) / 3).numpy()) == bits(x / dtype(3))
        assert bits((there(x) / dtype(0.3)).numpy()) == bits(x / dtype(0.3))
    assert (there(np.arange(3)) / 2.5).tolist() == pytest.approx([0.0, 0.4, 0.8])


class Waiting(TorchDispatchMode):
    """Whether copies are waited for."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation is torch.ops.aten.copy_.default:
            self.waits.append(not (arguments[2:] or [False])[0])
        return operation(*arguments, **(options or {}))


def test_copies_are_waited_for_where_nothing_tells_when_they_are_made():
    """That is on all devices but NVIDIA's and AMD's: of others the answer would be read before it is there."""
    x, host_array = there(np.arange(3)), np.zeros(3, np.int64)
    with Waiting() as copies:
        bus.Arrival(x.tensor).wait()
        bus.to_device(host_array, x.tensor)
    assert copies.waits == [not HARDWARE] * 2


NO_LAUNCH = tuple(f"aten.{name}." for name in ("detach", "empty", "empty_like", "lift_fresh", "select", "slice", "view"))


class Launches(TorchDispatchMode):
    """What is launched: operations of torch on the device and kernels, those of a sort apart."""

    def __init__(self, backend):
        super().__init__()
        self.names, self.run = [], backend._run
        backend._run = self._run

    def _run(self, kernel, *arguments, **constants):
        self.names.append(kernel.__name__)
        with _disable_current_modes():  # the interpreter reads arguments with torch
            self.run(kernel, *arguments, **constants)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.append(str(operation))
        return operation(*arguments, **(options or {}))


@pytest.mark.skipif(len(BACKENDS) == 1, reason="of kernels in Triton: make test-device")
@each_dtype
def test_segments_take_no_launches_of_their_own(dtype):
    """Nor a second look: the guess of a threshold holds for a vector of the usual kind; the host asks once."""
    counted = []
    for bounds in ([0, 9000], [*range(0, 390, 10), 2000, 9000]):
        starts, k = np.array(bounds), np.full(len(bounds) - 1, 5)
        backend, size = BACKENDS[1](dtype, DEVICE), bounds[-1]
        x, keep, indices, values = map(there, (vector(size, dtype), np.zeros(size, dtype), np.zeros(k.sum(), np.int64),
                                               np.zeros(k.sum(), dtype)))
        call = (x, x, x[:0]), (1.0, 0.5, 0.0), keep, (1.0, 1.0, 0.0), starts, k, indices, values
        backend.select_largest(*call)  # what is known of segments goes to the device once
        with bus.watched() as copies, Launches(backend) as launches:
            answer = backend.checked(backend.select_largest(*call), lambda: pytest.fail("a threshold was wrong"))
            assert not copies
            assert bool(answer)
        assert copies == [("to host", 8 * len(starts))]
        counted.append(sum(not name.startswith(NO_LAUNCH) for name in launches.names))
        assert sum(name.startswith("aten.sort") for name in launches.names) <= (2 if dtype == np.float32 else 3)
    assert max(counted) <= 20, counted
    assert counted[1] - counted[0] <= (2 if dtype == np.float32 else 6)


@pytest.mark.skipif(len(BACKENDS) == 1, reason="of kernels in Triton: make test-device")
@each_dtype
def test_vectors_of_zeros_need_no_second_look(dtype):
    """Nor those of which fewer entries are not zero than are selected: gradients of embeddings, for example."""
    for share in (0.0, 0.005):
        for bounds, counts in (([0, 10_000], [100]), ([0, 9000, 9010, 15_000], [90, 1, 60])):
            d, k = bounds[-1], sum(counts)
            x = np.where(np.random.default_rng(1).random(d) < share, vector(d, dtype), dtype(0))
            nothing, factors = np.empty(0, dtype), np.array([1.0, 0.0, 0.0], dtype)
            arguments = ((x, nothing, nothing), factors, nothing, factors, np.array(bounds), np.array(counts),
                         np.zeros(k, np.int64), np.zeros(k, dtype))
            check_same("select_largest", dtype, *arguments, scratch=[None, None], host=(1, 3, 4, 5))
            terms, *rest = arguments
            found = BACKENDS[1](dtype, DEVICE).select_largest(tuple(map(there, terms)), factors, there(nothing), factors,
                                                              *rest[3:5], *map(there, rest[5:]))
            assert bool(found)
            assert not found.repaired


class Held(Launches):
    """How much memory of results of operations there has been at a time."""

    def __init__(self, backend, *others):
        super().__init__(backend)
        self.most, self._made, self._others = 0, [], {array.tensor.untyped_storage().data_ptr() for array in others}

    def _run(self, kernel, *arguments, **constants):
        super()._run(kernel, *arguments, **constants)
        if kernel.__name__ == "collect":
            self.most = 0  # without the sample, whose length does not grow with the vector

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        made = operation(*arguments, **(options or {}))
        self._made += map(weakref.ref, made if isinstance(made, tuple) else (made,))
        storages = [tensor.untyped_storage() for one in self._made if (tensor := one()) is not None]
        self.most = max(self.most, sum({one.data_ptr(): one.nbytes() for one in storages
                                        if one.data_ptr() not in self._others}.values()))
        return made


@pytest.mark.skipif(len(BACKENDS) == 1, reason="of kernels in Triton: make test-device")
@pytest.mark.parametrize(("dtype", "most"), [(np.float32, 0.09), (np.float64, 0.13)], ids=["f32", "f64"])
def test_a_selection_takes_little_memory(dtype, most):
    """Of a vector, of which 1 % is selected."""
    d, k = 200_000, 2000
    backend = BACKENDS[1](dtype, DEVICE)
    x, keep, indices, values = arrays = list(map(there, (vector(d, dtype), np.zeros(d, dtype), np.zeros(k, np.int64),
                                                         np.zeros(k, dtype))))
    with Held(backend, *arrays) as held:
        backend.select_largest((x, keep, x[:0]), (1.0, -1.0, 0.0), x[:0], (1.0, 0.0, 0.0), np.array([0, d]),
                               np.array([k]), indices, values)
    assert held.most <= most * x.nbytes


@each_dtype
def test_signs(dtype):
    for n, (terms, factors, keep, keep_factors, d) in enumerate(sources(dtype)):
        for block in sized({d, 64, 100, 4096, 5000}, {d, 5000 if n % 3 else 100, (7, 64, 130, 1000)[n % 4]}):
            rows, row_block = n % 3, (64, 4100, 7)[n // 3 % 3]
            row_bits = np.random.default_rng(n).integers(0, 256, (rows, -(-d // 8))).astype(np.uint8)
            row_scales = np.abs(vector(rows * -(-d // row_block), dtype, n)).reshape(rows, -(-d // row_block))
            scales = np.zeros(-(-d // block), dtype)
            check_same("encode_signs", dtype, terms, factors, keep, keep_factors, n % 2 == 0, row_bits, row_scales,
                       row_block, dtype(0.25), block, np.zeros(-(-d // 8), np.uint8), scales, scratch=[None], host=(1, 3))
            check_same("add_signs", dtype, row_bits, row_scales, row_block, dtype(0.3), n % 2 == 0, vector(d, dtype, 5),
                       scratch=[None])


@pytest.mark.skipif(len(BACKENDS) == 1, reason="of kernels in Triton: make test-device")
@pytest.mark.parametrize(("block", "most"), [(7, 64 / 7), (64, 1), (100, 1.28), (1025, 2), (2048, 1), (5000, 2),
                                              (10**6, 1)])
def test_lanes_of_short_blocks_are_not_idle(block, most):
    """A program of 4096 lanes takes as many blocks as it has room for."""
    d, lanes = 150_000, []
    backend, nothing = BACKENDS[1](np.float32, DEVICE), there(np.empty(0, np.float32))
    backend._run = lambda kernel, programs, *_, **__: lanes.append((kernel.__name__, 4096 * programs))
    backend.encode_signs((there(vector(d, np.float32)), nothing, nothing), (1.0, 0.0, 0.0), nothing,
                         (1.0, 0.0, 0.0), False, there(np.zeros((0, 1), np.uint8)), there(np.zeros((0, 1), np.float32)), 64,
                         1.0, block, there(np.zeros(-(-d // 8), np.uint8)), there(np.zeros(-(-d // block), np.float32)))
    assert dict(lanes)["part_sums"] <= most * d + 4096 + (block > 4096) * 4096


@pytest.mark.skipif(len(BACKENDS) == 1 or HARDWARE, reason="of Triton's interpreter: make test-device")
def test_rows_may_lie_further_apart_than_32_bits_count():
    """64 ranks that send signs of 300 million entries: the number of a row times its stride is above 2^31."""
    d, far = 100, 2**30
    memory = torch.empty(2 * 2**31 + 64, dtype=torch.uint8)  # of the system until it is written to
    rows = memory.as_strided((3, 13), (far, 1), 2**31)
    memory[:13].zero_()  # where a number that is too large for 32 bits leads
    rows.copy_(torch.from_numpy(np.random.default_rng(1).integers(1, 256, (3, 13)).astype(np.uint8)))
    scales, expected, found = vector(6, np.float32).reshape(3, 2), np.zeros(d, np.float32), there(np.zeros(d, np.float32))
    reference.add_signs(rows.numpy(), scales, 64, np.float32(1), True, expected, None)
    BACKENDS[1](np.float32, DEVICE).add_signs(DeviceArray(rows), there(scales), 64, 1.0, True, found)
    assert bits(expected) == bits(found.numpy())


@pytest.mark.skipif(len(BACKENDS) == 1 or HARDWARE, reason="of Triton's interpreter: make test-device")
def test_signs_of_a_vector_of_nearly_two_to_the_31_entries():
    """The first of its programs alone: the last bytes are reckoned in the 32 bits in which such a length is passed."""
    x, empty, zeros = vector(4096, np.float32), there(np.empty(0, np.float32)).tensor, there(np.zeros(512, np.uint8))
    a, backend = there(x).tensor, BACKENDS[1](np.float32, DEVICE)
    backend._run(fused_dense.write_signs, 1, a, a, a, empty, zeros.tensor, 0, empty, 0, 0, 1, 0, 4096, 2**31 - 1,
                 zeros.tensor, a, *backend._words((1.0, 0.0, 0.0)), *backend._words((1.0, 0.0, 0.0)), NT=1, F64=False,
                 KEEPS=False, LESS=False)
    assert bits(np.packbits(x >= 0)) == bits(zeros.numpy())


@pytest.mark.skipif(len(BACKENDS) == 1, reason="of kernels in Triton: make test-device")
def test_entries_are_counted_in_64_bits():
    """More than 2^31 candidates, in a vector of zeros, or marks would count as less than none, and lie before all memory."""
    backend, given = BACKENDS[1](np.float32, DEVICE), {}
    x, indices, values = map(there, (np.zeros(5000, np.float32), np.zeros(50, np.int64), np.zeros(50, np.float32)))
    backend._run = lambda kernel, _, *arguments, **__: given.update({kernel.__name__: dict(zip(kernel.arg_names, arguments,
                                                                                              strict=False))})
    backend.select_largest((x, x[:0], x[:0]), (1.0, 0.0, 0.0), x[:0], (1.0, 0.0, 0.0), np.array([0, 5000]), np.array([50]),
                           indices, values)
    backend.decode_indices(there(np.zeros(1, np.uint64)), there(np.zeros(1, np.uint64)), 1, 5000, indices)
    assert given["collect"]["status"].dtype == given["emit_indices"]["before"].dtype == torch.int64


@each_dtype
@pytest.mark.parametrize("format", ["bf16", "fp16", "int8"])
def test_quantize(dtype, format):
    for n, (terms, factors, keep, keep_factors, d) in enumerate(sources(dtype)):
        for block in sized((1, 7, 256, 10_000), (7, 256, 4999)):
            count = -(-d // block)
            codes = np.zeros(d, np.int8 if format == "int8" else np.int16)
            check_same("quantize", dtype, terms, factors, keep, keep_factors, n % 2 == 0, format, block,
                       np.zeros(count, np.int16), codes, scratch=[None], host=(1, 3))


@each_dtype
@pytest.mark.parametrize("format", ["bf16", "fp16", "int8"])
def test_add_quantized(dtype, format):
    rng = np.random.default_rng(3)
    powers = [-1080, -140, -20, -1, 0, 3, 20, 130, 1010, 32767]
    for n, d in enumerate(SIZES):
        exponents = rng.choice(powers, -(-d // 64)).astype(np.int16)
        codes = vector(d, np.float32, n)
        codes = (np.clip(np.rint(codes * 40), -127, 127).astype(np.int8) if format == "int8"
                 else codes.astype(np.float16).view(np.int16) if format == "fp16"
                 else (codes.view(np.uint32) >> 16).astype(np.uint16).view(np.int16))
        check_same("add_quantized", dtype, exponents, codes, format, 64, dtype(0.3), n % 2 == 0, vector(d, dtype, 9),
                   scratch=[None])


@each_dtype
@pytest.mark.parametrize("format", ["bf16", "fp16", "int8"])
def test_add_quantized_of_any_bits(dtype, format):
    rng = np.random.default_rng(4)
    for n, d in enumerate(SIZES):
        exponents, codes = (rng.integers(-2**15, 2**15, size).astype(np.int16) for size in (-(-d // 64), d))
        exponents[::2] >>= 6
        check_same("add_quantized", dtype, exponents, codes.astype(np.int8 if format == "int8" else np.int16), format, 64,
                   dtype(0.3), n % 2 == 0, vector(d, dtype, 9), scratch=[None])


@each_dtype
def test_sparse(dtype):
    for n, d in enumerate(SIZES):
        k = max(1, d // 7)
        indices = np.sort(np.random.default_rng(n).permutation(d)[:k])
        check_same("add_sparse", dtype, indices, vector(k, dtype, n), dtype(0.3), vector(d, dtype, 1))
        check_same("clear_sparse", dtype, indices, vector(d, dtype, 1))
        check_same("add_dense", dtype, vector(d, dtype, 4), dtype(0.3), vector(d, dtype, 1))
        check_same("mean_rows", dtype, vector(3 * d, dtype, 4).reshape(3, d), vector(d, dtype, 2), 1, dtype(1 / 3),
                   np.zeros(d, dtype))
        sparse = vector(d, dtype, n) * (np.arange(d) % 3 == 0)
        check_same("subtract", dtype, sparse, vector(d, dtype, 1))
    for terms, factors, _, _, d in sources(dtype, kinds=("normal", "wide", "subnormal")):
        indices = np.sort(np.random.default_rng(d).permutation(d)[: max(1, d // 7)])
        check_same("gather", dtype, terms, factors, indices, np.zeros(indices.size, dtype), host=(1,))


@pytest.mark.parametrize(("d", "k"), [(1, 1), (10, 3), (10, 10), (1000, 10), (5001, 777), (200_000, 1), (2**40, 50)])
def test_codes_of_indices(d, k):
    rng = np.random.default_rng(d)
    indices = np.sort(rng.choice(d, k, replace=False) if d < 10**6 else rng.integers(0, d, k))
    low = low_bits(d, k)
    lower, upper = np.zeros(lower_nbytes(k, low) // 8, np.uint64), np.zeros(upper_nbytes(d, k, low) // 8, np.uint64)
    reference.encode_indices(indices, low, lower, upper)
    check_same("encode_indices", np.float32, indices, low, lower, upper)
    check_same("decode_indices", np.float32, lower, upper, low, d, np.zeros(k, np.int64))
    for fewer in (0, 1, 3, 60):  # any bits, with fewer and fewer ones
        lower, upper = (rng.integers(0, 2**64, size, np.uint64) for size in (lower.size, upper.size))
        for _ in range(fewer):
            upper &= rng.integers(0, 2**64, upper.size, np.uint64)
        check_same("decode_indices", np.float32, lower, upper, low, d, np.zeros(k, np.int64))


@pytest.mark.parametrize(("d", "k"), [(1, 1), (10, 3), (10, 10), (1000, 1), (1000, 999), (5001, 777), (2**33, 300), (3, 2)])
def test_random_subsets(d, k):
    """All draws at once, where the host draws one after the other."""
    for seed, step, rank in ((0, 0, 0), (7, 3, 1), ((1 << 63) - 1, 10**12, 5), (1, 2, 3)):
        expected, found = np.zeros(k, np.int64), there(np.zeros(k, np.int64))
        reference.sample_indices(seed, step, rank, d, expected, None)
        key = there(np.array([step, rank], np.int64))
        BACKENDS[0](np.float32, DEVICE).sample_indices(seed, key, d, found, None)
        assert expected.tolist() == found.tolist()


@each_dtype
def test_low_rank(dtype):
    parts, rank = np.array([[5, 7], [9, 0], [3, 1]]), 2
    left, right = vector(rank * (5 + 3) + 9, dtype, 1), vector(rank * (7 + 1), dtype, 2)
    for overwrite in (False, True):
        check_same("add_low_rank", dtype, left, right, parts, rank, dtype(0.3), overwrite, vector(47, dtype, 3),
                   scratch=[None], host=(2,))
    rows = vector(24, dtype, 4)
    rows[12:18] = rows[6:12]
    check_same("orthonormalise", dtype, rows, np.array([[0, 6]]), 4, vector(24, dtype, 5), host=(1,))


@each_dtype
def test_entries_that_sleep(dtype):
    x, where = vector(100, dtype, kind="zeros"), np.arange(100) % 7 == 3
    x[::7] = 1
    for mask in (where, np.arange(100) % 7 == 0, np.zeros(100, bool)):
        for kernels, array in ((backend(dtype), x.copy()), *((kind(dtype, DEVICE), there(x)) for kind in BACKENDS)):
            placed = kernels.place(mask)
            assert kernels.stirs(array, placed) == bool((x[mask] != 0).any())
            kernels.silence(array, placed)
            assert bits(host(array)) == bits(np.where(mask, 0, x))


@each_dtype
def test_optimizers(dtype):
    for n, d in enumerate(SIZES):
        a, b, c, x, e = (vector(d, dtype, s, "wide" if s == 1 else "normal") for s in range(5))
        v, inverse = np.abs(c), np.abs(e) * (np.arange(d) % 5 > 0)
        real = [dtype(value) for value in (0.9, 0.99, 1e-3, 1.01, 1e-8, 0.999)]
        with np.errstate(over="ignore"):
            check_same("update_moments", dtype, a, *real[:2], b, v)
            check_same("adam", dtype, a, *real, b, v, x)
            check_same("adam_step", dtype, a, v, *real[2:], x)
            check_same("preconditioned_step", dtype, a, inverse, real[2], real[5], x)
            check_same("sign_step", dtype, a * (np.arange(d) % 3 > 0), real[2], real[5], x * (np.arange(d) % 2))
            check_same("sign_step", dtype, vector(d, dtype, n, "broken"), real[2], real[5], x)
            check_same("momentum_step", dtype, a, inverse, real[0], real[2], real[5], b, x)
            check_same("local_step", dtype, a, inverse, c, real[0], dtype(0.3), real[2], real[5], b, e, x)
            check_same("l1_norm", dtype, a)
        starts = np.array([0, 0, d // 3, d // 2, d // 2, d])
        layers = starts.size - 1
        scales, least = np.abs(vector(layers, dtype, n)) + dtype(0.1), np.full(layers, 1e-3, dtype)
        check_same("layer_norms", dtype, a, starts, np.zeros(layers), host=(1, 2))
        check_same("fingerprints", dtype, a, starts, np.zeros(layers, np.uint64), host=(1, 2))
        check_same("add_layers", dtype, a, scales, starts, x, host=(1, 2))
        check_same("scaled_momentum", dtype, a, c, real[0], scales, starts, x, host=(3, 4))
        check_same("follow_momentum", dtype, a, inverse, np.array([0.9, 0.99], dtype), *real[3:5], scales, least, starts, c,
                   v.copy(), np.zeros(layers, dtype), host=(2, 5, 6, 7, 10))


@pytest.mark.skipif(len(BACKENDS) == 1, reason="of kernels in Triton: make test-device")
@each_dtype
def test_a_step_of_an_optimizer_is_one_pass(dtype):
    """One kernel, and no operation of torch but what brings numbers of layers to the device and back."""
    d, real = 1000, dtype(0.9)
    a, b, c, m, x = (there(vector(d, dtype, n)) for n in range(5))
    starts, two = np.array([0, 10, d]), np.ones(2, dtype)
    backend = BACKENDS[1](dtype, DEVICE)
    with bus.watched() as copies:
        for name, *arguments in [
            ("update_moments", a, real, real, m, x), ("adam", a, *[real] * 6, m, b, x), ("adam_step", m, b, *[real] * 4, x),
            ("preconditioned_step", m, b, real, real, x), ("sign_step", m, real, real, x),
            ("momentum_step", a, b, real, real, real, m, x), ("local_step", a, b, c, *[real] * 4, m, c, x),
        ]:
            with Launches(backend) as launches:
                getattr(backend, name)(*arguments)
            backend._run = launches.run
            assert launches.names == [name]
    assert not copies
    for name, *arguments in [
        ("add_layers", a, two, starts, x), ("scaled_momentum", a, m, real, two, starts, x),
        ("follow_momentum", a, b, np.array([real, real]), real, real, two, two, starts, m, c, two.copy()),
    ]:
        with Launches(backend) as launches, bus.watched() as copies:
            getattr(backend, name)(*arguments)
        backend._run = launches.run
        assert [kernel for kernel in launches.names if not kernel.startswith("aten.")] == [name]
        assert sum(nbytes for _, nbytes in copies) <= 100
    for name, kernels, out in [("layer_norms", ["part_squares", "square_totals"], np.zeros(2)),
                               ("fingerprints", ["add_fingerprints"], np.zeros(2, np.uint64))]:
        with Launches(backend) as launches:
            getattr(backend, name)(a, starts, out)
        backend._run = launches.run
        assert [kernel for kernel in launches.names if not kernel.startswith("aten.")] == kernels


@each_dtype
def test_norms_and_hashes_of_layers_of_any_length(dtype):
    """Empty, of one entry, of several parts; blocks of kernels lie across them."""
    check_same("layer_norms", dtype, np.zeros(0, dtype), np.array([0, 0]), np.zeros(1), host=(1, 2))
    check_same("fingerprints", dtype, np.zeros(0, dtype), np.array([0, 0]), np.ones(1, np.uint64), host=(1, 2))
    starts = np.array([0, 0, 1, 64, 200, 1300, 1300, 10_000])
    for kind in KINDS:
        x = vector(10_000, dtype, 1, kind)
        check_same("layer_norms", dtype, x, starts, np.zeros(7), host=(1, 2))
        check_same("fingerprints", dtype, x, starts, np.zeros(7, np.uint64), host=(1, 2))
