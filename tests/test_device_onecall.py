"""Calls in one line with what torch and other libraries have on a device, on the device side."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device_side import DEVICE, TORCH_DEVICE, device_side
from vectors_for_tests import gaussian

import mpi_ef
from mpi_ef import Identity, LowRank, Sign, TopK, allgather, allreduce
from mpi_ef.errors import DtypeError, PeerError, ShapeError
from mpi_ef.kernels.backend import on_device_side
from mpi_ef.testing import results, run

SHAPE = (7, 9)


class Foreign:
    """An array of another library, which has its own device: here a tensor in the memory of the host."""

    def __init__(self, tensor):
        self.inside = tensor

    def __dlpack__(self, **options):
        return self.inside.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.inside.__dlpack_device__()


class Standard(Foreign):
    """The same, of a library that also takes tensors."""

    def __array_namespace__(self):
        return SimpleNamespace(from_dlpack=lambda x: Standard(torch.from_dlpack(x)))


class Refusing(Foreign):
    def __array_namespace__(self):
        def refuse(_):
            raise TypeError("only capsules")

        return SimpleNamespace(from_dlpack=refuse)


class Unreadable(Foreign):
    def __dlpack__(self, **_):
        raise BufferError("its memory is nobody's")


def tensors(comm, dtype=np.float32):
    return torch.from_numpy(gaussian(comm.Get_rank(), 63, dtype=dtype).reshape(SHAPE))


def expected(call, compressor, **options):
    return results(3, lambda comm: call(comm, tensors(comm).numpy(), compressor, **options))[0]


@pytest.fixture
def side():
    with on_device_side():
        yield


@pytest.mark.parametrize(("call", "compressor", "options"), [
    (allreduce, TopK(0.1), {"op": "sum"}), (allreduce, Identity(), {}), (allreduce, Identity(), {"op": "sum"}),
    (allreduce, Sign(), {}), (allgather, TopK(0.1), {}),
])
def test_tensors_of_a_device(side, call, compressor, options):
    """The numbers of NumPy arrays, and in the same memory where there is an `out`."""
    host = expected(call, compressor, **options)

    def program(comm):
        x = tensors(comm)
        first = call(comm, x, compressor, **options)
        out = torch.zeros_like(first)
        assert call(comm, x.requires_grad_(), compressor, out=out, **options) is out
        assert torch.equal(first, out)
        if call is allreduce:
            inplace = tensors(comm)
            assert call(comm, inplace, compressor, out=inplace, **options) is inplace
            assert torch.equal(first, inplace)
        return first

    for got in results(3, program):
        assert got.numpy().tobytes() == host.tobytes()


@pytest.mark.parametrize("kind", [Foreign, Standard, Refusing])
@pytest.mark.parametrize("call", [allreduce, allgather])
def test_arrays_of_other_libraries(side, call, kind):
    """They come back as what they were; as tensors where their library does not take these."""
    host = expected(call, TopK(0.1))

    def program(comm):
        x = kind(tensors(comm))
        out = kind(torch.zeros(host.shape))
        assert call(comm, x, TopK(0.1), out=out) is out
        got = call(comm, x, TopK(0.1))
        assert type(got) is (Standard if kind is Standard else torch.Tensor)
        return out.inside, getattr(got, "inside", got)

    for both in results(3, program):
        for got in both:
            assert got.numpy().tobytes() == host.tobytes()


@pytest.mark.parametrize("call", [allreduce, allgather])
def test_ranks_may_have_theirs_in_different_places(side, call):
    """Also at other times in others: all build their plans together."""
    host = expected(call, TopK(0.1))

    def program(comm):
        kept = []
        for turn in range(4):
            x = tensors(comm)
            there = turn % (comm.Get_rank() + 1) == 0
            got = call(comm, x if there else x.numpy(), TopK(0.1))
            kept.append(got.numpy() if there else got)
        return kept

    for kept in results(3, program):
        for got in kept:
            assert got.tobytes() == host.tobytes()


@pytest.mark.parametrize(("wrong", "kind", "text"), [
    (lambda x: {"x": Unreadable(x)}, DtypeError, "x is a Unreadable that torch does not take (BufferError: its memory is"),
    (lambda x: {"x": x.T}, ShapeError, "x is not contiguous; pass x.contiguous()"),
    (lambda x: {"x": Foreign(x.to(torch.int32))}, DtypeError, "x has dtype torch.int32; pass float32 or float64"),
    (lambda x: {"x": x.to_sparse()}, DtypeError, "x cannot be seen as a numpy array"),
    (lambda x: {"out": np.zeros(SHAPE, np.float32)}, DtypeError, "out is on cpu and x on side:cpu; pass both on one device"),
    (lambda x: {"out": torch.zeros(5)}, ShapeError, "out has shape (5,) float32; it must be (7, 9) float32"),
    (lambda x: {"out": x.double()}, ShapeError, "out has shape (7, 9) float64; it must be"),
    (lambda x: {"out": JaxArray(x)}, ShapeError, "out is read-only"),
])
def test_what_does_not_fit_on_one_rank_stops_all(side, wrong, kind, text):
    def program(comm):
        x = tensors(comm)
        given = {"x": x, "out": None} | (wrong(x) if comm.Get_rank() == 1 else {})
        return allreduce(comm, given["x"], TopK(0.1), out=given["out"])

    first, second, _ = run(3, program)
    assert type(second) is kind
    assert text in str(second)
    assert "\n" not in str(second)
    assert isinstance(first, PeerError)
    assert text in str(first)


JaxArray = type("JaxArray", (Foreign,), {"__module__": "jaxlib._jax"})


def test_low_rank_with_tensors(side):
    def program(comm):
        return allreduce(comm, tensors(comm), LowRank(2, shapes=(SHAPE,)))

    host = expected(allreduce, LowRank(2, shapes=(SHAPE,)))
    for got in results(3, program):
        np.testing.assert_allclose(got.numpy(), host, rtol=1e-4, atol=1e-5)


def test_arrays_on_the_host_are_left_to_numpy():
    def program(comm):
        return allreduce(comm, Standard(tensors(comm)), TopK(0.1))

    for error in run(2, program):
        assert isinstance(error, DtypeError)
        assert str(error) == ("allreduce: x is a Standard; pass a numpy array, a tensor, or an array on a device with "
                              "__dlpack__")


def test_the_lines_of_the_guide():
    """Of docs/gpu.md, on the device side; the whole program there is run by tests/launch/test_readme.py."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    (lines,) = (body for body in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "plan_for" in body)
    assert lines.count("10_000, device=device)") == 2
    lines = lines.replace("TopK(0.01), 10_000, device=device)", "TopK(0.01), 10_000, device=DEVICE)")

    def program(comm):
        names = {"comm": comm, "device": TORCH_DEVICE, "DEVICE": DEVICE, "torch": torch, "mpi_ef": mpi_ef}
        exec(lines, names)
        return {name: names[name] for name in ("mean", "rows", "estimate")}

    with device_side():
        for found in results(2, program):
            assert {type(one) for one in found.values()} == {torch.Tensor}
            assert {one.device for one in found.values()} == {TORCH_DEVICE}
            assert found["rows"].shape == (2, 10_000)
            assert torch.equal(found["mean"], found["rows"].sum(0) * 0.5)
