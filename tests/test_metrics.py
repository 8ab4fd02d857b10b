"""Means of metrics over ranks, and a rank's share of a dataset."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset
from virtual import results, run

from mpi_ef import mean_metrics, print_metrics, shard
from mpi_ef.errors import DataError, DisagreementError, OptionError, PeerError


def test_the_mean_is_the_same_on_all_ranks_whatever_the_numbers_are():
    def program(comm):
        r = comm.Get_rank()
        return mean_metrics({"loss": torch.tensor(0.5 + r, requires_grad=True), "right": np.int64(r), "lr": 0.1}, comm)

    every = results(3, program)
    assert every[0] == {"loss": 1.5, "right": 1.0, "lr": 0.1}  # what is equal keeps its bits
    assert [*every[0]] == ["loss", "right", "lr"]
    assert every[0] == every[1] == every[2]


def test_weights_are_numbers_of_samples_and_what_has_none_does_not_count():
    def program(comm):
        r = comm.Get_rank()
        return mean_metrics({"loss": [1.0, 4.0, math.nan][r]}, comm, weight=[30, 10, 0][r])

    assert results(3, program) == [{"loss": 1.75}] * 3


def test_a_nan_that_counts_is_seen_on_all_ranks():
    for means in results(2, lambda comm: mean_metrics({"loss": math.nan if comm.Get_rank() else 1.0}, comm)):
        assert math.isnan(means["loss"])


@pytest.mark.parametrize(("own", "weight", "first", "second"), [
    ({"accuracy": 1.0}, 1, DisagreementError, DisagreementError), ({"loss": "low"}, 1, PeerError, OptionError),
    ({"loss": torch.ones(2)}, 1, PeerError, OptionError), ({"loss": 1.0}, -1, PeerError, OptionError),
    ({"loss": 1.0}, math.inf, PeerError, OptionError),
])
def test_what_is_wrong_on_one_rank_is_one_line_on_all(own, weight, first, second):
    def program(comm):
        return mean_metrics(own, comm, weight=weight) if comm.Get_rank() else mean_metrics({"loss": 1.0}, comm)

    answers = run(2, program)
    assert [type(answer) for answer in answers] == [first, second]
    assert all(str(answer).startswith("mean_metrics: ") and "\n" not in str(answer) for answer in answers)


def test_no_weight_at_all_is_an_error_on_all_ranks():
    for answer in run(2, lambda comm: mean_metrics({"loss": 1.0}, comm, weight=0)):
        assert isinstance(answer, OptionError)
        assert answer.everywhere
    assert results(2, lambda comm: mean_metrics({}, comm, weight=0)) == [{}, {}]


def test_rank_0_prints_one_line(capsys):
    def program(comm):
        return print_metrics("epoch 3", comm, loss=comm.Get_rank() / 3, seconds=1234.56)

    assert results(2, program) == [{"loss": 1 / 6, "seconds": 1234.56}] * 2
    assert capsys.readouterr().out == "epoch 3  loss 0.1667  seconds 1235\n"
    results(2, lambda comm: print_metrics("done", comm))
    assert capsys.readouterr().out == "done\n"


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_shares_have_every_sample_and_equal_lengths(n, drop_last):
    data = TensorDataset(torch.arange(10))
    shares = results(n, lambda comm: [int(x) for (x,) in shard(data, comm, seed=1, drop_last=drop_last)])
    seen = [x for share in shares for x in share]
    assert len({len(share) for share in shares}) == 1
    assert len(seen) == (10 // n if drop_last else -(-10 // n)) * n
    assert len(set(seen)) == (min(10, len(seen)))
    assert shares[0] != sorted(shares[0])
    in_order = results(n, lambda comm: [int(x) for (x,) in shard(data, comm, shuffle=False, drop_last=True)])
    assert in_order[0] == list(range(0, 10 // n * n, n))


def test_a_dataset_that_selects_is_asked_to():
    class Selecting(list):
        def select(self, indices):
            return Selecting(self[i] for i in indices)

    for share in results(2, lambda comm: shard(Selecting("abcd"), comm)):
        assert type(share) is Selecting
        assert len(share) == 2


def test_shares_that_cannot_be_are_one_line():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(10))

    few = run(3, lambda comm: shard([1, 2], comm))
    assert [type(error) for error in few] == [DataError] * 3
    assert "2 samples for 3 ranks" in str(few[0])
    (alone,) = run(1, lambda comm: shard(Stream(), comm))
    assert isinstance(alone, DataError)
    different = run(2, lambda comm: shard(range(10 + comm.Get_rank()), comm))
    assert [type(error) for error in different] == [DisagreementError] * 2
