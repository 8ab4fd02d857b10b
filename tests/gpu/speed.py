"""How long steps take on a GPU, beside operations of torch on the same vectors: ``mpiexec -n 2 python tests/gpu/speed.py``.

Two ranks on one GPU. Medians; ratios are of one run. D=1000000 takes other vectors than of 25 million entries. With
MPI_EF_TEST_DEVICE=side:cpu, the default without a GPU, it shows that the program works, and no figure of interest.
"""

import os
import sys
import traceback
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_side import DEVICE, HARDWARE, TORCH_DEVICE

from mpi_ef import ErrorFeedback, Sign, TopK, plan_for
from mpi_ef.compress import Keep, lazy, source
from mpi_ef.kernels.backend import backend
from mpi_ef.kernels.device import bus
from mpi_ef.kernels.device.array import DeviceArray

COMM = MPI.COMM_WORLD
D, RATIO = int(os.environ.get("D", "25000000")), 0.01


def synchronise():
    if HARDWARE:
        torch.cuda.synchronize(TORCH_DEVICE)


def milliseconds(call, times=20, first=3):
    """Return the median time of a call, until the device is done."""
    seen = []
    for number in range(first + times):
        synchronise()
        began = perf_counter()
        call(number)
        synchronise()
        if number >= first:
            seen.append(1e3 * (perf_counter() - began))
    return median(seen)


def allocated():
    synchronise()
    return torch.cuda.memory_allocated(TORCH_DEVICE) if HARDWARE else 0


def vectors(n):
    generator = torch.Generator(TORCH_DEVICE).manual_seed(COMM.rank)
    return [DeviceArray(torch.randn(D, generator=generator, device=TORCH_DEVICE)) for _ in range(n)]


def alone():
    """Return rows of the table that one rank measures: what, time, beside what, its time, ratio, goal."""
    a, b, c = vectors(3)
    kernels, rows = backend(np.dtype(np.float32), DEVICE), []
    subtraction = milliseconds(lambda _: torch.sub(a.tensor, b.tensor, out=c.tensor))
    addition = milliseconds(lambda _: torch.add(a.tensor, b.tensor, out=c.tensor))
    k = int(RATIO * D)
    of_torch = milliseconds(lambda _: torch.topk(c.tensor.abs(), k, sorted=False))

    def encode(compressor, keeps):
        codec = compressor.codec_on(DEVICE, D, np.float32)
        wire, kept = kernels.zeros(codec.nbytes, np.uint8), kernels.zeros(D if keeps else 0)

        def call(number):
            x = lazy(a) - b
            assert codec.encode(source(x, Keep(x, kept, less_message=True) if keeps else None), wire, step=number)

        return milliseconds(call)

    top, signs = encode(TopK(RATIO), False), encode(Sign(block=4096), True)
    rows.append(("EF21: select and encode a - b", top, "torch.sub(a, b, out=c)", subtraction, top / subtraction, "<= 6"))
    rows.append(("the same", top, "torch.topk(c.abs(), k)", of_torch, top / of_torch, "<= 0.25"))
    rows.append(("signs: encode a - b, keep the rest", signs, "torch.add(a, b, out=c)", addition, signs / addition, "<= 3"))
    return rows


def together():
    """Return what both ranks measure: a whole step of EF21 against a dense one, and the memory it takes."""
    grads = vectors(3)
    before = allocated()
    plan = plan_for(COMM, TopK(RATIO), D, device=DEVICE)
    feedback = ErrorFeedback("ef21", plan)
    feedback.step(grads[0])
    feedback.step(grads[1])
    added = allocated() - before

    def step(number):
        COMM.Barrier()
        feedback.step(grads[number % 3])

    host = bus.host_array(D, np.float32, TORCH_DEVICE)

    def dense(_):
        COMM.Barrier()
        bus.to_host(grads[0].tensor, host)
        COMM.Allreduce(MPI.IN_PLACE, host)
        bus.to_device(host, grads[0].tensor)

    whole, allreduce = milliseconds(step), milliseconds(dense, times=7)
    memory = f"{added / (4 * D):.2f} vectors" if HARDWARE else "not measured"
    row = ("EF21: whole step, 2 ranks", whole, "to host, MPI_Allreduce, back", allreduce, whole / allreduce, "<= 0.1")
    return row, f"memory on the device that EF21 adds: {memory}; goal: <= 2.2 (g_i, g, wires, candidates)"


def main():
    name = torch.cuda.get_device_name(TORCH_DEVICE) if HARDWARE else "no GPU: tensors of the CPU"
    rows = alone() if COMM.rank == 0 else []
    COMM.Barrier()
    row, memory = together()
    if COMM.rank:
        return
    kernels = type(backend(np.dtype(np.float32), DEVICE)).__name__
    library = MPI.Get_library_version().split(",")[0].splitlines()[0]
    print(f"\n{name}; torch {torch.__version__}, {kernels}, {library}; d = {D}, float32, k = {RATIO:.0%}, "
          f"{COMM.size} ranks\n")
    print("| measure | ms | beside | ms | ratio | goal |\n|---|---|---|---|---|---|")
    for what, time, beside, other, ratio, goal in [*rows, row]:
        print(f"| {what} | {time:.3f} | {beside} | {other:.3f} | {ratio:.2f} | {goal} |")
    print(f"\n{memory}", flush=True)


try:
    main()
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    COMM.Abort(1)
