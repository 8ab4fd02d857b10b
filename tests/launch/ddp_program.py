"""Programs for DistributedDataParallel on real processes, started by test_ddp.py: ``python ddp_program.py RANKS FOLDER``.

All programs run one after the other in one world, and each prints a line when it has passed on all ranks. Data differ from
rank to rank.
"""

import copy
import os
import sys
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from programs import PLANS, exchanges
from vectors_for_tests import gaussian

from mpi_ef import (
    MKOR,
    DistributedOptimizer,
    ErrorFeedback,
    Identity,
    LowRank,
    Preconditioner,
    Quantize,
    RandK,
    Sign,
    TopK,
    allgather,
    allreduce,
    plan_for,
)
from mpi_ef.collectives import ClientsMean, GatherMean, TwoPhaseMean
from mpi_ef.comm.nodes import RANKS_PER_NODE
from mpi_ef.ddp import FeedbackHook, ProcessGroupComm
from mpi_ef.errors import DisagreementError, DtypeError, MpiEfError, OptionError, PeerError, ShapeError
from mpi_ef.kernels.backend import on_device_side
from mpi_ef.kernels.device import bus

SMALL_BUCKETS = 0.002  # MB
ONE_BUCKET = {"ef21": TopK(0.1, values=Quantize("bf16")), "econtrol": TopK(0.1), "ef14": Sign(block=64)}
LENGTH, STEPS = 1001, 6
PER_PARAMETER = TopK(0.1, segments="parameters")


class WatchedHook(FeedbackHook):
    """Remembers which parameters came in which buckets."""

    def run(self, bucket):
        layout = [name for p in bucket.parameters() for name, own in self._parameters.items() if own is p]
        if bucket.index() == 0:
            self.layouts = [*getattr(self, "layouts", []), []]
        self.layouts[-1].append(layout)
        return super().run(bucket)


class Known(nn.Module):
    """A model whose gradient is what it is called with; the parameters are used in another order than they are listed."""

    SHAPES: ClassVar = {"a": (40, 13), "b": (7,), "c": (4, 3, 3, 3), "d": (600,), "e": (1,), "f": (20, 30), "g": (33,)}
    USED = "fagdbce"

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, shape in self.SHAPES.items():
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype).to(memory_format=layout)))

    def forward(self, gradients):
        total = torch.zeros(())
        for name in self.USED:
            if name in gradients:
                total = total + (getattr(self, name) * gradients[name]).sum()
        return total


def known_gradients(rank, step, dtype=np.float32):
    sizes = {name: int(np.prod(shape)) for name, shape in Known.SHAPES.items()}
    return {name: torch.from_numpy(gaussian(rank, d, dtype, step=100 * number + step)).view(Known.SHAPES[name])
            for number, (name, d) in enumerate(sizes.items())}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [
        nn.Linear(20, 48),
        nn.Tanh(),
        nn.Linear(48, 48),
        nn.Tanh(),
        nn.Linear(48, 48),
        nn.Tanh(),
        nn.Linear(48, 3),
    ]
    return nn.Sequential(*layers).to(dtype)


def batch(step, dtype=torch.float32):
    x = torch.from_numpy(gaussian(dist.get_rank(), 64 * 20, np.float64, step=step)).to(dtype).view(64, 20)
    return x, torch.tanh(x[:, :3])


def backward(model, step, dtype=torch.float32):
    x, y = batch(step, dtype)
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss.item()


def train(model, steps, lr=0.1, dtype=torch.float32, momentum=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses = []
    for step in steps:
        losses.append(backward(model, step, dtype))
        optimizer.step()
    return losses


def everywhere(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def bits(tensors):
    return b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)


def assert_same_everywhere(tensors):
    assert len(set(everywhere(bits(tensors)))) == 1


def arrays(hook):
    return {(name, array): tensor for name, saved in hook.state_dict()["parameters"].items()
            for array, tensor in saved["arrays"].items()}


def assert_equal_arrays(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert bits([tensor]) == bits([other[key]]), key


def assert_rebuilt(hook):
    """DDP has cut its buckets anew after the first step, into several that hold the parameters in another order."""
    first, second = hook.layouts[:2]
    assert len(second) > 2
    assert list(chain(*first)) != list(chain(*second))
    assert sorted(chain(*first)) == sorted(chain(*second))
    assert all(layout == second for layout in hook.layouts[2:])


def raised(call):
    """Return the error of every rank."""
    error = None
    try:
        call()
    except MpiEfError as caught:
        error = caught
    return everywhere(None if error is None else (type(error), str(error)))


def same_plans_as_over_mpi(folder):
    """Leave the results of all plans on a process group; test_ddp.py compares them with virtual ranks."""
    comm = ProcessGroupComm()
    for number, name in enumerate(PLANS):
        for d in (1, 65, 1001):
            rows = exchanges(name, d, np.float32)(comm)
            np.savez(folder / f"plan_{number}_{d}_{comm.Get_rank()}.npz", *rows)
    at_once = exchanges("dense", 100_003, np.float32)(comm)
    with mock.patch.dict(os.environ, {RANKS_PER_NODE: "1"}):
        in_pairs = exchanges("dense", 100_003, np.float32)(comm)
    for row, other in zip(at_once, in_pairs, strict=True):
        np.testing.assert_array_equal(row, other)


def communicator(folder):
    """The rest of what the library does with a communicator."""
    comm = ProcessGroupComm()
    n, rank = comm.Get_size(), comm.Get_rank()
    x = gaussian(rank, 501)
    x.flags.writeable = False
    mean = np.mean([gaussian(r, 501).astype(np.float64) for r in range(n)], axis=0)
    for _ in range(2):
        np.testing.assert_allclose(allreduce(comm, x, Identity()), mean, atol=1e-6)
    assert comm.Get_attr(-1) is None
    np.testing.assert_array_equal(allgather(comm, x, Identity()), [gaussian(r, 501) for r in range(n)])
    plan = ClientsMean(comm, TopK(0.5), 20, np.float64, clients=2 * n + 1)
    own = np.concatenate([gaussian(plan.first + j, 20, np.float64) for j in range(plan.own)])
    feedback = ErrorFeedback("ef21", plan, dense_steps=1)
    expected = np.mean([gaussian(client, 20, np.float64) for client in range(2 * n + 1)], axis=0)
    np.testing.assert_allclose(feedback.step(own), expected, atol=1e-12)
    feedback.step(own)
    model = network()
    with torch.no_grad():
        model[0].bias += rank
    optimizer = DistributedOptimizer(torch.optim.Adam(model.parameters()), comm, TopK(0.1))
    train_with = nn.functional.mse_loss(model(batch(0)[0]), batch(0)[1])
    train_with.backward()
    optimizer.step()
    assert_same_everywhere(model.parameters())
    received = np.zeros((n, 4))
    request = comm.Iallgather(np.full(4, float(rank)), received)
    while not request.Test():
        pass
    request.Wait()
    assert (received == np.arange(n)[:, None]).all()
    comm.Barrier()


def communicator_refuses(folder):
    comm = ProcessGroupComm()
    long = [np.zeros((1, 8), np.uint8), 1, "a datatype"]
    for call in (lambda: comm.Allgather(long, long), lambda: comm.Ialltoall(long, long)):
        for kind, text in raised(call):
            assert kind is OptionError
            assert "2 GiB" in text
            assert "\n" not in text
    every_second = np.zeros(4 * comm.Get_size())[::2]
    assert {kind for kind, _ in raised(lambda: comm.Allgather(np.zeros(2), every_second))} == {ShapeError}
    alone = [dist.new_group([r]) for r in range(comm.Get_size())]
    assert ProcessGroupComm(alone[comm.Get_rank()]).Get_size() == 1
    if comm.Get_size() > 1:
        assert {kind for kind, _ in raised(lambda: ProcessGroupComm(alone[comm.Get_rank() - 1]))} == {OptionError}


def identity_is_ddp(folder):
    models = [DDP(copy.deepcopy(network(torch.float64)), bucket_cap_mb=SMALL_BUCKETS) for _ in range(2)]
    hook = WatchedHook(models[1], Identity(), rule="ef14")
    losses = [train(model, range(20), dtype=torch.float64, momentum=0.9) for model in models]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(*losses, rtol=1e-9)
    assert_rebuilt(hook)
    assert hook.steps == 20


def ef21_trains(folder):
    model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
    hook = WatchedHook(model, TopK(0.1), rule="ef21", dense_steps=1)
    losses, sent = [], [0]
    for steps in (range(1), range(1, 2), range(2, 60)):
        losses += train(model, steps, lr=0.3)
        sent.append(hook.sent_nbytes)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert_same_everywhere(model.parameters())
    assert_same_everywhere(p.grad for p in model.parameters())
    assert_rebuilt(hook)
    state = hook.state_dict()
    for name, p in model.module.named_parameters():
        own = state["parameters"][name]["arrays"]
        mean = torch.stack(everywhere(own["g_i"])).double().mean(dim=0)
        torch.testing.assert_close(own["g"].double(), mean, rtol=1e-4, atol=1e-6)
        assert bits([own["g"]]) == bits([p.grad])
        assert own["g_i"].abs().sum() > 0
    n, d = dist.get_world_size(), sum(p.numel() for p in model.parameters())
    if n > 1:  # the first step sends everything, all others a tenth and where it belongs
        assert sent[1] > 2 * (n - 1) / n * 4 * d
        assert 0 < sent[2] - sent[1] < (n - 1) * 0.1 * 4 * d * 1.5
        assert sent[3] - sent[2] == 58 * (sent[2] - sent[1])
    else:
        assert sent == [0, 0, 0, 0]


def one_bucket(folder):
    """Leave the gradients of one bucket; test_ddp.py compares them with virtual ranks."""
    rank = dist.get_rank()
    for rule, compressor in ONE_BUCKET.items():
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(LENGTH))
        model.forward = lambda x, model=model: (model.w * x).sum()
        model = DDP(model)
        FeedbackHook(model, compressor, rule=rule, dense_steps=1, **({"eta": 0.1} if rule == "econtrol" else {}))
        results = []
        for step in range(STEPS):
            model.zero_grad()
            model(torch.from_numpy(gaussian(rank, LENGTH, step=step))).backward()
            results.append(model.module.w.grad.numpy().copy())
        np.savez(folder / f"bucket_{rule}_{rank}.npz", *results)


def state_follows_parameters(folder):
    """Selection per parameter does not depend on buckets: every gradient is that of a rule on this parameter alone."""
    comm = ProcessGroupComm()
    for rule, dtype, options in (("ef21", np.float32, {}), ("ef14", np.float64, {}), ("ef21-sgdm", np.float32, {}),
                                 ("econtrol", np.float32, {"eta": 0.1})):
        model = DDP(Known(torch.from_numpy(np.zeros(0, dtype)).dtype), bucket_cap_mb=SMALL_BUCKETS)
        hook = WatchedHook(model, PER_PARAMETER, rule=rule, dense_steps=1, **options)
        alone = {name: ErrorFeedback(rule, plan_for(comm, TopK(0.1), p.numel(), dtype), dense_steps=1, **options)
                 for name, p in model.module.named_parameters()}
        for step in range(4):
            gradients = known_gradients(comm.Get_rank(), step, dtype)
            model.zero_grad()
            model(gradients).backward()
            for name, p in model.module.named_parameters():
                expected = alone[name].step(gradients[name].numpy().reshape(-1))
                np.testing.assert_array_equal(
                    p.grad.contiguous().numpy().reshape(-1), expected, err_msg=f"{step} {name}"
                )
        assert_rebuilt(hook)
        for (name, array), tensor in arrays(hook).items():
            mine = alone[name].per_rank() | alone[name].replicated()
            np.testing.assert_array_equal(tensor.numpy().reshape(-1), mine[array], err_msg=f"{array} {name}")


def residuals_follow_parameters(folder):
    """What two phases have not sent yet is spread over the ranks by chunks of buckets; nothing of it is lost."""
    narrow = partial(TwoPhaseMean, reply=TopK(0.05))

    def either(longer):  # as many ranks do: what owners keep becomes errors, or there is nothing to keep yet
        return lambda comm, what, d, dtype: (narrow if (d > 500) == longer else GatherMean)(comm, what, d, dtype)

    for compressor, plan in ((Sign(block=64), plan_for), (TopK(0.1), narrow), (TopK(0.1), either(True)),
                             (TopK(0.1), either(False))):
        model = DDP(Known(torch.float64), bucket_cap_mb=SMALL_BUCKETS)
        hook = WatchedHook(model, compressor, rule="ef14", plan=plan)
        wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in Known.SHAPES.items()}
        got = copy.deepcopy(wanted)
        for step in range(5):
            gradients = known_gradients(dist.get_rank(), step, np.float64)
            model.zero_grad()
            model(gradients).backward()
            for name, p in model.module.named_parameters():
                wanted[name] += torch.stack(everywhere(gradients[name])).mean(dim=0)
                got[name] += p.grad
        assert_rebuilt(hook)
        for name, saved in hook.state_dict()["parameters"].items():
            kept = {"plan.residual": torch.zeros_like(wanted[name])} | saved["arrays"]
            e_i, residual = (torch.stack(everywhere(kept[key])) for key in ("e_i", "plan.residual"))
            assert ((residual != 0).sum(dim=0) <= 1).all()
            torch.testing.assert_close(
                got[name] + e_i.mean(dim=0) + residual.sum(dim=0), wanted[name], rtol=0, atol=1e-12
            )


def save_and_load(folder):
    """Into the same buckets with any compressor; into those of a new model where buckets do not matter."""
    file = folder / f"hook_{dist.get_rank()}.pt"
    for compressor, rule, afresh in ((TopK(0.1), "ef21", False), (Sign(block=64), "ef14", False),
                                     (RandK(0.2), "ef14", False), (LowRank(2, shapes="parameters"), "ef14", False),
                                     (PER_PARAMETER, "ef21-sgdm", True)):
        model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
        hook = WatchedHook(model, compressor, rule=rule, dense_steps=1)
        train(model, range(5))
        torch.save({"hook": hook.state_dict(), "model": model.module.state_dict()}, file)
        sent = hook.sent_nbytes
        train(model, range(5, 9))
        went_on, state, sent_then = bits(model.parameters()), arrays(hook), hook.sent_nbytes
        saved = torch.load(file, weights_only=True)
        if afresh:
            model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
            hook = WatchedHook(model, compressor, rule=rule, dense_steps=1)
        model.module.load_state_dict(saved["model"])
        hook.load_state_dict(saved["hook"])
        assert_equal_arrays(arrays(hook), {(name, array): tensor for name, of in saved["hook"]["parameters"].items()
                                           for array, tensor in of["arrays"].items()})
        assert (hook.steps, hook.sent_nbytes) == (5, sent)
        train(model, range(5, 9))
        assert_rebuilt(hook)
        assert bits(model.parameters()) == went_on
        assert_equal_arrays(arrays(hook), state)
        assert (hook.steps, hook.sent_nbytes) == (9, sent_then) or afresh


def load_before_the_first_backward_keeps_the_invariant(folder):
    saved = None
    for steps in (range(5), range(5, 9)):
        model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
        hook = WatchedHook(model, TopK(0.1))
        if saved is not None:
            hook.load_state_dict(saved)
        train(model, steps)
        assert_rebuilt(hook)
        saved = hook.state_dict()
        for of_parameter in saved["parameters"].values():
            own = of_parameter["arrays"]
            mean = torch.stack(everywhere(own["g_i"])).double().mean(dim=0)
            torch.testing.assert_close(own["g"].double(), mean, rtol=1e-4, atol=1e-6)
            assert of_parameter["steps"] == steps.stop


def loading_is_checked(folder):
    model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
    hook = FeedbackHook(model, TopK(0.1))
    train(model, range(2))
    saved, before = hook.state_dict(), arrays(hook)
    for change, part in (({"rule": "ef14"}, "rule"), ({"size": 7}, "size"), ({"compressor": "TopK(ratio=0.2)"}, "0.2"),
                         ({"parameters": {"0.weight": saved["parameters"]["0.weight"]}}, "model only")):
        for kind, text in raised(lambda change=change: hook.load_state_dict(saved | change)):
            assert kind is OptionError
            assert part in text
    wrong = copy.deepcopy(saved)
    wrong["parameters"]["0.weight"]["arrays"]["g"] = torch.zeros(3)
    assert {kind for kind, _ in raised(lambda: hook.load_state_dict(wrong))} == {ShapeError}
    assert_equal_arrays(arrays(hook), before)
    other = copy.deepcopy(saved)
    del other["parameters"]["0.weight"]["arrays"]["g"]
    hook.load_state_dict(other)
    assert {kind for kind, _ in raised(lambda: backward(model, 2))} == {OptionError}


def loading_on_one_rank_only(folder):
    model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
    hook = FeedbackHook(model, TopK(0.1))
    train(model, range(2))
    if dist.get_rank() == 0:
        hook.load_state_dict(hook.state_dict())
    errors = raised(lambda: backward(model, 2))
    if dist.get_world_size() > 1:
        assert {kind for kind, _ in errors} == {DisagreementError}
        assert "times loaded" in errors[0][1]


def nan_on_one_rank(folder):
    """In the last bucket only: what the others have exchanged by then counts for nothing."""
    last = dist.get_world_size() - 1
    for compressor, rule in (
        (TopK(0.1), "ef21"),
        (Sign(block=64), "ef14"),
        (TopK(0.1), "econtrol"),
        (Identity(), "ef14"),
    ):
        model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
        hook = WatchedHook(model, compressor, rule=rule)
        train(model, range(3))
        before, plans = arrays(hook), [plan["arrays"] for plan in hook.state_dict()["plans"]]
        handle = None
        if dist.get_rank() == last:
            handle = model.module[0].weight.register_hook(lambda grad: grad * float("nan"))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            backward(model, 3)
        assert [f"on rank {last};" in str(w.message) for w in seen] == ([True] if dist.get_rank() == 0 else [])
        assert all(p.grad.isnan().all() for p in model.parameters())
        assert len(hook.layouts[-1]) > 2
        assert (hook.steps, hook.skipped_steps) == (3, 1)
        assert_equal_arrays(arrays(hook), before)
        for plan, now in zip(plans, hook.state_dict()["plans"], strict=True):
            assert_equal_arrays(plan, now["arrays"])
        if handle is not None:
            handle.remove()
        train(model, range(4, 6))
        assert all(p.isfinite().all() for p in model.parameters())
        assert_same_everywhere(model.parameters())


def grad_scaler_skips_everywhere(folder):
    model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
    hook = FeedbackHook(model, TopK(0.1))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    broken = 2
    if dist.get_rank() == 0:
        warnings.simplefilter("ignore", RuntimeWarning)
        model.module[2].bias.register_hook(lambda grad: grad * float("inf") if hook.steps == broken else grad)
    moved = []
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        before = bits(model.parameters())
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(before != bits(model.parameters()))
        if step == broken:
            broken = None
    assert moved == [True, True, False, True]
    assert scaler.get_scale() == 4.0
    assert_same_everywhere(model.parameters())


def preconditioned(folder):
    """Between the backward pass of DDP and the step of any optimizer, on the same process group; as MKOR without DDP."""
    comm, models = ProcessGroupComm(), [network(torch.float64) for _ in range(2)]
    ddp = DDP(models[0], bucket_cap_mb=SMALL_BUCKETS)
    watcher = Preconditioner(ddp, comm, every=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    mkor = MKOR(torch.optim.SGD(models[1].parameters(), lr=0.1), comm, Identity(), model=models[1], placement="gradient",
                every=3)
    for step in range(STEPS):
        backward(ddp, step, torch.float64)
        watcher.step()
        optimizer.step()
        backward(models[1], step, torch.float64)
        mkor.step()
    assert watcher.updates == mkor.updates == 3  # in steps 0, 1, 3
    assert [row.part for row in watcher.layers] == ["both"] * 4
    assert_same_everywhere(models[0].parameters())
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    watcher.remove_hooks()


def no_sync(folder):
    model, plain = (DDP(network(torch.float64), bucket_cap_mb=SMALL_BUCKETS) for _ in range(2))
    hook = WatchedHook(model, Identity(), rule="ef14")
    for step in range(0, 6, 2):
        for m in (model, plain):
            m.zero_grad()
            with m.no_sync():
                x, y = batch(step, torch.float64)
                nn.functional.mse_loss(m(x), y).backward()
            x, y = batch(step + 1, torch.float64)
            nn.functional.mse_loss(m(x), y).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert hook.steps == 3


def ways_of_ddp(folder):
    """find_unused_parameters, static_graph, gradients that are views of buckets, uneven inputs."""
    rank, n = dist.get_rank(), dist.get_world_size()
    for options in ({"find_unused_parameters": True}, {"gradient_as_bucket_view": True}, {"static_graph": True},
                    {"find_unused_parameters": True, "gradient_as_bucket_view": True}):
        model, plain = (DDP(Known(), bucket_cap_mb=SMALL_BUCKETS, **options) for _ in range(2))
        hook = WatchedHook(model, Identity(), rule="ef14")
        for step in range(4):
            gradients = known_gradients(rank, step)
            if "find_unused_parameters" in options:
                del gradients["abcdef"[step]]
                gradients.pop("bcd"[rank], None)
            for m in (model, plain):
                m.zero_grad()
                m(gradients).backward()
            for (name, p), q in zip(model.module.named_parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), (options, step, name)
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, msg=f"{options} {step} {name}")
        assert hook.steps == 4
    model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
    hook = FeedbackHook(model, TopK(0.2), rule="ef21")
    with model.join():
        train(model, range(2 + rank))
    assert_same_everywhere(model.parameters())
    assert hook.steps == 1 + n


def refusals(folder):
    rank, n = dist.get_rank(), dist.get_world_size()
    half = DDP(network(torch.bfloat16))
    for kind, text in raised(lambda: FeedbackHook(half, TopK(0.1))):
        assert kind is DtypeError
        assert "0.weight is torch.bfloat16" in text
        assert "\n" not in text
    model = DDP(network())
    for call, part in ((lambda: FeedbackHook(network(), TopK(0.1)), "DistributedDataParallel(model)"),
                       (lambda: FeedbackHook(model, 0.1), "no compressor"),
                       (lambda: FeedbackHook(model, TopK(0.1), rule="ef12"), "did you mean")):
        for kind, text in raised(call):
            assert kind is OptionError
            assert part in text
    embedding = DDP(nn.Embedding(10, 4, sparse=True))
    FeedbackHook(embedding, TopK(0.1))
    assert {kind for kind, _ in raised(lambda: embedding(torch.tensor([rank])).sum().backward())} == {DtypeError}
    on_rules = DDP(network())
    FeedbackHook(on_rules, TopK(0.1), rule="ef21-plus")
    assert {kind for kind, _ in raised(lambda: backward(on_rules, 0))} == {OptionError}
    if n > 1:
        errors = raised(lambda: FeedbackHook(model, TopK(0.1 * (1 + rank))))
        assert {kind for kind, _ in errors} == {DisagreementError}
        assert "compressor" in errors[0][1]
        errors = raised(lambda: FeedbackHook(model, TopK(0.1) if rank else 0.1))
        assert [kind for kind, _ in errors] == [OptionError] + [PeerError] * (n - 1)
        groups = [dist.new_group([r]) for r in range(n)]
        assert {kind for kind, _ in raised(lambda: FeedbackHook(model, TopK(0.1), process_group=groups[rank]))} == {
            OptionError
        }


def part_of_the_world(folder):
    """A model on some of the processes only."""
    rank, n = dist.get_rank(), dist.get_world_size()
    members = list(range(1, n)) or [0]
    group = dist.new_group(members)
    if rank in members:
        model = DDP(network(), process_group=group, bucket_cap_mb=SMALL_BUCKETS)
        hook = FeedbackHook(model, Sign(block=64), rule="ef14")
        train(model, range(4))
        values = [None] * len(members)
        dist.all_gather_object(values, bits(model.parameters()), group)
        assert len(set(values)) == 1
        assert hook.comm.Get_size() == len(members)
    dist.barrier()


class PatientHook(WatchedHook):
    """Remembers for which buckets somebody has waited for a device."""

    waits: ClassVar = []

    def run(self, bucket):
        before = len(self.waits)
        future = super().run(bucket)
        self.waited = [*getattr(self, "waited", []), (len(self.layouts), bucket.is_last(), len(self.waits) > before)]
        return future


def moves_no_memory_of_hosts(which):
    """Return a context in which a group is taken for one with NCCL."""
    told = dist.get_backend_config
    return mock.patch.object(dist, "get_backend_config", lambda group=None: "cuda:nccl" if group is which else told(group))


def beside_a_group_of_devices(folder):
    """A group that moves no memory of the host has one beside it, where buckets wait for devices of any speed.

    Nothing waits for a device before the last bucket; the bits are those of a group that serves both.
    """
    chance = np.random.default_rng(dist.get_rank())
    wait = bus.Arrival.wait

    def waiting(arrival):
        PatientHook.waits.append(arrival)
        return wait(arrival)

    def trained(compressor, rule, plan):
        model = DDP(network(), bucket_cap_mb=SMALL_BUCKETS)
        hook = PatientHook(model, compressor, rule=rule, plan=plan)
        train(model, range(5))
        return hook, bits(model.parameters())

    for compressor, rule, plan in ((TopK(0.1), "ef21", plan_for), (Sign(block=64), "ef14", TwoPhaseMean)):
        _, plain = trained(compressor, rule, plan)
        for here in (lambda _: bool(chance.integers(3) == 0), lambda _: False):
            with (on_device_side(), moves_no_memory_of_hosts(dist.group.WORLD), mock.patch.object(bus.Arrival, "here", here),
                  mock.patch.object(bus.Arrival, "wait", waiting)):
                hook, beside = trained(compressor, rule, plan)
            assert beside == plain
            assert_rebuilt(hook)
        assert all(waited == last for step, last, waited in hook.waited if step > 2)


def beside_a_part_of_the_world(folder):
    """Ranks that are in as many groups get one beside that with NCCL; others are told, where torch would hang."""
    n, rank = dist.get_world_size(), dist.get_rank()
    group, alone = dist.new_group(range(max(1, n - 1))), [dist.new_group([0]) for _ in range(4)]
    if rank < n - 1:  # with one rank there is no part of the world
        model = DDP(network(), process_group=group, bucket_cap_mb=SMALL_BUCKETS)
        with moves_no_memory_of_hosts(group):
            if n == 2:
                hook = FeedbackHook(model, TopK(0.1))
                train(model, range(3))
                assert hook.comm.Get_size() == 1
            else:
                with pytest.raises(OptionError, match="are in different numbers of process groups, from") as told:
                    FeedbackHook(model, TopK(0.1))
                assert told.value.everywhere
    dist.barrier()
    del alone


PROGRAMS = (same_plans_as_over_mpi, communicator, communicator_refuses, identity_is_ddp, ef21_trains, one_bucket,
            state_follows_parameters, residuals_follow_parameters, save_and_load,
            load_before_the_first_backward_keeps_the_invariant, loading_is_checked, loading_on_one_rank_only,
            nan_on_one_rank, grad_scaler_skips_everywhere, preconditioned, no_sync, ways_of_ddp, refusals, part_of_the_world,
            beside_a_group_of_devices, beside_a_part_of_the_world)


def rank_main(rank, n, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=n)
    for program in PROGRAMS:
        program(folder)
        dist.barrier()
        if rank == 0:
            print(f"passed {program.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    n, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.multiprocessing.start_processes(rank_main, (n, folder), nprocs=n, start_method="fork")
