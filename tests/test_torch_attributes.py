"""An optimizer as an object of torch: attributes that are assigned, options of groups, hooks, copies; with any optimizer."""

from collections import defaultdict

import pytest
import virtual
from optimizer_table import rows
from programs import same_bits
from training import everything, groups_of, net_of, parameters_of, steps_of

from mpi_ef.errors import OptionError, PeerError
from mpi_ef.optim import DistributedOptimizer

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
