"""Torch optimizers with a rule under them: schedulers, closures, changed models. Laws: see test_optimizer_laws."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import virtual
from programs import OPTIMIZERS, build_optimizer, loss_of, model, same_bits, training

from mpi_ef.collectives import Combine, GatherMean, TwoPhaseMean
from mpi_ef.compress import Identity, TopK
from mpi_ef.errors import DisagreementError, DtypeError, NonFiniteError, OptionError, PeerError, ShapeError
from mpi_ef.feedback import RULES
from mpi_ef.optim import EF21, DistributedOptimizer, EControl, Lion, ZeroOneAdam

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_world = pytest.mark.parametrize("n", [1, 2, 3, 4])


def bits(net):
    return b"".join(p.detach().numpy().tobytes() for p in net.parameters())


@each_optimizer
def test_a_loaded_state_is_shared_with_the_torch_optimizer_and_belongs_to_a_placement(name):
    def program(comm):
        one, two = (build_optimizer(name, model(), comm) for _ in range(2))
        saved = one.state_dict()
        two.load_state_dict(saved)
        assert two.param_groups is two.optimizer.param_groups
        with pytest.raises(OptionError, match="the saved placement is nowhere"):
            two.load_state_dict(saved | {"placement": "nowhere"})

    virtual.results(2, program)


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
        adam.step()
        alone.append([p.detach().numpy() for p in net.parameters()])
    for mine, a, b in zip(got, *alone, strict=True):
        np.testing.assert_allclose(mine, (a + b) / 2, atol=1e-7)


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


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda net, comm, r: EF21([*net.parameters()][r:], comm, TopK(0.5), lr=0.1),
         "disagree on the number of parameters: 8 on rank 0; 7 on rank 1; build the same model"),
        (lambda net, comm, r: EF21([torch.nn.Parameter(torch.ones(3 + r))], comm, TopK(0.5), lr=0.1),
         r"disagree on parameter 0: \(3,\) torch.float32 trained=True on rank 0; \(4,\) "),
        (lambda net, comm, r: (EF21, EControl)[r](net.parameters(), comm, TopK(0.5), lr=0.1), "disagree on rule"),
        (lambda net, comm, r: EF21(net.parameters(), comm, TopK(0.5 - r / 10), lr=0.1), "disagree on compressor"),
    ],
)
def test_ranks_that_disagree_all_learn_about_it(build, words):
    def program(comm):
        with pytest.raises(DisagreementError, match=words):
            build(model(), comm, comm.Get_rank())

    virtual.results(2, program)


def test_wrong_parameters():
    def program(comm):
        with pytest.raises(DtypeError, match="complex64"):
            EF21([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], comm, TopK(0.1), lr=1)

    virtual.results(2, program)


@pytest.mark.parametrize("placement", ["update", "gradient"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda net: net.frozen.requires_grad_(True), OptionError, "unfrozen after the optimizer"),
        (lambda net: setattr(net.unused, "data", torch.ones(2)), ShapeError, "its memory was replaced"),
    ],
)
def test_a_model_that_is_changed_on_one_rank_stops_all_ranks(placement, change, error, words):
    """Parameters without a place in the vector would let the replicas drift apart."""

    def program(comm):
        net = model()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.5), placement=placement
        )
        if comm.Get_rank() == 1:
            change(net)
        loss_of(net, comm.Get_rank(), 0).backward()
        with pytest.raises(error if comm.Get_rank() == 1 else PeerError, match=words):
            optimizer.step()

    virtual.results(3, program)


def test_an_update_that_overflows_is_told_and_leaves_parameters_and_errors():
    """Skipping it would repeat for ever: the moments hold what overflows."""

    def program(comm):
        net = model()
        optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=100.0), comm, TopK(0.5))
        before, state = bits(net), {k: v.copy() for k, v in optimizer.feedback.per_rank().items()}
        loss_of(net, comm.Get_rank(), 0).backward()
        if comm.Get_rank() == 1:
            net.last.weight.grad.fill_(1e38)
        with pytest.raises(NonFiniteError, match="NaN or Inf on rank 1"):
            optimizer.step()
        assert bits(net) == before
        assert same_bits(state, dict(optimizer.feedback.per_rank()))
        assert optimizer.skipped_steps == 0

    virtual.results(2, program)


def test_frozen_parameters_of_any_kind_are_broadcast():
    def program(comm):
        rank = comm.Get_rank()
        frozen = [torch.nn.Parameter(t, requires_grad=False) for t in (
            torch.arange(6.0).view(2, 3).t() + rank, torch.ones(3, dtype=torch.bfloat16) * rank, torch.ones(()) + rank,
            torch.ones(0))]
        EF21([torch.nn.Parameter(torch.ones(2)), *frozen], comm, TopK(0.5), lr=0.1)
        assert not frozen[0].is_contiguous()
        return [p.float().tolist() for p in frozen]

    rows = virtual.results(3, program)
    assert rows == [[[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], [0.0, 0.0, 0.0], 1.0, []]] * 3


def test_an_optimizer_that_needs_a_closure_is_refused():
    def program(comm):
        with pytest.raises(OptionError, match="LBFGS evaluates the model several times"):
            DistributedOptimizer(torch.optim.LBFGS(model().parameters()), comm, TopK(0.1))

    virtual.results(2, program)


def test_second_derivatives_do_not_disturb():
    def program(comm):
        net = model()
        optimizer = EF21(net.parameters(), comm, TopK(0.5), lr=0.1)
        with pytest.warns(UserWarning, match="create_graph"):
            loss_of(net, comm.Get_rank(), 0).backward(create_graph=True)
        optimizer.step()
        optimizer.zero_grad()

    virtual.results(1, program)


def test_topk_of_every_parameter():
    """``segments="parameters"``: every trainable parameter sends its share, at least one entry."""

    def program(comm):
        net = model()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.1, segments="parameters")
        )
        loss_of(net, comm.Get_rank(), 0).backward()
        optimizer.step()
        sizes = [p.numel() for p in optimizer.flat.parameters]
        return optimizer.feedback.plan.compressor, sizes

    compressor, sizes = virtual.results(2, program)[0]
    assert compressor.segments == tuple(sizes)
    assert compressor.count(sum(sizes)) == sum(max(1, size // 10) for size in sizes)


def test_an_update_that_overflows_in_one_bucket_leaves_all_as_they_were():
    """As test_an_update_that_overflows_is_told_and_leaves_parameters_and_errors, and every bucket is dropped."""

    def program(comm):
        net = model()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=100.0), comm, TopK(0.5), bucket_nbytes=100
        )
        assert len(list(optimizer.buckets)) > 2
        before, state = bits(net), [{k: v.copy() for k, v in b.feedback.per_rank().items()} for b in optimizer.buckets]
        for name, rank in (("last", 1), ("first", 2)):  # of different buckets
            loss_of(net, comm.Get_rank(), 0).backward()
            if comm.Get_rank() == rank:
                getattr(net, name).weight.grad.fill_(1e38)
        with pytest.raises(NonFiniteError, match="NaN or Inf on ranks 1,2; nothing was changed") as caught:
            optimizer.step()
        assert caught.value.ranks == (1, 2)
        assert bits(net) == before
        assert same_bits(state, [dict(bucket.feedback.per_rank()) for bucket in optimizer.buckets])

    virtual.results(3, program)


def test_a_state_with_other_buckets_or_arrays_is_refused():
    def program(comm):
        def build(nbytes):
            sgd = torch.optim.SGD(model().parameters(), lr=0.1)
            return DistributedOptimizer(sgd, comm, TopK(0.5), placement="gradient", bucket_nbytes=nbytes)

        whole, parts = build(None), build(100)
        with pytest.raises(OptionError, match="the saved number of buckets is [0-9]+, here it is 1; build"):
            whole.load_state_dict(parts.state_dict())
        assert whole.observer is None
        lion = Lion(model().parameters(), comm, lr=0.1)
        zero_one = ZeroOneAdam(model().parameters(), comm, lr=0.1)
        assert zero_one.local_step_interval == 1  # until the variance is frozen every step is synchronised
        for optimizer in (lion, zero_one):
            saved = optimizer.state_dict()
            with pytest.raises(ShapeError, match=r"odd is \(3,\) float32, here it is missing"):
                optimizer.load_state_dict(saved | {"arrays": saved["arrays"] | {"odd": torch.ones(3)}})

    virtual.results(2, program)


def test_where_an_object_is_in_memory_is_nothing_to_disagree_on():
    """Real ranks have functions of one rule in different places, virtual ones in the same."""

    def program(comm):
        def step(s, plan, grad):
            return (yield from RULES["ef21"].step(s, plan, grad))

        made = [dataclasses.replace(RULES["ef21"], step=step) for _ in range(2)][comm.Get_rank()]
        net = torch.nn.Linear(3, 2)
        plan = partial(GatherMean, combine=[Largest(), Largest()][comm.Get_rank()])
        DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.5), rule=made, plan=plan)

    class Largest(Combine):
        def __call__(self, rows):
            return rows.max(axis=0)

    virtual.results(2, program)
