"""Tensors of any dtype on a device: frozen parameters and buffers have the host's hashes and bits; copies are counted."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from device_side import TORCH_DEVICE, device_side
from torch import nn

import mpi_ef
from mpi_ef import DistributedOptimizer, TopK, synchronize_buffers
from mpi_ef.buffers import broadcast_buffers
from mpi_ef.errors import DisagreementError
from mpi_ef.kernels.device import bus
from mpi_ef.testing import results, run
from mpi_ef.vectors.places import fingerprints, on_host, overwrite

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int8,
          torch.bool, torch.complex64]


def filled(dtype, shape, seed=0):
    """A tensor of random bits; of truth values 0 and 1."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, size, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape) if size else torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hash_is_the_same_on_any_side_and_sees_every_bit(dtype):
    raw = filled(dtype, (3, 7, 5))
    tensors = [raw, raw.transpose(0, 2), raw[1], raw[1, 2, 3], raw[:0], raw.view(-1)[1:], raw.transpose(0, 2).contiguous()]
    ours = fingerprints(tensors)
    moved = [t.to(TORCH_DEVICE) for t in tensors]
    with device_side(), bus.watched() as copies:
        theirs = fingerprints(moved)
    assert ours.dtype == theirs.dtype == np.uint32
    assert ours.tolist() == theirs.tolist()
    assert [n for to, n in copies if to == "to host"] == [8 * len(tensors)]
    assert ours[1] == ours[6]
    assert len(set(ours.tolist())) == len(tensors) - 1
    for place in range(0, raw.numel() * dtype.itemsize, 13):
        other = raw.clone()
        other.view(-1).view(torch.uint8)[place] ^= 1
        assert fingerprints([other])[0] != ours[0]
    if dtype.is_complex:
        assert fingerprints([raw.conj()])[0] == fingerprints([raw.conj().resolve_conj()])[0] != ours[0]


def test_what_is_large_is_hashed_by_itself(monkeypatch):
    from mpi_ef.vectors import places

    tensors = [filled(torch.int16, (n,), n) for n in (3, 40, 5, 6, 90, 2)]
    together = fingerprints(tensors).tolist()
    monkeypatch.setattr(places, "_TOGETHER", 20)
    assert fingerprints(tensors).tolist() == together
    assert fingerprints([]).tolist() == []
    assert fingerprints([torch.from_numpy(np.empty(0, np.int8))]).tolist() == [0]


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(dtype):
    """Through the one module that counts."""
    for tensor in (filled(dtype, (4, 3)), filled(dtype, (4, 3)).T, filled(dtype, ()), filled(dtype, (0, 2))):
        there = torch.zeros_like(tensor).to(TORCH_DEVICE)
        with device_side(), bus.watched() as copies:
            overwrite(there, tensor)
            back = on_host(there)
        assert raw(back) == raw(tensor)
        nbytes = tensor.numel() * dtype.itemsize
        assert copies == [("to device", nbytes), ("to host", nbytes)]
    host = filled(dtype, (3,))
    assert on_host(host).data_ptr() == host.data_ptr()


class Frozen(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.trained = nn.Linear(4, 3)
        self.kinds = nn.ParameterList(
            nn.Parameter(filled(dtype, (5, 3), rank), requires_grad=False)
            for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool))
        self.kinds.append(nn.Parameter(torch.arange(300_000.0) + rank, requires_grad=False))


def frozen_bytes(net):
    return [p.detach().cpu().view(torch.uint8).numpy().tobytes() for p in net.kinds]


def test_frozen_parameters_are_compared_by_eight_bytes_and_broadcast():
    """Also where a later comparison finds one that differs."""
    def program(comm):
        net = Frozen(comm.Get_rank()).to(TORCH_DEVICE)
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.5))
        comm.Barrier()
        with bus.watched() as copies:
            optimizer.check_replicas()
            comm.Barrier()
        assert max(n for _, n in copies) <= 8 * 8, copies
        if comm.Get_rank():
            with torch.no_grad():
                net.kinds[2][1, 1] ^= 1
        with pytest.raises(DisagreementError, match=r"parameter number 4 \(5, 3\)"):
            optimizer.check_replicas()
        return frozen_bytes(net)

    with device_side(), bus.watched() as copies:
        first, second = results(2, program)
    assert frozen_bytes(Frozen(0)) == first
    assert second[:2] == first[:2]
    whole = 4 * 300_000
    assert ("to host", whole) in copies
    assert copies.count(("to device", whole)) == 1, "rank 0 has them"


def test_frozen_parameters_in_a_mixed_world(monkeypatch):
    from mpi_ef.vectors import places

    def program(comm):
        net = Frozen(comm.Get_rank())
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.5))
        optimizer.check_replicas()
        return frozen_bytes(net)

    turn = iter(range(10**6))
    monkeypatch.setattr(places, "side_of", lambda *_: ("cpu", "side:cpu")[next(turn) % 2])
    first, second = results(2, program)
    assert first == second


def test_buffers_of_a_device():
    """BatchNorm's statistics, and buffers of any dtype from rank 0: the host's bits, all copies counted."""
    def program(comm):
        torch.manual_seed(comm.Get_rank())
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        net.register_buffer("table", filled(torch.bfloat16, (3,), comm.Get_rank()))
        net.register_buffer("passing", filled(torch.int16, (3,), comm.Get_rank()), persistent=False)
        net(torch.randn(8, 4))
        net = net.to(TORCH_DEVICE)
        synchronize_buffers(net, comm)
        broadcast_buffers(net, comm)
        return {name: b.cpu().view(-1).view(torch.uint8).numpy().tobytes() for name, b in net.named_buffers()}

    alone = results(2, program)
    with device_side(), bus.watched() as copies:
        assert results(2, program) == alone
    assert alone[0] == alone[1]
    assert sum(n for to, n in copies if to == "to host") >= 2 * (6 * 4 * 2 + 8 + 6 + 6)
    assert sum(n for to, n in copies if to == "to device") >= 6 * 4 * 2


def test_a_buffer_that_fails_on_a_device_fails_everywhere():
    def program(comm):
        net = nn.BatchNorm1d(3, device="meta" if comm.Get_rank() else "cpu")
        synchronize_buffers(net, comm)

    with device_side():
        errors = run(2, program)
    assert "running_mean has no values yet" in str(errors[0])
    assert "running_mean has no values yet" in str(errors[1])


def test_nothing_else_brings_tensors_to_the_host():
    """Where they may be on a device, `places` and `pieces` do; the rest are small, or states that were loaded."""
    root, found = Path(mpi_ef.__file__).parent, set()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("kernels", "jobs", "slurm"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call)
                     and isinstance(node.func, ast.Attribute)}
            if "cpu" in calls:
                found.add(str(path.relative_to(root)))
    assert found == {
        "data.py", "optim/signs.py", "statetree.py",  # generators and bits; states that are loaded
        "state/tree.py",  # of what is on the host
    }
