"""`CodedOptimizer`: what the torch optimizer sees is the gradient of all samples, whoever is late."""

import copy
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import virtual
from torch import nn

from mpi_ef import CodedOptimizer, Quantize, TopK, Training
from mpi_ef.checkpoint import Store
from mpi_ef.coded import Cyclic, FractionalRepetition
from mpi_ef.errors import MpiEfError, OptionError, PeerError, SilenceError
from mpi_ef.kernels.backend import on_device_side
from mpi_ef.testing.regression import Net
from mpi_ef.vectors import FlatParameters

FR = FractionalRepetition
N, STEPS = 6, 5


def batch(step, part, dtype=torch.float32):
    """Samples of a part of a step, of which parts have different numbers, and one has none in step 2."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    count = 0 if (step, part) == (2, 3) else 1 + part
    return (torch.randn(count, 7, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(count, 3, generator=generator, dtype=torch.float64).to(dtype))


def with_statistics():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


class Pairs(nn.Module):
    """BatchNorm wants two samples."""

    def __init__(self):
        super().__init__()
        self.inner = with_statistics()

    def forward(self, x):
        return self.inner(torch.cat([x, -x]))[: len(x)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y)


def compute(coded, net, step, dtype=torch.float32):
    for part in coded.parts():
        x, y = batch(step, part.number, dtype)
        part.backward(loss_of(net, x, y), samples=len(y))


def trained(n, code, compressor=None, *, model=Net, optimizer=sgd, late=None, dtype=torch.float32, steps=STEPS, then=None,
            first=None, **options):
    """What each rank ends with; `late` maps ranks to the steps in which they sleep."""
    made = {}

    def program(comm):
        rank = comm.Get_rank()
        net = made.setdefault(rank, copy.deepcopy(shared)).to(dtype)
        coded = CodedOptimizer(optimizer(net), comm, code, compressor, model=net, **options)
        if first is not None:
            first(coded, net, comm)
        seen = []
        for step in coded.steps(steps):
            seen.append(step)
            if late is not None and step in late.get(rank, ()):
                comm.pause(0.1)
            compute(coded, net, step, dtype)
            coded.step()
            comm.pause(0.01)
        if then is not None:
            then(coded, net, comm)
        return coded, state_of(net), seen

    shared = model()
    return virtual.results(n, program)


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def plainly(n, s, *, model=Net, optimizer=sgd, dtype=torch.float32, steps=STEPS, seed=0, follow=lambda t, values: values):
    """A torch loop over all parts of each step, in groups of s + 1, whose gradients are added up in their order.

    They are computed where `follow` says.
    """
    from mpi_ef.optim.parts import seed_of

    net = model().to(dtype)
    inner = optimizer(net)
    flat = FlatParameters(net.parameters())  # products of matrices are rounded as their places in memory are
    tracked = [b for name, b in net.named_buffers() if "running_" in name or "num_batches" in name]
    for step in range(steps):
        total, samples, before = {}, 0, [b.clone() for b in tracked]
        changes = [torch.zeros_like(b, dtype=torch.float64) for b in tracked]
        here = flat.values.copy()
        flat.values[:] = follow(step, here)
        flat.write_back()
        for group in range(n // (s + 1)):
            net.zero_grad()
            for part in range(group * (s + 1), (group + 1) * (s + 1)):
                torch.manual_seed(seed_of(seed, step, part))
                x, y = batch(step, part, dtype)
                if len(y):
                    (loss_of(net, x, y) * float(len(y))).backward()
                samples += len(y)
                for b, old, change in zip(tracked, before, changes, strict=True):
                    change.add_(b.double() - old.double())
                    b.copy_(old)
            for p in net.parameters():
                if p.grad is not None:
                    total[p] = total[p] + p.grad if p in total else p.grad.clone()
        net.zero_grad()
        flat.values[:] = here
        flat.write_back()
        for p, place in zip(flat.parameters, flat.views(flat.gradients), strict=True):
            p.grad = place.copy_(total[p] / samples) if p in total else None
        inner.step()
        for b, old, change in zip(tracked, before, changes, strict=True):
            new = old.double() + change / n
            b.copy_(new if b.is_floating_point() else new.round())
    return state_of(net)


PATTERNS = {
    "all in time": None,
    "one always": {3: range(STEPS)},
    "the first": {1: range(STEPS)},
    "in turns": {rank: range(rank, STEPS, 4) for rank in range(1, N)},
    "one of each group": {rank: range(STEPS) for rank in (4, 2, 3)},
}


@pytest.mark.parametrize("late", PATTERNS)
@pytest.mark.parametrize("dedicated", [False, True])
def test_a_repeated_gradient_is_that_of_a_torch_loop_to_the_last_bit(late, dedicated):
    """Whoever sleeps, with parts of different sizes, an unused parameter, and momentum."""
    wanted = plainly(N, 1)
    pattern = {rank + dedicated: steps for rank, steps in (PATTERNS[late] or {}).items()}
    ranks = trained(N + dedicated, FR(1), late=pattern, dedicated=dedicated)
    for coded, state, seen in ranks:
        assert same(state, wanted)
        assert coded.missing == ()
        assert seen == (list(range(STEPS)) if coded.is_server else sorted(set(seen)))
    if pattern:
        assert ranks[0][0].metrics["late"] > 0


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("late", ["all in time", "in turns"])
def test_statistics_and_dropout_are_those_of_a_torch_loop(late, optimizer):
    wanted = plainly(N, 2, model=Pairs, optimizer=optimizer)
    for _, state, _ in trained(N, FR(2), model=Pairs, optimizer=optimizer, late=PATTERNS[late]):
        assert same(state, wanted)


@pytest.mark.parametrize(("code", "late"), [(Cyclic(1), {3: range(STEPS)}), (Cyclic(3), {1: range(STEPS), 4: (1, 2)})])
def test_a_cyclic_gradient_is_that_of_a_torch_loop(code, late):
    wanted = plainly(N, 0, optimizer=adamw, dtype=torch.float64)
    for _, state, _ in trained(N, code, optimizer=adamw, late=late, dtype=torch.float64):
        assert all(torch.allclose(state[name], wanted[name], rtol=1e-12, atol=1e-12) for name in wanted)


def test_compressed_gradients_are_those_of_ef21():
    """c_i = C(m_i - h_i), h_i += c_i, the server steps with the sum of h_i over groups; the first answer is whole."""
    compressor, n, s = TopK(0.2), 4, 1
    net = Net()
    inner, q = sgd(net), n // 2
    trained_ones = [p for p in net.parameters() if p.requires_grad]
    d = sum(p.numel() for p in trained_ones)
    h = np.zeros((q, d), np.float32)
    for step in range(STEPS):
        samples = 0
        for group in range(q):
            net.zero_grad()
            for part in (2 * group, 2 * group + 1):
                x, y = batch(step, part)
                samples += len(y)
                if len(y):
                    (loss_of(net, x, y) * float(len(y))).backward()
            m = np.concatenate([np.zeros(p.numel(), np.float32) if p.grad is None else p.grad.numpy().ravel()
                                for p in trained_ones])
            if step:
                left = m - h[group]
                kept = np.argsort(-np.abs(left), kind="stable")[: compressor.count(d)]
                h[group][kept] += left[kept]
            else:
                h[group] = m
        net.zero_grad()
        total, start = h[0] + h[1], 0
        for p in trained_ones:
            grad = torch.from_numpy(total[start : start + p.numel()] / np.float32(samples)).view(p.shape)
            start += p.numel()
            if p is not net.unused:
                p.grad = grad
        inner.step()
    wanted = state_of(net)
    for _, state, _ in trained(n, FR(s), compressor):
        assert all(torch.allclose(state[name], wanted[name], rtol=1e-5, atol=1e-6) for name in wanted)
    for _, state, _ in trained(n, FR(s), compressor, late={3: range(STEPS)}):  # its twin answers for it
        assert all(torch.allclose(state[name], wanted[name], rtol=1e-5, atol=1e-6) for name in wanted)


@pytest.mark.parametrize("code", [FR(1), Cyclic(1)])
def test_sixteen_bits_have_masters_in_thirty_two(code):
    """Learning rates too small for bfloat16 add up, and the moments are those of the masters."""
    def slow(net):
        return torch.optim.AdamW(net.parameters(), lr=1e-5)

    (coded, state, _), *others = trained(N, code, optimizer=slow, dtype=torch.bfloat16)
    assert coded.flat.mixed
    masters = coded.flat.masters()
    moved = [float((master - master.bfloat16().float()).abs().max()) for master in masters.values()]
    assert max(moved) > 0
    for _, its, _ in others:
        assert same(state, its)


def test_a_vector_on_a_device_goes_by_the_host():
    host = trained(4, FR(1), TopK(0.3, values=Quantize("bf16")), late={3: (1, 2)})
    with on_device_side():
        there = trained(4, FR(1), TopK(0.3, values=Quantize("bf16")), late={3: (1, 2)}, then=there_too)
    for (_, mine, _), (_, its, _) in zip(host, there, strict=True):
        assert same(mine, its)


def there_too(coded, *_):
    assert coded.flat.device != "cpu"


def test_groups_a_schedule_and_a_limit_are_the_servers():
    """Rates of workers, whose schedulers miss steps, do not matter; nor does torch warn of them."""
    def program(comm):
        net = copy.deepcopy(shared)
        inner = torch.optim.SGD([{"params": [net.first.weight], "lr": 0.5}, {"params": [net.last.weight]}], lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
        coded = CodedOptimizer(inner, comm, FR(1), model=net, clip=0.25)
        norms = []
        for step in coded.steps(4):
            before = net.first.weight.detach().clone(), net.last.weight.detach().clone()
            if comm.Get_rank() == 3:
                comm.pause(0.05)
            compute(coded, net, step)
            coded.step()
            rates = [group["lr"] for group in coded.param_groups]
            moved = [(p.detach() - old) / rate for p, old, rate in zip((net.first.weight, net.last.weight), before, rates,
                                                                       strict=True)]
            norms.append(float(sum(m.square().sum() for m in moved)) ** 0.5)
            schedule.step()
        return norms, rates, state_of(net)

    shared = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (norms, rates, state), *others = virtual.results(4, program)
    assert norms == pytest.approx([0.25] * 4, rel=1e-4)
    assert rates == [0.5 / 8, 0.1 / 8]
    assert torch.equal(state["first.bias"], Net().first.bias)  # was not given to it
    assert all(same(state, its) for _, _, its in others)


@pytest.mark.parametrize("stop", ["without", "with rows", "another code", "fewer ranks"])
@pytest.mark.parametrize("kind", ["exact", "topk"])
def test_a_server_saves_alone_and_goes_on(tmp_path, stop, kind):
    """To the last bit where nothing is compressed; with rows as without the interruption, without them nearly."""
    compressor, model = None if kind == "exact" else TopK(0.3), Pairs

    def storing(coded, net, comm):
        alone = comm.Split(comm.Get_rank())
        if coded.is_server:
            store = Store(tmp_path, keep_last=1)
            Training(model=net, coded=coded).save(store, alone, coded.done)
            store.close()

    def loading(coded, net, comm):
        alone = comm.Split(comm.Get_rank())
        if coded.is_server:
            store = Store(tmp_path, keep_last=1)
            assert Training(model=net, coded=coded).resume(store, alone) == 3
            store.close()

    late = {2: (1,)}
    whole = trained(4, FR(1), compressor, model=model, optimizer=adamw, late=late)
    trained(4, FR(1), compressor, model=model, optimizer=adamw, late=late, steps=3, then=storing)
    n, code = {"another code": (4, FR(3)), "fewer ranks": (2, FR(1))}.get(stop, (4, FR(1)))
    ended = trained(n, code, compressor, model=model, optimizer=adamw, late=late, first=loading)
    assert ended[0][2] == [3, 4]
    if n == 4 and code == FR(1):
        assert all(same(state, whole[0][1]) for _, state, _ in ended)
    assert all(same(state, ended[0][1]) for _, state, _ in ended)


def test_an_error_of_the_loop_body_ends_it_and_generators_are_put_back():
    def program(comm):
        net = Net()
        coded = CodedOptimizer(sgd(net), comm, FR(1), model=net)
        for _ in coded.steps(5):
            before = torch.get_rng_state() if coded.is_server else None
            compute(coded, net, 0)
            assert before is None or torch.equal(before, torch.get_rng_state())
            coded.step()
            if coded.is_server and coded.done == 2:
                break
        return coded.done, state_of(net)

    (done, state), *others = virtual.results(4, program)
    assert done == 2
    assert all(same(state, its) for _, its in others)  # workers have ended, with the last parameters


class EndsAllError(Exception):
    """As an error does that is not caught, on real ranks."""


def said(body, *, net_of=lambda: nn.Sequential(nn.Linear(7, 3)), kind=OptionError):
    """The one line that rank 0 raises."""
    def program(comm):
        net = net_of()
        coded = CodedOptimizer(sgd(net), comm, FR(1), model=net, patience_seconds=0.3)
        try:
            for step in coded.steps(2):
                body(coded, net, step)
        except kind as error:
            raise EndsAllError(error) from error

    error = virtual.run(2, program)[0]
    assert isinstance(error, EndsAllError), error
    assert "\n" not in str(error)
    return str(error)


def ordinary(coded, net, step):
    compute(coded, net, step)
    coded.step()


def with_a_scaler(coded):
    scaler = torch.amp.GradScaler("cpu")
    for p in coded.flat.parameters:
        p.grad = torch.zeros_like(p)
    scaler.scale(torch.zeros(1))
    scaler.step(coded)


def test_misuse_is_told_in_one_line():
    name = "CodedOptimizer"

    def server(wrong):
        return lambda coded, net, step: (wrong if coded.is_server else ordinary)(coded, net, step)

    def part_with(act):
        def wrong(coded, net, step):
            for part in coded.parts():
                act(part, net)
            coded.step()
        return wrong

    x, y = batch(0, 1)
    lines = {
        f"{name}.step: 0 of 2 parts were computed in step 0; let the loop": lambda coded, *_: coded.step(),
        f"{name}: parts were asked for already in step 0;": lambda coded, *_: (coded.parts(), coded.parts()),
        f"{name}: backward() of part 0 of step 0 was not called; call part.backward(": part_with(lambda *_: None),
        f"{name}: part 0 of step 0: loss has shape (2, 3); pass the mean": part_with(
            lambda part, net: part.backward(net(x), samples=2)),
        f"{name}: part 0 of step 0: loss is 0.5; pass the mean": part_with(lambda part, _: part.backward(0.5, samples=2)),
        f"{name}: part 0 of step 0: samples=2.5 is not a non-negative integer": part_with(
            lambda part, net: part.backward(loss_of(net, x, y), samples=2.5)),
        f"{name}: part 0 of step 0: loss does not depend on parameters": part_with(
            lambda part, net: part.backward(loss_of(net, x, y).detach(), samples=2)),
        f"{name}: step 0 was not ended; call step()": lambda *_: None,
        f"{name}.step: takes no closure": lambda coded, *_: coded.step(lambda: 0.0),
        f"{name}: steps() is at work already": lambda coded, *_: coded.steps(3),
        f"{name}.load_state_dict: steps were made": lambda coded, *_: coded.load_state_dict({}),
        f"{name}.step: GradScaler, whose scale": lambda coded, *_: with_a_scaler(coded),
    }
    for line, wrong in lines.items():
        assert said(server(wrong)).startswith(line), line

    def on_a_worker(comm):
        net = Net()
        coded = CodedOptimizer(sgd(net), comm, FR(1), model=net)
        with pytest.raises(OptionError, match="is the server's, rank 0, which has all state; workers are told theirs") \
                if comm.Get_rank() else nullcontext():
            coded.state_dict()

    virtual.results(2, on_a_worker)


def turn(coded, net, step, *, before=None, between=None, after=None):
    for part in coded.parts():
        x, y = batch(step, part.number)
        if before is not None:
            before(net, x, y)
        part.backward(loss_of(net, x, y), samples=len(y))
        if between is not None:
            between(net)
    if after is not None:
        after(net)
    coded.step()


def zero(net, *_):
    net.zero_grad()


def zero_in_place(net, *_):
    net.zero_grad(set_to_none=False)


def limit(net):
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def backward(net, x, y):
    loss_of(net, x, y).backward()


@pytest.mark.parametrize(("options", "where"), [
    ({"before": zero}, "part 1 of step 0"), ({"before": zero_in_place}, "part 1 of step 0"),
    ({"before": backward}, "part 0 of step 0"), ({"between": limit}, "part 0 of step 0"),
    ({"between": zero}, "part 0 of step 0"), ({"after": limit}, "step: step 0"), ({"after": zero}, "step: step 0")])
def test_what_else_changes_gradients_is_told(options, where):
    """Each of these has lost parts, or let them count otherwise, without a word."""
    line = said(lambda coded, net, step: turn(coded, net, step, **options))
    assert "something else than part.backward() has changed gradients since; leave out zero_grad()" in line
    assert where in line


class Rests(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.rests = nn.Linear(7, 3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.used(x)


def test_zero_grad_that_changes_gradients_before_the_first_part_does_no_harm():
    def ended(before):
        def program(comm):
            torch.manual_seed(0)
            net = Rests()
            coded = CodedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5), comm, FR(0))
            for step in coded.steps(2):
                turn(coded, net, step, before=before)
            return state_of(net)

        return virtual.results(2, program)[0]

    wanted = ended(None)
    assert float(wanted["rests"]) == 1.0  # no gradient, no decay
    assert same(ended(zero), wanted)
    assert same(ended(zero_in_place), wanted)


def test_what_cannot_be_built_is_told_on_all_ranks():
    def line(kind=OptionError, **options):
        def program(comm):
            net = Net()
            CodedOptimizer(**{"optimizer": sgd(net), "comm": comm, "code": FR(1), "model": net} | options)

        errors = virtual.run(2, program)
        assert all(isinstance(error, (kind, PeerError)) for error in errors), errors
        return str(errors[0])

    net = Net()
    assert "optimizer is 3; pass one of torch's" in line(optimizer=3)
    assert "evaluates the model several times in a step" in line(optimizer=torch.optim.LBFGS(net.parameters()))
    assert "clip=-1 is negative" in line(clip=-1)
    assert "seed=-1 is negative" in line(seed=-1)
    assert "3 does not divide 2" in line(code=FR(2)) or "cannot all be missing" in line(code=FR(2))


def test_a_buffer_that_is_no_statistic_may_not_change():
    class Counts(nn.Module):
        def __init__(self, *, replaces):
            super().__init__()
            self.line, self.replaces = nn.Linear(7, 3), replaces
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            if self.replaces:
                self.seen = self.seen + 1
            else:
                self.seen += 1
            return self.line(x)

    for replaces in (False, True):
        line = said(ordinary, net_of=lambda replaces=replaces: Counts(replaces=replaces))
        assert line.startswith("CodedOptimizer: a forward pass has changed buffer seen, which is no running statistic")


def test_a_buffer_may_be_written_to_between_steps():
    """As loading does, in place or not: it is a forward pass that may not."""
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(7, 3)
            self.register_buffer("mask", torch.ones(3))

        def forward(self, x):
            return self.line(x) * self.mask

    def program(comm):
        net = Masked()
        coded = CodedOptimizer(sgd(net), comm, FR(1), model=net, patience_seconds=0.3)
        if coded.is_server:
            net.mask = torch.ones(3)
            net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
        for step in coded.steps(3):
            net.mask.fill_(1.0)
            ordinary(coded, net, step)
        return coded.done

    assert virtual.results(2, program)[0] == 3


def frozen_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    net.register_buffer("mask", torch.ones(3))
    net[0].weight.requires_grad_(False)
    return net


def trained_where(write, *, at="below", who=0, optimizer=sgd, steps=3):
    """What each rank ends with, where some ranks write to what is not trained; FR(0) compares nothing."""
    def program(comm):
        net = frozen_first()
        coded = CodedOptimizer(optimizer(net), comm, FR(0), model=net, patience_seconds=0.3)
        acts = comm.Get_rank() <= who
        if at == "before" and acts:
            write(net)
        for step in coded.steps(steps):
            if at == "top" and acts:
                write(net)
            compute(coded, net, step)
            coded.step()
            if at == "below" and acts and step < steps - 1:
                write(net)
        return state_of(net)

    return virtual.run(3, program)


def halves(name):
    def write(net):
        with torch.no_grad():
            net.state_dict(keep_vars=True)[name].mul_(0.5)
    return write


def head(net):
    return torch.optim.SGD(net[1].parameters(), lr=0.1)


@pytest.mark.parametrize("at", ["before", "below"])
@pytest.mark.parametrize(("name", "optimizer"), [("0.weight", sgd), ("mask", sgd), ("0.bias", head), ("0.weight", head)])
def test_what_is_not_trained_and_changes_on_the_server_alone_is_told(name, optimizer, at):
    """As a teacher's average or a checkpoint: workers went on with another model, and nothing said so."""
    error, *others = trained_where(halves(name), at=at, optimizer=optimizer)
    assert isinstance(error, OptionError)
    assert str(error).startswith(f"CodedOptimizer: {name}, which is not trained, was changed on the server, and workers go")
    assert all(isinstance(other, PeerError) for other in others)


def test_what_is_not_trained_may_be_loaded_as_it_is_or_written_on_all_ranks():
    loads = lambda net: net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})  # noqa: E731
    assert isinstance(trained_where(loads, at="before")[0], dict)
    assert isinstance(trained_where(loads, at="below")[0], dict)
    first, *others = trained_where(halves("mask"), at="top", who=2)
    assert all(torch.equal(first["1.weight"], other["1.weight"]) for other in others)


def test_what_an_optimizer_does_not_have_begins_alike():
    def program(comm):
        net = frozen_first()
        with torch.no_grad():
            net[0].weight += comm.Get_rank()
        with pytest.raises(MpiEfError, match=r"parameter 0\.weight.*let them begin alike"):
            CodedOptimizer(head(net), comm, FR(0), model=net)

    virtual.results(2, program)


def test_a_second_loop_is_refused_on_all_ranks():
    """Workers went by it, and the server spoke of something that was closed."""
    def program(comm):
        net = Net()
        coded = CodedOptimizer(sgd(net), comm, FR(0), model=net)
        for step in coded.steps(2):
            ordinary(coded, net, step)
        with pytest.raises(OptionError, match=r"steps\(\) is over, and workers have ended; let one loop go over all steps"):
            coded.steps(4)

    virtual.results(2, program)


def test_a_state_that_cannot_be_loaded_is_one_line():
    def program(comm):
        net = Net()
        coded = CodedOptimizer(sgd(net), comm, FR(0), model=net)
        if coded.is_server:
            state = coded.state_dict()
            groups = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).state_dict()
            for change, line in (({"optimizer": groups}, "SGD cannot be loaded .ValueError: loaded state dict contains"),
                                 ({"optimizer": {}}, "SGD cannot be loaded .KeyError: 'param_groups'"),
                                 ({"done": "x"}, "done='x' is not a non-negative"), ({"done": -1}, "done=-1 is negative")):
                with pytest.raises(OptionError, match=f"^CodedOptimizer.load_state_dict: {line}"):
                    coded.load_state_dict(state | change)
            with pytest.raises(OptionError, match="the state has no 'code'; load all that"):
                coded.load_state_dict({name: value for name, value in state.items() if name != "code"})
            coded.load_state_dict(state)
        for step in coded.steps(1):
            ordinary(coded, net, step)
        return coded.done

    assert virtual.results(2, program)[0] == 1


@pytest.mark.parametrize(("optimizer", "line"), [
    (lambda net: torch.optim.SparseAdam(net.parameters()), "SparseAdam takes sparse gradients"),
    (lambda net: torch.optim.SGD(net.parameters(), lr=0.1, differentiable=True), "differentiable=True")])
def test_optimizers_that_cannot_step_here_are_refused_at_once(optimizer, line):
    def program(comm):
        with pytest.raises(OptionError, match=line):
            CodedOptimizer(optimizer(Net()), comm, FR(0))

    virtual.results(2, program)


def test_too_many_silent_workers_are_named_and_the_state_is_that_of_the_last_step():
    """It may be saved then, and another call of step() waits on."""
    def program(comm):
        net = copy.deepcopy(shared)
        coded = CodedOptimizer(sgd(net), comm, FR(1), model=net, patience_seconds=0.3)
        errors = []
        for step in coded.steps(4):
            if step == 2 and comm.Get_rank() in (1, 3):
                comm.pause(0.7)
            compute(coded, net, step)
            while True:
                try:
                    coded.step()
                    break
                except SilenceError as error:
                    errors.append((str(error), coded.done, coded.state_dict()["done"]))
        return errors, coded.missing, state_of(net)

    shared = Net()
    (errors, missing, state), *others = virtual.results(4, program)
    assert missing == ()
    assert errors[0][0].startswith("CodedGradients: rank 1 on node 1, rank 3 on node 3 silent for 0.3 s, at step 2; ")
    assert errors[0][1:] == (2, 2)
    assert all(same(state, its) for _, _, its in others)


def test_a_worker_that_leaves_its_loop_holds_up_nobody():
    def program(comm):
        net = copy.deepcopy(shared)
        coded = CodedOptimizer(sgd(net), comm, FR(1), model=net, patience_seconds=0.3)
        for step in coded.steps(4):
            if step == 2 and comm.Get_rank() == 3:
                return None
            compute(coded, net, step)
            coded.step()
        return coded.done

    shared = Net()
    assert virtual.results(4, program) == [4, 3, 3, None]
