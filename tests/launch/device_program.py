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
HALF, WHOLE = 3, 6  # steps: a checkpoint between
SIDES = {"host": ("host", "host"), "device": ("device", "device"), "mixed": ("host", "device"),
         "mixed, changed": ("device", "host")}  # of ranks 0 and 1
RESUMES = (("host", "device"), ("device", "host"), ("mixed", "mixed, changed"))


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


def ef21(net, **options):
    return DistributedOptimizer(sgd(net), COMM, TopK(0.1), placement="gradient", rule="ef21", **options)


OPTIMIZERS = {
    "EF21": lambda net: ef21(net, model=net),
    "EControl": lambda net: DistributedOptimizer(sgd(net), COMM, TopK(0.1, values=Quantize()), placement="gradient",
                                                 rule="econtrol", dense_steps=1, model=net),
    "AdamW, update": lambda net: DistributedOptimizer(adamw(net), COMM, TopK(0.1)),
    "overlap": lambda net: DistributedOptimizer(sgd(net), COMM, Sign(block=BLOCK), placement="gradient", plan=TwoPhaseMean,
                                                overlap=True, bucket_nbytes=1000),
    "1-bit Adam": lambda net: OneBitAdam(net.parameters(), COMM, lr=0.01, freeze_step=2),
    "hook": sgd,
}


def trained(name, sides, resumes=""):
    """Train and save half-way, or go on from there; return parameters, buffers of this rank, and bytes that it sent."""
    with on_side(SIDES[sides][RANK]) as moved:
        net = moved(model())
        wrapped, parts = net, {"optimizer": OPTIMIZERS[name](net)}
        if name == "hook":
            wrapped = DistributedDataParallel(net, bucket_cap_mb=0.001)
            parts["hook"] = FeedbackHook(wrapped, TopK(0.1, segments="parameters"), rule="ef21", dense_steps=1)
        training, files = Training(model=net, **parts), Store(FOLDER / f"{name}-{resumes or sides}")
        if resumes:
            assert training.resume(files, COMM) == HALF
        else:
            steps(wrapped, parts["optimizer"], range(HALF))
            training.save(files, COMM, HALF)
        steps(wrapped, parts["optimizer"], range(HALF, WHOLE))
        sent = parts["hook"].sent_nbytes if name == "hook" else 0
        return bits(net), b"".join(b.cpu().numpy().tobytes() for b in net.buffers()), sent


def saved(name, sides):
    """Return all arrays of a checkpoint, but for random numbers."""
    found = Store(FOLDER / f"{name}-{sides}").newest(COMM)
    arrays = {f"replicated {array}": found.replicated(array) for array in found.replicated_names()}
    return {array: numbers.tobytes() for array, numbers in (arrays | {
        array: found.per_rank(array, RANK) for array in found.per_rank_names(RANK)}).items() if "random" not in array}


def check(name):
    whole = trained(name, "host")
    assert COMM.allgather(whole[0]) == [whole[0]] * RANKS
    for sides in ("device", "mixed"):
        assert trained(name, sides) == whole, (name, sides)
        assert saved(name, sides) == saved(name, "host"), (name, sides)
    for first, second in RESUMES:
        assert trained(name, second, first)[:2] == whole[:2], (name, first)  # DDP cuts its buckets anew: other messages


def check_hook_on_hardware():
    """Forward passes are rounded as the processor does it."""
    (ours, _, sent), (theirs, _, its_sent) = trained("hook", "host"), trained("hook", "device")
    assert sent == its_sent
    assert np.allclose(np.frombuffer(ours, np.float32), np.frombuffer(theirs, np.float32), atol=0.05)
    for first, second in RESUMES[:2]:
        trained("hook", second, first)


RANKS = COMM.Get_size()
dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=RANK, world_size=RANKS)
for method in OPTIMIZERS:
    if HARDWARE and method == "hook":
        check_hook_on_hardware()
    else:
        check(method)
dist.destroy_process_group()
np.testing.assert_equal(COMM.allgather(RANK), list(range(RANKS)))
if RANK == 0:
    print("the same bits on both sides")
