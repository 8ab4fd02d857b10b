"""Vectors on the device side of real ranks: MPI that is given their memory, and exchanges that wait for a device."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from device_side import BLOCK, DEVICE, bits, device_side, host, moved, on, sgd, there, vector
from mpi4py import MPI

from mpi_ef import ClientsMean, DistributedOptimizer, ErrorFeedback, plan_for, use_gpu_aware_mpi
from mpi_ef.collectives import DenseMean, GatherMean, TwoPhaseMean, direct
from mpi_ef.compress import Keep, LowRank, Quantize, Sign, TopK, lazy
from mpi_ef.errors import NonFiniteError, OptionError, PeerError
from mpi_ef.kernels.device import bus

pytestmark = pytest.mark.mpi
D = 5001
PLANS = {
    "gather": lambda comm, **o: GatherMean(comm, TopK(0.05, values=Quantize("bf16")), D, **o),
    "two-phase": lambda comm, **o: TwoPhaseMean(comm, Sign(block=BLOCK), D, **o),
    "clients": lambda comm, **o: ClientsMean(comm, TopK(0.1), D, clients=comm.Get_size(), **o),
    "dense": lambda comm, **o: DenseMean(comm, D, **o),
    "low rank": lambda comm, **o: plan_for(comm, LowRank(2), D, **o),
}


@contextmanager
def communicator(kind=MPI.Intracomm):
    comm = kind(MPI.COMM_WORLD.Dup())
    try:
        yield comm
    finally:
        comm.Free()


def exchanges(plan, device):
    seen = []
    again = on(device, np.zeros(D, np.float32))
    for step in range(3):
        x, y = (on(device, vector(D, np.float32, 100 * plan.rank + 2 * step + n)) for n in range(2))
        kept, out = on(device, np.zeros(D, np.float32)), on(device, vector(D, np.float32, 7))
        form = lazy(x) - y
        plan.exchange(form, keep=Keep(form, kept, less_message=True))
        plan.add_own(out, 0.3)
        plan.add_mean(out)
        plan.set_mean(again, again=True)
        plan.start(x)
        plan.wait()
        plan.add_mean(out, 0.5)
        seen += [bits(host(a)) for a in (kept, out, again)]
    return seen


@pytest.mark.parametrize("mixed", [False, True], ids=["devices", "mixed"])
def test_mpi_may_have_the_memory_of_devices(mixed):
    """The bits of a world on the host; what crosses the bus is headers."""
    device = "cpu" if mixed and 0 == MPI.COMM_WORLD.rank < MPI.COMM_WORLD.size - 1 else DEVICE
    with communicator() as comm, device_side() if device == DEVICE else open_host():
        theirs = {name: build(comm, device="cpu") for name, build in PLANS.items()}
        use_gpu_aware_mpi(comm, device.removeprefix("side:"))
        for name, build in PLANS.items():
            plan = build(comm, device=device)
            with bus.watched() as copies:
                ours = exchanges(plan, device)
            if name != "low rank":  # of which products are rounded elsewhere
                assert ours == exchanges(theirs[name], "cpu"), name
            if name == "gather":  # and vectors that the test itself takes from the host and back
                wires = [nbytes for _, nbytes in copies if nbytes not in (4 * D, 0)]
                assert all(nbytes <= 8 * comm.size for nbytes in wires), (name, sorted(set(wires)))
        broken = vector(D, np.float32, comm.rank)
        broken[3] = np.nan if comm.rank == comm.size - 1 else 0
        with pytest.raises(NonFiniteError) as raised:
            PLANS["gather"](comm, device=device).exchange(on(device, broken))
        assert raised.value.ranks == (comm.size - 1,)


@contextmanager
def open_host():
    yield


class Wrong(MPI.Intracomm):
    """An MPI that moves long messages of rank 0 wrongly."""

    def Iallgather(self, send, receive):
        request = super().Iallgather(send, receive)
        request.Wait()
        if self.rank == 0 and receive.numel() > 100_000:
            receive[-1, -1] ^= 1
        return MPI.REQUEST_NULL


class Raising(MPI.Intracomm):
    """One whose call raises an exception on all ranks."""

    def Ialltoall(self, send, receive):
        raise RuntimeError("invalid argument\nof a call")


@pytest.mark.parametrize(("kind", "text"), [
    (Wrong, "on rank 0 Iallgather of 262144 bytes brought other bytes than were sent; leave it out"),
    (Raising, "on rank 0 Ialltoall of 64 bytes raised RuntimeError: "),
])
def test_an_mpi_that_cannot(kind, text):
    with communicator(kind) as comm, device_side():
        with pytest.raises(OptionError, match="this MPI is not GPU-aware") as raised:
            use_gpu_aware_mpi(comm, DEVICE.removeprefix("side:"))
        assert text in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
        plan = plan_for(comm, TopK(0.1), D, device=DEVICE)
        plan.exchange(there(vector(D, np.float32)))  # through the host, as before


def test_memory_that_mpi4py_does_not_take(monkeypatch):
    def offer(trial, mpi):
        raise OptionError("use_gpu_aware_mpi: mpi4py does not take memory of cuda:0")

    comm = MPI.COMM_WORLD
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(direct.Trial, "offer", offer)
    error = OptionError if comm.rank == comm.size - 1 else PeerError
    with device_side(), pytest.raises(error, match="mpi4py does not take"):
        use_gpu_aware_mpi(comm, DEVICE.removeprefix("side:"))


@pytest.mark.parametrize("device", ["cuda:x", "nonsense", "cuda:99", None])
def test_what_is_no_device(device):
    comm = MPI.COMM_WORLD
    wrong = comm.rank == comm.size - 1
    error, text = OptionError if wrong else PeerError, f"device={device!r} cannot be used"
    with device_side(), pytest.raises(error, match=text) as raised:
        use_gpu_aware_mpi(comm, device if wrong else "cpu")
    assert len(str(raised.value).splitlines()) == 1


def test_no_rank_with_a_device():
    with pytest.raises(OptionError, match="no rank has its vectors on a device; leave it out"):
        use_gpu_aware_mpi(MPI.COMM_WORLD, "cpu")
    with pytest.raises(OptionError, match="comm=None is not an intracommunicator"):
        use_gpu_aware_mpi(None, "cpu")


@pytest.mark.parametrize("aware", [False, True], ids=["host", "aware"])
def test_buckets_wait_for_devices_of_different_speed(monkeypatch, aware):
    """On a lane of real ranks: MPI gets them in one order, and the bits are those without overlap."""
    chance = np.random.default_rng(MPI.COMM_WORLD.rank)

    def model():
        torch.manual_seed(0)
        return moved(torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(6))))

    def trained(comm, overlap):
        net = model()
        optimizer = DistributedOptimizer(sgd(net), comm, Sign(block=BLOCK), placement="gradient", rule="ef14",
                                         plan=TwoPhaseMean, overlap=overlap, bucket_nbytes=3000)
        for step in range(6):
            optimizer.zero_grad()
            torch.manual_seed(10 * step + comm.Get_rank())
            net(torch.randn(4, 30).to(next(net.parameters()).device)).square().sum().backward()
            optimizer.step()
        return [bits(p.detach().cpu().numpy()) for p in net.parameters()]

    with communicator() as comm, device_side():
        if aware:
            use_gpu_aware_mpi(comm, DEVICE.removeprefix("side:"))
        plain = trained(comm, overlap=False)
        monkeypatch.setattr(bus.Arrival, "here", lambda _: bool(chance.integers(3) == 0))
        assert trained(comm, overlap=True) == plain
        feedback = ErrorFeedback("ef21", plan_for(comm, TopK(0.1), D, device=DEVICE))
        feedback.step(there(vector(D, np.float32, comm.rank)))


def test_ranks_of_both_kinds_give_second_rounds_to_mpi_in_one_order():
    """With overlap they begin early on hosts, and on a device in step: on a communicator of their own on both."""
    def trained(comm, on_device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(4)))
        if on_device:
            moved(net)
        optimizer = DistributedOptimizer(sgd(net), comm, Sign(block=BLOCK), placement="gradient", rule="ef14",
                                         plan=TwoPhaseMean, overlap=True, bucket_nbytes=3000)
        for step in range(4):
            optimizer.zero_grad()
            torch.manual_seed(10 * step + comm.Get_rank())
            net(torch.randn(4, 30).to(next(net.parameters()).device)).square().sum().backward()
            optimizer.step()
        return [bits(p.detach().cpu().numpy()) for p in net.parameters()]

    with communicator() as comm:
        on_hosts = trained(comm, on_device=False)
        with device_side() if comm.rank == 0 else nullcontext():
            assert trained(comm, on_device=comm.rank == 0) == on_hosts
