"""Flat parameters and gradients: views in every situation that training scripts produce."""

import numpy as np
import pytest
import torch
from programs import loss_of, model

from mpi_ef.errors import DtypeError, OptionError, ShapeError
from mpi_ef.vectors import FlatParameters


def gradients_by_autograd():
    net = model()
    loss_of(net, 0, 0).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters() if p.requires_grad]


def flatten(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()


def test_values_are_views_and_gradients_are_collected():
    net = model()
    before = flatten(p for p in net.parameters() if p.requires_grad)
    flat = FlatParameters(net.parameters())
    assert flat.d == before.size == 7 * 5 + 5 + 25 + 5 + 15 + 3 + 3  # the tied weight once, the frozen one not
    np.testing.assert_array_equal(flat.values, before)
    loss_of(net, 0, 0).backward()
    flat.collect_gradients()
    np.testing.assert_array_equal(flat.gradients, flatten(gradients_by_autograd()))
    flat.values += 1
    np.testing.assert_array_equal(flatten(p for p in net.parameters() if p.requires_grad), before + 1)
    assert net.third.weight.data_ptr() == net.second.weight.data_ptr()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_survives_zero_grad_of_the_model(set_to_none):
    net = model()
    flat = FlatParameters(net.parameters())
    for _ in range(2):
        loss_of(net, 0, 0).backward()
        net.zero_grad(set_to_none=set_to_none)
    loss_of(net, 0, 0).backward()
    flat.collect_gradients()
    np.testing.assert_array_equal(flat.gradients, flatten(gradients_by_autograd()))


def test_a_parameter_without_gradient_counts_as_zero():
    net = model()
    flat = FlatParameters(net.parameters())
    flat.gradients.fill(3)
    net.zero_grad(set_to_none=True)
    loss_of(net, 0, 0).backward()
    assert net.unused.grad is None
    flat.collect_gradients()
    assert net.unused.grad is None
    assert [p is net.unused for p in flat.parameters] == (~flat.present).tolist()
    np.testing.assert_array_equal(flat.gradients, flatten(gradients_by_autograd()))


def test_a_parameter_frozen_later_counts_as_zero():
    net = model()
    flat = FlatParameters(net.parameters())
    net.last.requires_grad_(False)
    flat.zero_gradients()
    loss_of(net, 0, 0).backward()
    flat.collect_gradients()
    np.testing.assert_array_equal(flat.gradients[-18:], 0)


def test_gradients_that_exist_already_are_kept():
    net = model()
    loss_of(net, 0, 0).backward()
    flat = FlatParameters(net.parameters())
    np.testing.assert_array_equal(flat.gradients, flatten(gradients_by_autograd()))


def test_accumulation_adds_up():
    net = model()
    flat = FlatParameters(net.parameters())
    for step in range(2):
        loss_of(net, 0, step).backward()
    flat.collect_gradients()
    expected = np.zeros(flat.d, np.float32)
    for step in range(2):
        other = model()
        alone = FlatParameters(other.parameters())
        loss_of(other, 0, step).backward()
        alone.collect_gradients()
        expected += alone.gradients
    np.testing.assert_allclose(flat.gradients, expected, rtol=1e-5, atol=1e-7)


def test_float64_models():
    flat = FlatParameters(model().double().parameters())
    assert flat.values.dtype == flat.gradients.dtype == np.float64


def test_a_parameter_without_entries():
    flat = FlatParameters([torch.nn.Parameter(torch.ones(0)), torch.nn.Parameter(torch.ones(2))])
    flat.collect_gradients()
    assert flat.d == 2


def test_memory_that_was_replaced_is_noticed():
    net = model()
    flat = FlatParameters(net.parameters())
    net.double()
    with pytest.raises(ShapeError, match="its memory was replaced"):
        flat.adopt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_same_kind_is_taken_over(dtype):
    net = model().to(dtype)
    flat = FlatParameters(net.parameters())
    net.last.weight.data = torch.full((3, 5), 0.5, dtype=dtype)
    flat.adopt()
    assert (flat.values == 0.5).sum() == 15
    flat.values += 1
    flat.write_back()
    assert (net.last.weight == 1.5).all()


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(5, 2, sparse=True)
    flat = FlatParameters(table.parameters())
    table.zero_grad(set_to_none=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(DtypeError, match="its gradient is sparse"):
        flat.collect_gradients()


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ([], OptionError, "no parameter requires a gradient"),
        ([torch.nn.Parameter(torch.ones(2), requires_grad=False)], OptionError, "no parameter requires a gradient"),
        ([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], DtypeError, "torch.complex64 on cpu"),
        ([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).double())], DtypeError, "float64 on cpu"),
        ([torch.nn.Parameter(torch.ones(2, device="meta"))], DtypeError, "torch.float32 on meta"),
    ],
)
def test_wrong_parameters(parameters, error, words):
    with pytest.raises(error, match=words):
        FlatParameters(parameters)
