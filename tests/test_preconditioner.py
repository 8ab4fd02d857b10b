"""Inverses that are learned from vectors, and the vectors that layers see: what they are, to rounding."""

import copy
import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import virtual
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training import seeded

from mpi_ef.compress import Quantize
from mpi_ef.errors import DisagreementError, MpiEfError, OptionError, PeerError
from mpi_ef.precondition import Preconditioner
from mpi_ef.precondition.fallback import Fallback
from mpi_ef.precondition.forms import FORMS, Blended, Covariance, Mean, ShermanMorrison, Window
from mpi_ef.testing.law import same_bits

ONE = virtual.VirtualComm  # of one rank, built by `alone`


def side(kind, layers=1, d=6, dtype=torch.float64, **options):
    given = SimpleNamespace(**{"gamma": 0.95, "window": 5, "damping": 0.03, "stabilizer": (2.0, 0.9)} | options)
    memory = torch.zeros(layers * kind.floats(d, given.window), dtype=dtype)
    return kind(layers, d, given, memory, np.zeros(layers * kind.scalars(given.window)))


def inverse(one, layer=0):
    """The matrix P of a layer, by what it makes of the identity."""
    x = torch.eye(one.d, dtype=one._memory.dtype).repeat(len(one.updates), 1, 1)
    return one.right(x.clone(), torch.empty_like(x))[layer]


def vectors(count, d=6, seed=0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, d)) * scale)


def learn(one, v):
    one.update(range(len(one.updates)), v if v.dim() > 1 else v[None])


# ---- the forms


def test_exact_is_the_inverse_of_the_mean_with_the_new_vector():
    m, before = side(ShermanMorrison, stabilizer=(1e9, 1.0)), torch.eye(6, dtype=torch.float64)
    for v in vectors(200):
        learn(m, v)
        before = 0.95 * before + 0.05 * torch.outer(v, v)
        torch.testing.assert_close(inverse(m) @ before, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_blended_is_the_inverse_of_what_its_package_means():
    m, one = side(Blended), torch.eye(6, dtype=torch.float64)
    for v in vectors(200):
        p = 0.95 * inverse(m) + 0.05 * one
        learn(m, v)
        torch.testing.assert_close(inverse(m) @ (torch.linalg.inv(p) + torch.outer(v, v)), one, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("m", "d"), [(5, 6), (1, 6), (8, 3), (16, 40)])
def test_window_is_the_inverse_of_the_weighted_second_moment(m, d):
    one, given = side(Window, d=d, window=m), vectors(3 * m, d)
    torch.testing.assert_close(inverse(one), torch.eye(d, dtype=torch.float64), rtol=0, atol=0)
    for count in range(1, 3 * m + 1):
        learn(one, given[count - 1])
        last = given[max(0, count - m):count].flip(0)
        w = 0.95 ** torch.arange(len(last), dtype=torch.float64)
        w /= w.sum()
        moment = (w[:, None] * last).T @ last
        damping = 0.03 * moment.trace()
        wanted = damping * torch.linalg.inv(damping * torch.eye(d, dtype=torch.float64) + moment)
        torch.testing.assert_close(inverse(one), wanted, rtol=0, atol=1e-12)
        left = one.left(torch.eye(d, dtype=torch.float64)[None].clone(), None)[0]
        torch.testing.assert_close(left, wanted, rtol=0, atol=1e-12)
        values = torch.linalg.eigvalsh(inverse(one))
        assert values.min() >= 0.03 / 1.03 - 1e-9
        assert values.max() <= 1 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 2.0**7, 1e6, 1e30])
def test_window_does_not_change_with_the_scale(scale, dtype):
    one, other = side(Window, d=9, dtype=dtype), side(Window, d=9, dtype=dtype)
    for v in vectors(12, 9).to(dtype):
        learn(one, v)
        learn(other, v * scale)
    assert inverse(other).isfinite().all()
    if scale == 2.0**7:
        assert same_bits([inverse(one).numpy()], [inverse(other).numpy()])
    torch.testing.assert_close(inverse(other), inverse(one), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [ShermanMorrison, Blended, Mean])
@pytest.mark.parametrize("d", [1, 8, 40])
def test_no_vector_is_too_long(kind, d, dtype):
    """Along a long vector next to nothing is left, in float32 less than rounding: not nothing, nor less."""
    for scale in (1e-30, 1.0, 1e3, 1e4, 1e8, 1e18, 1e30):
        for alike in (True, False):
            one, given = side(kind, d=d, dtype=dtype), vectors(15, d)
            for v in given:
                learn(one, ((given[0] if alike else v) * scale).to(dtype))
                values = torch.linalg.eigvalsh(inverse(one).double())
                assert values.isfinite().all()
                assert values.min() > 0


@pytest.mark.parametrize("kind", [Window, Covariance])
def test_the_least_damping_is_enough(kind):
    one, v = side(kind, d=8, dtype=torch.float32, damping=1e-6), vectors(1, 8)[0].float()
    for _ in range(8):
        learn(one, torch.outer(v, v)[None] if kind is Covariance else v)
    assert torch.linalg.eigvalsh(inverse(one).double()).min() > 0


def test_window_of_zeros_is_the_identity():
    one = side(Window, layers=2)
    learn(one, torch.stack([torch.zeros(6, dtype=torch.float64), vectors(1)[0]]))
    torch.testing.assert_close(inverse(one, 0), torch.eye(6, dtype=torch.float64), rtol=0, atol=0)
    assert not torch.equal(inverse(one, 1), torch.eye(6, dtype=torch.float64))


def test_blended_stays_between_zero_and_the_identity():
    m, rng = side(Blended, d=8), np.random.default_rng(1)
    for v in vectors(1000, 8):
        learn(m, v * 10 ** rng.uniform(-3, 3))
        values = torch.linalg.eigvalsh(inverse(m))
        assert values.min() > 0
        assert values.max() <= 1 + 1e-12


@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0])
def test_exact_with_its_stabilizer_stays_near_float64(norm):
    one, other = side(ShermanMorrison, d=8, dtype=torch.float32), side(ShermanMorrison, d=8)
    for v in vectors(5000, 8, scale=norm / 8**0.5).float():
        learn(one, v)
        learn(other, v.double())
    m = inverse(one)
    assert torch.equal(m, m.T)
    assert torch.linalg.eigvalsh(m.double()).min() > 0
    assert (m.double() - inverse(other)).abs().max() <= 5e-5 * inverse(other).abs().max()


def test_exact_without_its_stabilizer_ends():
    m, v = side(ShermanMorrison, d=4, dtype=torch.float32, stabilizer=(1e300, 1.0)), torch.zeros(4)
    v[0] = 1.0
    for _ in range(1800):
        learn(m, v)
    assert not inverse(m).isfinite().all()


def test_the_printed_formula_is_no_inverse():
    """Algorithm 1, lines 7 and 8, as printed: whoever corrects the sign of `ShermanMorrison` by it is told here."""
    v, one = vectors(1)[0], torch.eye(6, dtype=torch.float64)
    printed = 0.95 * one + 0.05 / (0.95**2 * (1 + 0.95 * 0.05 * v @ v)) * torch.outer(v, v)
    moment = 0.95 * one + 0.05 * torch.outer(v, v)
    assert (printed @ moment - one).norm() > 0.1
    m = side(ShermanMorrison)
    learn(m, v)
    assert (inverse(m) @ moment - one).norm() < 1e-12


def test_eva_is_the_damped_inverse_of_the_outer_product_of_means():
    inputs, outputs, mean = side(Mean, d=4), side(Mean, d=3), [None, None]
    for step in range(5):
        for number, (one, v) in enumerate(zip((inputs, outputs), (vectors(5, 4), vectors(5, 3, 1)), strict=True)):
            learn(one, v[step])
            mean[number] = v[0] if not step else 0.95 * mean[number] + 0.05 * v[step]
    x = vectors(3, 4, 2)
    d = torch.outer(*reversed(mean)).flatten()
    wanted = 0.03 * torch.linalg.solve(torch.outer(d, d) + 0.03 * torch.eye(12, dtype=torch.float64), x.flatten())
    torch.testing.assert_close(Mean.both(outputs, inputs, x[None].clone())[0].flatten(), wanted, rtol=1e-12, atol=1e-14)


def test_kfac_is_the_damped_inverse_of_the_running_moment():
    one, mean = side(Covariance), None
    for step in range(4):
        rows = vectors(9, 6, step)
        moment = rows.T @ rows / 9
        mean = moment if mean is None else 0.95 * mean + 0.05 * moment
        one.update([0], moment[None])
    damping = 0.03 * mean.trace()
    wanted = damping * torch.linalg.inv(damping * torch.eye(6, dtype=torch.float64) + mean)
    torch.testing.assert_close(inverse(one), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FORMS.values(), ids=FORMS)
def test_layers_of_a_batch_do_not_touch_each_other(kind):
    """Each learns what it would by itself, also where some of them saw nothing; twice the same bits."""
    def seen(number, step):
        v = vectors(1, 6, 10 * number + step)[0]
        return torch.outer(v, v) if kind is Covariance else v

    together, again, apart = side(kind, layers=3), side(kind, layers=3), [side(kind) for _ in range(3)]
    for step in range(7):
        which = [number for number in range(3) if (step + number) % 3]
        for one in (together, again):
            one.update(which, torch.stack([seen(number, step) for number in which]))
        for number in which:
            apart[number].update([0], seen(number, step)[None])
    for number, one in enumerate(apart):
        torch.testing.assert_close(inverse(together, number), inverse(one), rtol=1e-12, atol=1e-13)
    assert same_bits([together._memory.numpy()], [again._memory.numpy()])
    assert same_bits([inverse(together).numpy()], [inverse(again).numpy()])


# ---- what layers see


def alone(program):
    return virtual.results(1, program)[0]


def watching(model, comm, **options):
    return Preconditioner(model, comm, **{"every": 1} | options)


def seen_by(model, run, number=0, **options):
    """What the first layer has seen of what `run` does, as it is sent: a, g and whether it has seen anything."""
    def program(comm):
        watcher = watching(model, comm, **options)
        run()
        watcher.close()
        (a, g, word) = watcher._sums.told(watcher._sums.vector)[number]
        return a.clone(), g.clone(), word

    return alone(program)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def backward(model, *inputs, share=1.0):
    y = model(*inputs)
    (share * (y * normal(*y.shape, seed=5)).sum() / y.shape[0]).backward()


@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 5), (2, 3, 2, 5), (5,)])
def test_a_linear_layer_sees_the_mean_of_its_inputs_and_the_gradient_of_its_bias(shape):
    layer, x = nn.Linear(5, 3), normal(*shape)
    a, g, word = seen_by(layer, lambda: backward(layer, x))
    torch.testing.assert_close(a[:-1], x.reshape(-1, 5).mean(0), rtol=1e-6, atol=1e-7)
    assert a[-1] == word == 1
    torch.testing.assert_close(g, layer.bias.grad, rtol=1e-6, atol=1e-7)


CONVOLUTIONS = [
    {}, {"stride": 2}, {"dilation": 2}, {"padding": 1}, {"padding": 2, "stride": 3}, {"padding": "same", "dilation": 2},
    {"padding": "valid"}, {"padding": 1, "padding_mode": "circular"}, {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "replicate"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("kind", "kernel", "shape"), [
    (nn.Conv1d, 4, (2, 3, 11)), (nn.Conv2d, (3, 2), (2, 3, 8, 9)), (nn.Conv3d, (2, 3, 1), (2, 3, 6, 7, 5)),
    (nn.Conv2d, 3, (3, 8, 9))], ids=["1d", "2d", "3d", "without a batch"])
def test_a_convolution_sees_the_mean_patch(kind, kernel, shape, options):
    """For one sample and position the gradient is g a^T; so the mean patch, times the weight, is the mean output."""
    layer, x = kind(3, 4, kernel, **options), normal(*shape)
    a, g, _ = seen_by(layer, lambda: backward(layer, x))
    with torch.no_grad():
        y = layer(x)
        mean = y.movedim(-len(layer.kernel_size) - 1, 0).reshape(4, -1).mean(1)
    torch.testing.assert_close(torch.cat([layer.weight.reshape(4, -1), layer.bias[:, None]], 1) @ a, mean, rtol=1e-5,
                               atol=1e-6)
    torch.testing.assert_close(g, layer.bias.grad, rtol=1e-5, atol=1e-5)


def test_the_mean_patch_is_that_of_unfold():
    layer, x = nn.Conv2d(3, 4, 3, padding=1, stride=2), normal(2, 3, 8, 9)
    a, _, _ = seen_by(layer, lambda: backward(layer, x))
    torch.testing.assert_close(a[:-1], F.unfold(x, 3, padding=1, stride=2).mean((0, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), nn.Linear(1, 1), nn.Conv2d(5, 3, 1)],
                         ids=str)
def test_of_one_sample_the_gradient_is_the_product(layer):
    x = normal(1, layer.weight.shape[1], *[1] * (layer.weight.dim() - 2))
    a, g, _ = seen_by(layer, lambda: backward(layer, x))
    whole = [layer.weight.grad.flatten(1)] + ([] if layer.bias is None else [layer.bias.grad[:, None]])
    torch.testing.assert_close(torch.outer(g, a), torch.cat(whole, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Conv2d(5, 3, 2, padding=1)], ids=str)
def test_kfac_sees_second_moments(layer):
    x = normal(4, 5, *[3] * (layer.weight.dim() - 2))
    rows = x if isinstance(layer, nn.Linear) else F.unfold(x, 2, padding=1).mT.reshape(-1, 20)
    a, g, _ = seen_by(layer, lambda: backward(layer, x), form="kfac")
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    torch.testing.assert_close(a, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    y = layer(x)
    of = (normal(*y.shape, seed=5) / y.shape[0]).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(g, len(of) * of.T @ of, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_are_the_batch():
    layer, x = nn.Linear(5, 3), normal(12, 5)
    weights = normal(12, 3, seed=5)

    def whole():
        ((layer(x) * weights).sum() / 12).backward()

    def parts():
        for start, stop in ((0, 4), (4, 9), (9, 12)):
            ((layer(x[start:stop]) * weights[start:stop]).sum() / 12).backward()

    def calls():
        (sum((layer(x[n::3]) * weights[n::3]).sum() for n in range(3)) / 12).backward()

    expected = seen_by(layer, whole)
    for one in (parts, calls):
        for mine, theirs in zip(seen_by(layer, one)[:2], expected[:2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def stack():
    return seeded(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_counts_once(reentrant):
    model, x = stack(), normal(6, 5).requires_grad_()
    expected = [seen_by(model, lambda: backward(model, x), number) for number in range(2)]
    again = lambda: backward(lambda x: checkpoint(model, x, use_reentrant=reentrant), x)  # noqa: E731
    for number, (a, g, word) in enumerate(expected):
        mine = seen_by(model, again, number)
        torch.testing.assert_close(mine[0], a)
        torch.testing.assert_close(mine[1], g)
        assert mine[2] == word == 1


def test_a_module_in_a_checkpoint_and_around_it_counts_everywhere():
    """Backward passes inside one another: what the outer one has brought is not of a gradient that was thrown away."""
    layer, x = seeded(nn.Linear(5, 5)), normal(6, 5).requires_grad_()

    def run():
        backward(lambda x: layer(torch.tanh(checkpoint(layer, layer(x), use_reentrant=True))), x)

    _, g, _ = seen_by(layer, run)
    torch.testing.assert_close(g, layer.bias.grad, rtol=1e-5, atol=1e-6)


def test_activations_in_place_change_nothing():
    model, x = stack(), normal(6, 5)
    expected = seen_by(model, lambda: backward(model, x))
    model[1].inplace = True
    assert same_bits([t.numpy() for t in seen_by(model, lambda: backward(model, x))[:2]],
                     [t.numpy() for t in expected[:2]])


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 3, 5)])
def test_outputs_that_are_views_may_be_changed_in_place(shape):
    """As that of a linear layer of more than two dimensions, whose own hooks autograd drops then."""
    model, x = seeded(nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))), normal(*shape)
    _, g, word = seen_by(model, lambda: backward(model, x))
    assert word == 1
    torch.testing.assert_close(g, model[0].bias.grad, rtol=1e-5, atol=1e-6)


def thrown_away(model, x, *, by):
    """Backward passes whose gradients are not those that a step sees."""
    y = 3 * model(2 * x)
    if by == "penalty":
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        y = y + slope.square().mean()  # nothing for biases of the last layer
        y.sum().backward()
    elif by == "grad of something else":
        torch.autograd.grad(y.sum(), x)
    elif by == "frozen":
        model.requires_grad_(False)
        model(x).sum().backward()
        model.requires_grad_(True)
    elif by == "other weights":
        other = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        torch.func.functional_call(model, other, (x,)).sum().backward()
    elif by == "zero_grad":
        y.sum().backward()
        model.zero_grad()
    elif by == "trace":
        torch.jit.trace(model, x.detach())
    else:
        assert by == "transforms"
        torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("by", ["penalty", "grad of something else", "frozen", "other weights", "zero_grad", "trace",
                                "transforms"])
def test_gradients_that_no_step_sees_count_for_nothing(by):
    """g is the gradient of the bias, whatever else goes through the layer."""
    model, x = seeded(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), normal(6, 5).requires_grad_()

    def run():
        thrown_away(model, x, by=by)
        backward(model, x)

    for number in range(2):
        model.zero_grad()
        _, g, word = seen_by(model, run, number)
        assert word == 1
        torch.testing.assert_close(g, model[2 * number].bias.grad, rtol=1e-5, atol=1e-6)


def test_gradients_that_autograd_returns_count():
    model, x = stack(), normal(6, 5)

    def returned():
        for _ in range(2):
            torch.autograd.grad((model(x) * normal(6, 3, seed=5)).sum() / 12, list(model.parameters()))

    for mine, theirs in zip(seen_by(model, returned)[:2], seen_by(model, lambda: backward(model, x))[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_hooks_of_the_program_come_after():
    model, x = nn.Linear(5, 3), normal(6, 5)
    model.register_forward_hook(lambda module, args, output: 10 * output)
    _, g, _ = seen_by(model, lambda: backward(model, x))
    torch.testing.assert_close(g, model.bias.grad, rtol=1e-5, atol=1e-6)


def ragged(layer):
    parts = torch.nested.nested_tensor([normal(2, 5), normal(3, 5)], requires_grad=True)
    torch.nested.to_padded_tensor(layer(parts), 0.0).sum().backward()


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(torch.cat([x, x], -1), self.weight, self.bias)


class Flat(nn.Linear):
    def forward(self, x):
        return super().forward(x).reshape(-1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("layer", "run"), [
    (nn.Linear(5, 3), ragged), (nn.Linear(5, 3), lambda layer: layer(normal(4, 5).to_sparse()).sum().backward()),
    (Twice(10, 3), lambda layer: layer(normal(4, 5)).sum().backward()),
    (Flat(5, 3), lambda layer: layer(normal(4, 5)).sum().backward())], ids=["nested", "sparse", "inputs", "outputs"])
def test_calls_of_another_kind_are_not_seen(layer, run):
    """The program goes on: it is told that the layer is never seen."""
    assert seen_by(layer, lambda: run(layer))[2] == 0


def test_what_is_not_learned_from_counts_for_nothing():
    model, x = stack(), normal(6, 5)

    def others():
        with torch.no_grad():
            model(2 * x)
        with torch.inference_mode():
            model(3 * x)
        model(4 * x).sum()  # a loss that is thrown away
        copy.deepcopy(model)(5 * x).sum().backward()
        torch.func.functional_call(model, dict(model.named_parameters()), (6 * x,))
        backward(model, x)

    expected = seen_by(model, lambda: backward(model, x))
    assert same_bits([t.numpy() for t in seen_by(model, others)[:2]], [t.numpy() for t in expected[:2]])


def test_an_empty_batch_is_not_seen():
    layer = nn.Linear(5, 3)
    _, _, word = seen_by(layer, lambda: layer(torch.zeros(0, 5)).sum().backward())
    assert word == 0


def test_steps_that_are_not_due_look_at_nothing():
    def program(comm):
        model = stack()
        watcher = watching(model, comm, every=3)
        for _ in range(7):
            backward(model, normal(6, 5))
            assert bool(watcher._sums.vector.any()) == watcher.due
            watcher.step()
        assert watcher.updates == 4  # in steps 0, 1, 3, 6

    alone(program)


def test_autocast_is_near():
    layer, x = nn.Linear(16, 8), normal(32, 16)

    def rough():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        ((y.float() * normal(*y.shape, seed=5)).sum() / y.shape[0]).backward()

    for mine, theirs in zip(seen_by(layer, rough)[:2], seen_by(layer, lambda: backward(layer, x))[:2], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_gradients_that_were_multiplied_count_so():
    """`scale` is what GradScaler's unscale_ has done: a power of two changes no bit of what is learned."""
    def program(comm):
        models = stack(), stack()
        watchers = [watching(model, comm) for model in models]
        for model, watcher, scale in zip(models, watchers, (1.0, 1024.0), strict=True):
            backward(model, normal(6, 5), share=scale)
            for p in model.parameters():
                p.grad /= scale
            watcher.step(scale=1 / scale)
        assert same_bits(*(watcher.replicated() for watcher in watchers))
        assert same_bits(*([p.grad.numpy() for p in model.parameters()] for model in models))

    alone(program)


# ---- which layers


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(7, 4)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.second.weight = self.first.weight
        self.head.weight = self.word.weight
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.part = nn.Linear(4, 4)
        self.part.bias.requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, words):
        x = self.word(words)
        x = self.second(self.first(x)) + self.frozen(self.part(x)) + self.normed(x)
        x = x + self.attention(x, x, x)[0] + self.grouped(x.mT).mT
        return self.head(x)


def test_layers_say_what_is_done_with_them():
    def program(comm):
        model = seeded(Odd())
        watcher = Preconditioner(model, comm)
        backward(model, torch.arange(6).reshape(2, 3))
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        watcher.step()
        changed = {name for name, grad in before.items() if not torch.equal(model.get_parameter(name).grad, grad)}
        assert changed == {"first.weight", "part.weight"}
        return {row.name: (row.shape, row.part) for row in watcher.layers}

    with pytest.warns(RuntimeWarning, match=r"attention.out_proj: not called as a module") as caught:
        (rows, _) = virtual.results(2, program)
    assert len(caught) == 1  # of rank 0
    assert rows == {
        "first": ((4, 4), "both"), "part": ((4, 4), "both"), "attention.out_proj": ((4, 5), "never seen"),
        "head": ((7, 4), "tied to word.weight"), "grouped": ((4, 2, 1), "grouped convolution"),
        "frozen": ((4, 4), "not trained"), "normed": ((4, 4), "parametrised: its weight is made of other parameters"),
    }


def test_layers_can_be_left_out():
    def program(comm):
        model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
        parts = [row.part for row in watching(model, comm, exclude=["1.0", model[0]]).layers]
        assert sorted(parts) == ["both", "both", "excluded", "excluded"]
        assert [row.name for row in watching(model, comm, exclude=model[1]).layers if row.part == "both"] == ["0", "2"]

    alone(program)


def test_models_can_be_copied_and_saved_and_outlive_it():
    def program(comm):
        model, x = stack(), normal(6, 5)
        watcher = watching(model, comm)
        torch.save(model, io.BytesIO())
        other = watching(model, comm)
        backward(model, x)
        assert not watcher._sums.vector.any()
        assert other._sums.vector.any()
        watcher.remove_hooks()
        other.remove_hooks()
        del watcher, other
        backward(model, x)

    alone(program)


# ---- between backward() and the step of any optimizer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sides", ["both", "inputs", "outputs"])
def test_gradients_keep_their_norm(form, sides):
    def program(comm):
        model = stack()
        watcher, bare = watching(model, comm, form=form, sides=sides), 0
        for step in range(4):
            model.zero_grad()
            backward(model, normal(6, 5, seed=step))
            before = [torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).double() for layer in (model[0], model[2])]
            watcher.step()
            after = [torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).double() for layer in (model[0], model[2])]
            for g, d in zip(before, after, strict=True):
                torch.testing.assert_close(d.norm(), g.norm(), rtol=1e-6, atol=0)
                assert (d * g).sum() > 0  # a positive definite matrix
                bare += not torch.equal(d, g)
        assert bare == 8

    alone(program)


@pytest.mark.parametrize("form", ["window", "blended", "eva", "kfac"])
def test_without_rescaling_gradients_do_not_grow(form):
    def program(comm):
        model = stack()
        watcher = watching(model, comm, form=form, rescale=False)
        for step in range(6):
            model.zero_grad()
            backward(model, normal(6, 5, seed=step))
            before = model[0].weight.grad.norm() ** 2 + model[0].bias.grad.norm() ** 2
            watcher.step()
            assert model[0].weight.grad.norm() ** 2 + model[0].bias.grad.norm() ** 2 <= before * (1 + 1e-6)

    alone(program)


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_equal_shape_are_one_product(form):
    """As many operations for sixteen as for two."""
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += not str(function).startswith(("aten.detach", "aten.view"))
            return function(*args, **(kwargs or {}))

    def program(comm):
        counts = []
        for layers in (2, 16):
            model = seeded(nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))))
            watcher, Count.calls = watching(model, comm, form=form), 0
            backward(model, normal(6, 4))
            watcher.step()
            with Count():
                watcher.precondition()
            counts.append(Count.calls)
        assert counts[0] == counts[1] > 0

    alone(program)


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_without_gradient_is_none(form):
    """Not what it was in the step before."""
    def program(comm):
        models = stack(), stack()
        watchers = [watching(model, comm, form=form) for model in models]
        for step in range(3):
            for model, watcher in zip(models, watchers, strict=True):
                model.zero_grad()
                backward(model, normal(6, 5, seed=step))
                if step == 2:
                    watcher.groups[0]._x.fill_(0 if model is models[0] else 7)
                    model[0].bias.grad = None
                watcher.step()
        torch.testing.assert_close(models[0][0].weight.grad, models[1][0].weight.grad, rtol=0, atol=0)

    alone(program)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [1e-36, 1e-30, 1e30])
def test_gradients_of_any_size_stay_numbers(form, share):
    def program(comm):
        model = seeded(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)))
        watcher = watching(model, comm, form=form)
        for step in range(3):
            model.zero_grad()
            backward(model, normal(6, 5, seed=step), share=share)
            before = model[1].weight.grad.double().norm() ** 2 + model[1].bias.grad.double().norm() ** 2
            watcher.step()
            after = model[1].weight.grad.double().norm() ** 2 + model[1].bias.grad.double().norm() ** 2
            assert all(p.grad.isfinite().all() for p in model.parameters())
            torch.testing.assert_close(after, before, rtol=1e-5, atol=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # second moments of the largest are none
        alone(program)


def test_a_gradient_that_is_not_finite_leaves_what_was_learned():
    """As where GradScaler finds Inf, which all forms but this one do not look at."""
    def program(comm):
        model = stack()
        watcher = watching(model, comm, form="exact", every=5)
        for step in range(3):
            model.zero_grad()
            backward(model, normal(6, 5, seed=step))
            if step == 2:
                for p in model.parameters():
                    p.grad.fill_(float("inf"))
            before = {name: array.copy() for name, array in watcher.replicated().items()}
            watcher.step()
        assert watcher.restarts == 0
        assert same_bits(watcher.replicated(), before)
        model.zero_grad()
        backward(model, normal(6, 5))
        watcher.replicated()["preconditioner.factors"][:] = np.inf
        kept = [p.grad.clone() for p in model.parameters()]
        watcher.step()
        assert watcher.restarts == 2  # all layers, which keep their gradients
        assert same_bits([p.grad.numpy() for p in model.parameters()], [g.numpy() for g in kept])

    alone(program)


def test_zero_stays_zero():
    def program(comm):
        model = stack()
        watcher = watching(model, comm)
        for share in (1.0, 0.0):
            model.zero_grad()
            backward(model, normal(6, 5), share=share)
            watcher.step()
        assert not any(p.grad.any() for p in model.parameters())

    alone(program)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_learn_what_one_would_of_all(n, form):
    """The mean of what they see, and the mean gradient: as one process, in float64."""
    def program(comm):
        model, rank = stack().double(), comm.Get_rank()
        watcher = watching(model, comm, form=form, every=2)
        for step in range(6):
            model.zero_grad()
            for r in range(n) if comm.Get_size() == 1 else [rank]:
                x = normal(6, 5, seed=10 * step + r).double()
                backward(model, x, share=1 / n if comm.Get_size() == 1 else 1.0)
            if comm.Get_size() > 1:
                for p in model.parameters():
                    p.grad[...] = torch.from_numpy(np.mean(comm.allgather(p.grad.numpy()), axis=0))
            watcher.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
        return [p.detach().numpy() for p in model.parameters()], watcher.replicated(), watcher.sent_nbytes

    runs, (one,) = virtual.results(n, program), virtual.results(1, program)
    for parameters, replicated, _ in runs:
        assert same_bits(replicated, runs[0][1])
        for mine, theirs in zip(parameters, one[0], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert one[2] == 0


def test_layers_that_one_rank_alone_uses():
    """All learn what that one has seen, and divide by it alone."""
    def program(comm):
        model, rank = nn.ModuleList([nn.Linear(5, 3), nn.Linear(4, 3)]), comm.Get_rank()
        for layer in model:
            seeded(layer)
        watcher, saw = watching(model, comm), None
        y = model[0](normal(6, 5, seed=rank)).sum()
        if rank == 1:
            y = y + (model[1](normal(6, 4, seed=7)) * normal(6, 3)).sum()
            saw = normal(6, 4, seed=7).mean(0)
        y.backward()
        watcher.step()
        group = watcher.groups[1]
        return saw, group.inputs._rows[0, 0].clone(), group.inputs._lengths[0, 0], model[1].weight.grad

    runs = virtual.results(3, program)
    saw = torch.cat([runs[1][0], torch.ones(1)])
    for _, direction, length, gradient in runs:
        torch.testing.assert_close(direction * length, saw.double().float(), rtol=1e-5, atol=1e-6, check_dtype=False)
        assert (gradient is None) == (gradient is not runs[1][3])


def test_states_come_back_on_any_number_of_ranks():
    def program(comm, state=None, *, more=3):
        model = stack()
        watcher = watching(model, comm, every=2, fallback=0.01)
        if state is not None:
            watcher.load_state_dict(state[0])
            model.load_state_dict(state[1])
        steps = range(watcher.steps, watcher.steps + more)
        for step in steps:
            model.zero_grad()
            backward(model, normal(6, 5, seed=step))  # the same on all ranks
            watcher.note_loss(1.0 / (1 + step))
            watcher.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
        return watcher.state_dict(), copy.deepcopy(model.state_dict())

    for first in (3, 4):
        whole = virtual.results(2, lambda comm: program(comm, more=8))[0]
        state = virtual.results(2, lambda comm: program(comm, more=first))[0]  # noqa: B023
        for n in (2, 4):
            run = virtual.results(n, lambda comm: program(comm, state, more=8 - first))[0]  # noqa: B023
            assert same_bits(run[0]["arrays"], whole[0]["arrays"])
            assert same_bits([p.numpy() for p in run[1].values()], [p.numpy() for p in whole[1].values()])
            assert run[0]["fallback"] == whole[0]["fallback"]


def test_layers_say_what_was_loaded_and_what_others_saw():
    def program(comm):
        model, rank = nn.ModuleList([seeded(nn.Linear(5, 3)), seeded(nn.Linear(4, 3))]), comm.Get_rank()
        watcher = watching(model, comm)
        for step in range(2):
            y = model[0](normal(6, 5)).sum()
            if step and rank:
                y = y + model[1](normal(6, 4)).sum()
            y.backward()
            watcher.step()
            assert [row.part for row in watcher.layers] == ["both", "both" if step else "never seen"]
        other = watching(model, comm)
        other.load_state_dict(watcher.state_dict())
        assert [row.part for row in other.layers] == ["both", "both"]

    with pytest.warns(RuntimeWarning, match="1: not called as a module"):
        virtual.results(2, program)


def test_a_state_from_before_the_fallback_learns_again():
    def program(comm):
        model, state = stack(), None
        watcher = watching(model, comm, fallback=0.99, fallback_every=1)

        def step(loss):
            model.zero_grad()
            backward(model, normal(6, 5, seed=watcher.steps))
            watcher.note_loss(loss)
            watcher.step()

        while watcher.fallen_back_at is None:
            step(1 / (1 + min(watcher.steps, 2)))
            state = state or watcher.state_dict()
            assert watcher.steps < 30
        for removed in (False, True):
            if removed:
                watcher.remove_hooks()
            watcher.load_state_dict(state)
            watcher.load_state_dict(state)
            before = watcher.replicated()["preconditioner.factors"].copy()
            step(1.0)
            assert same_bits([watcher.replicated()["preconditioner.factors"]], [before]) == removed

    alone(program)


def test_losses_that_change_their_sign():
    """Rates of progress are of the larger of two losses, so that none near zero is the largest for ever."""
    seen = Fallback(0.1, 20)
    for number, loss in enumerate([1.0, 1e-9, -1.0, -1.5, -2.0, -2.5]):
        seen.hear(1000 * number, loss)
    assert seen.at is None


def test_losses_in_few_bits_do_not_stall():
    """Of slow progress: a loss that is rounded stays for many looks, and then goes down at once."""
    def program(comm):
        model = nn.Linear(2, 2)
        watchers = [watching(model, comm, every=10, fallback=0.1, statistics=given) for given in (None, Quantize("bf16"))]
        for step in range(400):
            for watcher in watchers:
                watcher.note_loss(2 + 1.5 * np.exp(-(step + 7 * comm.Get_rank()) / 20_000))
                watcher.step()
        assert [watcher.fallen_back_at for watcher in watchers] == [None, None]
        rates = [watcher._fallback._largest for watcher in watchers]
        assert rates[1] == pytest.approx(rates[0], rel=0.05)

    with pytest.warns(RuntimeWarning, match="not called as a module"):
        virtual.results(2, program)


def test_states_of_others_are_refused():
    def program(comm):
        state = watching(stack(), comm).state_dict()
        for options in ({"form": "exact"}, {"sides": "inputs"}, {"window": 3}, {"exclude": ["2"]}):
            other = watching(stack(), comm, **options)
            before = {name: array.copy() for name, array in other.replicated().items()}
            with pytest.raises(MpiEfError, match="load_state_dict") as caught:
                other.load_state_dict(state)
            assert "\n" not in str(caught.value)
            assert same_bits(other.replicated(), before)

    alone(program)


# ---- what is refused, in one line on all ranks


BAD = [
    ({"form": "printed"}, "form='printed' is unknown; take one of window, exact, blended, eva, kfac"),
    ({"form": ["window"]}, "is unknown"), ({"sides": "left"}, "sides='left' is unknown"),
    ({"every": 0}, "every=0 is not a positive integer"), ({"gamma": 1.0}, r"gamma=1.0 is not in \(0, 1\)"),
    ({"gamma": 0.0}, "gamma=0.0"), ({"window": 0}, "window=0"), ({"damping": 0.0}, "damping=0.0"),
    ({"damping": float("inf")}, "damping=inf"), ({"damping": float("nan")}, "damping=nan"),
    ({"rescale": 1}, "rescale=1 is neither True nor False"), ({"stabilizer": 2.0}, "stabilizer=2.0 is no pair"),
    ({"stabilizer": (0.0, 0.9)}, r"stabilizer\[0\]=0.0"), ({"stabilizer": (2.0, 1.5)}, r"stabilizer\[1\]=1.5"),
    ({"fallback": 1.0}, "fallback=1.0"), ({"fallback_every": 0}, "fallback_every=0"),
    ({"exclude": ["nothing*"]}, r"exclude has 'nothing\*', which is no linear or convolutional layer of the model"),
    ({"exclude": 3}, "exclude=3 is no sequence"), ({"exclude": [3]}, "exclude has 3"),
    ({"exclude": ["*"]}, "no linear or convolutional layer of the model is left: 0: excluded; 2: excluded"),
    ({"statistics": "bf16"}, "statistics='bf16' does not keep means"),
    ({"damping": 1e-7}, r"damping=1e-07 is not in \[1e-06, inf\)"),
    ({"form": "kfac", "statistics": Quantize("bf16"), "damping": 1e-3}, "not known better than 0.01 of their trace"),
    ({"statistics": Quantize("int8")}, "does not keep means of every size"),
    ({"statistics": Quantize("fp16")}, "does not keep means of every size"),
    ({"parameters": []}, "not trained by this optimizer"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options_are_told_on_all_ranks(options, words):
    def program(comm):
        mine = options if comm.Get_rank() == 1 else {}
        with pytest.raises(MpiEfError, match=words) as caught:
            Preconditioner(stack(), comm, **mine)
        assert "\n" not in str(caught.value)

    virtual.results(2, program)


def test_sparse_statistics_and_other_models_are_refused():
    from mpi_ef.compress import Sign, TopK

    def program(comm):
        for compressor in (TopK(0.1), Sign()):
            with pytest.raises(OptionError, match="does not keep means of every size; pass Quantize"):
                Preconditioner(stack(), comm, statistics=compressor)
        with pytest.raises(OptionError, match="is no torch module"):
            Preconditioner([nn.Linear(2, 2)], comm)
        with pytest.raises(DisagreementError, match="the layers"):
            Preconditioner(nn.Linear(2, 2 + comm.Get_rank()), comm)

    virtual.results(2, program)


def test_a_rank_without_a_loss_is_told_on_all():
    """None waits for it in the exchange, and the step can be repeated."""
    def program(comm):
        model, rank = stack(), comm.Get_rank()
        watcher = watching(model, comm, fallback=0.1)
        backward(model, normal(6, 5))
        if rank == 0:
            watcher.note_loss(1.0)
        with pytest.raises(OptionError if rank else PeerError, match="fallback wants the loss of every rank") as caught:
            watcher.step()
        assert "\n" not in str(caught.value)
        model.zero_grad()
        backward(model, normal(6, 5))
        watcher.note_loss(1.0)
        watcher.step()
        assert (watcher.updates, watcher.steps, watcher.skipped) == (1, 1, 0)

    virtual.results(2, program)


def test_models_whose_weights_have_no_shape_are_refused():
    def program(comm):
        with pytest.raises(OptionError, match=r"0\.weight has no shape yet; call the model once"):
            Preconditioner(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), comm)

    alone(program)


def test_numbers_that_are_not_finite_are_learned_by_nobody():
    def program(comm):
        model = stack()
        watcher, rank = watching(model, comm), comm.Get_rank()
        backward(model, normal(6, 5))
        watcher.step()
        before = {name: array.copy() for name, array in watcher.replicated().items()}
        model.zero_grad()
        x = normal(6, 5)
        x[2, 2] = float("nan") if rank == 1 else 0.0
        backward(model, x)
        watcher.step()
        assert same_bits(watcher.replicated(), before)
        assert (watcher.updates, watcher.skipped, watcher.steps) == (1, 1, 2)

    with pytest.warns(RuntimeWarning, match="nothing learned in step 1: NaN or Inf in what layers saw on rank 1"):
        virtual.results(2, program)
