"""The hook for DistributedDataParallel goes on with another number of ranks: real processes, gloo, checkpoints on disk."""

import ddp_resume_program
import pytest
from launching import run_alone

# A stuck world is ended after this time; a healthy one needs 30 seconds, and more when it has to compile kernels.
LIMIT = 240


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run_alone(ddp_resume_program.__file__, tmp_path_factory.mktemp("ddp"), within=LIMIT)


@pytest.mark.parametrize("program", [program.__name__ for program in ddp_resume_program.PROGRAMS])
def test_program(ended, program):
    assert f"passed {program}" in ended.text.splitlines(), ended.text


def test_nothing_else_is_printed(ended):
    assert ended.status == 0, ended.text
    assert ended.text.splitlines() == [f"passed {program.__name__}" for program in ddp_resume_program.PROGRAMS]
