"""``mpi-ef bench`` with vectors on a device: the same steps, times until it is done, and what the document says."""

import json
import threading
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import virtual
from device_side import sized
from mpi4py import MPI

from mpi_ef.errors import ConfigError, DataError
from mpi_ef.jobs.bench import place
from mpi_ef.jobs.bench import program as bench
from mpi_ef.jobs.bench.methods import methods
from mpi_ef.jobs.bench.place import Place
from mpi_ef.jobs.bench.program import BenchConfig
from mpi_ef.jobs.bench.table import COPIED, EF21_ENCODE, SIGNS_ENCODE, combine, table
from mpi_ef.jobs.report import program as report
from mpi_ef.kernels.backend import on_device_side, written_in
from mpi_ef.runtime import launch

D = sized(300, 5000)  # kernels in Triton select from long vectors alone
TINY = ["--d", str(D), "--ratio", "0.1", "--repeats", "1"]
CPU = torch.device("cpu")


class Comm:
    """A virtual communicator with what only the benchmark asks of MPI."""

    def __init__(self, comm):
        self.comm = comm

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Allreduce(self, send, receive, op=MPI.SUM):
        rows = self.comm.allgather(np.copy(receive if send is MPI.IN_PLACE else send))
        receive[...] = np.sum(rows, axis=0) if op == MPI.SUM else np.max(rows, axis=0)

    def allreduce(self, value, op=MPI.SUM):
        found = self.comm.allgather(value)
        return sum(found) if op == MPI.SUM else min(found) if op == MPI.MIN else max(found)

    def Iallreduce(self, send, receive):
        return SimpleNamespace(Wait=lambda: self.Allreduce(send, receive))

    def Sendrecv(self, send, dest, recvbuf, source):
        recvbuf[:] = self.comm.allgather(send)[source]


def results(ranks, program):
    return virtual.results(ranks, lambda comm: program(Comm(comm)))


def measured(monkeypatch, path, *arguments, ranks=2):
    monkeypatch.setattr(launch, "run", lambda program: results(ranks, program))
    bench.main([*TINY, *arguments, "--json", str(path)])
    return json.loads(path.read_text())


def host(x):
    return x.numpy() if hasattr(x, "numpy") else np.asarray(x)


def test_the_steps_are_those_of_the_host():
    """Of all methods that both sides have, three times; and MPI's mean is copied back."""

    def program(comm):
        vectors = [np.random.default_rng([n, comm.Get_rank()]).standard_normal(D, dtype=np.float32) for n in range(3)]
        copied = next(methods(comm, D, 0.1, place=Place(CPU)))  # of a rank without a device among others
        np.testing.assert_array_equal(copied.call(vectors[0]), sum(comm.allgather(vectors[0])))
        ours = {method.name: [host(method.call(x)).copy() for x in vectors]
                for method in methods(comm, D, 0.1) if method.kind in ("compressed", "alternative")}
        with on_device_side():
            there = Place(CPU)
            for method in methods(comm, D, 0.1, place=there):
                for number, x in enumerate(vectors):
                    result = method.call(there.kernels.place(x))
                    if method.name in ours:
                        np.testing.assert_array_equal(host(result), ours[method.name][number], method.name)
                    elif method.name == COPIED:
                        np.testing.assert_array_equal(host(result), sum(comm.allgather(x)))
        return sorted(ours)

    names = results(2, program)[0]
    assert len(names) == 10


def test_what_is_measured_on_a_device(tmp_path, monkeypatch, capsys):
    """And that medians of several launches and the report read it."""
    memory = defaultdict(lambda: iter([0, 4 * D]))
    monkeypatch.setattr(Place, "allocated", lambda there: next(memory[there]))
    with on_device_side():
        said = written_in("side:cpu")
        result = measured(monkeypatch, tmp_path / "device.json")
    assert result["devices"] == {f"cpu, kernels in {said}": "ranks 0,1"}
    assert result["ef21_memory_vectors"] == 1.0
    names = [row["name"] for row in result["rows"]]
    assert names[:3] == [COPIED, "DenseMean", "ef21 TopK(0.1)"]
    assert names[-5] == EF21_ENCODE
    for row in result["rows"]:
        assert (row["local_seconds"] is None) == (row["kind"] in ("alternative", "local"))
        assert row["local_seconds"] is None or row["local_seconds"] > 0
        assert row["touched_bytes"] is None
    printed = capsys.readouterr().out
    for words in (f"vectors on cpu, kernels in {said} (ranks 0,1)", "of the time of torch.sub(a, b, out=c); goal: 6.0",
                  "of the time of torch.topk(c.abs(), k); goal: 0.25", f"of the time of {COPIED}; goal: 0.1",
                  f"{SIGNS_ENCODE}: ", "vectors in memory of the device; goal: 2.2"):
        assert words in printed
    twice = combine([result, result | {"finished": "later"}])
    assert table(twice).splitlines()[1:] == printed.splitlines()[-len(table(twice).splitlines()) + 1 :]
    with pytest.raises(DataError, match="launches differ in devices"):
        combine([result, result | {"devices": {}}])
    assert combine([result, {name: value for name, value in result.items() if name != "devices"}])["launches"] == 2
    report.main([str(tmp_path / "device.json"), "--plot", str(tmp_path / "device.png")])
    assert f"{EF21_ENCODE}: " in capsys.readouterr().out


def test_the_host_says_so(tmp_path, monkeypatch, capsys):
    result = measured(monkeypatch, tmp_path / "host.json", "--only", "ef21 TopK(0.1)", ranks=1)  # counts bytes in a process
    assert result["devices"] == {"cpu, kernels in Numba": "rank 0"}
    assert "ef21_memory_vectors" not in result
    assert "vectors on cpu, kernels in Numba (rank 0)" in capsys.readouterr().out


def test_times_end_when_the_device_is_done(monkeypatch):
    seen, clock = [], bench.perf_counter
    monkeypatch.setattr(Place, "synchronise", lambda _: seen.append("wait"))
    monkeypatch.setattr(bench, "perf_counter", lambda: seen.append("look") or clock())
    monkeypatch.setattr(bench, "fit_link", lambda _: bench.Link(1e-6, 1e9))
    with on_device_side():
        results(1, lambda comm: bench.measure(comm, BenchConfig(d=D, repeats=1, only="DenseMean")))
    calls = seen[seen.index("look") - 1 :]
    assert len(calls) > 4
    assert calls == ["wait", "look"] * (len(calls) // 2)


def test_a_device_is_asked_by_its_number(monkeypatch):
    there, asked = Place(CPU), []
    assert there.allocated() is None
    there.device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: asked.append(device) or 7)
    assert there.allocated() == 7
    assert asked == [torch.device("cuda:1")] * 2


def test_ranks_with_and_without_a_device(monkeypatch):
    """They measure the same methods."""
    here = threading.local()
    monkeypatch.setattr(place, "side_of", lambda *_: ("cpu", "side:cpu")[here.rank])

    def program(comm):
        here.rank = comm.Get_rank()
        return bench.measure(comm, BenchConfig(d=D, ratio=0.1, repeats=1))

    first, second = results(2, program)
    assert first["devices"] == {"cpu, kernels in Numba": "rank 0", f"cpu, kernels in {written_in('side:cpu')}": "rank 1"}
    assert [row["name"] for row in first["rows"]] == [row["name"] for row in second["rows"]]
    assert (first["rows"][0]["name"], first["rows"][-5]["name"]) == (COPIED, EF21_ENCODE)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:3"):
        errors = virtual.run(2, lambda comm: bench.measure(comm, BenchConfig(d=D, device=device)))  # noqa: B023
        assert {str(error) for error in errors} == {
            f"device={device}: torch sees 0 GPUs here; ask for more of them, or take device=auto or cpu"}
        assert all(isinstance(error, ConfigError) and error.everywhere for error in errors)
    with pytest.raises(ConfigError, match="device='gpu' is no device; take auto, cpu, cuda"):
        BenchConfig(device="gpu")
    with pytest.raises(ConfigError, match="device=cuda has no effect with combine"):
        BenchConfig(device="cuda", combine="a.json,b.json")
