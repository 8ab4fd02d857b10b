"""What goes wrong with devices: one line on all ranks, and nothing stays behind."""

import gc
import threading
import warnings
from contextlib import nullcontext
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn

from mpi_ef import (
    DistributedOptimizer,
    EF21Muon,
    ErrorFeedback,
    Identity,
    Lion,
    OneBitAdam,
    OneBitLamb,
    Sign,
    Store,
    TopK,
    Training,
    ZeroOneAdam,
    plan_for,
)
from mpi_ef.checkpoint import reader
from mpi_ef.compress import lazy
from mpi_ef.errors import DtypeError, MpiEfError, OutOfMemoryError, PeerError, ShapeError
from mpi_ef.kernels.backend import Backend, backend, on_device_side
from mpi_ef.kernels.device.array import DeviceArray
from mpi_ef.kernels.device.bus import host_array
from mpi_ef.testing import results, run

SAID = (": out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9 GiB of which "
        "1 GiB is free); take a smaller model")
QUICK = ("update", "buckets", "1-bit LAMB")
here = threading.local()


def no_room():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9 GiB of "
                                 "which 1 GiB is free.\nSee the documentation for more.")


def net():
    return nn.Sequential(nn.Linear(12, 5))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


BUILD = {
    "update": lambda m, comm: DistributedOptimizer(sgd(m), comm, TopK(0.1)),
    "buckets": lambda m, comm: DistributedOptimizer(sgd(m), comm, Sign(), placement="gradient", rule="econtrol", eta=0.3,
                                                    bucket_nbytes=100, overlap=True),
    "Muon": lambda m, comm: EF21Muon(m.parameters(), comm, TopK(0.1)),
    "1-bit Adam": lambda m, comm: OneBitAdam(m.parameters(), comm, lr=0.1),
    "1-bit LAMB": lambda m, comm: OneBitLamb(m.parameters(), comm, lr=0.1),
    "0/1 Adam": lambda m, comm: ZeroOneAdam(m.parameters(), comm, lr=0.1),
    "Lion": lambda m, comm: Lion(m.parameters(), comm, lr=0.1),
}


@pytest.fixture
def scarce(monkeypatch):
    """The memory of a rank ends after ``here.room`` arrays. Returns weak references to them."""
    there = []
    kind = type(backend(np.dtype(np.float32), "side:cpu"))

    def limited(method):
        def make(self, *arguments):
            here.room = getattr(here, "room", 10**6) - 1
            if here.room == -1:
                no_room()
            array = method(self, *arguments)
            there.append(ref(array.tensor if isinstance(array, DeviceArray) else array))
            return array

        return make

    for name in ("zeros", "empty", "on_host"):
        monkeypatch.setattr(kind, name, limited(getattr(kind, name)))
    return there


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in QUICK))
                                  for name in BUILD])
def test_out_of_memory_wherever_it_happens_in_construction(scarce, name):
    """Every allocation fails once on one rank: all raise, nothing stays, and the same communicator serves the next one."""
    def program(comm):
        told, model = [], net()
        addresses = [p.data_ptr() for p in model.parameters()]
        for room in range(1000):
            here.room = room if comm.Get_rank() == 1 else 10**6
            try:
                optimizer = BUILD[name](model, comm)
            except MpiEfError as error:
                told.append((type(error), str(error)))
                assert comm.Get_rank() == 0 or room > 1 or [p.data_ptr() for p in model.parameters()] == addresses
                del error
            else:
                break
        here.room = 10**6
        nn.functional.cross_entropy(model(torch.ones(3, 12)), torch.zeros(3, dtype=torch.int64)).backward()
        optimizer.step()
        return told

    with on_device_side():
        first, second = results(2, program)
    assert len(first) == len(second) > 4
    for (kind, text), (its_kind, its_text) in zip(first, second, strict=True):
        assert kind is PeerError, text
        assert its_kind is OutOfMemoryError, its_text
        assert its_text in text
        assert "\n" not in text
        assert SAID in its_text
    gc.collect()
    assert scarce
    assert not [array for array in scarce if array() is not None]


def test_out_of_memory_on_the_host(monkeypatch):
    def zeros(self, shape, dtype=None):
        if here.full:
            raise MemoryError("Unable to allocate 9 TiB")
        return type(self).empty(self, shape, dtype)

    monkeypatch.setattr(Backend, "zeros", zeros)

    def program(comm):
        here.full = comm.Get_rank() == 1
        BUILD["update"](net(), comm)

    first, second = run(2, program)
    assert isinstance(first, PeerError)
    assert isinstance(second, OutOfMemoryError)
    assert isinstance(second, MemoryError)
    assert str(second).startswith("DistributedOptimizer: out of memory (Unable to allocate 9 TiB); take")


FIRST = {
    "update": lambda m, comm: DistributedOptimizer(torch.optim.AdamW(m.parameters()), comm, TopK(0.1)),
    "gradient": lambda m, comm: DistributedOptimizer(torch.optim.AdamW(m.parameters()), comm, TopK(0.1), rule="ef21",
                                                     placement="gradient"),
    "overlap": lambda m, comm: DistributedOptimizer(torch.optim.AdamW(m.parameters()), comm, TopK(0.1), rule="ef21",
                                                    placement="gradient", overlap=True),
}


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("name", FIRST)
def test_out_of_memory_in_the_first_step(scarce, monkeypatch, name, loads):
    """Where torch makes the moments of its optimizers; also the first one after a state without them was loaded."""
    real = torch.zeros_like

    def zeros_like(*arguments, **options):
        return no_room() if getattr(here, "full", False) else real(*arguments, **options)

    monkeypatch.setattr(torch, "zeros_like", zeros_like)

    def program(comm):
        model = net()
        optimizer = FIRST[name](model, comm)
        start = optimizer.state_dict()
        for number in range(2 if loads else 0):
            backward(model, number + comm.Get_rank())
            optimizer.step()
        if loads:
            optimizer.load_state_dict(start)
        backward(model, 2)
        here.full = comm.Get_rank() == 1
        try:
            optimizer.step()
        except MpiEfError as error:
            return type(error), str(error)
        finally:
            here.full = False

    def backward(model, number):
        model.zero_grad()
        nn.functional.cross_entropy(model(torch.full((3, 12), 1.0 + number)), torch.zeros(3, dtype=torch.int64)).backward()

    with on_device_side():
        (kind, text), (its_kind, its_text) = results(2, program)
    assert (kind, its_kind) == (PeerError, OutOfMemoryError)
    assert its_text.startswith("DistributedOptimizer" + SAID)
    assert its_text in text
    assert "\n" not in text
    gc.collect()
    assert scarce
    assert not [array for array in scarce if array() is not None]


def test_out_of_memory_while_it_encodes(monkeypatch):
    """In an exchange, where the others are on their way: all raise, and the next one goes on."""
    kind = type(backend(np.dtype(np.float32), "side:cpu"))
    real = kind.combine

    def combine(*arguments):
        return no_room() if getattr(here, "full", False) else real(*arguments)

    monkeypatch.setattr(kind, "combine", combine)

    def program(comm):
        plan = plan_for(comm, Identity(), 3, device="side:cpu")
        x, y = (DeviceArray(torch.ones(3)) for _ in range(2))
        here.full = comm.Get_rank() == 1
        with pytest.raises(MpiEfError) as raised:
            plan.exchange(lazy(x) - y)
        here.full = False
        plan.exchange(lazy(x) - y)
        return raised.type, str(raised.value)

    with on_device_side():
        (kind, text), (its_kind, its_text) = results(2, program)
    assert (kind, its_kind) == (PeerError, OutOfMemoryError)
    assert its_text.startswith("DenseMean.exchange" + SAID)
    assert its_text in text


def test_out_of_memory_for_the_messages_of_the_step_before():
    """Which rules keep from their second step on."""
    def program(comm):
        feedback = ErrorFeedback("ef14", plan_for(comm, TopK(0.1), 50, device="side:cpu"))
        x, frames = DeviceArray(torch.arange(50.0) + comm.Get_rank()), feedback.plan.frames
        feedback.step(x)
        if comm.Get_rank():
            feedback.plan.frames = lambda *_: no_room()
        with pytest.raises(MpiEfError) as raised:
            feedback.step(x)
        feedback.plan.frames = frames
        feedback.step(x)
        return raised.type

    assert results(2, program) == [PeerError, OutOfMemoryError]


@pytest.mark.parametrize("side", [nullcontext, on_device_side])
def test_out_of_memory_in_a_resume(tmp_path, monkeypatch, side):
    """All raise, all is as it was before, and the next one goes on."""
    def limited(real):
        def read(*arguments):
            return no_room() if getattr(here, "full", False) else real(*arguments)

        return read

    for name in ("pieces", "replicated"):
        monkeypatch.setattr(reader.Checkpoint, name, limited(getattr(reader.Checkpoint, name)))

    def program(comm):
        torch.manual_seed(0)
        model = net()
        optimizer = FIRST["gradient"](model, comm)
        training, files = Training(model=model, optimizer=optimizer, random=False), Store(tmp_path)
        saved = []
        for number in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 12) * (1 + number + comm.Get_rank())).square().sum().backward()
            optimizer.step()
            saved.append([p.detach().clone() for p in model.parameters()])
            if number == 0:
                training.save(files, comm, 1)
        here.full = comm.Get_rank() == 1
        with pytest.raises(MpiEfError) as raised:
            training.resume(files, comm)
        here.full = False
        assert all(map(torch.equal, model.parameters(), saved[1]))
        assert training.resume(files, comm) == 1
        assert all(map(torch.equal, model.parameters(), saved[0]))
        files.close()
        return raised.type, str(raised.value)

    with side():
        (kind, text), (its_kind, its_text) = results(2, program)
    assert (kind, its_kind) == (PeerError, OutOfMemoryError)
    assert its_text.startswith("resume" + SAID)
    assert its_text in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["update", "buckets", "Muon", "1-bit Adam", "Lion"])
def test_parameters_on_several_devices(name):
    def program(comm):
        model = net()
        if comm.Get_rank():
            model[0].bias = nn.Parameter(torch.empty(5, device="meta"))
        BUILD[name](model, comm)

    first, second = run(2, program)
    assert isinstance(second, DtypeError)
    assert str(second) == ("FlatParameters: parameters are torch.float32 on cpu, torch.float32 on meta; make them "
                           "torch.float32, bfloat16 or float16, or torch.float64, all on one device")
    assert isinstance(first, PeerError)


class Moved:
    """A parameter after ``model.to("cuda")``, which replaces its memory: no other device is here."""

    device = torch.device("cuda", 0)

    def __init__(self, p):
        self.p = p

    def __getattr__(self, name):
        return getattr(self.p, name)

    def data_ptr(self):
        return 1

    def detach(self):
        return self


@pytest.mark.parametrize("name", ["update", "buckets", "1-bit Adam"])
@pytest.mark.parametrize("side", [nullcontext, on_device_side])
def test_a_model_that_moves_after_the_construction(name, side):
    def program(comm):
        model = net()
        optimizer = BUILD[name](model, comm)
        model(torch.ones(3, 12)).sum().backward()
        if comm.Get_rank():
            part = optimizer.flat._parts[0]
            part.p = Moved(part.p)
        optimizer.step()

    with side():
        first, second = run(2, program)
    assert isinstance(second, ShapeError)
    assert str(second) == ("parameter 0 (5, 12): its memory was replaced (by model.to(...)?); build the optimizer after the "
                           "model is in its final place")
    assert isinstance(first, PeerError)


@pytest.mark.parametrize("name", BUILD)
def test_a_rank_without_a_gpu_among_ranks_with_one(monkeypatch, name):
    """The parameters of all are the same, and those of a world without any."""
    from mpi_ef.vectors import flat

    def program(comm):
        here.rank = comm.Get_rank()
        torch.manual_seed(0)
        model = net()
        optimizer = BUILD[name](model, comm)
        for step in range(4):
            x = torch.from_numpy(np.random.default_rng((comm.Get_rank(), step)).normal(size=(3, 12)).astype(np.float32))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(3)).backward()
            optimizer.step()
        optimizer.synchronize()
        return optimizer.flat.device, torch.cat([p.detach().view(-1) for p in model.parameters()])

    alone = results(3, program)
    monkeypatch.setattr(flat, "side_of", lambda *_: "cpu" if here.rank == 1 else "side:cpu")
    mixed = results(3, program)
    assert [device for device, _ in mixed] == ["side:cpu", "cpu", "side:cpu"]
    for _, parameters in mixed:
        assert torch.equal(parameters, alone[0][1])


def test_memory_that_cannot_be_locked_is_taken_as_it_is(monkeypatch):
    """With one warning."""
    real = torch.zeros

    def zeros(*arguments, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("cudaHostAlloc: the limit of locked memory")
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.warns(RuntimeWarning, match="memory of the host cannot be page-locked") as warned:
        arrays = [host_array((2, 3), np.float32, torch.device("cuda")) for _ in range(2)]
    assert len(warned) == 1
    for array in arrays:
        assert array.shape == (2, 3)
        assert array.dtype == np.float32
        assert not array.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DeviceArray(torch.ones(3)).numpy().sum() == 3
