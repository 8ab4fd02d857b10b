"""Loops of other libraries in which something happens on rank 1 alone: ``loops_program.py LIBRARY CASE OUT``."""

import sys
from pathlib import Path

import torch
from mpi4py.MPI import COMM_WORLD as comm

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
STEP = 5


def transformers(case, out):
    from hf_trainer import build
    from transformers import TrainerCallback

    class OnRankOne(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if case == "raises" and comm.rank == 1 and state.global_step == STEP:
                raise RuntimeError("no more")

        def on_step_end(self, args, state, control, **_):
            if case == "stops" and comm.rank == 1 and state.global_step == STEP:
                control.should_training_stop = True

    trainer = build(out)
    trainer.callback_handler.callbacks.insert(1, OnRankOne())
    trainer.train()
    return trainer.state.global_step


def transformers_data(out):
    """Data that no rank has whole: an iterable to train on, and an odd number of samples to evaluate and predict."""
    import numpy as np
    from hf_trainer import build, samples
    from torch.utils.data import IterableDataset

    from mpi_ef import shard

    class Own(IterableDataset):
        def __iter__(self):
            return iter(samples(128, comm.rank))

    held_out, counts = samples(51, 3), []

    def compute_metrics(prediction):
        counts.append(len(prediction.label_ids))
        return {"accuracy": float(comm.rank)}  # one rank's only, unless a mean is taken

    trainer = build(out)
    part = shard(held_out, comm)
    trainer.train_dataset, trainer.eval_dataset, trainer.compute_metrics = Own(), part, compute_metrics
    means = [trainer.evaluate()["eval_accuracy"]]
    trainer.args.max_steps = 4
    trainer.train()
    assert counts[0] == 52, counts
    assert means == [0.5 * (comm.size - 1)], means
    answer = trainer.predict(part)
    indices = torch.tensor(part.indices).split(trainer.args.per_device_eval_batch_size)
    order = torch.cat([trainer.accelerator.gather(of_batch) for of_batch in indices])
    assert np.array_equal(answer.label_ids, [held_out[i]["labels"] for i in order.tolist()])
    trainer = build(out)
    trainer.train_dataset, trainer.args.max_steps = samples(64, 1), 1
    trainer.train()  # the same samples on all ranks
    return 4


def lightning_data(out):
    import torchmetrics
    from lightning_module import Model, build, samples
    from torch.utils.data import DataLoader

    class Measured(Model):
        def __init__(self):
            super().__init__()
            self.error = torchmetrics.MeanSquaredError()

        def validation_step(self, batch, number):
            super().validation_step(batch, number)
            self.error(self.net(batch[0]), batch[1])
            self.log("error", self.error)

    trainer = build(out)[1]
    trainer.validate(model := Measured(), DataLoader(samples(128, 1), 64), verbose=False)
    torch.testing.assert_close(trainer.callback_metrics["error"], trainer.callback_metrics["val_loss"])
    trainer.callbacks.clear()
    trainer.fit_loop.max_epochs = 1
    trainer._accelerator_connector.use_distributed_sampler = False  # the same samples on all ranks
    trainer.fit(model, DataLoader(samples(64, 1), 64), DataLoader(samples(128, 1), 64))
    return 1


def accelerate_data(out):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, IterableDataset

    from mpi_ef import DistributedOptimizer, TopK
    from mpi_ef.integrations import one_process, prepare_accelerator

    class Own(IterableDataset):
        def __init__(self, first):
            self.first = first

        def __iter__(self):
            return iter(torch.arange(32.0).reshape(8, 4) + self.first)

    one_process(comm)
    accelerator = Accelerator()
    for first in (comm.rank, 0):  # the second time the same samples on all ranks
        model = torch.nn.Linear(4, 1)
        optimizer = DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), comm, TopK(0.5), model=model)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Own(first), 4))
        prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
        for x in loader:
            assert x[0, 0] % 16 == first
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    with accelerator.split_between_processes([*range(5)]) as part:
        assert part == [[0, 1, 2], [3, 4]][comm.rank]
    return 2


def lightning(case, out):
    from lightning.pytorch.callbacks import Callback
    from lightning_module import BATCH, build, samples
    from torch.utils.data import DataLoader

    class OnRankOne(Callback):
        def on_train_batch_end(self, trainer, *_):
            if comm.rank == 1 and trainer.global_step == STEP:
                if case == "raises":
                    raise RuntimeError("no more")
                trainer.should_stop = True

    model, trainer = build(out)
    trainer.callbacks.append(OnRankOne())
    trainer.fit(model, DataLoader(samples(2048, 1), BATCH // 2 // comm.size, shuffle=True), DataLoader(samples(512, 2), 256))
    return trainer.global_step


def accelerate(case, out):
    from accelerate import Accelerator

    from mpi_ef import DistributedOptimizer, TopK, seed_rank
    from mpi_ef.integrations import one_process, prepare_accelerator

    one_process(comm)
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    seed_rank(comm, 0)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = DistributedOptimizer(adamw, comm, TopK(0.1), model=model)
    model, optimizer = accelerator.prepare(model, optimizer)
    prepare_accelerator(accelerator, comm, model=model, optimizer=optimizer)
    assert accelerator.gather(torch.tensor([comm.rank])).tolist() == [*range(comm.size)]
    assert accelerator.is_main_process == (comm.rank == 0)

    def train(steps):
        for step in range(steps):
            if step == STEP and comm.rank == 1:
                if case == "raises":
                    raise RuntimeError("no more")
                accelerator.set_trigger()
            if case == "stops" and accelerator.check_trigger():
                return step
            x = torch.randn(16, 8)
            accelerator.backward((model(x) - x[:, :1]).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return steps

    if case == "resumes":
        train(10)
        accelerator.save_state(out)
        train(10)
        went_on = [p.detach().clone() for p in model.parameters()]
        accelerator.load_state(out)
        train(10)
        assert all(torch.equal(*pair) for pair in zip(went_on, model.parameters(), strict=True))
        return 20
    return train(20)


if __name__ == "__main__":
    library, case, *rest = sys.argv[1:]
    steps = globals()[f"{library}_data"](*rest) if case == "data" else globals()[library](case, *rest)
    sys.stdout.write(f"rank {comm.rank}: {steps} steps\n")
