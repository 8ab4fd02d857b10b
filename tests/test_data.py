"""Shares of the data: the same order everywhere, every sample once, and nothing forgotten when a run goes on."""
# ruff: noqa: NPY002 - the global generator is what is tested

import io
import random
from collections import Counter

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from mpi_ef.data import (
    ShardedSampler,
    generator_for,
    loader_context,
    random_state,
    rank_seed,
    seed_rank,
    set_random_state,
)
from mpi_ef.errors import DataError, DisagreementError, OptionError, PeerError

RANKS = [1, 2, 3, 4]


def iteration(n, size, *, state=None, steps=None, **options):
    """Return, of each rank, the batches that the loop has used in one iteration, and the state at its end."""

    def program(comm):
        sampler = ShardedSampler(size, comm, **options)
        if state is not None:
            sampler.load_state_dict(state)
        used = []
        for batch in sampler:
            if len(used) == steps:
                break
            used.append(batch)
            sampler.advance()
        return used, sampler.state_dict()

    batches, states = zip(*virtual.results(n, program), strict=True)
    assert all(theirs == states[0] for theirs in states)
    return list(batches), states[0]


def counted(batches):
    return Counter(sample for of_rank in batches for batch in of_rank for sample in batch)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("size", [4, 7, 12, 50])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_is_used_and_no_rank_takes_more_steps(n, size, shuffle):
    batches, state = iteration(n, size, batch=3, shuffle=shuffle)
    assert len({tuple(map(len, of_rank)) for of_rank in batches}) == 1
    count = counted(batches)
    assert set(count) == set(range(size))
    assert count.total() == -(-size // n) * n
    assert max(count.values()) <= 2
    assert (state["epoch"], state["position"]) == (1, 0)


@pytest.mark.parametrize("n", RANKS)
def test_dropping_leaves_out_what_does_not_fill_a_batch_everywhere(n):
    batches, _ = iteration(n, 50, batch=3, drop_last=True)
    assert {len(batch) for of_rank in batches for batch in of_rank} == {3}
    count = counted(batches)
    assert max(count.values()) == 1
    assert 50 - 3 * n < count.total() <= 50


def test_epochs_and_seeds_have_orders_of_their_own():
    def program(comm):
        orders = []
        for seed in (0, 1):
            sampler = ShardedSampler(40, comm, batch=40, seed=seed)
            for epoch in range(2):
                sampler.set_epoch(epoch)
                orders.append(next(iter(sampler)))
        return orders

    (orders,) = virtual.results(1, program)
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_an_order_is_the_same_for_ever():
    """The specification, without NumPy's shuffling: a run that goes on with another version sees the same samples."""
    words = np.random.PCG64(np.random.SeedSequence(7, spawn_key=(0x6D706965, 2))).random_raw(10)
    (order,) = virtual.results(1, lambda comm: order_of(ShardedSampler(10, comm, batch=10, seed=7), epoch=2))
    assert order == sorted(range(10), key=lambda i: words[i]) == [6, 0, 5, 9, 4, 1, 3, 7, 8, 2]


def order_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return [sample for batch in sampler for sample in batch]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_step_uses_the_same_samples_on_any_number_of_ranks(n):
    together, _ = iteration(n, 48, batch=12 // n, seed=3)
    (alone,), _ = iteration(1, 48, batch=12, seed=3)
    for step, batch in enumerate(alone):
        assert sorted(sample for of_rank in together for sample in of_rank[step]) == sorted(batch)


@given(st.data())
def test_a_run_that_goes_on_with_other_ranks_uses_the_rest_of_the_epoch(data):
    size = data.draw(st.integers(4, 70), "size")
    (n, batch), (other_n, other_batch) = (
        (data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 9), "batch")) for _ in range(2)
    )
    steps = data.draw(st.integers(0, -(-size // (n * batch)) - 1), "steps")
    options = {"shuffle": data.draw(st.booleans(), "shuffle"), "seed": data.draw(st.integers(0, 3), "seed")}
    before, state = iteration(n, size, batch=batch, steps=steps, **options)
    assert (state["epoch"], state["position"]) == (0, steps * n * batch)
    after, state = iteration(other_n, size, batch=other_batch, state=state, **options)
    count = counted(before) + counted(after)
    assert set(count) == set(range(size))
    assert count.total() < size + other_n
    assert (state["epoch"], state["position"]) == (1, 0)
    assert len({tuple(map(len, of_rank)) for of_rank in after}) == 1


@given(st.data())
def test_a_run_that_goes_on_and_drops_uses_no_sample_twice(data):
    size, n, other_n = data.draw(st.integers(36, 70)), *(data.draw(st.integers(1, 4)) for _ in range(2))
    batch, other_batch = (data.draw(st.integers(1, 9)) for _ in range(2))
    steps = data.draw(st.integers(0, size // (n * batch) - 1))
    before, state = iteration(n, size, batch=batch, steps=steps, drop_last=True)
    after, later = iteration(other_n, size, batch=other_batch, state=state, drop_last=True)
    if size - state["position"] < other_n * other_batch:  # nothing is left: what came was the next epoch
        assert later["epoch"] == 2
        assert counted(after).total() > size - other_n * other_batch
    else:
        count = counted(before) + counted(after)
        assert max(count.values()) == 1
        assert size - other_n * other_batch < count.total() <= size


def test_what_is_drawn_ahead_is_not_used():
    """As a DataLoader with workers does it: the sampler is empty long before the loop is."""

    def program(comm):
        sampler = ShardedSampler(24, comm, batch=2, seed=5)
        drawn = list(sampler)
        for _ in range(3):
            sampler.advance()
        goes_on = ShardedSampler(24, comm, batch=2, seed=5)
        goes_on.load_state_dict(sampler.state_dict())
        assert list(goes_on) == drawn[3:]
        assert list(sampler) == drawn[3:]  # the same after a break in the loop
        return drawn

    assert len(counted(virtual.results(2, program))) == 24


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("told", ["advance", "epoch", "nothing"])
def test_each_iteration_is_a_new_epoch_whatever_the_loop_tells(told, ahead):
    def program(comm):
        sampler, epochs = ShardedSampler(10, comm, batch=4), []
        for epoch in range(3):
            if told == "epoch":
                sampler.set_epoch(epoch)
            used = []
            for batch in list(sampler) if ahead else sampler:
                used.append(batch)
                if told == "advance":
                    sampler.advance()
            epochs.append(used)
        expected = ShardedSampler(10, comm, batch=4)
        for epoch in range(3):
            expected.set_epoch(epoch)
            assert list(expected) == epochs[epoch]

    virtual.results(2, program)


def test_a_look_at_the_first_batch_changes_nothing():
    def program(comm):
        sampler = ShardedSampler(100, comm, batch=4)
        first = next(iter(sampler))
        assert next(iter(sampler)) == first
        assert (sampler.epoch, sampler.position) == (0, 0)

    virtual.results(2, program)


@pytest.mark.parametrize("drop_last", [True, False])
def test_steps_alone_lead_to_the_same_place(drop_last):
    def program(comm):
        counts, at_once = (ShardedSampler(23, comm, batch=2, drop_last=drop_last) for _ in range(2))
        for _ in range(3 * len(counts) + 2):
            counts.advance()
        at_once.advance(3 * len(counts) + 2)
        assert counts.state_dict() == at_once.state_dict()
        assert (counts.epoch, counts.position) == (3, 2 * 2 * comm.Get_size())
        assert len(list(counts)) == counts.batches_left == len(counts) - 2

    virtual.results(3, program)


def test_setting_the_epoch_of_a_run_that_goes_on_keeps_its_place():
    def program(comm):
        sampler = ShardedSampler(20, comm, batch=2)
        sampler.advance(2)
        sampler.set_epoch(0)
        assert sampler.position == 4
        sampler.set_epoch(1)
        assert (sampler.epoch, sampler.position) == (1, 0)

    virtual.results(1, program)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("size", lambda rank: {"size": 100 + (rank == 1)}),
        ("seed", lambda rank: {"seed": rank // 2}),
        ("batch", lambda rank: {"batch": 2 + rank}),
        ("shuffle", lambda rank: {"shuffle": rank == 0}),
        ("drop_last", lambda rank: {"drop_last": rank == 2}),
    ],
)
def test_all_ranks_raise_when_they_disagree(name, arguments):
    def program(comm):
        options = {"size": 100, "batch": 2} | arguments(comm.Get_rank())
        return ShardedSampler(options.pop("size"), comm, **options)

    errors = virtual.run(3, program)
    assert all(isinstance(error, DisagreementError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert f"ShardedSampler: ranks disagree on {name}: " in str(errors[0])


@pytest.mark.parametrize(
    ("size", "options", "error", "words"),
    [
        (3, {"batch": 1}, DataError, "3 samples for 4 ranks; use more data or fewer ranks"),
        (0, {"batch": 1}, DataError, "0 samples for 4 ranks"),
        (19, {"batch": 5, "drop_last": True}, DataError, "19 samples are not a batch of 5 for each of 4 ranks"),
        ([1, 2], {"batch": 1}, OptionError, r"size=\[1, 2\] is not a non-negative integer; pass len\(dataset\)"),
        (9, {"batch": 0}, OptionError, "batch=0 is not a positive integer; pass a whole number from 1 on"),
        (9, {"batch": 1.5}, OptionError, "batch=1.5 is not a positive"),
        (9, {"batch": 1, "seed": -1}, OptionError, "seed=-1 is negative"),
    ],
)
def test_wrong_arguments(size, options, error, words):
    errors = virtual.run(4, lambda comm: ShardedSampler(size, comm, **options))
    for raised in errors:
        assert raised.everywhere
        with pytest.raises(error, match=words):
            raise raised


def test_wrong_arguments_on_one_rank_are_told_on_all():
    errors = virtual.run(3, lambda comm: ShardedSampler(9, comm, batch=comm.Get_rank()))
    assert [type(error) for error in errors] == [OptionError, PeerError, PeerError]
    assert "rank 0 raised: ShardedSampler: batch=0" in str(errors[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda state, rank: state.update(size=11), OptionError, "size is 11 in the state and 10 here"),
        (lambda state, rank: state.update(seed=1), OptionError, "build the sampler with seed=1"),
        (lambda state, rank: state.update(shuffle=False), OptionError, "shuffle is False in the state and True here"),
        (lambda state, rank: state.pop("position"), OptionError, "the state has no position"),
        (lambda state, rank: state.update(position=10), OptionError, "position=10 in the state is beyond 10 samples"),
        (lambda state, rank: state.update(epoch=-1), OptionError, "epoch=-1"),
        (lambda state, rank: state.update(epoch=rank), DisagreementError, "ranks disagree on epoch"),
    ],
)
def test_wrong_states(change, error, words):
    def program(comm):
        sampler = ShardedSampler(10, comm, batch=2)
        sampler.advance()
        state = sampler.state_dict() | {"position": 8}
        change(state, comm.Get_rank())
        with pytest.raises(error, match=words):
            sampler.load_state_dict(state)
        assert (sampler.epoch, sampler.position) == (0, 4)
        with pytest.raises(OptionError, match="batches=-1"):
            sampler.advance(-1)

    virtual.results(2, program)


def test_states_survive_files_of_tensors():
    """Numbers that come back as other types of numbers are as good."""

    def program(comm):
        sampler = ShardedSampler(10, comm, batch=1)
        sampler.advance(3)
        state = {name: torch.tensor(value) for name, value in sampler.state_dict().items()}
        other = ShardedSampler(10, comm, batch=1)
        other.load_state_dict(state)
        assert other.state_dict() == sampler.state_dict()
        other.load_state_dict({name: np.int64(value) for name, value in sampler.state_dict().items()})
        assert all(type(value) in (int, bool) for value in other.state_dict().values())

    virtual.results(2, program)


class Numbers(Dataset):
    """Its samples are their own numbers, and what a worker draws from the three generators."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return i, torch.rand(()).item(), float(np.random.random()), random.random()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_stops_and_goes_on(workers):
    def program(comm):
        def loader_of(sampler):
            more = {"multiprocessing_context": loader_context(), "persistent_workers": True} if workers else {}
            return DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers, **more)

        straight, stopped, goes_on = (ShardedSampler(40, comm, batch=3, seed=2) for _ in range(3))
        expected, used = [], []
        straight_loader = loader_of(straight)
        while straight.epoch < 2:
            for i, *_ in straight_loader:
                expected.append(i.tolist())
                straight.advance()
        for i, *_ in loader_of(stopped):
            used.append(i.tolist())
            stopped.advance()
            if len(used) == 5:
                break
        goes_on.load_state_dict(stopped.state_dict())
        loader = loader_of(goes_on)
        while goes_on.epoch < 2:
            for i, *_ in loader:
                used.append(i.tolist())
                goes_on.advance()
        assert used == expected
        assert len(expected) == 2 * len(loader) == 28

    virtual.results(1, program)


def draws():
    return torch.rand(3).tolist(), np.random.random(3).tolist(), [random.random() for _ in range(3)]


@pytest.fixture
def _generators_as_they_were():
    state = random_state()
    yield
    set_random_state(state)


class Rank:
    def __init__(self, rank):
        self.rank = rank

    def Get_rank(self):
        return self.rank


@pytest.mark.usefixtures("_generators_as_they_were")
def test_ranks_have_random_numbers_of_their_own():
    seen = []
    for seed in (0, 1):
        for rank in range(4):
            seed_rank(Rank(rank), seed)
            first = draws()
            seed_rank(Rank(rank), seed)
            assert draws() == first
            seen += [*map(tuple, first), tuple(torch.rand(3, generator=generator_for(Rank(rank), seed)).tolist())]
            assert torch.equal(*(torch.rand(3, generator=generator_for(Rank(rank), seed, stream=1)) for _ in range(2)))
            seen.append(tuple(torch.rand(3, generator=generator_for(Rank(rank), seed, stream=1)).tolist()))
    assert len(set(seen)) == len(seen) == 2 * 4 * 5


@pytest.mark.slow
def test_torch_sees_another_seed_on_every_rank():
    """Its generator looks at 32 bits, where 100,000 random seeds would collide about once."""
    assert torch.equal(*(torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)))
    seeds = [rank_seed(11, rank) for rank in range(100_000)]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(64)] for seed in seeds[:4000]])
    np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=0.05)
    assert rank_seed(11, 3) != rank_seed(11, 3, stream=1) != rank_seed(12, 3, stream=1)
    with pytest.raises(OptionError, match="random numbers: seed=-1 is negative"):
        rank_seed(-1, 0)


@pytest.mark.usefixtures("_generators_as_they_were")
def test_random_states_come_back_from_a_file():
    seed_rank(Rank(1), 0)
    np.random.standard_normal()
    random.gauss(0.0, 1.0)  # both have computed a number more than they gave
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = *draws(), np.random.standard_normal(), random.gauss(0.0, 1.0)
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert (*draws(), np.random.standard_normal(), random.gauss(0.0, 1.0)) == expected
    with pytest.raises(OptionError, match="the state has no part numpy"):
        set_random_state({"torch": torch.get_rng_state(), "python": {}})


@pytest.mark.usefixtures("_generators_as_they_were")
def test_random_states_of_gpus_come_back_where_these_are(monkeypatch):
    """GPUs that are none: their generators are of the CPU here."""
    gpus = [torch.Generator().manual_seed(n) for n in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(gpus))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "cuda" not in random_state()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    file = io.BytesIO()
    torch.save(random_state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = [torch.rand(3, generator=generator).tolist() for generator in gpus]
    set_random_state(state)  # on a machine without one
    assert [torch.rand(3, generator=generator).tolist() for generator in gpus] != expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (*gpus, torch.Generator()))
    set_random_state(state)
    assert [torch.rand(3, generator=generator).tolist() for generator in gpus] == expected
