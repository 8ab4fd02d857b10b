"""Plans and rules on the device side give the bits of those on the host; worlds may mix ranks of both."""

from itertools import chain

import numpy as np
import pytest
import torch
from device_side import BLOCK, DEVICE, INTERPRETED, bits, host, on, sized, there, vector

from mpi_ef.collectives import ClientsMean, DenseMean, GatherMean, NodeMean, TwoPhaseMean, plan_for
from mpi_ef.compress import Identity, Keep, LowRank, Quantize, RandK, Sign, TopK, Vote, lazy
from mpi_ef.errors import NonFiniteError, OptionError, PeerError
from mpi_ef.feedback import ErrorFeedback
from mpi_ef.testing import results, run

D, STEPS = sized(1300, 4200), sized(4, 2)
PLANS = {
    "gather": lambda comm, **o: GatherMean(comm, TopK(0.05, values=Quantize("bf16")), D, **o),
    "gather RandK": lambda comm, **o: GatherMean(comm, RandK(0.05), D, **o),
    "two-phase": lambda comm, **o: TwoPhaseMean(comm, Sign(block=BLOCK), D, **o),
    "two-phase whole": lambda comm, **o: TwoPhaseMean(comm, Sign(), D, **o),
    "two-phase TopK": lambda comm, **o: TwoPhaseMean(comm, TopK(0.1), D, **o),
    "vote": lambda comm, **o: TwoPhaseMean(comm, Vote(), D, residual=False, **o),
    "dense": lambda comm, **o: DenseMean(comm, D, **o),
    "low rank": lambda comm, **o: plan_for(comm, LowRank(2), D, **o),
    "int8": lambda comm, **o: plan_for(comm, Quantize("int8"), D, **o),
}
WORLDS = {"devices": (DEVICE, DEVICE, DEVICE), "mixed": ("cpu", DEVICE, "cpu"), "alone": (DEVICE,)}


def exchanges(comm, build, dtype, device):
    """Exchange some vectors, and return all that a rule might see."""
    plan, seen = build(comm, dtype=dtype, device=device), []
    again = on(device, np.zeros(D, dtype))
    for step in range(STEPS):
        x, y = (on(device, vector(D, dtype, 100 * comm.Get_rank() + 2 * step + n)) for n in range(2))
        kept, out = on(device, np.zeros(D, dtype)), on(device, vector(D, dtype, 7))
        form = lazy(x) - y
        plan.exchange(form, keep=Keep(form, kept, less_message=True))
        plan.add_own(out, 0.3)
        plan.add_mean(out)
        plan.set_mean(again, again=True)
        seen.append([host(a).copy() for a in (kept, out, again)])
        plan.start(x)
        plan.wait()
        plan.set_mean(out, 0.5)
        seen.append([host(out).copy()])
    return seen, plan.sent_nbytes, {name: host(a).copy() for name, a in plan.state().items()}


@pytest.mark.parametrize(("world", "dtype"), [
    pytest.param(world, dtype, marks=[pytest.mark.exhaustive] * (INTERPRETED and (world, dtype) != ("mixed", np.float32)))
    for world in WORLDS for dtype in (np.float32, np.float64)])
@pytest.mark.parametrize("name", PLANS)
def test_plans(name, world, dtype):
    devices = WORLDS[world]

    def program(comm):
        ours = exchanges(comm, PLANS[name], dtype, "cpu")
        return ours, exchanges(comm, PLANS[name], dtype, devices[comm.Get_rank()])

    for (ours, sent, state), (theirs, their_sent, their_state) in results(len(devices), program):
        assert sent == their_sent
        pairs = zip([*chain(*ours), *state.values()], [*chain(*theirs), *their_state.values()], strict=True)
        for one, other in pairs:
            if name == "low rank":  # products of matrices are rounded as the library of the side does it
                assert np.allclose(one, other, atol=1e-3 if dtype == np.float32 else 1e-10)
            else:
                assert bits(one) == bits(other)


@pytest.mark.parametrize("name", PLANS)
def test_not_finite_on_a_device(name):
    def program(comm):
        plan = PLANS[name](comm, device=DEVICE)
        x = vector(D, np.float32, comm.Get_rank())
        x[5] = np.nan if comm.Get_rank() == 1 else 1.0
        with pytest.raises(NonFiniteError) as raised:
            plan.exchange(there(x))
        plan.exchange(there(vector(D, np.float32)))
        return raised.value.ranks

    assert results(3, program) == [(1,)] * 3


RULES = {
    "ef21": {}, "ef14": {}, "econtrol(eta=0.3)": {}, "ef21-sgdm": {"dense_steps": 1}, "ef21-sgd2m": {}, "ef21-hb": {},
    "ef14(momentum=0.9)": {}, "d-ec-sgd": {}, "marina": {"compressor": RandK(0.1)}, "ef21-bc": {},
}


@pytest.mark.parametrize("dtype", [
    np.float32, pytest.param(np.float64, marks=[pytest.mark.exhaustive] * INTERPRETED)], ids=["f32", "f64"])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, dtype):
    options = dict(RULES[rule])
    compressor = options.pop("compressor", TopK(0.1))

    def program(comm):
        runs = []
        for device in ("cpu", DEVICE):
            feedback = ErrorFeedback(rule, plan_for(comm, compressor, D, dtype, device=device), **options)
            grads = (on(device, vector(D, dtype, 10 * comm.Get_rank() + n)) for n in range(STEPS))
            steps = [host(feedback.step(grad)).copy() for grad in grads]
            runs.append((steps, feedback.state_dict()))
        return runs

    for (ours, state), (theirs, their_state) in results(2, program):
        assert list(map(bits, ours)) == list(map(bits, theirs))
        assert {k: bits(a) for k, a in state["arrays"].items()} == {k: bits(a) for k, a in their_state["arrays"].items()}


@pytest.mark.parametrize("rule", ["ef21-pp", "ef21-w", "ef21-plus", "clag", "ef21"])
@pytest.mark.parametrize("compressor", [TopK(0.1), Identity()], ids=str)
def test_rules_of_clients(rule, compressor):
    clients = 5

    def program(comm):
        runs = []
        for device in ("cpu", DEVICE):
            weights = np.arange(1, clients + 1) / 15 if rule == "ef21-w" else None
            plan = ClientsMean(comm, compressor, D, np.float64, clients=clients, weights=weights, device=device)
            feedback, steps = ErrorFeedback(rule, plan), []
            for n in range(STEPS):
                mine = range(plan.first, plan.first + plan.own)
                x = np.stack([vector(D, np.float64, 10 * client + n) for client in mine])
                steps.append(host(feedback.step(on(device, x))).copy())
            runs.append(steps)
        return runs

    for ours, theirs in results(2, program):
        assert list(map(bits, ours)) == list(map(bits, theirs))


def test_a_state_goes_from_one_side_to_the_other():
    """What was saved on the host goes on there and on the device side with the same bits, and the other way round."""

    def program(comm):
        def built(device):
            return ErrorFeedback("econtrol(eta=0.3)", plan_for(comm, TopK(0.1), D, device=device))

        def go(feedback, device, steps):
            return [bits(host(feedback.step(on(device, vector(D, np.float32, 10 * comm.Get_rank() + n))))) for n in steps]

        ends = []
        for before, after in (("cpu", "cpu"), ("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)):
            first, second = built(before), built(after)
            go(first, before, range(3))
            second.load_state_dict(first.state_dict())
            ends.append(go(second, after, range(3, 6)))
        return ends

    for ends in results(2, program):
        assert all(end == ends[0] for end in ends)


def test_vectors_that_are_elsewhere():
    from mpi_ef.errors import DtypeError

    def program(comm):
        with pytest.raises(DtypeError, match="x is a ndarray; this plan takes vectors on " + DEVICE):
            plan_for(comm, TopK(0.1), D, device=DEVICE).exchange(np.zeros(D, np.float32))
        with pytest.raises(DtypeError, match="x is a DeviceArray; pass a numpy array"):
            plan_for(comm, TopK(0.1), D).exchange(there(np.zeros(D, np.float32)))

    results(2, program)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x", "", torch.device("mps")])
def test_a_device_that_is_not_there(device):
    """One line, on all ranks; no rank waits for another."""
    def program(comm):
        mine = device if comm.Get_rank() else DEVICE
        plan_for(comm, TopK(0.1), D, device=mine)

    first, second = run(2, program)
    assert isinstance(first, PeerError)
    assert isinstance(second, OptionError)
    assert str(second).startswith(f"GatherMean: device={str(device)!r} cannot be used (")
    assert str(second).endswith("); pass that of this rank's tensors, for example 'cuda:0', or 'cpu'")
    assert len(str(second).splitlines()) == 1


def test_a_device_of_torch_is_taken():
    def program(comm):
        return plan_for(comm, TopK(0.1), D, device=torch.device("cpu")).device

    assert results(2, program) == ["cpu", "cpu"]


@pytest.mark.parametrize("less_message", [False, True])
def test_tensors_are_taken_as_arrays_are(less_message):
    """Alone, in combinations, and what is kept of these."""
    def program(comm):
        plan, seen = plan_for(comm, TopK(0.1), D, device=DEVICE), []
        for as_given in (lambda array: array, lambda array: array.tensor):
            x, y, kept, out = (as_given(there(vector(D, np.float32, 4 * comm.Get_rank() + n))) for n in range(4))
            form = lazy(x) - y
            plan.exchange(form, keep=Keep(form, kept, less_message=less_message))
            plan.set_mean(out)
            seen.append([bits(np.array(a.tolist(), np.float32)) for a in (kept, out)])
            plan.exchange(form, keep=Keep(lazy(x) * 2.0, kept, less_message=less_message))
            plan.exchange(x)
            plan.add_mean(out)
            seen[-1] += [bits(np.array(a.tolist(), np.float32)) for a in (kept, out)]
        return seen

    for ours, theirs in results(2, program):
        assert ours == theirs


@pytest.mark.parametrize("rule", ["ef14", "ef21"])
@pytest.mark.parametrize("world", WORLDS)
def test_nodes(rule, world):
    """Sums inside a node are formed on the host, slices are compressed where vectors are: the bits of the host."""
    devices = WORLDS[world]

    def program(comm):
        seen = []
        for device in ("cpu", devices[comm.Get_rank()]):
            plan = NodeMean(comm, TopK(0.1), D, inner=TwoPhaseMean, node=2, device=device)
            feedback, results = ErrorFeedback(rule, plan, dense_steps=1), []
            for step in range(STEPS):
                x, y = (on(device, vector(D, np.float32, 100 * comm.Get_rank() + 2 * step + n)) for n in range(2))
                results.append(host(feedback.step(lazy(x) - y)).copy())
                feedback.start(x)
                feedback.wait()
                results.append(host(feedback.commit()).copy())
            bad = on(device, np.full(D, np.nan, np.float32))
            with pytest.raises(NonFiniteError):
                feedback.step(bad if comm.Get_rank() == len(devices) - 1 else x)
            results.append(host(feedback.step(x)).copy())
            seen.append(results + [host(a).copy() for a in feedback.per_rank().values()])
        return seen

    for ours, theirs in results(len(devices), program):
        assert all(map(np.array_equal, map(bits, ours), map(bits, theirs)))
