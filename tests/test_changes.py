"""EF21-PAGE and MARINA in a training: the rule is given what the papers say."""

import numpy as np
import pytest
import torch
import virtual
from torch.nn import functional as F

from mpi_ef.feedback import ErrorFeedback
from mpi_ef.jobs.train import loop as trainer
from mpi_ef.jobs.train import models
from mpi_ef.jobs.train.config import TrainConfig
from mpi_ef.jobs.train.datasets import Digits
from mpi_ef.jobs.train.loop import Trainer

STEPS, BATCH, LR = 9, 32, 0.5
EXACT = {"ef21-page": {"compressor": "identity"}, "marina": {"compressor": "randk", "ratio": 1.0, "values": "full"}}


@pytest.fixture
def same_model(monkeypatch):
    """Virtual ranks are threads, and torch has one generator: the model is drawn without it."""

    def drawn(_config):
        model = models.mlp()
        with torch.no_grad():
            for number, p in enumerate(model.parameters()):
                p.copy_(torch.from_numpy(np.random.default_rng(number).normal(size=p.shape) / 8))
        return Digits(), model

    monkeypatch.setattr(trainer, "_build", drawn)
    return drawn


def config_of(rule, **more):
    return TrainConfig(**{"model": "mlp", "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "placement": "gradient",
                          "clip": 0.0, "batch": BATCH, "steps": STEPS, "lr": LR, "warmup": 0, "rule": rule}
                       | EXACT[rule] | more)


@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("n", [1, 2])
def test_steps_are_those_of_the_papers(same_model, rule, n):
    """Where nothing is lost: g = mean_i grad f_i(x) over all samples, or g + mean_i of how a batch's gradient changed."""
    seen = {}

    def program(comm):
        made, path, batches = Trainer(comm, config_of(rule, whole=0.3)), [], []
        following = made._next

        def noted():
            batches.append(following())
            return batches[-1]

        made._next = noted
        for _ in range(STEPS):
            made.step()
            path.append(made.optimizer.flat.values.copy())
        seen[comm.Get_rank()] = batches, made._own
        draws = [np.random.default_rng((0, 0xC01, step)).random() < 0.3 for step in range(1, STEPS + 1)]
        return path, draws

    path, draws = virtual.results(n, program)[0]
    whole = [True, *draws[1:]]
    assert 1 < sum(whole) < STEPS
    data, net = same_model(None)
    before, g = None, None

    def mean_gradient(samples):
        total = 0.0
        for own in samples:
            net.zero_grad()
            inputs, targets = data.batch(own, 0)
            F.cross_entropy(net(inputs), targets).backward()
            total = total + torch.cat([p.grad.flatten() for p in net.parameters()]) / n
        return total

    def vector():
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    def put(x):
        torch.nn.utils.vector_to_parameters(x, net.parameters())

    rates = [trainer.learning_rate(config_of(rule), step) for step in range(1, STEPS + 1)]
    for step in range(STEPS):
        x = vector()
        if whole[step]:
            g = mean_gradient([seen[rank][1] for rank in range(n)])
        else:
            batch = [seen[rank][0][step] for rank in range(n)]
            new = mean_gradient(batch)
            put(before)
            g = g + new - mean_gradient(batch)
        before = x
        put(x - rates[step] * g)
        np.testing.assert_allclose(path[step], vector().numpy(), rtol=1e-4, atol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("rule", EXACT)
def test_a_skipped_step_is_followed_by_a_whole_one(same_model, rule):
    """What a batch has changed since would be missing in the estimate for ever."""
    told = []

    def program(comm):
        made = Trainer(comm, config_of(rule, whole=1e-9))
        (channel,) = made.optimizer.channels()
        tell = ErrorFeedback.tell

        def noted(**inputs):
            told.append(any(inputs.values()))
            tell(channel, **inputs)

        channel.tell = noted
        for step in range(1, 6):
            made.step()
            if step == 3:
                hook = next(made.model.parameters()).register_hook(lambda grad: grad * float("nan"))
            if step == 4:
                hook.remove()
                assert made.optimizer.skipped_steps == 1

    with pytest.warns(RuntimeWarning, match="skipped"):
        virtual.results(1, program)
    assert told == [True, False, False, False, True]


@pytest.mark.parametrize("rule", EXACT)
def test_a_run_goes_on_with_the_same_bits(same_model, tmp_path, rule):
    """The parameters before the last step belong to what is saved."""
    from mpi_ef.jobs.train.program import train

    def run(folder, **more):
        config = config_of(rule, checkpoint_every=4, out=tmp_path / folder, seed=1, **more)
        return virtual.results(2, lambda comm: train(comm, config))[0]

    once = run("once")
    run("twice", stop_after=4)
    assert run("twice", resume="exact")["parameters_crc32"] == once["parameters_crc32"]


def test_what_is_learned_beside_is_of_the_parameters_as_they_are(same_model):
    """Not of those before the last step, where the other half of the change comes from: g is the gradient of a bias."""
    def program(comm):
        made, seen, batches = Trainer(comm, config_of("ef21-page", whole=1e-9, precondition="window",
                                                      precondition_every=1)), [], []
        watcher, following = made.optimizer.preconditioner, made._next
        close = watcher.close

        def noted(scale):
            seen.append((watcher._sums._outputs[-1].clone(), made.optimizer.flat.values.copy()))
            return close(scale)

        def next_one():
            batches.append(following())
            return batches[-1]

        watcher.close, made._next = noted, next_one
        for _ in range(3):
            made.step()
        data, net = same_model(None)
        for (g, values), samples in list(zip(seen, batches, strict=True))[1:]:
            torch.nn.utils.vector_to_parameters(torch.from_numpy(values), net.parameters())
            net.zero_grad()
            inputs, targets = data.batch(samples, 0)
            F.cross_entropy(net(inputs), targets).backward()
            np.testing.assert_allclose(g, [*net.parameters()][-1].grad, rtol=1e-5, atol=1e-7)

    virtual.results(1, program)
