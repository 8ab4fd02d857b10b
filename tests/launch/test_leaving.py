"""Ranks that leave a training, or never come to it, do not leave the others waiting; without ``python -m mpi4py``."""

import pytest
from launching import run

PROGRAM = """
import sys
import torch
from mpi4py.MPI import COMM_WORLD as comm
import mpi_ef
from mpi_ef.errors import PeerError

overlap, wrong = (word == "yes" for word in sys.argv[1:])
last = comm.rank == comm.size - 1
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Linear(50, 3))
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = mpi_ef.DistributedOptimizer(sgd, comm, mpi_ef.TopK(0.1), placement="gradient", overlap=overlap,
                                        bucket_nbytes=400)
if wrong:
    mpi_ef.EF21(model, comm, mpi_ef.TopK(0.1), lr=0.1, **({"mometum": 0.9} if last else {"momentum": 0.9}))
try:
    for step in range(3 if last else 5):
        optimizer.zero_grad()
        model(torch.randn(8, 20) + comm.rank).square().mean().backward()
        optimizer.step()
except PeerError as error:
    print(f"caught by rank {comm.rank}: {error}", flush=True)
"""


@pytest.fixture
def program(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    return script


@pytest.mark.parametrize("overlap", ["yes", "no"])
def test_a_rank_that_has_left_is_named_by_the_others(program, overlap):
    ended = run(3, program, overlap, "no", within=60)
    assert ended.status == 0, ended.text
    lines = ended.lines_with("caught by rank")
    assert len(lines) == 2, ended.text
    assert all("rank 2 left the training after 3 steps" in line for line in lines)


def test_an_error_on_one_rank_before_the_first_meeting_ends_all(program):
    ended = run(3, program, "no", "yes", within=60)
    assert ended.status != 0
    assert ended.lines_with("unexpected keyword argument 'mometum'"), ended.text


UNDER_ANOTHER_HOOK = """
import sys
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm
import mpi_ef

def another(kind, value, trace):
    print("another library:", value, file=sys.stderr, flush=True)

sys.excepthook = another
plan = mpi_ef.GatherMean(comm, mpi_ef.TopK(0.5), 4)
for step in range(4):
    if comm.rank == comm.size - 1 and step == 2:
        raise ValueError("of one rank")
    plan.exchange(np.ones(4, np.float32))
"""


def test_an_error_on_one_rank_under_the_hook_of_another_library_ends_all(tmp_path):
    (tmp_path / "program.py").write_text(UNDER_ANOTHER_HOOK, encoding="utf-8")
    ended = run(2, tmp_path / "program.py", within=60)
    assert ended.status != 0
    assert ended.lines_with("another library: of one rank"), ended.text
    assert ended.lines_with("rank 1 failed: ValueError: of one rank"), ended.text
