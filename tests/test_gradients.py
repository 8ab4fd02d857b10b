"""What programs do with ``p.grad`` and the parameters between steps counts as it does in torch."""

import copy
import io

import numpy as np
import pytest
import torch
import virtual
from optimizer_table import ROWS, rows
from programs import same_bits
from stored import MemoryStore
from training import everything, have_met, loss_in, net_of, parameters_of, steps_of

from mpi_ef.checkpoint.state import Training
from mpi_ef.compress import Identity
from mpi_ef.errors import DisagreementError, PeerError, ShapeError
from mpi_ef.optim import DistributedOptimizer, OneBitAdam

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def plain_sgd(net, comm, **options):
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    return DistributedOptimizer(sgd, comm, Identity(), placement="gradient", **options)


def seen_by(optimizer):
    """Return a list that gets a copy of the gradients of every step."""
    seen, update = [], optimizer._update
    optimizer._update = lambda: (seen.append(optimizer.flat.gradients.copy()), update())
    return seen


def in_grad(optimizer):
    return np.concatenate([np.zeros(p.numel(), np.float32) if p.grad is None else p.grad.detach().float().reshape(-1).numpy()
                           for p in optimizer.flat.parameters])  # fmt: skip


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


@pytest.mark.parametrize(("swap", "dtype"), [(swap_by_reference, torch.float32), (swap_by_reference, torch.bfloat16),
                                             (swap_by_copy, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("before", [9, 21])
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


@DTYPES
@pytest.mark.parametrize("before", [5, 20])
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
def test_weights_that_all_ranks_write_in_every_step_are_compared_once(row):
    """A clamp in every step does not cost a pass over all parameters in every one."""

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
        assert compared == [True, False, False, False, True, False, False, False]

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
