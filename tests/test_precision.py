"""16-bit parameters with float32 masters, GradScaler, clipping."""

import numpy as np
import pytest
import torch
import virtual
from programs import loss_of, model, same_bits
from training import parameters_of, seeded

from mpi_ef.compress import Identity, Quantize, Sign, TopK
from mpi_ef.errors import DtypeError, MpiEfError, OptionError
from mpi_ef.optim import EF21, DistributedOptimizer, OneBitAdam
from mpi_ef.vectors import FlatParameters

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def net_in(dtype):
    return torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)


def fresh(dtype):
    return seeded(net_in(torch.float32)).to(dtype)


def loss_with(net, dtype, rank, step):
    rng = np.random.default_rng((rank, step))
    x = torch.from_numpy(rng.normal(size=(32, 7)))
    y = x @ torch.from_numpy(np.random.default_rng(9).normal(size=(7, 3))) + 0.3 * rank
    return torch.nn.functional.mse_loss(net(x.to(dtype)).float(), y.float())


BUILDERS = {
    "adamw update": lambda net, comm: DistributedOptimizer(
        torch.optim.AdamW(net.parameters(), lr=1e-2), comm, TopK(0.1)
    ),
    "ef21": lambda net, comm: EF21(net.parameters(), comm, TopK(0.2, values=Quantize("bf16")), lr=0.05),
    "ef21 overlap": lambda net, comm: EF21(net.parameters(), comm, TopK(0.2), lr=0.05, overlap=True),
    "onebit adam": lambda net, comm: OneBitAdam(
        net.parameters(), comm, lr=1e-2, freeze_step=5, compressor=Sign(block=16)
    ),
}


@HALVES
@pytest.mark.parametrize("name", BUILDERS)
def test_state_is_float32_and_parameters_are_rounded_masters(dtype, name):
    def program(comm):
        net = fresh(dtype)
        optimizer = BUILDERS[name](net, comm)
        losses = []
        for step in range(40):
            optimizer.zero_grad()
            loss = loss_with(net, dtype, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            for number, p in enumerate(optimizer.flat.parameters):
                master = torch.from_numpy(optimizer.flat.values[optimizer.flat.place(number)]).view(p.shape)
                assert p.dtype == dtype
                assert master.dtype == torch.float32
                assert torch.equal(p, master.to(dtype))
        assert all(array.dtype == np.float32 for array in (optimizer.per_rank() | optimizer.replicated()).values())
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
        return optimizer.flat.values.copy()

    rows = virtual.results(2, program)
    assert rows[0].tobytes() == rows[1].tobytes()


def test_small_updates_add_up_in_the_masters():
    """In bfloat16 alone 1 - 0.001 is 1; a thousand such steps are not nothing."""

    def program(comm):
        p = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1e-3), comm, Identity(), placement="gradient")
        for _ in range(500):
            optimizer.zero_grad()
            (p.sum() * (0.5 + comm.Get_rank())).backward()
            optimizer.step()
        np.testing.assert_allclose(p.detach().float().numpy(), 0.5, atol=2e-3)

    virtual.results(2, program)


def test_gradients_accumulate_in_float32():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    flat = FlatParameters([p])
    for _ in range(1000):
        (p * torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)).sum().backward()
    flat.collect_gradients()
    np.testing.assert_array_equal(flat.gradients, [1000, 2000, 3000])
    assert p.grad[0] == 256  # where bfloat16 stops


def test_mixed_parameters_and_what_is_still_refused():
    flat = FlatParameters([torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.bfloat16)])
    assert flat.values.dtype == np.float32
    with pytest.raises(DtypeError, match="torch.float64 on cpu"):
        FlatParameters([torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float64, torch.bfloat16)])


@HALVES
def test_a_second_optimizer_takes_the_parameters_over(dtype):
    def program(comm):
        net = fresh(dtype)
        BUILDERS["ef21 overlap"](net, comm)  # its hooks must not take the gradients of the next one
        optimizer = BUILDERS["ef21"](net, comm)
        for step in range(2):
            loss_with(net, dtype, comm.Get_rank(), step).backward()
        optimizer.flat.collect_gradients()
        assert np.abs(optimizer.flat.gradients).sum() > 0
        assert not same_bits([optimizer.flat.gradients], [optimizer.flat.gradients.astype(np.float16)])
        optimizer.step()

    virtual.results(2, program)


@pytest.mark.parametrize("name", [name for name in BUILDERS if "overlap" not in name])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_overflow_on_one_rank_skips_on_all(name, unscale):
    """The same parameters as without a scaler, and nothing changes in the step in which rank 1 overflows."""

    def program(comm):
        rank, nets = comm.Get_rank(), [fresh(torch.float32), fresh(torch.float32)]
        scaled, plain = (BUILDERS[name](net, comm) for net in nets)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(12):
            scaled.zero_grad()
            loss = scaler.scale(loss_with(nets[0], torch.float32, rank, step))
            (loss * (float("inf") if step == 7 and rank == 1 else 1.0)).backward()
            before = parameters_of(nets[0]), {k: v.copy() for k, v in (scaled.per_rank() | scaled.replicated()).items()}
            if unscale:
                scaler.unscale_(scaled)
            scaler.step(scaled)
            scaler.update()
            if step == 7:
                assert same_bits((parameters_of(nets[0]), scaled.per_rank() | scaled.replicated()), before)
                assert scaled.skipped_steps == 1
                continue
            plain.zero_grad()
            loss_with(nets[1], torch.float32, rank, step).backward()
            plain.step()
        assert same_bits(*map(parameters_of, nets))  # scales are powers of two
        return scaler.get_scale()

    with pytest.warns(RuntimeWarning, match="skipped on all ranks: NaN or Inf in the gradient on rank 1"):
        assert virtual.results(2, program) == [2.0**10, 2.0**9]


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_with_overlap_is_refused_on_all_ranks(unscale):
    def program(comm):
        net = fresh(torch.float32)
        optimizer = BUILDERS["ef21 overlap"](net, comm)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_with(net, torch.float32, comm.Get_rank(), 0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)

    for outcome in virtual.run(2, program):
        assert isinstance(outcome, OptionError)
        assert "GradScaler with overlap=True" in str(outcome)


@HALVES
def test_clipping_knows_gradients_in_16_bits(dtype):
    def program(comm):
        net = fresh(dtype)
        optimizer = BUILDERS["ef21"](net, comm)
        (100 * loss_with(net, dtype, comm.Get_rank(), 0)).backward()
        optimizer.flat.collect_gradients()
        norm = float(np.linalg.norm(optimizer.flat.gradients))
        assert optimizer.clip_gradients(0.5) == pytest.approx(norm)
        assert norm > 1
        assert np.linalg.norm(optimizer.flat.gradients) == pytest.approx(0.5, rel=1e-5)
        assert optimizer.clip_gradients(0.75) == pytest.approx(0.5, rel=1e-5)
        with pytest.raises(MpiEfError, match=r"most=0 is not in \(0, inf\)"):
            optimizer.clip_gradients(0)

    virtual.results(2, program)


def test_schedulers_take_it():
    def program(comm):
        net = model()
        optimizer = EF21(net.parameters(), comm, TopK(0.2), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, comm.Get_rank(), step).backward()
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"]

    assert virtual.results(2, program) == [0.0125] * 2


@pytest.mark.parametrize("kind", ["foreach", "fused", "plain"])
def test_foreach_and_fused_optimizers(kind):
    def program(comm):
        net = model()
        options = {} if kind == "plain" else {kind: True}
        adam = torch.optim.AdamW(net.parameters(), lr=1e-2, **options)
        optimizer = DistributedOptimizer(adam, comm, TopK(0.2))
        losses = []
        for step in range(60):
            optimizer.zero_grad()
            loss = loss_of(net, comm.Get_rank(), step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
        return parameters_of(net)

    rows = virtual.results(2, program)
    assert same_bits(*rows)
