"""In a step nothing of the size of a vector crosses the bus between host and device, and no memory for one is taken."""

import ast
import gc
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from device_side import (
    BACKENDS,
    BLOCK,
    DEVICE,
    HARDWARE,
    INTERPRETED,
    TORCH_DEVICE,
    adamw,
    backward,
    device_side,
    moved,
    others,
    there,
    vector,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpi_ef
from mpi_ef import DistributedOptimizer, ErrorFeedback, OneBitAdam, plan_for
from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.compress import Identity, Quantize, RandK, Sign, TopK
from mpi_ef.kernels import device
from mpi_ef.kernels.device import bus
from mpi_ef.testing import results

D, RANKS, FIRST, LAST = 20_000, 2, 4, 6  # steps before the first one may allocate and send vectors whole
MOST = 1 / 8  # of a vector, in one copy


class Step:
    """A rule at work on one rank, with vectors of its own."""

    def __init__(self, comm, d, rule, compressor, **options):
        plan = TwoPhaseMean if isinstance(compressor, Sign) else plan_for
        self.feedback = ErrorFeedback(rule, plan(comm, compressor, d, device=DEVICE), **options)
        self.grads = [there(vector(d, np.float32, 10 * comm.Get_rank() + n)) for n in range(3)]

    def __call__(self, number):
        self.feedback.step(self.grads[number % 3])


class Training:
    """An optimizer of a model of that size on one rank."""

    def __init__(self, comm, build):
        torch.manual_seed(comm.Get_rank())
        self.net, self.shadow = (nn.Sequential(nn.Linear(99, 199), nn.ReLU(), nn.Linear(199, 1)) for _ in range(2))
        self.net = moved(self.net)
        self.optimizer = build(self.net, comm)
        self.x = torch.randn(4, 99)

    def __call__(self, number):
        self.optimizer.zero_grad()
        backward(self.net, self.shadow, lambda net: net(self.x * (1 + number / 8)).square().mean())
        self.optimizer.step()


RULES = {
    "EF21": lambda comm, d=D: Step(comm, d, "ef21", TopK(0.01), dense_steps=1),
    "EF21, bf16 values": lambda comm, d=D: Step(comm, d, "ef21", TopK(0.01, values=Quantize())),
    "EF14, random entries": lambda comm, d=D: Step(comm, d, "ef14", RandK(0.01)),
    "EControl": lambda comm, d=D: Step(comm, d, "econtrol(eta=0.1)", TopK(0.01), dense_steps=1),
    "signs, two phases": lambda comm, d=D: Step(comm, d, "ef14", Sign(block=BLOCK)),
    "one scale, two phases": lambda comm, d=D: Step(comm, d, "ef14", Sign()),
}
STEPS = RULES | {
    "AdamW, update": lambda comm: Training(comm, lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.01))),
    "gradients, EF21": lambda comm: Training(comm, lambda net, comm: DistributedOptimizer(
        adamw(net), comm, TopK(0.01), placement="gradient", rule="ef21")),
    "1-bit Adam": lambda comm: Training(comm, lambda net, comm: OneBitAdam(net.parameters(), comm, lr=1e-4, freeze_step=2)),
}


def copied(build, steps=(FIRST, LAST)):
    """Return what crosses the bus, direction and bytes of each copy, in these steps of all ranks."""
    found = []

    def program(comm):
        step = build(comm)
        for number in range(steps[1]):
            comm.Barrier()
            if number == steps[0] and not comm.Get_rank():
                found.append(watching.enter_context(bus.watched()))
            comm.Barrier()
            step(number)
        comm.Barrier()

    with ExitStack() as watching, device_side():
        results(RANKS, program)
    return list(found[0])


@pytest.mark.parametrize("name", STEPS)
def test_only_wires_cross_the_bus(name):
    """And what the host adds up: a number for every part of 4096 entries in norms, one for a block in scales of signs.

    The kernels in torch operations leave these to the host; those in Triton do not for scales. What they compare afterwards,
    whether a vector was finite and a guess right, is of a few bytes.
    """
    copies = copied(STEPS[name])
    assert copies, "nothing is counted"
    whole, steps = 4 * D, RANKS * (LAST - FIRST)
    assert max(nbytes for _, nbytes in copies) <= MOST * whole, sorted(copies)[-3:]
    for direction in ("to host", "to device"):
        assert 0 < sum(nbytes for to, nbytes in copies if to == direction) / steps < 0.25 * whole


def test_what_does_cross_is_counted():
    """Dense steps, a freeze of 1-bit Adam, a state that is saved."""
    dense = copied(lambda comm: Step(comm, D, "ef21", Identity()))
    assert max(nbytes for _, nbytes in dense) >= 4 * D / RANKS
    before_freeze = copied(STEPS["1-bit Adam"], (0, 2))
    assert max(nbytes for _, nbytes in before_freeze) >= 4 * D / RANKS
    with bus.watched() as copies:
        x = there(vector(D, np.float32))
        x.numpy()
        x[:2] = np.zeros(2, np.float32)
        x[:1].tolist()
    assert copies == [("to host", 4 * D), ("to device", 8), ("to host", 4)]
    with bus.watched() as copies:
        BACKENDS[0](np.float32, DEVICE).l1_norm(x)
    assert copies == [("to host", 8 * -(-D // 4096))]


def test_nothing_else_copies():
    """Of the modules that know where tensors are, one crosses the bus."""
    crossing = {"cpu", "from_numpy", "as_tensor", "from_dlpack", "tensor", "cuda", "pin_memory"}
    found = {}
    for path in sorted(Path(device.__file__).parent.glob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
                 and isinstance(node.func, ast.Attribute)]
        names = sorted({call.attr for call in calls if call.attr in crossing})
        if names and path.name != "bus.py":
            found[path.stem] = names
    # A square root, of tensors that are on the CPU; and memory that is borrowed where it is.
    assert found == {"plain_optim": ["from_numpy"], "borrowed": ["from_dlpack"]}


def held():
    """Bytes of all tensors on the device that there are in this process."""
    gc.collect()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
                if type(x) in (torch.Tensor, nn.Parameter) and x.device == TORCH_DEVICE and x.layout is torch.strided}
    return sum(storages.values())


class Made(TorchDispatchMode):
    """Bytes of the largest memory that an operation of this thread has made for its result."""

    nbytes = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        known = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
        out = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
        for x in out:
            if x.untyped_storage().data_ptr() not in known and x.device == TORCH_DEVICE and "set_" not in str(operation):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["EF21", "1-bit Adam", *others(*(set(STEPS) - {"EF21", "1-bit Adam"}))])
def test_a_step_leaves_no_memory_behind(name):
    seen = []

    def program(comm):
        step = STEPS[name](comm)
        for number in range(LAST + 2):
            step(number)
            comm.Barrier()
            if number in (FIRST, LAST + 1) and not comm.Get_rank():
                seen.append(held())
            comm.Barrier()

    with device_side():
        results(RANKS, program)
    assert len(set(seen)) == 1, seen
    assert seen[0] >= 4 * D


@pytest.mark.parametrize(("rule", "vectors"), [("ef14", 3), ("ef21", 2), ("econtrol(eta=0.1)", 4)])
def test_what_a_rule_adds_in_memory(rule, vectors):
    """Vectors of its state, and a few percent of one for messages and what is selected."""
    d, seen = 400_000, []

    def program(comm):
        comm.Barrier()
        if not comm.Get_rank():
            seen.append(held())
        comm.Barrier()
        step = Step(comm, d, rule, TopK(0.01))
        for number in range(2):
            step(number)
        comm.Barrier()
        if not comm.Get_rank():
            seen.append(held())
        comm.Barrier()

    with device_side():
        results(RANKS, program)
    before, after = seen
    added = (after - before) / RANKS / (4 * d) - 3  # gradients of the test
    assert vectors <= added < vectors + 0.15, added


BYTES = {
    "`DistributedOptimizer(AdamW)`, 1 %": lambda net, comm: DistributedOptimizer(adamw(net), comm, TopK(0.01)),
    "the same, signs": lambda net, comm: DistributedOptimizer(adamw(net), comm, Sign(block=1024)),
    "`EF21`, 1 %": lambda net, comm: mpi_ef.EF21(net.parameters(), comm, TopK(0.01), lr=0.1),
    "`EControl`, 1 %": lambda net, comm: mpi_ef.EControl(net.parameters(), comm, TopK(0.01), lr=0.1),
    "`OneBitAdam`": lambda net, comm: OneBitAdam(net.parameters(), comm, lr=1e-3, freeze_step=2),
    "`Lion`": lambda net, comm: mpi_ef.Lion(net.parameters(), comm, lr=1e-3),
    "`EF21Muon`, 10 %": lambda net, comm: mpi_ef.EF21Muon(net.parameters(), comm, TopK(0.1), lr=1e-3),
    "`PowerSGD`, rank 4": lambda net, comm: mpi_ef.PowerSGD(net.parameters(), comm, lr=1e-3),
}


@pytest.mark.skipif(HARDWARE or INTERPRETED, reason="counted once; other kernels keep no more")
@pytest.mark.parametrize("name", ["`EF21`, 1 %", *others(*(set(BYTES) - {"`EF21`, 1 %"}))])
def test_the_bytes_for_a_parameter_are_those_of_the_guide(name):
    guide = (Path(__file__).resolve().parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    wanted = int(guide.split(f"\n| {name} | ")[1].split(" |")[0])
    ranks, seen = 4, []

    def program(comm):
        net = moved(nn.Sequential(nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 700)))
        optimizer = BYTES[name](net, comm)
        x = torch.from_numpy(np.random.default_rng(comm.Get_rank()).normal(size=(4, 700)).astype(np.float32))
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        comm.Barrier()
        if not comm.Get_rank():
            seen.append(held())
        comm.Barrier()
        return sum(p.numel() for p in net.parameters())

    before = held()
    with device_side():
        d = results(ranks, program)[0]
    assert round((seen[0] - before) / ranks / d) == wanted


@pytest.mark.skipif(len(BACKENDS) == 1, reason="torch operations make a vector for what is in between: make test-device")
@pytest.mark.parametrize("name", ["EF21", "EControl", "signs, two phases", *others(
    "EF21, bf16 values", "EF14, random entries", "one scale, two phases")])
def test_a_step_makes_no_vector(name):
    """Of entries that are a sample of it, and of candidates, there are few."""
    d = 100_000

    def program(comm):
        step = RULES[name](comm, d)
        step(0)
        step(1)
        with Made() as made:
            step(2)
        return made.nbytes

    with device_side():
        assert max(results(RANKS, program)) <= 4 * d / 2


@pytest.mark.skipif(not HARDWARE, reason="needs a GPU: make test-gpu")
@pytest.mark.parametrize("name", STEPS)
def test_a_device_is_asked_for_no_memory(name):
    """What torch holds in reserve is enough from the third step on."""
    def program(comm):
        step, seen = STEPS[name](comm), []
        for number in range(LAST + 2):
            step(number)
            comm.Barrier()
            stats = torch.cuda.memory_stats(TORCH_DEVICE)
            seen.append((stats["segment.all.allocated"], stats["allocated_bytes.all.current"]))
            comm.Barrier()
        return seen[FIRST - 1 :]

    for seen in results(RANKS, program):
        assert len(set(seen)) == 1, seen


@pytest.mark.skipif(not HARDWARE, reason="needs a GPU: make test-gpu")
@pytest.mark.parametrize("name", ["EF21", "signs, two phases"])
def test_the_driver_copies_what_is_counted(name, tmp_path):
    """And answers of a few bytes beside it."""
    from torch.profiler import ProfilerActivity, profile

    def program(comm):
        step = STEPS[name](comm)
        for number in range(FIRST):
            step(number)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled, bus.watched() as copies:
            for number in range(FIRST, LAST):
                step(number)
            torch.cuda.synchronize(TORCH_DEVICE)
        profiled.export_chrome_trace(str(tmp_path / "trace.json"))
        return sum(nbytes for _, nbytes in copies)

    (counted,) = results(1, program)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sizes = [event["args"]["bytes"] for event in events if event.get("cat") == "gpu_memcpy"
             and ("HtoD" in event["name"] or "DtoH" in event["name"])]
    assert sizes
    assert sum(nbytes for nbytes in sizes if nbytes > 64) <= counted
