"""An optimizer as an object of torch: attributes that are assigned, options of groups, hooks, copies; with any optimizer."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
import virtual
from optimizer_table import ROWS, rows
from programs import same_bits
from training import everything, groups_of, net_of, parameters_of, steps_of

from mpi_ef import ShardedSampler, Store, Training
from mpi_ef.compress import Identity
from mpi_ef.errors import DisagreementError, OptionError, PeerError
from mpi_ef.optim import DistributedOptimizer, LocalSteps, OneBitAdam

# ---- attributes


@rows()
def test_a_state_that_is_assigned_is_that_of_the_wrapped_optimizer_or_refused(row):
    """A reset of moments: as if the wrapped optimizer had got it; one line where moments are vectors."""

    def program(comm):
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        optimizer, other = row(net, comm), row(twin, comm)
        for pair in ((net, optimizer), (twin, other)):
            steps_of(*pair, rank, range(3))
        if isinstance(optimizer, DistributedOptimizer):
            fresh, optimizer.state = optimizer.state, defaultdict(dict)
            assert optimizer.optimizer.state == {}
            assert optimizer.state is optimizer.optimizer.state is not fresh
            other.optimizer.state = defaultdict(dict)
        else:
            before, words = everything(net, optimizer), f"{type(optimizer).__name__}.state: nothing is there"
            for write in (
                lambda: setattr(optimizer, "state", defaultdict(dict)),
                lambda: optimizer.state.clear(),
                lambda: optimizer.state[net.first.weight],
                lambda: optimizer.state.update({net.first.weight: {"step": 0}}),
            ):
                with pytest.raises(OptionError, match=words) as caught:
                    write()
                assert "\n" not in str(caught.value)
            assert same_bits(everything(net, optimizer), before)
            assert not optimizer.state
        after = [steps_of(*pair, rank, range(3, 6)) for pair in ((net, optimizer), (twin, other))]
        assert same_bits(*after)

    virtual.results(2, program)


@rows()
def test_groups_that_are_assigned_count_from_the_next_step_on(row):
    """Others than at construction too, in which parameters have the same order."""

    def program(comm):
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        optimizer = row.make(groups_of(net), comm, **row.options)
        optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
        before = parameters_of(net)
        assert all(same_bits(parameters, before) for parameters in steps_of(net, optimizer, rank, range(2)))

        options = {"lr": 3e-3, "weight_decay": 0.1}
        optimizer = row.make(groups_of(net), comm, **row.options)
        first, second = optimizer.param_groups
        optimizer.param_groups = [{**first, **options, "params": first["params"] + second["params"]}]
        other = row.make([{"params": list(twin.parameters()), **options}], comm, **row.options)
        assert same_bits(*(steps_of(*pair, rank, range(18)) for pair in ((net, optimizer), (twin, other))))

    virtual.results(2, program)


@rows()
def test_groups_without_a_parameter_that_are_assigned_are_one_line_on_all_ranks(row):
    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = row(net, comm)
        steps_of(net, optimizer, rank, range(2))
        before = parameters_of(net)
        if rank == 1:
            optimizer.param_groups = [{**group, "params": group["params"][1:]} for group in optimizer.param_groups]
        words = "other parameters than at construction"
        with pytest.raises(OptionError if rank == 1 else PeerError, match=words):
            steps_of(net, optimizer, rank, range(2, 3))
        assert same_bits(parameters_of(net), before)

    virtual.results(2, program)


@rows()
def test_hooks_of_a_step_are_called_as_torch_calls_them(row):
    """Also for all optimizers at once, and by a class of one's own; the profiler sees a step by its name."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    class Own(OneBitAdam):
        def step(self, closure=None):
            return super().step(closure)

    def program(comm):
        net, own = net_of(), net_of()
        optimizer, called = row(net, comm), []
        mine = Own(own.parameters(), comm)
        handles = [optimizer.register_step_pre_hook(lambda *_: called.append("before")),
                   optimizer.register_step_post_hook(lambda *_: called.append("after"))]
        steps_of(net, optimizer, comm.Get_rank(), range(2))
        assert called == ["before", "after"] * 2
        for handle in handles:
            handle.remove()
        steps_of(net, optimizer, comm.Get_rank(), range(2, 3))
        assert len(called) == 4
        comm.Barrier()
        mine.register_step_post_hook(lambda *_: called.append("mine"))
        steps_of(own, mine, comm.Get_rank(), range(2))
        assert called[4:] == ["mine"] * 2
        if comm.Get_size() > 1:
            return
        everywhere = register_optimizer_step_post_hook(lambda one, *_: called.append(one))
        steps_of(net, optimizer, comm.Get_rank(), range(3, 4))
        everywhere.remove()
        assert called[-1] is optimizer  # after the wrapped one
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            steps_of(net, optimizer, comm.Get_rank(), range(4, 5))
        assert f"Optimizer.step#{type(optimizer).__name__}.step" in {event.key for event in seen.key_averages()}

    for size in (1, 2):
        virtual.results(size, program)


def test_groups_in_another_order_are_told_as_such():
    def program(comm):
        net = net_of()
        optimizer = ROWS["AdamW updates"](net, comm)
        steps_of(net, optimizer, comm.Get_rank(), range(2))
        optimizer.param_groups[0]["params"].reverse()
        with pytest.raises(OptionError, match="list their parameters in another order than at construction"):
            steps_of(net, optimizer, comm.Get_rank(), range(2, 3))

    virtual.results(2, program)


@rows()
def test_defaults_are_those_of_the_wrapped_optimizer(row):
    def program(comm):
        optimizer = row(net_of(), comm)
        inner = getattr(optimizer, "optimizer", optimizer)
        assert optimizer.defaults is inner.defaults
        optimizer.defaults = {**optimizer.defaults, "lr": 0.25}
        assert inner.defaults["lr"] == 0.25
        inner.defaults = {**inner.defaults, "lr": 0.5}
        assert optimizer.defaults["lr"] == 0.5

    virtual.results(1, program)


# ---- options of groups


def own_options(row):
    """Return options of its constructor, each with a value, that are not those of groups."""
    names = {"EF21": "compressor", "EControl": "eta", "PowerSGD": "rank", "EF21Muon": "beta", "Lion": "betas",
             "Signum": "momentum", "OneBitAdam": "freeze_step", "OneBitLamb": "max_coeff",
             "ZeroOneAdam": "local_step_clipper"}
    (optimizer,) = virtual.results(1, lambda comm: row(net_of(), comm))
    mine = {names.get(type(optimizer).__name__, "compressor"): 1}
    wraps = type(optimizer) in (DistributedOptimizer, LocalSteps)
    return mine if wraps else mine | {"amsgrad": True, "betas": (0.5, 0.5), "alpha": 2.0}


@rows()
def test_an_option_of_a_group_without_effect_is_one_line_on_all_ranks(row):
    """At construction, and in the next step where it comes later."""
    options = own_options(row)

    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        for name, value in options.items():
            first, second = groups_of(net)
            given = {name: value} if rank == 1 else {}
            words = f"{name}' in a group of parameters has no effect, groups have lr"
            with pytest.raises(OptionError if rank == 1 else PeerError, match=words) as caught:
                row.make([first, {**second, **given}], comm, **row.options)
            assert "\n" not in str(caught.value)
            optimizer = row.make(groups_of(net), comm, **row.options)
            steps_of(net, optimizer, rank, range(2))
            before = everything(net, optimizer)[:2]
            optimizer.param_groups[1].update(given)
            with pytest.raises(OptionError if rank == 1 else PeerError, match=words):
                steps_of(net, optimizer, rank, range(2, 3))
            assert same_bits(everything(net, optimizer)[:2], before)

    virtual.results(2, program)


@rows()
def test_whatever_else_is_in_a_group_is_allowed(row):
    """Labels of users, and what torch's schedulers keep there."""

    def program(comm):
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        first, second = groups_of(net)
        labels = {
            "name": "head",
            "lr_scale": 0.5,
            "initial_lr": 1.0,
            "max_lr": 1.0,
            "base_momentum": 0.8,
            "tags": ["a"],
        }
        optimizer = row.make([first, {**second, **labels}], comm, **row.options)
        other = row.make(groups_of(twin), comm, **row.options)
        optimizer.param_groups[0]["swa_lr"] = 0.1
        assert same_bits(*(steps_of(*pair, rank, range(4)) for pair in ((net, optimizer), (twin, other))))
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
        torch.optim.swa_utils.SWALR(optimizer, 0.05)
        steps_of(net, optimizer, rank, range(4, 6))

    virtual.results(2, program)


# ---- the state of another optimizer


def wrapped(kind, net, comm, **options):
    inner = getattr(torch.optim, kind)(net.parameters(), lr=1e-2)
    return DistributedOptimizer(inner, comm, Identity(), **options)


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize(
    "kinds",
    [("SGD", "Adam"), ("Adam", "SGD"), ("Adam", "RMSprop"), ("Adam", "AdamW"), ("RMSprop", "Adagrad")],
    ids="-".join,
)
def test_the_state_of_another_wrapped_optimizer_is_one_line(kinds, placement):
    """Nothing has changed then; also from a checkpoint. States of versions that did not name it load."""

    def program(comm):
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        one, other = (
            wrapped(kind, net, comm, placement=placement) for kind, net in zip(kinds, (net, twin), strict=True)
        )
        steps_of(net, one, rank, range(2))
        steps_of(twin, other, rank, range(1))
        before, saved = everything(twin, other), one.state_dict()
        with pytest.raises(OptionError, match=f"of {kinds[0]}, here it is DistributedOptimizer of {kinds[1]}"):
            other.load_state_dict(saved)
        assert same_bits(everything(twin, other), before)
        assert one.identity() != other.identity()
        steps_of(twin, other, rank, range(2, 4))

        del saved["wrapped optimizer"]
        fresh = net_of()
        fresh.load_state_dict(net.state_dict())
        again = wrapped(kinds[0], fresh, comm, placement=placement)
        again.load_state_dict(saved)
        assert same_bits(*(steps_of(*pair, rank, range(2, 5)) for pair in ((net, one), (fresh, again))))

    virtual.results(2, program)


@pytest.mark.parametrize("kinds", [("SGD", "Adam"), ("Adam", "SGD")], ids="-".join)
def test_the_checkpoint_of_another_wrapped_optimizer_is_one_line(kinds, tmp_path):
    def program(comm):
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        one, other = (wrapped(kind, net, comm) for kind, net in zip(kinds, (net, twin), strict=True))
        steps_of(net, one, rank, range(2))
        store = Store(tmp_path)
        Training(model=net, optimizer=one, random=False).save(store, comm, 2)
        before = everything(twin, other)
        with pytest.raises(OptionError, match=f"DistributedOptimizer of {kinds[0]}"):
            Training(model=twin, optimizer=other, random=False).resume(store, comm)
        assert same_bits(everything(twin, other), before)

    virtual.results(2, program)


# ---- copies

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickle.dumps,
          "torch.save": lambda value: torch.save(value, io.BytesIO())}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@rows()
def test_a_copy_is_refused_in_one_line(row, duplicate):
    """Of an optimizer, also within a list or a scheduler, of rules and plans. A model is copied, and goes on training."""

    def program(comm):
        net = net_of()
        optimizer = row(net, comm)
        steps_of(net, optimizer, comm.Get_rank(), range(2))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        before = everything(net, optimizer)
        refused = [(optimizer, optimizer), ([net.first, optimizer], optimizer), (scheduler, optimizer)]
        refused += [(part, part) for part in (*optimizer.channels(), *optimizer.plans())]
        for value, what in refused:
            if duplicate is copy.copy and value is not what:
                continue
            with pytest.raises(
                OptionError, match=rf"^{type(what).__name__}: it cannot be copied or pickled.*save "
            ) as caught:
                duplicate(value)
            assert "\n" not in str(caught.value)
        duplicate(net.first)
        assert same_bits(everything(net, optimizer), before)
        steps_of(net, optimizer, comm.Get_rank(), range(2, 3))

    virtual.results(2, program)


# ---- hooks


def hooked(optimizer, called, *, changes):
    """Register all hooks of saving and loading, which note what they are called with, and may return something else."""

    def state_pre(*args):
        called.append(("state_dict pre", *args))

    def state_post(*args):
        called.append(("state_dict post", *args))
        return {**args[1], "extra": 3} if changes else None

    def load_pre(*args):
        called.append(("load_state_dict pre", *args))
        args[1].pop("extra", None)  # of a copy
        return dict(args[1]) if changes else None

    def load_post(*args):
        called.append(("load_state_dict post", *args))

    optimizer.register_state_dict_pre_hook(state_pre)
    optimizer.register_state_dict_post_hook(state_post)
    optimizer.register_load_state_dict_pre_hook(load_pre)
    optimizer.register_load_state_dict_post_hook(load_post)


@pytest.mark.parametrize("changes", [False, True])
@rows()
def test_hooks_of_saving_and_loading_are_called_as_torch_calls_them(row, changes):
    """In torch's order, with the optimizer they were registered on; what they return counts."""

    def seen(optimizer):
        called = []
        hooked(optimizer, called, changes=changes)
        saved = optimizer.state_dict()
        before = dict(saved)
        optimizer.load_state_dict(saved)
        assert saved.keys() == before.keys()  # the dict of the caller is as it was
        assert all(call[1] is optimizer for call in called)
        return saved, [(call[0], len(call), "extra" in call[2] if len(call) > 2 else None) for call in called]

    def program(comm):
        rank, (net, twin) = comm.Get_rank(), (net_of(), net_of())
        optimizer, other = row(net, comm), row(twin, comm)
        for pair in ((net, optimizer), (twin, other)):
            steps_of(*pair, rank, range(3))
        saved, calls = seen(optimizer)
        _, of_torch = seen(torch.optim.SGD(net_of().parameters(), lr=0.1))
        assert calls == of_torch
        assert [name for name, *_ in calls] == ["state_dict pre", "state_dict post", "load_state_dict pre",
                                                "load_state_dict post"]
        assert ("extra" in saved) == changes
        assert same_bits(*(steps_of(*pair, rank, range(3, 5)) for pair in ((net, optimizer), (twin, other))))

    virtual.results(2, program)


# ---- what docs/training.md says of torch's own ways


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
@rows()
def test_schedulers_that_cycle_momentum_want_it_in_groups(row, scheduler):
    """Where it is not there, torch says so, and rates alone are cycled with ``cycle_momentum=False``."""
    build, options = getattr(torch.optim.lr_scheduler, scheduler), {"OneCycleLR": (0.1, 20), "CyclicLR": (1e-3, 0.1, 2)}

    def program(comm):
        rank, net = comm.Get_rank(), net_of()
        optimizer = row(net, comm)
        if {"momentum", "betas"} & optimizer.defaults.keys():
            build(optimizer, *options[scheduler])
            steps_of(net, optimizer, rank, range(1))
        else:
            with pytest.raises(ValueError, match="must support momentum or beta1"):
                build(optimizer, *options[scheduler])
        cycle, rates = build(optimizer, *options[scheduler], cycle_momentum=False), set()
        for step in range(3):
            steps_of(net, optimizer, rank, range(step, step + 1))
            rates.add(optimizer.param_groups[0]["lr"])
            cycle.step()
        assert len(rates) == 3

    virtual.results(2, program)


def test_torch_rounds_moments_of_16_bits_that_it_loads_and_the_wrapper_does_not():
    def program(comm):
        net = net_of(torch.bfloat16)
        optimizer = wrapped("Adam", net, comm, placement="gradient")
        inner = optimizer.optimizer
        steps_of(net, optimizer, comm.Get_rank(), range(3))
        exact = inner.state[net.last.weight]["exp_avg"].clone()
        assert exact.dtype == torch.float32
        optimizer.load_state_dict(optimizer.state_dict())
        assert torch.equal(inner.state[net.last.weight]["exp_avg"], exact)
        inner.load_state_dict(copy.deepcopy(inner.state_dict()))
        assert torch.equal(inner.state[net.last.weight]["exp_avg"], exact.bfloat16())
        steps_of(net, optimizer, comm.Get_rank(), range(3, 4))
        assert inner.state[net.last.weight]["exp_avg"].dtype == torch.float32

    virtual.results(2, program)


def test_several_optimizers_want_as_many_batches_on_all_ranks():
    """Those with more would take a step of one optimizer while others are at the end of the other one."""

    def built(comm):
        nets = net_of(), net_of()
        return nets, [wrapped("SGD", net, comm) for net in nets]

    def uneven(comm):
        nets, optimizers = built(comm)

        def joined():
            with optimizers[0].join(), optimizers[1].join():
                for step in range(3 + comm.Get_rank()):
                    for net, optimizer in zip(nets, optimizers, strict=True):
                        steps_of(net, optimizer, comm.Get_rank(), range(step, step + 1))

        with pytest.raises(DisagreementError, match="the optimizer that takes a step"):
            joined()

    def even(comm):
        nets, optimizers = built(comm)
        for step, _ in enumerate(ShardedSampler(37, comm, batch=5, seed=0)):
            for net, optimizer in zip(nets, optimizers, strict=True):
                steps_of(net, optimizer, comm.Get_rank(), range(step, step + 1))
        return [optimizer.steps for optimizer in optimizers]

    virtual.results(2, uneven)
    counts = virtual.results(2, even)
    assert counts[0] == counts[1]
    assert counts[0][0] == counts[0][1] > 1


@rows(lambda row: row.saves > 1)
def test_objects_functions_and_sets_in_groups_are_not_compared(row):
    """They are others on every rank, as texts, and need not be sendable; numbers beside them are compared."""

    class Note:
        pass

    def program(comm):
        net = net_of(torch.float32)
        optimizer = row(net, comm)
        for group in optimizer.param_groups:
            words = {f"{n} {comm.Get_rank()}" for n in range(9)}
            group |= {"note": Note(), "call": lambda x: x, "words": words, "plain": (1, "a")}
        steps_of(net, optimizer, comm.Get_rank(), range(3))
        with optimizer.join():
            steps_of(net, optimizer, comm.Get_rank(), range(3, 4 + comm.Get_rank()))
        optimizer.param_groups[0]["plain"] = (1, "b") if comm.Get_rank() else (1, "a")
        with pytest.raises(DisagreementError, match="disagree on hyper-parameters"):
            steps_of(net, optimizer, comm.Get_rank(), range(9, 10))

    virtual.results(2, program)
