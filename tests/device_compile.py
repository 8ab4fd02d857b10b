"""Compile, without a GPU, every Triton kernel as it is launched, for four processors; print what came out, in JSON lines.

Launches are those that the backend makes of calls with small vectors; they are recorded in place of made. Of an argument
Triton looks at the type, and makes a constant of the number 1, so there are calls in which numbers are 1.
"""

import json
import re
import sys

import numpy as np
import torch
from device_side import there, vector
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compiled

from mpi_ef.kernels import low_bits, lower_nbytes, upper_nbytes
from mpi_ef.kernels.device.triton_backend import TritonBackend

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx90a": GPUTarget("hip", "gfx90a", 64),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16",
            torch.int32: "*i32", torch.int64: "*i64"}


class Recorder(TritonBackend):
    """Keeps what would be launched, each variant once."""

    launches = {}  # noqa: RUF012

    def _run(self, kernel, programs, *arguments, **constants):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        assert sorted(given) == sorted(kernel.arg_names)
        signature, values = {}, {}
        general = {one.name for one in kernel.params if one.do_not_specialize}
        for name in kernel.arg_names:
            value = given[name]
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            elif name in constants or (value == 1 and name not in general):
                signature[name], values[name] = "constexpr", value
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        self.launches[kernel.__name__, str(signature), str(values)] = kernel, str(self.dtype), signature, values


def call_all(dtype):
    """Call every method that launches kernels: one and three terms, with and without what is kept and rows, every format."""
    backend, nothing, factors = Recorder(dtype, "side:cpu"), there(np.empty(0, dtype)), (0.3, -1.0, 0.7)
    d = 5000
    for number, count in enumerate((1, 3)):
        terms = tuple(there(vector(d, dtype, n)) if n < count else nothing for n in range(3))
        keep = there(np.zeros(d, dtype)) if number else nothing
        backend.combine(terms, factors, keep)
        indices, values = there(np.arange(50)), there(np.zeros(50, dtype))
        backend.gather(terms, factors, indices, values)
        backend.select_largest(terms, factors, keep, factors, np.array([0, d]), np.array([50]), indices, values)
        backend.select_largest(terms, factors, keep, factors, np.array([0, 1, d]), np.array([1, 49]), indices, values)
        block = d if number else 1
        rows = there(np.zeros((2 * number, -(-d // 8)), np.uint8)), there(np.zeros((2 * number, -(-d // 64)), dtype))
        backend.encode_signs(terms, factors, keep, factors, number == 1, *rows, 64, 0.5, block,
                             there(np.zeros(-(-d // 8), np.uint8)), there(np.zeros(-(-d // block), dtype)))
        for form in ("bf16", "fp16", "int8") if number else ("bf16",):
            exponents = there(np.zeros(-(-d // block), np.int16))
            codes = there(np.zeros(d, np.int8 if form == "int8" else np.int16))
            backend.quantize(terms, factors, keep, factors, number == 1, form, block, exponents, codes)
            backend.add_quantized(exponents, codes, form, block, 0.3, number == 1, terms[0])
    for block in (64, 100, 4096):
        backend.encode_signs(terms, factors, keep, factors, True, *rows, 64, 0.5, block,
                             there(np.zeros(-(-d // 8), np.uint8)), there(np.zeros(-(-d // block), dtype)))
    for rows in (1, 3):
        signs, scales = there(np.zeros((rows, -(-d // 8)), np.uint8)), there(np.zeros((rows, 1), dtype))
        backend.add_signs(signs, scales, d, 0.3, rows == 1, terms[0])
    backend.l1_norm(terms[0])
    backend.layer_norms(there(vector(10, dtype)), np.array([0, 10]), np.zeros(1))
    call_optimizers(backend, dtype)
    backend.add_sparse(indices, values, 0.3, terms[0])
    backend.clear_sparse(indices, terms[0])
    for d, k in ((1000, 10), (10, 10), (3, 1), (2**40, 50)):
        low = low_bits(d, k)
        parts = [there(np.zeros(n // 8, np.uint64)) for n in (lower_nbytes(k, low), upper_nbytes(d, k, low))]
        backend.encode_indices(there(np.arange(k)), low, *parts)
        backend.decode_indices(*parts, low, d, there(np.zeros(k, np.int64)))


def call_optimizers(backend, dtype):
    """Call what optimizers do with vectors, of one layer and of two."""
    a, b, c, e, f, x = (there(vector(5000, dtype, n)) for n in range(6))
    backend.update_moments(a, 0.9, 0.99, b, c)
    backend.adam(a, 0.9, 0.99, 1e-3, 1.1, 1e-8, 0.999, b, c, x)
    backend.adam_step(a, b, 1e-3, 1.1, 1e-8, 0.999, x)
    backend.preconditioned_step(a, b, 1e-3, 0.999, x)
    backend.sign_step(a, 1e-3, 0.999, x)
    backend.momentum_step(a, b, 0.9, 1e-3, 0.999, c, x)
    backend.local_step(a, b, c, 0.9, 0.3, 1e-3, 0.999, e, f, x)
    for starts in (np.array([0, 5000]), np.array([0, 10, 5000])):
        numbers = np.ones(starts.size - 1, dtype)
        backend.layer_norms(a, starts, np.zeros(starts.size - 1))
        backend.fingerprints(a, starts, np.zeros(starts.size - 1, np.uint64))
        backend.add_layers(a, numbers, starts, x)
        backend.scaled_momentum(a, b, 0.9, numbers, starts, x)
        backend.follow_momentum(a, b, np.array([0.9, 0.99], dtype), 1.1, 1e-8, numbers, numbers, starts, c, e,
                                numbers.copy())


def main(only):
    for dtype in (np.float32, np.float64):
        call_all(dtype)
    for kernel, dtype, signature, values in Recorder.launches.values():
        for name in only or TARGETS:
            made = compiled(ASTSource(kernel, signature=signature, constexprs=values), target=TARGETS[name],
                            options={"enable_fp_fusion": False})
            of_nvidia = name.startswith("sm")
            code, between = made.asm["ptx" if of_nvidia else "amdgcn"], made.asm["llir"]
            print(json.dumps({
                "kernel": kernel.__name__, "dtype": dtype, "target": name, "constants": str(values),
                "fused": found(r"\bfma[.]\S*|\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f\S*", code),
                "may be fused": found(r"llvm[.]fm\w+|\bf(?:add|sub|mul) (?:\w+ )*(?:contract|fast|reassoc)\b", between)
                + found(r"\b(?:mul|add|sub)[.]f(?:32|64)", code),  # ptxas leaves those alone that are rounded: mul.rn.f32
                "approximate": found(r"\b(?:sqrt|div|rcp|rsqrt)[.](?:approx|full)\S*", code)
                + found(r"!fpmath|llvm[.]amdgcn[.](?:rcp|rsq|sqrt|fdiv)\S*", between),
                "flushes": found(r"\S*[.]ftz\S*|float_denorm_mode_\w+ [012]", code),
                "nbytes": len(made.asm["cubin" if of_nvidia else "hsaco"]),
            }), flush=True)


def found(pattern, text):
    return sorted(set(re.findall(pattern, text)))


if __name__ == "__main__":
    main(sys.argv[1:])
