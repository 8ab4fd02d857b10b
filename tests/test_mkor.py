"""MKOR: preconditioned gradients with a rule under them; what is exchanged, saved, skipped and refused."""

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import virtual
from programs import laws_in, trained
from stored import MemoryStore
from torch import nn
from training import assert_resumes, everything, groups_of, loss_in, net_of, parameters_of, seeded, steps_of

from mpi_ef import MKOR
from mpi_ef.collectives import GatherMean, NodeMean
from mpi_ef.compress import Identity, Quantize, TopK
from mpi_ef.errors import MpiEfError, OptionError
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.optim import DistributedOptimizer
from mpi_ef.precondition import Preconditioner
from mpi_ef.precondition.forms import FORMS
from mpi_ef.precondition.sums import Sums
from mpi_ef.state.training import Training
from mpi_ef.testing import OptimizerLaws, regression
from mpi_ef.testing.faults import FaultyComm
from mpi_ef.testing.law import same_bits

TOP = TopK(0.2, values=Quantize("bf16"))
EXHAUSTIVE = pytest.mark.exhaustive


def adam(net, **options):
    return torch.optim.AdamW(net.parameters(), **{"lr": 1e-2} | options)


def mkor(net, comm, compressor=TOP, inner=None, **options):
    return MKOR((inner or adam)(net), comm, compressor, model=net, **{"every": 2} | options)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


# ---- what it is


@pytest.mark.parametrize("placement", ["update", "gradient"])
def test_without_anything_learned_it_is_the_wrapper(placement):
    """To the last bit: layers that are never called as modules learn nothing, and after a fallback nothing is done."""
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = seeded(nn.Linear(7, 3))

        def forward(self, x):
            return x @ self.inside.weight.T + self.inside.bias

    def program(comm):
        nets, paths = (Bare(), Bare()), []
        built = (mkor(nets[0], comm, placement=placement),
                 DistributedOptimizer(adam(nets[1]), comm, TOP, placement=placement, model=nets[1]))
        for net, optimizer in zip(nets, built, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                paths.append(steps_of(net, optimizer, comm.Get_rank(), range(5)))
        assert same_bits(*paths)
        assert built[0].layers[0].part == "never seen"
        assert built[0].sent_nbytes - built[0].statistics_nbytes == built[1].sent_nbytes

    virtual.results(2, program)


def test_a_step_is_that_of_the_preconditioner_and_then_of_the_optimizer():
    """Dense, in float64, on n ranks: one process with all batches, by hand."""
    def one(n):
        def program(comm):
            net, path = net_of(torch.float64), []
            inner, watcher = sgd(net), Preconditioner(net, comm, every=2)
            for step in range(20):
                net.zero_grad()
                for rank in range(n):
                    (loss_in(net, rank, step) / n).backward()
                watcher.step()
                inner.step()
                path.append(parameters_of(net))
            return path

        return virtual.results(1, program)[0]

    for n in (1, 2, 3, 4):
        def program(comm):
            net = net_of(torch.float64)
            return steps_of(net, mkor(net, comm, Identity(), sgd, placement="gradient"), comm.Get_rank(), range(20))

        for mine, theirs in zip(virtual.results(n, program)[0], one(n), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("placement", ["update", "gradient"])
@pytest.mark.parametrize("n", [1, 2, 3, pytest.param(4, marks=EXHAUSTIVE)])
def test_replicas_and_factors_are_equal(form, placement, n):
    def program(comm):
        net = net_of()
        optimizer = mkor(net, comm, form=form, placement=placement)
        path = steps_of(net, optimizer, comm.Get_rank(), range(6))
        optimizer.check_replicas()
        assert optimizer.updates == 4  # in steps 0, 1, 2, 4
        return path, optimizer.preconditioner.replicated()

    runs = virtual.results(n, program)
    for path, factors in runs:
        assert same_bits(path, runs[0][0])
        assert same_bits(factors, runs[0][1])


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_see_zeros_change_nothing(form, monkeypatch):
    """a = g = 0: all factors are the identity, or a multiple, which rescaling takes back."""
    close = Sums.close

    def zeros(self, scale=1.0):
        close(self, scale)
        words = [word.clone() for word in self._words]
        self.vector.zero_()
        for word, before in zip(self._words, words, strict=True):
            word.copy_(before)

    monkeypatch.setattr(Sums, "close", zeros)

    def program(comm):
        nets, paths = (net_of(), net_of()), []
        built = (mkor(nets[0], comm, Identity(), sgd, form=form, placement="gradient"),
                 DistributedOptimizer(sgd(nets[1]), comm, Identity(), placement="gradient"))
        for net, optimizer in zip(nets, built, strict=True):
            paths.append(steps_of(net, optimizer, comm.Get_rank(), range(6)))
        assert built[0].updates == 4
        for mine, theirs in zip(*paths, strict=True):
            for x, y in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)

    virtual.results(2, program)


def test_factors_that_differ_leave_parameters_equal():
    """In placement "update", in which they change by what was exchanged alone: processors may round in other ways."""
    def program(comm):
        net = net_of()
        optimizer = mkor(net, comm, form="blended")
        steps_of(net, optimizer, comm.Get_rank(), range(2))
        if comm.Get_rank():
            optimizer.preconditioner.replicated()["preconditioner.factors"][:] *= 1.001
        path = steps_of(net, optimizer, comm.Get_rank(), range(2, 6))
        optimizer.check_replicas()
        return path

    paths = virtual.results(2, program)
    assert same_bits(paths[0], paths[1])


def test_it_learns_faster_than_without():
    """On inputs of very different sizes, which a preconditioner is for."""
    def program(comm):
        losses = []
        for with_it in (True, False):
            net = seeded(nn.Linear(7, 3))
            optimizer = mkor(net, comm, Identity(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
                             placement="gradient") if with_it else \
                DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), comm, Identity(), placement="gradient")
            for step in range(60):
                x = torch.from_numpy(np.random.default_rng((step, comm.Get_rank())).normal(size=(32, 7))).float()
                x = x * 0.3 + 2.0
                optimizer.zero_grad()
                loss = (net(x) - x[:, :3]).square().mean()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        assert losses[0] < 0.5 * losses[1]

    virtual.results(2, program)


# ---- the laws of all optimizers


_nets = []  # also those of which the law keeps parameters alone


@pytest.fixture
def known_nets(monkeypatch):
    """Remember the models of the laws, which hand over parameters alone."""
    begin = regression.Net.__init__

    def remember(self):
        begin(self)
        _nets.append(self)

    monkeypatch.setattr(regression.Net, "__init__", remember)
    yield
    _nets.clear()


def model_of(optimizer):
    first = next(p for group in optimizer.param_groups for p in group["params"])
    return next(net for net in list(_nets) if any(p is first for p in net.parameters()))


def built(params, comm, **options):
    inner = torch.optim.AdamW(params, lr=2e-2)
    return MKOR(inner, comm, TopK(0.3), model=model_of(inner), **options)


VARIANTS = {"update": {"every": 2}, "gradient": {"every": 3, "placement": "gradient", "form": "exact"},
            "blended": {"every": 1, "form": "blended", "statistics": Quantize("bf16")},
            "kfac": {"every": 2, "form": "kfac", "sides": "inputs"}}
OFTEN = ("test_a_state_that_was_loaded_goes_on", "test_broken_gradients_are_skipped", "test_16_bit_parameters",
         "test_errors_of_communication_are_passed_on", "test_an_early_state_is_loaded_into_an_optimizer_that_was_further")


@pytest.mark.usefixtures("known_nets")
@pytest.mark.parametrize("law", [*OFTEN, *(pytest.param(name, marks=EXHAUSTIVE) for name in laws_in(OptimizerLaws)
                                          if name not in OFTEN)])
@pytest.mark.parametrize("variant", [
    pytest.param(v, marks=[] if v in ("update", "gradient") else EXHAUSTIVE) for v in VARIANTS])
def test_it_obeys_the_laws_of_optimizers(variant, law):
    said = {"optimizer": staticmethod(built), "options": VARIANTS[variant], "clips": False,
            "saved_after": (1, 2, 3, 4), "learns": (60, slice(3), 0.8), "differing": ("every", 2, 3),
            "bad": (({"form": "printed"}, "form='printed' is unknown"),)}
    getattr(type("Laws", (OptimizerLaws,), said)(), law)()


# ---- bytes


@pytest.mark.parametrize("statistics", [None, Quantize("bf16")], ids=["full", "bf16"])
def test_bytes_are_those_that_were_counted(statistics):
    def program(comm):
        net, counting = net_of(), FaultyComm(comm)
        optimizer = mkor(net, counting, every=3, statistics=statistics)
        d = optimizer.preconditioner.plan.d
        assert d == sum(p + q + 1 for p, q in ((5, 8), (5, 5), (3, 6))) + 1
        steps_of(net, optimizer, comm.Get_rank(), range(7))
        plan = optimizer.preconditioner.plan
        assert plan.exchanges == optimizer.updates == 4  # in steps 0, 1, 3, 6
        assert optimizer.statistics_nbytes == 4 * plan.traffic.sent_nbytes
        if statistics is None:
            n = comm.Get_size()
            chunk = -(-d // n)
            assert optimizer.statistics_nbytes == 4 * (2 * (n - 1) * 4 * chunk + 2 * 8 * (n - 1))
        assert optimizer.sent_nbytes == optimizer.statistics_nbytes + sum(c.sent_nbytes for c in optimizer.channels())

    virtual.results(2, program)
    virtual.results(3, program)


# ---- what is skipped


def test_what_is_not_finite_in_layers_skips_the_step_on_all_ranks():
    """Also where gradients are finite all the same; nothing changes, and the step is due again."""
    def program(comm):
        net = seeded(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        optimizer, rank = mkor(net, comm), comm.Get_rank()

        def step(broken=False):
            optimizer.zero_grad()
            x = torch.from_numpy(np.random.default_rng(rank).normal(size=(6, 3))).float()
            net(x).square().mean().backward()
            if broken and rank == 1:
                optimizer.preconditioner._sums.vector[0] = float("inf")
            optimizer.step()

        step()
        step()
        before = everything(net, optimizer, "skipped_steps")
        step(broken=True)
        assert same_bits(everything(net, optimizer, "skipped_steps"), before)
        assert optimizer.skipped_steps == 1
        assert optimizer.preconditioner.due
        step()
        assert (optimizer.steps, optimizer.updates) == (3, 3)

    with pytest.warns(RuntimeWarning, match="step 2 skipped on all ranks: NaN or Inf in the gradient on rank 1"):
        virtual.results(2, program)


def test_a_product_that_overflows_leaves_the_gradient_and_the_factors():
    """It may be on one rank alone. Factors that are not finite, which are so on all of them, begin anew on all."""
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = mkor(net, comm, Identity(), sgd, form="exact", every=1)
        group = optimizer.preconditioner.groups[0]  # of one layer
        for step in range(4):
            optimizer.zero_grad()
            loss_in(net, rank, step).backward()
            if step == 2:
                for side in group.sides:
                    side._m.mul_(3)
                if rank == 1:
                    net.first.weight.grad.fill_(2e37)
            if step == 3:
                group.inputs._m.fill_(float("inf"))
            optimizer.step()
            assert (optimizer.restarts, group.inputs.updates) == ((0, [step + 1]) if step < 3 else (1, [0]))
        assert all(bool(p.isfinite().all()) for p in net.parameters())
        return optimizer.preconditioner.state_dict()["arrays"]

    assert same_bits(*virtual.results(2, program))


def test_a_loss_that_is_thrown_away_counts_for_nothing():
    def program(comm):
        nets = net_of(), net_of()
        optimizers = [mkor(net, comm) for net in nets]
        for step in range(4):
            for net, optimizer in zip(nets, optimizers, strict=True):
                if net is nets[0]:
                    (3 * loss_in(net, comm.Get_rank(), step + 9)).backward()
                optimizer.zero_grad()
                loss_in(net, comm.Get_rank(), step).backward()
                optimizer.step()
        assert same_bits(*(everything(*pair) for pair in zip(nets, optimizers, strict=True)))

    virtual.results(2, program)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_changes_no_bit(unscale):
    """With scales that are powers of two; also where the program takes the scale off first, and where it changes."""
    def program(comm):
        nets = net_of(), net_of()
        optimizers = [mkor(net, comm, every=1) for net in nets]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        for step in range(6):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                loss = loss_in(net, comm.Get_rank(), step)
                if net is nets[0]:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    if unscale:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
        assert same_bits(*map(parameters_of, nets))
        assert same_bits(*(optimizer.preconditioner.replicated() for optimizer in optimizers))

    virtual.results(2, program)


class Branched(nn.Module):
    """A model with a small layer that not every call uses."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.small = nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(2, 1)
        seeded(self)

    def forward(self, x, *, whole=True):
        y = self.last(torch.tanh(self.first(x)))
        return y + self.small(x[:, :2]) if whole else y


def inputs_of(rank, step):
    return torch.from_numpy(np.random.default_rng((step, rank)).normal(size=(8, 7))).float()


@pytest.mark.parametrize("to_none", [False, True])
def test_a_scale_that_was_taken_off_is_known_from_layers_that_were_used(to_none):
    """Also in steps in which some layer has no gradient, or keeps one of zeros."""
    def program(comm):
        nets = Branched(), Branched()
        optimizers = [mkor(net, comm, every=1, form="blended") for net in nets]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for step in range(4):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad(to_none)
                loss = net(inputs_of(comm.Get_rank(), step), whole=step % 2 == 0).square().mean()
                if net is nets[0]:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
        assert same_bits(*map(parameters_of, nets))
        assert same_bits(*(optimizer.preconditioner.replicated() for optimizer in optimizers))

    virtual.results(2, program)


def test_what_was_left_over_at_the_end_of_a_rank_s_data_counts_for_nothing():
    def program(comm, more):
        net, rank = net_of(), comm.Get_rank()
        optimizer = mkor(net, comm, Identity(), sgd, placement="gradient", every=1)
        with optimizer.join(weigh=True):
            for step in range(2 if rank else 4):
                optimizer.zero_grad()
                loss_in(net, rank, step).backward()
                optimizer.step()
            if rank and more:
                loss_in(net, rank, 9).backward()
        return parameters_of(net), optimizer.preconditioner.state_dict()["arrays"]

    assert same_bits(*(virtual.results(2, lambda comm: program(comm, more))[0] for more in (False, True)))  # noqa: B023


def test_a_bias_without_gradient_leaves_its_weight_alone():
    """Nothing of earlier steps goes in its place: what the weight gets is the same when it never had one."""
    def program(comm):
        moved = []
        for scale in (1.0, 100.0):
            net = seeded(nn.Linear(7, 3))
            optimizer = mkor(net, comm, Identity(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1), rescale=False)
            net(inputs_of(0, 0)).sum().backward()
            optimizer.step()
            before = net.weight.detach().clone()
            optimizer.preconditioner.groups[0]._x.mul_(scale)
            optimizer.zero_grad()
            net.weight.grad = torch.ones_like(net.weight)
            optimizer.step()
            moved.append((net.weight.detach() - before).numpy())
        assert same_bits(*moved)

    virtual.results(1, program)


@pytest.mark.filterwarnings("ignore:.*had the same gradients")
def test_ranks_without_data_do_not_count():
    """In `join` a rank that has come to its end sends zeros, and the mean is over the others."""
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = mkor(net, comm, Identity(), sgd, placement="gradient", every=1, fallback=0.001)
        with optimizer.join(weigh=True):
            for step in range(3 if rank else 5):
                optimizer.zero_grad()
                loss = loss_in(net, 0, step)  # the same on all ranks
                loss.backward()
                optimizer.note_loss(loss)
                optimizer.step()
        assert optimizer.updates == 5
        state = optimizer.preconditioner.state_dict()
        return state["arrays"], state["fallback"]

    two, (one,) = virtual.results(2, program), virtual.results(1, program)
    for name, array in two[0][0].items():
        np.testing.assert_allclose(array, one[0][name], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(two[0][1][2], one[1][2], rtol=1e-6)


# ---- groups, layers, models


def test_weights_and_biases_may_be_in_different_groups():
    def program(comm):
        nets, paths = (net_of(), net_of()), []
        for net in nets:
            parameters = list(net.parameters())
            groups = [{"params": parameters}] if net is nets[0] else [
                {"params": [p for p in parameters if (p.dim() == 2) == matrices]} for matrices in (True, False)]
            optimizer = MKOR(torch.optim.SGD(groups, lr=0.05), comm, Identity(), model=net, every=2)
            paths.append(steps_of(net, optimizer, comm.Get_rank(), range(4))[-1])
        for mine, theirs in zip(*paths, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)

    virtual.results(2, program)


def test_groups_can_be_left_out():
    def program(comm):
        net = net_of()
        optimizer = MKOR(torch.optim.SGD([
            {"params": list(net.first.parameters()), "precondition": False},
            {"params": [p for p in net.parameters() if p is not net.first.weight and p is not net.first.bias]}], lr=0.1),
            comm, Identity(), model=net)
        assert {row.name: row.part for row in optimizer.layers} == {
            "first": "not trained by this optimizer", "second": "both", "last": "both"}

    virtual.results(1, program)


def test_a_model_is_needed_and_bad_options_are_told():
    def program(comm):
        net = net_of()
        for options, words in (({"form": "printed"}, "form='printed' is unknown"), ({"every": 0}, "every=0"),
                               ({"model": None}, "is no torch module"), ({"overlap": True}, "overlap=True with placement"),
                               ({"placement": "both"}, "placement='both' is unknown"), ({"eta": 3.0}, "eta"),
                               ({"dampin": 0.1}, "no option dampin; did you mean damping")):
            with pytest.raises(MpiEfError, match=words) as caught:
                MKOR(adam(net), comm, TOP, **{"model": net} | options)
            assert "\n" not in str(caught.value)

    virtual.results(2, program)


def test_hooks_go_with_the_optimizer():
    def program(comm):
        net = net_of()
        optimizer = mkor(net, comm)
        alive = weakref.ref(optimizer.preconditioner)
        assert net.first._forward_hooks
        del optimizer
        gc.collect()
        assert alive() is None
        assert not net.first._forward_hooks
        loss_in(net, 0, 0).backward()

    virtual.results(1, program)


@pytest.mark.parametrize("options", [
    {"placement": "gradient", "rule": "ef21"}, {"placement": "gradient", "rule": "econtrol"},
    {"placement": "gradient", "overlap": True}, {"placement": "gradient", "bucket_nbytes": 100}, {"bucket_nbytes": 100},
    {"plan": GatherMean}, {"dense_steps": 2}, {"plan": NodeMean}, {"placement": "gradient", "plan": NodeMean}], ids=str)
def test_rules_plans_and_buckets_go_with_it(options):
    def program(comm):
        net = net_of()
        optimizer = mkor(net, comm, **options)
        path = steps_of(net, optimizer, comm.Get_rank(), range(30))
        optimizer.check_replicas()
        return path[-1], loss_in(net, 0, 0).item()

    runs = virtual.run(4, program, ranks_per_node=2)
    for run in runs:
        if isinstance(run, BaseException):
            raise run
        assert same_bits(run[0], runs[0][0])
        assert run[1] < loss_in(net_of(), 0, 0).item()


# ---- MKOR-H


def stalling(step):
    return 2.0 * 0.9 ** min(step, 30) + 1.0


def test_it_falls_back_when_progress_stalls():
    """In the step that the rule says, on all ranks; from then on it is the inner optimizer alone, also after loading."""
    def expected():
        mean = before = largest = None
        slow = 0
        for step in range(0, 400, 5):
            mean = stalling(step) if mean is None else mean + (1 - 0.95**5) * (stalling(step) - mean)
            if before is None:
                before, looked, largest = mean, step, 0.0
            elif step - looked >= 20:
                rate = (before - mean) / before
                slow = slow + 1 if rate < 0.1 * largest else 0
                largest, before, looked = max(largest, rate), mean, step
                if slow == 2:
                    return step
        return None

    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = mkor(net, comm, every=5, fallback=0.1)
        while optimizer.fallen_back_at is None:
            optimizer.zero_grad()
            loss_in(net, rank, optimizer.steps).backward()
            optimizer.note_loss(stalling(optimizer.steps) + (0.5 if rank else -0.5))
            optimizer.step()
            assert optimizer.steps < 400
        assert optimizer.fallen_back_at == expected()
        assert optimizer.layers[0].part == f"fallen back in step {expected()}"
        assert not net.first._forward_hooks
        sent, updates = optimizer.statistics_nbytes, optimizer.updates
        twin = net_of()
        other = DistributedOptimizer(adam(twin), comm, TOP)
        again = net_of()
        third = mkor(again, comm, every=5, fallback=0.1)
        third.load_state_dict(optimizer.state_dict())
        assert third.fallen_back_at == expected()
        for model in (twin, again):
            model.load_state_dict(net.state_dict())
        state = optimizer.state_dict()
        del state["preconditioner"], state["wrapper"]
        state["optimizer"] = dict(state["optimizer"])
        other.load_state_dict(state)
        steps = range(optimizer.steps, optimizer.steps + 6)
        paths = [steps_of(model, one, rank, steps) for model, one in ((net, optimizer), (twin, other), (again, third))]
        assert same_bits(paths[0], paths[1])
        assert same_bits(paths[0], paths[2])
        assert (optimizer.statistics_nbytes, optimizer.updates) == (sent, updates)

    virtual.results(2, program)


def test_a_state_of_before_the_fallback_learns_again():
    def program(comm):
        net = net_of()
        optimizer = mkor(net, comm, every=1, fallback=0.9, fallback_every=1)

        def steps(losses):
            for loss in losses:
                optimizer.zero_grad()
                loss_in(net, comm.Get_rank(), optimizer.steps).backward()
                optimizer.note_loss(loss)
                optimizer.step()

        steps([1.0, 0.5, 0.3])
        early = optimizer.state_dict()
        steps([0.3] * 9)
        assert optimizer.fallen_back_at is not None
        optimizer.load_state_dict(early)
        assert optimizer.fallen_back_at is None
        steps([0.2, 0.1])
        assert [side.updates for group in optimizer.preconditioner.groups for side in group.sides] == [[5]] * 6
        optimizer.remove_hooks()
        optimizer.load_state_dict(early)
        assert not net.first._forward_hooks

    virtual.results(1, program)


def test_a_rank_without_a_loss_is_told_on_all():
    def program(comm):
        net = net_of()
        optimizer = mkor(net, comm, fallback=0.1)
        loss_in(net, comm.Get_rank(), 0).backward()
        if comm.Get_rank() == 0:
            optimizer.note_loss(1.0)
        with pytest.raises(MpiEfError, match="fallback wants the loss of every rank"):
            optimizer.step()
        optimizer.zero_grad()

        def closure():
            optimizer.zero_grad()
            loss = loss_in(net, comm.Get_rank(), 0)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.updates == 1
        with pytest.raises(MpiEfError, match="loss=None is no number, which fallback goes by"):
            optimizer.step(lambda: None)

    virtual.results(2, program)


def test_a_closure_may_return_nothing_where_no_loss_is_wanted():
    def program(comm):
        net = net_of()
        optimizer = mkor(net, comm)
        optimizer.step(lambda: loss_in(net, comm.Get_rank(), 0).backward())
        assert optimizer.updates == 1

    virtual.results(2, program)


# ---- checkpoints


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", [2, 3, 4])
def test_it_goes_on_from_a_state(form, before):
    """Saved in a step that is due, one before and one after."""
    assert_resumes(2, lambda net, comm: MKOR(adam(net), comm, TOP, model=net, form=form, every=3), before=before, after=5)


@pytest.mark.filterwarnings("ignore:step .* goes on with")
def test_checkpoints_go_to_other_numbers_of_ranks():
    """4 ranks, 2, 3: factors are the same bits on all of them."""
    store = MemoryStore()

    def part(comm, more, policy):
        net = net_of()
        optimizer = mkor(net, comm, every=2, form="exact")
        training = Training(model=net, optimizer=optimizer, random=False)
        if policy:
            training.resume(store, comm, policy=policy)
        before = {name: array.copy() for name, array in optimizer.preconditioner.replicated().items()}
        steps_of(net, optimizer, comm.Get_rank(), range(optimizer.steps, optimizer.steps + more))
        training.save(store, comm, optimizer.steps)
        after = {name: array.copy() for name, array in optimizer.preconditioner.replicated().items()}
        return before, after, optimizer.steps

    last = virtual.results(4, lambda comm: part(comm, 5, ""))
    for n, policy in ((2, "redistribute"), (3, "reset"), (3, "exact")):
        runs = virtual.results(n, lambda comm: part(comm, 3, policy))  # noqa: B023
        for before, after, _ in runs:
            assert same_bits(before, last[0][1])
            assert same_bits(after, runs[0][1])
        last = runs
    assert last[0][2] == 14


def test_states_of_other_optimizers_are_refused():
    def program(comm):
        net, other = net_of(), net_of()
        optimizer = mkor(net, comm)
        plain = DistributedOptimizer(adam(other), comm, TOP)
        steps_of(net, optimizer, comm.Get_rank(), range(3))
        before = everything(net, optimizer)
        for state, words in (
            (plain.state_dict(), "saved optimizer is DistributedOptimizer of AdamW, here it is MKOR of AdamW"),
            (mkor(net_of(), comm, form="exact").state_dict(), "preconditioner is exact, sides=both, here"),
            (mkor(net_of(), comm, fallback=0.5).state_dict(), "preconditioner is window, sides=both, with fallback, here"),
            (mkor(net_of(), comm, window=4).state_dict(), "factors is"),
            (mkor(net_of(), comm, exclude=["last"]).state_dict(), "layers is"),
        ):
            with pytest.raises(MpiEfError, match=f"load_state_dict: .*{words}") as caught:
                optimizer.load_state_dict(state)
            assert "\n" not in str(caught.value)
            assert same_bits(everything(net, optimizer), before)
        with pytest.raises(OptionError, match="saved optimizer is MKOR of AdamW, here it is DistributedOptimizer of AdamW"):
            plain.load_state_dict(optimizer.state_dict())
        again = mkor(net_of(), comm)
        again.load_state_dict(optimizer.state_dict())
        assert [row.part for row in again.layers] == ["both"] * 3

    virtual.results(1, program)


def test_groups_load_with_their_options():
    assert_resumes(2, lambda net, comm: MKOR(torch.optim.SGD(groups_of(net), lr=0.1), comm, TOP, model=net,
                                             placement="gradient", every=2), before=3, after=4)


def test_a_run_says_what_it_has_learned(tmp_path, capsys):
    """Of all launches; and when the preconditioner was given up."""
    options = {"model": "mlp", "steps": 70, "batch": 8, "lr": 0.0, "optimizer": "sgd", "precondition": "window",
               "fallback": 0.9, "checkpoint_every": 30, "log_every": 70, "eval_every": 70, "out": tmp_path}
    trained(2, TrainConfig(**options, stop_after=30))
    (summary, _) = trained(2, TrainConfig(**options, resume="exact"))
    at = summary["fallen_back_at"]
    assert at is None or at % 10 == 0
    assert summary["updates"] == (8 if at is None else at // 10 + 2)
    d = sum(p + q + 1 for p, q in ((64, 65), (10, 65))) + 1
    assert summary["statistics_nbytes"] == summary["updates"] * (4 * d + 16)
    assert f"window, {summary['updates']} exchanges of" in capsys.readouterr().out
