"""What torch programs do with parameters, gradients and groups between steps, and with uneven data; with any optimizer."""

import copy
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
import virtual
from optimizer_table import ROWS, UNKNOWN_PLACE, rows
from programs import same_bits
from training import assert_resumes, everything, loss_in, net_of, parameters_of, steps_of

from mpi_ef import Training
from mpi_ef.collectives import TwoPhaseMean, plan_for
from mpi_ef.comm.consensus import agree
from mpi_ef.compress import Identity, TopK, Vote
from mpi_ef.errors import DisagreementError, OptionError, PeerError
from mpi_ef.optim import EF21, DistributedOptimizer, OneBitAdam, OneBitLamb, ZeroOneAdam

EXHAUSTIVE = pytest.mark.exhaustive
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FAR = 64.0  # whatever is written is so far away that a step cannot get there


def settled(net, optimizer, comm, steps=16):
    """Take some steps, and let parameters be the same on all ranks."""
    steps_of(net, optimizer, comm.Get_rank(), range(steps))
    optimizer.synchronize()


@pytest.mark.parametrize("row", ["EF21", "OneBitAdam", "AdamW updates"])
@DTYPES
def test_a_layer_that_is_saved_alone_is_all_that_is_written(row, dtype):
    """Parameters are views of one vector; torch.save writes the whole storage of what it is given."""

    def program(comm):
        net = net_of(dtype)
        steps_of(net, ROWS[row](net, comm), comm.Get_rank(), range(3))
        for p in net.parameters():
            for tensor in (p, *([] if p.grad is None else [p.grad])):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes

    virtual.results(1, program)


# ---- writing weights


@torch.no_grad()
def copy_into(net):
    for p in net.parameters():
        p.copy_(torch.full_like(p, FAR))


def through_data(net):
    for p in net.parameters():
        p.data.fill_(FAR)


def other_data(net):
    for p in net.parameters():
        p.data = torch.full_like(p, FAR)


def load(net):
    net.load_state_dict({name: torch.full_like(value, FAR) for name, value in net.state_dict().items()})


@pytest.mark.parametrize(("write", "dtype"), [
    (copy_into, torch.bfloat16), (through_data, torch.bfloat16), (other_data, torch.float32), (other_data, torch.bfloat16),
    (load, torch.float32), (load, torch.bfloat16),
])
@rows()
def test_written_weights_stay_written(row, write, dtype):
    def program(comm):
        net = net_of(dtype)
        optimizer = row(net, comm)
        settled(net, optimizer, comm)
        write(net)
        for step in range(2):
            for number, p in enumerate(net.parameters()):
                p.grad = torch.full_like(p, 1e-3 * (1 + step + number + comm.Get_rank()))
            optimizer.step()
        optimizer.synchronize()
        return [p.detach().float().numpy() for p in net.parameters()]

    runs = virtual.results(2, program)
    assert same_bits(*runs)
    for p in runs[0]:
        assert (np.abs(p - FAR) < 8).all()


@DTYPES
def test_writing_between_synchronisations_is_one_line(dtype):
    def program(comm):
        net = net_of(dtype)
        optimizer = ROWS["ZeroOneAdam"](net, comm)
        steps_of(net, optimizer, comm.Get_rank(), range(26))
        assert not optimizer.synchronized
        before = copy.deepcopy(optimizer.per_rank() | optimizer.replicated())
        with torch.no_grad():
            net.last.weight[1, 2] += float(comm.Get_rank() == 1)
        words = "number 5"
        with pytest.raises(
            OptionError if comm.Get_rank() else PeerError, match=rf"{words}.* between two synchronisations"
        ):
            steps_of(net, optimizer, comm.Get_rank(), range(26, 27))
        assert optimizer.steps == 26
        assert same_bits(optimizer.per_rank() | optimizer.replicated(), before)

    virtual.results(2, program)


@rows()
@pytest.mark.parametrize("before", [3, 14, 26])
def test_a_model_in_16_bits_goes_on_to_the_last_bit(row, before):
    assert_resumes(2, row, before=before, after=6, dtype=torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_moments_from_before_the_wrapping_are_kept(placement, dtype):
    def program(comm):
        net = net_of(dtype)
        adam = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(5):
            adam.zero_grad()
            loss_in(net, 0, step).backward()
            adam.step()
        moments = [adam.state[p]["exp_avg"].float().clone() for p in net.parameters() if p in adam.state]
        assert len(moments) > 3
        optimizer = DistributedOptimizer(adam, comm, Identity(), placement=placement)
        optimizer.zero_grad()
        for p in net.parameters():
            if p.requires_grad and p is not net.unused:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        after = [optimizer.state[p]["exp_avg"] for p in net.parameters() if p in optimizer.state]
        for a, b in zip(after, moments, strict=True):
            torch.testing.assert_close(a, 0.9 * b)

    virtual.results(2, program)


# ---- clearing and clipping gradients


def by_model(net, _):
    net.zero_grad()


def one_by_one(net, _):
    for p in net.parameters():
        p.grad = None


def to_zero(net, _):
    net.zero_grad(set_to_none=False)


def to_zero_by_optimizer(_, optimizer):
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(("clear", "dtype"), [
    (by_model, torch.bfloat16), (one_by_one, torch.float32), pytest.param(to_zero, torch.bfloat16, marks=EXHAUSTIVE),
    (to_zero_by_optimizer, torch.bfloat16), (to_zero_by_optimizer, torch.float32),
])
@rows()
def test_gradients_are_cleared_however_it_is_done(row, clear, dtype):
    def program(comm):
        nets = [net_of(dtype), net_of(dtype)]
        optimizers = [row(net, comm) for net in nets]
        for step in range(16):
            for net, optimizer, do in zip(nets, optimizers, (clear, lambda _, o: o.zero_grad()), strict=True):
                do(net, optimizer)
                loss_in(net, comm.Get_rank(), step).backward()
                optimizer.step()
        return all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))

    assert virtual.results(2, program) == [True, True]


def test_the_wrapped_optimizer_clears_them_too():
    def program(comm):
        net = net_of(torch.bfloat16)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, comm, Identity(), placement="gradient")
        loss_in(net, comm.Get_rank(), 0).backward()
        sgd.zero_grad()
        optimizer.flat.collect_gradients()
        return optimizer.flat.gradients.any()

    assert virtual.results(2, program) == [False, False]


@DTYPES
@pytest.mark.parametrize("clip", [
    lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5),
    lambda net: torch.nn.utils.clip_grad_value_(net.parameters(), 1e-3),
], ids=["norm", "value"])
@rows()
def test_clipping_by_torch_clips(row, clip, dtype):
    def program(comm):
        net = net_of(dtype)
        optimizer = row(net, comm)
        seen = []
        update = optimizer.update
        optimizer.update = lambda: (seen.append(optimizer.flat.gradients.copy()), update())
        for step in range(16):
            optimizer.zero_grad()
            (100 * loss_in(net, comm.Get_rank(), step)).backward()
            clip(net)
            expected = torch.cat([(0 * p if p.grad is None else p.grad).detach().float().reshape(-1)
                                  for p in optimizer.flat.parameters]).numpy()
            optimizer.step()
            np.testing.assert_array_equal(seen[-1], expected)
            assert 0 < np.linalg.norm(seen[-1]) < 0.51
            assert dtype == torch.float32 or np.abs(seen[-1]).max() > 0

    virtual.results(2, program)


@DTYPES
@pytest.mark.parametrize("through", ["torch", "data"])
def test_gradients_that_have_left_cannot_be_changed(through, dtype):
    def program(comm):
        net = net_of(dtype)
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        optimizer = DistributedOptimizer(sgd, comm, TopK(0.2), placement="gradient", rule="ef21", overlap=True,
                                         bucket_nbytes=60)
        steps_of(net, optimizer, comm.Get_rank(), range(3))
        before = everything(net, optimizer, "exchanges", "sent_nbytes")
        optimizer.zero_grad()
        loss_in(net, comm.Get_rank(), 3).backward()
        if comm.Get_rank() == 1 and through == "torch":
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        elif comm.Get_rank() == 1:
            net.last.weight.grad.data.mul_(0.5)
        words = "was changed after it had been sent"
        with pytest.raises(OptionError if comm.Get_rank() == 1 else PeerError, match=words):
            optimizer.step()
        assert same_bits(everything(net, optimizer, "exchanges", "sent_nbytes"), before)
        steps_of(net, optimizer, comm.Get_rank(), range(4, 6))
        return parameters_of(net)

    assert same_bits(*virtual.results(2, program))


# ---- parameters without gradient


@pytest.mark.parametrize(("when", "dtype"), [(4, torch.float32), (14, torch.bfloat16), (25, torch.float32)])
@rows()
def test_a_layer_frozen_in_mid_training_stays_and_may_train_again(row, when, dtype):
    def program(comm):
        rank, net = comm.Get_rank(), net_of(dtype)
        optimizer = row(net, comm)
        steps_of(net, optimizer, rank, range(when))
        optimizer.synchronize()
        frozen, before = [*net.first.parameters()], copy.deepcopy([*net.first.parameters()])
        for p in frozen:
            p.requires_grad_(False)
            p.grad = None
        path = steps_of(net, optimizer, rank, range(when, when + 12))
        assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
        assert not same_bits(path[0], path[-1])
        for p in frozen:
            p.requires_grad_(True)
        steps_of(net, optimizer, rank, range(when + 12, when + 40))
        assert not all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
        optimizer.synchronize()
        return parameters_of(net)

    assert same_bits(*virtual.results(2, program))


@rows()
def test_a_parameter_that_one_rank_does_not_use_moves_on_all(row):
    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = row(net, comm)
        before, moved = net.unused.detach().clone(), False
        for step in range(16):
            optimizer.zero_grad()
            loss = loss_in(net, rank, step)
            (loss + (net.unused.sum() * step if rank == 1 else 0)).backward()
            optimizer.step()
            moved = moved or not torch.equal(net.unused, before)
        optimizer.synchronize()
        assert moved
        return parameters_of(net)

    assert same_bits(*virtual.results(2, program))


# ---- groups, and what the torch optimizer does by itself


def test_the_wrapped_optimizer_may_load_its_own_state():
    def program(comm):
        net = torch.nn.Linear(4, 1)
        inner = torch.optim.SGD(net.parameters(), lr=1.0)
        saved = copy.deepcopy(inner.state_dict())
        optimizer = DistributedOptimizer(inner, comm, Identity(), placement="gradient")
        inner.load_state_dict(saved)
        scheduler, moved = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1), []
        for _ in range(4):
            before = net.weight.detach().clone()
            optimizer.zero_grad()
            (net(torch.ones(1, 4)).sum() * (0.5 + comm.Get_rank())).backward()
            optimizer.step()
            scheduler.step()
            moved.append(float((before - net.weight.detach()).abs().max()))
        np.testing.assert_allclose(moved, [1, 0.1, 0.01, 0.001], rtol=1e-3)

    virtual.results(2, program)


def test_a_group_that_the_wrapped_optimizer_gets_later_is_one_line_on_all_ranks():
    def program(comm):
        net = net_of()
        inner = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(inner, comm, TopK(0.2))
        steps_of(net, optimizer, comm.Get_rank(), range(2))
        if comm.Get_rank() == 1:
            inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        words = "other parameters than at construction"
        with pytest.raises(OptionError if comm.Get_rank() == 1 else PeerError, match=words):
            steps_of(net, optimizer, comm.Get_rank(), range(1))

    virtual.results(2, program)


@rows()
def test_a_torch_state_is_refused_in_one_line(row):
    def program(comm):
        net = net_of()
        optimizer = row(net, comm)
        with pytest.raises(OptionError) as caught:
            optimizer.load_state_dict(torch.optim.Adam(net.parameters()).state_dict())
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250

    virtual.results(1, program)


# ---- ranks that do not mean the same


@rows()
def test_parameters_in_another_order_are_noticed(row):
    def program(comm):
        net = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in "abcd"})
        with torch.no_grad():
            for number, p in enumerate(net.parameters()):
                p.copy_(torch.from_numpy(np.random.default_rng(number).normal(size=(4, 4))))
        before, listed = [p.detach().clone() for p in net.parameters()], [*net.parameters()]
        with pytest.raises(DisagreementError, match="number 0 .* of rank 0 is number 3 on rank 1: .*different orders"):
            row.make(listed[:: -1 if comm.Get_rank() else 1], comm, **row.options)
        assert all(torch.equal(p.detach(), q) for p, q in zip(net.parameters(), before, strict=True))

    virtual.results(2, program)


def test_names_are_compared_where_there_are_some():
    def program(comm):
        net = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in "ab"})
        torch.nn.init.constant_(net["a"].weight, comm.Get_rank())
        named = [*net.named_parameters()][:: -1 if comm.Get_rank() else 1]
        with pytest.raises(DisagreementError, match=r"parameter 0: a.weight \(4, 4\).* on rank 0; b.weight"):
            DistributedOptimizer(torch.optim.SGD(named, lr=0.1), comm, TopK(0.5))

    virtual.results(2, program)


@rows()
def test_two_optimizers_in_another_order_are_noticed(row):
    def program(comm):
        nets = [net_of(), net_of()]
        optimizers = [row(net, comm) for net in nets]
        for net in nets:
            loss_in(net, comm.Get_rank(), 0).backward()
        words = "disagree on the optimizer that takes a step: number .* on rank 0; number .* on rank 1"
        for number in (0, 1) if comm.Get_rank() == 0 else (1, 0):
            with pytest.raises(DisagreementError, match=words):
                optimizers[number].step()
        for optimizer in optimizers:
            optimizer.step()

    virtual.results(2, program)


@DTYPES
@rows()
def test_weights_that_one_rank_alone_has_loaded_are_noticed(row, dtype):
    def program(comm):
        net = net_of(dtype)
        optimizer = row(net, comm)
        if comm.Get_rank() == 1:
            with torch.no_grad():
                net.last.weight += 1
        before = everything(net, optimizer)
        with pytest.raises(
            DisagreementError, match=r"parameter number 5 \(3, 5\) is not on rank 1 what it is on rank 0"
        ):
            steps_of(net, optimizer, comm.Get_rank(), range(1))
        assert same_bits(everything(net, optimizer), before)

    virtual.results(3, program)


def test_another_interval_of_comparing_is_one_line():
    def program(comm):
        net = net_of()
        optimizer = EF21(net.parameters(), comm, TopK(0.2), lr=0.1)
        optimizer.check_replicas_every = 2 + comm.Get_rank()
        with pytest.raises(DisagreementError, match="check_replicas_every: 2 on rank 0; 3 on rank 1"):
            steps_of(net, optimizer, comm.Get_rank(), range(1))

    virtual.results(2, program)


@rows()
@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_read_the_same_data_are_told_once(row, same):
    def program(comm):
        net = net_of()
        steps_of(net, row(net, comm), 0 if same else comm.Get_rank(), range(8))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        virtual.results(2, program)
    told = [str(warning.message) for warning in caught if "the same data" in str(warning.message)]
    assert len(told) == same
    assert all("ShardedSampler" in text and "seed_rank" in text and "num_replicas" in text for text in told)


# ---- ranks with different numbers of batches


@pytest.mark.parametrize("batches", [(12, 16, 16), (16, 0, 3)])
@rows()
def test_ranks_that_run_out_of_data_take_part_with_nothing(row, batches):
    """Learning rates that the ranks at work change are theirs; replicas stay what they are, and nobody waits."""

    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = row(net, comm)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(2):
            with optimizer.join():
                for step in range(batches[rank]):
                    optimizer.zero_grad()
                    loss_in(net, rank, step).backward()
                    optimizer.step()
                    schedule.step()
        assert optimizer.steps == 2 * max(batches)
        optimizer.synchronize()
        steps_of(net, optimizer, rank, range(1))
        optimizer.synchronize()
        return parameters_of(net), [group["lr"] for group in optimizer.param_groups]

    rows_ = virtual.results(3, program)
    assert all(same_bits(row_, rows_[0]) for row_ in rows_)


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("weigh", [False, True])
def test_the_mean_is_over_all_ranks_or_over_those_at_work(placement, weigh):
    def program(comm):
        rank, net = comm.Get_rank(), torch.nn.Linear(4, 1)
        sgd = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.0)
        optimizer = DistributedOptimizer(sgd, comm, Identity(), placement=placement)
        with optimizer.join(weigh=weigh):
            for _ in range(1 + rank):
                before = net.bias.item()
                optimizer.zero_grad()
                (net(torch.ones(1, 4)) * (rank + 1)).sum().backward()
                optimizer.step()
        return before - net.bias.item()

    assert virtual.results(2, program)[1] == pytest.approx(2.0 if weigh else 1.0)


@pytest.mark.parametrize("batches", [(2, 2, 2), (1, 2, 3), (3, 2, 1), (2, 2, 0), (0, 2, 0)])
def test_ranks_that_weigh_differently_raise(batches):
    """Wherever they are: at work, or out of data from the start. Afterwards they go on."""

    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = EF21(net.parameters(), comm, TopK(0.2), lr=0.1)
        before = parameters_of(net)
        with (
            pytest.raises(DisagreementError, match="disagree on weigh of join: False on ranks 0,1; True on rank 2"),
            optimizer.join(weigh=rank == 2),
        ):
            steps_of(net, optimizer, rank, range(batches[rank]))
        assert same_bits(parameters_of(net), before)
        for _ in range(2):
            with optimizer.join(weigh=True):
                with optimizer.join():
                    steps_of(net, optimizer, rank, range(batches[rank]))
                steps_of(net, optimizer, rank, range(batches[rank]))
        optimizer.check_replicas()
        assert optimizer.steps == 4 * max(batches)

    virtual.results(3, program)


def test_an_error_inside_of_join_ends_it_on_that_rank():
    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = EF21(net.parameters(), comm, TopK(0.2), lr=0.1)
        if rank == 0:
            with suppress(ZeroDivisionError), optimizer.join(weigh=True):
                raise ZeroDivisionError
        steps_of(net, optimizer, rank, range(2))
        return parameters_of(net)

    assert same_bits(*virtual.results(2, program))


def test_weights_come_too_late_for_what_has_been_sent():
    def program(comm):
        optimizer = EF21(net_of().parameters(), comm, TopK(0.2), lr=0.1, overlap=True)
        with pytest.raises(OptionError, match="weigh=True with overlap=True"), optimizer.join(weigh=True):
            pass

    virtual.results(2, program)


@rows()
def test_an_error_of_a_closure_stops_all_ranks(row):
    def program(comm):
        net = net_of()
        optimizer = row(net, comm)

        def closure():
            optimizer.zero_grad()
            loss = loss_in(net, comm.Get_rank(), 0)
            loss.backward()
            if comm.Get_rank() == 1:
                raise ValueError("no such batch")
            return loss

        before = everything(net, optimizer)
        with pytest.raises(ValueError if comm.Get_rank() == 1 else PeerError, match="no such batch"):
            optimizer.step(closure)
        assert same_bits(everything(net, optimizer), before)

    virtual.results(2, program)


@rows()
def test_an_error_in_building_stops_all_ranks(row):
    """A keyword that there is not, on one rank, which raises before it has met the others."""

    def program(comm):
        wrong = comm.Get_rank() == 1
        with pytest.raises((PeerError, TypeError, OptionError), match="nonsense"):  # an option of the rule, or none
            row(net_of(), comm, **({"nonsense": 3} if wrong else {}))
        row(net_of(), comm)

    virtual.results(3, program)


@pytest.mark.parametrize("bucket_nbytes", [None, 100])
def test_a_wrapped_optimizer_that_raises_on_one_rank_stops_all(bucket_nbytes):
    """Between the handshake and the exchange of updates, where the others are. Then all go on as if nothing had been."""

    class Fragile(torch.optim.SGD):
        def step(self, closure=None):
            if self.fails:
                super().step()
                raise ArithmeticError("no moments")
            super().step()

    def program(comm):
        rank, nets = comm.Get_rank(), [net_of(), net_of()]
        inner = [Fragile(net.parameters(), lr=0.05) for net in nets]
        optimizers = [DistributedOptimizer(one, comm, TopK(0.2), bucket_nbytes=bucket_nbytes) for one in inner]
        for step in range(6):
            for net, optimizer in zip(nets, optimizers, strict=True):
                inner[0].fails, inner[1].fails = step % 2 == 1 and rank == 1, False
                if step % 2 == 0:
                    steps_of(net, optimizer, rank, [step])
                elif optimizer is optimizers[0]:
                    error, words = (ArithmeticError, "^no moments$") if rank == 1 else (
                        PeerError, "rank 1 raised: Fragile.step: ArithmeticError: no moments")
                    with pytest.raises(error, match=words):
                        steps_of(net, optimizer, rank, [step])
        apart = "exchanges", "sent_nbytes"  # of exchanges that failed as well
        assert same_bits(*(everything(net, optimizer, *apart) for net, optimizer in zip(nets, optimizers, strict=True)))
        return parameters_of(nets[0])

    found = virtual.results(3, program)
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize("build", [
    lambda net, comm, plan: DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, TopK(0.2), plan=plan),
    lambda net, comm, plan: OneBitAdam(net.parameters(), comm, plan=plan),
    lambda net, comm, plan: OneBitLamb(net.parameters(), comm, plan=plan),
    lambda net, comm, plan: ZeroOneAdam(net.parameters(), comm, plan=plan),
])
def test_a_builder_of_plans_that_raises_on_one_rank_stops_all(build):
    def program(comm):
        def plan(*arguments):
            if comm.Get_rank() == 1:
                raise ValueError("no plan")
            return plan_for(*arguments)

        with pytest.raises(ValueError if comm.Get_rank() == 1 else PeerError, match="no plan"):
            build(net_of(), comm, plan)
        build(net_of(), comm, plan_for)

    virtual.results(3, program)


def test_a_value_that_torch_refuses_stops_all_ranks():
    def program(comm):
        bad = comm.Get_rank() == 0
        with pytest.raises(ValueError if bad else PeerError, match="Invalid learning rate: -1"):
            EF21(net_of(), comm, TopK(0.2), lr=-1.0 if bad else 0.1)
        with pytest.raises(TypeError if bad else PeerError, match="residue"):
            TwoPhaseMean(comm, Vote(), 100, np.float32, **({"residue": False} if bad else {}))

    virtual.results(2, program)


def test_ranks_in_different_calls_are_told_apart():
    def program(comm):
        name = "Store.finish" if comm.Get_rank() == 1 else "EF21"
        with pytest.raises(DisagreementError, match=r"different calls: EF21 on ranks 0,2; Store.finish on rank 1"):
            agree(comm, name, dict, "")

    virtual.results(3, program)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_observer_that_raises_leaves_a_whole_step(overlap):
    def program(comm):
        net = net_of()
        optimizer = EF21(net.parameters(), comm, TopK(0.2), lr=0.1, overlap=overlap)

        def observe(reports):
            assert {report.step for report in reports} == {optimizer.steps}
            if comm.Get_rank() == 1 and optimizer.steps == 2:
                raise ValueError("no space for the log")

        optimizer.observer = observe
        for step in range(4):
            optimizer.zero_grad()
            loss_in(net, comm.Get_rank(), step).backward()
            if comm.Get_rank() == 1 and step == 1:
                with pytest.raises(ValueError, match="no space"):
                    optimizer.step()
            else:
                optimizer.step()
        assert optimizer.steps == 4
        optimizer.check_replicas()
        return parameters_of(net)

    assert same_bits(*virtual.results(2, program))


def test_an_error_in_the_backward_pass_of_one_rank_is_told_in_the_step():
    """With overlap it has sent a part of its gradients already; the next step works again."""

    def program(comm):
        net = net_of()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, comm, TopK(0.2), placement="gradient", overlap=True, bucket_nbytes=40)
        for step in range(3):
            optimizer.zero_grad()
            loss_in(net, comm.Get_rank(), step).backward()
            before = everything(net, optimizer)
            if comm.Get_rank() == 1 and step == 1:
                with pytest.raises(OptionError, match="second backward pass"):
                    loss_in(net, comm.Get_rank(), step).backward()
            if step == 1:
                with pytest.raises(OptionError if comm.Get_rank() == 1 else PeerError, match="second backward pass"):
                    optimizer.step()
                assert same_bits(everything(net, optimizer)[1], before[1])
            else:
                optimizer.step()
        assert optimizer.steps == 2
        optimizer.check_replicas()

    virtual.results(2, program)


class Features(torch.nn.Module):
    """A net on random features, which every rank draws for itself, with statistics of its own."""

    def __init__(self, rank):
        super().__init__()
        draw = torch.Generator().manual_seed(rank)
        self.register_buffer("frequencies", torch.randn(7, 7, generator=draw))
        self.register_buffer("phases", torch.randn(7, generator=draw), persistent=False)
        self.register_buffer("mask", torch.zeros(3 + rank), persistent=False)
        self.norm = torch.nn.BatchNorm1d(7)
        self.norm.running_mean += rank
        self.net = net_of()

    def forward(self, x):
        return self.net(self.norm(torch.cos(x @ self.frequencies + self.phases)))


@rows()
def test_buffers_of_a_module_are_those_of_rank_0(row):
    """And its parameters have names in errors."""

    def program(comm):
        rank = comm.Get_rank()
        net = Features(rank)
        wraps = UNKNOWN_PLACE in row.bad or "y" in row.own
        optimizer = row.make(
            net.parameters() if wraps else net, comm, **row.options | ({"model": net} if wraps else {})
        )
        buffers = dict(net.named_buffers())
        for name, buffer in Features(0).named_buffers():
            assert torch.equal(buffers[name], buffer) or name == "mask", name
        assert net.mask.shape == (3 + rank,)
        with torch.no_grad():
            net.net.last.weight[1, 2] += float(rank)
        with pytest.raises(DisagreementError, match=r"parameter net\.last\.weight .* on rank 1"):
            optimizer.check_replicas()

    virtual.results(2, program)


def test_a_part_that_raises_leaves_no_rank_in_the_collective_state_of_another():
    class Broken:
        def state_dict(self):
            raise RuntimeError("out of memory")

        def load_state_dict(self, state):
            pass

    class Whole:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    class Gathered:
        def __init__(self, comm):
            self.comm = comm

        def state_dict(self):
            return {"ranks": self.comm.allgather(self.comm.Get_rank())}

        def load_state_dict(self, state):
            pass

    def program(comm):
        first = Broken() if comm.Get_rank() == 1 else Whole()
        training = Training(first=first, second=Gathered(comm))
        with pytest.raises(RuntimeError if comm.Get_rank() == 1 else PeerError, match="out of memory"):
            training.save(None, comm, 3)

    virtual.results(2, program)
