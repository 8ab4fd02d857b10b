"""Checkpoints of vectors on a device: the bytes of the host's, on other sides and numbers of ranks."""

import io
import warnings

import numpy as np
import pytest
import torch
from device_side import INTERPRETED, TORCH_DEVICE, adamw, backward, device_side, moved, on_side, others, sgd
from torch import nn

from mpi_ef import DistributedOptimizer, OneBitAdam, Sign, Store, TopK, Training
from mpi_ef.checkpoint import open_checkpoint
from mpi_ef.checkpoint.checksum import BLOCK
from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.errors import CheckpointError, PeerError
from mpi_ef.kernels.device import bus
from mpi_ef.testing import results
from mpi_ef.vectors.pieces import TensorPieces

BUILD = {
    "EF21": lambda net, comm: DistributedOptimizer(sgd(net), comm, TopK(0.1), placement="gradient", rule="ef21"),
    "EControl": lambda net, comm: DistributedOptimizer(sgd(net), comm, Sign(), placement="gradient", plan=TwoPhaseMean,
                                                       rule="econtrol", eta=0.3),
    "AdamW, update": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.1)),
    "1-bit Adam": lambda net, comm: OneBitAdam(net.parameters(), comm, lr=0.01, freeze_step=2),
}


def trained(folder, name, ranks, side, steps, policy=""):
    """Train on virtual ranks, after resuming where there is a policy; return the parameters of all, and a checkpoint's."""
    def program(comm):
        torch.manual_seed(0)
        net, shadow = (nn.Sequential(nn.Linear(20, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 5)) for _ in range(2))
        net = moved(net)
        optimizer = BUILD[name](net, comm)
        training, files = Training(model=net, optimizer=optimizer, random=False), Store(folder)
        if policy:
            assert training.resume(files, comm, policy=policy) == steps[0]
        for number in steps:
            x = torch.randn(6, 20, generator=torch.Generator().manual_seed(100 * comm.Get_rank() + number))
            optimizer.zero_grad()
            backward(net, shadow, lambda net: net(x).square().mean())  # noqa: B023
            optimizer.step()
        if not policy:
            training.save(files, comm, len(steps))
        files.close()
        return torch.cat([p.detach().cpu().view(-1) for p in net.parameters()])

    with on_side(side) as moved, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return results(ranks, program)


@pytest.mark.parametrize("name", ["EF21", "AdamW, update", *others("EControl", "1-bit Adam")])
@pytest.mark.parametrize("goes_on", ["redistribute 1", *others("redistribute 3", "reset 1")])
def test_another_number_of_ranks_goes_on_on_either_side(tmp_path, name, goes_on):
    ends, (policy, ranks) = [], goes_on.split()
    for first in ("host", "device"):
        trained(tmp_path / first, name, 2, first, range(3))
        ends += [trained(tmp_path / first, name, int(ranks), second, range(3, 6), policy) for second in ("host", "device")]
    for end in ends:
        for parameters in end:
            assert torch.equal(parameters, ends[0][0])


# Of files: there is no kernel in it that others do not try, and for vectors as long as that the interpreter takes minutes.
long = pytest.mark.skipif(INTERPRETED, reason="in torch operations: make test")


class Long(nn.Module):
    """Of which some arrays are longer than a piece, in several dtypes, and of no round length."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Parameter(torch.linspace(-1, 1, 700_001))
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 600_007).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("whole", torch.arange(150_003))
        self.register_buffer("single", torch.tensor(7, dtype=torch.int8))

    def forward(self, x):
        return (self.trained * x).square().mean()


LONG = {
    "AdamW, update": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.01), model=net),
    "EF21": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.01), placement="gradient", rule="ef21"),
    "1-bit Adam": lambda net, comm: OneBitAdam(net.parameters(), comm, lr=0.01, freeze_step=1),
}


def of_long(name, comm, folder, side):
    net = Long()
    net = net if side == "host" else moved(net)
    return net, Training(model=net, optimizer=LONG[name](net, comm), random=False), Store(folder)


def step(net, training, number):
    optimizer = training._values["optimizer"]
    for p in net.parameters():
        p.grad = torch.sin(torch.arange(p.numel()) * (number + 1.0)).to(p.device) if p.requires_grad else None
    optimizer.step()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(bus, "PIECE", BLOCK)


def saved(name, folder, side, background=False):
    """Return what crossed the bus in a save after two steps."""
    found = []

    def program(comm):
        net, training, files = of_long(name, comm, folder, side)
        for number in range(2):
            step(net, training, number)
        comm.Barrier()
        with bus.watched() as copies:
            comm.Barrier()
            training.save(files, comm, 2, background=background)
            comm.Barrier()
        files.finish(comm)
        files.close()
        found.append(list(copies))
        comm.Barrier()

    with on_side(side):
        results(2, program)
    return max(found, key=len)


def contents(folder):
    """All that is in a checkpoint; HDF5's own bytes have the time."""
    found = open_checkpoint(folder / "step-00000002")
    rows = [(extent.row(), file.document) for file in map(found._file, range(2)) for extent in file.extents]
    shared = {name: found.replicated(name).tobytes() for name in found.replicated_names()}
    return rows, shared, [{name: found.per_rank(name, rank).tobytes() for name in found.per_rank_names(rank)}
                          for rank in range(2)]


@long
@pytest.mark.parametrize("name", ["AdamW, update", *others("EF21", "1-bit Adam")])
@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_is_written_in_pieces(tmp_path, small_pieces, name, background):
    """And is the host's, byte for byte; a background save has the memory that it says."""
    assert saved(name, tmp_path / "host", "host", background) == []
    copies = saved(name, tmp_path / "device", "device", background)
    assert contents(tmp_path / "host") == contents(tmp_path / "device")
    assert max(nbytes for _, nbytes in copies) == BLOCK < 4 * 700_001
    assert {to for to, _ in copies} == {"to host"}


@long
@pytest.mark.parametrize("name", ["AdamW, update", *others("EF21", "1-bit Adam")])
@pytest.mark.parametrize("first", ["host", "device"])
def test_a_checkpoint_is_read_in_pieces(tmp_path, small_pieces, name, first):
    """As what is kept on the host until the end of the call, to go back to where something fails, comes there."""
    saved(name, tmp_path, first)
    ends = {}

    def program(comm):
        net, training, files = of_long(name, comm, tmp_path, side)
        step(net, training, 5)  # there is a state to be overwritten
        with torch.no_grad():
            net.frozen.zero_()
            net.whole.zero_()
        comm.Barrier()
        with bus.watched() as copies:
            comm.Barrier()
            assert training.resume(files, comm) == 2
            comm.Barrier()
        step(net, training, 2)
        parts = [p.detach().cpu() for p in net.state_dict().values()]
        return [part.view(-1).view(torch.uint8).numpy().tobytes() for part in parts], list(copies)

    for side in ("host", "device"):
        with on_side(side):
            ends[side] = results(2, program)
    (ours, none), (theirs, copies) = ends["host"][0], ends["device"][0]
    assert none == []
    assert ours == theirs
    once = [4 * 700_001] * (2 if name == "1-bit Adam" else 0)  # of each rank: its preconditioner is formed on the host
    for to in ("to host", "to device"):
        sizes = sorted(nbytes for toward, nbytes in copies if toward == to)
        assert sizes[-1 - len(once) :] == [BLOCK, *once]
    assert sum(nbytes for to, nbytes in copies if to == "to device") >= 2 * (4 * 700_001 + 2 * 600_007 + 8 * 150_003)


@long
def test_damage_that_shows_after_the_last_piece_changes_nothing(tmp_path, small_pieces):
    """A rank compares the checksums of files that another one has verified when it reads them."""
    saved("EF21", tmp_path, "device")
    state = {}

    def program(comm):
        net, training, files = of_long("EF21", comm, tmp_path, "device")
        step(net, training, 5)
        before = net.trained.detach().clone()
        found = files.newest(comm)
        if comm.Get_rank() == 0:
            path = found._file(0).path
            extent = max(found._file(0).extents, key=lambda extent: extent.nbytes)
            state["place"] = path, found._file(0)._place(extent) + extent.nbytes - 1
            with path.open("r+b") as file:
                file.seek(state["place"][1])
                byte = file.read(1)[0]
                file.seek(state["place"][1])
                file.write(bytes([byte ^ 1]))
        comm.Barrier()
        files.newest = lambda comm: found
        with pytest.raises((CheckpointError, PeerError), match="are not those that were written"):
            training.resume(files, comm)
        assert torch.equal(net.trained, before)

    with device_side():
        results(2, program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e5m2])
def test_any_other_storage_gets_arrays(small_pieces, dtype):
    """``numpy.asarray`` of what comes in pieces."""
    tensor = torch.arange(600).to(dtype).view(20, 30).T
    numbers = np.dtype(f"V{dtype.itemsize}")
    pieces = TensorPieces(tensor.to(TORCH_DEVICE), numbers)
    assert (pieces.shape, pieces.nbytes) == ((30, 20), 600 * dtype.itemsize)
    expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert np.asarray(pieces).tobytes() == expected
    assert np.asarray(pieces).shape == (30, 20)
    assert b"".join(map(bytes, pieces.pieces(7, 100))) == expected[7:100]
    assert list(pieces.pieces(5, 5)) == []


@pytest.mark.parametrize("name", BUILD)
def test_a_state_of_torch_is_in_the_memory_of_the_host(name):
    """As far as this can be seen here: all of it has crossed the bus, and shares no memory with what is on the device."""
    def tensors_in(value):
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return [tensor for part in parts for tensor in tensors_in(part)]

    def program(comm):
        net = moved(nn.Linear(20, 9))
        optimizer = BUILD[name](net, comm)
        net(torch.ones(3, 20, device=TORCH_DEVICE)).sum().backward()
        optimizer.step()
        comm.Barrier()
        with bus.watched() as copies:
            comm.Barrier()
            state = optimizer.state_dict()
            comm.Barrier()
        file = io.BytesIO()
        torch.save(state, file)
        tensors = tensors_in(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        large = [tensor for tensor in tensors if tensor.numel() >= 9 and tensor.dtype.is_floating_point]
        return sum(n for to, n in copies if to == "to host"), sum(t.numel() * t.element_size() for t in large)

    with device_side():
        (copied, held), (_, its) = results(2, program)
    assert copied >= held + its > 0


class Elsewhere:
    """A tensor that torch.load has put on a device: NumPy does not take it."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def cpu(self):
        return self.tensor

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_a_state_that_was_loaded_to_a_device_goes_on():
    def program(comm):
        net = nn.Linear(20, 9)
        optimizer = BUILD["EF21"](net, comm)
        net(torch.ones(3, 20)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        for rule in state["feedback"]:
            rule["arrays"] = {array: Elsewhere(torch.as_tensor(tensor)) for array, tensor in rule["arrays"].items()}
        other = BUILD["EF21"](net, comm)
        other.load_state_dict(state)
        return {array: numbers.tolist() for array, numbers in (optimizer.per_rank() | other.per_rank()).items()} == {
            array: numbers.tolist() for array, numbers in optimizer.per_rank().items()}

    assert results(2, program) == [True, True]
