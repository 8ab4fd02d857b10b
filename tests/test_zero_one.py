"""0/1 Adam: a seldom variance, replicas that part and meet again, and nothing that explodes."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
import virtual
from optimizer_table import SHORT, SIGNS
from programs import loss_of, same_bits
from stored import MemoryStore
from training import (
    alone,
    assert_close,
    assert_replicas,
    everything,
    groups_of,
    loss_in,
    net_of,
    parameters_of,
    steps_of,
    trained,
)

from mpi_ef import reference
from mpi_ef.compress import Identity, TopK
from mpi_ef.errors import DisagreementError, NonFiniteError, OptionError, PeerError
from mpi_ef.optim import OneBitAdam, ZeroOneAdam
from mpi_ef.optim.adam import VarianceWatch
from mpi_ef.state.training import Training

each_world = pytest.mark.parametrize("n", [1, 2, 3])


@each_world
@pytest.mark.parametrize("compressor", [SIGNS, Identity()], ids=str)
def test_before_the_first_signs_it_is_adamw(n, compressor):
    def schedule(optimizer, step):
        optimizer.param_groups[0]["lr"] = 2e-2 * 0.9**step

    options = {"lr": 1e-2, "betas": (0.8, 0.99), "compressor": compressor}
    rows = trained(n, 16, lambda net, comm: ZeroOneAdam(groups_of(net), comm, **options), dtype=torch.float64,
                   each=schedule)
    adamw = alone(n, 16, lambda net: torch.optim.AdamW(groups_of(net), lr=1e-2, betas=(0.8, 0.99), weight_decay=0.0),
                  dtype=torch.float64, each=schedule)
    assert_close(rows[0].path, adamw, rtol=1e-12, atol=1e-14)


class Workers:
    """The plain algorithm on the tests' networks, one for every worker."""

    def __init__(self, n, dtype, options, groups):
        self.nets = [net_of(dtype) for _ in range(n)]
        self.trained = [p.requires_grad for p in self.nets[0].parameters()]
        trained = [p for p in self.nets[0].parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in trained]
        decays = {id(p): (number, group.get("weight_decay", 0.0)) for number, group in enumerate(groups(self.nets[0]))
                  for p in group["params"]}
        places = [decays[id(p)] for p in trained]
        self.group_of = np.repeat([number for number, _ in places], self.sizes)
        decay = np.repeat([decay for _, decay in places], self.sizes)
        start = np.concatenate([p.detach().double().numpy().ravel() for p in trained])
        options = {name: value for name, value in options.items() if name != "lr"}
        self.optimizer, self.t = reference.ZeroOneAdam(start, n, sizes=self.sizes, weight_decay=decay, **options), 0

    def step(self, lrs):
        """One step of all ranks; `lrs` by group. Return whether the replicas are the same afterwards."""
        rows = []
        for rank, (net, x) in enumerate(zip(self.nets, self.optimizer.x, strict=True)):
            trained = [p for p in net.parameters() if p.requires_grad]
            with torch.no_grad():
                for p, part in zip(trained, np.split(x, np.cumsum(self.sizes)[:-1]), strict=True):
                    p.copy_(torch.from_numpy(part).view(p.shape))
            net.zero_grad()
            loss_in(net, rank, self.t).backward()
            rows.append(np.concatenate([np.zeros(p.numel()) if p.grad is None else p.grad.double().numpy().ravel()
                                        for p in trained]))
            moving = np.repeat([p.grad is not None for p in trained], self.sizes)
        self.t += 1
        return self.optimizer.step(rows, np.asarray(lrs, float)[self.group_of], moving)


def lrs_of(step):
    """Falling, zero for a while, and back at once."""
    return (0.0, 0.0) if 22 <= step < 29 else (2e-2 * 0.95**step, 1e-2)


@each_world
@pytest.mark.parametrize(("more", "dtype", "tolerance"), [
    ({}, torch.float64, 1e-12), ({}, torch.float32, 1e-5), ({"local_step_clipper": 1}, torch.float32, 1e-5),
    ({"local_step_clipper": 1}, torch.float64, 1e-12), ({"variance_floor": 0.0}, torch.float64, 1e-12),
    ({"bias_correction": False}, torch.float64, 1e-12),  # such long steps at first that float32 goes a way of its own
], ids=str)
def test_with_the_identity_it_is_the_plain_algorithm(n, more, dtype, tolerance):
    """Step by step on every rank, with groups, decay and a schedule that comes down to zero."""
    options = SHORT | more

    def schedule(optimizer, step):
        for group, lr in zip(optimizer.param_groups, lrs_of(step), strict=True):
            group["lr"] = lr

    rows = trained(n, 45, lambda net, comm: ZeroOneAdam(groups_of(net), comm, compressor=Identity(), **options),
                   dtype=dtype, each=schedule)
    plain, met = Workers(n, dtype, options, groups_of), 0
    for step in range(45):
        met += plain.step(lrs_of(step))
        for rank in range(n):
            flat = np.concatenate([p.ravel() for p, is_trained in zip(rows[rank].path[step], plain.trained, strict=True)
                                   if is_trained])
            distance = np.linalg.norm(flat - plain.optimizer.x[rank])
            assert distance <= tolerance * np.linalg.norm(flat), f"step {step} on rank {rank}"
    assert met == (45 if more.get("local_step_clipper") == 1 else 12 + 6 + 3 + 5)


@each_world
@pytest.mark.parametrize(("compressor", "dtype"), [
    (SIGNS, torch.float32), (TopK(0.1), torch.float32), (SIGNS, torch.bfloat16),
], ids=str)
def test_replicas_meet_when_they_should(n, compressor, dtype):
    def build(net, comm):
        return ZeroOneAdam(net.parameters(), comm, compressor=compressor, **SHORT)

    def names(optimizer, step):
        assert set(optimizer.replicated()) == ({"m", "v", "u", "x"} if step < 11 else {"v", "x"})
        assert set(optimizer.per_rank()) >= ({"e_i"} if step < 11 else {"e_i", "m", "u"})

    runs = trained(n, 120, build, dtype=dtype, sees=names)
    meets = [step < 18 or (step < 24 and step % 2 == 1) or (step >= 24 and step % 4 == 3) for step in range(120)]
    assert runs[0].met == meets
    assert_replicas(runs)


def test_exchanges_become_rare():
    """The variance is updated after 1, 1, 2, 2, 4, 4 ... steps; what travels in a step says what it was."""
    kinds = []

    def program(comm):
        net = net_of()
        optimizer = ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, **SHORT | {"var_freeze_step": 30})
        for step in range(60):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            before = optimizer.sent_nbytes
            optimizer.step()
            if comm.Get_rank() == 0:
                kinds.append(optimizer.sent_nbytes - before)
        assert optimizer.frozen_step == 30
        assert optimizer.variance_updates == 8
        assert optimizer.local_step_interval == 4
        return optimizer.dense_nbytes

    dense = virtual.results(2, program)[0]
    whole = [step for step, kind in enumerate(kinds, 1) if kind >= dense]
    assert whole == [1, 2, 3, 5, 7, 11, 15, 23]
    assert [step for step, kind in enumerate(kinds, 1) if kind == 0] == [
        step for step in range(37, 61) if (step % 2 if step <= 42 else (step - 42) % 4)
    ]


def test_learning_rates_may_fall_to_nothing_and_come_back():
    """The mean momentum is the average of the last ones: nothing is divided by the sum of learning rates."""

    def program(comm):
        net, losses = net_of(), []
        optimizer = ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, **SHORT)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.0 if step % 40 < 3 else 1e-2 * (1e-7 if step % 40 > 25 else 1.0)
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    for losses in virtual.results(2, program):
        assert np.max(losses[20:]) < 1.5 * np.max(losses[:5])
        assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_parameters_of_every_rank_come_back_with_the_optimizer():
    """The model of rank 0 is all that has to be saved of models; and states can be loaded across the freeze."""

    def program(comm):
        rank = comm.Get_rank()

        def run(net, optimizer, steps):
            for step in steps:
                optimizer.zero_grad()
                loss_of(net, rank, step).backward()
                optimizer.step()

        net, other = net_of(), net_of()
        optimizer = ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, **SHORT)
        again = ZeroOneAdam(other.parameters(), comm, compressor=SIGNS, **SHORT)
        run(net, optimizer, range(9))
        early = parameters_of(net), optimizer.state_dict()
        run(net, optimizer, range(9, 26))
        assert not optimizer.synchronized
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(comm.allgather(net.state_dict())[0])
        again.load_state_dict(torch.load(file, weights_only=True))
        assert same_bits(parameters_of(net), parameters_of(other))
        run(net, optimizer, range(26, 40))
        run(other, again, range(26, 40))
        assert same_bits(parameters_of(net), parameters_of(other))
        for replica, replayed in ((net, optimizer), (other, again)):
            with torch.no_grad():
                for p, value in zip(replica.parameters(), early[0], strict=True):
                    p.copy_(torch.from_numpy(value))
            replayed.load_state_dict(early[1])
            assert replayed.frozen_step is None
            run(replica, replayed, range(9, 26))
        assert same_bits(parameters_of(net), parameters_of(other))
        return torch.equal(net.first.weight, other.first.weight)

    assert all(virtual.results(2, program))


def test_what_cannot_be_sent_changes_nothing():
    """An overflow that only the exchange sees: parameters are this rank's again."""

    def program(comm):
        net = net_of()
        optimizer = ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, **SHORT)
        rule = optimizer.rules["momentum"]
        for step in range(27):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
        assert optimizer.local_steps == 3
        before = parameters_of(net), optimizer.state_dict()
        sending = rule.step
        rule.step = lambda vector: (_ for _ in ()).throw(NonFiniteError("overflow", (0,)))
        for call in (optimizer.step, optimizer.synchronize):
            with pytest.raises(NonFiniteError):
                call()
            assert same_bits(parameters_of(net), before[0])
        rule.step = sending
        after = optimizer.state_dict()
        assert after["counters"] == before[1]["counters"]
        assert all(torch.equal(a, after["arrays"][name]) for name, a in before[1]["arrays"].items())

    virtual.results(2, program)


def test_replicas_meet_when_they_are_asked_to():
    def program(comm):
        net = net_of()
        optimizer = ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, **SHORT)
        met = []
        for step in range(60):
            if step in {10, 25, 26, 41}:
                optimizer.synchronize()
                assert optimizer.synchronized
                met.append(parameters_of(net))
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
        return met, loss.item()

    rows = virtual.results(3, program)
    assert all(same_bits(met, rows[0][0]) for met, _ in rows)


def test_drifted_replicas_are_found_between_synchronisations():
    def program(comm):
        net = net_of()
        optimizer = ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, **SHORT)
        for step in range(26):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
        before = parameters_of(net)
        optimizer.check_replicas()
        assert same_bits(parameters_of(net), before)
        optimizer.arrays["x"][0] += comm.Get_rank()
        with pytest.raises(DisagreementError, match="parameter number 0"):
            optimizer.check_replicas()

    virtual.results(2, program)


def test_nothing_that_was_not_sent_is_lost_at_the_freeze():
    def program(comm):
        net = net_of()
        optimizer = ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, betas=(0.8, 0.99), **SHORT)
        for step in range(12):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            if step == 11:
                other = net_of()
                twin = ZeroOneAdam(other.parameters(), comm, compressor=SIGNS, betas=(0.8, 0.99),
                                   **SHORT | {"var_freeze_step": 99})
                twin.load_state_dict(optimizer.state_dict())
                twin.flat.values[:] = optimizer.flat.values
                for p, q in zip(other.parameters(), net.parameters(), strict=True):
                    p.grad = None if q.grad is None else q.grad.clone()
                twin.step()
            optimizer.step()
        mine, theirs = optimizer.rules["momentum"].per_rank(), twin.rules["momentum"].per_rank()
        assert set(mine) == {"e_i", "plan.residual"}
        for name, unsent in mine.items():
            assert unsent.any()
            np.testing.assert_allclose(unsent, 0.2 * theirs[name], rtol=1e-6)

    virtual.results(2, program)


@pytest.mark.parametrize("writes", ["everywhere", "on one rank"])
@pytest.mark.parametrize("by_reference", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_weights_are_not_lost_in_a_save_between_two_synchronisations(writes, by_reference, dtype):
    """A state has x and u, from which the weights follow, not these: it is not saved, and the training is as it was."""
    store = MemoryStore()

    def program(comm):
        rank, nets = comm.Get_rank(), [net_of(dtype), net_of(dtype)]
        optimizer, twin = (ZeroOneAdam(net.parameters(), comm, compressor=SIGNS, **SHORT) for net in nets)
        paths = [steps_of(*pair, rank, range(26)) for pair in zip(nets, (optimizer, twin), strict=True)]
        assert not optimizer.synchronized
        p, own = nets[0].last.weight, nets[0].last.weight.data
        backup, training = own.clone(), Training(model=nets[0], optimizer=optimizer, random=False)
        if writes == "everywhere" or rank == 1:
            if by_reference:
                p.data = torch.full_like(p.data, 0.125 + rank)
            else:
                p.data.fill_(0.125 + rank)
            with pytest.raises(OptionError, match=r"parameter number 5 \(3, 5\) was written to between two"):
                optimizer.state_dict()
        else:
            optimizer.state_dict()
        with pytest.raises((OptionError, PeerError), match="call optimizer.synchronize"):
            training.save(store, comm, 26)
        assert not store.steps
        p.data = own
        p.data.copy_(backup)
        training.save(store, comm, 26)
        paths = [steps_of(*pair, rank, range(26, 36)) for pair in zip(nets, (optimizer, twin), strict=True)]
        assert same_bits(*paths)
        assert same_bits(everything(nets[0], optimizer), everything(nets[1], twin))

    virtual.results(2, program)


def test_the_variance_settles():
    """As the watch of 1-bit Adam, with the bias of a variance that was updated less often."""
    steady, updates, v = VarianceWatch(0.9), 0, np.zeros(130, np.float32)
    for step in range(1, 12):
        if step < 4 or step % 2:
            v, updates = np.float32(0.9) * v + np.float32(0.1), updates + 1
        assert steady.settled(step, v, 1.0, updates=updates) == (step == 11)


def test_with_a_synchronisation_every_step_it_is_1_bit_adam():
    """What is exchanged after the freeze is the new momentum, and errors are momenta. To rounding."""

    def build(kind, net, comm):
        more = {"freeze_step": 10} if kind is OneBitAdam else {"var_freeze_step": 10}
        return kind(net.parameters(), comm, lr=1e-2, compressor=SIGNS, **more)

    rows = [trained(2, 25, lambda net, comm, kind=kind: build(kind, net, comm), dtype=torch.float64)
            for kind in (ZeroOneAdam, OneBitAdam)]
    assert_close(rows[0][0].path, rows[1][0].path, rtol=1e-9, atol=1e-11)


def test_a_thirtieth_of_the_bytes_and_then_less():
    def program(comm):
        net = torch.nn.Linear(200, 50)
        optimizer = ZeroOneAdam(net.parameters(), comm, var_freeze_step=2, local_step_scaler=4, local_step_clipper=4)
        marks = [0]
        for step in range(18):
            net.zero_grad()
            net(torch.full((1, 200), 1.0 + comm.Get_rank() + step)).square().sum().backward()
            optimizer.step()
            marks.append(optimizer.sent_nbytes)
        sent = [after - before for before, after in pairwise(marks)]
        assert all(optimizer.dense_nbytes > 25 * nbytes for nbytes in sent[2:])
        assert optimizer.dense_nbytes * 8 > 25 * 4 * sum(sent[-8:])
        assert sum(nbytes == 0 for nbytes in sent) == 2 + 6

    virtual.results(2, program)
