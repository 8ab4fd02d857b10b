"""What was started on a device is given to MPI when the device has done its part: a backward pass waits for nothing."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import virtual
from device_side import DEVICE, TORCH_DEVICE, bits, device_side, host, moved, sgd, there, vector
from torch.utils._python_dispatch import TorchDispatchMode

from mpi_ef import DistributedOptimizer, plan_for
from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.collectives.exchange import Exchange
from mpi_ef.collectives.ways import ways_of
from mpi_ef.compress import Quantize, Sign, TopK
from mpi_ef.errors import NonFiniteError
from mpi_ef.kernels.device import bus

D, PLANS = 5000, (TopK(0.05), Sign(block=1024), TopK(0.02, values=Quantize()))


@contextmanager
def slow(monkeypatch, answers):
    """Let a device say by the next of `answers` whether it is done; yield how often somebody has waited for it."""
    waits, wait = [], bus.Arrival.wait

    def waiting(arrival):
        waits.append(arrival)
        return wait(arrival)

    with monkeypatch.context() as patched:
        patched.setattr(bus.Arrival, "here", lambda _: next(answers))
        patched.setattr(bus.Arrival, "wait", waiting)
        yield waits


class NoAnswers(TorchDispatchMode):
    """In which no operation of this thread asks a device for a number, which waits for it."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert "_local_scalar_dense" not in str(operation)
        return operation(*arguments, **(options or {}))


def built(comm, device):
    return [(TwoPhaseMean if isinstance(compressor, Sign) else plan_for)(comm, compressor, D, device=device)
            for compressor in PLANS]


def means(plans, device):
    out = []
    for plan in plans:
        mean = there(np.zeros(D, np.float32)) if device == DEVICE else np.zeros(D, np.float32)
        plan.set_mean(mean)
        out.append(bits(host(mean)))
    return out


def shared(comm, number):
    return there(vector(D, np.float32, 10 * comm.Get_rank() + number))


@pytest.mark.parametrize("seed", range(6))
def test_exchanges_depart_in_the_order_of_their_starts(monkeypatch, seed):
    """However quick the devices of the ranks are, and whichever is asked about first."""
    chance, departed = np.random.default_rng(seed), {}
    depart = Exchange.depart

    def noted(exchange):
        departed.setdefault(exchange._rank, []).append(exchange.number)
        depart(exchange)

    monkeypatch.setattr(Exchange, "depart", noted)

    def program(comm):
        ways_of(comm).queue = []
        plans = built(comm, DEVICE)
        for step in range(3):
            for number, plan in enumerate(plans):
                plan.start(shared(comm, 3 * step + number))
                for other in chance.permutation(3)[: chance.integers(4)]:
                    plans[other].progress()
            for plan in plans:
                plan.wait()
        return means(plans, DEVICE)

    def plain(comm):
        plans = built(comm, "cpu")
        for step in range(3):
            for number, plan in enumerate(plans):
                plan.exchange(host(shared(comm, 3 * step + number)))
        return means(plans, "cpu")

    with slow(monkeypatch, iter(lambda: bool(chance.integers(2)), None)):
        theirs = virtual.results(3, program)
    assert departed[0] == departed[1] == departed[2]
    assert len(departed[0]) == 9
    assert virtual.results(3, plain) == theirs


def test_only_communicators_of_buckets_wait(monkeypatch):
    """On others the program may do something collective next, which another rank would see before the exchange."""
    with slow(monkeypatch, iter(lambda: False, None)) as waits:

        def program(comm):
            plan = plan_for(comm, TopK(0.1), D, device=DEVICE)
            before = len(waits)
            plan.start(shared(comm, 0))
            assert len(waits) > before
            plan.wait()

        virtual.results(2, program)


@pytest.mark.parametrize("way", ["ef21 topk", "ef14 sign", "ef21 of parameters"])
def test_a_backward_pass_does_not_wait_for_the_device(monkeypatch, way):
    rule, compressor, plan = {
        "ef21 topk": ("ef21", TopK(0.2), plan_for),
        "ef14 sign": ("ef14", Sign(block=1024), TwoPhaseMean),
        "ef21 of parameters": ("ef21", TopK(0.2, segments="parameters"), plan_for),
    }[way]

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(9, 40), torch.nn.Tanh(), torch.nn.Linear(40, 30), torch.nn.Tanh(),
                                   torch.nn.Linear(30, 3))

    def trained(comm, net, overlap, waits):
        if overlap:
            ways_of(comm).queue = []
        optimizer = DistributedOptimizer(sgd(net), comm, compressor, placement="gradient", rule=rule, plan=plan,
                                         overlap=overlap, bucket_nbytes=1000)
        for step in range(5):
            optimizer.zero_grad()
            torch.manual_seed(10 * step + comm.Get_rank())
            x = torch.randn(6, 9).to(TORCH_DEVICE)
            loss = net(x).square().sum()
            before = len(waits)
            with NoAnswers():
                loss.backward()
            assert len(waits) == before
            optimizer.step()
            assert optimizer.buckets.early == (len(list(optimizer.buckets)) if overlap else 0)
        return [p.detach().cpu().numpy().tobytes() for p in net.parameters()]

    with device_side():
        plain = virtual.results(2, lambda comm: trained(comm, moved(model()), False, []))
        with slow(monkeypatch, iter(lambda: False, None)) as waits:
            assert virtual.results(2, lambda comm: trained(comm, moved(model()), True, waits)) == plain
        assert waits


def test_a_broken_vector_is_said_when_the_device_has_said_so(monkeypatch):
    def program(comm):
        ways_of(comm).queue = []
        one, other = (plan_for(comm, TopK(0.1), D, device=DEVICE) for _ in range(2))
        broken = shared(comm, 0)
        if comm.Get_rank() == 1:
            broken[7] = float("nan")
        one.start(broken)
        other.start(shared(comm, 1))
        with pytest.raises(NonFiniteError) as raised:
            one.wait()
        other.wait()
        assert raised.value.ranks == (1,)
        one.exchange(shared(comm, 2))

    with slow(monkeypatch, iter(lambda: False, None)):
        virtual.results(3, program)
