"""Laws of all optimizers in one place; what holds for one of them alone is tested in its own file."""

import numpy as np
import pytest
import torch
import virtual
from hypothesis import given
from hypothesis import strategies as st
from optimizer_table import ROWS, Row, cases, rows
from programs import laws_in, loss_of, same_bits
from training import (
    assert_resumes,
    dying_network,
    everything,
    groups_of,
    net_of,
    seeded,
    steps_of,
    trained,
)

from mpi_ef import kernels, registry
from mpi_ef.compress import TopK
from mpi_ef.errors import OptionError
from mpi_ef.kernels import reference
from mpi_ef.optim import (
    EF21,
    DistributedOptimizer,
    EControl,
    EF21Muon,
    Lion,
    OneBitAdam,
    OneBitLamb,
    PowerSGD,
    Signum,
    ZeroOneAdam,
)
from mpi_ef.testing import OptimizerLaws

MOMENTS = cases(lambda row: row.moments)
CALLS = ("Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Iallgather", "Bcast", "allgather")


class RowLaws(OptimizerLaws):
    """The laws for a line of the table."""

    row: Row

    def finished(self, optimizer):
        assert getattr(optimizer, "frozen_step", None) == self.row.frozen
        assert set(optimizer.per_rank()) <= self.row.own


def laws_of(row, **others):
    freeze = {"freeze_step": 20} if "freeze_step" in row.options else {}  # the variance of 0/1 Adam is frozen earlier
    said = {"optimizer": row.make, "options": row.options, "saved_after": row.moments, "learns": row.learns,
            "learning": row.learning | freeze, "clips": row.clips, "bad": row.bad, "differing": row.differing,
            "row": row}
    return type("Laws", (RowLaws,), said | others)()


@pytest.mark.parametrize("law", laws_in(OptimizerLaws))
@rows()
def test_optimizers_obey(row, law):
    getattr(laws_of(row), law)()


def test_no_optimizer_is_left_out():
    (built,) = virtual.results(1, lambda comm: {type(row(net_of(), comm)).__name__ for row in ROWS.values()})
    # Those are built on a model, or have no equal replicas: test_mkor.py and test_monna.py have their laws.
    assert {*registry.names("optimizer")} <= built | {"MKOR", "MoNNA", "PeerMixing"}


@pytest.mark.slow
@rows()
def test_replicas_are_equal_on_three_ranks(row):
    laws_of(row, ranks=(3,)).test_replicas_are_equal()


@pytest.mark.exhaustive
@rows()
def test_on_more_ranks(row):
    laws_of(row, ranks=(3,)).test_it_learns()
    laws_of(row, ranks=(4,)).test_replicas_are_equal()
    laws_of(row, ranks=(4,)).test_it_learns()


@MOMENTS
@pytest.mark.exhaustive
def test_saved_and_loaded_on_more_ranks(row, case):
    assert_resumes(3, lambda net, comm: row.make(groups_of(net), comm, **row.options), before=case, after=6)


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


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_learning_rates_are_numbers(lr):
    def program(comm):
        def of(optimizer):
            with pytest.raises(OptionError, match=rf": lr={lr!r} is not in \[0, inf\)"):
                optimizer(seeded(torch.nn.Linear(2, 2)).parameters())

        for kind in (EF21, EControl, EF21Muon):
            of(lambda params, kind=kind: kind(params, comm, TopK(0.5), lr=lr))
        for kind in (PowerSGD, OneBitAdam, OneBitLamb, ZeroOneAdam, Lion, Signum):
            of(lambda params, kind=kind: kind(params, comm, lr=lr))
        of(lambda params: DistributedOptimizer(torch.optim.SGD(params, lr=lr), comm, TopK(0.5)))

    virtual.results(2, program)


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
    """Means, as single norms depend on rounding after a hundred steps; errors that grow with steps are at 2.8 and more."""

    def program(comm):
        net, norms, losses = net_of(), [], []
        optimizer = row(net, comm, **row.lasting)
        for step in range(3 * row.settles):
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            norms.append(float(np.linalg.norm(optimizer.per_rank()["e_i"])))
            losses.append(loss.item())
        return norms, losses

    begin = max(row.settles - 100, 0 if row.frozen is None else row.frozen + 1)
    for norms, losses in virtual.results(2, program):
        if "freeze_step" in row.lasting:
            assert not any(norms[:20])
        assert np.mean(norms[2 * row.settles :]) < 2 * np.mean(norms[begin : row.settles])
        assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])


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

    assert virtual.results(2, program, ranks_per_node=2) == [row.calls] * 2


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
        zeros = np.where(rng.random(d) < 0.5, dtype(0), dtype(-0.0))
        gaps = inverse.copy()
        gaps[rng.random(d) < 0.3] = 0
        gaps[: sizes[0]] = 0
        scalars = [dtype(value) for value in rng.random(6)]
        factors, least = ((rng.random(layers) + 0.1).astype(dtype) for _ in range(2))
        betas, follow = np.array([0.9, 0.99], dtype), (dtype(1.3), dtype(1e-8), factors, least, starts)
        for name, inputs, outputs in (
            ("update_moments", (grad, *scalars[:2]), (m, v)), ("adam_step", (m, v, *scalars[:4]), (x,)),
            ("adam", (grad, *scalars), (m, v, x)), ("preconditioned_step", (m, v, *scalars[:2]), (x,)),
            ("sign_step", (grad, *scalars[:2]), (x,)), ("sign_step", (zeros, *scalars[:2]), (zeros[::-1].copy(),)),
            ("momentum_step", (grad, inverse, *scalars[:3]), (m, x)),
            ("local_step", (grad, inverse, start, *scalars[:4]), (m, u, x)),
            ("layer_norms", (x, starts), (np.empty(layers),)), ("add_layers", (x, factors, starts), (u,)),
            ("scaled_momentum", (x, m, dtype(0.9), factors, starts), (u,)),
            ("follow_momentum", (x, gaps, betas, *follow), (m, inverse, np.empty(layers, dtype))),
        ):
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
