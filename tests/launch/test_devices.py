"""Vectors on the device side on real ranks: optimizers, the DDP hook, and checkpoints that go on on the other side."""

from pathlib import Path

import pytest
from device_side import INTERPRETED
from launching import run

PROGRAM = Path(__file__).with_name("device_program.py")


@pytest.mark.slow
def test_both_sides_end_with_the_same_bits(tmp_path):
    """The program reads what tests of devices read: MPI_EF_TEST_DEVICE, TRITON_INTERPRET."""
    ended = run(2, PROGRAM, tmp_path, within=400 if INTERPRETED else 120, real=INTERPRETED, GLOO_SOCKET_IFNAME="lo")
    assert ended.status == 0, ended.text
    assert ended.lines_with("the same bits on both sides"), ended.text
