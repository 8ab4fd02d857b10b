"""Laws of all optimizers in one place; what holds for one of them alone is tested in its own file."""

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from optimizer_table import ROWS, cases, rows
from programs import loss_of, same_bits
from training import (
    assert_replicas,
    assert_resumes,
    assert_skips_broken_gradients,
    dying_network,
    everything,
    groups_of,
    net_of,
    parameters_of,
    seeded,
    steps_of,
    trained,
)

from mpi_ef import kernels
from mpi_ef.errors import DisagreementError, OptionError
from mpi_ef.kernels import reference
from mpi_ef.optim import DistributedOptimizer

MOMENTS = cases(lambda row: row.moments)
THREE = pytest.param(3, marks=pytest.mark.slow)
CALLS = ("Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Iallgather", "Bcast", "allgather")


def learning(row, freeze):
    """Return options for learning; the variance of 0/1 Adam is frozen earlier."""
    return row.learning | ({"freeze_step": freeze} if "freeze_step" in row.options else {})


@rows()
@pytest.mark.parametrize("n", [1, 2, THREE, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_replicas_are_equal_and_learn(row, n):
    steps, first, share = row.learns
    runs = trained(n, steps, lambda net, comm: row(net, comm, **learning(row, 20)))
    assert_replicas(runs)
    for run in runs:
        assert getattr(run.optimizer, "frozen_step", None) == row.frozen
        assert set(run.optimizer.per_rank()) <= row.own
        assert np.mean(run.losses[-10:]) < share * np.mean(run.losses[first])


@rows()
def test_16_bit_parameters(row):
    steps = 40 if row.frozen == 12 else 60
    runs = trained(2, steps, lambda net, comm: row(net, comm, **learning(row, 15)), dtype=torch.bfloat16)
    assert_replicas(runs)
    for run in runs:
        assert np.mean(run.losses[-5:]) < 0.8 * np.mean(run.losses[:5])


@MOMENTS
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_saved_and_loaded_a_step_is_the_same(row, case, n):
    """In every phase, with groups."""
    assert_resumes(n, lambda net, comm: row.make(groups_of(net), comm, **row.options), before=case, after=6)


@MOMENTS
def test_broken_gradients_are_skipped(row, case):
    assert_skips_broken_gradients(3, row, warm=case)


@rows()
def test_an_early_state_is_loaded_into_an_optimizer_that_was_further(row):
    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = row(net, comm)
        steps_of(net, optimizer, rank, range(2))
        early = parameters_of(net), optimizer.state_dict()
        path = steps_of(net, optimizer, rank, range(2, 18))
        late = everything(net, optimizer, "sent_nbytes")
        assert (getattr(optimizer, "frozen_step", None) is None) == (row.frozen is None)
        for p, value in zip(net.parameters(), early[0], strict=True):
            p.data.copy_(torch.from_numpy(value))
        optimizer.load_state_dict(early[1])
        assert getattr(optimizer, "frozen_step", None) is None
        assert same_bits(steps_of(net, optimizer, rank, range(2, 18)), path)
        assert same_bits(everything(net, optimizer, "sent_nbytes"), late)

    virtual.results(2, program)


@rows(lambda row: row.freezes)
def test_the_freeze_comes_by_itself_and_when_it_would_have_without_an_interruption(row):
    options = {name: value for name, value in row.options.items() if name == "compressor"} | row.freezes

    def build(net, comm):
        return row.make(net.parameters(), comm, **options)

    frozen = [run.optimizer.frozen_step for run in trained(2, 40, build)]
    assert frozen[0] == frozen[1]
    assert 11 <= frozen[0] < 40
    for before in (8, frozen[0] - 2):
        assert_resumes(2, build, before=before, after=frozen[0] - before + 3)


@pytest.mark.slow
@cases(lambda row: row.dying, often=1)
def test_dead_units_do_not_explode(row, case):
    """Entries without variance, and a layer whose inputs are zero: what turned other implementations into NaN."""

    def program(comm):
        net, errors, losses, rests = dying_network(), [], [], True
        net.append(seeded(torch.nn.Linear(3, 3)))
        asleep = seeded(torch.nn.Linear(4, 3, bias=False))
        optimizer = row.make([*net.parameters(), *asleep.parameters()], comm, **row.options | case)
        before, late = asleep.weight.detach().clone(), case.get("var_freeze_step", 0) > 100
        for step in range(550 if late else 360):
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            (loss + asleep(torch.zeros(2, 4)).sum()).backward()
            optimizer.step()
            errors.append(float(np.linalg.norm(optimizer.per_rank().get("e_i", 0.0))))
            losses.append(loss.item())
            rests = rests and torch.equal(asleep.weight, before)
        assert rests == row.rests
        assert all(np.isfinite(array).all() for array in (optimizer.replicated() | optimizer.per_rank()).values())
        return losses, errors

    for losses, errors in virtual.results(2, program):
        assert np.isfinite(losses).all()
        assert np.mean(losses[-20:]) < np.mean(losses[45:55])
        assert max(errors[300:]) < 5 * max(errors[50:150]) if row.loses else not any(errors)


@pytest.mark.slow
@rows(lambda row: row.loses)
def test_errors_stay_bounded(row):
    def program(comm):
        net, norms, losses = net_of(), [], []
        optimizer = row(net, comm, **row.lasting)
        for step in range(320):
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            norms.append(float(np.linalg.norm(optimizer.per_rank()["e_i"])))
            losses.append(loss.item())
        return norms, losses

    for norms, losses in virtual.results(2, program):
        if "freeze_step" in row.lasting:
            assert not any(norms[:20])
        assert max(norms[row.settles + 50 :]) < 2 * max(norms[(row.frozen or -1) + 1 : row.settles])
        assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])


@rows(lambda row: row.clips)
def test_clipping_is_global(row):
    """All ranks scale by the same factor, so that the mean of their squared norms is clip^2 at most; in every phase."""
    steps, seen = max(row.moments), {}

    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = row(net, comm, clip=0.5)
        for step in range(steps):
            optimizer.zero_grad()
            (100 * (rank + 1) * loss_of(net, rank, step)).backward()
            optimizer.flat.collect_gradients()
            before = optimizer.flat.gradients.copy()
            optimizer.step()
            seen[step, rank] = before, optimizer.flat.gradients.copy()

    virtual.results(2, program)
    for step in range(steps):
        (a, a_clipped), (b, b_clipped) = seen[step, 0], seen[step, 1]
        norm = np.sqrt((np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2) / 2)
        assert norm > 5
        np.testing.assert_allclose(a_clipped, a * (0.5 / norm), rtol=1e-5)
        np.testing.assert_allclose(b_clipped, b * (0.5 / norm), rtol=1e-5)
        squares = (float(np.linalg.norm(a_clipped)) ** 2 + float(np.linalg.norm(b_clipped)) ** 2) / 2
        np.testing.assert_allclose(squares, 0.25, rtol=1e-5)


@rows()
def test_a_step_takes_few_collectives_and_few_bytes(row):
    def program(comm):
        calls, net = [], seeded(torch.nn.Linear(200, 50))
        optimizer = row(net, comm, **row.wire)
        for step in range(15):
            net.zero_grad()
            net(torch.full((1, 200), (1.0 + comm.Get_rank() + step) / 100)).square().mean().backward()
            if step == 14:
                before = optimizer.sent_nbytes
                for name in CALLS:
                    call = getattr(comm, name)
                    setattr(comm, name, lambda *a, call=call, name=name: calls.append(name) or call(*a))
            optimizer.step()
        assert optimizer.dense_nbytes > row.saves * (optimizer.sent_nbytes - before)
        return tuple(sorted(calls))

    assert virtual.results(2, program) == [row.calls] * 2


@cases(lambda row: row.bad)
def test_bad_options(row, case):
    options, text = case
    for outcome in virtual.run(2, lambda comm: row.make(net_of().parameters(), comm, **options)):
        assert isinstance(outcome, OptionError)
        assert text in str(outcome)
        assert "\n" not in str(outcome)


@rows()
def test_ranks_with_other_options_all_learn_about_it(row):
    name, *values = row.differing
    text = f"disagree on {name}: {values[0]} on rank 0; {values[1]} on rank 1"
    for outcome in virtual.run(2, lambda comm: row(net_of(), comm, **{name: values[comm.Get_rank()]})):
        assert isinstance(outcome, DisagreementError)
        assert text in str(outcome)

    def program(comm):
        words = "disagree on hyper-parameters: .*0.1.* on rank 0; .*1.1.* on rank 1"
        with pytest.raises(DisagreementError, match=words):
            row.make([{"params": net_of().parameters(), "lr": 0.1 + comm.Get_rank()}], comm, **row.options)

    virtual.results(2, program)


@rows()
def test_learning_rates_that_drift_apart_stop_all_ranks(row):
    """For example ReduceLROnPlateau on each rank's own loss."""

    def program(comm):
        net = net_of()
        optimizer = row.make([{"params": net.parameters(), "lr": 0.1}], comm, **row.options)
        optimizer.param_groups[0]["lr"] /= 1 + comm.Get_rank()
        text = f"{type(optimizer).__name__}.step: ranks disagree on hyper-parameters: .*0.05.* on rank 1"
        before = everything(net, optimizer)
        with pytest.raises(DisagreementError, match=text):
            steps_of(net, optimizer, comm.Get_rank(), range(1))
        assert same_bits(everything(net, optimizer), before)

    virtual.results(2, program)


@rows()
def test_loading_on_one_rank_only_stops_all_ranks(row):
    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = row(net, comm)
        saved = optimizer.state_dict()
        steps_of(net, optimizer, rank, range(3))
        if rank == 0:
            optimizer.load_state_dict(saved)
        with pytest.raises(DisagreementError, match="disagree on completed steps: 0 on rank 0; 3 on rank 1"):
            optimizer.step()

    virtual.results(2, program)


@rows()
def test_groups_cannot_be_added_later(row):
    def program(comm):
        with pytest.raises(OptionError, match="a group cannot be added later"):
            row(net_of(), comm).add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})

    virtual.results(1, program)


# Does not hold yet: that wrappers refuse states of the others (KeyError 'placement'), that these refuse states of wrappers
# in one line, and that DistributedOptimizer refuses the state of another torch optimizer (it is loaded).
@rows()
def test_state_of_another_optimizer_is_refused(row):
    def wraps(optimizer):
        return isinstance(optimizer, DistributedOptimizer)

    def program(comm):
        net = net_of()
        optimizer = row(net, comm)
        steps_of(net, optimizer, comm.Get_rank(), range(2))
        before, name = everything(net, optimizer), type(optimizer).__name__
        for other in [other(net_of(), comm) for other in ROWS.values()]:
            if wraps(other) == wraps(optimizer) and type(other) is not type(optimizer):
                with pytest.raises(OptionError) as caught:
                    optimizer.load_state_dict(other.state_dict())
                said = "the saved " if wraps(other) else f"the state is of {type(other).__name__}, this is {name}"
                assert f"load_state_dict: {said}" in str(caught.value)
                assert "\n" not in str(caught.value)
                assert same_bits(everything(net, optimizer), before)

    virtual.results(2, program)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernels_are_their_twins(dtype):
    @given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.booleans(), st.integers(0, 2**32))
    def check(sizes, long, seed):
        sizes = [*sizes, 5000] if long else sizes
        rng, layers, d = np.random.default_rng(seed), len(sizes), sum(sizes)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        grad, start, m, x, u = (rng.normal(size=d).astype(dtype) for _ in range(5))
        grad.flags.writeable = False  # as in a step; other types are other machine code
        v, inverse = (rng.random(d).astype(dtype) ** power for power in (8, 4))
        gaps = inverse.copy()
        gaps[rng.random(d) < 0.3] = 0
        gaps[: sizes[0]] = 0
        scalars = [dtype(value) for value in rng.random(6)]
        factors, least = ((rng.random(layers) + 0.1).astype(dtype) for _ in range(2))
        betas, follow = np.array([0.9, 0.99], dtype), (dtype(1.3), dtype(1e-8), factors, least, starts)
        for name, inputs, outputs in (
            ("update_moments", (grad, *scalars[:2]), (m, v)), ("adam_step", (m, v, *scalars[:4]), (x,)),
            ("adam", (grad, *scalars), (m, v, x)), ("preconditioned_step", (m, v, *scalars[:2]), (x,)),
            ("sign_step", (grad, *scalars[:2]), (x,)), ("momentum_step", (grad, inverse, *scalars[:3]), (m, x)),
            ("local_step", (grad, inverse, start, *scalars[:4]), (m, u, x)),
            ("layer_norms", (x, starts), (np.empty(layers),)), ("add_layers", (x, factors, starts), (u,)),
            ("scaled_momentum", (x, m, dtype(0.9), factors, starts), (u,)),
            ("follow_momentum", (x, gaps, betas, *follow), (m, inverse, np.empty(layers, dtype))),
        ):  # fmt: skip
            mine, theirs = ([a.copy() for a in outputs] for _ in range(2))
            getattr(kernels, name)(*inputs, *mine)
            getattr(reference, name)(*inputs, *theirs)
            for a, b in zip(mine, theirs, strict=True):
                assert a.tobytes() == b.tobytes(), name
        assert kernels.l1_norm(x) == reference.l1_norm(x)
        norms = np.empty(layers)
        kernels.layer_norms(x, starts, norms)
        whole = [np.linalg.norm(part.astype(float)) for part in np.split(x, starts[1:-1])]
        np.testing.assert_allclose(whole, norms, rtol=1e-14)

    check()
