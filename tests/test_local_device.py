"""Which GPU a rank computes on, with nodes and GPUs that are made up."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mpi_ef import devices, local_device
from mpi_ef.errors import DisagreementError, OptionError, PeerError
from mpi_ef.jobs.device import device_for
from mpi_ef.testing import results, run

here = threading.local()  # the node of a virtual rank, and the UUIDs of the GPUs that it sees there


@pytest.fixture
def made_up(monkeypatch):
    """Virtual ranks have nodes and GPUs, and nothing may be set."""

    def refuse(*_):
        raise AssertionError("set_device")

    def properties(index):
        if here.gpus[index] is None:
            raise RuntimeError("CUDA error: invalid device")
        uuid = here.gpus[index]
        return SimpleNamespace(uuid=uuid, pci_bus_id=ord(uuid) - ord("a"), pci_domain_id=0, pci_device_id=0)

    monkeypatch.setattr(devices, "gethostname", lambda: here.node)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(here.gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here.gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)


def chosen(*ranks, call=results, **options):
    """Return what each rank gets, or raises; `ranks` are (node, UUIDs that it sees there)."""

    def program(comm):
        here.node, here.gpus = ranks[comm.Get_rank()]
        return str(local_device(comm, **options))

    return call(len(ranks), program, virtual=True)


def test_one_gpu_for_each_rank_of_a_node(made_up):
    every = ["a", "b"]
    assert chosen(("n0", every), ("n0", every), ("n1", every), ("n1", every)) == ["cuda:0", "cuda:1"] * 2
    assert chosen(("n1", every), ("n0", every), ("n1", every), ("n0", every)) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    # Slurm's --gpus-per-task: index 0 is other hardware in every task.
    assert chosen(("n0", ["a"]), ("n0", ["b"]), ("n0", ["c"])) == ["cuda:0"] * 3


@pytest.mark.parametrize(("seen", "gets"), [
    (["ab", "cd", "ab", "cd"], "acbd"),  # closest, tasks dealt to the sockets in turn
    (["ab", "a"], "ba"),  # closest where no GPU is: the first of all
    (["abc", "ab", "a"], "cba"),
    (["ba", "ba"], "ba"),
    (["ab", "c", "ab", "ab", "c"], "acbbc"),  # more ranks than GPUs
])
def test_ranks_that_see_different_ones(made_up, seen, gets):
    found = chosen(*[("n0", list(gpus)) for gpus in seen], share=len(set(gets)) < len(gets))
    assert "".join(gpus[int(device.removeprefix("cuda:"))] for gpus, device in zip(seen, found, strict=True)) == gets


def test_the_cpu_where_there_is_none(made_up):
    assert chosen(("n0", []), ("n0", [])) == ["cpu", "cpu"]
    assert chosen(("n0", ["a"]), ("n1", [])) == ["cuda:0", "cpu"]


def test_ranks_that_would_share_one(made_up):
    three = [("n0", ["a", "b"])] * 3
    errors = chosen(*three, ("n1", ["a", "b"]), call=run)
    assert len(set(map(str, errors))) == 1
    for error in errors:
        assert isinstance(error, OptionError)
        assert error.everywhere
    assert str(errors[0]) == ("local_device: ranks 0,2 would share one GPU (cuda:0, a at 0000:00:00); start as many ranks a "
                              "node as it has GPUs, or pass share=True")
    assert chosen(*three, share=True) == ["cuda:0", "cuda:1", "cuda:0"]
    assert "and others share 1 more GPU" in str(chosen(*three, three[0], call=run)[0])


class Unasked(Exception):
    """As torch.cuda.DeferredCudaCallError, which is no RuntimeError."""


@pytest.mark.parametrize("call", ["is_available", "device_count", "get_device_properties"])
def test_whatever_torch_raises_is_one_line_on_all_ranks(made_up, monkeypatch, call):
    usual = getattr(torch.cuda, call)

    def raising(*arguments):
        if here.node == "broken":
            raise Unasked("a driver\n\n  File")
        return usual(*arguments)

    monkeypatch.setattr(torch.cuda, call, raising)

    def program(comm, asked):
        here.node, here.gpus = "broken" if comm.Get_rank() else "n0", ["a", "b"]
        return local_device(comm) if asked is None else device_for(comm, asked, "bench")

    for asked in (None, "auto", *(["cuda:1"] if call != "get_device_properties" else [])):
        first, second = run(2, partial(program, asked=asked), virtual=True)
        assert isinstance(first, PeerError)
        assert isinstance(second, OptionError)
        assert len(str(second).splitlines()) == 1
        assert str(second).count("the GPUs here cannot be asked (Unasked: a driver") == 1


def test_gpus_that_torch_cannot_tell_apart(made_up):
    assert chosen(("n0", ["a", "a"]), ("n0", ["a", "a"])) == ["cuda:0", "cuda:1"]


def test_what_goes_wrong_goes_wrong_on_all_ranks(made_up):
    first, second = chosen(("n0", [None]), ("n0", ["a"]), call=run)
    assert isinstance(first, OptionError)
    assert "cannot be asked (RuntimeError: CUDA error: invalid device" in str(first)
    assert isinstance(second, PeerError)

    def program(comm):
        here.node, here.gpus = "n0", []
        return local_device(comm, share=comm.Get_rank() == 1)

    for error in run(2, program, virtual=True):
        assert isinstance(error, DisagreementError)
