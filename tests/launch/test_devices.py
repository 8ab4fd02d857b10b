"""Vectors on the device side on real ranks: optimizers, the DDP hook, and checkpoints that go on on the other side."""

import subprocess
import sys
from pathlib import Path

import pytest
from device_side import HARDWARE, INTERPRETED
from launching import run

PROGRAM = Path(__file__).with_name("device_program.py")
GPU = Path(__file__).resolve().parents[1] / "gpu"  # what make test-gpu runs


@pytest.mark.slow
def test_both_sides_end_with_the_same_bits(tmp_path):
    """The program reads what tests of devices read: MPI_EF_TEST_DEVICE, TRITON_INTERPRET."""
    within, real = 400 if INTERPRETED else 120, INTERPRETED or HARDWARE
    ended = run(2, PROGRAM, tmp_path, within=within, real=real, GLOO_SOCKET_IFNAME="lo")
    assert ended.status == 0, ended.text
    assert ended.lines_with("the same bits on both sides"), ended.text


@pytest.mark.slow
@pytest.mark.skipif(HARDWARE, reason="there is one")
def test_where_there_is_no_gpu_one_line_says_so():
    command = [sys.executable, "-c", "import sys, torch; torch.cuda.is_available = lambda: False; sys.argv = ['run.py']; "
               f"import runpy; runpy.run_path({str(GPU / 'run.py')!r}, run_name='__main__')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 77
    assert "finds no GPU; nothing was run" in done.stdout
    assert len(done.stdout.splitlines()) == 1
