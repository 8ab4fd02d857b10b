"""Buckets: the same bits whether they travel during the backward pass or after it, and all of them or none."""

import gc
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import virtual
from programs import loss_of, model, same_bits
from torch.utils.checkpoint import checkpoint
from training import assert_resumes, assert_skips_broken_gradients, parameters_of, seeded

from mpi_ef.collectives import TwoPhaseMean, plan_for
from mpi_ef.compress import Identity, LowRank, Quantize, Sign, TopK
from mpi_ef.errors import DisagreementError, DtypeError, MpiEfError, OptionError, PeerError
from mpi_ef.feedback import RULES
from mpi_ef.optim import EF21, DistributedOptimizer

WAYS = {
    "ef21 topk": ("ef21", TopK(0.2, values=Quantize("bf16")), plan_for),
    "ef21 topk of parameters": ("ef21", TopK(0.2, segments="parameters"), plan_for),
    "ef14 sign": ("ef14", Sign(block=16), plan_for),
    "econtrol topk": ("econtrol", TopK(0.2), plan_for),
    "ef21-sgdm two phases": ("ef21-sgdm", TopK(0.3), TwoPhaseMean),
    "ef14 identity": ("ef14", Identity(), plan_for),
    "ef14 low rank": ("ef14", LowRank(2, shapes="parameters"), plan_for),
}
each_way = pytest.mark.parametrize("way", WAYS)


def build(net, comm, way, *, overlap, bucket_nbytes=100, dense_steps=1):
    rule, compressor, plan = WAYS[way]
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)
    return DistributedOptimizer(sgd, comm, compressor, placement="gradient", rule=rule, plan=plan, overlap=overlap,
                                bucket_nbytes=bucket_nbytes, dense_steps=dense_steps)


def run(net, optimizer, rank, steps):
    early = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        optimizer.step()
        early.append(optimizer.buckets.early)
    return early


@each_way
@pytest.mark.parametrize("n", [1, 2, 3])
def test_overlap_changes_no_bit(way, n):
    def program(comm):
        outcomes = []
        for overlap in (False, True):
            net = model()
            optimizer = build(net, comm, way, overlap=overlap)
            early = run(net, optimizer, comm.Get_rank(), range(8))
            assert len(list(optimizer.buckets)) > 3
            assert (max(early) > 2) == overlap
            outcomes.append((parameters_of(net), optimizer.per_rank(), optimizer.replicated(), optimizer.sent_nbytes))
        assert same_bits(*outcomes)
        return outcomes[0][0]

    rows = virtual.results(n, program)
    assert all(same_bits(row, rows[0]) for row in rows)


def test_one_bucket_is_the_whole_vector_and_buckets_hold_whole_parameters_the_last_first():
    def program(comm):
        for nbytes, least in ((None, 1), (10**9, 1), (100, 4), (1, 6)):
            optimizer = build(model(), comm, "ef14 sign", overlap=False, bucket_nbytes=nbytes)
            buckets, flat = list(optimizer.buckets), optimizer.flat
            assert len(buckets) >= least
            assert (len(buckets) == 1) == (least == 1)
            numbers = [number for bucket in buckets[::-1] for number in bucket.numbers]
            assert numbers == list(range(len(flat.parameters)))
            assert [bucket.part for bucket in buckets[::-1]] == [
                slice(flat.starts[b.numbers.start], flat.starts[b.numbers.stop]) for b in buckets[::-1]]

    virtual.results(2, program)


def test_gradients_add_up_without_travelling():
    """no_sync() around all but the last backward pass equals one backward pass of the sum."""

    def program(comm):
        rank, nets = comm.Get_rank(), [model(), model()]
        apart, together = (build(net, comm, "ef21 topk", overlap=True) for net in nets)
        for step in range(5):
            apart.zero_grad()
            with apart.no_sync():
                loss_of(nets[0], rank, 2 * step).backward()
                assert apart.sent_nbytes == together.sent_nbytes
            loss_of(nets[0], rank, 2 * step + 1).backward()
            apart.step()
            together.zero_grad()
            (loss_of(nets[1], rank, 2 * step) + loss_of(nets[1], rank, 2 * step + 1)).backward()
            together.step()
        for a, b in zip(*map(parameters_of, nets), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert apart.buckets.early > 2

    virtual.results(2, program)


def test_parameters_unused_on_some_ranks_only():
    """Nobody hangs: what has not started during the backward pass starts in step()."""

    def program(comm):
        outcomes = []
        for overlap in (False, True):
            branches = seeded(torch.nn.ModuleList(torch.nn.Linear(7, 3) for _ in range(4)))
            optimizer = EF21(branches.parameters(), comm, TopK(0.5), lr=0.1, overlap=overlap)
            for step in range(4):
                optimizer.zero_grad(set_to_none=True)
                chosen = branches[(comm.Get_rank() + step) % 4]
                chosen(torch.full((2, 7), 1.0 + step)).square().sum().backward()
                optimizer.step()
            outcomes.append(parameters_of(branches))
        assert same_bits(*outcomes)
        return outcomes[0]

    rows = virtual.results(3, program)
    assert all(same_bits(row, rows[0]) for row in rows)


def test_gradients_set_to_none_by_the_model():
    def program(comm):
        nets = [model(), model()]
        for net in nets:
            optimizer = build(net, comm, "ef21 topk", overlap=True)
            for step in range(4):
                (net if net is nets[0] else optimizer).zero_grad(set_to_none=True)
                loss_of(net, comm.Get_rank(), step).backward()
                optimizer.step()
        assert same_bits(*map(parameters_of, nets))

    virtual.results(2, program)


@pytest.mark.parametrize("overlap", [False, True])
@each_way
def test_a_broken_gradient_in_one_bucket_leaves_all_buckets_as_they_were(way, overlap):
    assert_skips_broken_gradients(2, lambda net, comm: build(net, comm, way, overlap=overlap))


@pytest.mark.parametrize("way", ["ef21 topk", "ef14 sign", "ef14 low rank"])
def test_saved_and_loaded_a_step_is_the_same(way):
    assert_resumes(2, lambda net, comm: build(net, comm, way, overlap=True), before=3)


def test_a_second_backward_pass_is_told():
    """Also where the first one raised: what it had sent is gone. Without overlap the batch can be repeated."""

    def program(comm):
        for raises in (False, True):
            net = model()
            optimizer = build(net, comm, "ef21 topk", overlap=True)
            run(net, optimizer, comm.Get_rank(), range(1))
            optimizer.zero_grad()
            hook = net.first.weight.register_hook(broken) if raises else None
            with pytest.raises(ValueError, match="in the middle") if hook else nullcontext():
                loss_of(net, comm.Get_rank(), 0).backward()
            if hook:
                hook.remove()
            optimizer.zero_grad()
            with pytest.raises(OptionError, match="a second backward pass before step") as told:
                loss_of(net, comm.Get_rank(), 1).backward()
            assert "also where that one raised, cannot be taken back" in str(told.value)
            assert "`with optimizer.no_sync():`" in str(told.value)
            assert "overlap=False to repeat a backward pass" in str(told.value)

    def broken(grad):
        raise ValueError("in the middle")

    virtual.results(2, program)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_layer_that_one_rank_does_not_use_in_dense_steps_hangs_nobody(forgets):
    """The plan of the dense steps is built on all ranks together, and the backward pass is not where all are."""

    def program(comm):
        nets = [model(), model()]
        optimizers = [build(net, comm, "ef21 topk", overlap=net is nets[1]) for net in nets]
        early = []
        for step in range(5):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                if forgets and step == 2:
                    optimizer.forget()
                if (comm.Get_rank() + step) % 2:
                    loss_of(net, comm.Get_rank(), step).backward()
                else:
                    net.first(torch.full((2, 7), 1.0 + comm.Get_rank())).square().mean().backward()
                optimizer.step()
            early.append(optimizers[1].buckets.early)
        assert any(early)  # in other steps they travel during the backward pass
        assert same_bits(*map(parameters_of, nets))

    virtual.results(2, program)


def test_a_whole_step_that_is_told_builds_nothing_in_a_backward_pass():
    """As MARINA's: its dense plan is built where all ranks come, also those that do not use a layer."""
    def program(comm):
        nets = [model() for _ in range(2)]
        optimizers = [build(net, comm, "ef21 topk", overlap=overlap, dense_steps=0)
                      for net, overlap in zip(nets, (False, True), strict=True)]
        for step in range(4):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                for channel in optimizer.channels():
                    channel.tell(whole=step % 2 == 1)
                if comm.Get_rank():
                    loss_of(net, comm.Get_rank(), step).backward()
                else:
                    net.first(torch.full((2, 7), 2.0)).square().mean().backward()
                optimizer.step()
        assert same_bits(*map(parameters_of, nets))

    virtual.results(2, program)


def test_no_state_is_loaded_between_a_backward_pass_and_its_step():
    """What was sent has been made of the state before: ranks that have sent less would build and send something else."""
    def program(comm):
        net = model()
        optimizer = build(net, comm, "ef21 topk", overlap=True, dense_steps=3)
        run(net, optimizer, comm.Get_rank(), range(2))
        saved, before = optimizer.state_dict(), deepcopy(net.state_dict())
        optimizer.zero_grad()
        loss_of(net, comm.Get_rank(), 2).backward()
        for act in (lambda: optimizer.load_state_dict(saved), optimizer.forget, lambda: optimizer.feedback.tell(whole=True)):
            with pytest.raises(OptionError, match="a step is under way"):
                act()
        optimizer.step()
        after = parameters_of(net)
        optimizer.load_state_dict(saved)
        net.load_state_dict(before)
        run(net, optimizer, comm.Get_rank(), [2])
        assert same_bits(parameters_of(net), after)

    virtual.results(2, program)


def test_nothing_is_sent_for_an_optimizer_that_is_gone():
    """Its hooks stay with the parameters: the model is trained on without ranks, or evaluated."""

    def program(comm):
        net = model()
        optimizer = build(net, comm, "ef21 topk", overlap=True)
        run(net, optimizer, comm.Get_rank(), range(2))
        buckets = optimizer.buckets
        del optimizer
        gc.collect()
        for step in range(2):
            loss_of(net, comm.Get_rank(), step).backward()
        buckets.wait(np.zeros(sum(p.numel() for p in net.parameters()), np.float32))
        return buckets.early

    assert virtual.results(2, program) == [0, 0]


def test_ranks_that_drift_apart_are_told_although_buckets_are_under_way():
    def program(comm):
        net = model()
        optimizer = build(net, comm, "ef21 topk", overlap=True)
        run(net, optimizer, comm.Get_rank(), range(2))
        before = parameters_of(net), {k: v.copy() for k, v in optimizer.per_rank().items()}
        optimizer.param_groups[0]["lr"] = 0.1 + comm.Get_rank()
        with pytest.raises(DisagreementError, match="hyper-parameters"):
            run(net, optimizer, comm.Get_rank(), [2])
        assert same_bits((parameters_of(net), optimizer.per_rank()), before)
        optimizer.param_groups[0]["lr"] = 0.1
        run(net, optimizer, comm.Get_rank(), [3])

    virtual.results(2, program)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_fails_on_one_rank_before_its_message_is_told_on_all(overlap):
    """Whatever it is: a sparse gradient in place of one that was sent, a device that has no memory left for a norm."""
    def program(comm):
        net = model()
        optimizer = build(net, comm, "ef21 topk", overlap=overlap)
        run(net, optimizer, comm.Get_rank(), range(2))
        loss_of(net, comm.Get_rank(), 2).backward()
        if last := comm.Get_rank() == comm.Get_size() - 1:
            weight = net.get_parameter(next(name for name, p in net.named_parameters() if p.ndim == 2))
            weight.grad = weight.grad.to_sparse()
        with pytest.raises(OptionError if last and overlap else DtypeError if last else PeerError):
            optimizer.step()
        optimizer.zero_grad()
        loss_of(net, comm.Get_rank(), 2).backward()
        collected = optimizer.flat.collected
        if last:
            optimizer.flat.collected = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError if last else PeerError, match="division by zero"):
            optimizer.step()
        optimizer.flat.collected = collected
        run(net, optimizer, comm.Get_rank(), [2])
        assert optimizer.steps == 3

    virtual.results(2, program)


@pytest.mark.parametrize("ranks", [(1,), (0, 1)], ids=["one", "all"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_rule_that_fails_before_its_message_is_told_on_all(overlap, ranks):
    """Also on all ranks, of which some come to the bucket in the backward pass, others in the step."""
    broken = set()

    def failing(s, plan, grad):
        if plan.rank in broken:
            raise KeyError("nothing by that name")
        return (yield from RULES["ef21"].step(s, plan, grad))

    def program(comm):
        rank, net = comm.Get_rank(), model()
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        optimizer = DistributedOptimizer(sgd, comm, TopK(0.2), placement="gradient", overlap=overlap, bucket_nbytes=100,
                                         rule=replace(RULES["ef21"], step=failing))
        run(net, optimizer, rank, range(2))
        before = parameters_of(net), {k: v.copy() for k, v in optimizer.per_rank().items()}
        for step in range(2):
            optimizer.zero_grad()
            if rank:
                net.first(torch.full((2, 7), 2.0)).square().mean().backward()
            comm.Barrier()
            if rank in ranks:
                broken.add(rank)
            if not rank:
                loss_of(net, rank, step).backward()
            error = OptionError if rank in ranks else PeerError
            with pytest.raises(error, match="rule failing: KeyError: 'nothing by that"):
                optimizer.step()
            broken.discard(rank)
        assert same_bits((parameters_of(net), optimizer.per_rank()), before)
        run(net, optimizer, rank, [2])
        return parameters_of(net)

    one, other = virtual.results(2, program)
    assert same_bits(one, other)


def test_ranks_that_step_different_optimizers_are_told_although_buckets_are_under_way():
    """Of which not all ranks have sent the same: a layer is not used on one. It goes on after one more failed step."""
    def program(comm):
        nets, rank = [model() for _ in range(2)], comm.Get_rank()
        optimizers = [build(net, comm, "ef21 topk", overlap=True) for net in nets]

        def backward(step):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                if rank and net is nets[0]:
                    net.first(torch.full((2, 7), 2.0)).square().mean().backward()
                else:
                    loss_of(net, rank, step).backward()

        for step in range(2):
            backward(step)
            for optimizer in optimizers:
                optimizer.step()
        backward(2)
        with pytest.raises(DisagreementError, match="the optimizer that takes a step"):
            optimizers[rank].step()
        with pytest.raises(OptionError, match="a second backward pass"):
            backward(3)
        for optimizer in optimizers:
            with pytest.raises(MpiEfError, match="a second backward pass"):
                optimizer.step()
        backward(3)
        for optimizer in optimizers:
            optimizer.step()
            assert optimizer.steps == 3

    virtual.results(2, program)


@pytest.mark.parametrize(("options", "text"), [
    ({"placement": "update", "overlap": True}, "overlap=True with placement='update'"),
    ({"placement": "gradient", "bucket_nbytes": 0}, "bucket_nbytes=0 is not a positive integer"),
])
def test_bad_options(options, text):
    def program(comm):
        DistributedOptimizer(torch.optim.SGD(model().parameters(), lr=1), comm, TopK(0.1), **options)

    for outcome in virtual.run(2, program):
        assert isinstance(outcome, MpiEfError)
        assert text in str(outcome)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_observer_sees_every_bucket(overlap):
    def program(comm):
        net, seen = model(), []
        optimizer = build(net, comm, "ef21 topk", overlap=overlap)
        run(net, optimizer, comm.Get_rank(), range(2))
        optimizer.observer = seen.append
        before = optimizer.sent_nbytes
        run(net, optimizer, comm.Get_rank(), range(2, 4))
        optimizer.observer = None
        run(net, optimizer, comm.Get_rank(), [4])
        assert [[report.step for report in reports] for reports in seen] == [[step] * len(list(optimizer.buckets))
                                                                            for step in (3, 4)]
        last = optimizer.sent_nbytes - before
        assert sum(report.sent_nbytes for reports in seen for report in reports) * 3 == last * 2
        for report in (report for reports in seen for report in reports):
            assert 0 <= report.lost < 1
            assert set(report.norms) == {"g_i", "g"}
            assert all(spent >= 0 for spent in report.seconds.values())
            assert report.dense_nbytes > 0

    virtual.results(2, program)


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_replicas_that_differ_are_named(placement):
    def program(comm):
        net = model()
        sgd = torch.optim.SGD(net.named_parameters(), lr=0.05)
        optimizer = DistributedOptimizer(sgd, comm, TopK(0.2), placement=placement)
        optimizer.check_replicas_every = 2
        run(net, optimizer, comm.Get_rank(), range(4))
        with torch.no_grad():
            net.last.weight[1, 2] += 1e-6 * (comm.Get_rank() == 1)
        with pytest.raises(DisagreementError) as caught:
            run(net, optimizer, comm.Get_rank(), range(4, 8))
        return str(caught.value), optimizer.steps

    for text, steps in virtual.results(3, program):
        assert "after step 4 parameter last.weight (3, 5) is not on rank 1 what it is on rank 0" in text
        assert steps == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_checkpointed_twice(reentrant):
    """Each of its backward passes is one of its own where torch's checkpoints are reentrant: the message knows that."""

    def program(comm, *, overlap):
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_()
        with torch.no_grad():
            for number, p in enumerate(net.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape) + number)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, comm, TopK(0.5), placement="gradient", overlap=overlap)
        for step in range(3):
            x = torch.full((2, 4), 0.1 * (comm.Get_rank() + step + 1), requires_grad=True)
            twice = sum(checkpoint(net[0], factor * x, use_reentrant=reentrant) for factor in (1, 2))
            net[1](twice).square().mean().backward()
            optimizer.step()
        return [p.detach().numpy().copy() for p in net.parameters()]

    wanted = virtual.results(2, lambda comm: program(comm, overlap=False))
    if not reentrant:
        assert same_bits(virtual.results(2, lambda comm: program(comm, overlap=True)), wanted)
        return
    for error in virtual.run(2, lambda comm: program(comm, overlap=True)):
        assert isinstance(error, OptionError)
        assert "pass use_reentrant=False" in str(error)
