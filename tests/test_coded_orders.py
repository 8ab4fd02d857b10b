"""Compressed orders: all compute gradients at the same w, which follows the server's parameters."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import virtual
from test_coded import CODES, D, coded_sum, sleeper, train
from test_coded_optimizer import (
    FR,
    PATTERNS,
    N,
    Net,
    Pairs,
    adamw,
    batch,
    compute,
    loss_of,
    plainly,
    same,
    sgd,
    trained,
)

from mpi_ef import CodedOptimizer, Identity, Quantize, RandK, Sign, TopK
from mpi_ef.coded import CodedGradients, Order, serve
from mpi_ef.errors import DisagreementError, NonFiniteError, OptionError, PeerError
from mpi_ef.testing.law import same_bits

both = pytest.mark.parametrize("eager", [True, False], ids=["eager", "rendezvous"])
compressors = pytest.mark.parametrize("compressor", [TopK(k=2), RandK(k=3), Sign()], ids=str)


def watched(comm, code, compressor, order_compressor, steps, *, x=None, late=lambda rank, t: 0.0, going_on=(), **options):
    """Train; return x, at which w of each step this rank has computed, and what it has sent."""
    x, seen = np.zeros(D) if x is None else x, {}
    with CodedGradients(comm, D, np.float64, code, compressor, order_compressor=order_compressor, order_extras=1,
                        **options) as coded:
        def answer(order):
            seen[order.step] = order.x.copy()
            assert order.extras.tolist() == [order.step / 2]
            comm.pause(late(comm.Get_rank(), order.step))
            coded.answer(coded_sum(order))

        if not coded.is_server:
            for order in coded.orders():
                answer(order)
            return coded.last[0], seen, coded
        if going_on:
            coded.restore(*going_on)
        while coded.step < steps:
            order = coded.begin(x, [coded.step / 2])
            seen[coded.step] = coded.w.copy()
            if order is not None:
                answer(order)
            x = x - 0.05 * coded.end().vector
        saved = coded.rows.copy(), coded.step, coded.w.copy()
        coded.close(x)
    return x, seen, (coded, saved)


@both
@compressors
@pytest.mark.parametrize(("code", "n"), [CODES[1], CODES[6], CODES[0]], ids=str)
def test_law_all_compute_at_the_same_bits_whoever_has_missed_orders(code, n, compressor, eager):
    program = lambda comm: watched(comm, code, TopK(k=3), compressor, 25, late=sleeper(3, n, code.s))  # noqa: E731
    (x, ws, _), *workers = virtual.results(n, program, eager=eager)
    for last, seen, _ in workers:
        assert same_bits(last, x)
        assert all(same_bits(at, ws[step]) for step, at in seen.items())
        assert len(seen) < 25 or not code.s or last is workers[-1][0] or len(workers) > 1
    assert not code.s or min(len(seen) for _, seen, _ in workers) < 25


@compressors
def test_w_follows_x_by_what_the_compressor_leaves_of_the_difference(compressor):
    """EF21-P by hand: w_0 = x_0, w += C(x - w)."""
    codec, n = compressor.codec(D, np.float64), 4
    _, ws, _ = virtual.results(n, lambda comm: watched(comm, FR(1), None, compressor, 10))[0]
    x, w, wire = np.zeros(D), np.zeros(D), np.zeros(codec.nbytes, np.uint8)
    for t in range(10):
        codec.encode(x - w, wire, step=t, rank=n)
        w = w.copy()
        codec.add(wire[None], w)
        np.testing.assert_allclose(ws[t], w, rtol=1e-13, atol=1e-15)
        orders = [virtual_order(t, w, group) for group in range(2)]
        x = x - 0.05 * sum(coded_sum(order) for order in orders)


def virtual_order(t, w, group):
    return Order(t, w, np.zeros(0), FR(1).parts(group, 4), FR(1).row(group, 4))


@both
def test_repetition_gives_the_same_bits_whoever_is_late(eager):
    def program(comm, late):
        return watched(comm, FR(1), None, TopK(k=2), 15, late=late)

    awake, asleep = (virtual.results(6, lambda comm, late=late: program(comm, late), eager=eager)
                     for late in (lambda rank, t: 0.0, sleeper(5, 6, 1)))
    assert same_bits(awake[0][0], asleep[0][0])
    assert min(len(seen) for _, seen, _ in asleep[1:]) < 15


def test_the_identity_is_no_order_compressor():
    plain, identity = (virtual.results(4, train(FR(1), 8, **options))[0][0]
                       for options in ({}, {"order_compressor": Identity()}))
    assert same_bits(plain, identity)


@pytest.mark.parametrize("pause", [0.01, 0.025, 0.1])
def test_only_the_first_order_is_whole_and_that_of_a_worker_that_has_missed_more_moves_than_are_less(pause):
    """Rank 3 sleeps while the others have other steps, and gets the moves that it has missed, or a whole order."""
    def program(comm, order_compressor):
        _, seen, coded = watched(comm, FR(1), None, order_compressor, 20,
                                 late=lambda rank, t: pause if (rank, t) == (3, 4) else 0.01)
        return sorted(seen), coded[0].sent_nbytes if isinstance(coded, tuple) else 0

    n, nbytes = 4, TopK(k=1).wire_nbytes(D, np.float64)
    whole, moves = (virtual.results(n, lambda comm, each=each: program(comm, each), virtual=True)
                    for each in (None, TopK(k=1)))
    assert [steps for steps, _ in whole] == [steps for steps, _ in moves]
    assert moves[1][0] == moves[2][0] == list(range(20))
    assert (moves[3][0] == list(range(20))) == (pause == 0.01)
    missed = [step - before - 1 for steps, _ in moves[1:] for before, step in pairwise(steps)]
    shorter = [count for count in missed if (count + 1) * (8 + nbytes) < 8 + 8 * D]
    assert whole[0][1] - moves[0][1] == sum(8 * D - nbytes - count * (8 + 8 + nbytes) for count in shorter)
    assert bool(sum(shorter)) == (pause > 0.01)
    assert (len(shorter) < len(missed)) == (pause == 0.1)


@both
@pytest.mark.parametrize("compressor", [None, TopK(k=2)], ids=str)
def test_a_server_that_was_saved_goes_on_as_if_nothing_had_been(compressor, eager):
    def program(comm, steps, x=None, going_on=()):
        return watched(comm, FR(1), compressor, TopK(k=2), steps, x=x, going_on=going_on)

    (expected, ws, _), *_ = virtual.results(4, lambda comm: program(comm, 12), eager=eager)
    (x, _, (_, saved)), *_ = virtual.results(4, lambda comm: program(comm, 7), eager=eager)
    rows, step, w = saved
    (last, seen, _), *workers = virtual.results(4, lambda comm: program(comm, 12, x.copy(), (rows, step, w)), eager=eager)
    assert same_bits(last, expected)
    assert all(same_bits(seen[t], ws[t]) for t in range(7, 12))
    assert all(same_bits(at, ws[t]) for _, at_of, _ in workers for t, at in at_of.items())
    without, *_ = virtual.results(4, lambda comm: program(comm, 12, x.copy(), (rows, step)), eager=eager)
    assert same_bits(without[1][7], x)  # w is x again


def test_after_x_that_is_not_finite_the_next_order_is_whole():
    def program(comm):
        with CodedGradients(comm, D, np.float64, FR(1), order_compressor=TopK(k=2)) as coded:
            if not coded.is_server:
                return [order.x.copy() for order in coded.orders() if coded.answer(np.array(order.x)) is None]
            for x in (np.zeros(D), np.full(D, np.nan), np.ones(D), np.full(D, 2.0)):
                order = coded.begin(x)
                coded.answer(np.array(order.x))
                try:
                    coded.end()
                except NonFiniteError:
                    coded.restore(None if coded.step == 0 else coded.rows, coded.step + 1, coded.w)
            return None

    for seen in virtual.results(4, program)[1:]:
        assert np.isnan(seen[1]).all()
        assert (seen[2] == 1).all()
        assert sorted(seen[3]) == [1] * (D - 2) + [2] * 2


def test_serve_computes_at_w():
    """x and w come to the same minimum, with far fewer bytes."""
    def program(comm, order_compressor):
        x, rng = np.zeros(200), np.random.default_rng(0)
        target = rng.normal(size=(comm.Get_size(), 200))
        served = serve(comm, lambda w, part, t: (w - target[part], 1), x, FR(1), order_compressor=order_compressor,
                       step=lambda x, g, t: x - 0.05 * g, steps=600)
        return x, np.abs(x - target.mean(axis=0)).max(), served.coded.sent_nbytes

    whole, followed = (virtual.results(4, lambda comm, each=each: program(comm, each)) for each in (None, TopK(k=20)))
    assert whole[0][1] < 1e-12
    assert followed[0][1] < 1e-6
    assert all(same_bits(x, followed[0][0]) for x, *_ in followed)
    assert followed[0][2] < 0.2 * whole[0][2]


@pytest.mark.parametrize(("option", "error", "line"), [
    ("top", OptionError, "CodedGradients: order_compressor='top' is no compressor"),
    (TopK(k=9), OptionError, "k=9"),
    ("differs", DisagreementError, "ranks disagree on layout")])
def test_what_cannot_be_is_refused_on_all_ranks(option, error, line):
    def program(comm):
        each = TopK(k=1 + comm.Get_rank()) if option == "differs" else option
        with pytest.raises(error, match=line):
            CodedGradients(comm, 7, np.float32, FR(1), order_compressor=each)

    virtual.results(4, program)


# ------------------------------------------------------------------ torch


def following(compressor, d, dtype, n):
    """Return w of each step for :func:`plainly`."""
    codec = compressor.codec(d, dtype)
    w, wire = np.zeros(0), np.zeros(codec.nbytes, np.uint8)

    def follow(t, values):
        nonlocal w
        if not w.size:
            w = values.copy()
        else:
            codec.encode(values - w, wire, step=t, rank=n)
            codec.add(wire[None], w)
        return w
    return follow


def size_of(model):
    return sum(p.numel() for p in model().parameters() if p.requires_grad)


@pytest.mark.parametrize("late", ["all in time", "in turns"])
@pytest.mark.parametrize(("model", "optimizer"), [(Net, sgd), (Pairs, adamw)])
@pytest.mark.parametrize("compressor", [TopK(0.2), Quantize("int8")], ids=str)
def test_a_training_is_that_of_a_torch_loop_that_computes_gradients_at_w(compressor, model, optimizer, late):
    wanted = plainly(N, 1, model=model, optimizer=optimizer, follow=following(compressor, size_of(model), np.float32, N))
    other = plainly(N, 1, model=model, optimizer=optimizer)
    for _, state, _ in trained(N, FR(1), model=model, optimizer=optimizer, order_compressor=compressor, late=PATTERNS[late]):
        assert same(state, wanted)
        assert not same(state, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dedicated", [False, True])
def test_whoever_is_late_a_training_has_the_same_bits_and_resumes_with_them(dtype, dedicated):
    """Also in 16 bits, and from a checkpoint in the middle."""
    options = {"order_compressor": TopK(0.2), "dtype": dtype, "dedicated": dedicated}
    late = {rank + dedicated: steps for rank, steps in PATTERNS["in turns"].items()}
    whole, sleepy = trained(N + dedicated, FR(1), **options), trained(N + dedicated, FR(1), late=late, **options)
    assert all(same(state, whole[0][1]) for _, state, _ in [*whole, *sleepy])
    saved = {}

    def save(coded, net, comm):
        if coded.is_server:
            saved.update(net=copy.deepcopy(net.state_dict()), optimizer=copy.deepcopy(coded.state_dict()))

    def load(coded, net, comm):
        if coded.is_server:
            net.load_state_dict(saved["net"])
            coded.load_state_dict(saved["optimizer"])

    trained(N + dedicated, FR(1), steps=3, then=save, **options)
    assert all(same(state, whole[0][1]) for _, state, _ in trained(N + dedicated, FR(1), first=load, **options))


@pytest.mark.parametrize("leaves", ["never", "breaks", "fails"])
def test_outside_of_parts_the_parameters_of_the_server_are_its_own(leaves):
    """However a loop over parts ends."""
    class Over(Exception):
        pass

    def program(comm):
        torch.manual_seed(0)
        net = Net()
        coded = CodedOptimizer(sgd(net), comm, FR(1), order_compressor=TopK(k=1), model=net)
        x, at = None, None
        try:
            for step in coded.steps(4):
                if coded.is_server:
                    assert x is None or torch.equal(x, values_of(net))
                    x = values_of(net)
                    for part in coded.parts():
                        assert torch.equal(values_of(net), x) == (step == 0)
                        if step == 3 and leaves != "never":
                            if leaves == "fails":
                                raise Over
                            break
                        take(coded, net, part, step)
                    assert torch.equal(values_of(net), x) or leaves == "breaks"
                else:
                    compute(coded, net, step)
                coded.step()
                x = values_of(net)
        except (Over, OptionError, PeerError):
            assert leaves != "never"
            coded.leave(0)
        return None if x is None else (torch.equal(values_of(net), x) or not coded.is_server), at

    assert all(answer is None or answer[0] for answer in virtual.results(4, program))


def values_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def take(coded, net, part, step):
    x, y = batch(step, part.number)
    part.backward(loss_of(net, x, y), samples=len(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_to_parameters_counts_before_parts_and_not_inside_of_them(dtype):
    """In place, or as other memory."""
    def program(comm):
        torch.manual_seed(0)
        net = Net().to(dtype)
        coded = CodedOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), comm, FR(1), order_compressor=TopK(k=1), model=net)
        first = next(net.parameters())
        for step in coded.steps(3):
            with torch.no_grad():
                if coded.is_server and step:
                    first.mul_(2)
            x = values_of(net)
            for part in coded.parts():
                data, target = batch(step, part.number, dtype)
                part.backward(loss_of(net, data, target), samples=len(target))
                if coded.is_server and step == 1:
                    first.data = torch.full_like(first, 7)
                elif coded.is_server:
                    first.data.fill_(7)
            assert torch.equal(values_of(net), x) or not coded.is_server
            coded.step()
            assert torch.equal(values_of(net), x) or not coded.is_server
        return values_of(net)

    torch.manual_seed(0)
    expected = Net().to(dtype)
    with torch.no_grad():
        next(expected.parameters()).mul_(4)
    assert all(torch.equal(values, values_of(expected)) for values in virtual.results(2, program))


def test_moves_that_were_missed_take_no_more_memory_than_an_order():
    """Two workers miss tens of them: each is in memory of its own size, for both."""
    d, steps = 4000, 60

    def program(comm):
        seen = []
        with CodedGradients(comm, d, np.float64, FR(1), order_compressor=TopK(k=1)) as coded:
            for order in (coded.begin(np.full(d, float(t))) for t in range(steps)) if coded.is_server else coded.orders():
                seen.append(order.step)
                if comm.Get_rank() in {2, 3}:
                    comm.pause(0.5 if order.step == 2 else 0.0)
                comm.pause(0.01)
                coded.answer(np.zeros(d))
                if coded.is_server:
                    coded.end()
            if not coded.is_server:
                return seen
        late = coded.decider.server._late
        return [frame.wire.nbytes for sizes in late._free.values() for frame in sizes], coded._layout

    (free, layout), *workers = virtual.results(4, program, virtual=True)
    assert max(after - before for seen in workers for before, after in pairwise(seen)) > 30
    assert free.count(layout.order_nbytes) <= 4
    assert set(free) == {layout.order_nbytes, layout.answer_nbytes}


@pytest.mark.parametrize("order_compressor", [None, TopK(k=1)], ids=str)
def test_a_state_of_parameters_that_are_not_the_servers_is_refused(order_compressor):
    def program(comm):
        net = Net()
        coded = CodedOptimizer(sgd(net), comm, FR(1), order_compressor=order_compressor, model=net)
        for step in coded.steps(2):
            for part in coded.parts():
                take(coded, net, part, step)
                if coded.is_server and order_compressor is not None:
                    with pytest.raises(OptionError, match="state_dict: inside of parts"):
                        coded.state_dict()
                elif coded.is_server:
                    coded.state_dict()
            coded.step()
            assert not coded.is_server or coded.state_dict()["done"] == step + 1

    virtual.results(2, program)


def test_dense_bytes_are_those_of_orders_that_are_not_compressed():
    """Also where a compressed one would be longer."""
    def program(comm):
        with CodedGradients(comm, 1, np.float32, FR(1), order_compressor=Quantize("int8")) as coded:
            for order in [coded.begin(np.zeros(1, np.float32))] if coded.is_server else coded.orders():
                coded.answer(order.x)
            assert coded._layout.move_nbytes > 8
            return coded.dense_nbytes

    assert virtual.results(2, program)[0] == 8 + 8


def test_a_checkpoint_goes_on_in_another_precision_and_without_compressed_orders():
    saved = {}

    def save(coded, net, comm):
        if coded.is_server:
            saved.update(net=copy.deepcopy(net.state_dict()), optimizer=copy.deepcopy(coded.state_dict()))

    def load(coded, net, comm):
        if coded.is_server:
            net.load_state_dict(saved["net"])
            coded.load_state_dict(copy.deepcopy(saved["optimizer"]))

    trained(2, FR(1), steps=2, then=save, order_compressor=TopK(0.2))
    for options in ({"dtype": torch.float64, "order_compressor": Sign()}, {}):
        first, second = trained(2, FR(1), first=load, **options)
        assert same(first[1], second[1])
        assert first[2] == [2, 3, 4]
