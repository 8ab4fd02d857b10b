"""The hook for DistributedDataParallel, on real processes and gloo: 1, 2 and 3 of them, one world for all programs."""

import threading
from pathlib import Path

import ddp_program
import numpy as np
import pytest
from launching import run_alone
from programs import PLANS, exchanges
from vectors_for_tests import gaussian
from virtual import results

from mpi_ef import ErrorFeedback, plan_for
from mpi_ef.ddp import process_group

# A stuck world is ended after this time; a healthy one needs 20 seconds, and more when it has to compile kernels.
LIMIT = 240


@pytest.fixture(scope="module", params=[1, 2, 3])
def world(request, tmp_path_factory):
    """Number of ranks, the folder with what they left, and how the program ended."""
    folder = tmp_path_factory.mktemp("ddp")
    return request.param, folder, run_alone(ddp_program.__file__, request.param, folder, within=LIMIT)


def left_by_ranks(n, folder: Path, name):
    for rank in range(n):
        with np.load(folder / f"{name}_{rank}.npz") as file:
            yield [file[f"arr_{number}"] for number in range(len(file.files))]


def assert_same_bits(rows, expected):
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row.view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8))


@pytest.mark.parametrize("program", [program.__name__ for program in ddp_program.PROGRAMS])
def test_program(world, program):
    _, _, ended = world
    assert f"passed {program}" in ended.text.splitlines(), ended.text


def test_nothing_else_is_printed(world):
    _, _, ended = world
    assert ended.status == 0, ended.text
    assert ended.text.splitlines() == [f"passed {program.__name__}" for program in ddp_program.PROGRAMS]


@pytest.mark.parametrize("d", [1, 65, 1001])
@pytest.mark.parametrize("name", PLANS)
def test_plans_on_a_process_group_give_the_bits_of_virtual_ranks(world, name, d):
    n, folder, _ = world
    expected = results(n, exchanges(name, d, np.float32))
    for rows, wanted in zip(left_by_ranks(n, folder, f"plan_{list(PLANS).index(name)}_{d}"), expected, strict=True):
        assert_same_bits(rows, wanted)


@pytest.mark.parametrize("rule", ddp_program.ONE_BUCKET)
def test_one_bucket_gives_the_bits_of_virtual_ranks(world, rule):
    n, folder, _ = world
    d, options = ddp_program.LENGTH, {"eta": 0.1} if rule == "econtrol" else {}

    def program(comm):
        plan = plan_for(comm, ddp_program.ONE_BUCKET[rule], d)
        feedback = ErrorFeedback(rule, plan, dense_steps=1, **options)
        return [feedback.step(gaussian(plan.rank, d, step=step)).copy() for step in range(ddp_program.STEPS)]

    for rows, wanted in zip(left_by_ranks(n, folder, f"bucket_{rule}"), results(n, program), strict=True):
        assert_same_bits(rows, wanted)


def test_python_ends_after_torch_has_let_go(monkeypatch):
    """A thread of gloo that drops NumPy's memory when Python is ending would abort the process."""
    held = [process_group._bytes("test", np.zeros(8, np.uint8))]
    lent = process_group._lent[-1]
    thread = threading.Timer(0.2, held.clear)
    thread.start()
    process_group._wait_until_torch_lets_go()
    assert lent() is None
    thread.join()
    held.append(process_group._bytes("test", np.zeros(8, np.uint8)))
    monkeypatch.setattr(process_group, "_LETTING_GO_SECONDS", 0.1)
    process_group._wait_until_torch_lets_go()  # comes back although this is never dropped
    assert process_group._lent[-1]() is not None
