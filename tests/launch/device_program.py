"""Trainings on the device side of both ranks end with the bits of those on the host; states go on on the other side."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpi_ef import DistributedOptimizer, FeedbackHook, OneBitAdam, Quantize, Sign, TopK, Training
from mpi_ef.checkpoint import Store
from mpi_ef.collectives import TwoPhaseMean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_side import BLOCK, HARDWARE, adamw, backward, on_side, sgd, sized

COMM, RANK = MPI.COMM_WORLD, MPI.COMM_WORLD.Get_rank()
FOLDER = Path(sys.argv[1])
WIDTH = sized(33, 193)  # kernels in Triton select from long vectors alone


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5))


def steps(net, optimizer, numbers):
    shadow = model()
    for number in numbers:
        torch.manual_seed(1000 * RANK + number)
        x, y = torch.randn(16, 20), torch.randint(5, (16,))
        optimizer.zero_grad()
        if HARDWARE and not isinstance(net, DistributedDataParallel):  # whose hook wants a forward pass
            backward(net, shadow, lambda net: nn.functional.cross_entropy(net(x), y))  # noqa: B023
        else:
            place = next(net.parameters()).device
            nn.functional.cross_entropy(net(x.to(place)), y.to(place)).backward()
        optimizer.step()


def bits(net):
    return b"".join(p.detach().cpu().numpy().tobytes() for p in net.parameters())


OPTIMIZERS = {
    "EF21": lambda net: DistributedOptimizer(sgd(net), COMM, TopK(0.1), placement="gradient", rule="ef21", model=net),
    "EControl": lambda net: DistributedOptimizer(sgd(net), COMM, TopK(0.1, values=Quantize()), placement="gradient",
                                                 rule="econtrol", dense_steps=1, model=net),
    "AdamW, update": lambda net: DistributedOptimizer(adamw(net), COMM, TopK(0.1)),
    "overlap": lambda net: DistributedOptimizer(sgd(net), COMM, Sign(block=BLOCK), placement="gradient", plan=TwoPhaseMean,
                                                overlap=True, bucket_nbytes=1000),
    "1-bit Adam": lambda net: OneBitAdam(net.parameters(), COMM, lr=0.01, freeze_step=3),
}


def trained(name, side, store=None):
    """Train eight steps; with a store go on from what is there for four, and save."""
    with on_side(side) as moved:
        net = moved(model())
        optimizer = OPTIMIZERS[name](net)
        training = Training(model=net, optimizer=optimizer)
        if store is None:
            steps(net, optimizer, range(8))
            return bits(net)
        files = Store(store)
        step = training.resume(files, COMM)
        steps(net, optimizer, range(step, step + 4))
        training.save(files, COMM, step + 4)
        return bits(net)


def check_optimizers():
    for name in sized(list(OPTIMIZERS), ["EF21", "1-bit Adam"]):
        whole = trained(name, "host")
        assert trained(name, "device") == whole, name
        assert COMM.allgather(whole) == [whole] * COMM.Get_size()
        for first, second in (("host", "device"), ("device", "host")):
            store = FOLDER / f"{name}-{first}"
            trained(name, first, store)
            assert trained(name, second, store) == whole, (name, first)


def hooked(side):
    with on_side(side) as moved:
        net = moved(model())
        wrapped = DistributedDataParallel(net, bucket_cap_mb=0.001)
        hook = FeedbackHook(wrapped, TopK(0.1, segments="parameters"), rule="ef21", dense_steps=1)
        optimizer = sgd(net)
        steps(wrapped, optimizer, range(4))
        saved = hook.state_dict()
        steps(wrapped, optimizer, range(4, 8))
        return bits(net), saved, hook.sent_nbytes


def check_hook():
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=RANK, world_size=COMM.Get_size())
    (ours, state, sent), (theirs, its_state, its_sent) = hooked("host"), hooked("device")
    assert sent == its_sent
    if HARDWARE:  # forward passes are rounded as the processor does it
        assert np.allclose(np.frombuffer(ours, np.float32), np.frombuffer(theirs, np.float32), atol=0.05)
        return
    assert ours == theirs
    for name, saved in state["parameters"].items():
        for array, tensor in saved["arrays"].items():
            assert torch.equal(tensor, its_state["parameters"][name]["arrays"][array])


check_optimizers()
check_hook()
dist.destroy_process_group()
np.testing.assert_equal(COMM.allgather(RANK), list(range(COMM.Get_size())))
if RANK == 0:
    print("the same bits on both sides")
