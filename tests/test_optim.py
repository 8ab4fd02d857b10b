"""Optimizers on virtual ranks: replicas, state, schedulers, closures, broken gradients."""

import numpy as np
import pytest
import torch
import virtual
from programs import OPTIMIZERS, build_optimizer, loss_of, model, same_bits, training

from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.compress import Identity, TopK
from mpi_ef.errors import DisagreementError, DtypeError, OptionError
from mpi_ef.optim import EF21, DistributedOptimizer, EControl

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_world = pytest.mark.parametrize("n", [1, 2, 3, 4])


def bits(net):
    return b"".join(p.detach().numpy().tobytes() for p in net.parameters())


@each_optimizer
@each_world
def test_replicas_are_equal_and_learn(name, n):
    rows = virtual.results(n, training(name, 60))
    for parameters, _ in rows[1:]:
        assert same_bits(parameters, rows[0][0])
    for _, losses in rows:
        assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


@each_world
def test_identity_on_the_gradient_is_the_optimizer_on_the_mean_gradient(n):
    """Law 4, against torch alone with the same-order mean of the gradients of all ranks."""
    rows = virtual.results(n, training("sgd gradient", 10))
    net = model()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(10):
        grads = []
        for rank in range(n):
            net.zero_grad()
            loss_of(net, rank, step).backward()
            grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()])
        for number, p in enumerate(net.parameters()):
            p.grad = torch.zeros_like(p)
            for rank in range(n):
                p.grad += grads[rank][number] * np.float32(1 / n)
        sgd.step()
    for mine, p in zip(rows[0][0], net.parameters(), strict=True):
        assert mine.tobytes() == p.detach().numpy().tobytes()


def test_identity_on_the_update_is_the_mean_of_the_updates():
    def program(comm):
        net = model()
        optimizer = DistributedOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-2), comm, Identity())
        loss_of(net, comm.Get_rank(), 0).backward()
        optimizer.step()
        return [p.detach().numpy().copy() for p in net.parameters()]

    got = virtual.results(2, program)[0]
    alone = []
    for rank in range(2):
        net = model()
        adam = torch.optim.AdamW(net.parameters(), lr=1e-2)
        loss_of(net, rank, 0).backward()
        net.unused.grad = torch.zeros(3)  # the one difference: a parameter without gradient takes part with zeros
        adam.step()
        alone.append([p.detach().numpy() for p in net.parameters()])
    for mine, a, b in zip(got, *alone, strict=True):
        np.testing.assert_allclose(mine, (a + b) / 2, atol=1e-7)


@each_optimizer
def test_save_load_step_is_step(name):
    """Law 7: through torch.save-able state dictionaries, into new objects."""

    def program(comm):
        rank = comm.Get_rank()

        def steps(net, optimizer, start, stop):
            for step in range(start, stop):
                optimizer.zero_grad()
                loss_of(net, rank, step).backward()
                optimizer.step()

        one = model()
        first = build_optimizer(name, one, comm)
        steps(one, first, 0, 5)
        saved_model, saved = {k: v.clone() for k, v in one.state_dict().items()}, first.state_dict()
        two = model()
        second = build_optimizer(name, two, comm)
        two.load_state_dict(saved_model)
        second.load_state_dict(saved)
        steps(one, first, 5, 9)
        steps(two, second, 5, 9)
        assert bits(one) == bits(two)
        assert second.param_groups is second.optimizer.param_groups
        with pytest.raises(OptionError, match="the saved placement is 'nowhere'"):
            second.load_state_dict(saved | {"placement": "nowhere"})

    virtual.results(2, program)


@each_optimizer
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_gradient_on_one_rank_is_skipped_by_all(name, value):
    def program(comm):
        rank = comm.Get_rank()
        net = model()
        optimizer = build_optimizer(name, net, comm)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, rank, step).backward()
            optimizer.step()
        before, state = bits(net), optimizer.state_dict()
        moments = [p["exp_avg"].clone() for p in optimizer.state.values() if "exp_avg" in p]
        optimizer.zero_grad()
        loss_of(net, rank, 3).backward()
        if rank == 1:
            net.last.weight.grad[1, 1] = value
        optimizer.step()
        assert bits(net) == before
        assert optimizer.skipped_steps == 1
        assert same_bits(state["feedback"]["arrays"], optimizer.state_dict()["feedback"]["arrays"])
        after = [p["exp_avg"] for p in optimizer.state.values() if "exp_avg" in p]
        assert all((a == b).all() for a, b in zip(moments, after, strict=True))
        optimizer.zero_grad()
        loss_of(net, rank, 4).backward()
        optimizer.step()
        assert bits(net) != before
        return bits(net)

    with pytest.warns(RuntimeWarning, match="skipped: .*NaN or Inf on rank 1") as caught:
        rows = virtual.results(3, program)
    assert len(set(rows)) == 1
    assert len(caught) == 1  # rank 0 speaks for all


@each_world
def test_rank_zero_s_parameters_win(n):
    def program(comm):
        net = model()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(comm.Get_rank())
        EF21(net.parameters(), comm, TopK(0.1), lr=0.1)
        return bits(net)

    assert set(virtual.results(n, program)) == {bits(model())}


def test_learning_rate_schedulers_and_groups():
    def program(comm):
        net = model()
        named = list(net.parameters())
        groups = [{"params": named[:2], "lr": 0.1}, {"params": named[2:], "lr": 0.2}]
        optimizer = DistributedOptimizer(torch.optim.SGD(groups), comm, TopK(0.5))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        loss_of(net, 0, 0).backward()
        optimizer.step()
        scheduler.step()
        return [group["lr"] for group in optimizer.optimizer.param_groups]

    assert virtual.results(2, program) == [[0.05, 0.1]] * 2


def test_closure():
    def program(comm):
        net = model()
        optimizer = EControl(net.parameters(), comm, TopK(0.5), lr=0.1)
        before = bits(net)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), 0)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.item() > 0
        assert bits(net) != before

    virtual.results(2, program)


def test_any_plan_can_be_chosen():
    def program(comm):
        net = model()
        optimizer = EF21(net.parameters(), comm, TopK(0.5), lr=0.1, plan=TwoPhaseMean)
        loss_of(net, comm.Get_rank(), 0).backward()
        optimizer.step()
        assert isinstance(optimizer.feedback.plan, TwoPhaseMean)
        return bits(net)

    assert len(set(virtual.results(3, program))) == 1


def test_groups_cannot_be_added_later():
    def program(comm):
        optimizer = EF21(model().parameters(), comm, TopK(0.5), lr=0.1)
        with pytest.raises(OptionError, match="a group cannot be added later"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})

    virtual.results(1, program)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda net, comm, r: EF21([*net.parameters()][r:], comm, TopK(0.5), lr=0.1),
         "disagree on the number of parameters: 8 on rank 0; 7 on rank 1; build the same model"),
        (lambda net, comm, r: EF21([torch.nn.Parameter(torch.ones(3 + r))], comm, TopK(0.5), lr=0.1),
         r"disagree on parameter 0: \(3,\) trained=True on rank 0; \(4,\) trained=True on rank 1"),
        (lambda net, comm, r: EF21(net.parameters(), comm, TopK(0.5), lr=0.1 + r), "disagree on hyper-parameters"),
        (lambda net, comm, r: (EF21, EControl)[r](net.parameters(), comm, TopK(0.5), lr=0.1), "disagree on rule"),
        (lambda net, comm, r: EF21(net.parameters(), comm, TopK(0.5), lr=0.1, dense_steps=r), "disagree on dense_steps"),
        (lambda net, comm, r: EF21(net.parameters(), comm, TopK(0.5 - r / 10), lr=0.1), "disagree on compressor"),
    ],
)  # fmt: skip
def test_ranks_that_disagree_all_learn_about_it(build, words):
    def program(comm):
        with pytest.raises(DisagreementError, match=words):
            build(model(), comm, comm.Get_rank())

    virtual.results(2, program)


def test_wrong_arguments():
    def program(comm):
        with pytest.raises(OptionError, match="placement='sideways' is unknown"):
            DistributedOptimizer(torch.optim.SGD(model().parameters(), lr=1), comm, TopK(0.1), placement="sideways")
        with pytest.raises(DtypeError, match="bfloat16"):
            EF21(model().bfloat16().parameters(), comm, TopK(0.1), lr=1)

    virtual.results(2, program)
