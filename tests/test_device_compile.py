"""Every Triton kernel compiles for NVIDIA's and AMD's processors without a GPU, and fuses no product with a sum."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import patience
import pytest

from mpi_ef.kernels import device

HERE = Path(__file__).parent
KERNELS = Path(device.__file__).parent
TARGETS = (("sm_80", "sm_90"), ("gfx90a", "gfx942"))
MODULES, BACKENDS = ("fused", "fused_dense", "fused_optim"), ("triton_backend", "triton_optim")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("device_compile"), pytest.mark.timeout(900)]
# AMD's processors divide so: 64-bit integers by way of float32, and floats; and take square roots.
DIVIDE = {"sample_magnitudes", "part_sums", "part_totals", "write_signs", "add_signs", "scales_of_blocks", "adam",
          "adam_step", "follow_momentum"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What came out of every compilation, done by two processes: under the interpreter Triton compiles nothing."""
    pytest.importorskip("triton", reason="needs Triton, which is not installed: make test-device")
    not_these = {"TRITON_INTERPRET", "MPI_EF_TEST_DEVICE", "MPI_EF_DEVICE_KERNELS"}
    environment = {name: value for name, value in os.environ.items() if name not in not_these}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
                    "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    processes = [subprocess.Popen([sys.executable, HERE / "device_compile.py", *targets], env=environment, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for targets in TARGETS]
    ends = [process.communicate(timeout=patience.limit(400)) for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors for _, errors in ends)
    return [json.loads(line) for text, _ in ends for line in text.splitlines()]


def tree_of(name):
    return ast.parse((KERNELS / f"{name}.py").read_text(encoding="utf-8"))


def jitted(name):
    """The functions of a module that are for Triton to compile."""
    return {node.name for node in tree_of(name).body if isinstance(node, ast.FunctionDef)
            and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)}


def kernels():
    """Those that are launched: others are called by them and have names with an underscore."""
    return {name for module in MODULES for name in jitted(module) if not name.startswith("_")}


def test_what_is_launched_is_what_modules_offer():
    offered = {name for module in MODULES for node in tree_of(module).body if isinstance(node, ast.Assign)
               and ast.unparse(node.targets[0]) == "__all__" for name in ast.literal_eval(node.value)}
    launched = {node.attr for module in BACKENDS for node in ast.walk(tree_of(module)) if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name) and node.value.id in MODULES}
    assert kernels() == {name for name in offered if not name.isupper()}
    assert kernels() == {name for name in launched if not name.isupper()}
    others = {path.stem for path in KERNELS.glob("*.py")} - set(MODULES)
    assert not any(jitted(name) for name in others)


def test_every_kernel_compiles_for_every_processor(compiled):
    vectors = {"float32", "float64"}
    made = {(one["kernel"], one["target"]) for one in compiled if one["nbytes"] > 0}
    assert made == {(name, target) for name in kernels() for targets in TARGETS for target in targets}
    by_dtype = {kernel: {one["dtype"] for one in compiled if one["kernel"] == kernel} for kernel in kernels()}
    # These have no vectors, or look at words of them: one of the two dtypes is enough.
    of_indices = {"mark_indices", "emit_indices", "mark_chosen", "add_fingerprints"}
    assert {kernel for kernel, dtypes in by_dtype.items() if dtypes != vectors} == of_indices


def test_no_product_is_fused_with_a_sum(compiled):
    """Also where it is fused on another processor, the bits would not be those of the host."""
    wrong = [one for one in compiled if one["may be fused"]
             or (one["fused"] and not (one["target"].startswith("gfx") and one["kernel"] in DIVIDE))]
    assert not wrong, wrong


def test_quotients_and_roots_are_rounded_to_nearest(compiled):
    wrong = [one for one in compiled if one["approximate"]]
    assert not wrong, wrong


def test_subnormal_numbers_are_kept(compiled):
    wrong = [one for one in compiled if one["flushes"]]
    assert not wrong, wrong
