"""What programs do with ``p.grad`` and the parameters between steps counts as it does in torch."""

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import virtual
from optimizer_table import ROWS, rows
from programs import same_bits
from stored import MemoryStore
from training import everything, have_met, loss_in, net_of, parameters_of, steps_of

from mpi_ef.compress import Identity, TopK
from mpi_ef.errors import DisagreementError, OptionError, PeerError, ShapeError
from mpi_ef.optim import DistributedOptimizer, OneBitAdam
from mpi_ef.optim.writes import Writes
from mpi_ef.state.training import Training

EXHAUSTIVE = pytest.mark.exhaustive
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def plain_sgd(net, comm, **options):
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    return DistributedOptimizer(sgd, comm, Identity(), placement="gradient", **options)


def seen_by(optimizer):
    """Return a list that gets a copy of the gradients of every step."""
    seen, update = [], optimizer.update
    optimizer.update = lambda: (seen.append(optimizer.flat.gradients.copy()), update())
    return seen


def in_grad(optimizer):
    return np.concatenate([np.zeros(p.numel(), np.float32) if p.grad is None else p.grad.detach().float().reshape(-1).numpy()
                           for p in optimizer.flat.parameters])


# ---- gradients


def clamp_data(net, _):
    for p in net.parameters():
        if p.grad is not None:
            p.grad.data.clamp_(-1e-3, 1e-3)


def clear_data(net, _):
    for p in net.parameters():
        if p.grad is not None:
            p.grad.data.zero_()


def replace(net, _):
    for p in net.parameters():
        if p.grad is not None:
            p.grad = torch.full_like(p, p.grad.abs().max())


def transpose(net, _):
    net.last.weight.grad = net.last.weight.grad.t().contiguous().t()


def probe(net, loss):
    found = torch.autograd.grad(loss(), [net.last.weight, net.last.bias])
    assert all(gradient.any() for gradient in found)


def in_place(net, _):
    net.last.weight.grad.mul_(3)


def penalty(net, loss):
    """A gradient penalty: gradients that have a graph themselves."""
    gradient = torch.autograd.grad(loss(), [net.last.weight], create_graph=True)[0]
    gradient.square().sum().backward()


@DTYPES
@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("idiom", [clamp_data, clear_data, replace, transpose, probe, in_place, penalty])
def test_what_is_in_grad_counts(idiom, placement, dtype):
    def program(comm):
        net = net_of(dtype)
        optimizer = plain_sgd(net, comm) if placement == "gradient" else ROWS["AdamW updates"](net, comm)
        seen = seen_by(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            loss_in(net, comm.Get_rank(), step).backward()
            idiom(net, lambda step=step: loss_in(net, comm.Get_rank(), 10 + step))
            expected = in_grad(optimizer)
            assert expected.any() == (idiom is not clear_data)
            optimizer.step()
            tolerance = {} if idiom is not penalty else {"rtol": 1e-2, "atol": 1e-3}  # a sum of two in float32
            np.testing.assert_allclose(seen[-1], expected, **({"rtol": 0} | tolerance))

    virtual.results(2, program)


@DTYPES
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_a_program_have_their_say(when, dtype):
    """Registered before the optimizer was built, or afterwards; also where gradients add up."""

    def program(comm):
        net = net_of(dtype)
        if when == "before":
            net.last.weight.register_hook(lambda grad: 0 * grad)
        optimizer = plain_sgd(net, comm)
        if when == "after":
            net.last.weight.register_hook(lambda grad: 0 * grad)
        before = net.last.weight.detach().clone()
        for step in range(4):
            optimizer.zero_grad()
            for part in range(1 + step % 2):
                loss_in(net, comm.Get_rank(), 2 * step + part).backward()
            optimizer.step()
        assert torch.equal(net.last.weight, before)

    virtual.results(2, program)


def scale_grad(p):
    p.grad.mul_(0.5)


def clear_grad(p):
    p.grad.zero_()


def remove_grad(p):
    p.grad = None


@DTYPES
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("act", [scale_grad, clear_grad, remove_grad])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_hook_makes_of_a_sum_counts(act, when, dtype, overlap):
    """A hook that runs when autograd has added to ``p.grad``, in every backward pass of several, as in torch."""

    def program(comm):
        nets = [net_of(dtype), net_of(dtype)]
        if when == "before":
            hooks = [net.last.weight.register_post_accumulate_grad_hook(act) for net in nets]
        optimizer = plain_sgd(nets[0], comm, overlap=overlap and when == "before")
        if when == "after":
            hooks = [net.last.weight.register_post_accumulate_grad_hook(act) for net in nets]
        assert len(hooks) == 2
        seen = seen_by(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            nets[1].zero_grad()
            with torch.no_grad():
                for p, q in zip(*(net.parameters() for net in nets), strict=True):
                    q.copy_(p)
            for part in range(3):
                loss_in(nets[1], comm.Get_rank(), 3 * step + part).backward()
                with optimizer.no_sync() if part < 2 else nullcontext():
                    loss_in(nets[0], comm.Get_rank(), 3 * step + part).backward()
            wanted = [
                np.zeros(15) if p.grad is None else p.grad.float().reshape(-1).numpy() for p in [nets[1].last.weight]
            ]
            optimizer.step()
            if not optimizer.overlaps:  # a hook of torch's own sees what has arrived there
                np.testing.assert_array_equal(seen[-1][optimizer.flat.place(5)], wanted[0])
            elif act is clear_grad:
                assert not wanted[0].any()
        if act is not scale_grad:
            assert torch.equal(nets[0].last.weight, net_of(dtype).last.weight)

    virtual.results(2, program)


@DTYPES
def test_a_hook_before_autograd_adds_has_its_say(dtype):
    """On the node that adds to ``p.grad``, registered after the optimizer was built."""

    def program(comm):
        net = net_of(dtype)
        optimizer = plain_sgd(net, comm)
        before = net.last.weight.detach().clone()
        node = net.last.weight.view_as(net.last.weight).grad_fn.next_functions[0][0]
        node.register_prehook(lambda grads: tuple(0 * grad for grad in grads))
        for part in range(3):
            loss_in(net, comm.Get_rank(), part).backward()
        optimizer.step()
        assert torch.equal(net.last.weight, before)

    virtual.results(2, program)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_go_with_their_optimizer(dtype, overlap):
    """Hooks of the parameters, which stay, do not keep them; and there are no more of them after many steps."""

    def program(comm):
        net = net_of(dtype)
        optimizer = plain_sgd(net, comm, overlap=overlap)
        steps_of(net, optimizer, 0, range(5))
        node = net.last.weight.view_as(net.last.weight).grad_fn.next_functions[0][0]
        flat, many = weakref.ref(optimizer.flat), sum(len(part._handles) for part in optimizer.flat._parts)
        assert many == len(optimizer.flat._parts) * ((dtype == torch.bfloat16) + overlap)
        assert node is optimizer.flat._parts[5]._node or dtype == torch.float32
        del optimizer, node
        gc.collect()
        assert flat() is None
        loss_in(net, 0, 9).backward()  # as without an optimizer

    virtual.results(1, program)


@pytest.mark.parametrize("between", ["nothing", "a clip that clips nothing", "a probe", "a step that is skipped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_many_gradients_are_not_rounded(dtype, between):
    """4000 ones are 4000, as in float32, not the 256 or 2048 at which ones get lost."""

    def program(comm):
        p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), comm, Identity(), placement="gradient")
        seen = seen_by(optimizer)
        for turn in range(2):
            optimizer.zero_grad()
            for n in range(4000):
                p.sum().backward()
                if n == 3000 and between == "a probe":
                    torch.autograd.grad(p.sum(), [p])
            if between == "a clip that clips nothing":
                torch.nn.utils.clip_grad_norm_([p], 1e9)
            if between == "a step that is skipped" and comm.Get_rank() == 1 and turn == 0:
                p.grad[0] = float("inf")
            optimizer.step()
        np.testing.assert_array_equal(seen[-1], 4000.0)

    if between == "a step that is skipped":
        with pytest.warns(RuntimeWarning, match="step 0 skipped"):
            virtual.results(2, program)
    else:
        virtual.results(2, program)


@DTYPES
def test_a_layer_that_rested_has_its_own_gradients_again(dtype):
    """Also where gradients add up before and after."""

    def program(comm):
        net = net_of(dtype)
        optimizer = plain_sgd(net, comm)
        seen = seen_by(optimizer)
        for step in range(9):
            net.last.requires_grad_(step not in (3, 4))
            optimizer.zero_grad()
            for part in range(2):
                loss_in(net, comm.Get_rank(), 2 * step + part).backward()
            expected = in_grad(optimizer)
            optimizer.step()
            np.testing.assert_allclose(seen[-1], expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())

    virtual.results(2, program)


@DTYPES
@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_that_a_program_has_kept_stay_what_they_are(overlap, dtype):
    """Of two tasks, for example, whose conflicts are taken out."""

    def program(comm):
        net, kept = net_of(dtype), []
        optimizer = plain_sgd(net, comm, overlap=overlap)
        for step in range(3):
            optimizer.zero_grad()
            loss_in(net, comm.Get_rank(), step).backward()
            kept.append([p.grad for p in net.parameters() if p.grad is not None])
            kept.append(copy.deepcopy(kept[-1]))
            optimizer.step()
        for mine, then in zip(kept[::2], kept[1::2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, then, strict=True))
        assert not torch.equal(kept[0][0], kept[2][0])

    virtual.results(2, program)


@pytest.mark.parametrize("build", [plain_sgd, ROWS["AdamW updates"], ROWS["OneBitAdam"], ROWS["Lion"]])
def test_an_overflow_that_was_clipped_away_is_skipped(build):
    """GradScaler has seen it while it unscaled."""

    def program(comm):
        net, scaler = net_of(), torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = build(net, comm)
        steps_of(net, optimizer, comm.Get_rank(), range(2))
        before = everything(net, optimizer, "skipped_steps")
        optimizer.zero_grad()
        factor = float("inf") if comm.Get_rank() == 1 else 1.0
        (scaler.scale(loss_in(net, comm.Get_rank(), 2)) * factor).backward()
        scaler.unscale_(optimizer)
        for p in net.parameters():
            if p.grad is not None:
                torch.nan_to_num_(p.grad, 0.0, 1.0, -1.0)
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(everything(net, optimizer, "skipped_steps"), before)
        assert optimizer.skipped_steps == 1
        return scaler.get_scale()

    with pytest.warns(RuntimeWarning, match="NaN or Inf in the gradient on rank 1"):
        assert virtual.results(2, program) == [4.0, 2.0]


# ---- parameters


def swap_by_reference(net, average):
    backup = [p.data for p in net.parameters()]
    for p, q in zip(net.parameters(), average.parameters(), strict=True):
        p.data = q.data
    return lambda: [setattr(p, "data", data) for p, data in zip(net.parameters(), backup, strict=True)]


@torch.no_grad()
def swap_by_copy(net, average):
    backup = copy.deepcopy([*net.parameters()])
    for p, q in zip(net.parameters(), average.parameters(), strict=True):
        p.copy_(q)
    return lambda: [p.data.copy_(q) for p, q in zip(net.parameters(), backup, strict=True)]


@pytest.mark.parametrize(("swap", "dtype"), [
    (swap_by_reference, torch.bfloat16), pytest.param(swap_by_reference, torch.float32, marks=EXHAUSTIVE),
    pytest.param(swap_by_copy, torch.bfloat16, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("before", [pytest.param(9, marks=EXHAUSTIVE), 21])
@rows()
def test_weights_that_are_swapped_for_a_while_come_back(row, before, swap, dtype):
    """For an evaluation, and while states are saved, which have the others: the training goes on with its own."""
    store = MemoryStore()

    def program(comm):
        nets = [net_of(dtype), net_of(dtype)]
        average, rank = net_of(dtype), comm.Get_rank()
        with torch.no_grad():
            average.last.weight.fill_(0.125)
        swapped, other = (row(net, comm) for net in nets)
        for net, optimizer in zip(nets, (swapped, other), strict=True):
            steps_of(net, optimizer, rank, range(before))
            optimizer.synchronize()
        back = swap(nets[0], average)
        swapped.state_dict()
        Training(model=nets[0], optimizer=swapped, random=False).save(store, comm, before)
        resumed = net_of(dtype)
        Training(model=resumed, optimizer=row(resumed, comm), random=False).resume(store, comm)
        assert same_bits(parameters_of(resumed), parameters_of(average))
        back()
        assert not same_bits(parameters_of(nets[0]), parameters_of(average))
        after = range(before, before + 5)
        assert same_bits(steps_of(nets[0], swapped, rank, after), steps_of(nets[1], other, rank, after))
        assert same_bits(everything(nets[0], swapped), everything(nets[1], other))

    virtual.results(2, program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("before", [pytest.param(5, marks=EXHAUSTIVE), 20])
@rows()
def test_a_save_has_the_weights_of_that_moment(row, before, dtype):
    """Whatever has just been written to them, by `Training` and in a model's and an optimizer's states, in any order."""
    store = MemoryStore()

    def program(comm):
        net, rank = net_of(dtype), comm.Get_rank()
        optimizer = row(net, comm)
        steps_of(net, optimizer, rank, range(before))
        assert have_met(optimizer)
        with torch.no_grad():
            for p in net.parameters():
                p.clamp_(-0.2, 0.2)
        now = parameters_of(net)
        Training(model=net, optimizer=optimizer, random=False).save(store, comm, before)
        file = io.BytesIO()
        torch.save((net.state_dict(), optimizer.state_dict()), file)

        def by_training(other, resumed):
            Training(model=other, optimizer=resumed, random=False).resume(store, comm)

        def model_first(other, resumed):
            file.seek(0)
            for part, state in zip((other, resumed), torch.load(file), strict=True):
                part.load_state_dict(state)

        def optimizer_first(other, resumed):
            file.seek(0)
            for part, state in zip((resumed, other), reversed(torch.load(file)), strict=True):
                part.load_state_dict(state)

        after = range(before, before + 3)
        path = steps_of(net, optimizer, rank, after)
        for load in (by_training, model_first, optimizer_first):
            other = net_of(dtype)
            resumed = row(other, comm)
            load(other, resumed)
            assert same_bits(parameters_of(other), now), load
            assert same_bits(steps_of(other, resumed, rank, after), path), load

    virtual.results(2, program)


def average_trained(net, average, step):
    for p, q in zip(net.parameters(), average.parameters(), strict=True):
        p.data, q.data = q.data, p.data
    step()
    for p, q in zip(net.parameters(), average.parameters(), strict=True):
        p.data, q.data = q.data, p.data


def on_trial(net, _, step):
    kept = [p.data for p in net.parameters()]
    for p in net.parameters():
        p.data = p.data.clone()
    step()
    for p, data in zip(net.parameters(), kept, strict=True):
        p.data = data


def exchanged(net, _, step):
    net.first.weight.data, net.middle.data = net.middle.data, net.first.weight.data
    step()


def clipped(net, _, step):
    for p in net.parameters():
        p.data = p.data.clamp(-0.2, 0.2)
    step()


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("idiom", [average_trained, on_trial, exchanged, clipped])
def test_memory_of_parameters_that_a_program_swaps_is_its_own(idiom, placement):
    """Pointers that are kept, exchanged, given back: what they point to is what torch alone leaves there, bit by bit."""

    def net_with_two_alike():
        net = net_of()
        net.middle = torch.nn.Parameter(net.first.weight.detach().clone().mul_(0.5))
        return net

    def program(comm):
        nets, averages = [net_with_two_alike() for _ in range(2)], [net_with_two_alike() for _ in range(2)]
        inner = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
        optimizers = [DistributedOptimizer(inner[0], comm, Identity(), placement=placement), inner[1]]
        for number in range(6):
            for net, average, optimizer in zip(nets, averages, optimizers, strict=True):

                def step(net=net, optimizer=optimizer, number=number):
                    optimizer.zero_grad()
                    (loss_in(net, 0, number) + (net.middle * net.first.weight).square().sum()).backward()
                    optimizer.step()

                (idiom if number % 2 else lambda net, average, step: step())(net, average, step)
        assert same_bits(*map(parameters_of, nets))
        assert same_bits(*map(parameters_of, averages))

    virtual.results(1, program)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["EF21", "AdamW updates", "OneBitAdam", "ZeroOneAdam", "Lion"])
def test_a_model_in_memory_that_processes_share_stays_there(name, when):
    """Other processes see what is trained, as with torch alone, and it is what is trained without them."""

    def program(comm):
        nets = [net_of(), net_of()]
        if when == "before":
            nets[0].share_memory()
        optimizers = [ROWS[name](net, comm) for net in nets]
        for net, optimizer in zip(nets, optimizers, strict=True):
            steps_of(net, optimizer, comm.Get_rank(), range(2))
        if when == "after":
            nets[0].share_memory()
        seen = [p.data for p in nets[0].parameters()]  # the memory that a process has which gets the model now
        for net, optimizer in zip(nets, optimizers, strict=True):
            steps_of(net, optimizer, comm.Get_rank(), range(2, 8))
            optimizer.synchronize()
            with torch.no_grad():
                net.last.weight.clamp_(-0.25, 0.25)
            steps_of(net, optimizer, comm.Get_rank(), range(8, 12))
        assert all(p.is_shared() and torch.equal(p, q) for p, q in zip(nets[0].parameters(), seen, strict=True))
        assert same_bits(*(everything(net, optimizer) for net, optimizer in zip(nets, optimizers, strict=True)))
        return parameters_of(nets[0])

    found = virtual.results(2, program)
    assert name == "ZeroOneAdam" or same_bits(*found)


def test_two_parameters_with_one_memory_are_refused_on_all_ranks():
    """Torch would move both; here each has a place of its own, and they would come apart."""

    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        net.twin = torch.nn.Parameter(net.last.weight.detach().clone())
        if rank == 1:
            net.twin.data = net.last.weight.data
        with pytest.raises(OptionError if rank == 1 else PeerError, match="have the same memory: to tie weights"):
            plain_sgd(net, comm)
        net.twin.data = net.twin.data.clone()
        optimizer = plain_sgd(net, comm)
        steps_of(net, optimizer, rank, range(2))
        if rank == 1:
            net.twin.data = net.last.weight.data
        with pytest.raises(OptionError if rank == 1 else PeerError, match="have the same memory: to tie weights"):
            steps_of(net, optimizer, rank, range(2, 3))

    virtual.results(2, program)


def other_memory(net):
    net.last.weight.data = net.last.weight.data + 1


def vector_to_parameters(net):
    vector = torch.nn.utils.parameters_to_vector([net.last.weight]) + 1
    torch.nn.utils.vector_to_parameters(vector, [net.last.weight])


def frozen_backbone(net):
    with torch.no_grad():
        net.backbone.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", [other_memory, vector_to_parameters, frozen_backbone])
@pytest.mark.parametrize("name", ["EF21", "AdamW updates", "OneBitAdam", "ZeroOneAdam"])
def test_what_one_rank_alone_writes_in_any_way_is_noticed(name, write, dtype):
    """In the next step; also where the write is to what is not trained."""

    def program(comm):
        net = net_of(dtype)
        net.backbone = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64), requires_grad=False)
        optimizer = ROWS[name](net, comm)
        steps_of(net, optimizer, comm.Get_rank(), range(5))
        optimizer.synchronize()
        if comm.Get_rank() == 1:
            write(net)
        where = r"\(3, 2\)" if write is frozen_backbone else r"\(3, 5\)"
        with pytest.raises(DisagreementError, match=f"{where} is not on rank 1 what it is on rank 0"):
            steps_of(net, optimizer, comm.Get_rank(), range(5, 6))
        with pytest.raises(DisagreementError, match=f"{where} is not on rank 1 what it is on rank 0"):
            optimizer.check_replicas()

    virtual.results(2, program)


@pytest.mark.parametrize("writes", ["rank 0 alone", "more and more"])
def test_writes_in_every_step_that_come_to_differ_are_noticed(writes):
    """Within 16 steps."""

    def program(comm):
        net = net_of()
        optimizer = plain_sgd(net, comm)
        rank, late = comm.Get_rank(), False

        @torch.no_grad()
        def write():
            if writes == "more and more":
                net.last.weight.mul_(1.0 - 0.01 * rank * late)
            elif rank == 0:
                net.last.weight.clamp_(-0.1, 0.1) if late else net.last.weight.clamp_(-10, 10)

        def train():
            nonlocal late
            for step in range(30):
                late = step > 5
                steps_of(net, optimizer, rank, range(step, step + 1))
                write()

        with pytest.raises(DisagreementError, match="is not on rank 1 what it is on rank 0"):
            train()
        return optimizer.steps

    assert all(5 < steps <= 17 for steps in virtual.results(2, program))


@DTYPES
@rows()
def test_weights_that_one_rank_alone_writes_in_mid_training_are_noticed(row, dtype):
    """In the next step."""

    def program(comm):
        net = net_of(dtype)
        optimizer = row(net, comm)
        steps_of(net, optimizer, comm.Get_rank(), range(5))
        optimizer.synchronize()
        state = copy.deepcopy(net.state_dict())
        state["last.weight"] += 1
        for _ in range(2):
            if comm.Get_rank() == 1:
                net.load_state_dict(state)
            with pytest.raises(DisagreementError, match=r"\(3, 5\) is not on rank 1 what it is on rank 0"):
                steps_of(net, optimizer, comm.Get_rank(), range(5, 6))
        net.load_state_dict(state)
        steps_of(net, optimizer, comm.Get_rank(), range(5, 7))
        return parameters_of(net)

    rows_ = virtual.results(3, program)
    assert all(same_bits(row_, rows_[0]) for row_ in rows_)


@rows()
def test_weights_that_all_ranks_write_in_every_step_are_compared_rarely(row, monkeypatch):
    """A clamp in every step does not cost a pass over all parameters in every one."""
    monkeypatch.setattr(Writes, "EVERY", 3)

    def program(comm):
        net = net_of()
        optimizer = row(net, comm)
        compared, ask = [], optimizer._handshake.ask
        optimizer._handshake.ask = lambda **words: compared.append(words["values"] != 0) or ask(**words)
        for step in range(8):
            steps_of(net, optimizer, comm.Get_rank(), range(step, step + 1))
            if step >= 3:
                with torch.no_grad():
                    net.last.weight.clamp_(-0.1, 0.1)
        assert np.flatnonzero(compared).tolist() == [0, 4, 7]

    virtual.results(2, program)


@pytest.mark.parametrize("build", [lambda net, comm: OneBitAdam(net.parameters(), comm, lr=0.1), plain_sgd])
def test_a_transposed_square_is_taken_over_entry_by_entry(build):
    def program(comm):
        nets = [torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)]
        with torch.no_grad():
            nets[0].weight.copy_(torch.arange(16.0).reshape(4, 4) / 16)
            nets[1].weight.copy_(nets[0].weight.t())
        optimizers = [build(net, comm) for net in nets]
        nets[0].weight.data = nets[0].weight.data.t()
        x = torch.arange(4.0)[None] + comm.Get_rank()
        for net, optimizer in zip(nets, optimizers, strict=True):
            (net(x) * torch.arange(4.0)).sum().backward()
            optimizer.step()
        assert torch.equal(*(net.weight.detach() for net in nets))

    virtual.results(2, program)


def test_another_kind_of_16_bits_is_refused_on_all_ranks():
    def program(comm):
        net = net_of(torch.bfloat16)
        optimizer = plain_sgd(net, comm)
        if comm.Get_rank() == 1:
            net.to(torch.float16)
        loss_in(net, comm.Get_rank(), 0).backward()
        with pytest.raises(ShapeError if comm.Get_rank() == 1 else PeerError, match="its memory was replaced"):
            optimizer.step()

    virtual.results(2, program)


# ---- ranks that have run out of data


@rows(lambda row: row.own & {"m_i", "v_i"})
def test_the_momentum_of_a_rank_without_data_rests(row):
    """It neither votes nor fades, and is there when the rank goes on."""

    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = row(net, comm)
        steps_of(net, optimizer, rank, range(4))

        def own():
            return {
                name: array.copy()
                for name, array in optimizer.per_rank().items()
                if name.split(".")[-1] in ("m_i", "v_i")
            }

        before, step, sent = own(), optimizer._step, []
        optimizer._step = lambda broken: (sent.append(any(array.any() for array in own().values())), step(broken))
        with optimizer.join():
            steps_of(net, optimizer, rank, range(4, 4 if rank == 1 else 9))
        assert sent == [rank != 1] * 5
        assert same_bits(own(), before) == (rank == 1)
        return parameters_of(net)

    rows_ = virtual.results(2, program)
    assert same_bits(*rows_)


@pytest.mark.filterwarnings("ignore:step 4 skipped")
@pytest.mark.parametrize("oddity", [None, "nan", "missing", "transposed", "shared"])
def test_long_gradients_that_are_not_copied_give_the_same_bits(oddity, monkeypatch):
    """With placement "update" a torch optimizer may take them from where they are; what is odd in one step is copied."""

    def program(comm):
        rank, outcomes = comm.Get_rank(), []
        for lends in (True, False):
            net = torch.nn.Linear(256, 128)
            with torch.no_grad():
                net.weight.fill_(0.5)
                net.bias.fill_(0.25)
            if oddity == "shared":
                net.share_memory()
            inner = torch.optim.SGD(net.parameters(), lr=0.25, momentum=0.5, nesterov=True, weight_decay=0.125)
            optimizer = DistributedOptimizer(inner, comm, TopK(0.01))
            optimizer._lends, lent = lends, []
            monkeypatch.setattr(optimizer, "_try_inside", lambda do=optimizer._try_inside, o=optimizer, lent=lent: (
                lent.append(o.flat.lends), do())[1])
            for step in range(7):
                drawn = np.random.default_rng((rank, step)).normal(size=net.weight.shape).astype(np.float32)
                net.weight.grad, net.bias.grad = torch.from_numpy(drawn), torch.from_numpy(drawn[:, 0].copy())
                if step == 4 and oddity == "transposed":
                    net.weight.grad = torch.from_numpy(drawn.T.copy()).T
                if step == 4 and oddity == "nan" and rank == 1:
                    net.weight.grad[3, 4] = np.nan
                if step == 4 and oddity == "missing" and rank == 1:
                    net.weight.grad = None
                kept = net.weight.grad, None if net.weight.grad is None else net.weight.grad.clone()
                optimizer.step()
                assert net.weight.grad is kept[0]
                assert kept[0] is None or same_bits(net.weight.grad.numpy(), kept[1].numpy())
            wanted = [lends and step >= 3 and not (step == 4 and here(oddity, rank)) for step in range(7)]
            assert lent == wanted[:4] + wanted[5 if oddity == "nan" else 4 :]
            outcomes.append((parameters_of(net), optimizer.per_rank(), optimizer.skipped_steps))
        assert same_bits(*outcomes)
        return outcomes[0][2]

    def here(oddity, rank):
        return oddity == "transposed" or (oddity == "missing" and rank == 1)

    assert virtual.results(2, program) == [int(oddity == "nan")] * 2
