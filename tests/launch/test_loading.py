"""DataLoaders with worker processes in programs that mpiexec has started, within a time limit."""

import json

import patience
import pytest
from launching import run

LIMIT = 90

PROGRAM = """
import json, os, sys
import torch
from mpi4py import MPI  # here on purpose: workers import this file, and must not start MPI
from mpi4py.MPI import COMM_WORLD as comm
from torch.utils.data import DataLoader, Dataset, get_worker_info
from mpi_ef import ShardedSampler, generator_for, loader_context, seed_rank, synchronize_buffers

class Samples(Dataset):
    def __getitem__(self, i):
        if get_worker_info() is None or MPI.Is_initialized():
            raise RuntimeError("this is no worker, or one that has started MPI")
        return i, torch.rand(())

def main():
    sampler = ShardedSampler(37, comm, batch=2, seed=4)
    loader = DataLoader(Samples(), batch_sampler=sampler, num_workers=2, multiprocessing_context=loader_context(),
                        persistent_workers=True, generator=generator_for(comm, 4))
    used, noise = [[], []], []
    while sampler.epoch < 2:
        for i, drawn in loader:
            epoch = sampler.epoch
            used[epoch] += i.tolist()
            noise += drawn.tolist()
            if comm.rank == 1 and len(noise) == int(sys.argv[1]):
                raise RuntimeError("rank one is broken")
            sampler.advance()
            if sum(comm.allgather(len(i))) != comm.size * len(i):
                raise RuntimeError("ranks are not in step")
    rows = comm.allgather((used, noise))
    if comm.rank == 0:
        print(json.dumps(rows), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("how", [[], pytest.param(["-m", "mpi4py"], marks=pytest.mark.exhaustive)])  # started so below
def test_workers_load_for_every_rank_and_do_not_start_mpi(tmp_path, how):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    ended = run(2, *how, script, 0, within=LIMIT, real=True)
    assert ended.status == 0, ended.text
    (line,) = ended.lines_with("[[[")
    rows = json.loads(line[line.index("[[[") :])
    for epoch in range(2):
        shares = [used[epoch] for used, _ in rows]
        assert [len(share) for share in shares] == [19, 19]
        assert set(shares[0]) | set(shares[1]) == set(range(37))
    assert rows[0][0][0] != rows[0][0][1]
    assert len({number for _, noise in rows for number in noise}) > 70  # of 76: no rank repeats another's


def test_a_rank_that_raises_while_workers_load_ends_all(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    ended = run(2, "-m", "mpi4py", script, 10, within=LIMIT, real=True)
    assert ended.status != 0
    assert ended.lines_with("rank one is broken"), ended.text
    assert ended.seconds < patience.limit(60)
