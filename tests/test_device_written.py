"""What the kernels of a device are written in: summaries of trainings, the benchmark and the doctor say it alike."""

import sys

import programs
import pytest
import torch
import virtual

from mpi_ef import TopK, plan_for
from mpi_ef.errors import MpiEfError
from mpi_ef.jobs import device
from mpi_ef.jobs.bench import program as bench
from mpi_ef.jobs.bench.program import BenchConfig
from mpi_ef.jobs.doctor.checks import on_gpu
from mpi_ef.jobs.doctor.finding import Placement
from mpi_ef.jobs.doctor.registry import Context, DoctorConfig
from mpi_ef.jobs.train import loop
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.kernels.backend import backend, written_in

GPU = torch.device("cuda:0")
OLD = "P100, kernels in torch (compute capability 6.0 is below 7.0)"
MLP = {"model": "mlp", "batch": 4, "steps": 1, "warmup": 1, "log_every": 1, "eval_every": 1, "device": "cpu"}


@pytest.fixture
def old(monkeypatch):
    """A GPU that Triton does not serve."""
    monkeypatch.delenv("MPI_EF_DEVICE_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "P100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 0))


def test_all_programs_say_it_alike(old, monkeypatch, tmp_path):
    """What is asked of a device; where the vectors are in truth, which are here, is another matter."""
    assert device.told_of(GPU, "cuda:0") == OLD
    assert on_gpu.collect(Context(DoctorConfig(), {}, Placement()))["kernels"] == [OLD]
    there = device.described
    monkeypatch.setattr(loop, "described", lambda comm, *_: there(comm, GPU, "cuda:0"))
    summary = programs.trained(2, TrainConfig(**MLP, out=tmp_path))[0]
    assert summary["devices"] == {OLD: "ranks 0,1"}
    monkeypatch.setattr(device, "described", loop.described)
    monkeypatch.setattr(bench, "fit_link", lambda _: bench.Link(1e-6, 1e9))

    class Alone:
        def __init__(self, comm):
            self.comm = comm

        def __getattr__(self, name):
            return getattr(self.comm, name)

        def allreduce(self, value, _):
            return value

        def Allreduce(self, *_):
            pass

        def Iallreduce(self, *_):
            return self

        def Wait(self):
            pass

    def program(comm):
        return bench.measure(Alone(comm), BenchConfig(d=100, repeats=1, only="DenseMean"))["devices"]

    assert virtual.results(1, program) == [{OLD: "rank 0"}]


def test_why_not_triton(old, monkeypatch):
    assert written_in("cuda:0") == "torch (compute capability 6.0 is below 7.0)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert written_in("cuda:0").startswith("torch (triton cannot be imported (")
    monkeypatch.setitem(sys.modules, "triton", object())
    assert written_in("cuda:0") == "Triton"
    monkeypatch.setenv("MPI_EF_DEVICE_KERNELS", "torch")
    assert written_in("cuda:0") == "torch (MPI_EF_DEVICE_KERNELS=torch is set)"


@pytest.mark.parametrize(("variables", "path"), [
    ({"TRITON_CACHE_DIR": "/local/t", "TRITON_HOME": "/home/a"}, "/local/t"),
    ({"TRITON_HOME": "/home/a"}, "/home/a/.triton/cache"),
    ({}, "~/.triton/cache")])
def test_where_triton_keeps_what_it_has_compiled(old, monkeypatch, variables, path, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    context = Context(DoctorConfig(), variables, Placement(3, "n0", 1))
    place = path.replace("~", str(tmp_path))
    assert str(on_gpu.triton_cache(context)) == place
    monkeypatch.setattr(device, "written_in", lambda _: "Triton")
    monkeypatch.setattr(on_gpu, "file_system", lambda folder: f"of {folder}")
    facts = on_gpu.collect(context)
    assert facts["triton_path"] == place
    assert facts["triton_kind"] == f"of {on_gpu.existing(on_gpu.triton_cache(context))}"
    assert "unpinned" not in facts  # the first rank of a node tries


def test_kernels_that_there_are_not(monkeypatch):
    """A word in the variable that means nothing is told where vectors are taken; nobody would see that it had no effect."""
    monkeypatch.setenv("MPI_EF_DEVICE_KERNELS", "Torch\n")
    backend.cache_clear()

    def program(comm):
        with pytest.raises(MpiEfError) as raised:
            plan_for(comm, TopK(0.1), 50, device="side:cpu")
        return str(raised.value)

    (line,) = set(virtual.results(2, program))
    assert line == "MPI_EF_DEVICE_KERNELS='Torch\\n' names no kernels; set it to torch, or not at all"
    backend.cache_clear()


def test_a_triton_that_is_broken(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "triton":
                raise RuntimeError("no ptxas\nfor this system")

    monkeypatch.delenv("MPI_EF_DEVICE_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert written_in("side:cpu") == "torch (triton cannot be imported (no ptxas for this system))"
