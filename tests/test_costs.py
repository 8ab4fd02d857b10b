"""What is counted instead of timed: memory touched per entry, allocations, bits on the wire, machine code made."""

import os
import subprocess
import sys
import tracemalloc
from contextlib import nullcontext
from math import lgamma, log
from pathlib import Path

import numpy as np
import patience
import pytest
import virtual
from vectors_for_tests import gaussian

from mpi_ef import kernels
from mpi_ef.collectives import DenseMean, GatherMean, TwoPhaseMean
from mpi_ef.compress import Identity, Quantize, RandK, Sign, TopK
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.bench.traffic import counted

ROOT = Path(__file__).resolve().parents[1]


LIMITS = [  # bytes per entry with 2 ranks, k = 1 %, values in 32 bits: what a step may touch in all
    ("ef21", GatherMean, TopK(0.01), 12),
    ("ef14", GatherMean, TopK(0.01), 16),
    ("econtrol", GatherMean, TopK(0.01), 24),
    ("ef14", TwoPhaseMean, Sign(block=4096), 32),
    ("ef14", TwoPhaseMean, Sign(), 32),
]


@pytest.mark.parametrize(("rule", "plan", "compressor", "limit"), LIMITS, ids=lambda x: str(x))
def test_memory_touched_by_a_step(rule, plan, compressor, limit):
    d = 200_000

    def program(comm):
        feedback = ErrorFeedback(rule, plan(comm, compressor, d), **({"eta": 0.1} if rule == "econtrol" else {}))
        vectors = [gaussian(comm.Get_rank(), d, step=t) for t in range(3)]
        for x in vectors[:2]:
            feedback.step(x)
        # Rank 0 counts for the whole process: the other rank ends its last step before, and this one while it does.
        comm.allgather("ready")
        with counted() if comm.Get_rank() == 0 else nullcontext() as touched:
            comm.allgather("counting")
            feedback.step(vectors[2])
            comm.allgather("done")
        return touched

    touched = virtual.results(2, program)[0]
    print(
        rule,
        compressor,
        round(touched.total() / 2 / d, 2),
        {k: round(v / 2 / d, 2) for k, v in touched.items()},
    )
    assert touched.total() / 2 / d <= limit  # of both ranks, which share this process


def test_counting_sees_passes():
    x, out = np.ones(1000, np.float32), np.ones(1000, np.float32)
    with counted() as touched:
        kernels.add_dense(x, np.float32(1), out)
    assert touched.total() == 12 * 1000
    with counted() as touched:
        kernels.add_sparse(np.arange(10), x[:10], np.float32(1), out)
    assert touched.total() == 10 * (8 + 4 + 2 * 4)
    with counted() as touched:
        kernels.mean_rows(np.ones((3, 1000), np.float32), x, 1, np.float32(1 / 3), out)
    assert touched.total() == (2 + 1 + 1) * 4 * 1000  # of the rows one is not read, but `own` in its place


EXCHANGES = {
    "GatherMean topk": (GatherMean, TopK(0.01)),
    "GatherMean topk bf16": (GatherMean, TopK(0.01, values=Quantize("bf16"))),
    "GatherMean topk segments": (GatherMean, TopK(0.01, segments=(10_000, 50_000, 40_000))),
    "GatherMean randk": (GatherMean, RandK(0.01)),
    "GatherMean identity": (GatherMean, Identity()),
    "TwoPhaseMean sign": (TwoPhaseMean, Sign(block=1024)),
    "TwoPhaseMean sign whole": (TwoPhaseMean, Sign()),
    "TwoPhaseMean int8": (TwoPhaseMean, Quantize("int8")),
    "DenseMean": (lambda comm, _, d: DenseMean(comm, d), None),
}


class OwnComm:
    """A communicator of one rank that allocates nothing: what is measured is the library."""

    rank, size = 0, 1

    def __bool__(self):
        return True

    def Get_size(self):
        return 1

    def Get_rank(self):
        return 0

    def Is_inter(self):
        return False

    def allgather(self, value):
        return [value]

    def Allgather(self, send, receive):
        receive.reshape(-1)[:] = send.reshape(-1)

    Alltoall = Iallgather = Ialltoall = Allgather

    def Alltoallv(self, send, receive):
        pass


@pytest.mark.parametrize("rule", ["ef21", "ef14", "econtrol"])
@pytest.mark.parametrize("name", EXCHANGES)
def test_steps_allocate_nothing_of_the_size_of_the_vector(name, rule):
    """Views and small objects come and go."""
    d = 100_000
    plan, compressor = EXCHANGES[name]
    feedback = ErrorFeedback(rule, plan(OwnComm(), compressor, d), **({"eta": 0.1} if rule == "econtrol" else {}))
    vectors = [gaussian(0, d, step=t) for t in range(4)]
    for x in vectors:
        feedback.step(x)
    tracemalloc.start()
    try:
        for x in vectors * 5:  # small objects settle
            feedback.step(x)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for x in vectors * 5:
            feedback.step(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 20_000  # a vector has 400 kB, the indices of its kept entries 8 kB


def test_tracemalloc_would_see_a_vector():
    tracemalloc.start()
    try:
        np.empty(10_000, np.float32)
        assert tracemalloc.get_traced_memory()[1] > 40_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("ratio", "limit"), [(0.001, 1.10), (0.003, 1.10), (0.01, 1.10), (0.02, 1.10), (0.05, 1.10),
                                              (0.1, 1.25), (0.25, 1.25)])
@pytest.mark.parametrize("d", [10**6, 10**7])
def test_bits_per_index_are_close_to_the_entropy(d, ratio, limit):
    k = int(ratio * d)
    low = kernels.low_bits(d, k)
    bits = 8 * (kernels.lower_nbytes(k, low) + kernels.upper_nbytes(d, k, low)) / k
    entropy = (lgamma(d + 1) - lgamma(k + 1) - lgamma(d - k + 1)) / log(2)  # log2 of the number of subsets
    assert bits <= limit * entropy / k


def run_python(code, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=patience.limit(280),
        cwd=ROOT,
        env=kept | environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


SELECT = """
import numpy as np
from mpi_ef.compress import TopK, lazy, source
from mpi_ef import kernels
d = 5000
codec = TopK(0.1).codec(d)
wire = np.empty(codec.nbytes, np.uint8)
x, y = np.linspace(-1, 1, d, dtype=np.float32), np.ones(d, np.float32)
frozen = x.copy()
frozen.flags.writeable = False
for vector in (x, frozen, source(lazy(x) - y), source(0.5 * lazy(x) + y - frozen)):
    assert codec.encode(vector, wire)
    codec.decode(wire)
kernel = kernels.select_largest
print(len(kernel.signatures), sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


@pytest.mark.slow
def test_one_machine_code_and_none_made_twice(tmp_path):
    """Read-only vectors and combinations run through the code of plain ones, and the next process loads it from disk."""
    first = run_python(SELECT, NUMBA_CACHE_DIR=str(tmp_path))
    assert first == ["1", "0", "1"]
    assert run_python(SELECT, NUMBA_CACHE_DIR=str(tmp_path)) == ["1", "1", "0"]


def test_kernels_work_without_a_home_and_with_a_read_only_package(tmp_path):
    """In a container: nothing can be written, so kernels compile in every process, and do not fail."""
    package = tmp_path / "site"
    for folder, name in ((ROOT / "mpi_ef", "mpi_ef"), (ROOT / "kernels", "mpi_ef/kernels")):
        for path in sorted(folder.rglob("*.py")):
            if "kernels" in path.relative_to(folder).parts or "jobs" in path.relative_to(folder).parts:
                continue
            target = package / name / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    code = f"""
import sys
sys.path.insert(0, {str(package)!r})
import numba.core.caching as caching
for name in dir(caching):  # as root every folder can be written: let Numba find no place
    locator = getattr(caching, name)
    if isinstance(locator, type) and issubclass(locator, caching._CacheLocator):
        locator.from_function = classmethod(lambda cls, *_: None)
import numpy as np
from mpi_ef import kernels
assert kernels.__file__.startswith({str(package)!r})
print(kernels.all_finite(np.ones(9, np.float32)), kernels.all_finite(np.full(9, np.nan)))
"""
    assert run_python(code, HOME="/nonexistent") == ["True", "False"]


CROSS_COMPILE = """
import sys
import llvmlite.binding as llvm
from numba import float32, float64, int64, njit, types, uint8
from mpi_ef.kernels import robust, select, signs
triple = sys.argv[1]
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
machine = llvm.Target.from_triple(triple).create_target_machine(opt=2)
for number in (float32, float64):
    vector, frozen = number[::1], types.Array(number, 1, "C", readonly=True)
    source = (types.UniTuple(frozen, 3), vector, vector, vector)
    whole = int64[::1]
    rows, sums = number[:, ::1], types.float64[:, ::1]
    for kernel, arguments in (
            (select.select_largest, (*source, whole, whole, whole, vector, vector, whole)),
            (signs.encode_signs, (*source, types.boolean, uint8[:, :], number[:, :], int64, number, int64, uint8[::1],
                                  vector, vector)),
            (robust.add_distances, (rows, rows, int64, int64, sums, sums))):
        fresh = njit(nogil=True, error_model="numpy")(kernel.py_func)
        fresh.compile(arguments)
        text = fresh.inspect_llvm(fresh.signatures[0])
        module = llvm.parse_assembly(text.replace("@llvm.x86.atomic.", "@reference_count_"))  # Numba's, not ours
        module.triple = triple
        assert len(machine.emit_object(module)) > 10_000
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "triple", ["aarch64-unknown-linux-gnu", pytest.param("powerpc64le-unknown-linux-gnu", marks=pytest.mark.exhaustive)]
)
def test_vector_instructions_compile_for_other_machines(triple):
    """The LLVM code of the kernels, not yet optimised for this machine, becomes code for others."""
    assert run_python(CROSS_COMPILE, triple, NUMBA_OPT="0") == ["compiled"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "names"), [
    ("float32", ["combining", "adding_signs"]),
    *(pytest.param(dtype, ["select_largest_on_long_vectors", "signs_of_long_vectors", "combining", "adding_signs"],
                   marks=pytest.mark.exhaustive) for dtype in ("float32", "float64")),
    pytest.param("twins", ["robust"], marks=pytest.mark.exhaustive),
])
def test_kernels_give_the_same_bits_without_wide_vector_instructions(tmp_path, dtype, names):
    """On a processor of 2003: slower, but right."""
    tests = [f"{ROOT}/tests/test_robust.py" if name == "robust" else f"{ROOT}/tests/test_kernels.py::test_{name}"
             for name in names]
    code = f"import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {dtype!r}, *{tests!r}]))"
    out = run_python(code, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    assert {"passed", "passed,"} & set(out)
