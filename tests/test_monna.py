"""MoNNA and mixing under any torch optimizer: what ranks go on from, where some of them are wrong."""

import copy

import numpy as np
import pytest
import torch
import virtual
from programs import same_bits
from stored import MemoryStore

from mpi_ef.compress import TopK
from mpi_ef.errors import DisagreementError, NonFiniteError, OptionError, SilenceError
from mpi_ef.feedback import mixing
from mpi_ef.optim import MoNNA, PeerMixing
from mpi_ef.robust import Median, aggregate, nearest_mean
from mpi_ef.state.training import Training

pytestmark = pytest.mark.filterwarnings("ignore:MoNNA. n=")
moves = pytest.mark.filterwarnings("ignore:step .* does not move by itself")


def net_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def vector_of(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).numpy().copy()


def loss_of(net, rank, step):
    x = torch.tensor(np.random.default_rng([rank, step]).normal(size=(8, 6)), dtype=torch.float32)
    return (net(x) - x[:, :2]).square().mean()


def take_step(net, optimizer, rank, step, factor=1.0):
    optimizer.zero_grad()
    (factor * loss_of(net, rank, step)).backward()
    optimizer.step()


def lie(net, factor):
    """Let this rank's parameters be something else before it steps."""
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(factor)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_without_wrong_ranks_all_go_on_from_the_mean(n):
    """Law 12, and MoNNA's formulas, step by step."""

    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        twins, m = [net_of() for _ in range(n)], [0.0] * n
        optimizer = MoNNA(net.parameters(), comm, lr=0.1, f=0, beta=0.8, weight_decay=0.01)
        for step in range(5):
            take_step(net, optimizer, rank, step)
            t = []
            for r, twin in enumerate(twins):
                twin.zero_grad()
                loss_of(twin, r, step).backward()
                theta = vector_of(twin)
                grad = torch.cat([p.grad.reshape(-1) for p in twin.parameters()]).numpy()
                m[r] = 0.8 * m[r] + 0.2 * (grad + 0.01 * theta)
                t.append(theta - 0.1 * m[r])
            mean = torch.from_numpy(np.mean(t, axis=0))
            for twin in twins:
                torch.nn.utils.vector_to_parameters(mean, twin.parameters())
            np.testing.assert_allclose(vector_of(net), mean, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(optimizer.x, np.median(t, axis=0), rtol=2e-5, atol=1e-6)
        assert not optimizer.suspicion.any()
        return vector_of(net)

    thetas = virtual.results(n, program)
    assert all(same_bits(thetas[0], theta) for theta in thetas)


@moves
@pytest.mark.parametrize("make", [
    lambda net, comm: MoNNA(net.parameters(), comm, lr=0.3, f=1, beta=0.9),
    lambda net, comm: PeerMixing(torch.optim.Adam(net.parameters(), lr=0.02), comm, f=1, model=net),
    lambda net, comm: MoNNA(net.parameters(), comm, lr=0.3, f=1, beta=0.9, compressor=TopK(0.1))],
    ids=["monna", "adam", "compressed"])
@pytest.mark.parametrize("wrong", [-1.0, 1e20, float("nan")], ids=str)
def test_a_rank_that_is_wrong_decides_nothing(make, wrong):
    def program(comm, bad):
        net, rank, total = net_of(), comm.Get_rank(), 80
        optimizer = make(net, comm)
        for step in range(total):
            if rank == bad and step % 3 == 0:
                lie(net, wrong)
            take_step(net, optimizer, rank, step)
        assert optimizer.steps == total
        with optimizer.shared():
            shared = sum(loss_of(net, 90, k).item() for k in range(20)) / 20
        return sum(loss_of(net, 90, k).item() for k in range(20)) / 20, shared, optimizer.suspicion

    with np.errstate(all="ignore"):
        clean, under = (virtual.results(5, lambda comm, bad=bad: program(comm, bad)) for bad in (None, 2))
    best = max(loss for loss, _, _ in clean)
    for rank in (0, 1, 3, 4):
        loss, shared, suspicion = under[rank]
        assert loss < 1.3 * best < 0.6
        assert shared < 1.3 * best
        if wrong == wrong:  # a broken vector is left out before it can be suspected
            assert suspicion.argmax() == 2


def test_models_of_ranks_stay_together():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1, beta=0.9)
        for step in range(40):
            take_step(net, optimizer, rank, step)
        return vector_of(net), optimizer.x.copy()

    found = virtual.results(5, program)
    thetas, medians = zip(*found, strict=True)
    assert len({theta.tobytes() for theta in thetas}) > 1
    assert len({median.tobytes() for median in medians}) == 1
    assert max(np.linalg.norm(theta - np.mean(thetas, axis=0)) for theta in thetas) < 0.05


def test_a_gradient_with_nan_is_this_ranks_own_matter():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1)
        for step in range(6):
            take_step(net, optimizer, rank, step, float("nan") if rank == 3 and step in (2, 4) else 1.0)
        assert optimizer.steps == 6
        assert optimizer.skipped_steps == optimizer.jumps == 0
        assert np.isfinite(vector_of(net)).all()
        return optimizer.skipped_local_steps

    with pytest.warns(RuntimeWarning, match="rank 3 does not move by itself: NaN or Inf in its gradient"):
        assert virtual.results(4, program) == [0, 0, 0, 2]


@moves
def test_a_rank_that_has_gone_astray_comes_back():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1)
        for step in range(4):
            take_step(net, optimizer, rank, step)
        if rank == 1:
            lie(net, float("inf"))
        take_step(net, optimizer, rank, 4)
        assert np.isfinite(vector_of(net)).all()
        assert optimizer.jumps == (rank == 1)
        assert bool(optimizer.optimizer.state) == (rank != 1)
        take_step(net, optimizer, rank, 5)
        return vector_of(net)

    with np.errstate(all="ignore"):
        thetas = virtual.results(4, program)
    assert np.abs(thetas[1] - thetas[0]).max() < 0.1


@moves
def test_more_broken_ranks_than_f_are_an_error_on_all():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1)
        if rank < 2:
            lie(net, float("nan"))
        with pytest.raises(NonFiniteError, match="2 clients"):
            take_step(net, optimizer, rank, 0)

    virtual.results(4, program)


@pytest.mark.parametrize("options", [{}, {"compressor": TopK(0.3), "rate": 0.5}], ids=str)
@pytest.mark.parametrize("f", [0, 1])
def test_a_checkpoint_goes_on_exactly(options, f):
    """From what `Training` has saved, and from its own state_dict."""
    store = MemoryStore()

    def built(comm):
        net = net_of()
        return net, MoNNA(net.parameters(), comm, lr=0.3, f=f, beta=0.9, **options)

    def go_on(net, optimizer, rank):
        for step in range(6, 9):
            take_step(net, optimizer, rank, step)
        return vector_of(net), optimizer.x.copy(), optimizer.suspicion

    def program(comm):
        (net, optimizer), rank = built(comm), comm.Get_rank()
        for step in range(6):
            take_step(net, optimizer, rank, step)
        training = Training(model=net, optimizer=optimizer, random=False)
        training.save(store, comm, 6)
        state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        return state, *go_on(net, optimizer, rank)

    def again(comm, saved):
        (net, optimizer), rank = built(comm), comm.Get_rank()
        if saved is None:
            assert Training(model=net, optimizer=optimizer, random=False).resume(store, comm) == 6
        else:
            net.load_state_dict(saved[rank][0][0])
            optimizer.load_state_dict(saved[rank][0][1])
        return go_on(net, optimizer, rank)

    first = virtual.results(5, program)
    for saved in (None, first):
        now = virtual.results(5, lambda comm, saved=saved: again(comm, saved))
        assert same_bits(now, [then[1:] for then in first])


def test_on_another_number_of_ranks_all_begin_from_the_median():
    """Without moments, as an old rank may have been wrong."""
    store = MemoryStore()

    def program(comm):
        net = net_of()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1, beta=0.9)
        training = Training(model=net, optimizer=optimizer, random=False)
        training.resume(store, comm, policy="redistribute")
        if store.steps:
            assert not optimizer.optimizer.state
            assert not optimizer.suspicion.any()
            assert same_bits(vector_of(net), np.array(optimizer.x))
        for step in range(3):
            take_step(net, optimizer, comm.Get_rank(), step)
        if not store.steps:
            training.save(store, comm, 3)

    virtual.results(5, program)
    for n in (3, 7):
        with pytest.warns(RuntimeWarning, match="of 5 ranks goes on with"):
            virtual.results(n, program)


def test_what_is_shared_is_the_median():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1)
        for step in range(3):
            take_step(net, optimizer, rank, step)
        optimizer.check_replicas()
        own = vector_of(net)
        rows = optimizer.feedback.state.rows.reshape(5, -1)
        with optimizer.shared():
            assert same_bits(vector_of(net), aggregate(rows, Median(), f=2))
            with pytest.raises(OptionError, match="inside of"):
                take_step(net, optimizer, rank, 3)
        assert same_bits(vector_of(net), own)

    virtual.results(5, program)


def test_replicas_are_compared_by_what_is_shared():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1)
        optimizer.check_replicas_every = 1
        for step in range(4):
            take_step(net, optimizer, rank, step)
        optimizer.feedback.state.settle()
        optimizer.feedback.state.x += rank == 2
        with pytest.raises(DisagreementError):
            take_step(net, optimizer, rank, 4)

    virtual.results(4, program)


@pytest.mark.parametrize(("options", "text"), [
    ({"f": 2}, "MoNNA: Median(): f=2 of n=4 clients; it needs 5 or more; take f=1 or fewer"),
    ({"f": None}, "f is missing"),
    ({"f": 1, "lr": None}, "lr=None is not in [0, inf)"), ({"f": 1, "beta": 1.0}, "beta=1.0 is not in [0, 1)"),
    ({"f": 1, "rate": 0.0}, "rate=0.0 is not in (0, 1]"), ({"f": 1, "rate": 0.5}, "rate=0.5 without compressor"),
    ({"f": 1, "wait_for": 2}, "wait_for=2 with f=1, which may be most of them; take 3 or more"),
    ({"f": 1, "wait_for": 5}, "wait_for=5"), ({"f": 1, "patience_seconds": 0}, "patience_seconds=0"),
    ({"f": 1, "wait_for": 3, "compressor": TopK(0.1)}, "leave out compressor, or wait_for")], ids=str)
def test_what_does_not_fit_is_refused_in_one_line(options, text):
    def program(comm):
        with pytest.raises(OptionError) as error:
            MoNNA(net_of().parameters(), comm, **({"lr": 0.1} | options))
        assert text in str(error.value)

    virtual.results(4, program)


def test_join_is_refused():
    def program(comm):
        optimizer = MoNNA(net_of().parameters(), comm, lr=0.1, f=0)
        with pytest.raises(OptionError, match="give all ranks as many batches"), optimizer.join():
            pass

    virtual.results(2, program)


def test_below_eleven_ranks_for_a_wrong_one_it_says_so():
    def program(comm):
        MoNNA(net_of().parameters(), comm, lr=0.1, f=1)

    with pytest.warns(RuntimeWarning, match="its theory wants n >= 11 f = 11"):
        virtual.results(4, program)


def trained(comm, steps=4, wrong=None, **options):
    """Return a model after some steps from rank to rank; parameters of rank 1 are no numbers before step `wrong`."""
    net, rank = net_of(), comm.Get_rank()
    optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1, beta=0.5, patience_seconds=5, **options)
    for step in range(steps):
        if (rank, step) == (1, wrong):
            lie(net, float("nan"))
        take_step(net, optimizer, rank, step)
    return net, optimizer


@moves
@pytest.mark.parametrize("last", [0, 3])
def test_from_rank_to_rank_one_that_has_gone_astray_goes_on_from_the_others(last):
    def program(comm, wrong):
        net, optimizer = trained(comm, last + 1, wrong, wait_for=3)
        assert optimizer.jumps == (comm.Get_rank() == 1 and wrong is not None)
        return vector_of(net)

    clean, thetas = (virtual.results(4, lambda comm, wrong=wrong: program(comm, wrong)) for wrong in (None, last))
    assert np.abs(thetas[1] - clean[0]).max() < 0.1


def test_from_rank_to_rank_one_that_has_missed_rounds_leaves_them_out_and_ends_with_the_others():
    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1, beta=0.5, wait_for=3, patience_seconds=5)
        while optimizer.peers.round < 30:
            comm.pause(1 if (rank, optimizer.peers.round) == (1, 4) else 0.01)
            take_step(net, optimizer, rank, optimizer.peers.round)
        return optimizer.close(), optimizer.steps, optimizer.jumps, vector_of(net)

    results = virtual.results(4, program)
    assert all(left == () for left, *_ in results)
    assert [steps == 30 for _, steps, _, _ in results] == [True, False, True, True]
    assert [jumps for _, _, jumps, _ in results] == [0, 1, 0, 0]
    assert np.ptp([theta for *_, theta in results], axis=0).max() < 0.3


@moves
def test_from_rank_to_rank_a_loaded_state_is_where_it_goes_back_to():
    def program(comm):
        net, optimizer = trained(comm, wait_for=3)
        state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        net, optimizer = trained(comm, 0, wait_for=3)
        net.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        before = vector_of(net)
        if comm.Get_rank() == 1:
            lie(net, float("inf"))
        take_step(net, optimizer, comm.Get_rank(), 4)
        return before, vector_of(net)

    assert max(np.abs(after - before).max() for before, after in virtual.results(4, program)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_silence_the_next_step_waits_on_and_moves_by_nothing(dtype):
    def program(comm, late):
        net, rank, silences = net_of().to(dtype), comm.Get_rank(), 0
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=0, beta=0.5, wait_for=3, patience_seconds=0.5)
        for step in range(4):
            comm.pause(1.2 * late * (rank == 2 and step == 1))
            factor = rank + step + 1
            while optimizer.steps == step:
                before = [p.detach().clone() for p in net.parameters()]
                optimizer.zero_grad()
                (factor * net(torch.ones(2, 6, dtype=dtype)).square().mean()).backward()
                try:
                    optimizer.step()
                except SilenceError:
                    silences, factor = silences + 1, 100
                    assert all(map(torch.equal, net.parameters(), before))
        optimizer.close()
        assert bool(silences) == (late and rank < 2)
        return optimizer.flat.values.copy(), [s["momentum"].numpy().copy() for s in optimizer.optimizer.state.values()]

    in_time, late = (virtual.results(3, lambda comm, late=late: program(comm, late)) for late in (0, 1))
    assert same_bits(in_time, late)


@moves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_fails_leaves_parameters_as_they_were(dtype):
    def program(comm):
        net, rank = net_of().to(dtype), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1, beta=0.5)
        for step in range(3):
            if step == 2 and rank < 2:
                lie(net, float("nan"))
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.zero_grad()
            net(torch.ones(2, 6, dtype=dtype)).square().mean().backward()
            if step < 2:
                optimizer.step()
        masters = optimizer.flat.values.copy()
        with pytest.raises(NonFiniteError):
            optimizer.step()
        if rank >= 2:
            assert all(map(torch.equal, net.parameters(), before))
            assert same_bits(optimizer.flat.values, masters)

    virtual.results(4, program)


def test_what_travels_from_rank_to_rank_is_counted():
    def program(comm):
        net, optimizer = trained(comm, 4, wait_for=4)
        reports = []
        optimizer.observer = reports.extend
        take_step(net, optimizer, comm.Get_rank(), 4)
        assert reports[0].sent_nbytes == 3 * (8 + 4 * optimizer.flat.d)
        assert reports[0].seconds["communicate"] > 0
        assert optimizer.sent_nbytes == 5 * 3 * (8 + 4 * optimizer.flat.d)
        assert optimizer.seconds["communicate"] > 0

    virtual.results(4, program)


def test_from_rank_to_rank_no_model_is_of_all_ranks():
    """Each rank would write its part of another model."""
    def program(comm):
        net, optimizer = trained(comm, wait_for=3)
        for call in (lambda: Training(model=net, optimizer=optimizer, random=False).save(MemoryStore(), comm, 4),
                     lambda: optimizer.x, optimizer.check_replicas, lambda: optimizer.shared().__enter__()):
            with pytest.raises(OptionError, match="no rank has the vectors of all"):
                call()

    virtual.results(4, program)


@pytest.mark.parametrize("options", [{}, {"compressor": TopK(0.1)}], ids=str)
def test_forgetting_leaves_what_all_know(options):
    """Nothing is owed; parameters are not zero, and shared ones are not either."""
    def program(comm):
        _, optimizer = trained(comm, **options)
        known = optimizer.x.copy(), optimizer.feedback.state.rows.copy()
        optimizer.forget()
        assert same_bits(known, (np.array(optimizer.x), optimizer.feedback.state.rows))

    virtual.results(4, program)


@moves
def test_where_a_rank_is_broken_the_others_copy_nothing(monkeypatch):
    called = []

    def watched(rows, *args):
        called.append(rows.flags.owndata)
        chosen = nearest_mean(rows, *args)
        assert 3 not in chosen
        return chosen

    def program(comm):
        net, rank = net_of(), comm.Get_rank()
        optimizer = MoNNA(net.parameters(), comm, lr=0.3, f=1)
        if rank == 3:
            lie(net, float("nan"))
        take_step(net, optimizer, rank, 0)

    monkeypatch.setattr(mixing, "nearest_mean", watched)
    virtual.results(5, program)
    assert called == [False] * 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_are_not_there_are_as_if_they_were_not(dtype):
    rows = np.random.default_rng(0).normal(size=(6, 70)).astype(dtype)
    rows[4, 0] = 1e100 if dtype is np.float64 else 1e18
    rows[5, 0] = 1.2e154 if dtype is np.float64 else 1e19  # its distances overflow
    among, out, expected = np.array([True, False, True, True, True, True]), np.empty((70,), dtype), np.empty((70,), dtype)
    rows[1] = 0
    for keep in (1, 3, 5):
        chosen = nearest_mean(rows, 2, keep, out, among)
        of_rest = nearest_mean(rows[among], 1, keep, expected)
        assert chosen.tolist() == np.flatnonzero(among)[of_rest].tolist()
        assert same_bits(out, expected)
