"""Votes, Signum and Lion."""

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from training import alone, assert_close, trained
from vectors_for_tests import gaussian

from mpi_ef import reference
from mpi_ef.collectives import TwoPhaseMean
from mpi_ef.compress import Identity, Keep, Vote, lazy, source
from mpi_ef.errors import OptionError
from mpi_ef.optim import Lion, Signum

each_world = pytest.mark.parametrize("n", [1, 2, 3, 4])
D = 5003


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_vote_is_the_signs(dtype):
    @given(st.integers(0, 9000), st.integers(0, 2**32))
    def check(d, seed):
        rng = np.random.default_rng(seed)
        x, y = (rng.integers(-2, 3, d).astype(dtype) for _ in range(2))
        codec = Vote().codec(d, dtype)
        wire, kept = np.full(codec.nbytes, 0xA5, np.uint8), np.empty(d, dtype)
        difference = lazy(x) - y
        for step in (0, 1, 2, 7):
            expected = np.where(x - y > 0, 1, -1) if step >= 2 else np.where(x - y >= 0, 1, -1)
            assert codec.encode(source(difference, Keep(lazy(y), kept)), wire, step=step)
            np.testing.assert_array_equal(codec.decode(wire), expected)
            np.testing.assert_array_equal(kept, y)
            assert np.unpackbits(wire)[: codec.nbytes * 8][d:].sum() == 0
            codec.encode(source(difference, Keep(difference, kept, less_message=True)), wire, step=step)
            np.testing.assert_array_equal(kept, x - y - expected)
        assert codec.nbytes == -(-d // 64) * 8

    check()


@each_world
def test_the_majority_decides_and_ties_go_up_and_down(n):
    votes = [np.sign(gaussian(rank, D, np.float64)) for rank in range(n)]

    def program(comm):
        plan, out = TwoPhaseMean(comm, Vote(), D, np.float64, residual=False), np.empty((3, D))
        for row in out:
            plan.exchange(gaussian(comm.Get_rank(), D, np.float64)).set_mean(row)
        return out

    for up, down, again in virtual.results(n, program):
        np.testing.assert_array_equal(up, np.where(sum(votes) >= 0, 1, -1))
        np.testing.assert_array_equal(down, np.where(sum(votes) > 0, 1, -1))
        np.testing.assert_array_equal(again, up)


def test_a_minority_cannot_turn_what_the_others_agree_on_and_order_does_not_matter():
    def outcome(vectors):
        def program(comm):
            plan, out = TwoPhaseMean(comm, Vote(), D, residual=False), np.empty(D, np.float32)
            plan.exchange(vectors[comm.Get_rank()]).set_mean(out)
            return out

        return virtual.results(len(vectors), program)[0]

    honest = [gaussian(rank, D) for rank in range(3)]
    agreed = np.abs(sum(np.sign(x) for x in honest)) == 3
    liars = [-1000 * sum(honest), -1000 * honest[0]]
    np.testing.assert_array_equal(outcome(honest + liars)[agreed], np.sign(honest[0])[agreed])
    np.testing.assert_array_equal(outcome(honest + liars), outcome([liars[0], *honest[::-1], liars[1]]))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("optimizer", "options", "betas"), [
    (Lion, {"betas": (0.8, 0.95)}, (0.8, 0.95)), (Signum, {"momentum": 0.7}, (0.7, 0.7)),
    (Signum, {"momentum": 0.0}, (0, 0)),
])
def test_with_the_identity_they_are_their_dense_originals(n, optimizer, options, betas):
    def build(net, comm):
        return optimizer(net.parameters(), comm, lr=1e-2, weight_decay=0.1, compressor=Identity(), **options)

    rows = trained(n, 25, build, dtype=torch.float64)
    plain = alone(n, 25, lambda net: reference.Lion(net.parameters(), lr=1e-2, betas=betas, weight_decay=0.1),
                  dtype=torch.float64)
    assert_close(rows[0].path, plain, rtol=1e-12, atol=1e-14)


def test_one_rank_alone_is_signum():
    rows = trained(1, 25, lambda net, comm: Signum(net.parameters(), comm, lr=1e-2, momentum=0.7), dtype=torch.float64)
    plain = alone(1, 25, lambda net: reference.Signum(net.parameters(), lr=1e-2, momentum=0.7), dtype=torch.float64)
    assert_close(rows[0].path, plain, rtol=1e-12)


def test_a_step_sends_a_bit_for_every_entry_and_no_feedback_is_made_for_votes():
    from mpi_ef.feedback import ErrorFeedback

    def program(comm):
        p = torch.nn.Parameter(torch.ones(64_000))
        optimizer = Lion([p], comm)
        p.grad = torch.full_like(p, 1.0 + comm.Get_rank())
        optimizer.step()
        assert optimizer.sent_nbytes <= 2 * 64_000 / 8 / 2 + 32
        with pytest.raises(OptionError, match="says nothing about a good eta"):
            ErrorFeedback("econtrol", TwoPhaseMean(comm, Vote(), D))

    virtual.results(2, program)
