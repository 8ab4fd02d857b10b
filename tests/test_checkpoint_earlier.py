"""Checkpoints that an earlier version of the package has written load, and go on to the last bit.

``data/earlier/states.pt`` has what ``state_dict()`` of models and optimizers returned on both ranks, and the same hashes.
The others were written by commit b1077c7, on 2 ranks, after 3 steps; ``golden.json`` has hashes of parameters
that the same commit had after 3 more steps. Gradients are drawn, and learning rates are powers of two: no machine rounds
otherwise.
"""

import json
import shutil
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import virtual

from mpi_ef import EF21, DistributedOptimizer, OneBitAdam, Quantize, Store, TopK, Training, ZeroOneAdam

EARLIER = Path(__file__).parent / "data" / "earlier"
GOLDEN = json.loads((EARLIER / "golden.json").read_text(encoding="utf-8"))
BUILD = {
    "ef21": lambda net, comm: EF21(net.parameters(), comm, TopK(0.25, values=Quantize("bf16")), lr=0.5),
    "onebit-adam": lambda net, comm: OneBitAdam(net.parameters(), comm, freeze_step=2, lr=0.25),
    "sgd": lambda net, comm: DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.5), comm, TopK(0.25), bucket_nbytes=50
    ),
    "zero-one-warm": lambda net, comm: ZeroOneAdam(net.parameters(), comm, var_freeze_step=5, lr=0.25),
    "zero-one": lambda net, comm: ZeroOneAdam(
        net.parameters(), comm, var_freeze_step=2, local_step_scaler=1, local_step_clipper=2, lr=0.25
    ),
}


def go_on(net, optimizer, rank):
    """Take three more steps, and return the hashes of the parameters."""
    for step in range(3, 6):
        for n, p in enumerate(net.parameters()):
            drawn = np.random.default_rng((rank, step, n)).normal(size=p.shape)
            p.grad = torch.from_numpy(drawn.astype(np.float32))
        optimizer.step()
    return [crc32(p.detach().numpy().tobytes()) for p in net.parameters()]


@pytest.mark.parametrize("name", GOLDEN)
def test_an_earlier_checkpoint_goes_on_to_the_last_bit(name, tmp_path):
    shutil.copytree(EARLIER / name, tmp_path / name)

    def program(comm):
        net = torch.nn.Linear(6, 4)
        optimizer = BUILD[name](net, comm)
        store = Store(tmp_path / name)
        training = Training(model=net, optimizer=optimizer, random=False)
        assert training.resume(store, comm) == 3
        assert training.document == {"note": name}
        return go_on(net, optimizer, comm.Get_rank())

    assert virtual.results(2, program) == [GOLDEN[name]] * 2


@pytest.mark.parametrize("name", BUILD)
def test_an_earlier_state_dict_goes_on_to_the_last_bit(name):
    saved = torch.load(EARLIER / "states.pt")[name]

    def program(comm):
        state, model, hashes = saved[comm.Get_rank()]
        net = torch.nn.Linear(6, 4)
        optimizer = BUILD[name](net, comm)
        net.load_state_dict(model)
        optimizer.load_state_dict(state)
        assert go_on(net, optimizer, comm.Get_rank()) == hashes

    virtual.results(2, program)
